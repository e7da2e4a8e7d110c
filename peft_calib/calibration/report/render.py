"""A report as text: Markdown for a terminal or a model card, HTML for a browser."""

from __future__ import annotations

import html
from collections.abc import Callable

from ..resampling.intervals import FEWEST_EFFECTIVE_ROWS, is_carried_by_few
from ..scores.table import DEFINITIONS, MOST_RESAMPLED_CLASSES
from .classes import class_section
from .group_text import group_section, group_verdict
from .page import page, picture
from .record import ReportRecord
from .tables import (
    Section,
    Table,
    html_section,
    in_html,
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
    lines = [verdict(report, in_markdown), "", *markdown_table(Table(_header(report), _table(report))), ""]
    sections = [line for section in _sections(report) for line in markdown_section(section)]
    settings = ", ".join(f"{key} {value}" for key, value in report.settings.items() if value is not None)
    return "\n".join([*lines, *_notes(report), *sections, f"({settings})"]) + "\n"


def report_html(report: ReportRecord, further: str = "") -> str:
    """The report as one self-contained page: inline style, inline pictures, no script, no network.

    `further` is HTML that comes after the scores.
    """
    header = "".join(f"<th>{html.escape(name)}</th>" for name in (*_header(report), "meaning"))
    lines = []
    for key, cells in zip(report.scores, _table(report), strict=True):
        numbers = "".join(f'<td class="n">{html.escape(cell)}</td>' for cell in cells[1:])
        lines.append(f"<tr><td><code>{key}</code></td>{numbers}<td>{html.escape(DEFINITIONS[key])}</td></tr>")
    notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in _notes(report) if note)
    sections = "".join(
        html_section(section, _group_picture(report) if section.has_picture else "") for section in _sections(report)
    )
    body = (
        f"{_pictures(report)}\n<table><thead><tr>{header}</tr></thead><tbody>\n{chr(10).join(lines)}\n</tbody></table>\n"
        f"{notes}{sections}{further}"
    )
    return page("Calibration report", verdict(report, in_html), body, report.settings)


def _sections(report: ReportRecord) -> list[Section]:
    """What comes after the scores of all rows."""
    sections = [] if report.groups is None else [group_section(report)]
    if report.classes is not None:
        sections.append(class_section(report.classes, report.settings["confidence_level"]))
    return sections


def _notes(report: ReportRecord) -> list[str]:
    """What the table leaves out, and why; each note is followed by an empty line."""
    if report.intervals is None:
        return []
    notes = []
    size, effective = report.settings["num_rows"], report.settings.get("effective_rows")
    if effective is not None and is_carried_by_few(size, effective):
        notes.append(
            f"There is no interval: the {size:,} rows weigh so unequally that they say as much as {effective:.1f} of "
            f"equal weight, fewer than {FEWEST_EFFECTIVE_ROWS}."
        )
    if report.settings["num_classes"] > MOST_RESAMPLED_CLASSES:
        notes.append(f"Scores over class columns have no interval above {MOST_RESAMPLED_CLASSES} classes.")
    return [line for note in notes for line in (note, "")]


def _header(report: ReportRecord) -> list[str]:
    if report.intervals is None:
        return ["score", "value"]
    level = f"{report.settings['confidence_level']:.0%}"
    return ["score", "value", f"{level} interval", "if calibrated", f"{level} band"]


def _table(report: ReportRecord) -> list[list[str]]:
    lines = []
    for key, value in report.scores.items():
        cells = [key, number(value)]
        if report.intervals is not None and report.floor is not None:
            cells.append(pair(report.intervals.get(key)))
            band = report.floor.get(key)
            cells += ["–", "–"] if band is None else [number(band.mean), pair((band.low, band.high))]
        lines.append(cells)
    return lines


def _pictures(report: ReportRecord) -> str:
    # Whoever wants numbers alone does not pay for matplotlib.
    from . import plots

    named = [("Reliability diagram", plots.reliability_figure(report.bins))]
    if report.rows is not None:
        pair = (report.rows.probabilities, report.rows.labels)
        named.append(("Risk and coverage", plots.risk_coverage_diagram(pair)))
        named.append(("Confidence of correct and wrong rows", plots.confidence_histogram(*pair)))
    if report.class_bins is not None:
        named.append(("Every class", plots.classwise_figure(report.class_bins, class_names=report.class_names)))
    return "\n".join(picture(name, figure) for name, figure in named)


def _group_picture(report: ReportRecord) -> str:
    from . import forest

    assert report.groups is not None
    drawn, all_groups = len(forest.drawn_names(report.groups, "accuracy")), len(report.groups)
    what = "Every group less all rows" if drawn == all_groups else f"{drawn} of {all_groups:,} groups less all rows"
    if report.intervals is not None:
        what += "; bars hold for all groups at once, squares lie on the worse side, open circles have too few rows"
    return picture(what, forest.group_diagram(report)) + "\n"
