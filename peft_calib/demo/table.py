"""The runs of a demonstration beside each other: a table of 80 columns, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..calibration.inputs import as_rows
from ..calibration.report.plots import draw_before_after, new_figure, top_bins
from ..calibration.scores.table import HEADLINES
from ..runs.baseline import CALLED
from ..runs.evaluation import AFTER, BEFORE, Evaluation
from ..runs.tables import verdict_of_head

#: Panels of the picture beside each other.
_COLUMNS = 3


class Line(NamedTuple):
    """One way of predicting: its name in the table, the evaluation of its run, and `"mean"` or `"sample"`."""

    name: str
    evaluation: Evaluation
    variant: str

    @property
    def found(self) -> dict[str, Any]:
        return self.evaluation.content["variants"][self.variant]

    @property
    def title(self) -> str:
        """The name where no line above says what "it" is."""
        if self.variant == "mean":
            return self.name
        return f"{self.evaluation.content['method']}, {self.found['num_samples']} draws"


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
    """Reliability curves of every line before and after its temperature, three panels a row, and one legend."""
    rows, columns = -(-len(lines) // _COLUMNS), min(_COLUMNS, len(lines))
    figure = new_figure(4.0 * columns, 3.6 * rows + 0.4)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, line in zip(panels.flat, lines, strict=False):
        labels = line.evaluation.items["labels"]
        stages = [line.evaluation.probabilities(line.variant, stage) for stage in (BEFORE, AFTER)]
        before, after = (top_bins(as_rows(p, labels), 15) for p in stages)
        draw_before_after(axes, before, after, with_errors=False)
        errors = [f"ECE {line.found[stage]['ece']:.3f}" for stage in (BEFORE, AFTER)]
        axes.text(0.04, 0.95, f"{errors[0]}, then {errors[1]}", va="top", transform=axes.transAxes)
        axes.set(title=f"{line.title}, T = {line.found['temperature']:.2f}")
    for axes in panels[:, 0]:
        axes.set(ylabel="accuracy")
    for axes in panels.flat[len(lines) - columns : len(lines)]:  # nothing stands below these
        axes.set(xlabel="confidence")
        axes.tick_params(labelbottom=True)
    for axes in panels.flat[len(lines) :]:
        axes.set_axis_off()
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
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
