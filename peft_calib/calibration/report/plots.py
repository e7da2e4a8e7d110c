"""Pictures of calibration: matplotlib figures that never touch pyplot, its global state or its backend.

Colours are Okabe and Ito's, told apart under every common colour vision deficiency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bins import BinStatistics, classwise_uniform_bins, group_by_value, top_outcomes, uniform_bins, uniform_edges
from ..inputs import Rows, as_rows, check_confidence_level, check_num_bins
from ..resampling.bands import consistency_band, wilson_interval
from ..scores.binned import calibration_error
from ..scores.selective import aurc, rank_by_confidence, risk_coverage_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
ORANGE, PURPLE, SKY = "#E69F00", "#CC79A7", "#56B4E9"
BLACK, GREY = "#222222", "#999999"
CYCLE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
LINE_STYLES = ("-", "--", "-.", ":")
# Inches left, below, right of and above the axes, and what a title takes.
MARGINS, TITLE = (0.65, 0.52, 0.15, 0.12), 0.3
# Bins with fewer rows are left out of curves (not of bars, whose intervals speak for themselves).
MIN_DRAWN = 5
# Reliability diagrams in one grid.
MOST_CLASSES = 16


def new_figure(width: float, height: float, title: bool | None = None) -> Figure:
    """An empty figure of so many inches with its own Agg canvas, independent of pyplot.

    Its axes are laid out around their texts; where it is said whether there is a title, they have margins that every
    text of ours fits into. Measuring all texts first takes as long as drawing them, which shows where every evaluation
    draws a picture and every report four.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: `pip install matplotlib`.") from error
    figure = Figure(figsize=(width, height), layout="constrained" if title is None else None)
    if title is not None:
        left, bottom, right, top = MARGINS
        top = 1 - (top + TITLE * title) / height
        figure.subplots_adjust(left=left / width, bottom=bottom / height, right=1 - right / width, top=top)
    FigureCanvasAgg(figure)
    return figure


def as_written(text: Any) -> str:
    """Text as it is: matplotlib reads `$...$` as mathematics, and legends leave out names that begin with `_`."""
    escaped = str(text).replace("$", r"\$")
    return " " + escaped if escaped.startswith("_") else escaped


def reliability_diagram(
    probabilities: Any,
    labels: Any,
    *,
    num_bins: int = 15,
    confidence_level: float = 0.95,
    input: str = "probabilities",
    mask: Any = None,
    ignore_index: int | None = -100,
    title: str | None = None,
) -> Figure:
    """Accuracy against confidence, with intervals, the band of a perfectly calibrated model, and the histogram.

    Args:
        probabilities: As for `calibration_report`.
        labels: As for `calibration_report`.
        num_bins: Equal-width bins.
        confidence_level: Of the intervals (Wilson) and of the band (binomial).
        input: `"probabilities"` or `"logits"`.
        mask: Rows to keep.
        ignore_index: Label of rows to drop.
        title: Heading; by default none.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: For bad input, as `calibration_report`.
        ImportError: If matplotlib is not installed.

    Example:
        >>> figure = reliability_diagram([[0.9, 0.1], [0.2, 0.8]], [0, 0], num_bins=5)
        >>> len(figure.axes)
        2
    """
    num_bins = check_num_bins(num_bins)
    rows = as_rows(probabilities, labels, input=input, mask=mask, ignore_index=ignore_index)
    return reliability_figure(top_bins(rows, num_bins), confidence_level=confidence_level, title=title)


def top_bins(rows: Rows, num_bins: int) -> BinStatistics:
    """Equal-width bins of top-label confidence against correctness."""
    return uniform_bins(*top_outcomes(rows.probabilities, rows.labels), num_bins)


def reliability_figure(bins: BinStatistics, *, confidence_level: float = 0.95, title: str | None = None) -> Figure:
    """The reliability diagram of `(B,)` statistics at hand, streamed ones included."""
    level = check_confidence_level(confidence_level)
    figure = new_figure(5.0, 5.8, title=bool(title))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    draw_reliability(upper, bins, level)
    upper.set_ylabel("accuracy")
    upper.legend(loc="upper left", fontsize=9, frameon=False)
    draw_histogram(lower, bins)
    lower.set_xlabel("confidence")
    if title:
        figure.suptitle(as_written(title), fontsize=13)
    return figure


def draw_reliability(axes: Axes, bins: BinStatistics, confidence_level: float, fontsize: float = 12) -> None:
    """Draws bars of accuracy, gaps, Wilson intervals and the consistency band into existing axes."""
    edges = uniform_edges(len(bins.counts))
    width, left = edges[1] - edges[0], edges[:-1]
    centre, filled = left + 0.5 * width, bins.counts > 0
    frequency, confidence = bins.outcome, bins.confidence
    low, high = consistency_band(confidence, bins.counts, confidence_level)

    def bars(start: np.ndarray, end: np.ndarray, **style: Any) -> None:
        axes.bar(left[filled], (end - start)[filled], width, start[filled], align="edge", **style)

    bars(np.zeros(len(left)), frequency, color=SKY, edgecolor=BLUE, lw=0.8, label="accuracy")
    bars(frequency, confidence, fill=False, hatch="////", edgecolor=VERMILLION, lw=1.0, label="gap to confidence")
    bars(low, high, color="white", alpha=0.55, lw=0)
    bars(low, high, fill=False, edgecolor=BLACK, ls=":", lw=1.1, label=f"calibrated model, {confidence_level:.0%}")
    ends = wilson_interval(bins.outcome_sums, bins.counts, confidence_level)
    error = np.abs(np.stack(ends) - frequency)[:, filled]
    axes.errorbar(centre[filled], frequency[filled], error, fmt="o", color=BLACK, ms=3.5, lw=1.4, capsize=2.5)
    axes.plot([0, 1], [0, 1], "--", color=BLACK, lw=1.2)
    text = f"ECE {calibration_error(bins):.3f}\nn = {int(bins.counts.sum()):,}"
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2}
    axes.text(0.97, 0.04, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=fontsize, bbox=box)
    axes.set(xlim=(0, 1), ylim=(0, 1))


def points_figure(
    bins: BinStatistics,
    before: BinStatistics | None = None,
    *,
    level: float = 0.95,
    axes_names: tuple[str, str] = ("confidence", "accuracy"),
) -> Figure:
    """Accuracy of each bin as a point with its Wilson interval, against the band of a perfectly calibrated model.

    Args:
        bins: What is shown.
        before: The same rows before a recalibration, as open points.
        level: Of intervals and band.
        axes_names: What is predicted, and what that is held against.
    """
    figure = new_figure(5.0, 4.0, title=False)
    axes = figure.subplots()
    edges = uniform_edges(len(bins.counts))
    low, high = consistency_band(bins.confidence, bins.counts, level)
    filled = bins.counts > 0
    band = f"calibrated model, {level:.0%}"
    axes.bar(
        edges[:-1][filled],
        (high - low)[filled],
        edges[1] - edges[0],
        low[filled],
        align="edge",
        color=GREY,
        alpha=0.3,
        label=band,
    )
    axes.plot([0, 1], [0, 1], "--", color=BLACK, lw=1.2)
    after = "model" if before is None else "after"
    shown = [] if before is None else [("before", before, VERMILLION, "none")]
    for name, some, color, face in (*shown, (after, bins, BLUE, BLUE)):
        there = some.counts >= min(MIN_DRAWN, some.counts.max())
        ends = wilson_interval(some.outcome_sums, some.counts, level)
        error = np.abs(np.stack(ends) - some.outcome)[:, there]
        label = f"{name}: ECE {calibration_error(some):.3f}"
        style: dict[str, Any] = {"fmt": "s" if face == "none" else "o", "color": color, "mfc": face}
        style |= {"ms": 5, "lw": 1.4, "capsize": 2.5}
        axes.errorbar(some.confidence[there], some.outcome[there], error, label=label, **style)
    axes.set(xlabel=axes_names[0], ylabel=axes_names[1], xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="upper left", frameon=False)
    return figure


def draw_histogram(axes: Axes, bins: BinStatistics) -> None:
    """Draws the share of rows in each bin, with mean confidence and accuracy marked."""
    edges = uniform_edges(len(bins.counts))
    axes.bar(edges[:-1], bins.weights, edges[1] - edges[0], align="edge", color=GREY, edgecolor="white", lw=0.5)
    accuracy = bins.outcome_sums.sum() / bins.counts.sum()
    axes.axvline(accuracy, color=BLUE, lw=2.0, label=f"accuracy {accuracy:.3f}")
    confidence = bins.confidence_sums.sum() / bins.counts.sum()
    axes.axvline(confidence, color=VERMILLION, lw=2.0, ls="--", label=f"mean confidence {confidence:.3f}")
    axes.set(ylabel="share", xlim=(0, 1))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=2, fontsize=8, frameon=False)


def classwise_diagram(
    probabilities: Any,
    labels: Any,
    *,
    num_bins: int = 10,
    confidence_level: float = 0.95,
    input: str = "probabilities",
    class_names: Sequence[str] | None = None,
    max_classes: int = MOST_CLASSES,
) -> Figure:
    """A grid of reliability diagrams, one a class: its probability against how often it is the label.

    With more than `max_classes` classes, those with the largest class-wise errors are shown.
    """
    rows = as_rows(probabilities, labels, input=input)
    bins = classwise_uniform_bins(rows.probabilities, rows.labels, check_num_bins(num_bins))
    return classwise_figure(bins, check_confidence_level(confidence_level), class_names, max_classes)


def classwise_figure(
    bins: BinStatistics,
    confidence_level: float = 0.95,
    class_names: Sequence[str] | None = None,
    max_classes: int = MOST_CLASSES,
    what: str = "class",
) -> Figure:
    """The per-class grid of `(C, B)` statistics at hand; `what` one of them is called."""
    names = None if class_names is None else list(class_names)
    if names and len(names) != len(bins.counts):
        raise ValueError(f"There are {len(bins.counts)} classes, but {len(names)} `class_names`.")
    errors = np.array([calibration_error(bins[k]) for k in range(len(bins.counts))])
    shown = np.sort(np.argsort(-errors, kind="stable")[:max_classes])
    columns = int(np.ceil(np.sqrt(len(shown))))
    lines = int(np.ceil(len(shown) / columns))
    figure = new_figure(2.6 * columns, 2.6 * lines, title=True)
    figure.subplots_adjust(hspace=0.3, wspace=0.18)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, k in zip(grid.flat, shown, strict=False):
        draw_reliability(axes, bins[k], confidence_level, fontsize=8)
        axes.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.set_title(as_written(names[k]) if names else f"{what} {k}", fontsize=10)
    figure.supxlabel(f"probability of the {what}")
    figure.supylabel(f"frequency of the {what}")
    return figure


def risk_coverage_diagram(
    models: Mapping[str, tuple[Any, Any]] | tuple[Any, Any], *, input: str = "probabilities"
) -> Figure:
    """Error rate of the rows a model is surest of, against the share of rows answered.

    Args:
        models: One `(probabilities, labels)`, which is drawn with the best order that its errors allow and the order
            of chance, or a mapping from a name to such a pair.
        input: `"probabilities"` or `"logits"`.

    Returns:
        The figure, with AURC in the legend.
    """
    pairs = models if isinstance(models, Mapping) else {"model": models}
    figure = new_figure(5.0, 4.0, title=False)
    axes = figure.subplots()
    highest = 0.0
    for i, (name, (probabilities, labels)) in enumerate(pairs.items()):
        rows = as_rows(probabilities, labels, input=input)
        ranking = rank_by_confidence(group_by_value(*top_outcomes(rows.probabilities, rows.labels)))
        coverage, risk = risk_coverage_curve(ranking)
        style = LINE_STYLES[i % len(LINE_STYLES)]
        label = f"{as_written(name)}: AURC {aurc(ranking):.3f}"
        axes.plot(coverage, risk, style, color=CYCLE[i % len(CYCLE)], lw=2.2, label=label)
        # The first few rows are all noise; they must not set the scale.
        highest = max(highest, float(risk[coverage >= min(0.05, coverage[-1])].max()), ranking.error_rate)
    if not isinstance(models, Mapping):
        wrong = ranking.error_rate
        axes.plot(
            coverage,
            np.maximum(0, 1 - (1 - wrong) / np.maximum(coverage, 1e-12)),
            ":",
            color=BLACK,
            label="best order",
        )
        axes.axhline(wrong, color=GREY, ls="--", lw=1.2, label="order of chance")
    axes.set(xlabel="coverage (share of rows answered)", ylabel="risk (error rate)", xlim=(0, 1))
    axes.set_ylim(0, 1.1 * highest if highest > 0 else 1.0)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


def confidence_histogram(
    probabilities: Any, labels: Any, *, num_bins: int = 20, input: str = "probabilities"
) -> Figure:
    """Confidence of correct and of wrong rows, side by side: how well they are told apart."""
    rows = as_rows(probabilities, labels, input=input)
    confidence, correct = top_outcomes(rows.probabilities, rows.labels)
    figure = new_figure(5.0, 3.6, title=False)
    axes = figure.subplots()
    edges = uniform_edges(check_num_bins(num_bins))
    parts = (("correct", correct, BLUE, None), ("wrong", ~correct, VERMILLION, "///"))
    bottom = np.zeros(num_bins)
    for name, chosen, color, hatch in parts:
        share = np.histogram(confidence[chosen], edges)[0] / len(correct)
        style: dict[str, Any] = {"color": color, "hatch": hatch, "edgecolor": "white", "label": name}
        axes.bar(edges[:-1], share, edges[1] - edges[0], bottom=bottom, align="edge", **style)
        bottom += share
    axes.set(xlabel="confidence", ylabel="share of rows", xlim=(0, 1))
    axes.legend(frameon=False)
    return figure


def before_after_diagram(
    before: Any, after: Any, labels: Any, *, num_bins: int = 15, input: str = "probabilities"
) -> Figure:
    """Reliability curves before and after recalibration, for the same labels, in one picture."""
    figure = new_figure(5.0, 4.8)
    axes = figure.subplots()
    first, second = (top_bins(as_rows(p, labels, input=input), check_num_bins(num_bins)) for p in (before, after))
    draw_before_after(axes, first, second)
    axes.set(xlabel="confidence", ylabel="accuracy")
    axes.legend(loc="upper left", frameon=False)
    return figure


def draw_before_after(axes: Axes, before: BinStatistics, after: BinStatistics, with_errors: bool = True) -> None:
    """Draws both curves with their Wilson bands into existing axes; the ECE is in their labels `with_errors`."""
    axes.plot([0, 1], [0, 1], "--", color=BLACK, lw=1.2)
    for name, bins, color, style in (("before", before, VERMILLION, "s--"), ("after", after, BLUE, "o-")):
        # A bin of one or two rows says nothing and would pull the eye to 0 or 1.
        filled = bins.counts >= min(MIN_DRAWN, bins.counts.max())
        low, high = wilson_interval(bins.outcome_sums, bins.counts, 0.95)
        axes.fill_between(bins.confidence[filled], low[filled], high[filled], color=color, alpha=0.15, lw=0)
        label = f"{name}: ECE {calibration_error(bins):.3f}" if with_errors else f"{name} its temperature"
        axes.plot(bins.confidence[filled], bins.outcome[filled], style, color=color, lw=2.2, ms=5, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
