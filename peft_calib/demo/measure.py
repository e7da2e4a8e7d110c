"""One method's numbers: on the test rows and outside their distribution, before and after temperature scaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from peft_calib.calibration import CalibrationReport, calibration_report
from peft_calib.calibration.inputs import softmax
from peft_calib.calibration.report.plots import draw_histogram, draw_reliability, new_figure
from peft_calib.calibration.scores.selective import error_auroc, rank
from peft_calib.prediction import Prediction
from peft_calib.runs.baseline import CALLED
from peft_calib.runs.temperatures import class_temperature

__all__ = ["Logits", "MethodResult", "Outside", "draws_report", "measure", "reliability_grid", "result_table"]


@dataclass(frozen=True)
class Logits:
    """What a trained model says: ``(N, C)`` logits of each split; ``outside`` may be missing."""

    calibration: np.ndarray
    test: np.ndarray
    outside: np.ndarray | None = None


@dataclass(frozen=True)
class Outside:
    """How a model takes texts from another distribution.

    Attributes:
        mean_confidence: mean top-label probability there; there is no right answer, so lower is better.
        mean_entropy: mean entropy of the predicted distribution there, nats.
        auroc: probability that such a text is less confident than a test row, ties half; 0.5 is chance.
    """

    mean_confidence: float
    mean_entropy: float
    auroc: float


@dataclass(frozen=True)
class MethodResult:
    """One method: reports on the same test rows before and after a temperature fitted on the calibration rows."""

    name: str
    temperature: float
    before: CalibrationReport
    after: CalibrationReport
    outside_before: Outside | None
    outside_after: Outside | None
    fit: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        stages = {"before": (self.before, self.outside_before), "after": (self.after, self.outside_after)}
        return {
            "temperature": self.temperature,
            "temperature_fit": self.fit,
            **{
                stage: {"test": report.to_dict(), "outside": None if outside is None else vars(outside)}
                for stage, (report, outside) in stages.items()
            },
        }


def measure(
    name: str, logits: Logits, calibration_labels: np.ndarray, test_labels: np.ndarray, seed: int = 0
) -> MethodResult:
    """Fit a temperature on the calibration rows and report on the test rows.

    Args:
        name: of the method.
        logits: of the calibration, test and (if there are any) outside rows.
        calibration_labels: class index of each calibration row.
        test_labels: class index of each test row.
        seed: of the bootstrap intervals; equal seeds resample the same rows for every method.

    Returns:
        The reports, with 95 % intervals and the noise floor of these rows.
    """
    scaling = class_temperature(logits.calibration, calibration_labels)
    outside: list[Outside | None] = [None, None]
    if logits.outside is not None:
        plain = [softmax(rows.astype(np.float64)) for rows in (logits.test, logits.outside)]
        scaled = [np.asarray(scaling.transform(rows)) for rows in (logits.test, logits.outside)]
        outside = [_outside(*plain), _outside(*scaled)]
    return MethodResult(
        name=name,
        temperature=float(scaling.temperature),
        fit=None if scaling.fit_result is None else scaling.fit_result.to_dict(),
        before=calibration_report(logits.test, test_labels, input="logits", seed=seed),
        after=scaling.evaluate(logits.test, test_labels, seed=seed),
        outside_before=outside[0],
        outside_after=outside[1],
    )


def draws_report(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """What draws cost, and what they disagree on.

    Args:
        predictions: of the calibration, test and (if there are any) outside rows.

    Returns:
        The number of draws, their cost in forwards, the mean mutual information on the test rows and outside, and how
        well it tells outside rows from test rows.
    """
    test, outside = predictions[1], (predictions[2] if len(predictions) > 2 else None)
    information = {"test": float(test.mutual_information.mean())}
    report: dict[str, Any] = {"num_samples": test.num_samples, "num_forwards": test.num_forwards}
    if outside is not None:
        information["outside"] = float(outside.mutual_information.mean())
        both = torch.cat([test.mutual_information, outside.mutual_information]).numpy()
        is_outside = np.repeat([0, 1], [len(test), len(outside)])
        report["outside_auroc_of_mutual_information"] = error_auroc(rank(both, is_outside))
    return report | {"mutual_information": information}


def result_table(
    results: Sequence[MethodResult], title: str | None = None, baseline: CalibrationReport | None = None
) -> Table:
    """All methods in one table of 80 columns: two lines each, before and after temperature scaling."""
    has_outside = any(result.outside_before is not None for result in results)
    table = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.caption, table.caption_justify = _caption(results, has_outside), "left"
    table.add_column("method")
    headings = ["T", "accuracy", "NLL", "Brier", "ECE", "95 %"] + (["OOD\nconf.", "OOD\nAUROC"] if has_outside else [])
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in results:
        _add_line(table, result.name, "", result.before, result.outside_before)
        applied = result.fit is None or result.fit["applied"]
        number = f"{result.temperature:.2f}" if applied else "none"
        _add_line(table, "+ temperature", number, result.after, result.outside_after)
        table.add_section()
    if baseline is not None:
        _add_line(table, CALLED, "", baseline, None)
    return table


def _add_line(table: Table, name: str, temperature: str, report: CalibrationReport, outside: Outside | None) -> None:
    cells = [temperature, *(f"{report[key]:.3f}" for key in ("accuracy", "nll", "brier", "ece"))]
    cells.append("" if report.intervals is None else "{:.2f}-{:.2f}".format(*report.intervals["ece"]))
    if outside is not None:
        cells += [f"{outside.mean_confidence:.3f}", f"{outside.auroc:.3f}"]
    table.add_row(name, *cells)


def _caption(results: Sequence[MethodResult], has_outside: bool) -> str:
    floor = results[0].after.floor
    lines = ["95 %: interval of the ECE. T: temperature, fitted on the calibration rows."]
    if floor is not None:
        lines.append(f"A perfectly calibrated model would score about {floor['ece'][0]:.3f} on as many rows.")
    for result in results:
        if result.fit is not None:
            lines.append(f"{result.name}: {result.fit['reason']}")
    if has_outside:
        lines.append("OOD: mean confidence on texts of other origin; how well confidence tells them.")
    return "\n".join(lines)


def reliability_grid(results: Sequence[MethodResult]) -> Figure:
    """Reliability diagrams of all methods, one row each: before and after temperature scaling."""
    figure = new_figure(9.0, 5.2 * len(results))
    axes = figure.subplots(2 * len(results), 2, sharex=True, squeeze=False, height_ratios=(4, 1) * len(results))
    for line, result in enumerate(results):
        stages = {result.name: result.before, f"{result.name}, temperature {result.temperature:.2f}": result.after}
        for column, (title, report) in enumerate(stages.items()):
            diagram, histogram = axes[2 * line : 2 * line + 2, column]
            draw_reliability(diagram, report.bins, 0.95)
            draw_histogram(histogram, report.bins)
            diagram.set(title=title, ylabel="accuracy" if column == 0 else None)
            diagram.legend(loc="upper left", fontsize=8, frameon=False)
            histogram.set_xlabel("confidence")
    return figure


def _outside(test: np.ndarray, outside: np.ndarray) -> Outside:
    confidence = outside.max(axis=1)
    entropy = -np.sum(np.where(outside > 0, outside * np.log(np.maximum(outside, 1e-300)), 0.0), axis=1)
    uncertainty = 1 - np.concatenate([test.max(axis=1), confidence])
    is_outside = np.repeat([0, 1], [len(test), len(outside)])
    return Outside(float(confidence.mean()), float(entropy.mean()), error_auroc(rank(uncertainty, is_outside)))
