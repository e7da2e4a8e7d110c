"""What a report holds: the record that pictures and texts are made of."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...json_files import without_nan
from ..bins import BinStatistics
from ..inputs import Rows
from ..resampling.intervals import NoiseFloor
from .classes import ClassRow
from .groups import GroupsRecord
from .measured import ScoreMapping


@dataclass(frozen=True, eq=False)
class ReportRecord(ScoreMapping):
    """Scores and what they depend on; `CalibrationReport` says what each field is, and adds the texts."""

    kind: ClassVar[str] = "classes"  # of answer, a key of `PANELS`

    scores: dict[str, float]
    settings: dict[str, Any]
    bins: BinStatistics
    class_bins: BinStatistics | None = None
    intervals: dict[str, tuple[float, float]] | None = None
    floor: NoiseFloor | None = None
    rows: Rows | None = field(default=None, repr=False)
    groups: GroupsRecord | None = None
    classes: tuple[ClassRow, ...] | None = None
    class_names: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The scores as plain floats under their own keys, then `settings`, `intervals` and `noise_floor`.

        `intervals[key]` is `[low, high]`; `noise_floor[key]` has `mean`, `low` and `high`. Both are None if the report
        was made with `confidence_level=None`. `groups` and `classes` are there if they were asked for, see
        `GroupsRecord.to_dict` and `ClassRow.to_dict`.
        """
        floor = None if self.floor is None else {key: band._asdict() for key, band in self.floor.items()}
        return {
            **self.scores,
            "settings": dict(self.settings),
            "intervals": None if self.intervals is None else {k: list(v) for k, v in self.intervals.items()},
            "noise_floor": floor,
            **({} if self.groups is None else {"groups": self.groups.to_dict()}),
            **({} if self.classes is None else {"classes": [row.to_dict() for row in self.classes]}),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as standard JSON; a score that is not defined (NaN) becomes null."""
        return json.dumps(without_nan(self.to_dict()), indent=indent, allow_nan=False)
