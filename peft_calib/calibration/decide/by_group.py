"""What a rule reaches in each group of rows: a promise is one of all rows, and one group may pay for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...json_files import without_nan
from ..grouping import as_groups
from ..report.tables import Name, Table, in_text, markdown_table
from .bounds import band_text, check_share, exact_interval, percent
from .groups import BY_NAME
from .sets import ConformalSets
from .threshold import SelectiveThreshold


@dataclass(frozen=True)
class GroupReach:
    """One group.

    Attributes:
        group: Its value.
        name: As it is told.
        num_rows: Rows.
        decided: Rows that are answered; of sets all.
        failures: Wrong ones among them; sets that miss the label.
        share: Of failures among the decided; NaN without one.
        interval: Its exact interval (Clopper & Pearson); those of all groups hold at once.
    """

    group: Any
    name: str
    num_rows: int
    decided: int
    failures: int
    share: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class GroupsReached:
    """What a rule reaches in every group.

    Attributes:
        groups: One entry a group, in the order of their values.
        target: The share of failures that was promised of all rows together; None where none was.
        what: What a failure is.
        confidence_level: Of the intervals, for all groups at once (Bonferroni).
    """

    groups: tuple[GroupReach, ...]
    target: float | None
    what: str
    confidence_level: float

    def above(self) -> list[GroupReach]:
        """Groups whose whole interval lies above the target."""
        return [one for one in self.groups if self.target is not None and one.interval[0] > self.target]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return without_nan({**vars(self), "groups": [vars(one) for one in self.groups]})

    def table(self) -> Table:
        """One line a group."""
        lines = [
            (
                Name(one.name), f"{one.num_rows:,}", f"{one.decided:,}", f"{one.failures:,}",
                percent(one.share) if one.decided else "–", band_text(one.interval) if one.decided else "–",
            )
            for one in self.groups
        ]  # fmt: skip
        first = "answered" if self.what == "wrong" else "sets"
        return Table(["group", "rows", first, self.what, "share", "interval"], lines)

    def verdict(self) -> str:
        """In words: which groups lie above the target."""
        level = percent(self.confidence_level)
        if self.target is None:
            return f"Intervals hold for all groups at once ({level})."
        above = [in_text(Name(one.name)) for one in self.above()]
        told = (
            f"above {percent(self.target)}: {', '.join(above[:5])}"
            if above
            else f"none is above {percent(self.target)}"
        )
        more = f" and {len(above) - 5} more" if len(above) > 5 else ""
        return f"Of the groups, with intervals that hold for all at once ({level}), {told}{more}. {NOT_PROMISED}"

    def to_markdown(self) -> str:
        """The verdict, and a line a group."""
        return "\n".join([self.verdict(), "", *markdown_table(self.table())])

    def __str__(self) -> str:
        return self.to_markdown()


NOT_PROMISED = "The promise is one of all rows, not of each group."


def reached_by_group(
    rule: SelectiveThreshold | ConformalSets,
    probabilities: Any,
    labels: Any,
    groups: Any,
    *,
    input: str = "probabilities",
    mask: Any = None,
    ignore_index: int | None = -100,
    confidence_level: float = 0.95,
) -> GroupsReached:
    """What a fitted rule reaches in each group of rows that it was not fitted on.

    Args:
        rule: A `SelectiveThreshold`, of which wrong answers are told, or `ConformalSets`, of which sets that miss.
        probabilities: As for the rule's `evaluate`.
        labels: As for the rule's `evaluate`.
        groups: One value a row: a text, a number, a tuple of them. Sets that were fitted by names go by these.
        input: As for the rule's `evaluate`.
        mask: Boolean; False leaves the row out.
        ignore_index: Label of rows to leave out, or None.
        confidence_level: Of the intervals of all groups together.

    Returns:
        Every group's share of failures, with exact intervals that hold at once.

    Raises:
        ValueError: As of `evaluate`: for rows of the fit, and for a group without a value.

    Example:
        >>> rule = SelectiveThreshold(risk=0.2).fit([[0.9, 0.1]] * 30, [0] * 30)
        >>> found = reached_by_group(rule, [[0.8, 0.2], [0.95, 0.05]] * 10, [0, 1] * 10, ["a", "b"] * 10)
        >>> [(one.name, one.decided, one.failures) for one in found.groups]
        [('a', 10, 0), ('b', 10, 10)]
    """
    level = check_share(confidence_level, "confidence_level", 0.95)
    target: float | None
    if isinstance(rule, ConformalSets) and rule.is_weighted:
        raise ValueError(
            "These sets were fitted with weights, and their coverage is that of rows drawn as the weights say: call "
            "evaluate on the rows of each group, with `sample_weight`."
        )
    taken = rule._unseen(probabilities, labels, input, mask, ignore_index)
    rows = as_groups(groups, labels, taken.kept)
    if isinstance(rule, ConformalSets):
        place = rule._places(rows) if rule.grouping == BY_NAME else rule._places_of(taken)
        sets = rule._sets(taken.values, place)
        decided, failed = np.ones(len(sets), bool), ~sets[np.arange(len(sets)), taken.labels]
        target, what = rule.alpha, "missed"
    else:
        decided, correct = rule._decided(taken)
        failed, target, what = decided & ~correct, rule.risk, "wrong"
    each = 1.0 - (1.0 - level) / len(rows.values)
    found = []
    for k, (value, name) in enumerate(zip(rows.values, rows.names, strict=True)):
        mine = rows.member == k
        trials, failures = int((decided & mine).sum()), int((failed & mine).sum())
        share = failures / trials if trials else float("nan")
        found.append(
            GroupReach(value, name, int(mine.sum()), trials, failures, share, exact_interval(failures, trials, each))
        )
    return GroupsReached(tuple(found), target, what, level)
