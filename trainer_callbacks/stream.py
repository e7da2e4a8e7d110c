"""The rows of one evaluation: kept while they are few, so that they get intervals, and summed up in O(bins) beyond."""

from __future__ import annotations

import numpy as np

from peft_calib.calibration import CalibrationAccumulator, CalibrationReport, calibration_report
from peft_calib.calibration.answers import without_masks

# Rows for which intervals take about two seconds on one core.
MAX_KEPT_ROWS = 20_000
#: In the metrics of an evaluation, the number of rows whose logits are NaN or infinite, if there are any.
NOT_FINITE = "rows_not_finite"
# Rows handed to the accumulator at a time.
CHUNK = 8192


class RowStream:
    """Logits and labels of an evaluation, a batch at a time: kept up to `max_rows`, and beyond summed up in bins."""

    def __init__(self, num_bins: int, max_rows: int = MAX_KEPT_ROWS) -> None:
        self.num_bins, self.max_rows = num_bins, max_rows
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_kept = 0
        self._sums: CalibrationAccumulator | None = None
        #: Rows that hold NaN or infinity; they are counted and left out.
        self.num_not_finite = 0

    def __len__(self) -> int:
        return self.num_not_finite + (self._num_kept if self._sums is None else self._sums.num_rows)

    def add(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Adds `(N, C)` logits, where -inf masks a class, and `(N,)` labels."""
        finite = np.isfinite(logits.max(axis=1)) if len(logits) else np.zeros(0, bool)  # NaN is the maximum of its row
        if not finite.all():
            self.num_not_finite += int((~finite).sum())
            logits, labels = logits[finite], labels[finite]
        logits = without_masks(logits)
        if self._sums is None and self._num_kept + len(labels) <= self.max_rows:
            # copies: the loop reuses its memory
            self._kept.append((logits.astype(np.float32), labels.copy()))
            self._num_kept += len(labels)
            return
        if self._sums is None:
            self._sums = CalibrationAccumulator(self.num_bins, input="logits")
        kept, self._kept = self._kept, []  # before any of them is refused: none is counted twice
        for rows, classes in (*kept, (logits, labels)):
            for start in range(0, len(classes), CHUNK):
                self._sums.update(rows[start : start + CHUNK], classes[start : start + CHUNK])

    def report(self, confidence_level: float | None) -> CalibrationReport:
        """The scores; intervals and noise floor only if all rows are at hand. ValueError if there was no row."""
        if self._sums is not None:
            return self._sums.compute()
        if not self._num_kept:
            raise ValueError(
                "The evaluation has no labelled row to measure: the evaluation set is empty, or every label is -100."
            )
        logits, labels = (np.concatenate(parts) for parts in zip(*self._kept, strict=True))
        return calibration_report(
            logits, labels, input="logits", num_bins=self.num_bins, confidence_level=confidence_level
        )
