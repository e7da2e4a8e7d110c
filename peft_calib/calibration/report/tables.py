"""Tables of a report, in Markdown and in HTML; names that users give are text in both, whatever they hold."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

# What Markdown (or HTML in it) takes for more than text; an underscore only at the edge of a word.
_MARKUP = re.compile(r"[\\`*{}\[\]<>|~#&!$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


class Name(str):
    """A text from outside, not ours."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """A header and lines of cells; the first column is text, the others are numbers."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of a report under its own heading."""

    title: str
    tables: Sequence[Table]
    notes: Sequence[str | Sequence[str]]  # Each a text, or parts of one among which names are
    has_picture: bool = False


def one_line(name: str) -> str:
    """A name without line breaks and other characters that cannot be seen."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(name.split()))


def in_markdown(text: str) -> str:
    """A name as Markdown that shows it as it is; other text is left alone."""
    return _MARKUP.sub(lambda found: f"\\{found[0]}", one_line(text)) if isinstance(text, Name) else text


def in_text(text: str) -> str:
    """A name on one line; other text is left alone."""
    return one_line(text) if isinstance(text, Name) else text


def in_html(text: str) -> str:
    """Any text as HTML that shows it as it is."""
    return html.escape(in_text(text))


def markdown_table(table: Table) -> list[str]:
    """Lines of a table whose columns but the first are aligned to the right."""
    lines = ["| " + " | ".join(map(in_markdown, table.header)) + " |"]
    lines.append("|" + "|".join(["---", *["---:"] * (len(table.header) - 1)]) + "|")
    return lines + ["| " + " | ".join(map(in_markdown, cells)) + " |" for cells in table.lines]


def html_table(table: Table) -> str:
    """The same as HTML."""
    header = "".join(f"<th>{in_html(name)}</th>" for name in table.header)
    lines = []
    for cells in table.lines:
        numbers = "".join(f'<td class="n">{in_html(cell)}</td>' for cell in cells[1:])
        lines.append(f"<tr><td>{in_html(cells[0])}</td>{numbers}</tr>")
    body = "\n".join(lines)
    return f"<table><thead><tr>{header}</tr></thead><tbody>\n{body}\n</tbody></table>\n"


def markdown_section(section: Section) -> list[str]:
    """Lines of a section, an empty one at its end."""
    lines = [f"## {section.title}", ""]
    for table in section.tables:
        lines += [*markdown_table(table), ""]
    for note in section.notes:
        lines += ["".join(map(in_markdown, _parts(note))), ""]
    return lines


def html_section(section: Section, pictures: str = "") -> str:
    """The same as HTML, its pictures first."""
    tables = "".join(map(html_table, section.tables))
    notes = "".join(f"<p>{''.join(map(in_html, _parts(note)))}</p>\n" for note in section.notes)
    return f"<h2>{html.escape(section.title)}</h2>\n{pictures}{tables}{notes}"


def _parts(note: str | Sequence[str]) -> Sequence[str]:
    return [note] if isinstance(note, str) else note


def number(value: float, *, signed: bool = False) -> str:
    """Four decimals; a dash for what is not defined."""
    return "–" if not math.isfinite(value) else f"{value:+.4f}" if signed else f"{value:.4f}"


def pair(ends: tuple[float, float] | None, *, signed: bool = False) -> str:
    """An interval; a dash where there is none."""
    if ends is None or not all(math.isfinite(end) for end in ends):
        return "–"
    return f"[{number(ends[0], signed=signed)}, {number(ends[1], signed=signed)}]"


def with_interval(value: float, ends: tuple[float, float] | None, *, signed: bool = False) -> str:
    """A number with its interval where it has one."""
    interval = pair(ends, signed=signed)
    return number(value, signed=signed) + ("" if interval == "–" else f" {interval}")
