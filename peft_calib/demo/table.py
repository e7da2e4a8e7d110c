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
from ..runs.tables import verdict_of_head


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
        if "head" in line.found:
            table.add_row("its head", "", *_head_cells(line.found))
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
    return [*(f"{report[key]:.3f}" for key in HEADLINES), *_beside(report, outside)]


def _beside(report: Mapping[str, Any], outside: Mapping[str, float] | None) -> list[str]:
    """The interval of the ECE, and what is said of texts of other origin."""
    intervals = report.get("intervals")
    cells = ["{:.2f}-{:.2f}".format(*intervals["ece"]) if intervals else ""]
    return cells if outside is None else [*cells, f"{outside['mean_confidence']:.3f}", f"{outside['auroc']:.3f}"]


def _head_cells(found: Mapping[str, Any]) -> list[str]:
    """Of an uncertainty head: the class stays, `1 - P(error)` is its confidence; scores of all classes it has not."""
    of_errors = found["head"]["error_probability"]
    scores = {"accuracy": found[BEFORE]["accuracy"], "ece": of_errors["ece"]}
    cells = [f"{scores[key]:.3f}" if key in scores else "" for key in HEADLINES]
    return [*cells, *_beside(of_errors, found["head"].get("outside"))]


def _caption(lines: Sequence[Line], has_outside: bool) -> str:
    floor = lines[0].found[AFTER]["noise_floor"]["ece"]["mean"]
    told = ["95 %: interval of the ECE. T: temperature, fitted on the calibration rows."]
    told.append(f"A perfectly calibrated model would score about {floor:.3f} on as many rows.")
    told += [f"{line.name}: {line.found['temperature_fit']['reason']}" for line in lines]
    if has_outside:
        told.append("OOD: mean confidence on texts of other origin; how well confidence tells them.")
    for line in lines:
        verdict = verdict_of_head(line.evaluation.content)
        if "head" in line.found and verdict is not None:
            told.append(f"Its head: the same answers with 1 - P(error) for their confidence. {verdict.rstrip('.')}.")
    return "\n".join(told)
