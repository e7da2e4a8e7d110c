# SPDX-License-Identifier: Apache-2.0
"""Proper scores and calibration errors as pure functions of rows or of sufficient statistics.

Below, bin `b` holds the share `w_b` of the rows, with mean confidence `conf_b` and observed frequency `acc_b`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np

from peft_calib.calibration.bins import (
    BinStatistics,
    Groups,
    equal_mass_bins,
    group_by_value,
)

# The smallest probability a logarithm is taken of; scikit-learn's choice for float64.
SMALLEST_PROBABILITY = float(np.finfo(np.float64).eps)
# Probabilities multiplied before a logarithm is taken: the smallest one to this power is still a normal number.
LOG_GROUP = 16


def row_nll(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`(N,)` negative log-likelihood of each row in nats, `-ln p_y`, with `p_y` clipped at 2.2e-16.

    A row that gives its true class probability zero has infinite loss; it is clipped, and a warning says how many
    were.
    """
    of_label = np.take(probabilities.reshape(-1), np.arange(len(labels)) * probabilities.shape[1] + labels)
    impossible = int((of_label < SMALLEST_PROBABILITY).sum())
    if impossible:
        warn_impossible(impossible, len(labels))
    return loss_of_label(of_label)


def loss_of_label(of_label: np.ndarray) -> np.ndarray:
    """`-ln p` of the probabilities of labels, clipped."""
    return -np.log(np.maximum(of_label, SMALLEST_PROBABILITY))


def warn_impossible(num_impossible: int, num_rows: int) -> None:
    """Says that the NLL of some rows was clipped."""
    warnings.warn(
        f"{num_impossible} of {num_rows} rows give their true class a probability of (nearly) 0, so the exact NLL is "
        f"infinite; those rows are counted at -ln {SMALLEST_PROBABILITY:.2g} = 36.04 nats. Passing logits, or float32 "
        "probabilities instead of half precision ones, avoids it.",
        UserWarning,
        stacklevel=4,
    )


def row_brier(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`(N,)` Brier score of each row, `sum_k (p_k - 1[y = k])^2`, in [0, 2] (Brier, 1950)."""
    of_label = np.take(probabilities.reshape(-1), np.arange(len(labels)) * probabilities.shape[1] + labels)
    return np.einsum("nk,nk->n", probabilities, probabilities) - 2.0 * of_label + 1.0


def calibration_error(bins: BinStatistics, norm: str = "l1") -> float:
    """Binned calibration error of one set of bins.

    `l1`: `sum_b w_b |conf_b - acc_b|` (ECE, Naeini et al., 2015; Guo et al., 2017). `l2`: `sqrt(sum_b w_b (conf_b -
    acc_b)^2)` (RMSCE). `max`: `max_b |conf_b - acc_b|` over bins that are not empty (MCE). `mean`: the mean gap of the
    bins that are not empty (netcal's "average calibration error").

    Args:
        bins: `(B,)` statistics.
        norm: `"l1"`, `"l2"`, `"max"` or `"mean"`.

    Returns:
        The error, in [0, 1].
    """
    gaps, weights = np.abs(bins.gaps), bins.weights
    if norm == "l1":
        return float(weights @ gaps)
    if norm == "l2":
        return float(np.sqrt(weights @ gaps**2))
    if norm == "max":
        return float(gaps.max())
    if norm == "mean":
        return float(gaps[bins.counts > 0].mean())
    raise ValueError(f'`norm` must be "l1", "l2", "max" or "mean", got {norm!r}.')


def debiased_l2_error(bins: BinStatistics) -> float:
    """L2 calibration error with the sampling variance of the frequencies taken off (Kumar, Liang & Ma, 2019).

    `sqrt(max(0, sum_b w_b [(conf_b - acc_b)^2 - acc_b (1 - acc_b) / (n_b - 1)]))` over bins with at least two rows.
    Unlike the others, it changes when data are repeated: it believes every row to be a new observation.
    """
    counts, frequency = bins.counts, np.nan_to_num(bins.outcome)
    variance = frequency * (1.0 - frequency) / np.maximum(counts - 1.0, 1.0)
    terms = np.where(counts >= 2, bins.gaps**2 - variance, 0.0)
    return float(np.sqrt(max(0.0, float(bins.weights @ terms))))


def over_and_under_confidence(bins: BinStatistics) -> tuple[float, float]:
    """The two parts of the L1 error: `sum_b w_b max(conf_b - acc_b, 0)` and `sum_b w_b max(acc_b - conf_b, 0)`."""
    weighted = bins.weights * bins.gaps
    return float(weighted[weighted > 0].sum()), float(-weighted[weighted < 0].sum())


def classwise_error(bins: BinStatistics) -> float:
    """Class-wise ECE, also static calibration error (Nixon et al., 2019): the mean L1 error of the class columns.

    Args:
        bins: `(C, B)` statistics of each class column against `labels == class`.

    Returns:
        `(1 / C) sum_k sum_b w_kb |conf_kb - acc_kb|`; a class without rows counts as zero.
    """
    return float((bins.weights * np.abs(bins.gaps)).sum(axis=-1).mean())


def adaptive_classwise_error(
    probabilities: np.ndarray, labels: np.ndarray, num_bins: int, threshold: float | None = None
) -> float:
    """Class-conditional adaptive calibration error: `(1 / (C R)) sum_k sum_r |conf_kr - acc_kr|` (Nixon et al., 2019).

    `R` equal-mass bins a class, with ties spread. A class that is no row's label has frequency 0 in every bin, so that
    its error is its mean probability: only those that are need an order of rows.

    Args:
        probabilities: `(N, C)`.
        labels: `(N,)`.
        num_bins: `R`.
        threshold: only probabilities above it count.

    Returns:
        The error; a class with no row counts as zero.

    Example:
        >>> p = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
        >>> round(adaptive_classwise_error(p, np.array([0, 1]), 1), 6)  # (.15 + .25 + .1) / 3
        0.166667
    """
    kept = probabilities if threshold is None else np.where(probabilities > threshold, probabilities, 0.0)
    counts = len(labels) if threshold is None else (kept > 0.0).sum(axis=0)
    errors = kept.sum(axis=0) / np.maximum(counts, 1)
    for k in np.unique(labels):
        values, outcomes = probabilities[:, k], labels == k
        if threshold is not None:
            values, outcomes = values[kept[:, k] > 0.0], outcomes[kept[:, k] > 0.0]
        errors[k] = grouped_classwise_error([group_by_value(values, outcomes)], num_bins)
    return float(errors.mean())


def grouped_classwise_error(groups: Iterable[Groups], num_bins: int) -> float:
    """`adaptive_classwise_error` of classes whose rows (or cells) are grouped by value already.

    Args:
        groups: one entry a class.
        num_bins: equal-mass bins a class.

    Returns:
        The error; a class with no row counts as zero.
    """
    errors = [calibration_error(equal_mass_bins(g, num_bins)) if len(g.counts) else 0.0 for g in groups]
    return float(np.mean(errors))


def pooled_adaptive_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int, threshold: float) -> float:
    """Equal-mass L1 error of all `N C` probabilities above a threshold, pooled over classes; 0 if there is none."""
    outcomes = np.arange(probabilities.shape[1]) == labels[:, None]
    keep = probabilities > threshold
    groups = group_by_value(probabilities[keep], outcomes[keep])
    return calibration_error(equal_mass_bins(groups, num_bins)) if len(groups.counts) else 0.0


def ks_error(groups: Groups) -> float:
    """Kolmogorov-Smirnov calibration error: `max_c |mean_i (conf_i - correct_i) 1[conf_i <= c]|` (Gupta et al., 2021).

    Args:
        groups: top-label rows grouped by confidence, ascending.

    Returns:
        The error, in [0, 1]. It needs no bins.
    """
    drift = np.cumsum(groups.value_sums - groups.outcome_sums)
    return float(np.abs(drift).max() / groups.counts.sum())


def brier_decomposition(bins: BinStatistics, brier: float) -> dict[str, float]:
    """Murphy's (1973) decomposition of the multi-class Brier score over class-wise bins.

    With the base rate `q_k` of each class: reliability `sum_kb w_kb (conf_kb - acc_kb)^2`, resolution `sum_kb w_kb
        (acc_kb
    - q_k)^2`, uncertainty `sum_k q_k (1 - q_k)`. Grouping unequal forecasts in one bin leaves a remainder (Stephenson
    et al., 2008), reported as `within_bin`, so that `brier = reliability - resolution + uncertainty + within_bin`
    exactly.

    Args:
        bins: `(C, B)` statistics of each class column.
        brier: the Brier score of the same rows.

    Returns:
        The four terms under the keys `reliability`, `resolution`, `uncertainty`, `within_bin`.
    """
    weights, frequency = bins.weights, np.nan_to_num(bins.outcome)
    base = bins.outcome_sums.sum(axis=-1, keepdims=True) / bins.counts.sum(axis=-1, keepdims=True)
    reliability = float((weights * bins.gaps**2).sum())
    resolution = float((weights * (frequency - base) ** 2).sum())
    uncertainty = float((base * (1.0 - base)).sum())
    remainder = brier - (reliability - resolution + uncertainty)
    return {
        "reliability": reliability,
        "resolution": resolution,
        "uncertainty": uncertainty,
        "within_bin": float(remainder),
    }
