"""Scores that read probabilities only and train nothing but a temperature: what a head has to beat at the least."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from scipy.special import entr, xlog1py

from ...calibration.answers import log_probabilities, without_masks
from ...calibration.recalibrate.temperature import check_enough_rows, fit_temperature
from ..features import FeatureSet
from .base import Baseline, true_labels


def softmax_response(probabilities: np.ndarray) -> np.ndarray:
    """`1 - max_c p_c` of `(N, C)` probabilities, summed over the other classes so that 1e-20 is not 0."""
    return _others(probabilities)[0].sum(axis=1)


def entropy(probabilities: np.ndarray, num_options: np.ndarray | int) -> np.ndarray:
    """`-sum_c p_c log p_c / log C` in [0, 1], `C` the number of options an item has; 0 where it has one."""
    others, _ = _others(probabilities)
    rest = others.sum(axis=1)
    nats = entr(others).sum(axis=1) - xlog1py(1.0 - rest, -rest)
    return nats / np.log(np.maximum(num_options, 2))


def margin(probabilities: np.ndarray) -> np.ndarray:
    """`1 - (p_(1) - p_(2))` of the two likeliest classes, in [0, 1]."""
    others, _ = _others(probabilities)
    return others.sum(axis=1) + others.max(axis=1)


def num_options(features: FeatureSet) -> np.ndarray | int:
    """`(N,)` how many answers each item can have, or one number for all."""
    return features.num_classes if features.options is None else features.options.sum(-1).numpy()


class SoftmaxResponse(Baseline):
    """`1 - max_c p_c`, the probability of an error if the classifier is calibrated (Hendrycks & Gimpel, 2017)."""

    name = "softmax_response"
    is_probability = is_share = True

    def _score(self, features: FeatureSet) -> np.ndarray:
        return softmax_response(features.probabilities.numpy())


class Entropy(Baseline):
    """Entropy of the mean probabilities over `log C`, in [0, 1]."""

    name = "entropy"
    is_share = True

    def _score(self, features: FeatureSet) -> np.ndarray:
        return entropy(features.probabilities.numpy(), num_options(features))


class Margin(Baseline):
    """One minus the distance of the two likeliest probabilities, in [0, 1]."""

    name = "margin"
    is_share = True

    def _score(self, features: FeatureSet) -> np.ndarray:
        return margin(features.probabilities.numpy())


class TemperatureScaled(Baseline):
    """A softmax score after a temperature, which is fitted on the validation items, or else on those of `fit`.

    With two classes a temperature changes no ranking. With several functions it divides the logarithm of their mean
    probabilities.

    Args:
        score: Which of the softmax scores, `"softmax_response"`, `"entropy"` or `"margin"`.

    Attributes:
        temperature: Of least negative log-likelihood, after `fit`.

    Example:
        >>> logits = torch.tensor([[[4.0, 0.0]] * 3 + [[0.0, 4.0]]]).repeat(1, 10, 1)
        >>> items = FeatureSet(torch.zeros(1, 40, 1), logits, labels=torch.tensor([0, 0, 1, 1] * 10))
        >>> scaled = TemperatureScaled().fit(items)
        >>> round(scaled.temperature, 3), scaled.score(items)[:2].round(3)  # accuracy 0.75 = sigmoid(4 / T)
        (3.641, array([0.25, 0.25]))
    """

    name = "temperature_scaled"
    is_probability = is_share = True
    needs_labels = True
    temperature: float

    def __init__(self, score: Literal["softmax_response", "entropy", "margin"] = "softmax_response") -> None:
        if score not in ("softmax_response", "entropy", "margin"):
            raise ValueError(f"score must be 'softmax_response', 'entropy' or 'margin', got {score!r}.")
        self.base = score

    def _fit(self, train: FeatureSet, validation: FeatureSet | None) -> None:
        part = train if validation is None else validation
        check_enough_rows(len(part))
        self.temperature = fit_temperature(without_masks(_logits(part)), true_labels(part))

    def _score(self, features: FeatureSet) -> np.ndarray:
        scaled = torch.from_numpy(_logits(features) / self.temperature).softmax(-1).numpy()
        if self.base == "softmax_response":
            return softmax_response(scaled)
        return margin(scaled) if self.base == "margin" else entropy(scaled, num_options(features))


def _others(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(N, C)` probabilities with that of the predicted class set to 0, and which class that is."""
    top = probabilities.argmax(axis=1)
    others = probabilities.copy()
    others[np.arange(len(top)), top] = 0.0
    return others, top


def _logits(features: FeatureSet) -> np.ndarray:
    """`(N, C)` float64 logits, -inf for an option an item does not have; of several functions those of their mean."""
    if len(features.logits) > 1:
        found = log_probabilities(features.probabilities)
    else:
        found = features.logits[0].double()
    return found.numpy() if features.options is None else found.masked_fill(~features.options, -torch.inf).numpy()
