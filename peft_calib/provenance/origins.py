"""Where rows come from: the line of a file that a user finds a row on, and data sets out of Python's own tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

ATTRIBUTE = "_peft_calib_origin"


@dataclass(frozen=True)
class Origin:
    """The file and line of each row: the line on which it begins, 0 where there are no lines."""

    files: tuple[str, ...]
    file_of: np.ndarray
    lines: np.ndarray

    @classmethod
    def of_parts(cls, parts: Sequence[tuple[str, Sequence[int]]]) -> Origin:
        """From the lines of each file, in the order of the rows."""
        file_of = np.repeat(np.arange(len(parts)), [len(lines) for _, lines in parts])
        return cls(tuple(name for name, _ in parts), file_of, np.concatenate([np.asarray(p, int) for _, p in parts]))


def at(source: str, rows: Dataset | None, row: int) -> str:
    """`"rows.csv, line 62"`, as an editor counts; only the source where rows have no lines.

    An attribute of the data set has it: a column would be an input of the model to all that hashes or encodes rows.
    """
    origin = getattr(rows, ATTRIBUTE, None)
    if origin is None or row >= len(origin.lines) or not origin.lines[row]:
        return source
    return f"{origin.files[origin.file_of[row]]}, line {origin.lines[row]}"


def as_dataset(columns: Mapping[str, Sequence[Any]], origin: Origin | None = None) -> Dataset:
    """Columns as a data set. A column of several kinds, such as digits among words, is one of words."""
    rows = Dataset.from_dict({name: _uniform(values) for name, values in columns.items()})
    if origin is not None:
        setattr(rows, ATTRIBUTE, origin)
    return rows


def select_rows(rows: Dataset, kept: np.ndarray) -> Dataset:
    """Some of the rows, which still know their lines."""
    selected = rows.select(kept)
    origin = getattr(rows, ATTRIBUTE, None)
    if origin is not None:
        setattr(selected, ATTRIBUTE, Origin(origin.files, origin.file_of[kept], origin.lines[kept]))
    return selected


def with_column(rows: Dataset, name: str, values: Sequence[Any]) -> Dataset:
    """The rows with one column set, which still know their lines."""
    others = rows.remove_columns([name] if name in rows.column_names else [])
    found = others.add_column(name, list(values))
    if hasattr(rows, ATTRIBUTE):
        setattr(found, ATTRIBUTE, getattr(rows, ATTRIBUTE))
    return found


def is_missing(value: Any) -> bool:
    """Whether a field holds nothing: null, NaN, an empty or blank text, an empty list."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or (isinstance(value, float) and value != value)


def frame_columns(frame: Any) -> dict[str, list[Any]] | None:
    """Columns of a table in memory: pandas, polars, pyarrow, or a list of rows; `None` for anything else."""
    if isinstance(frame, (list, tuple)) and all(isinstance(row, Mapping) for row in frame):
        names = list(dict.fromkeys(str(name) for row in frame for name in row))
        return {name: [row.get(name) for row in frame] for name in names}
    if isinstance(frame, Mapping) and all(isinstance(column, (list, tuple, np.ndarray)) for column in frame.values()):
        return {str(name): list(column) for name, column in frame.items()}
    if hasattr(frame, "to_pydict"):  # pyarrow
        return {str(name): list(column) for name, column in frame.to_pydict().items()}
    names = [str(name) for name in getattr(frame, "columns", ())]
    if not names or isinstance(frame, (str, bytes)):
        return None
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the data frame has several columns named {twice[0]!r}; give each a name of its own")
    if hasattr(frame, "to_dicts"):  # polars
        return {name: frame[name].to_list() for name in names}
    columns = {}
    for position, name in enumerate(names):
        series = frame.iloc[:, position]
        # pandas writes nothing as NaN, NaT or NA, by the column's type
        columns[name] = series.astype(object).where(series.notna(), None).tolist()
    return columns


def _uniform(values: Sequence[Any]) -> list[Any]:
    cleaned = [None if isinstance(value, float) and value != value else value for value in values]
    for attempt in (cleaned, [_worded(value) for value in cleaned]):
        try:
            pa.array(attempt)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            continue
        return attempt
    return [None if value is None else json.dumps(value, default=str) for value in cleaned]


def _worded(value: Any) -> Any:
    """Every value as it is written; lists and mappings keep their form."""
    if isinstance(value, Mapping):
        return {key: _worded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_worded(item) for item in value]
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, (bool, int, float)) else str(value)
