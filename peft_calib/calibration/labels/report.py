"""`labels_report`: probabilities of several labels and which hold, as numbers with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..bins import BinStatistics, columnwise_uniform_bins
from ..inputs import check_confidence_level, check_num_bins, check_seed
from ..report.sectioned import SectionedReport
from ..report.tables import Name, Section, Table
from ..resampling.intervals import NoiseFloor, num_resamples_for
from ..scores.kinds import OF_LABELS
from .measured import LabelRow, label_row, micro_and_macro
from .rows import as_label_rows, checked_label_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Of the picture of all answers, and what it has on its axes.
ALL = "Reliability of all answers together, as if those of a row were independent"
AXES = ("probability of a label", "share of rows that have it")


@dataclass(frozen=True, eq=False)
class LabelsReport(SectionedReport):
    """Scores of all labels together, and a panel of each; as a mapping it holds the scores alone.

    Attributes:
        scores: Key to number, the keys of `OF_LABELS`.
        settings: Rows, labels, bins, resamples, seed.
        intervals: Key to `(low, high)`, from a bootstrap over rows, so that labels of a row may hang together; None if
            none were asked for.
        floor: Mean and band of `ece_micro` and `ece_macro` if every probability were right and labels independent.
        labels: One line a label, see `LabelRow`.
        bins: `(L, B)` bins of every label's probabilities, for the pictures.
    """

    kind: ClassVar[str] = "labels"
    title: ClassVar[str] = "Calibration report of labels"

    scores: dict[str, float]
    settings: dict[str, Any]
    intervals: dict[str, tuple[float, float]] | None
    floor: NoiseFloor | None
    labels: tuple[LabelRow, ...]
    bins: BinStatistics

    def to_dict(self) -> dict[str, Any]:
        """The scores under their own keys, then `settings`, `intervals`, `noise_floor` and `labels`."""
        return {**super().to_dict(), "labels": [row.to_dict() for row in self.labels]}

    def verdict(self) -> str:
        """In words: how the mean ECE of the labels compares with that of right probabilities."""
        ece, size = self.scores["ece_macro"], f"on {self.settings['num_rows']:,} rows"
        if self.floor is None:
            return f"Mean ECE of the labels {ece:.4f} {size}; no interval or noise floor was asked for."
        band, level = self.floor["ece_macro"], self.settings["confidence_level"]
        judgement = "this many rows cannot tell the two apart" if ece <= band.high else "the model is miscalibrated"
        return (
            f"Mean ECE of the labels {ece:.4f} {size}; probabilities that are right would score {band.mean:.4f} "
            f"[{band.low:.4f}, {band.high:.4f}] ({level:.0%} band): {judgement}."
        )

    def figures(self, before: LabelsReport | None = None) -> dict[str, Figure]:
        """Reliability of all answers together, and of each label; of many labels, of those that are off most."""
        # Whoever wants numbers alone does not pay for matplotlib.
        from ..report.plots import MOST_CLASSES, classwise_figure, points_figure

        level, names = self.settings["confidence_level"] or 0.95, [row.name for row in self.labels]
        together = _together(self.bins), None if before is None else _together(before.bins)
        each = "Reliability of each label"
        if len(names) > MOST_CLASSES:
            each = f"Reliability of {MOST_CLASSES} of {len(names)} labels, those with the largest calibration errors"
        return {
            ALL: points_figure(*together, level=level, axes_names=AXES),
            each: classwise_figure(self.bins, level, names, what="label"),
        }

    def _sections(self) -> list[Section]:
        level = self.settings["confidence_level"]
        notes = ["Intervals: bootstrap over rows."] if level else []
        keys = [key for key in self.labels[0].scores if key != "mean_probability"]
        of_each = ["label", "rows", "given", *keys, *(["ece if calibrated"] if level else [])]
        each = [[Name(row.name), *row.cells(bool(level))] for row in self.labels]
        told = f" Intervals hold one by one, at {level:.0%}." if level else ""
        return [
            Section("All labels", [self._score_table(OF_LABELS)], notes),
            Section("Each label", [Table(of_each, each)], [f"Given: from a probability of 1/2 on.{told}"]),
        ]


def labels_report(
    probabilities: Any,
    labels: Any,
    *,
    label_names: Sequence[str] | None = None,
    num_bins: int = 15,
    confidence_level: float | None = 0.95,
    input: str = "probabilities",
    num_resamples: int | None = None,
    seed: int = 0,
) -> LabelsReport:
    """Measure the probabilities of labels of which a row may have several.

    Args:
        probabilities: `(N, L)`, or `(N,)` for a single label, each the probability that the row has the label.
        labels: Zeros and ones of the same shape.
        label_names: What to call the labels.
        num_bins: Bins of the calibration errors.
        confidence_level: Level of intervals and noise bands; None computes neither.
        input: `"probabilities"` or `"logits"`.
        num_resamples: Bootstrap resamples; by default 1,000, fewer for many rows.
        seed: Of the private generator of intervals and floor.

    Returns:
        The report.

    Raises:
        ValueError, TypeError: For anything that is not what it should be, see `as_label_rows`.

    Example:
        >>> report = labels_report([[0.9, 0.2], [0.8, 0.4]], [[1, 0], [1, 1]], confidence_level=None)
        >>> round(report["f1_micro"], 3), report["exact_match"], round(report["brier_micro"], 4)
        (0.8, 0.5, 0.1125)
    """
    num_bins, seed = check_num_bins(num_bins), check_seed(seed)
    rows = as_label_rows(probabilities, labels, input=input)
    names = checked_label_names(label_names, rows.num_labels)
    size = num_resamples_for(len(rows.labels), rows.num_labels) if num_resamples is None else num_resamples
    level = None if confidence_level is None else check_confidence_level(confidence_level)
    how: dict[str, Any] = {"num_bins": num_bins, "confidence_level": level, "num_resamples": size, "seed": seed}
    scores, intervals, floor = micro_and_macro(rows, **how)
    each = tuple(label_row(rows, k, name, **how) for k, name in enumerate(names))
    settings = {"num_rows": len(rows.labels), "num_labels": rows.num_labels, **how}
    ordered = {key: scores[key] for key in OF_LABELS}
    bins = columnwise_uniform_bins(rows.probabilities, rows.labels, num_bins)
    return LabelsReport(ordered, settings, intervals, floor, each, bins)


def _together(bins: BinStatistics) -> BinStatistics:
    """The answers of all labels in the same bins."""
    return BinStatistics(*(part.sum(axis=0) for part in vars(bins).values()))
