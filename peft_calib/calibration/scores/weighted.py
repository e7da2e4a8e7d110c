"""The sufficient statistics of rows that count differently: every sum over rows becomes one of weights.

A row of weight 2 is there twice, exactly, in every score; between whole numbers the same formulas hold. What is put in
order is grouped first, each group having the sum of its rows' weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bins import (
    BinStatistics,
    Groups,
    equal_mass_bins,
    tie_key,
    top_label,
    uniform_index,
)
from ..inputs import Rows, effective_rows
from .binned import SMALLEST_PROBABILITY, loss_of_label, row_brier
from .columns import ColumnBins, stacked
from .table import TACE_THRESHOLD


@dataclass(frozen=True)
class WeightedSums:
    """What `TopLabelSums` has of rows that all count the same."""

    bins: BinStatistics  # `(B,)` of the top label; counts are sums of weights
    num_impossible: int
    averages: dict[str, float]

    def means(self) -> dict[str, float]:
        """The scores that are means over rows."""
        return self.averages


def weighted_sums(rows: Rows, num_bins: int) -> WeightedSums:
    """Means over rows, and the top label's equal-width bins."""
    weights = _weights(rows)
    confidence, correct = top_of(rows)
    of_label = rows.probabilities[np.arange(len(rows.labels)), rows.labels]
    values = {
        "accuracy": correct,
        "nll": loss_of_label(of_label),
        "brier": row_brier(rows.probabilities, rows.labels),
        "mean_confidence": confidence,
    }
    averages = {key: float(value @ weights / weights.sum()) for key, value in values.items()}
    bins = weighted_bins(confidence, correct, weights, num_bins)
    return WeightedSums(bins, int((of_label < SMALLEST_PROBABILITY).sum()), averages)


def top_of(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """`(N,)` confidence of each row, and 1.0 where its predicted class is the label."""
    confidence, predicted = top_label(rows.probabilities)
    return confidence, (predicted == rows.labels).astype(np.float64)


def weighted_bins(values: np.ndarray, outcomes: np.ndarray, weights: np.ndarray, num_bins: int) -> BinStatistics:
    """`(B,)` equal-width statistics; counts are sums of weights."""
    index = uniform_index(values, num_bins)
    parts = (weights, weights * values, weights * outcomes)
    return BinStatistics(*(np.bincount(index, weights=part, minlength=num_bins) for part in parts))


def weighted_groups(values: np.ndarray, outcomes: np.ndarray, weights: np.ndarray) -> Groups:
    """Rows grouped by distinct value, ascending; what counts as tied is what `group_by_value` takes for it.

    Example:
        >>> weighted_groups(np.array([0.9, 0.6, 0.9]), np.array([1.0, 0.0, 0.0]), np.array([1.0, 0.5, 2.0])).counts
        array([0.5, 3. ])
    """
    keys, inverse = np.unique(tie_key(values), return_inverse=True)
    place, size = inverse.reshape(-1), len(keys)
    counts, hits = (np.bincount(place, weights=part, minlength=size) for part in (weights, weights * outcomes))
    return Groups(counts, keys * counts, hits)


def weighted_columns(rows: Rows, num_bins: int) -> ColumnBins:
    """Bins of every class column against `labels == class`."""
    weights, p = _weights(rows), rows.probabilities
    uniform, mass, kept = [], [], []
    hits = rows.labels[:, None] == np.arange(p.shape[1])
    for k in range(p.shape[1]):
        outcomes, high = hits[:, k].astype(np.float64), p[:, k] > TACE_THRESHOLD
        uniform.append(weighted_bins(p[:, k], outcomes, weights, num_bins))
        mass.append(equal_mass_bins(weighted_groups(p[:, k], outcomes, weights), num_bins))
        kept.append(equal_mass_bins(weighted_groups(p[high, k], outcomes[high], weights[high]), num_bins))
    high = p > TACE_THRESHOLD
    of_entries = np.broadcast_to(weights[:, None], p.shape)[high]
    pooled = weighted_groups(p[high], hits[high].astype(np.float64), of_entries)
    return ColumnBins(stacked(uniform), stacked(mass), stacked(kept), equal_mass_bins(pooled, num_bins))


def drawn_bins(bins: BinStatistics, rows: Rows) -> BinStatistics:
    """Bins as a picture takes them: of so many rows as say as much, so that its intervals are theirs."""
    factor: Any = effective_rows(_weights(rows)) / bins.counts.sum(axis=-1, keepdims=True)
    return BinStatistics(*(part * factor for part in vars(bins).values()))


def _weights(rows: Rows) -> np.ndarray:
    assert rows.weights is not None
    return rows.weights
