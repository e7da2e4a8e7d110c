"""Tables in text files, read as people write them: CSV in any usual dress, and JSON.

Every field of a CSV file is a text, and only an empty one is missing: readers that guess types turn the class "None"
into a missing value and "007" into 7, each in silence.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

#: Values of each column, and the line of the file on which each row begins; 0 where it is not known.
Columns = tuple[dict[str, list[Any]], list[int]]

#: Marks at the beginning of a file that say how it is encoded; UTF-32's begins like UTF-16's, so it comes first.
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
#: Rows that are looked at to find the delimiter, and the share of them that must have as many fields as the header.
SAMPLE, FITTING = 200, 0.9
BLANKS = re.compile(r"[ \t\n\r]*")
#: What Excel writes above a table to name the delimiter.
EXCEL_HINT = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)


#: How .xlsx, .docx and .zip begin, and the older .xls and .doc.
PACKED = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")


def decoded(content: bytes, source: str, encoding: str | None = None) -> str:
    """The text of a file. No encoding is guessed: Latin-1 reads every file, most of them wrongly."""
    if content.startswith(PACKED):
        raise ValueError(
            f"{source} is no text but a packed or binary file, as Excel and other programs write them: save the table "
            "as CSV there, or read it in Python (pandas.read_excel) and give the data frame"
        )
    named = next((name for mark, name in MARKS.items() if content.startswith(mark)), None)
    chosen = encoding or named or "utf-8"
    try:
        text = content.decode(chosen)
    except LookupError as error:
        raise ValueError(
            f"there is no text encoding {chosen!r}; usual ones are utf-8, cp1252, latin-1 and utf-16"
        ) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start : error.start + 1]
        character = byte.decode("cp1252", "replace")
        looks = f" ({character!r} in Windows-1252 and Latin-1)" if character.isprintable() and not encoding else ""
        raise ValueError(
            f"{source} is not encoded in {chosen.upper()}: line {line} has the byte 0x{byte.hex()}{looks}. Name its "
            "encoding with --encoding (encoding=... in Python): cp1252 for files of Windows programs, latin-1, "
            "utf-16, ..."
        ) from error
    if encoding is None and 4 * text.count("\0") < len(text) and "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{source}: line {line} holds a NUL character, which is no text; the file may be damaged")
    if encoding is None and "\0" in text:
        likely = "utf-16-be" if content[:1] == b"\0" else "utf-16-le"
        raise ValueError(f"{source} holds NUL characters, as UTF-16 does: name its encoding with --encoding {likely}")
    return text.removeprefix("\ufeff")


def read_csv(text: str, source: str, delimiter: str | None = None, usual: str = ",") -> Columns:
    """A table whose first line names the columns."""
    skipped = 0
    hint = EXCEL_HINT.match(text)
    if hint is not None:
        text, skipped, delimiter = text[hint.end() :], 1, delimiter or hint[1]
    if delimiter is None:
        delimiter = _found_delimiter(text, source, usual)
    records = _records(text, delimiter, source, skipped)
    header = next(records, (0, []))[1]
    names = _names(header, source)
    columns: dict[str, list[Any]] = {name: [] for name in names}
    lines = []
    for line, fields in records:
        if len(fields) > len(names) and any(fields[len(names) :]):
            raise ValueError(
                f"{source}, line {line}: {len(fields)} fields, but the header has {len(names)} "
                f"({', '.join(names)}). Put a field that holds a {DELIMITERS.get(delimiter, repr(delimiter))} between "
                "quote marks, or name another delimiter with --delimiter"
            )
        for position, name in enumerate(names):
            value = fields[position] if position < len(fields) else ""
            columns[name].append(value or None)
        lines.append(line)
    return columns, lines


def read_json(text: str, source: str, lines_of_json: bool = False) -> Columns:
    """JSON lines, one array of objects, or one object of columns, these as lists or as pandas writes them."""
    found = list(_values(text, source))
    if len(found) == 1 and not lines_of_json and isinstance(found[0][1], dict):
        values = found[0][1]
        lengths = {len(value) if isinstance(value, list) else -1 for value in values.values()}
        if len(lengths) == 1 and -1 not in lengths:
            return {str(name): value for name, value in values.items()}, [0] * lengths.pop()
        frame = _written_by_pandas(values)
        if frame is not None:
            return frame
    columns: dict[str, list[Any]] = {}
    for row, (line, value) in enumerate(found):
        if not isinstance(value, dict):
            raise ValueError(
                f"{source}, line {line}: a row is an object of column names and values, "
                f'as {{"text": "...", "label": "..."}}; this is {json.dumps(value)[:80]}'
            )
        for name in value:
            columns.setdefault(name, [None] * row)
        for name, column in columns.items():
            column.append(value.get(name))
    return columns, [line for line, _ in found]


def _written_by_pandas(values: dict[str, Any]) -> Columns | None:
    """The columns of what `DataFrame.to_json` writes if nothing is said: each an object of row names and values."""
    columns = list(values.values())
    if not columns or not all(isinstance(column, dict) and column for column in columns):
        return None
    rows = list(columns[0])
    if any(list(column) != rows for column in columns):
        return None
    return {str(name): list(column.values()) for name, column in values.items()}, [0] * len(rows)


def _values(text: str, source: str) -> Iterator[tuple[int, Any]]:
    """The values of an array, or those that follow each other in the file, with the line of each."""
    decoder = json.JSONDecoder()
    position = _skip(text, 0)
    array = text.startswith("[", position)
    position = _skip(text, position + 1) if array else position
    line, counted = 1, 0
    while position < len(text):
        line, counted = line + text.count("\n", counted, position), position
        if array and text[position] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}, line {error.lineno}: this is no JSON ({error.msg})") from error
        yield line, value
        position = _skip(text, position)
        if array:
            if text[position : position + 1] not in (",", "]"):
                where = line + text.count("\n", counted, position)
                raise ValueError(f"{source}, line {where}: this is no JSON (a comma or ] is expected)")
            position = _skip(text, position + 1) if text[position] == "," else position
    if array:
        raise ValueError(f"{source} is no JSON: its array does not end")


def _skip(text: str, position: int) -> int:
    match = BLANKS.match(text, position)
    assert match is not None
    return match.end()


def _records(text: str, delimiter: str, source: str, skipped: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, with the line on which each begins: a quoted field may hold line breaks."""
    # strict: a quote mark that is neither doubled nor closed would otherwise join rows, or vanish, in silence
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    while True:
        limit = csv.field_size_limit(len(text) + 1)  # the module's own limit, 128 kB, is shorter than many documents
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{source}, line {line + skipped}: a quote mark does not close, or is not doubled inside a quoted "
                f"field ({error}). Double it, or name the delimiter with --delimiter if it is not "
                f"{DELIMITERS.get(delimiter, repr(delimiter))}"
            ) from error
        finally:
            csv.field_size_limit(limit)
        if fields:
            yield line + skipped, fields
        line = reader.line_num + 1


def _found_delimiter(text: str, source: str, usual: str) -> str:
    """The delimiter under which the first rows have as many fields as the header; the usual one for one column."""
    fitting = [mark for mark in DELIMITERS if _fits(text, mark, source)]
    if usual in fitting or not fitting:
        return usual
    if len(fitting) > 1:
        names = " and ".join(f"{DELIMITERS[mark]}s" for mark in fitting)
        raise ValueError(f"{source}: both {names} divide the rows alike; name the delimiter with --delimiter")
    return fitting[0]


def _fits(text: str, delimiter: str, source: str) -> bool:
    try:
        widths = [len(fields) for _, fields in islice(_records(text, delimiter, source), SAMPLE)]
    except ValueError:  # quote marks make no sense under this one
        return False
    return bool(widths) and widths[0] > 1 and widths.count(widths[0]) >= FITTING * len(widths)


def _names(header: list[str], source: str) -> list[str]:
    """Names of the columns; a blank one, as that of the index which pandas writes, is called after its position."""
    names = [name.strip() or f"column {position}" for position, name in enumerate(header, start=1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        where = [str(position) for position, name in enumerate(names, start=1) if name == twice[0]]
        raise ValueError(
            f"{source}: columns {' and '.join(where)} are both named {twice[0]!r}; give each column a name of its own"
        )
    return names
