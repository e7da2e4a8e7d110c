"""What a watch keeps of its labelled reference rows: how often they are right, and how their scores err."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...json_files import Fields
from ..fingerprint import SplitFingerprint, row_hashes

#: More classes than this and no table of labels against predictions is kept.
MOST_CLASSES_IN_TABLE = 100


@dataclass(frozen=True)
class Error:
    """Mean and variance, over reference rows, of what a score has to be corrected by."""

    mean: float
    variance: float

    @classmethod
    def of(cls, values: np.ndarray) -> Error:
        return cls(float(values.mean()), float(values.var()))


@dataclass(frozen=True)
class Reference:
    """Labelled rows that nothing was fitted on.

    Attributes:
        rows: How many.
        correct: Rows that were predicted rightly.
        confidence: Their mean confidence.
        brier: Their mean Brier score of the confidence.
        threshold: Confidence that as many rows lie below as are wrong.
        confidence_error: Of correctness less confidence.
        threshold_error: Of correctness less "at or above the threshold".
        brier_error: Of the Brier score less the one expected, `c (1 - c)`.
        table: `(C, C)` rows by label and prediction; None of too many classes.
        digest: Hash of the rows.
    """

    rows: int
    correct: int
    confidence: float
    brier: float
    threshold: float
    confidence_error: Error
    threshold_error: Error
    brier_error: Error
    table: np.ndarray | None
    digest: str

    @classmethod
    def of(cls, confidence: np.ndarray, predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> Reference:
        """Of rows that were checked."""
        right = (predicted == labels).astype(np.float64)
        wrong = len(right) - int(right.sum())
        ordered = np.sort(confidence)
        threshold = float(ordered[wrong]) if wrong < len(ordered) else float(np.nextafter(ordered[-1], 2.0))
        brier, table = (confidence - right) ** 2, None
        if num_classes <= MOST_CLASSES_IN_TABLE:
            table = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
            table = table.reshape(num_classes, num_classes)
        return cls(
            rows=len(right),
            correct=int(right.sum()),
            confidence=float(confidence.mean()),
            brier=float(brier.mean()),
            threshold=threshold,
            confidence_error=Error.of(right - confidence),
            threshold_error=Error.of(right - (confidence >= threshold)),
            brier_error=Error.of(brier - confidence * (1.0 - confidence)),
            table=table,
            digest=SplitFingerprint.of_hashes(row_hashes(confidence[:, None], labels)).digest,
        )

    @property
    def accuracy(self) -> float:
        """Share of rows that were predicted rightly."""
        return self.correct / self.rows

    def state(self) -> dict[str, Any]:
        """JSON-ready values, exact."""
        return {**asdict(self), "table": None if self.table is None else self.table.tolist()}

    @classmethod
    def from_state(cls, fields: Fields, num_classes: int) -> Reference:
        """The inverse of `state`; a ValueError names what cannot be."""
        rows, correct = fields.integer("rows", least=1), fields.integer("correct", least=0)
        if correct > rows:
            raise fields.wrong("correct", f"a whole number of at most {rows}")
        table = None
        if fields.get("table") is not None:
            table = fields.array("table", (num_classes, num_classes))
            if table.sum() != rows or (table < 0).any() or (table % 1 != 0).any():
                raise fields.wrong("table", f"counts that sum to {rows}")
            table = table.astype(np.int64)
        errors = {name: fields.mapping(name) for name in ("confidence_error", "threshold_error", "brier_error")}
        return cls(
            rows=rows,
            correct=correct,
            confidence=fields.number("confidence", least=0, most=1),
            brier=fields.number("brier", least=0, most=1),
            threshold=fields.number("threshold", least=0, most=2),
            **{
                name: Error(one.number("mean", least=-1, most=1), one.number("variance", least=0, most=1))
                for name, one in errors.items()
            },
            table=table,
            digest=fields.text("digest"),
        )
