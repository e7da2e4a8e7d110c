"""Evaluations and comparisons as tables: for a terminal, and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..calibration.decide.page import HEADINGS
from ..calibration.scores.table import CONFIDENCE
from ..provenance.stored_decision import HEAD
from .baseline import CALLED
from .temperatures import shown

#: How a way of predicting is called in a table.
NAMES = {"mean": "mean adapter", "sample": "draws"}

#: What a table about an uncertainty head has to be read with.
HEAD_CAPTION = (
    "Error AUROC: how well it tells errors from correct items; AURC: mean error rate of the surest items. The ECE of "
    "1 - P(error) is against correctness. The base score is the frozen model's own, which the head has to beat."
)

#: How a model is called that has not read the texts, where the answer is no class.
BASE_RATES = "base rates"

#: Lines of a table about rows of other origin.
OUTSIDE = {"mean_confidence": "outside: confidence", "auroc": "outside: AUROC"}


def evaluation_table(content: Mapping[str, Any], metrics: Sequence[str]) -> Table:
    """One column a prediction, one line a score, each with its interval."""
    table = Table(
        title=_title(content), caption=_caption(content), caption_justify="left", box=SIMPLE_HEAD, pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    header, lines = _cells(content, metrics, "\n")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def evaluation_markdown(content: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """The same as Markdown, with the verdicts in words."""
    header, lines = _cells(content, metrics, " ")
    table = _markdown(header, lines)
    verdicts = [
        f"- {NAMES[variant]}, {stage} temperature: {found[stage]['verdict']}"
        for variant, found in content["variants"].items()
        for stage in ("before", "after")
        if "verdict" in found.get(stage, {})
    ]
    further = verdict_of_entities(content), verdict_of_head(content), verdict_of_baseline(content)
    verdicts += [f"- {told}" for told in further if told is not None]
    head = _head(content)
    told = [] if head is None else ["", "## Uncertainty head", "", *_markdown(*_head_cells(head)), "", HEAD_CAPTION]
    for title, text in decisions_told(content).items():
        told += ["", f"## {title}", "", text]
    return "\n".join([f"# {_title(content)}", "", *table, "", _caption(content), "", *verdicts, *told]).rstrip() + "\n"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [
        f"| {' | '.join(header)} |",
        "|---|" + "---:|" * (len(header) - 1),
        *(f"| {' | '.join(line)} |" for line in lines),
    ]


def verdict_of_baseline(content: Mapping[str, Any]) -> str | None:
    """That the run is no better than the most frequent class, where that is so."""
    return (content.get("baseline") or {}).get("verdict")


def head_table(content: Mapping[str, Any]) -> Table | None:
    """What the run's uncertainty head is worth, beside the frozen model's own score; None where there is no head."""
    found = _head(content)
    if found is None:
        return None
    table = Table(
        title=f"Uncertainty head: {found['errors']} errors", caption=HEAD_CAPTION, caption_justify="left",
        box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    header, lines = _head_cells(found)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for line in lines:
        table.add_row(*line)
    return table


def _head_cells(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A line a score; of a tagger also those of entities and sentences."""
    lines = []
    for level in ("", *(name for name in ("entities", "sentences") if name in found)):
        part = found[level] if level else found
        reports = part["error_probability"], part["base"]
        for key in CONFIDENCE:
            lines.append([f"{key}, {level}" if level else key, *(_cell(report, key, " ") for report in reports)])
    for key, name in OUTSIDE.items() if "outside" in found else ():
        lines.append([name, f"{found['outside'][key]:.3f}", ""])
    return ["score", "1 - P(error)", f"base score ({found['score']})"], lines


def decisions_told(content: Mapping[str, Any]) -> dict[str, str]:
    """What the run's decision rules reach on these rows, as Markdown by title, or why nothing is said of one."""
    told = {}
    for found in content["variants"].values():
        for kind, one in found.get("decision", {}).items():
            text = one.get("refused") or one["told"]
            if one.get("rows_left_out"):
                text += f"\n\n{one['rows_left_out']} row(s) that the rule was fitted on were left out."
            if "groups" in one:
                text += f"\n\n{one['groups']['told']}"
            told[HEADINGS[kind] + (" (by P(error))" if one["by"] == HEAD else "")] = text
    return told


def verdict_of_entities(content: Mapping[str, Any]) -> str | None:
    """What the entities of the way that the method is made for are worth, after the temperature."""
    found = [one["entities"]["told"] for one in content["variants"].values() if "entities" in one]
    return f"Entities: {found[-1]}" if found else None


def verdict_of_head(content: Mapping[str, Any]) -> str | None:
    """Whether the run's uncertainty head ranks errors better than the frozen model's own score on these rows."""
    found = _head(content)
    if found is None:
        return None
    if found["kept_base"]:
        return f"The uncertainty head keeps the base score ({found['score']}): {found['why_base']}"
    told = found.get("verdict")
    return None if told is None else f"Uncertainty head ({found['score']}), on these rows: {told}"


def _head(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What was measured of the run's uncertainty head, if it has one."""
    return next((found["head"] for found in content["variants"].values() if "head" in found), None)


def _title(content: Mapping[str, Any]) -> str:
    items = f", {content['items']} items" if content["items"] != content["rows"] else ""
    return f"{content['run']} ({content['method']}) on {content['data']}: {content['rows']} rows{items}"


def _caption(content: Mapping[str, Any]) -> str:
    lines = [
        "Brackets: 95 % intervals (bootstrap over the rows)."
        if not content.get("kind")
        else "Brackets: 95 % intervals."
    ]
    if not content.get("kind"):
        lines.append("T: temperature with its 95 % interval, fitted on the calibration rows of the run.")
    fits = {name: found.get("temperature_fit") for name, found in content["variants"].items()}
    told = content.get("kind")
    lines += [f"{NAMES[name]}: {fit['reason']}" for name, fit in fits.items() if fit and (told or not fit["applied"])]
    if told:
        lines.append(f"{BASE_RATES.capitalize()}: always {content['baseline']['told']}.")
    elif content.get("baseline"):
        lines.append(
            f"{CALLED.capitalize()}: always answering {content['baseline']['answer']!r}, with the shares of the "
            "classes in the training rows for its probabilities."
        )
    if content.get("outside"):
        about = content["outside"]
        lines.append(
            f"Outside: mean confidence on the {about['rows']} rows of {about['data']}, and how well confidence tells "
            "them from the rows above (0.5 is chance)."
            + (f" {about['rows_cut']} of those rows were cut, too." if about.get("rows_cut") else "")
        )
    if content["rows_left_out"]:
        lines.append(f"{content['rows_left_out']} row(s) that the run was trained or calibrated on were left out.")
    if content.get("rows_without_value"):
        lines.append(f"{content['rows_without_value']} row(s) without a text or a label were left out.")
    if content.get("rows_cut"):
        lines.append(
            f"{content['rows_cut']} row(s) are longer than what the run reads, and were cut as in training (read more "
            "with --max-length when you train)."
        )
    if content.get("words_lost"):
        lines.append(
            f"{content['words_lost']} tagged word(s) have no answer, as they were cut off or have no token; they "
            "count nowhere, also not as names that were missed."
        )
    return " ".join(lines)


def _cells(content: Mapping[str, Any], metrics: Sequence[str], gap: str) -> tuple[list[str], list[list[str]]]:
    columns: list[tuple[str, Mapping[str, Any]]] = []
    outside: list[Mapping[str, float]] = []
    for variant, found in content["variants"].items():
        name = NAMES[variant] if found["num_samples"] == 1 else f"{found['num_samples']} {NAMES[variant]}"
        if "before" in found:
            columns.append((name, found["before"]))
        done = found.get("recalibration") or shown(found.get("temperature_fit"), found["temperature"])
        columns.append((f"{name}, {done}", found["after"]))
        outside += [found["outside"][stage] for stage in ("before", "after") if "outside" in found]
    if content.get("baseline"):
        columns.append((BASE_RATES if content.get("kind") else CALLED, content["baseline"]))
    rows = [name for name in metrics if any(name in report for _, report in columns)]
    rows += [name for name in ("perplexity",) if name in columns[0][1]]  # of texts
    lines = [[name, *(_cell(report, name, gap) for _, report in columns)] for name in rows]
    floored: tuple[str, ...] = ("ece_micro", "ece_macro", "pit_ks", "coverage_50", "coverage_90")
    for key in (key for key in floored if key in rows):
        bands = [(report.get("noise_floor") or {}).get(key) for _, report in columns]
        lines.append([f"{key} if right", *(f"{band['mean']:.3f}" if band else "" for band in bands)])
    if "ece" in rows and columns[0][1].get("noise_floor"):
        floors = [(report.get("noise_floor") or {}).get("ece") for _, report in columns]
        told = (floor and f"{floor['mean']:.3f}{gap}(to {floor['high']:.3f})" for floor in floors)
        lines.append(["ece if perfect", *(text or "" for text in told)])
    if outside:
        empty = [""] * (len(columns) - len(outside))
        for key, name in OUTSIDE.items():
            lines.append([name, *(f"{found[key]:.3f}" for found in outside), *empty])
    return ["score", *(name for name, _ in columns)], lines


def _cell(report: Mapping[str, Any], name: str, gap: str) -> str:
    if name not in report:
        return ""
    value = report[name]
    if value is None:
        return "undefined"
    interval = (report.get("intervals") or {}).get(name)
    if interval is None:
        return f"{value:.3f}"
    if gap == "\n":  # a terminal is narrow: no blank to break the line at, no zero before the point
        low, high = (re.sub(r"^(-?)0\.", r"\1.", f"{bound:.3f}") for bound in interval)  # that of 10.5 is a digit
        return f"{value:.3f}{gap}[{low},{high}]"
    return f"{value:.3f}{gap}[{interval[0]:.3f}, {interval[1]:.3f}]"
