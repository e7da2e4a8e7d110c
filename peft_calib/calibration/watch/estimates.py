"""The accuracy to be expected of unlabelled rows, and what each estimate rests on.

Without labels every estimate is an assumption. Nothing here holds after just any change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from ...json_files import without_nan
from .reference import MOST_CLASSES_IN_TABLE, Error, Reference
from .sums import Sums

#: Draws behind an interval under other class shares.
DRAWS = 1000
#: Smallest singular value of the table of predictions given labels at which it can be solved for the shares.
LEAST_SINGULAR = 0.1
SAME_ERROR = "the confidence errs now as it did on the reference rows, by as much"
SAME_CUT = "the confidence that divides right from wrong rows is as it was"
SAME_CLASSES = "only the class shares have changed, and each class looks as it did (label shift)"


@dataclass(frozen=True)
class Expected:
    """One estimate.

    Attributes:
        name: `"confidence"`, `"threshold"` or `"class_shares"`.
        holds_if: What it rests on.
        accuracy: Accuracy of rows like those of the window, in [0, 1]; None where it cannot be had.
        interval: Of the accuracy, for the chance in both the reference and the window.
        overconfidence: Mean confidence less accuracy.
        overconfidence_interval: Its interval.
        why_not: Why there is none.
    """

    name: str
    holds_if: str
    accuracy: float | None = None
    interval: tuple[float, float] | None = None
    overconfidence: float | None = None
    overconfidence_interval: tuple[float, float] | None = None
    why_not: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return without_nan(dict(vars(self)))


def expected_accuracy(reference: Reference, window: Sums, level: float, seed: int) -> tuple[Expected, ...]:
    """Every estimate of the accuracy of the rows in a window.

    - Difference of confidences (Guillory et al., 2021): the mean confidence, corrected by how far it was off on the
      reference. Its interval is that of a mean of unlabelled rows corrected by labelled ones (prediction-powered
      inference, Angelopoulos et al., 2023).
    - Average thresholded confidence (Garg et al., 2022): the share of rows above the confidence that as many
      reference rows lie below as are wrong, in the same way.
    - Class shares solved from predictions (Lipton, Wang & Smola, 2018), and the accuracy of each class as it was.
    """
    made = (_by_confidence, _by_threshold, _by_class_shares)
    return tuple(make(reference, window, level, seed) for make in made)


def expected_brier(reference: Reference, window: Sums, level: float) -> tuple[float, tuple[float, float]]:
    """The Brier score of the confidence, `mean (c - right)^2`, to be expected where `SAME_ERROR` holds."""
    error, mean, sure, z = reference.brier_error, window.mean("brier"), reference.confidence, _z(level)
    of_right, of_wrong = (1.0 - sure) * (1.0 - 2.0 * sure), sure * (2.0 * sure - 1.0)
    centre, variance = _cautious(error, reference.rows, of_right, of_wrong, z)
    half = z * float(np.sqrt(variance + window.variance("brier") / window.rows))
    return _around(mean + error.mean, mean + centre, half)


def _by_confidence(reference: Reference, window: Sums, level: float, seed: int) -> Expected:
    error, mean, z = reference.confidence_error, window.mean("confidence"), _z(level)
    centre, variance = _cautious(error, reference.rows, 1.0 - reference.confidence, -reference.confidence, z)
    of_gap = z * float(np.sqrt(variance))
    half = z * float(np.sqrt(variance + window.variance("confidence") / window.rows))
    gaps = (min(-error.mean, -centre - of_gap), max(-error.mean, -centre + of_gap))
    accuracy, interval = _around(mean + error.mean, mean + centre, half)
    return Expected("confidence", SAME_ERROR, accuracy, interval, -error.mean, gaps)


def _by_threshold(reference: Reference, window: Sums, level: float, seed: int) -> Expected:
    error, share, z = reference.threshold_error, window.mean("above"), _z(level)
    score = reference.accuracy - error.mean
    centre, variance = _cautious(error, reference.rows, 1.0 - score, -score, z)
    # of the share as it might be, so that none or all above the threshold is not certainty
    likely = (share * window.rows + 0.5 * z * z) / (window.rows + z * z)
    half = z * float(np.sqrt(variance + likely * (1.0 - likely) / window.rows))
    return _of_accuracy("threshold", SAME_CUT, window, *_around(share + error.mean, share + centre, half))


def _by_class_shares(reference: Reference, window: Sums, level: float, seed: int) -> Expected:
    """Shares solved for, and drawn again with the table and the predictions as they might have come out."""
    table, size = reference.table, len(window.classes)
    why_not = None
    if table is None:
        why_not = f"more than {MOST_CLASSES_IN_TABLE} classes"
    elif not table.sum(axis=1).all():
        why_not = f"class {int(table.sum(axis=1).argmin())} has no reference row"
    else:
        given = (table / table.sum(axis=1, keepdims=True)).T
        if np.linalg.svd(given, compute_uv=False)[-1] < LEAST_SINGULAR:
            why_not = "the predictions do not tell the classes apart well enough"
    if why_not is not None:
        return Expected("class_shares", SAME_CLASSES, why_not=why_not)
    assert table is not None
    best = _accuracy_of(given[None], (window.classes / window.rows)[None])[0]
    generator = np.random.default_rng([seed, 23])
    drawn = generator.standard_gamma(table.T + 1.0 / size, (DRAWS, size, size))
    drawn /= drawn.sum(axis=1, keepdims=True)
    shares = generator.standard_gamma(window.classes + 1.0 / size, (DRAWS, size))
    accuracies = _accuracy_of(drawn, shares / shares.sum(axis=1, keepdims=True))
    low, high = np.quantile(accuracies, [0.5 - 0.5 * level, 0.5 + 0.5 * level])
    return _of_accuracy("class_shares", SAME_CLASSES, window, best, (min(low, best), max(high, best)))


def _accuracy_of(given: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """`(D,)` accuracies where `(D, C, C)` is P(prediction | label), a column a label, and `(D, C)` are predicted."""
    prior = np.maximum(np.einsum("dij,dj->di", np.linalg.pinv(given), shares), 0.0)
    prior /= prior.sum(axis=1, keepdims=True)
    return np.einsum("dc,dcc->d", prior, given)


def _cautious(error: Error, rows: int, of_right: float, of_wrong: float, z: float) -> tuple[float, float]:
    """Mean and variance of a mean over rows, with `z^2` rows added of which half are right and half wrong.

    As Agresti & Coull (1998) do for a frequency: a few rows that are all right are no certainty.
    """
    size = rows + z * z
    mean = (rows * error.mean + z * z * 0.5 * (of_right + of_wrong)) / size
    squared = (rows * (error.variance + error.mean**2) + z * z * 0.5 * (of_right**2 + of_wrong**2)) / size
    return mean, max(0.0, squared - mean**2) / size


def _around(value: float, centre: float, half: float) -> tuple[float, tuple[float, float]]:
    """An accuracy and its interval, both in [0, 1], the one in the other."""
    inside = _inside(value)
    return inside, (min(inside, _inside(centre - half)), max(inside, _inside(centre + half)))


def _of_accuracy(name: str, holds_if: str, window: Sums, accuracy: float, interval: tuple[float, float]) -> Expected:
    """An estimate whose over-confidence follows from the confidence of the window's own rows."""
    mean, value = window.mean("confidence"), float(accuracy)
    low, high = (float(end) for end in interval)
    return Expected(name, holds_if, value, (low, high), mean - value, (mean - high, mean - low))


def _z(level: float) -> float:
    return float(ndtri(0.5 + 0.5 * level))


def _inside(value: float) -> float:
    return float(min(1.0, max(0.0, value)))
