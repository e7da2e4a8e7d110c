"""Evaluations and comparisons as tables: for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

__all__ = ["evaluation_markdown", "evaluation_table"]

#: How a way of predicting is called in a table.
NAMES = {"mean": "mean adapter", "sample": "draws"}


def evaluation_table(content: Mapping[str, Any], metrics: Sequence[str]) -> Table:
    """One column a prediction, one line a score, each with its interval."""
    table = Table(title=_title(content), caption=_caption(content), caption_justify="left", box=SIMPLE_HEAD)
    header, lines = _cells(content, metrics, "\n")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def evaluation_markdown(content: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """The same as Markdown, with the verdicts in words."""
    header, lines = _cells(content, metrics, " ")
    table = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    table += [f"| {' | '.join(line)} |" for line in lines]
    verdicts = [
        f"- {NAMES[variant]}, {stage} temperature: {found[stage]['verdict']}"
        for variant, found in content["variants"].items()
        for stage in ("before", "after")
        if "verdict" in found.get(stage, {})
    ]
    return "\n".join([f"# {_title(content)}", "", *table, "", _caption(content), "", *verdicts]).rstrip() + "\n"


def _title(content: Mapping[str, Any]) -> str:
    items = f", {content['items']} items" if content["items"] != content["rows"] else ""
    return f"{content['run']} ({content['method']}) on {content['data']}: {content['rows']} rows{items}"


def _caption(content: Mapping[str, Any]) -> str:
    lines = ["Brackets: 95 % intervals (bootstrap over the rows)."]
    if any("after" in found for found in content["variants"].values()):
        lines.append("T: temperature, fitted on the calibration rows of the run.")
    if content["rows_left_out"]:
        lines.append(f"{content['rows_left_out']} row(s) that the run was trained or calibrated on were left out.")
    if content.get("rows_without_value"):
        lines.append(f"{content['rows_without_value']} row(s) without a text or a label were left out.")
    return " ".join(lines)


def _cells(content: Mapping[str, Any], metrics: Sequence[str], gap: str) -> tuple[list[str], list[list[str]]]:
    columns: list[tuple[str, Mapping[str, Any]]] = []
    for variant, found in content["variants"].items():
        name = NAMES[variant] if found["num_samples"] == 1 else f"{found['num_samples']} {NAMES[variant]}"
        columns.append((name, found["before"]))
        if "after" in found:
            columns.append((f"{name}, T = {found['temperature']:.2f}", found["after"]))
    shown = [name for name in metrics if any(name in report for _, report in columns)]
    shown += [name for name in ("perplexity",) if name in columns[0][1]]  # of texts
    lines = [[name, *(_cell(report, name, gap) for _, report in columns)] for name in shown]
    if "ece" in shown and columns[0][1].get("noise_floor"):
        floors = [report["noise_floor"]["ece"] for _, report in columns]
        lines.append(["ece if perfect", *(f"{floor['mean']:.3f}{gap}(to {floor['high']:.3f})" for floor in floors)])
    return ["score", *(name for name, _ in columns)], lines


def _cell(report: Mapping[str, Any], name: str, gap: str) -> str:
    value = report.get(name)
    if value is None:
        return "undefined"
    interval = (report.get("intervals") or {}).get(name)
    return f"{value:.3f}" if interval is None else f"{value:.3f}{gap}[{interval[0]:.3f}, {interval[1]:.3f}]"
