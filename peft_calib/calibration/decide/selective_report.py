"""What a threshold reaches on rows it has not seen, with exact intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...json_files import without_nan
from ..report.tables import Name, in_markdown
from .bounds import band_text, exact_interval, percent


@dataclass(frozen=True)
class SelectiveReport:
    """Risk and coverage of a threshold on new rows.

    Attributes:
        num_rows: Rows.
        accepted: Rows answered.
        errors: Wrong ones among the answered.
        coverage: Share of rows answered.
        coverage_interval: Its exact interval (Clopper & Pearson).
        risk: Share of wrong ones among the answered; NaN if none is.
        risk_interval: Its exact interval.
        mean_cost: Cost a row, where the rule has costs; None otherwise.
        classes: For each predicted class with rows its `accepted`, `errors`, `risk` and `risk_interval`, where the
            rule has a threshold for each. These intervals hold one by one.
        confidence_level: Of the intervals.
        promise: What the rule guarantees.
        settings: Its target and bound.
    """

    num_rows: int
    accepted: int
    errors: int
    coverage: float
    coverage_interval: tuple[float, float]
    risk: float
    risk_interval: tuple[float, float]
    mean_cost: float | None
    classes: dict[int, dict[str, Any]] | None
    confidence_level: float
    promise: str
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; a risk of nothing is null."""
        return without_nan({**vars(self)})

    def to_markdown(self, class_names: Sequence[str] | None = None) -> str:
        """What was reached, beside what was promised; classes by their names, if these are given."""
        level = percent(self.confidence_level)
        risk = "" if not self.accepted else f", {percent(self.risk)} {band_text(self.risk_interval)}"
        lines = [
            f"{self.accepted} of {self.num_rows} rows are answered, {percent(self.coverage)} "
            f"{band_text(self.coverage_interval)}; {self.errors} of them are wrong{risk} ({level} intervals).",
            "",
            f"Promised: {self.promise}",
        ]
        if self.mean_cost is not None:
            lines.insert(1, f"A row costs {self.mean_cost:.4g} on average.")
        if self.classes is not None:
            lines += ["", "| predicted class | answered | wrong | risk | interval |", "|---:|---:|---:|---:|---:|"]
            for k, found in self.classes.items():
                risk = percent(found["risk"]) if found["accepted"] else "–"
                ends = band_text(found["risk_interval"]) if found["accepted"] else "–"
                cells = [named(k, class_names), f"{found['accepted']} of {found['rows']}", str(found["errors"])]
                lines.append(f"| {' | '.join([*cells, risk, ends])} |")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_markdown()


def named(group: Any, class_names: Sequence[str] | None) -> str:
    """A class in Markdown: its name, or its number where there are no names."""
    return str(group) if class_names is None else in_markdown(Name(class_names[int(group)]))


def reached_by(
    accepted: np.ndarray,
    correct: np.ndarray,
    confidence_level: float,
    promise: str,
    settings: dict[str, Any],
    predicted: np.ndarray | None,
) -> SelectiveReport:
    """The report of `(N,)` decisions and outcomes; class by class if predicted classes are given."""
    num_rows, answered = len(accepted), int(accepted.sum())
    errors = int((accepted & ~correct).sum())
    cost = None
    if "costs" in settings["target"]:
        wrong, passed_on = settings["target"]["costs"]
        cost = (wrong * errors + passed_on * (num_rows - answered)) / num_rows
    classes = None
    if predicted is not None:
        classes = {
            int(k): _of_class(accepted, correct, predicted == k, confidence_level) for k in np.unique(predicted)
        }
    return SelectiveReport(
        num_rows, answered, errors,
        answered / num_rows, exact_interval(answered, num_rows, confidence_level),
        errors / answered if answered else float("nan"), exact_interval(errors, answered, confidence_level),
        cost, classes, confidence_level, promise, settings,
    )  # fmt: skip


def _of_class(accepted: np.ndarray, correct: np.ndarray, mine: np.ndarray, level: float) -> dict[str, Any]:
    answered, errors = int((accepted & mine).sum()), int((accepted & mine & ~correct).sum())
    risk = errors / answered if answered else float("nan")
    interval = exact_interval(errors, answered, level)
    return {
        "rows": int(mine.sum()), "accepted": answered, "errors": errors, "risk": risk, "risk_interval": interval,
    }  # fmt: skip
