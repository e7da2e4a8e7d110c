"""Pictures of decisions: risk and coverage with the bound that a threshold rests on, and sizes of sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..report.forest import LONGEST_NAME, MOST_DRAWN
from ..report.plots import BLACK, BLUE, GREEN, GREY, VERMILLION, as_written, new_figure
from ..report.tables import one_line
from .bounds import percent
from .by_group import GroupReach, GroupsReached
from .set_report import SetReport
from .threshold import SelectiveThreshold

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .selective_report import SelectiveReport


def threshold_diagram(rule: SelectiveThreshold, reached: SelectiveReport | None = None) -> Figure:
    """Risk against coverage on the rows of the fit, with the exact bound of each threshold, and what was chosen.

    Args:
        rule: A fitted rule; one out of a file will do, the curve is kept in it.
        reached: What it reaches on other rows, drawn with its intervals.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> p = np.linspace(0.5, 1.0, 200)
        >>> rule = SelectiveThreshold(risk=0.1).fit(np.stack([p, 1 - p], axis=1), [0] * 200)
        >>> threshold_diagram(rule).axes[0].get_xlabel()
        'coverage (share of rows answered)'
    """
    rule.state()  # says so if it is not fitted
    assert rule.curve is not None
    curve, figure = rule.curve, new_figure(5.4, 4.2)
    axes = figure.subplots()
    coverage, risk, upper = curve.coverage, curve.risk, curve.upper
    axes.fill_between(coverage, risk, upper, step="post", color=BLUE, alpha=0.15, lw=0)
    axes.step(coverage, risk, where="post", color=BLUE, lw=2.2, label="share of errors")
    sure = f"upper bound, each {percent(1.0 - curve.tail)}"
    axes.step(coverage, upper, "--", where="post", color=BLUE, lw=1.4, label=sure)
    highest = float(risk[-1])
    if rule.risk is not None:
        axes.axhline(rule.risk, color=BLACK, ls=":", lw=1.4, label=f"target {percent(rule.risk)}")
        highest = max(highest, rule.risk)
    if rule.coverage > 0.0:
        axes.axvline(rule.coverage, color=GREEN, ls="-.", lw=1.6, label=f"answered {percent(rule.coverage)}")
    if reached is not None and reached.accepted:
        ends = np.array([reached.coverage_interval, reached.risk_interval])
        at = np.array([reached.coverage, reached.risk])
        error = np.abs(ends - at[:, None])
        style: dict[str, Any] = {"fmt": "o", "color": VERMILLION, "ms": 6, "lw": 1.6, "capsize": 3}
        axes.errorbar(at[:1], at[1:], error[1][:, None], error[0][:, None], label="reached on other rows", **style)
        highest = max(highest, reached.risk_interval[1])
    axes.set(xlabel="coverage (share of rows answered)", ylabel="risk (error rate)", xlim=(0, 1))
    # The first few rows' bound is near 1; it must not set the scale.
    axes.set_ylim(0, min(1.0, 1.6 * highest + 0.02))
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.3)
    return figure


def set_size_diagram(report: SetReport) -> Figure:
    """How many sets have no class, one, two ..., from the report of `ConformalSets.evaluate`.

    Args:
        report: Sizes and coverage on rows the sets were not fitted on.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = new_figure(5.0, 3.6)
    axes = figure.subplots()
    sizes = np.array(report.sizes)
    largest = int(np.flatnonzero(sizes)[-1])
    shown = np.arange(largest + 1)
    share = sizes[: largest + 1] / report.num_rows
    axes.bar(shown, share, 0.8, color=BLUE, edgecolor="white")
    axes.axvline(report.mean_size, color=VERMILLION, ls="--", lw=2.0, label=f"mean {report.mean_size:.2f}")
    axes.set(xlabel="classes in the set", ylabel="share of rows", xlim=(-0.6, largest + 0.6), ylim=(0, None))
    if largest <= 20:
        axes.set_xticks(shown)
    told = f"{percent(report.coverage)} hold the label"
    if report.band is not None:
        told += f" (expected {100 * report.band[0]:.1f} to {100 * report.band[1]:.1f})"
    axes.set_title(told, fontsize=11)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3, axis="y")
    return figure


def reach_diagram(found: GroupsReached) -> Figure:
    """A forest plot of what a rule reaches in each group: the share of failures with its interval, and the target.

    Squares lie above the target with their whole bar; groups of which nothing is decided are left empty.

    Args:
        found: Of `reached_by_group`. Of more than 40 groups those with the largest shares are drawn.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    drawn = list(found.groups)
    if len(drawn) > MOST_DRAWN:
        largest = sorted(drawn, key=lambda one: -np.nan_to_num(one.share, nan=-1.0))[:MOST_DRAWN]
        drawn = [one for one in drawn if one in largest]
    figure = new_figure(5.4, 1.2 + 0.3 * len(drawn))
    axes = figure.subplots()
    if found.target is not None:
        axes.axvline(found.target, color=BLACK, ls=":", lw=1.4, label=f"target {percent(found.target)}")
        axes.legend(frameon=False, fontsize=8)
    for place, one in enumerate(drawn):
        if one.decided:
            above = found.target is not None and one.interval[0] > found.target
            color = VERMILLION if above else BLUE
            axes.plot(one.interval, [place, place], color=color, lw=1.8)
            axes.plot(one.share, place, "s" if above else "o", color=color, ms=5)
        else:
            axes.plot(0.0, place, "o", color=GREY, mfc="white", ms=5)
    axes.set_yticks(range(len(drawn)), [_called(one) for one in drawn], fontsize=8)
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel=f"share {found.what}", xlim=(0, None))
    axes.grid(axis="x", alpha=0.3)
    return figure


def _called(one: GroupReach) -> str:
    name = one_line(one.name)
    short = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    return as_written(f"{short} ({one.decided:,} of {one.num_rows:,})")
