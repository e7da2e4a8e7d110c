# SPDX-License-Identifier: Apache-2.0
"""The panel: every score of one set of rows, each sort and each pass over the data done once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from peft_calib.calibration.bins import (
    BinStatistics,
    Groups,
    classwise_uniform_bins,
    equal_mass_bins,
    group_by_value,
    top_label,
    uniform_bins,
)
from peft_calib.calibration.inputs import Rows
from peft_calib.calibration.scores import binned, selective
from peft_calib.calibration.scores.smooth import smooth_calibration_error

TACE_THRESHOLD = 0.01
# Numbers of which intermediate results are held at once.
ENTRIES = 1 << 18

# What each key of a report means; the report prints these lines.
DEFINITIONS = {
    "accuracy": "share of rows whose first most probable class is the label",
    "nll": "mean negative log-likelihood, nats",
    "brier": "mean over rows of the sum over classes of squared errors, in [0, 2]",
    "brier_reliability": "Murphy's reliability over class-wise equal-width bins",
    "brier_resolution": "Murphy's resolution over the same bins",
    "brier_uncertainty": "Murphy's uncertainty, sum of q (1 - q) over classes",
    "brier_within_bin": "what binning leaves: brier - (reliability - resolution + uncertainty)",
    "ece": "top label, equal-width bins (lo, hi], L1",
    "mce": "as ece, largest gap of a bin that is not empty",
    "rmsce": "as ece, L2",
    "rmsce_debiased": "as rmsce, sampling variance removed (Kumar et al., 2019)",
    "ace": "top label, equal-mass bins with ties spread, L1",
    "ace_classwise": "each class column, equal-mass bins, L1, mean over classes (Nixon et al., 2019)",
    "tace": f"all class probabilities above {TACE_THRESHOLD} pooled, equal-mass bins, L1",
    "tace_classwise": f"as ace_classwise, probabilities above {TACE_THRESHOLD} only (Nixon et al., 2019)",
    "classwise_ece": "each class column, equal-width bins, L1, mean over classes (static calibration error)",
    "smooth_ece": "top label, kernel-smoothed, data-driven bandwidth (Blasiok & Nakkiran, 2023)",
    "ks_error": "top label, Kolmogorov-Smirnov, no bins (Gupta et al., 2021)",
    "overconfidence": "part of ece from bins with confidence above accuracy",
    "underconfidence": "part of ece from bins with confidence below accuracy",
    "average_gap": "as ece, every bin that is not empty weighing the same (netcal's ACE)",
    "mean_confidence": "mean top-label probability",
    "confidence_gap": "mean top-label probability minus accuracy",
    "mean_entropy": "mean entropy of the predicted distribution, nats",
    "error_auroc": "probability that an error is less confident than a correct row, ties half",
    "error_aupr": "average precision, errors positive",
    "success_aupr": "average precision, correct rows positive",
    "aurc": "mean error rate of the k surest rows over k = 1..N, ties in expectation",
    "e_aurc": "aurc above the oracle order's",
    "augrc": "area under generalised risk and coverage (Traub et al., 2024)",
}
KEYS = tuple(DEFINITIONS)
# What follows from the top label's uniform bins and two sums: no sort, no class columns.
UNORDERED_KEYS = (
    "accuracy",
    "nll",
    "brier",
    "ece",
    "mce",
    "rmsce",
    "rmsce_debiased",
    "overconfidence",
    "underconfidence",
    "average_gap",
    "mean_confidence",
    "confidence_gap",
)
# Scores that are zero for a perfectly calibrated model.
CALIBRATION_ERRORS = frozenset(
    {"ece", "mce", "rmsce", "rmsce_debiased", "ace", "ace_classwise", "tace", "tace_classwise", "classwise_ece"}
    | {"smooth_ece", "ks_error", "average_gap"}
)
# Scores over bins of every class column. Replicates keep sums of all those bins, 100 numbers a class and resample: a
# report of more classes has neither interval nor noise band of these scores, whose values stay exact.
CLASSWISE_KEYS = frozenset(
    {"classwise_ece", "ace_classwise", "tace_classwise", "tace"}
    | {"brier_reliability", "brier_resolution", "brier_uncertainty", "brier_within_bin"}
)
MOST_RESAMPLED_CLASSES = 200
# Scores where a larger value is better; the others are losses, or neither.
HIGHER_IS_BETTER = frozenset({"accuracy", "brier_resolution", "error_auroc", "error_aupr", "success_aupr"})


class Tables(NamedTuple):
    """The sufficient statistics that all scores, but the row-wise ones, are computed from.

    Attributes:
        top: `(B,)` uniform bins of top-label confidence against correctness.
        classwise: `(C, B)` uniform bins of every class column.
        groups: top-label rows grouped by confidence, ascending.
        confidence: `(N,)` top-label probability.
        correct: `(N,)` bool.
    """

    top: BinStatistics
    classwise: BinStatistics
    groups: Groups
    confidence: np.ndarray
    correct: np.ndarray


def build_tables(rows: Rows, num_bins: int) -> Tables:
    """All passes and the one sort over the rows."""
    confidence, predicted = top_label(rows.probabilities)
    correct = predicted == rows.labels
    return Tables(
        uniform_bins(confidence, correct, num_bins),
        classwise_uniform_bins(rows.probabilities, rows.labels, num_bins),
        group_by_value(confidence, correct),
        confidence,
        correct,
    )


def compute_panel(rows: Rows, num_bins: int, tables: Tables | None = None) -> dict[str, float]:
    """Every score of the panel.

    Args:
        rows: checked rows.
        num_bins: bins of every binned score.
        tables: their statistics, if already at hand.

    Returns:
        A number for each of `KEYS`. Scores about errors are NaN when there is no error (or nothing but errors).
    """
    tables = tables or build_tables(rows, num_bins)
    nll = binned.row_nll(rows.probabilities, rows.labels)
    brier = float(binned.row_brier(rows.probabilities, rows.labels).mean())
    values = {"accuracy": float(tables.correct.mean()), "nll": float(nll.mean()), "brier": brier}
    values |= {f"brier_{k}": v for k, v in binned.brier_decomposition(tables.classwise, brier).items()}
    values |= panel_of_bins(tables.top)
    values |= panel_of_groups(tables.groups, num_bins)
    values |= {
        "ace_classwise": binned.adaptive_classwise_error(rows.probabilities, rows.labels, num_bins),
        "tace": binned.pooled_adaptive_error(rows.probabilities, rows.labels, num_bins, TACE_THRESHOLD),
        "tace_classwise": binned.adaptive_classwise_error(rows.probabilities, rows.labels, num_bins, TACE_THRESHOLD),
        "classwise_ece": binned.classwise_error(tables.classwise),
        "mean_confidence": float(tables.confidence.mean()),
        "mean_entropy": float(row_entropy(rows.probabilities).mean()),
    }
    return {key: values[key] for key in KEYS}


def panel_of_bins(top: BinStatistics) -> dict[str, float]:
    """The scores that follow from the top-label uniform bins alone."""
    over, under = binned.over_and_under_confidence(top)
    return {
        "ece": binned.calibration_error(top, "l1"),
        "mce": binned.calibration_error(top, "max"),
        "rmsce": binned.calibration_error(top, "l2"),
        "rmsce_debiased": binned.debiased_l2_error(top),
        "overconfidence": over,
        "underconfidence": under,
        "average_gap": binned.calibration_error(top, "mean"),
        "confidence_gap": float((top.confidence_sums.sum() - top.outcome_sums.sum()) / top.total),
    }


def panel_of_groups(groups: Groups, num_bins: int) -> dict[str, float]:
    """The scores that follow from rows (or cells) in order of top-label confidence."""
    ranking = selective.rank_by_confidence(groups)
    return {
        "ace": binned.calibration_error(equal_mass_bins(groups, num_bins)),
        "smooth_ece": smooth_calibration_error(groups),
        "ks_error": binned.ks_error(groups),
        "error_auroc": selective.error_auroc(ranking),
        "error_aupr": selective.error_aupr(ranking),
        "success_aupr": selective.success_aupr(ranking),
        "aurc": selective.aurc(ranking),
        "e_aurc": selective.e_aurc(ranking),
        "augrc": selective.augrc(ranking),
    }


def row_entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy `-sum_k p_k ln p_k` over the last axis in nats, with `0 ln 0 = 0`."""
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    size = max(1, ENTRIES // flat.shape[1])
    parts = [flat[i : i + size] for i in range(0, len(flat), size)]
    tiny = np.finfo(np.float64).tiny
    entropy = [-(part * np.log(np.maximum(part, tiny))).sum(axis=-1) for part in parts]
    return np.concatenate([np.zeros(0), *entropy]).reshape(probabilities.shape[:-1])
