"""Whose number is it? Definitions of other libraries, so that tables begun with them can be continued.

Each convention replaces just the scores its library defines differently; every other key keeps its own definition.
Other libraries' order dependence is reproduced too: `hypelora` splits ties by the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..bins import BinStatistics, accumulate, top_outcomes
from ..inputs import Rows
from ..scores.binned import calibration_error
from ..scores.table import TACE_THRESHOLD

# Numpy's numbers: scores act on the last axis of arrays.
Redefined = Mapping[str, Any]


def convention_scores(convention: str, rows: Rows, num_bins: int, scores: dict[str, float]) -> dict[str, float]:
    """The scores that a convention defines differently, by its definition; `scores` is the panel by our own."""
    if convention not in CONVENTIONS:
        raise ValueError(f"`convention` must be one of {sorted(CONVENTIONS)}, got {convention!r}.")
    return {key: float(value) for key, value in CONVENTIONS[convention](rows, num_bins, scores).items()}


def _torchmetrics(rows: Rows, num_bins: int, scores: dict[str, float]) -> Redefined:
    """Torchmetrics 1.9: `[lo, hi)` bins, one more for 1.0; float32 edges for classes, P(y = 1) for one number."""
    if rows.binary:
        values, outcomes = rows.probabilities[:, 1], rows.labels == 1
        dtype = torch.float64 if rows.dtype == np.float64 else torch.float32
    else:
        dtype, (values, outcomes) = torch.float32, top_outcomes(rows.probabilities, rows.labels)
    # torch.linspace counts down from the far end in its upper half: numpy's differs from it by one ulp.
    edges = torch.linspace(0, 1, num_bins + 1, dtype=dtype).numpy()
    values = values.astype(edges.dtype)
    index = np.searchsorted(edges, values, side="right") - 1
    bins = accumulate(index, values.astype(np.float64), outcomes, num_bins + 1)
    return _three_norms(bins)


def _netcal(rows: Rows, num_bins: int, scores: dict[str, float]) -> Redefined:
    """Netcal 1.4: `[lo, hi)` bins with the last closed; ACE is the *average* error; two classes mean P(y = 1)."""
    values, outcomes = _positive_class_or_top(rows)
    eps = float(np.finfo(rows.dtype).eps)
    values = np.clip(values, eps, 1.0 - eps)
    index = np.searchsorted(np.linspace(0.0, 1.0, num_bins + 1), values, side="right") - 1
    bins = accumulate(np.minimum(index, num_bins - 1), values, outcomes, num_bins)
    return {**_three_norms(bins), "ace": calibration_error(bins, "mean")}


def _sklearn(rows: Rows, num_bins: int, scores: dict[str, float]) -> Redefined:
    """scikit-learn 1.9: Brier halved for two classes; calibration curves of P(y = 1), equal-mass by percentiles."""
    values, outcomes = _positive_class_or_top(rows)
    uniform = np.linspace(0.0, 1.0, num_bins + 1)
    quantiles = np.percentile(values, uniform * 100)
    bins = accumulate(np.searchsorted(uniform[1:-1], values), values, outcomes, num_bins)
    mass = accumulate(np.searchsorted(quantiles[1:-1], values), values, outcomes, num_bins)
    replaced = {**_three_norms(bins), "ace": calibration_error(mass)}
    if rows.num_classes == 2:
        replaced["brier"] = 0.5 * scores["brier"]
    return replaced


def _nixon(rows: Rows, num_bins: int, scores: dict[str, float]) -> Redefined:
    """Nixon et al. (2019), their released code: ACE and TACE class by class, edges at data values, `[lo, hi)`."""
    confidence, correct = top_outcomes(rows.probabilities, rows.labels)
    edges = np.linspace(0.0, 1.0, num_bins + 1)[1:]
    top = accumulate(np.searchsorted(edges, confidence, side="right"), confidence, correct, num_bins + 1)
    static, adaptive, thresholded = [], [], []
    for k in range(rows.num_classes):
        values, outcomes = rows.probabilities[:, k], rows.labels == k
        index = np.searchsorted(edges, values, side="right")
        static.append(float(calibration_error(accumulate(index, values, outcomes, num_bins + 1))))
        adaptive.append(_value_edged_error(values, outcomes, num_bins, 0.0))
        thresholded.append(_value_edged_error(values, outcomes, num_bins, TACE_THRESHOLD))
    ace, tace = float(np.mean(adaptive)), float(np.mean(thresholded))
    return {
        "ece": calibration_error(top),
        "classwise_ece": float(np.mean(static)),
        "ace": ace,
        "ace_classwise": ace,
        "tace": tace,
        "tace_classwise": tace,
    }


def _hypelora(rows: Rows, num_bins: int, scores: dict[str, float]) -> Redefined:
    """HypeLoRA: chunks of `floor(N / B)` rows, the last taking the rest; its pooled TACE with rows' own labels."""
    outcomes = (np.arange(rows.num_classes) == rows.labels[:, None]).reshape(-1)
    pooled = rows.probabilities.reshape(-1)
    keep = pooled >= TACE_THRESHOLD
    return {
        "ace": _chunked_error(*top_outcomes(rows.probabilities, rows.labels), num_bins),
        "tace": _chunked_error(pooled[keep], outcomes[keep], num_bins),
    }


Overrides = Callable[[Rows, int, dict[str, float]], Redefined]
CONVENTIONS: dict[str, Overrides] = {
    "peft_calib": lambda rows, num_bins, scores: {},
    "torchmetrics": _torchmetrics,
    "netcal": _netcal,
    "sklearn": _sklearn,
    "nixon": _nixon,
    "hypelora": _hypelora,
}


def _three_norms(bins: BinStatistics) -> Redefined:
    return {
        "ece": calibration_error(bins),
        "mce": calibration_error(bins, "max"),
        "rmsce": calibration_error(bins, "l2"),
    }


def _positive_class_or_top(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    if rows.num_classes == 2:
        return rows.probabilities[:, 1], rows.labels == 1
    return top_outcomes(rows.probabilities, rows.labels)


def _value_edged_error(values: np.ndarray, outcomes: np.ndarray, num_bins: int, threshold: float) -> float:
    keep = values > threshold
    values, outcomes = values[keep], outcomes[keep]
    if len(values) == 0:
        return 0.0
    ranks = np.round(np.arange(1, num_bins) * len(values) / num_bins).astype(np.int64)
    edges = np.sort(values)[np.minimum(ranks, len(values) - 1)]
    return float(
        calibration_error(accumulate(np.searchsorted(edges, values, side="right"), values, outcomes, num_bins))
    )


def _chunked_error(values: np.ndarray, outcomes: np.ndarray, num_bins: int) -> float:
    if len(values) == 0:
        return 0.0
    index = np.empty(len(values), np.int64)
    size = max(1, len(values) // num_bins) if len(values) >= num_bins else len(values)
    index[np.argsort(values, kind="stable")] = np.minimum(np.arange(len(values)) // size, num_bins - 1)
    return float(calibration_error(accumulate(index, values, outcomes, num_bins)))
