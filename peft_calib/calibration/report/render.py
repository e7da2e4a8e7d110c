"""A report as text: its verdict, and Markdown for a terminal or a model card."""

from __future__ import annotations

from collections.abc import Callable

from ..resampling.intervals import FEWEST_EFFECTIVE_ROWS, is_carried_by_few
from ..scores.table import MOST_RESAMPLED_CLASSES
from .classes import class_section
from .group_text import group_section, group_verdict
from .record import ReportRecord
from .tables import (
    Section,
    Table,
    in_markdown,
    in_text,
    markdown_section,
    markdown_table,
    number,
    pair,
)


def verdict(report: ReportRecord, told: Callable[[str], str] = in_text) -> str:
    """In words: how the ECE compares with that of a perfectly calibrated model, and whether a group is worse.

    `told` writes the parts of the text, names of groups among them.
    """
    parts = [calibration_verdict(report)]
    if report.groups is not None and (groups := group_verdict(report.groups)):
        parts += [" ", *groups]
    return "".join(map(told, parts))


def calibration_verdict(report: ReportRecord) -> str:
    """In words: how the ECE compares with what a perfectly calibrated model would score on these rows."""
    ece = report.scores["ece"]
    size = f"on {report.settings['num_rows']:,} rows"
    if report.floor is None or "ece" not in report.floor:
        return f"ECE {ece:.4f} {size}; no interval or noise floor was asked for."
    band, level = report.floor["ece"], report.settings["confidence_level"]
    floor = (
        f"a perfectly calibrated model with these confidences would score {band.mean:.4f} "
        f"[{band.low:.4f}, {band.high:.4f}]"
    )
    over, under = report.scores["overconfidence"], report.scores["underconfidence"]
    if ece <= band.high:
        judgement = "this many rows cannot tell the two apart"
    elif max(over, under) < 0.75 * (over + under):
        judgement = "the model is miscalibrated, over-confident in places and under-confident in others"
    else:
        judgement = f"the model is miscalibrated, mostly {'over' if over > under else 'under'}-confident"
    return f"ECE {ece:.4f} {size}; {floor} ({level:.0%} band): {judgement}."


def report_markdown(report: ReportRecord) -> str:
    """The report as a Markdown table under its verdict."""
    lines = [verdict(report, in_markdown), "", *markdown_table(Table(table_header(report), score_table(report))), ""]
    parts = [line for section in sections(report) for line in markdown_section(section)]
    settings = ", ".join(f"{key} {value}" for key, value in report.settings.items() if value is not None)
    return "\n".join([*lines, *notes(report), *parts, f"({settings})"]) + "\n"


def sections(report: ReportRecord) -> list[Section]:
    """What comes after the scores of all rows."""
    found = [] if report.groups is None else [group_section(report)]
    if report.classes is not None:
        found.append(class_section(report.classes, report.settings["confidence_level"]))
    return found


def notes(report: ReportRecord) -> list[str]:
    """What the table leaves out, and why; each note is followed by an empty line."""
    if report.intervals is None:
        return []
    found = []
    size, effective = report.settings["num_rows"], report.settings.get("effective_rows")
    if effective is not None and is_carried_by_few(size, effective):
        found.append(
            f"There is no interval: the {size:,} rows weigh so unequally that they say as much as {effective:.1f} of "
            f"equal weight, fewer than {FEWEST_EFFECTIVE_ROWS}."
        )
    if report.settings["num_classes"] > MOST_RESAMPLED_CLASSES:
        found.append(f"Scores over class columns have no interval above {MOST_RESAMPLED_CLASSES} classes.")
    return [line for note in found for line in (note, "")]


def table_header(report: ReportRecord) -> list[str]:
    """Columns of the table of all scores."""
    if report.intervals is None:
        return ["score", "value"]
    level = f"{report.settings['confidence_level']:.0%}"
    return ["score", "value", f"{level} interval", "if calibrated", f"{level} band"]


def score_table(report: ReportRecord) -> list[list[str]]:
    """All scores, each with its interval and what a perfectly calibrated model would score."""
    lines = []
    for key, value in report.scores.items():
        cells = [key, number(value)]
        if report.intervals is not None and report.floor is not None:
            cells.append(pair(report.intervals.get(key)))
            band = report.floor.get(key)
            cells += ["–", "–"] if band is None else [number(band.mean), pair((band.low, band.high))]
        lines.append(cells)
    return lines
