"""A report as a page of HTML: what it is of, eight numbers, two pictures, and everything else below."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..scores.table import DEFINITIONS, TABLED
from .page import facts, page, picture
from .record import ReportRecord
from .render import notes, score_table, sections, table_header, verdict
from .tables import html_section, in_html, number, pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The scores that a page begins with.
FIRST = (*TABLED, "error_auroc", "mean_confidence")


def report_html(
    report: ReportRecord,
    further: str = "",
    *,
    before: ReportRecord | None = None,
    about: Mapping[str, Any] | None = None,
    title: str = "Calibration report",
) -> str:
    """The report as one self-contained page: inline style, inline pictures, no script, no network.

    Args:
        report: What is shown.
        further: HTML that comes after the scores.
        before: The same rows before a recalibration, shown beside it.
        about: What is reported on, by name: run, model, data, date, ...
        title: Of the page.
    """
    told = "".join(f"<p>{html.escape(note)}</p>\n" for note in notes(report) if note)
    parts = "".join(
        html_section(section, _group_picture(report) if section.has_picture else "") for section in sections(report)
    )
    body = (
        f"{facts(about)}{_first_pictures(report, before)}\n"
        f"{_first_numbers(report, before)}"
        f"<details><summary>All {len(report.scores)} scores, and more pictures</summary>\n"
        f"{_all_scores(report)}{_more_pictures(report)}</details>\n{told}{parts}{further}"
    )
    return page(title, verdict(report, in_html), body, report.settings)


def _first_numbers(report: ReportRecord, before: ReportRecord | None) -> str:
    """The headline scores with their intervals; before and after beside each other where there are both."""
    columns = [("value", report)] if before is None else [("before", before), ("after", report)]
    header = ["score", *(name for name, _ in columns), "if calibrated", "meaning"]
    lines = []
    for key in FIRST:
        if key in report.scores:
            cells = [f"{number(found.scores[key])} {_interval(found, key)}".rstrip() for _, found in columns]
            band = None if report.floor is None else report.floor.get(key)
            lines.append((key, [*cells, "–" if band is None else number(band.mean)]))
    return _described(header, lines)


def _interval(report: ReportRecord, key: str) -> str:
    found = "–" if report.intervals is None else pair(report.intervals.get(key))
    return "" if found == "–" else found


def _all_scores(report: ReportRecord) -> str:
    lines = [(key, cells[1:]) for key, cells in zip(report.scores, score_table(report), strict=True)]
    return _described([*table_header(report), "meaning"], lines)


def _described(header: list[str], lines: list[tuple[str, list[str]]]) -> str:
    """A table of scores whose last column says what each is."""
    rows = []
    for key, cells in lines:
        numbers = "".join(f'<td class="n">{html.escape(cell)}</td>' for cell in cells)
        rows.append(f"<tr><td><code>{key}</code></td>{numbers}<td>{html.escape(DEFINITIONS[key])}</td></tr>")
    names, body = "".join(f"<th>{html.escape(name)}</th>" for name in header), "\n".join(rows)
    return f"<table><thead><tr>{names}</tr></thead><tbody>\n{body}\n</tbody></table>\n"


def _first_pictures(report: ReportRecord, before: ReportRecord | None) -> str:
    # Whoever wants numbers alone does not pay for matplotlib.
    from . import plots

    named = [("Reliability", plots.points_figure(report.bins, None if before is None else before.bins))]
    if report.rows is not None:
        pairs = (report.rows.probabilities, report.rows.labels)
        named.append(("Risk and coverage", plots.risk_coverage_diagram(pairs)))
    return _drawn(named)


def _more_pictures(report: ReportRecord) -> str:
    from . import plots

    named: list[tuple[str, Figure]] = [("Reliability diagram", plots.reliability_figure(report.bins))]
    if report.rows is not None:
        pairs = (report.rows.probabilities, report.rows.labels)
        named.append(("Confidence of correct and wrong rows", plots.confidence_histogram(*pairs)))
    if report.class_bins is not None:
        named.append(("Every class", plots.classwise_figure(report.class_bins, class_names=report.class_names)))
    return _drawn(named)


def _drawn(named: list[tuple[str, Figure]]) -> str:
    return "\n".join(picture(name, figure) for name, figure in named)


def _group_picture(report: ReportRecord) -> str:
    from . import forest

    assert report.groups is not None
    drawn, all_groups = len(forest.drawn_names(report.groups, "accuracy")), len(report.groups)
    what = "Every group less all rows" if drawn == all_groups else f"{drawn} of {all_groups:,} groups less all rows"
    if report.intervals is not None:
        what += "; bars hold for all groups at once, squares lie on the worse side, open circles have too few rows"
    return picture(what, forest.group_diagram(report)) + "\n"
