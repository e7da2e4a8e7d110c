"""From a score to the probability of an error: a map that keeps the order, fitted on items the head did not see."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit

from ..calibration.recalibrate.base import LogitScaling, Recalibrator
from ..calibration.recalibrate.per_class import IsotonicCalibration, logistic_regression
from ..json_files import Fields

#: Errors from which on a step function can be told from a line.
FEWEST_FOR_ISOTONIC = 200
# Scores are kept this far from 0 and 1 before their log-odds are taken.
_SMALLEST, _NEAREST = 1e-38, 1e-12


class PlattScaling(LogitScaling):
    """`P(error) = sigmoid(a logit(U) + b)` (Platt, 1999), with `a > 0`: the order of items stays.

    Fitted to Platt's smoothed targets, `(n1 + 1) / (n1 + 2)` at n1 errors and `1 / (n0 + 2)` at n0 correct items, so
    that it exists where one of them is missing. With fewer than `fewest` of either, and where a fitted slope would
    turn the order around, only b is fitted, to the (smoothed) share of errors, and a is 1.

    Args:
        fewest: Errors, and correct items, that a slope takes.
    """

    parameter_names = ("slope", "intercept")
    slope: float
    intercept: float

    def __init__(self, fewest: int = 20) -> None:
        super().__init__()
        self.fewest = fewest
        self.turned_around = False  # whether a slope was fitted that turns the order around

    def _fit(self, logits: np.ndarray, labels: np.ndarray) -> None:
        self.turned_around = False
        odds, wrong = logits[:, 1] - logits[:, 0], int(labels.sum())
        right = len(labels) - wrong
        if min(wrong, right) >= self.fewest:
            targets = np.where(labels == 1, (wrong + 1) / (wrong + 2), 1 / (right + 2))
            self.slope, self.intercept = map(float, logistic_regression(odds[:, None], targets))
            if self.slope > 0:
                return
            self.turned_around = self.slope < 0 and float(np.ptp(odds)) > 0
        share = (wrong + 1) / (len(labels) + 2)
        self.slope = 1.0
        self.intercept = float(brentq(lambda b: expit(odds + b).mean() - share, -200.0, 200.0))

    def _transform_logits(self, logits: np.ndarray) -> np.ndarray:
        odds = self.slope * (logits[:, 1] - logits[:, 0]) + self.intercept
        return np.stack([np.zeros_like(odds), odds], axis=1)

    def _read_parameter(self, parameters: Fields, name: str) -> float:
        return float(parameters.number(name, above=0 if name == "slope" else None))


def fit_map(method: str, scores: np.ndarray, errors: np.ndarray, fewest: int) -> tuple[Recalibrator | None, str]:
    """A map of scores to P(error), and in words why it is this one.

    Args:
        method: `"platt"`, `"isotonic"` or `"none"`.
        scores: `(N,)`, of items that the head was not fitted on.
        errors: `(N,)` bool.
        fewest: Errors and correct items that a slope takes.
    """
    if method == "none":
        return None, "No map was asked for: the score itself is given as P(error)."
    wrong, count = int(errors.sum()), f"{int(errors.sum())} errors among {len(errors)} items"
    odds = log_odds(scores)
    if method == "isotonic" and wrong >= FEWEST_FOR_ISOTONIC:
        return IsotonicCalibration().fit(odds, errors.astype(np.int64)), f"Steps (isotonic), fitted to {count}."
    why = ""
    if method == "isotonic":
        why = f" Steps (isotonic) need {FEWEST_FOR_ISOTONIC} errors."
    platt = PlattScaling(fewest).fit(odds, errors.astype(np.int64))
    if platt.turned_around:
        return platt, (
            f"Shifted in log-odds to the share of errors: on these items the score ranks errors backwards ({count}; a "
            f"fitted slope is below 0), so that P(error) says little of which predictions are wrong.{why}"
        )
    if platt.slope == 1.0:
        return platt, f"Shifted in log-odds to the share of errors: {count} support no slope.{why}"
    return platt, f"A line in log-odds (Platt), slope {platt.slope:.3g}, fitted to {count}.{why}"


def probability_of_error(method: Recalibrator | None, scores: np.ndarray) -> np.ndarray:
    """`(N,)` float64 P(error) of scores."""
    return np.clip(scores, 0.0, 1.0) if method is None else np.asarray(method.transform(log_odds(scores)))[:, 1]


def with_prior(scores: np.ndarray, share: float | None) -> np.ndarray:
    """Scores trained on balanced batches, brought to the share of errors there is: `logit U + logit share`."""
    return scores if share is None else expit(log_odds(scores)[:, 1] - log_odds(scores)[:, 0] + logit(share))


def log_odds(scores: np.ndarray) -> np.ndarray:
    """`(N, 2)` log-probabilities of right and wrong."""
    scores = np.asarray(scores, np.float64)
    wrong = np.log(np.clip(scores, _SMALLEST, 1.0))
    return np.stack([np.log1p(-np.clip(scores, 0.0, 1 - _NEAREST)), wrong], axis=1)
