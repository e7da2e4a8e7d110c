"""What a run must beat: always answering with the most frequent class of the training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..calibration import calibration_report
from ..calibration.resampling.bands import wilson_interval

#: How tables call it.
CALLED = "most frequent class"


@dataclass(frozen=True)
class MostFrequent:
    """A model that has not read the texts: it gives every row the shares of the classes in the training rows."""

    names: tuple[str, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, names: Sequence[str], labels: Any) -> MostFrequent:
        """From class indices; those below 0 are ignored."""
        known = np.asarray([label for label in labels if label >= 0], int)
        return cls(tuple(names), tuple(np.bincount(known, minlength=len(names)).tolist()))

    @property
    def answer(self) -> str:
        return self.names[int(np.argmax(self.counts))]

    def probabilities(self, num_rows: int) -> np.ndarray:
        """The shares of the classes, one added to each count, for every row."""
        shares = np.asarray(self.counts, float) + 1.0
        return np.tile(shares / shares.sum(), (num_rows, 1))

    def scores(self, labels: Any, metrics: Sequence[str]) -> dict[str, float]:
        report = calibration_report(self.probabilities(len(labels)), labels, confidence_level=None)
        return {name: float(report[name]) for name in metrics}

    def verdict_of(self, name: str, probabilities: np.ndarray, labels: np.ndarray) -> str | None:
        """As `verdict`, from a model's probabilities (N, C)."""
        right = probabilities.argmax(1) == labels
        low, high = wilson_interval(right.sum(keepdims=True), np.array([len(right)]), 0.95)
        return self.verdict(name, float(right.mean()), (float(low[0]), float(high[0])), labels)

    def verdict(self, name: str, accuracy: float, interval: Sequence[float] | None, labels: Any) -> str | None:
        """In plain words, that a model is no better than this; `None` where it is better."""
        here = np.bincount(np.asarray(labels), minlength=len(self.names))
        share = float(here.max() / here.sum())
        always = f"always answering {self.names[int(here.argmax())]!r}, the most frequent class"
        if accuracy <= share:
            return f"{name} is no better than {always}: accuracy {accuracy:.3f} against {share:.3f}. {ADVICE}"
        if interval is not None and interval[0] <= share:
            return (
                f"these rows cannot tell {name} from {always}: accuracy {accuracy:.3f} [{interval[0]:.3f}, "
                f"{interval[1]:.3f}] against {share:.3f}. {ADVICE}"
            )
        return None


ADVICE = (
    "Train for more --epochs, with another --learning-rate or on more rows, and look whether the labels are right."
)
