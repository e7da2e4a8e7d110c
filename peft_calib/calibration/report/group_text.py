"""Groups in words and as tables."""

from __future__ import annotations

from ..scores.table import HEADLINES
from .groups import FEWEST_ROWS, GroupPanel, GroupsRecord
from .record import ReportRecord
from .tables import Name, Section, Table, number, pair, with_interval

#: Groups that the verdict names; of more it tells the number.
MOST_NAMED = 3


def group_verdict(groups: GroupsRecord) -> list[str]:
    """Whether a group is worse than all rows beyond chance, as parts of a text, names among them."""
    small = len(groups.too_small)
    untold = f" {_counted(small)} of fewer than {FEWEST_ROWS} rows cannot be judged." if small else ""
    if groups.worse is None:
        name, gap = groups.worst("ece") or (next(iter(groups)), None)
        of = f" of those with at least {FEWEST_ROWS} rows" if small and name not in groups.too_small else ""
        text = f"{of}, on {groups[name].num_rows:,} rows; no interval was asked for, so groups are not judged."
        return ["Group ", Name(name), f" has the largest ECE, {number(groups[name]['ece'])}{text}"] if gap else []
    found = {name: keys for name, keys in groups.worse.items() if keys}
    if not found:
        judged = len(groups.worse)
        none = f"None of {_counted(judged)} is worse than all rows beyond chance." if judged > 1 else ""
        return [(none + untold).strip()] if none + untold else []
    parts = ["Worse than all rows beyond chance: "]
    for index, (name, keys) in enumerate(found.items()):
        if index == MOST_NAMED:
            parts.append(f"; and {_counted(len(found) - index)} more")
            break
        told = ", ".join(f"{key} {_gap(groups, key, name)}" for key in keys)
        parts += ["; " if index else "", Name(name), f" ({groups[name].num_rows:,} rows) in {told}"]
    return [*parts, "." + untold]


def group_section(report: ReportRecord) -> Section:
    """The tables: headline scores of every group, then each score's worst gap."""
    groups = report.groups
    assert groups is not None
    level = report.settings["confidence_level"]
    is_judged = report.intervals is not None
    header = ["group", "rows", *HEADLINES, *(["ece if calibrated", "worse beyond chance"] if is_judged else [])]
    lines = [_line("all rows", report.settings["num_rows"], report, is_judged, "")]
    for name, panel in groups.items():
        worse = ", ".join((groups.worse or {}).get(name, ()))
        told = "too few rows" if name in groups.too_small else worse or "no"
        lines.append(_line(Name(name), panel.num_rows, panel, is_judged, told))
    gaps = [
        "score",
        "worst group",
        "rows",
        "its score less all rows'",
        *([f"{level:.0%} interval, all groups at once"] if level else []),
    ]
    worst = []
    for key in groups.gaps:
        found = groups.worst(key)
        if found is not None:
            name, gap = found
            cells = [key, Name(name), f"{groups[name].num_rows:,}", number(gap.gap, signed=True)]
            worst.append([*cells, pair((gap.low, gap.high), signed=True)] if level else cells)
    return Section("Groups", [Table(header, lines), Table(gaps, worst)], _notes(groups, is_judged, level), True)


def _line(name: str, num_rows: int, panel: ReportRecord | GroupPanel, is_judged: bool, worse: str) -> list[str]:
    intervals, floor = panel.intervals or {}, panel.floor or {}
    scores = [with_interval(panel[key], intervals.get(key)) for key in HEADLINES]
    cells = [name, f"{num_rows:,}", *scores]
    return [*cells, number(floor["ece"].mean) if "ece" in floor else "–", worse] if is_judged else cells


def _notes(groups: GroupsRecord, is_judged: bool, level: float) -> list[str | list[str]]:
    notes: list[str | list[str]] = []
    if is_judged:
        notes.append(
            f"Intervals of scores hold one by one, at {level:.0%}; those of gaps hold for all groups at once, score "
            "by score. A group is called worse at a level that holds over all groups and the headline scores "
            "together. A group of few rows has a larger ECE by noise alone: see what it would score if calibrated."
        )
    if groups.too_small:
        parts = [f"Without interval, for fewer than {FEWEST_ROWS} rows: "]
        for index, name in enumerate(groups.too_small):
            parts += [", " if index else "", Name(name), f" ({groups[name].num_rows})"]
        notes.append([*parts, "."])
    return notes


def _gap(groups: GroupsRecord, key: str, name: str) -> str:
    gap = groups.gaps[key][name]
    return with_interval(gap.gap, (gap.low, gap.high), signed=True)


def _counted(count: int) -> str:
    return f"{count:,} group{'' if count == 1 else 's'}"
