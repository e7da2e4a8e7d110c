"""The forest plot: how far every group lies from all rows, in intervals that hold for all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..resampling.gaps import is_worse
from ..scores.table import BY_KEY, HEADLINES, refuse_unknown
from .groups import GroupsRecord
from .plots import BLACK, BLUE, GREY, VERMILLION, as_written, new_figure
from .record import ReportRecord
from .tables import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Groups that are drawn; of more, those with the surest gaps in the first score.
MOST_DRAWN = 40
LONGEST_NAME = 28


def group_diagram(report: ReportRecord, *, scores: Sequence[str] = HEADLINES) -> Figure:
    """A forest plot of a report with groups: each group's score less that of all rows, one panel a score.

    The bars hold all groups' true gaps at once. Squares lie on the worse side with their whole bar; groups of too few
    rows are open circles without a bar.

    Args:
        report: Of `calibration_report(..., groups=...)`.
        scores: Keys of a report, one panel each.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: For a report without groups, or unknown scores.
        ImportError: If matplotlib is not installed.

    Example:
        >>> from .report import calibration_report
        >>> rows, labels = [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [0, 0, 0]
        >>> report = calibration_report(rows, labels, groups=["a", "a", "b"], confidence_level=None)
        >>> len(group_diagram(report, scores=["nll", "ece"]).axes)
        2
    """
    refuse_unknown(scores)
    groups = report.groups
    if groups is None or not scores:
        raise ValueError("Give a report made with `groups=...`, and at least one score to draw.")
    names = drawn_names(groups, scores[0])
    figure = new_figure(1.8 + 2.2 * len(scores), 1.1 + 0.3 * len(names))
    panels = np.atleast_1d(figure.subplots(1, len(scores), sharey=True)).tolist()
    for axes, key in zip(panels, scores, strict=True):
        _draw_gaps(axes, groups, names, key)
        axes.set_title(f"{key}, all rows {report[key]:.3f}", fontsize=9)
    labels = [f"{_short(name)} ({groups[name].num_rows:,})" for name in names]
    panels[0].set_yticks(range(len(names)), labels, fontsize=8)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def drawn_names(groups: GroupsRecord, key: str) -> list[str]:
    """The groups to draw, in their order: all, or those whose gap in one score lies furthest from 0."""
    names = list(groups)
    if len(names) <= MOST_DRAWN:
        return names
    size = {name: max(abs(gap.low), abs(gap.high)) for name, gap in groups.gaps[key].items()}
    sure = {name: abs(groups.gaps[key][name].gap) / size[name] if size[name] > 0 else 0.0 for name in names}
    chosen = sorted(names, key=lambda name: -np.nan_to_num(sure[name], nan=-1.0))[:MOST_DRAWN]
    return [name for name in names if name in set(chosen)]


def _draw_gaps(axes: Axes, groups: GroupsRecord, names: Sequence[str], key: str) -> None:
    axes.axvline(0.0, color=BLACK, lw=1.0, ls="--")
    for place, name in enumerate(names):
        gap = groups.gaps[key][name]
        if not np.isfinite(gap.gap):
            continue
        if not np.isfinite(gap.low):
            axes.plot(gap.gap, place, "o", color=GREY, mfc="white", ms=5)
            continue
        worse = is_worse(gap, BY_KEY[key].better)
        color = VERMILLION if worse else BLUE
        axes.plot([gap.low, gap.high], [place, place], color=color, lw=1.8)
        axes.plot(gap.gap, place, "s" if worse else "o", color=color, ms=5)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)


def _short(name: str) -> str:
    name = one_line(name)
    return as_written(name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…")
