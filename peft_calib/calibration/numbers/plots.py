"""Pictures of predicted Gaussians: where observed values fall in them, and how many their intervals hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..report.plots import BLACK, BLUE, GREY, SKY, VERMILLION, new_figure
from ..resampling.bands import consistency_band, wilson_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pit_figure(counts: Sequence[int], *, level: float = 0.95) -> Figure:
    """How many values fall in each equal part of the PIT, and where that lies if the Gaussians are right.

    Args:
        counts: Rows in each part.
        level: Of the band.
    """
    found = np.asarray(counts, np.float64)
    size, parts = found.sum(), len(found)
    density = found / size * parts
    edges = np.linspace(0.0, 1.0, parts + 1)
    low, high = (parts * float(end[0]) for end in consistency_band(np.full(1, 1 / parts), np.full(1, size), level))
    figure = new_figure(5.0, 3.6, title=False)
    axes = figure.subplots()
    axes.bar(edges[:-1], density, 1.0 / parts, align="edge", color=SKY, edgecolor=BLUE, lw=0.8, label="values")
    axes.axhspan(low, high, color=GREY, alpha=0.3, lw=0, label=f"right Gaussians, {level:.0%}")
    axes.axhline(1.0, color=BLACK, ls="--", lw=1.2)
    axes.set(xlabel="PIT: share of the Gaussian below the value", ylabel="rows (1: as many as expected)")
    axes.set(xlim=(0, 1), ylim=(0, 1.3 * max(float(density.max()), high)))  # room for the legend
    axes.legend(loc="upper center", ncols=2, frameon=False)
    return figure


def coverage_figure(
    shares: Sequence[float],
    coverages: Sequence[float],
    size: int,
    before: Sequence[float] | None = None,
    *,
    level: float = 0.95,
) -> Figure:
    """How many values central intervals of the Gaussians hold, with Wilson intervals, and how many they should.

    Args:
        shares: Central shares of the Gaussian.
        coverages: Share of the values inside each.
        size: Rows.
        before: The same before a recalibration.
        level: Of the intervals, and of the band where coverages fall if the Gaussians are right.
    """
    nominal, counts = np.asarray(shares, np.float64), np.full(len(shares), float(size))
    figure = new_figure(5.0, 4.0, title=False)
    axes = figure.subplots()
    low, high = consistency_band(nominal, counts, level)
    axes.fill_between(nominal, low, high, color=GREY, alpha=0.3, lw=0, label=f"right Gaussians, {level:.0%}")
    axes.plot([0, 1], [0, 1], "--", color=BLACK, lw=1.2)
    now = "values inside" if before is None else "after"
    shown = [] if before is None else [("before", before, VERMILLION, "s", "none")]
    for name, some, color, mark, face in (*shown, (now, coverages, BLUE, "o", BLUE)):
        inside = np.asarray(some, np.float64)
        error = np.abs(np.stack(wilson_interval(inside * size, counts, level)) - inside)
        style: dict[str, Any] = {"fmt": mark, "color": color, "mfc": face, "ms": 4, "lw": 1.2, "capsize": 2}
        axes.errorbar(nominal, inside, error, label=name, **style)
    names = {"xlabel": "central share of the Gaussian", "ylabel": "share of values inside"}
    axes.set(**names, xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="upper left", frameon=False)
    return figure
