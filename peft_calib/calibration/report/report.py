"""`calibration_report`: probabilities and labels in, numbers one can defend out."""

from __future__ import annotations

from typing import Any

from ..inputs import as_rows, check_confidence_level, check_num_bins
from ..resampling.intervals import bootstrap_intervals, down_to_zero, noise_floor, num_resamples_for, resampled_keys
from ..scores.panel import build_tables, compute_panel
from . import render
from .conventions import convention_scores
from .record import ReportRecord


class CalibrationReport(ReportRecord):
    """Every score of one set of predictions, with its interval and the score of a perfectly calibrated model.

    As a mapping it holds the scores alone; `to_dict` has everything.

    Attributes:
        scores: Key to number; the keys are those of `peft_calib.calibration.scores.table.DEFINITIONS`.
        settings: What the numbers depend on: rows, classes, bins, convention, resamples, seed.
        intervals: Key to `(low, high)`, or None if none were asked for. Above 200 classes scores over class columns
            have neither interval nor band: replicates of all their bins would cost more than all else together.
        floor: Mean and band of each score under perfect calibration, or None.
        bins: Top-label uniform bins, for the pictures.
        class_bins: `(C, B)` bins of every class column.
    """

    def to_markdown(self) -> str:
        """A table with one line a score, and the verdict on the calibration error, in Markdown."""
        return render.report_markdown(self)

    def to_html(self) -> str:
        """One self-contained page, pictures included, that needs no network."""
        return render.report_html(self)

    def verdict(self) -> str:
        """In words: how the ECE compares with what a perfectly calibrated model would score on these rows."""
        return render.verdict(self)

    def __str__(self) -> str:
        return self.to_markdown()


def calibration_report(
    probabilities: Any,
    labels: Any,
    *,
    num_bins: int = 15,
    confidence_level: float | None = 0.95,
    input: str = "probabilities",
    mask: Any = None,
    ignore_index: int | None = -100,
    convention: str = "peft_calib",
    num_resamples: int | None = None,
    interval_method: str = "bca",
    seed: int = 0,
) -> CalibrationReport:
    """Measures accuracy, proper scores, calibration and selective prediction of one set of predictions.

    Args:
        probabilities: `(N, C)` rows summing to one, `(N,)` for the probability of class 1, or `(..., C)` with labels
            `(...)`; numpy, torch or lists. Logits if `input="logits"`.
        labels: Integer class ids.
        num_bins: Bins of every binned score.
        confidence_level: Level of the intervals and of the noise band; None computes neither.
        input: `"probabilities"` or `"logits"`; checked, never guessed.
        mask: Boolean, of the labels' shape; False drops the row.
        ignore_index: Label of rows to drop, or None.
        convention: Whose definition the numbers follow where definitions differ, see `conventions.CONVENTIONS`; scores
            it redefines get neither interval nor noise band.
        num_resamples: Bootstrap resamples; by default 1,000, fewer above 10^5 rows.
        interval_method: `"bca"` or `"percentile"`.
        seed: Of the private generator of the intervals and of the floor.

    Raises:
        ValueError, TypeError: For anything that is not what it should be, see `as_rows`.

    Example:
        >>> rows, labels = [[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]], [0, 0, 1]
        >>> report = calibration_report(rows, labels, num_bins=10, confidence_level=None)
        >>> round(report["ece"], 6), round(report["brier"], 6)
        (0.266667, 0.173333)
    """
    num_bins = check_num_bins(num_bins)
    rows = as_rows(probabilities, labels, input=input, mask=mask, ignore_index=ignore_index)
    tables = build_tables(rows, num_bins)
    values = compute_panel(rows, num_bins, tables)
    redefined = convention_scores(convention, rows, num_bins, values)
    settings = {
        "num_rows": len(rows.labels),
        "num_classes": rows.num_classes,
        "num_bins": num_bins,
        "convention": convention,
        "confidence_level": None,
    }
    intervals = floor = None
    if confidence_level is not None:
        check_confidence_level(confidence_level)
        resamples = num_resamples_for(len(rows.labels), rows.num_classes) if num_resamples is None else num_resamples
        scores = [key for key in resampled_keys(rows.num_classes) if key not in redefined]
        asked: dict[str, Any] = {"confidence_level": confidence_level, "num_resamples": resamples, "seed": seed}
        floor = noise_floor(rows, num_bins=num_bins, scores=scores, **asked)
        found = bootstrap_intervals(rows, num_bins=num_bins, scores=scores, method=interval_method, **asked)
        intervals = down_to_zero(found, values, floor)
        settings |= {"confidence_level": confidence_level, "interval_method": interval_method, **asked}
    return CalibrationReport(
        values | redefined, settings, tables.sums.bins, tables.columns.uniform, intervals, floor, rows
    )
