"""A decision as a part of a page: what is promised, what is reached, and pictures of both."""

from __future__ import annotations

import html
from typing import Any

from ..report.page import picture
from ..report.tables import html_table
from .base import DecisionRule
from .bounds import band_text, percent
from .by_group import GroupsReached
from .plots import reach_diagram, set_size_diagram, threshold_diagram
from .selective_report import SelectiveReport
from .set_report import SetReport
from .threshold import SelectiveThreshold

#: How the parts about rules are called.
HEADINGS = {
    "threshold": "Which rows to answer",
    "sets": "Prediction sets",
    "labels": "Which labels to give",
    "interval": "Intervals",
}


def decision_html(rule: DecisionRule, reached: Any, groups: GroupsReached | None = None, title: str = "") -> str:
    """A section of HTML, pictures included, for `CalibrationReport.to_html(further=...)`.

    Args:
        rule: A fitted rule.
        reached: What its `evaluate` says of other rows; a text instead that says why there is nothing to report.
        groups: Of `reached_by_group`, drawn as a forest plot.
        title: The heading; by default it says which kind of rule this is.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    heading = title or HEADINGS[rule.kind]
    parts = [f"<h2>{html.escape(heading)}</h2>", f'<p class="verdict">{html.escape(rule.promise())}</p>']
    if isinstance(reached, str):
        return "\n".join([*parts, f"<p>{html.escape(reached)}</p>\n"])
    if not isinstance(reached, (SelectiveReport, SetReport)):
        return "\n".join([*parts, f"<p>{html.escape(reached.verdict())}</p>\n"])
    parts.append(f"<p>{html.escape(_said(reached))}</p>")
    if isinstance(rule, SelectiveThreshold):
        assert isinstance(reached, SelectiveReport)
        parts.append(
            picture("Risk and coverage on the rows of the fit, with the bound", threshold_diagram(rule, reached))
        )
    else:
        assert isinstance(reached, SetReport)
        parts.append(picture("Classes in a set", set_size_diagram(reached)))
    if groups is not None:
        parts.append(picture("Every group, in intervals that hold for all at once", reach_diagram(groups)))
        parts += [html_table(groups.table()), f"<p>{html.escape(groups.verdict())}</p>"]
    return "\n".join(parts) + "\n"


def _said(reached: SelectiveReport | SetReport) -> str:
    """What is reached, in a sentence."""
    if isinstance(reached, SetReport):
        return f"{reached.verdict()} A set holds {reached.mean_size:.2f} classes on average."
    told = (
        f"{reached.accepted} of {reached.num_rows} rows are answered, {percent(reached.coverage)} "
        f"{band_text(reached.coverage_interval)}; {reached.errors} of them are wrong"
    )
    return told + (f", {percent(reached.risk)} {band_text(reached.risk_interval)}." if reached.accepted else ".")
