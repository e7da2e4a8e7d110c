"""The runs of a demonstration beside each other: a table of 80 columns, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..calibration import calibration_report
from ..calibration.report.plots import draw_histogram, draw_reliability, new_figure
from ..calibration.scores.table import HEADLINES
from ..runs.baseline import CALLED
from ..runs.evaluation import AFTER, BEFORE, Evaluation


class Line(NamedTuple):
    """One way of predicting: its name in the table, the evaluation of its run, and `"mean"` or `"sample"`."""

    name: str
    evaluation: Evaluation
    variant: str

    @property
    def found(self) -> dict[str, Any]:
        return self.evaluation.content["variants"][self.variant]


def result_table(lines: Sequence[Line], title: str | None, baseline: Mapping[str, Any]) -> Table:
    """Two lines each, before and after the temperature, and the most frequent class last."""
    has_outside = any("outside" in line.found for line in lines)
    table = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.caption, table.caption_justify = _caption(lines, has_outside), "left"
    table.add_column("method")
    headings = ["T", "accuracy", "NLL", "Brier", "ECE", "95 %"] + (["OOD\nconf.", "OOD\nAUROC"] if has_outside else [])
    for heading in headings:
        table.add_column(heading, justify="right")
    for line in lines:
        number = f"{line.found['temperature']:.2f}" if line.found["temperature_fit"]["applied"] else "none"
        for name, temperature, stage in ((line.name, "", BEFORE), ("+ temperature", number, AFTER)):
            table.add_row(name, temperature, *_cells(line.found[stage], line.found.get("outside", {}).get(stage)))
        table.add_section()
    table.add_row(CALLED, "", *_cells(baseline, None))
    return table


def reliability_grid(lines: Sequence[Line]) -> Figure:
    """Reliability diagrams, one row each: before and after the temperature."""
    figure = new_figure(9.0, 5.2 * len(lines))
    axes = figure.subplots(2 * len(lines), 2, sharex=True, squeeze=False, height_ratios=(4, 1) * len(lines))
    for row, line in enumerate(lines):
        titles = {BEFORE: line.name, AFTER: f"{line.name}, temperature {line.found['temperature']:.2f}"}
        for column, (stage, title) in enumerate(titles.items()):
            probabilities = line.evaluation.probabilities(line.variant, stage)
            bins = calibration_report(probabilities, line.evaluation.items["labels"], confidence_level=None).bins
            diagram, histogram = axes[2 * row : 2 * row + 2, column]
            draw_reliability(diagram, bins, 0.95)
            draw_histogram(histogram, bins)
            diagram.set(title=title, ylabel="accuracy" if column == 0 else None)
            diagram.legend(loc="upper left", fontsize=8, frameon=False)
            histogram.set_xlabel("confidence")
    return figure


def _cells(report: Mapping[str, Any], outside: Mapping[str, float] | None) -> list[str]:
    cells = [f"{report[key]:.3f}" for key in HEADLINES]
    intervals = report.get("intervals")
    cells.append("{:.2f}-{:.2f}".format(*intervals["ece"]) if intervals else "")
    return cells if outside is None else [*cells, f"{outside['mean_confidence']:.3f}", f"{outside['auroc']:.3f}"]


def _caption(lines: Sequence[Line], has_outside: bool) -> str:
    floor = lines[0].found[AFTER]["noise_floor"]["ece"]["mean"]
    told = ["95 %: interval of the ECE. T: temperature, fitted on the calibration rows."]
    told.append(f"A perfectly calibrated model would score about {floor:.3f} on as many rows.")
    told += [f"{line.name}: {line.found['temperature_fit']['reason']}" for line in lines]
    if has_outside:
        told.append("OOD: mean confidence on texts of other origin; how well confidence tells them.")
    return "\n".join(told)
