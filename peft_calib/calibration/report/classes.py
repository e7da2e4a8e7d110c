"""One line a class: what an average over classes hides where they are not equally frequent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bins import BinStatistics, top_label
from ..inputs import Rows
from ..resampling.bands import wilson_interval
from ..resampling.intervals import Band, bootstrap_intervals, down_to_zero, noise_floor
from ..resampling.ranked import Interval
from ..scores.binned import calibration_error
from ..scores.table import MOST_RESAMPLED_CLASSES
from .measured import Measured
from .tables import Name, Section, Table, number, with_interval

#: Scores of a class against the rest that resamples give an interval of.
RESAMPLED = ("brier", "ece")


@dataclass(frozen=True, eq=False)
class ClassRow:
    """One class against the rest.

    Attributes:
        name: As given, or its number.
        num_rows: Rows with this label.
        num_predicted: Rows whose prediction it is.
        scores: `recall` and `precision` (NaN where there is nothing to divide by), `mean_probability`, `ece` of its
            column by equal-width bins, and `brier`, the mean of `(p - 1[y = class])^2` in [0, 1].
        intervals: Key to `(low, high)`, or None if none were asked for; those of `ece` and `brier` up to 200 classes.
        floor: Mean and band of `ece` under perfect calibration, or None likewise.
    """

    name: str
    num_rows: int
    num_predicted: int
    scores: dict[str, float]
    intervals: dict[str, Interval] | None
    floor: Band | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        intervals = None if self.intervals is None else {key: list(ends) for key, ends in self.intervals.items()}
        counts = {"name": self.name, "num_rows": self.num_rows, "num_predicted": self.num_predicted}
        floor = None if self.floor is None else self.floor._asdict()
        return {**counts, **self.scores, "intervals": intervals, "ece_noise_floor": floor}


def checked_class_names(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    """As many names as there are classes, or None."""
    if names is None:
        return None
    if isinstance(names, str) or len(names) != num_classes:
        raise ValueError(f"There are {num_classes} classes, but `class_names` is {names!r}: give one name a class.")
    return tuple(map(str, names))


def class_rows(rows: Rows, whole: Measured, names: Sequence[str] | None) -> tuple[ClassRow, ...]:
    """Every class against the rest, with the bins and resamples of the whole report."""
    predicted = top_label(rows.probabilities)[1]
    size = rows.num_classes
    of_label, of_prediction = np.bincount(rows.labels, minlength=size), np.bincount(predicted, minlength=size)
    right = np.bincount(rows.labels[predicted == rows.labels], minlength=size)
    found = []
    for k in range(size):
        counts = int(of_label[k]), int(of_prediction[k]), int(right[k])
        name = str(k) if names is None else names[k]
        found.append(_class_row(name, counts, against_rest(rows, k), whole.tables.columns.uniform[k], whole))
    return tuple(found)


def against_rest(rows: Rows, k: int) -> Rows:
    """One class against the rest: two classes, the confidence being the probability of the second."""
    of_class = np.minimum(rows.probabilities[:, k], 1.0)
    labels = (rows.labels == k).astype(np.int64)
    return Rows(np.stack([1.0 - of_class, of_class], axis=1), labels, against_rest=True)


def _class_row(name: str, counts: tuple[int, int, int], rows: Rows, bins: BinStatistics, whole: Measured) -> ClassRow:
    num_rows, num_predicted, right = counts
    of_class = rows.probabilities[:, 1]
    scores = {
        "recall": right / num_rows if num_rows else float("nan"),
        "precision": right / num_predicted if num_predicted else float("nan"),
        "mean_probability": float(of_class.mean()),
        "ece": float(calibration_error(bins)),
        "brier": float(((of_class - rows.labels) ** 2).mean()),
    }
    if whole.intervals is None:
        return ClassRow(name, num_rows, num_predicted, scores, None, None)
    level = float(whole.settings["confidence_level"])
    shares = wilson_interval(np.full(2, float(right)), np.array([num_rows, num_predicted]), level)
    intervals = {"recall": (float(shares[0][0]), float(shares[1][0]))}
    intervals["precision"] = float(shares[0][1]), float(shares[1][1])
    if whole.settings["num_classes"] > MOST_RESAMPLED_CLASSES:
        return ClassRow(name, num_rows, num_predicted, scores, intervals, None)
    how = {key: whole.settings[key] for key in ("num_bins", "confidence_level", "num_resamples", "seed")}
    floor = noise_floor(rows, scores=RESAMPLED, **how)
    method = whole.settings["interval_method"]
    resampled = down_to_zero(bootstrap_intervals(rows, scores=RESAMPLED, method=method, **how), scores, floor)
    intervals["ece"] = resampled["ece"]
    intervals["brier"] = 0.5 * resampled["brier"][0], 0.5 * resampled["brier"][1]  # two equal columns
    return ClassRow(name, num_rows, num_predicted, scores, intervals, floor["ece"])


def class_section(classes: Sequence[ClassRow], level: float | None) -> Section:
    """The table."""
    header = ["class", "rows", "predicted", "recall", "precision", "mean probability", "ece", "brier"]
    header += ["ece if calibrated"] if level else []
    lines = []
    for row in classes:
        ends = row.intervals or {}
        told = {key: with_interval(value, ends.get(key)) for key, value in row.scores.items()}
        keys = ("recall", "precision", "mean_probability", "ece", "brier")
        cells = [Name(row.name), f"{row.num_rows:,}", f"{row.num_predicted:,}", *(told[key] for key in keys)]
        lines.append(cells + (["–" if row.floor is None else number(row.floor.mean)] if level else []))
    note = "Each class against the rest: ECE of its column by equal-width bins, Brier score in [0, 1]."
    held = f" Intervals hold one by one, at {level:.0%}." if level else ""
    return Section("Classes", [Table(header, lines)], [note + held])
