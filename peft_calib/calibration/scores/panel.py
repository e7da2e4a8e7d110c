"""The panel: every score of one set of rows, each pass over the data done once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from ..bins import Groups, equal_mass_bins, group_by_value
from ..inputs import Rows
from . import binned, selective
from .columns import ColumnBins, column_bins
from .smooth import smooth_calibration_error
from .table import KEYS
from .top_label_pass import TopLabelSums
from .weighted import WeightedSums, top_of, weighted_columns, weighted_groups, weighted_sums

# Numbers of which intermediate results are held at once.
ENTRIES = 1 << 14


class Tables(NamedTuple):
    """The sufficient statistics that all scores, but the row-wise ones, are computed from."""

    sums: TopLabelSums | WeightedSums  # Over rows, and of the top label's uniform bins
    columns: ColumnBins  # Bins of every class column
    groups: Groups  # Top-label rows grouped by confidence, ascending


def build_tables(rows: Rows, num_bins: int) -> Tables:
    """All passes and the one sort over the rows."""
    if rows.weights is not None:
        groups = weighted_groups(*top_of(rows), rows.weights)
        return Tables(weighted_sums(rows, num_bins), weighted_columns(rows, num_bins), groups)
    sums, size = TopLabelSums(num_bins), len(rows.labels)
    confidence, correct = np.empty(size), np.empty(size, bool)
    sums.add(rows.probabilities, rows.labels, checked=True, into=(confidence, correct))
    return Tables(sums, column_bins(rows, num_bins), group_by_value(confidence, correct))


def compute_panel(rows: Rows, num_bins: int, tables: Tables | None = None, *, warn: bool = True) -> dict[str, float]:
    """Every score of the panel; those about errors are NaN when there is no error (or nothing but errors)."""
    tables = tables or build_tables(rows, num_bins)
    if warn and tables.sums.num_impossible:
        binned.warn_impossible(tables.sums.num_impossible, len(rows.labels))
    means = tables.sums.means()
    if rows.weights is None:
        entropy = mean_entropy(rows.probabilities)
    else:
        entropy = float(row_entropy(rows.probabilities) @ rows.weights / rows.weights.sum())
    return panel_of(
        {**means, "mean_entropy": entropy},
        binned.scores_of_bins(tables.sums.bins),
        scores_of_groups(tables.groups, num_bins),
        binned.scores_of_columns(tables.columns, means["brier"]),
    )


def panel_of(*parts: Mapping[str, np.ndarray | float]) -> dict[str, float]:
    """Scores of one set of rows as plain numbers, in the order of a report."""
    values = {key: value for part in parts for key, value in part.items()}
    return {key: float(values[key]) for key in KEYS if key in values}


def scores_of_groups(groups: Groups, num_bins: int) -> dict[str, np.ndarray | float]:
    """The scores that follow from rows (or cells) in order of top-label confidence."""
    return {
        "ace": binned.calibration_error(equal_mass_bins(groups, num_bins)),
        "smooth_ece": smooth_calibration_error(groups),
        "ks_error": binned.ks_error(groups),
        **selective.ranking_scores(selective.rank_by_confidence(groups)),
    }


def row_entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy `-sum_k p_k ln p_k` over the last axis in nats, with `0 ln 0 = 0`."""
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    parts = [np.einsum("nk,nk->n", part, _surprise(part)) for part in _blocks(flat)]
    return np.concatenate([np.zeros(0), *parts]).reshape(probabilities.shape[:-1])


def mean_entropy(probabilities: np.ndarray) -> float:
    """Mean of `row_entropy` of `(N, C)` probabilities; a sum over all is quicker than one a row."""
    parts = (np.vdot(part, _surprise(part)) for part in _blocks(probabilities))
    return float(sum(parts)) / len(probabilities)


def _surprise(probabilities: np.ndarray) -> np.ndarray:
    """`-ln p`, finite at 0."""
    surprise = np.maximum(probabilities, np.finfo(np.float64).tiny)
    np.log(surprise, out=surprise)
    return np.negative(surprise, out=surprise)


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    size = max(1, ENTRIES // rows.shape[1])
    return (rows[i : i + size] for i in range(0, len(rows), size))
