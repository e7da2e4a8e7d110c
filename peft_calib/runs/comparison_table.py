"""A comparison as a table for a terminal: one line a run, the baseline first, and what the rows can tell apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..calibration import Comparison
from ..calibration.resampling.comparison import Difference
from ..calibration.resampling.groups import GroupComparison, GroupDifference

#: Scores that stand beside the names of the runs on a terminal of 80 columns.
ABREAST = 5


def comparison_table(
    pairs: Sequence[Comparison], others: Mapping[str, Mapping[str, float]], title: str
) -> RenderableType:
    """One line a run, below each score the difference to the run it is compared with; `others` are not compared.

    More scores than fit side by side stand in tables below each other.
    """
    scores = [difference.score for difference in pairs[0].differences]
    parts = [scores[start : start + ABREAST] for start in range(0, len(scores), ABREAST)]
    tables = [_table(pairs, others, part) for part in parts]
    tables[0].title = title
    caption = (
        "Below each score: its difference to the run named on the left, and its p-value. * marks what the rows can "
        "tell apart (p < .05, corrected for the number of pairs)."
    )
    if isinstance(pairs[0], GroupComparison):
        caption += " ± is the standard deviation between the runs of a method, whose mean stands above it."
    return Group(*tables, Text(caption, style="table.caption"))


def _table(pairs: Sequence[Comparison], others: Mapping[str, Mapping[str, float]], scores: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    for score in scores:
        table.add_column(score, justify="right", no_wrap=True)
    known: set[str] = set()
    for pair in pairs:
        name, against = pair.names
        if against not in known:
            table.add_row(against, *(f"{pair[score].b:.4f}{_over_runs(pair[score], 'b')}" for score in scores))
        known |= {name, against}
        cells = []
        for score in scores:
            found = pair[score]
            mark = "*" if found.better is not None else ""
            difference = f"{_signed(found.difference)}{mark}"
            cells.append(f"{found.a:.4f}{_over_runs(found, 'a')}\n{difference}\np {_p(found.adjusted_p_value)}")
        table.add_row(f"{name}\n- {against}", *cells)
    for name, values in others.items():
        table.add_row(name, *(f"{values[score]:.4f}" if score in values else "" for score in scores))
    return table


def _over_runs(found: Difference, side: str) -> str:
    """How far the runs of a method lie apart, where there are several."""
    return f"\n±{getattr(found, f'run_sd_{side}'):.4f}" if isinstance(found, GroupDifference) else ""


def _signed(value: float) -> str:
    """A difference; one that rounds to nothing has no sign."""
    text = f"{value:+.4f}"
    return text[1:] if float(text) == 0 else text


def _p(value: float) -> str:
    if not math.isfinite(value):
        return "unknown"
    return "< .001" if value < 0.001 else f"{value:.3f}".replace("0.", ".", 1)
