"""One calibration map a class column, renormalised: isotonic, histogram and beta calibration, one against the rest."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit

from ...json_files import Fields
from ..bins import group_by_value
from ..inputs import check_num_bins, softmax
from .base import Recalibrator

# The least probability a map may give, so that a class never seen in some range keeps a finite likelihood.
FLOOR = 1e-6


class OneVersusRest(Recalibrator):
    """A map of each class's probability, fitted against `label == class`, then normalised (Zadrozny & Elkan, 2002).

    Two classes share one map, of the probability of class 1, as the other is its complement.
    """

    parameter_names: ClassVar[tuple[str, ...]] = ("maps",)
    maps: list[Any]

    @abstractmethod
    def _fit_map(self, values: np.ndarray, outcomes: np.ndarray) -> list[list[float]]: ...

    @abstractmethod
    def _apply_map(self, fitted: list[np.ndarray], values: np.ndarray) -> np.ndarray: ...

    def _fit(self, logits: np.ndarray, labels: np.ndarray) -> None:
        p = softmax(logits)
        columns = [1] if p.shape[1] == 2 else range(p.shape[1])
        self.maps = [self._fit_map(p[:, k], labels == k) for k in columns]

    def _transform(self, logits: np.ndarray) -> np.ndarray:
        p = softmax(logits)
        if p.shape[1] == 2:
            one = np.clip(self._mapped(0, p[:, 1]), FLOOR, 1.0 - FLOOR)
            return np.stack([1.0 - one, one], axis=1)
        mapped = np.stack([self._mapped(k, p[:, k]) for k in range(p.shape[1])], axis=1)
        mapped = np.maximum(mapped, FLOOR)
        return mapped / mapped.sum(axis=1, keepdims=True)

    def _mapped(self, column: int, values: np.ndarray) -> np.ndarray:
        return self._apply_map([np.asarray(part, dtype=np.float64) for part in self.maps[column]], values)

    def _read_parameter(self, parameters: Fields, name: str) -> Any:
        if name == "num_bins":
            return parameters.integer(name, least=1)
        maps = parameters.listing(name, list)
        wanted = 1 if self.num_classes == 2 else self.num_classes
        if len(maps) != wanted:
            raise parameters.wrong(name, f"{wanted} map(s), for {self.num_classes} classes")
        for index, fitted in enumerate(maps):
            place = f"{name}[{index}]"
            parts = {f"{place}[{i}]": part for i, part in enumerate(fitted)}
            read = Fields(parts, parameters.source, parameters.mend)
            if not self._is_map([read.array(part, (None,)) for part in parts]):
                raise Fields({place: fitted}, parameters.source, parameters.mend).wrong(place, self.map_words)
        return maps

    #: What `_is_map` asks for, in words.
    map_words: ClassVar[str]

    @abstractmethod
    def _is_map(self, fitted: list[np.ndarray]) -> bool:
        """Whether finite numbers read from a file can be a fitted map."""


class IsotonicCalibration(OneVersusRest):
    """The non-decreasing step function of least squares (Zadrozny & Elkan, 2002), interpolated between its steps."""

    map_words = "two lists of one length: increasing steps, and heights in [0, 1] that do not decrease"

    def _is_map(self, fitted: list[np.ndarray]) -> bool:
        if len(fitted) != 2 or len(fitted[0]) != len(fitted[1]) or not len(fitted[0]):
            return False
        steps, heights = fitted
        ordered = bool((np.diff(steps) >= 0).all() and (np.diff(heights) >= 0).all())
        return ordered and heights[0] >= 0 and heights[-1] <= 1

    def _fit_map(self, values: np.ndarray, outcomes: np.ndarray) -> list[list[float]]:
        groups = group_by_value(values, outcomes)
        heights = isotonic_regression(groups.outcome_sums / groups.counts, weights=groups.counts).x
        x = groups.value_sums / groups.counts
        # Inside a flat stretch only its ends matter.
        keep = np.ones(len(x), bool)
        keep[1:-1] = (heights[1:-1] != heights[:-2]) | (heights[1:-1] != heights[2:])
        return [x[keep].tolist(), heights[keep].tolist()]

    def _apply_map(self, fitted: list[np.ndarray], values: np.ndarray) -> np.ndarray:
        steps, heights = fitted
        return np.interp(values, steps, heights)


class HistogramCalibration(OneVersusRest):
    """The observed frequency in equal-mass bins (Zadrozny & Elkan, 2001), smoothed by one virtual row a bin.

    Args:
        num_bins: Bins a class; fewer where values tie.

    Raises:
        ValueError: If it is not a positive integer.
    """

    parameter_names = ("maps", "num_bins")
    map_words = "increasing edges, and one more height than edges, each in [0, 1]"

    def _is_map(self, fitted: list[np.ndarray]) -> bool:
        if len(fitted) != 2 or len(fitted[1]) != len(fitted[0]) + 1:
            return False
        edges, heights = fitted
        return bool((np.diff(edges) > 0).all() and (heights >= 0).all() and (heights <= 1).all())

    def __init__(self, num_bins: int = 15) -> None:
        super().__init__()
        self.num_bins = check_num_bins(num_bins)

    def _fit_map(self, values: np.ndarray, outcomes: np.ndarray) -> list[list[float]]:
        edges = np.unique(np.quantile(values, np.arange(1, self.num_bins) / self.num_bins))
        index = np.searchsorted(edges, values, side="left")
        size = len(edges) + 1
        counts = np.bincount(index, minlength=size)
        hits = np.bincount(index, weights=outcomes, minlength=size)
        # The virtual row votes for the bin's own mean probability, which an empty bin lacks: there the base rate.
        mean = np.bincount(index, weights=values, minlength=size)
        prior = np.where(counts > 0, mean / np.maximum(counts, 1), outcomes.mean())
        return [edges.tolist(), ((hits + prior) / (counts + 1.0)).tolist()]

    def _apply_map(self, fitted: list[np.ndarray], values: np.ndarray) -> np.ndarray:
        edges, heights = fitted
        return heights[np.searchsorted(edges, values, side="left")]


class BetaCalibration(OneVersusRest):
    """`logit q = a ln p - b ln(1 - p) + c` with `a, b >= 0` (Kull, Silva Filho & Flach, 2017), for each class.

    Contains the identity (a = b = 1, c = 0) and, with a = b, Platt scaling of the log-odds.
    """

    map_words = "one list of a, b and c, with a and b not below 0"

    def _is_map(self, fitted: list[np.ndarray]) -> bool:
        return len(fitted) == 1 and len(fitted[0]) == 3 and bool((fitted[0][:2] >= 0).all())

    def _fit_map(self, values: np.ndarray, outcomes: np.ndarray) -> list[list[float]]:
        features = _log_features(values)
        columns = [0, 1]
        coefficients = logistic_regression(features, outcomes)
        # A negative exponent would turn the map around; the paper's remedy is to fit without that term.
        if (coefficients[:2] < 0.0).any():
            columns = [int(np.argmax(coefficients[:2]))]
            coefficients = logistic_regression(features[:, columns], outcomes)
        a_b = np.zeros(2)
        a_b[columns] = np.maximum(coefficients[:-1], 0.0)
        return [[float(a_b[0]), float(a_b[1]), float(coefficients[-1])]]

    def _apply_map(self, fitted: list[np.ndarray], values: np.ndarray) -> np.ndarray:
        a, b, c = fitted[0]
        left, right = _log_features(values).T
        return expit(a * left + b * right + c)


def logistic_regression(features: np.ndarray, outcomes: np.ndarray, ridge: float = 1e-6) -> np.ndarray:
    """`(D + 1,)` coefficients, the intercept last; the tiny penalty bounds the answer on separable data."""
    x = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    y = outcomes.astype(np.float64)

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ w
        value = (np.logaddexp(0.0, z) - y * z).mean() + 0.5 * ridge * w @ w
        return float(value), x.T @ (expit(z) - y) / len(y) + ridge * w

    def hessian(w: np.ndarray) -> np.ndarray:
        q = expit(x @ w)
        return (x * (q * (1.0 - q))[:, None]).T @ x / len(y) + ridge * np.eye(len(w))

    start = np.zeros(x.shape[1])
    found = minimize(objective, start, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-9})
    return np.asarray(found.x)


def _log_features(values: np.ndarray) -> np.ndarray:
    clipped = np.clip(values, 1e-12, 1.0 - 1e-12)
    return np.stack([np.log(clipped), -np.log1p(-clipped)], axis=1)
