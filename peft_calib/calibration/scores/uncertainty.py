"""Uncertainty of predictions made of several draws, split into what more data could and could not remove."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..bins import group_by_value, top_outcomes
from ..inputs import SUM_TOLERANCE, as_float64, as_numpy, as_rows, check_kind, softmax
from .binned import row_brier, row_nll
from .panel import row_entropy
from .selective import error_auroc, rank, rank_by_confidence


class DrawUncertainty(NamedTuple):
    """Uncertainty of each row, from the probabilities of K draws.

    Attributes:
        probabilities: `(N, C)` float64 mean of the draws' probabilities.
        entropy: `(N,)` entropy of that mean, nats: total uncertainty.
        expected_entropy: `(N,)` mean entropy of the draws: what is left when the draw is known (aleatoric).
        mutual_information: `(N,)` their difference, never negative: disagreement of the draws (epistemic).
        variation: `(N,)` share of draws whose predicted class is not the mean's.
    """

    probabilities: np.ndarray
    entropy: np.ndarray
    expected_entropy: np.ndarray
    mutual_information: np.ndarray
    variation: np.ndarray


def draw_uncertainty(sample_probabilities: Any, *, input: str = "probabilities") -> DrawUncertainty:
    """Splits predictive entropy: `H[mean_k p_k] = mean_k H[p_k] + MI` (Depeweg et al., 2018).

    Args:
        sample_probabilities: `(K, N, C)` probabilities of K draws; numpy, torch or nested lists.
        input: `"probabilities"` or `"logits"`.

    Returns:
        The parts, one number a row.

    Raises:
        ValueError: For draws of different shapes, another number of axes, or numbers that are not probabilities.

    Example:
        >>> parts = draw_uncertainty([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> parts.mutual_information.round(4), parts.expected_entropy
        (array([0.6931]), array([0.]))
    """
    draws = check_draws(sample_probabilities, input=input)
    mean = draws.mean(axis=0)
    entropy, expected = row_entropy(mean), row_entropy(draws).mean(axis=0)
    differs = draws.argmax(axis=-1) != mean.argmax(axis=-1)
    # Exactly non-negative in theory (Jensen); rounding may leave -1e-17.
    return DrawUncertainty(mean, entropy, expected, np.maximum(entropy - expected, 0.0), differs.mean(axis=0))


def check_draws(sample_probabilities: Any, *, input: str = "probabilities") -> np.ndarray:
    """Checks `(K, N, C)` draws and returns their probabilities in float64."""
    check_kind(input)
    if isinstance(sample_probabilities, (list, tuple)):
        shapes = [np.shape(as_numpy(draw, "draws")) for draw in sample_probabilities]
        if len(set(shapes)) > 1:
            raise ValueError(f"All draws must have one shape (N, C), got {sorted(set(shapes))}.")
    array = as_numpy(sample_probabilities, "draws")
    draws, resolution = as_float64(array, sample_probabilities, "draws")
    if array.ndim != 3 or 0 in array.shape or array.shape[-1] < 2:
        raise ValueError(
            f"draws must have shape (K, N, C) with C >= 2 and at least one draw and row, got {array.shape}."
        )
    if not np.isfinite(draws).all():
        raise ValueError("draws hold NaN or infinity.")
    if input == "logits":
        return softmax(draws.reshape(-1, draws.shape[-1])).reshape(draws.shape)
    if draws.min() < 0.0 or np.abs(draws.sum(axis=-1) - 1.0).max() > SUM_TOLERANCE + resolution:
        raise ValueError('draws must hold probabilities, rows summing to 1. If they are logits, pass input="logits".')
    return draws


def uncertainty_scores(predictions: Any, labels: Any, *, input: str = "probabilities") -> dict[str, float]:
    """Means over `(N, K, C)` draws, rows first, scores of their mean, and how well each part finds the errors."""
    if isinstance(predictions, (list, tuple)):
        shapes = sorted({np.shape(as_numpy(row, "draws")) for row in predictions})
        if len(shapes) > 1:
            raise ValueError(f"Every row must have the same number of draws and classes, got {shapes}.")
    array = as_numpy(predictions, "draws")
    if array.ndim != 3:
        raise ValueError(f"predictions must have shape (N, K, C), rows first, got {array.shape}.")
    parts = draw_uncertainty(array.swapaxes(0, 1), input=input)
    rows = as_rows(parts.probabilities, labels, ignore_index=None)
    confidence, correct = top_outcomes(parts.probabilities, rows.labels)
    wrong = ~correct
    scores = {
        "entropy": parts.entropy,
        "expected_entropy": parts.expected_entropy,
        "mutual_information": parts.mutual_information,
    }
    rankings = {name: rank(score, wrong) for name, score in scores.items()}
    # what is tied as a report has it: decimals and what they leave of 1 differ in their last bit
    rankings["confidence"] = rank_by_confidence(group_by_value(confidence, correct))
    return {
        "mean_entropy": float(parts.entropy.mean()),
        "mean_expected_entropy": float(parts.expected_entropy.mean()),
        "mean_mutual_information": float(parts.mutual_information.mean()),
        "mean_variation": float(parts.variation.mean()),
        "num_draws": array.shape[1],
        "accuracy": float(1.0 - wrong.mean()),
        "nll": float(row_nll(rows.probabilities, rows.labels).mean()),
        "brier": float(row_brier(rows.probabilities, rows.labels).mean()),
        **{f"{name}_error_auroc": error_auroc(ranking) for name, ranking in rankings.items()},
    }
