"""A comparison as a table for a terminal: one line a run, the baseline first, and what the rows can tell apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..calibration import Comparison
from ..calibration.resampling.comparison import Difference
from ..calibration.resampling.groups import GroupComparison, GroupDifference


def comparison_table(pairs: Sequence[Comparison], others: Mapping[str, Mapping[str, float]], title: str) -> Table:
    """One line a run, below each score the difference to the run it is compared with; `others` are not compared."""
    scores = [difference.score for difference in pairs[0].differences]
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.caption_justify = "left"
    table.caption = (
        "Below each score: its difference to the run named on the left, and its p-value. * marks what the rows can "
        "tell apart (p < .05, corrected for the number of pairs)."
    )
    if isinstance(pairs[0], GroupComparison):
        table.caption += " ± is the standard deviation between the runs of a method, whose mean stands before it."
    table.add_column("run")
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
    return f" ±{getattr(found, f'run_sd_{side}'):.4f}" if isinstance(found, GroupDifference) else ""


def _signed(value: float) -> str:
    """A difference; one that rounds to nothing has no sign."""
    text = f"{value:+.4f}"
    return text[1:] if float(text) == 0 else text


def _p(value: float) -> str:
    if not math.isfinite(value):
        return "unknown"
    return "< .001" if value < 0.001 else f"{value:.3f}".replace("0.", ".", 1)
