"""Monotone maps of scores to the probability of being right; each never falls where a score says "surer"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit

from ...json_files import Fields

#: Kinds of maps, the simpler first.
KINDS = ("constant", "platt", "isotonic", "logistic")


@dataclass(frozen=True)
class Fitted:
    """A fitted map.

    Attributes:
        kind: `"constant"`, `"platt"`, `"isotonic"` or `"logistic"`.
        scores: The scores it takes, in order.
        numbers: What was fitted, as lists of numbers by name.
    """

    kind: str
    scores: tuple[str, ...]
    numbers: dict[str, list[float]]

    def apply(self, surer: np.ndarray) -> np.ndarray:
        """`(N,)` probabilities of `(N, D)` scores, larger where surer."""
        get = {name: np.asarray(values) for name, values in self.numbers.items()}
        if self.kind == "constant":
            return np.full(len(surer), get["probability"][0])
        if self.kind == "isotonic":
            return np.interp(surer[:, 0], get["steps"], get["heights"])
        z = (surer - get["center"]) / get["scale"]
        return expit(z @ get["slopes"] + get["intercept"][0])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"kind": self.kind, "scores": list(self.scores), **self.numbers}

    @classmethod
    def from_fields(cls, fields: Fields) -> Fitted:
        """The inverse of `to_dict`, checked; a `ValueError` names file and field."""
        kind, scores = fields.text("kind", among=KINDS), tuple(fields.listing("scores", str))
        if len(scores) != len(set(scores)) or (kind != "logistic" and len(scores) != (kind != "constant")):
            raise fields.wrong("scores", "the names of the scores of such a map")
        return cls(kind, scores, {name: array.tolist() for name, array in _read(fields, kind, len(scores)).items()})


def _read(fields: Fields, kind: str, count: int) -> dict[str, np.ndarray]:
    if kind == "constant":
        probability = fields.array("probability", (1,))
        if not 0.0 < probability[0] < 1.0:
            raise fields.wrong("probability", "one number between 0 and 1")
        return {"probability": probability}
    if kind == "isotonic":
        steps, heights = fields.array("steps", (None,)), fields.array("heights", (None,))
        ordered = len(steps) == len(heights) > 0 and (np.diff(steps) > 0).all() and (np.diff(heights) >= 0).all()
        if not ordered or heights[0] <= 0.0 or heights[-1] >= 1.0:
            raise fields.wrong("heights", "numbers between 0 and 1 that do not fall, one for each increasing step")
        return {"steps": steps, "heights": heights}
    found = {name: fields.array(name, (count,)) for name in ("center", "scale", "slopes")}
    if (found["scale"] <= 0.0).any():
        raise fields.wrong("scale", "numbers above 0")
    if (found["slopes"] < 0.0).any():
        raise fields.wrong("slopes", "numbers of at least 0: a surer answer is no less likely right")
    return {**found, "intercept": fields.array("intercept", (1,))}


def fit_map(kind: str, names: tuple[str, ...], surer: np.ndarray, correct: np.ndarray) -> Fitted:
    """Fit a map of a kind to `(N, D)` scores, larger where surer, and `(N,)` bool."""
    if kind == "constant":  # one virtual row of each kind keeps it inside (0, 1)
        return Fitted(kind, (), {"probability": [(float(correct.sum()) + 1.0) / (len(correct) + 2.0)]})
    if kind == "isotonic":
        return Fitted(kind, names, isotonic_steps(surer[:, 0], correct))
    center, spread = surer.mean(axis=0), surer.std(axis=0)
    scale = np.where(spread > 0.0, spread, 1.0)
    targets, ridge = correct.astype(np.float64), 1.0 / len(correct)
    if kind == "platt":
        right = float(correct.sum())
        targets = np.where(correct, (right + 1.0) / (right + 2.0), 1.0 / (len(correct) - right + 2.0))
        ridge = 0.0
    slopes, intercept = nonnegative_logistic((surer - center) / scale, targets, ridge)
    found = {"center": center, "scale": scale, "slopes": slopes, "intercept": np.array([intercept])}
    return Fitted(kind, names, {name: values.tolist() for name, values in found.items()})


def isotonic_steps(values: np.ndarray, correct: np.ndarray) -> dict[str, list[float]]:
    """The non-decreasing map of least squares (Zadrozny & Elkan, 2002), with finite losses.

    Pool-adjacent-violators; each stretch of equal height then gets one virtual row at the base rate, so that one where
    all rows are right is below 1, and heights are made non-decreasing once more. Between stretches it is interpolated.
    """
    steps, place = np.unique(values, return_inverse=True)
    counts = np.bincount(place).astype(np.float64)
    raw = isotonic_regression(np.bincount(place, weights=correct.astype(np.float64)) / counts, weights=counts).x
    _, stretch = np.unique(raw, return_inverse=True)
    sizes = np.bincount(stretch, weights=counts)
    base = float(np.clip(correct.mean(), 0.5 / len(correct), 1.0 - 0.5 / len(correct)))
    shrunk = (np.bincount(stretch, weights=counts * raw) + base) / (sizes + 1.0)
    heights = isotonic_regression(shrunk, weights=sizes).x[stretch]
    ends = np.ones(len(steps), bool)  # inside a flat stretch only its ends matter
    ends[1:-1] = (heights[1:-1] != heights[:-2]) | (heights[1:-1] != heights[2:])
    return {"steps": steps[ends].tolist(), "heights": heights[ends].tolist()}


def nonnegative_logistic(x: np.ndarray, targets: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """`(D,)` slopes of at least 0 and the intercept of least mean cross-entropy plus `ridge / 2 |slopes|^2`.

    `ridge = 1 / N` is scikit-learn's default `C = 1`; its `LogisticRegression` has no bounds, and gives the same where
    no slope would be negative. The problem is convex.
    """
    count = x.shape[1]

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ w[:count] + w[count]
        value = (np.logaddexp(0.0, z) - targets * z).mean() + 0.5 * ridge * w[:count] @ w[:count]
        miss = (expit(z) - targets) / len(targets)
        return float(value), np.r_[x.T @ miss + ridge * w[:count], miss.sum()]

    bounds = [(0.0, None)] * count + [(None, None)]
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000}
    found = minimize(objective, np.zeros(count + 1), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return np.asarray(found.x[:count]), float(found.x[count])


def cross_entropy(p: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """`(N,)` `-log` of the probability given to what happened, nats."""
    return -np.log(np.where(correct, p, 1.0 - p))
