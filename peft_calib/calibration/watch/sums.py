"""What a watch keeps of the newest rows: sums of whole numbers, equal in whatever batches rows come."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...json_files import Fields

#: What numbers in [0, 1] are multiples of before they are added.
UNIT = 1 << 32
NAMES = ("confidence", "confidence_squared", "brier", "brier_squared", "above")


class Sums:
    """Of the confidence, the Brier score expected from it, rows above a threshold, predicted classes."""

    def __init__(self, num_classes: int) -> None:
        self.rows = 0
        self.totals = dict.fromkeys(NAMES, 0)
        self.classes = np.zeros(num_classes, np.int64)

    def add(self, confidence: np.ndarray, predicted: np.ndarray, threshold: float) -> None:
        """Add rows."""
        brier = confidence * (1.0 - confidence)
        values = (confidence, confidence**2, brier, brier**2, (confidence >= threshold).astype(float))
        for name, value in zip(NAMES, values, strict=True):
            self.totals[name] += int(np.rint(value * UNIT).astype(np.int64).sum())
        self.rows += len(confidence)
        self.classes += np.bincount(predicted, minlength=len(self.classes))

    def __add__(self, other: Sums) -> Sums:
        found = Sums(len(self.classes))
        found.rows = self.rows + other.rows
        found.totals = {name: self.totals[name] + other.totals[name] for name in NAMES}
        found.classes = self.classes + other.classes
        return found

    def mean(self, name: str) -> float:
        """The mean of one of them."""
        return self.totals[name] / UNIT / self.rows

    def variance(self, name: str) -> float:
        """The variance of one row's; of `above` that of a frequency."""
        squared = self.mean("above" if name == "above" else f"{name}_squared")
        return max(0.0, squared - self.mean(name) ** 2)

    def state(self) -> dict[str, Any]:
        """JSON-ready values, exact."""
        return {"rows": self.rows, **self.totals, "classes": self.classes.tolist()}

    @classmethod
    def from_state(cls, fields: Fields, num_classes: int) -> Sums:
        """The inverse of `state`."""
        found = cls(num_classes)
        found.rows = fields.integer("rows", least=0)
        found.totals = {name: fields.integer(name, least=0) for name in NAMES}
        found.classes = counts_of(fields, "classes", num_classes)
        if found.classes.sum() != found.rows:
            raise fields.wrong("classes", f"counts that sum to {found.rows}")
        return found


def counts_of(fields: Fields, name: str, size: int) -> np.ndarray:
    """`(size,)` int64 counts in a file."""
    counts = fields.listing(name, int)
    if len(counts) != size or min(counts) < 0 or max(counts) > 2**53:
        raise fields.wrong(name, f"{size} counts")
    return np.array(counts, np.int64)
