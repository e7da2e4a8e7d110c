"""What reports that are a verdict and sections of tables share: plain values, Markdown and a page."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ...json_files import without_nan
from ..resampling.intervals import NoiseFloor
from ..resampling.ranked import Interval
from .measured import ScoreMapping
from .page import facts, page, picture
from .tables import Section, Table, html_section, markdown_section, number, pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SectionedReport(ScoreMapping):
    """Scores with intervals and floor; a subclass says its verdict and its sections."""

    #: The kind of answer that it measures, a key of `PANELS`.
    kind: ClassVar[str]
    #: Of its page, where none is given.
    title: ClassVar[str]

    settings: dict[str, Any]
    intervals: dict[str, Interval] | None
    floor: NoiseFloor | None

    @abstractmethod
    def verdict(self) -> str:
        """In words."""

    @abstractmethod
    def _sections(self) -> Sequence[Section]:
        """The tables under their headings."""

    @abstractmethod
    def figures(self, before: Self | None = None) -> dict[str, Figure]:
        """Pictures by their captions; of the same rows before a recalibration as well, where that is given."""

    def pictured(self, before: Self | None = None) -> str:
        """The pictures as HTML that holds them."""
        return "\n".join(picture(caption, figure) for caption, figure in self.figures(before).items()) + "\n"

    def _score_table(self, meanings: Mapping[str, str]) -> Table:
        """The scores, with intervals and what right probabilities would score where these were asked for."""
        level = self.settings["confidence_level"]
        header = ["score", "value", *([f"{level:.0%} interval", "if calibrated"] if level else []), "meaning"]
        lines = []
        for key, value in self.scores.items():
            cells = [key, number(value)]
            if self.intervals is not None:
                cells += [pair(self.intervals.get(key))]
                cells += [number(self.floor[key].mean) if self.floor and key in self.floor else "–"]
            lines.append([*cells, meanings[key]])
        return Table(header, lines)

    def to_dict(self) -> dict[str, Any]:
        """The scores under their own keys, then `settings`, `intervals`, `noise_floor` and the report's own."""
        floor = None if self.floor is None else {key: band._asdict() for key, band in self.floor.items()}
        intervals = None if self.intervals is None else {key: list(ends) for key, ends in self.intervals.items()}
        return {**self.scores, "settings": dict(self.settings), "intervals": intervals, "noise_floor": floor}

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as standard JSON; a score that is not defined (NaN) becomes null."""
        return json.dumps(without_nan(self.to_dict()), indent=indent, allow_nan=False)

    def to_markdown(self) -> str:
        """The verdict, and the tables."""
        lines = [line for section in self._sections() for line in markdown_section(section)]
        return "\n".join([self.verdict(), "", *lines])

    def to_html(
        self,
        further: str = "",
        *,
        before: Self | None = None,
        about: Mapping[str, Any] | None = None,
        title: str | None = None,
    ) -> str:
        """One self-contained page, pictures included.

        Args:
            further: HTML that comes after the tables.
            before: The report of the same rows before a recalibration, which pictures show beside this one.
            about: What is reported on, by name, at the top.
            title: Of the page; what it is a report of, if not given.
        """
        body = self.pictured(before) + "".join(map(html_section, self._sections()))
        return page(title or self.title, self.verdict(), facts(about) + body + further, self.settings)

    def __str__(self) -> str:
        return self.to_markdown()
