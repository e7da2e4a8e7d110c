"""The panel of every group of rows, and how far each lies from that of all rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..grouping import Grouping
from ..inputs import Rows
from ..resampling.gaps import Draws, Gap, is_worse, part_of, simultaneous_gaps, stratified_draws, worst_of
from ..resampling.intervals import NoiseFloor
from ..resampling.ranked import Interval
from ..scores.table import BY_KEY, HEADLINES
from .measured import Measured, ReportSettings, ScoreMapping, measured

#: Rows below which a group has no interval: tried at 5 and at 10, those of the NLL held too seldom.
FEWEST_ROWS = 20


@dataclass(frozen=True, eq=False)
class GroupPanel(ScoreMapping):
    """What a report of one group's rows alone has; as a mapping the scores.

    Attributes:
        num_rows: Rows of the group.
        scores: Key to number.
        intervals: Key to `(low, high)`, each by itself; None for fewer than `FEWEST_ROWS` rows or if none are asked.
        floor: Mean and band under perfect calibration, or None likewise.
    """

    num_rows: int
    scores: dict[str, float]
    intervals: dict[str, Interval] | None
    floor: NoiseFloor | None

    def to_dict(self) -> dict[str, Any]:
        """Rows and scores, then `intervals` and `noise_floor`, as in a report."""
        floor = None if self.floor is None else {key: band._asdict() for key, band in self.floor.items()}
        intervals = None if self.intervals is None else {key: list(ends) for key, ends in self.intervals.items()}
        return {"num_rows": self.num_rows, **self.scores, "intervals": intervals, "noise_floor": floor}


@dataclass(frozen=True, eq=False)
class GroupsRecord(Mapping[str, GroupPanel]):
    """Every group of a report; as a mapping the panels by the group's name.

    Attributes:
        panels: Name to panel, in the order of the groups' values.
        gaps: Score to name to the group's score minus that of all rows. The intervals of one score hold the true gaps
            of all groups at once; groups too small, and all if no interval was asked for, have NaN ends.
        worse: Name to the scores among accuracy, NLL, Brier score and ECE in which the group is worse than all rows,
            at a level that holds over all groups and these four scores together. None if no interval was asked for.
        too_small: Names of groups with fewer than `FEWEST_ROWS` rows.
    """

    panels: dict[str, GroupPanel]
    gaps: dict[str, dict[str, Gap]]
    worse: dict[str, tuple[str, ...]] | None
    too_small: tuple[str, ...]

    def __getitem__(self, name: str) -> GroupPanel:
        return self.panels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.panels)

    def __len__(self) -> int:
        return len(self.panels)

    def worst(self, score: str) -> tuple[str, Gap] | None:
        """Name and gap of the group furthest on the worse side of all rows; None where the score is defined for none.

        Groups that are too small are passed over where others are not. For scores without a better side it is the
        furthest on either.
        """
        known = {name: gap for name, gap in self.gaps[score].items() if name not in self.too_small}
        name = worst_of(known or self.gaps[score], BY_KEY[score].better)
        return None if name is None else (name, self.gaps[score][name])

    def to_dict(self) -> dict[str, Any]:
        """Plain values: `panels`, `gaps` and `worst` by score, `worse_beyond_chance`, `too_few_rows`."""
        worst = {key: self.worst(key) for key in self.gaps}
        return {
            "panels": {name: panel.to_dict() for name, panel in self.panels.items()},
            "gaps": {key: {name: gap._asdict() for name, gap in column.items()} for key, column in self.gaps.items()},
            "worst": {
                k: None if found is None else {"group": found[0], **found[1]._asdict()} for k, found in worst.items()
            },
            "worse_beyond_chance": None if self.worse is None else {k: list(v) for k, v in self.worse.items()},
            "too_few_rows": list(self.too_small),
            "fewest_rows": FEWEST_ROWS,
        }


def measured_groups(rows: Rows, grouping: Grouping, whole: Measured, asked: ReportSettings) -> GroupsRecord:
    """Measures every group as a report of its rows alone would, and its distance from `whole`."""
    members = [grouping.rows_of(index) for index in range(len(grouping.names))]
    without = ReportSettings(**{**vars(asked), "confidence_level": None})
    panels, judged = {}, []
    for index, (name, chosen) in enumerate(zip(grouping.names, members, strict=True)):
        is_small = len(chosen) < FEWEST_ROWS
        found = measured(part_of(rows, chosen), without if is_small else asked, warn=False)
        panels[name] = GroupPanel(len(chosen), found.scores, found.intervals, found.floor)
        judged += [] if is_small else [index]
    nan = float("nan")
    gaps = {
        key: {name: Gap(panel[key] - value, nan, nan) for name, panel in panels.items()}
        for key, value in whole.scores.items()
    }
    small = tuple(name for name in panels if panels[name].num_rows < FEWEST_ROWS)
    if whole.intervals is None:
        return GroupsRecord(panels, gaps, None, small)
    names = [grouping.names[index] for index in judged]
    worse: dict[str, tuple[str, ...]] = dict.fromkeys(names, ())
    if names:
        draws = stratified_draws(
            rows, members, judged, num_bins=asked.num_bins, num_resamples=whole.settings["num_resamples"],
            seed=asked.seed, scores=list(whole.intervals),
        )  # fmt: skip
        for key, drawn in draws.items():
            gaps[key] |= _gaps_of(key, {name: panels[name] for name in names}, whole, drawn, len(rows.labels))
        worse = _worse(panels, names, whole, draws, len(rows.labels))
    return GroupsRecord(panels, gaps, worse, small)


def _gaps_of(
    key: str, panels: Mapping[str, GroupPanel], whole: Measured, drawn: Draws, num_rows: int, shared_by: int = 1
) -> dict[str, Gap]:
    """Gaps of one score with intervals for all groups at once; a family of `shared_by` scores shares the level."""
    assert whole.intervals is not None
    level = float(whole.settings["confidence_level"])
    scores = []
    for panel in panels.values():
        assert panel.intervals is not None
        scores.append((panel[key], panel.intervals[key]))
    found = simultaneous_gaps(
        scores, (whole.scores[key], whole.intervals[key]), [panel.num_rows for panel in panels.values()], drawn,
        level, 1.0 - (1.0 - level) / shared_by, num_rows,
    )  # fmt: skip
    return dict(zip(panels, found, strict=True))


def _worse(
    panels: Mapping[str, GroupPanel], names: list[str], whole: Measured, draws: Mapping[str, Draws], num_rows: int
) -> dict[str, tuple[str, ...]]:
    """For each group the headline scores in which it is worse than all rows, at a level for all of them together."""
    judged = {name: panels[name] for name in names}
    keys = [key for key in HEADLINES if key in draws]
    columns = {key: _gaps_of(key, judged, whole, draws[key], num_rows, len(keys)) for key in keys}
    return {name: tuple(key for key in keys if is_worse(columns[key][name], BY_KEY[key].better)) for name in names}
