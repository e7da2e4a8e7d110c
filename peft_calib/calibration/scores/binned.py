"""Proper scores and calibration errors as pure functions of rows or of sufficient statistics.

Below, bin `b` holds the share `w_b` of the rows, with mean confidence `conf_b` and observed frequency `acc_b`.
"""

from __future__ import annotations

import warnings

import numpy as np

from ..bins import BinStatistics, Groups
from .columns import ColumnBins

# The smallest probability a logarithm is taken of; scikit-learn's choice for float64.
SMALLEST_PROBABILITY = float(np.finfo(np.float64).eps)
# Probabilities multiplied before a logarithm is taken: the smallest one to this power is still a normal number.
LOG_GROUP = 16


def row_nll(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`(N,)` negative log-likelihood of each row in nats, `p_y` clipped at 2.2e-16; a warning says how many were."""
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
    return brier_of_sums(np.einsum("nk,nk->n", probabilities, probabilities), of_label)


def brier_of_sums(squares: np.ndarray, of_label: np.ndarray) -> np.ndarray:
    """The Brier score of `sum_k p_k^2` and `p_y`, of a row or of their means."""
    return squares - 2.0 * of_label + 1.0


def calibration_error(bins: BinStatistics, norm: str = "l1") -> np.ndarray:
    """`(...)` binned calibration errors, in [0, 1], of `(..., B)` statistics.

    `l1`: `sum_b w_b |conf_b - acc_b|` (ECE, Naeini et al., 2015; Guo et al., 2017). `l2`: `sqrt(sum_b w_b (conf_b -
    acc_b)^2)` (RMSCE). `max`: `max_b |conf_b - acc_b|` over bins that are not empty (MCE). `mean`: the mean gap of the
    bins that are not empty (netcal's "average calibration error").
    """
    gaps = np.abs(bins.gaps)
    if norm == "l1":
        return (bins.weights * gaps).sum(axis=-1)
    if norm == "l2":
        return np.sqrt((bins.weights * gaps**2).sum(axis=-1))
    if norm == "max":
        return gaps.max(axis=-1)
    if norm == "mean":
        return gaps.sum(axis=-1) / np.maximum((bins.counts > 0).sum(axis=-1), 1)
    raise ValueError(f'`norm` must be "l1", "l2", "max" or "mean", got {norm!r}.')


def debiased_l2_error(bins: BinStatistics) -> np.ndarray:
    """L2 calibration error with the sampling variance of the frequencies taken off (Kumar, Liang & Ma, 2019).

    `sqrt(max(0, sum_b w_b [(conf_b - acc_b)^2 - acc_b (1 - acc_b) / (n_b - 1)]))` over bins with at least two rows.
    Unlike the others, it changes when data are repeated: it believes every row to be a new observation.
    """
    counts, frequency = bins.counts, np.nan_to_num(bins.outcome)
    variance = frequency * (1.0 - frequency) / np.maximum(counts - 1.0, 1.0)
    terms = np.where(counts >= 2, bins.gaps**2 - variance, 0.0)
    return np.sqrt(np.maximum((bins.weights * terms).sum(axis=-1), 0.0))


def scores_of_bins(top: BinStatistics) -> dict[str, np.ndarray]:
    """The scores, `(...)` each, that follow from the top label's `(..., B)` equal-width bins alone."""
    weighted = top.weights * top.gaps
    return {
        "ece": calibration_error(top),
        "mce": calibration_error(top, "max"),
        "rmsce": calibration_error(top, "l2"),
        "rmsce_debiased": debiased_l2_error(top),
        "overconfidence": np.maximum(weighted, 0.0).sum(axis=-1),
        "underconfidence": np.maximum(-weighted, 0.0).sum(axis=-1),
        "average_gap": calibration_error(top, "mean"),
        "confidence_gap": weighted.sum(axis=-1),
    }


def classwise_error(bins: BinStatistics) -> np.ndarray:
    """`(1 / C) sum_k sum_b w_kb |conf_kb - acc_kb|` over `(..., C, B)` bins (Nixon et al., 2019); 0 without rows."""
    return calibration_error(bins).mean(axis=-1)


def scores_of_columns(columns: ColumnBins, brier: np.ndarray | float) -> dict[str, np.ndarray]:
    """The scores over bins of every class column, of one set of rows or of many."""
    return {
        **scores_of_uniform_columns(columns.uniform, brier),
        "ace_classwise": classwise_error(columns.mass),
        "tace": calibration_error(columns.pooled),
        "tace_classwise": classwise_error(columns.kept),
    }


def scores_of_uniform_columns(bins: BinStatistics, brier: np.ndarray | float) -> dict[str, np.ndarray]:
    """Those of them that equal-width bins are enough for."""
    return {**brier_decomposition(bins, brier), "classwise_ece": classwise_error(bins)}


def ks_error(groups: Groups) -> float:
    """Kolmogorov-Smirnov error: `max_c |mean_i (conf_i - correct_i) 1[conf_i <= c]|` (Gupta et al., 2021)."""
    rows, values, outcomes = groups.up_to
    return float(np.abs(values - outcomes).max() / rows[-1])


def brier_decomposition(bins: BinStatistics, brier: np.ndarray | float) -> dict[str, np.ndarray]:
    """Murphy's (1973) decomposition of the multi-class Brier score over `(..., C, B)` class-wise bins.

    With the base rate `q_k` of each class: reliability `sum_kb w_kb (conf_kb - acc_kb)^2`, resolution `sum_kb w_kb
    (acc_kb - q_k)^2`, uncertainty `sum_k q_k (1 - q_k)`. Grouping unequal forecasts in one bin leaves a remainder
    (Stephenson et al., 2008), so that `brier = reliability - resolution + uncertainty + within_bin` exactly.
    """
    weights, frequency = bins.weights, np.nan_to_num(bins.outcome)
    base = bins.outcome_sums.sum(axis=-1, keepdims=True) / bins.counts.sum(axis=-1, keepdims=True)
    reliability = (weights * bins.gaps**2).sum(axis=(-2, -1))
    resolution = (weights * (frequency - base) ** 2).sum(axis=(-2, -1))
    uncertainty = (base * (1.0 - base)).sum(axis=(-2, -1))
    return {
        "brier_reliability": reliability,
        "brier_resolution": resolution,
        "brier_uncertainty": uncertainty,
        "brier_within_bin": brier - (reliability - resolution + uncertainty),
    }
