"""`calibration_report`: probabilities and labels in, numbers one can defend out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..grouping import as_groups
from ..inputs import as_rows, check_num_bins, check_seed
from ..scores.weighted import drawn_bins
from . import render, sheet
from .classes import checked_class_names, class_rows
from .groups import measured_groups
from .measured import ReportSettings, measured
from .record import ReportRecord


class CalibrationReport(ReportRecord):
    """Every score of one set of predictions, with its interval and the score of a perfectly calibrated model.

    As a mapping it holds the scores alone; `to_dict` has everything.

    Attributes:
        scores: Key to number; the keys are those of `peft_calib.calibration.scores.table.DEFINITIONS`.
        settings: What the numbers depend on: rows, classes, bins, convention, resamples, seed.
        intervals: Key to `(low, high)` inside the score's range, NaN where a score has none, or None if none were
            asked for. Above 200 classes scores over class columns
            have neither interval nor band: replicates of all their bins would cost more than all else together.
        floor: Mean and band of each score under perfect calibration, or None.
        bins: Top-label uniform bins, for the pictures.
        class_bins: `(C, B)` bins of every class column.
        classes: One line a class, if `per_class` was asked for; see `ClassRow`.
        class_names: Names of the classes, or None.
        groups: Panel of every group and its distance from all rows, if groups were given; see `GroupsRecord`.
    """

    def to_markdown(self) -> str:
        """A table with one line a score, and the verdict on the calibration error, in Markdown."""
        return render.report_markdown(self)

    def to_html(
        self,
        further: str = "",
        *,
        before: CalibrationReport | None = None,
        about: Mapping[str, Any] | None = None,
        title: str = "Calibration report",
    ) -> str:
        """One self-contained page, pictures included, that needs no network.

        Args:
            further: HTML that comes after the scores, such as `decision_html` gives.
            before: The report of the same rows before a recalibration, shown beside this one.
            about: What is reported on, by name, at the top of the page: run, model, data, date, ...
            title: Of the page.
        """
        return sheet.report_html(self, further, before=before, about=about, title=title)

    def verdict(self) -> str:
        """In words: how the ECE compares with that of a perfectly calibrated model, and whether a group is worse."""
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
    groups: Any = None,
    per_class: bool = False,
    class_names: Sequence[str] | None = None,
    sample_weight: Any = None,
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
        groups: One value a row (text, number, tuple of them), or one for each entry of the labels' first axis. The
            report then has `groups`: all scores of every group and its gap to all rows. A missing value is an error.
        per_class: Whether the report has a line for every class: rows, recall, precision, ECE and Brier score against
            the rest, with intervals. For classes that are not equally frequent, where averages over rows hide some.
        class_names: What to call the classes there and in pictures.
        sample_weight: How much each row counts, numbers of at least 0, of the labels' shape or one for each entry of
            their first axis: survey or importance weights. In every score a row of weight 2 is there twice; for
            intervals and noise floor a row stays one observation, whatever it weighs, and all weights times a number
            change neither. Rows that say as much as fewer than 10 of equal weight have no interval. Not together
            with `groups`, `per_class` or another `convention`.

    Raises:
        ValueError, TypeError: For anything that is not what it should be, see `as_rows`.

    Example:
        >>> rows, labels = [[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]], [0, 0, 1]
        >>> report = calibration_report(rows, labels, num_bins=10, confidence_level=None)
        >>> round(report["ece"], 6), round(report["brier"], 6)
        (0.266667, 0.173333)
    """
    num_bins = check_num_bins(num_bins)
    options = {"input": input, "mask": mask, "ignore_index": ignore_index}
    if sample_weight is not None:
        _refuse_with_weights(groups=groups is not None, per_class=per_class, convention=convention != OURS)
    rows = as_rows(probabilities, labels, **options, sample_weight=sample_weight)
    asked = ReportSettings(num_bins, convention, confidence_level, num_resamples, interval_method, check_seed(seed))
    names = checked_class_names(class_names, rows.num_classes)
    grouping = None if groups is None else as_groups(groups, labels, rows.kept)
    found = measured(rows, asked)
    bins, class_bins = found.tables.sums.bins, found.tables.columns.uniform
    if rows.weights is not None:
        bins, class_bins = drawn_bins(bins, rows), drawn_bins(class_bins, rows)
    return CalibrationReport(
        found.scores, found.settings, bins, class_bins, found.intervals,
        found.floor, rows if rows.weights is None else None,
        groups=None if grouping is None else measured_groups(rows, grouping, found, asked),
        classes=class_rows(rows, found, names) if per_class else None,
        class_names=names,
    )  # fmt: skip


#: The convention of this package.
OURS = "peft_calib"


def _refuse_with_weights(**asked: bool) -> None:
    """Raise `ValueError` for what is not measured with weights."""
    given = [name for name, is_given in asked.items() if is_given]
    if given:
        raise ValueError(
            f"sample_weight does not go with {given[0]}: measure each group, or class, by itself, "
            "calibration_report(p[of_group], labels[of_group], sample_weight=weights[of_group])."
            if given[0] != "convention"
            else "sample_weight goes with this package's own convention: leave `convention` out."
        )
