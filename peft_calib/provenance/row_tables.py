"""Rows as people hold them: data frames and other tables as a data set, and a clear no to what is no set of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

STREAMS = ("IterableDataset", "IterableColumn", "LazyFrame")


def as_rows(rows: Any) -> Any:
    """Rows so that `rows[i]` is row i, an index left out; `TypeError` for splits, columns, a text, a stream."""
    _refuse_other_things(rows)
    library, kind = _origin(rows)
    if library == "pandas" and kind == "DataFrame":
        return _of_frame(rows)
    if library in ("polars", "pyarrow") and kind in ("DataFrame", "Table", "RecordBatch"):
        table = rows.to_arrow() if library == "polars" else rows
        return Dataset(pa.Table.from_batches([table]) if isinstance(table, pa.RecordBatch) else table)
    is_series = bool(library) and (kind in ("Series", "Index", "ChunkedArray") or kind.endswith("Array"))
    if not is_series:
        return rows
    listed = next((name for name in ("to_pylist", "to_list", "tolist") if hasattr(rows, name)), None)
    return list(rows) if listed is None else getattr(rows, listed)()


def pick_rows(rows: Any, numbers: np.ndarray) -> Any:
    """Some of the rows by number, in the form they came in: a frame, a data set, else a list."""
    library, _ = _origin(rows)
    if library == "pandas":
        return rows.iloc[numbers]
    if library == "polars":
        return rows[numbers.tolist()]
    if library == "pyarrow":
        return rows.take(numbers)
    if hasattr(rows, "select"):
        return rows.select(numbers)
    return [rows[int(number)] for number in numbers]


def _refuse_other_things(rows: Any) -> None:
    name = type(rows).__name__
    if isinstance(rows, (str, bytes)):
        raise TypeError(f"Rows are expected, got the text {rows[:60]!r}. Load the data first: datasets.load_dataset.")
    if isinstance(rows, Mapping):
        keys = ", ".join(map(str, list(rows)[:8]))
        if any(hasattr(part, "column_names") or hasattr(part, "iloc") for part in rows.values()):
            raise TypeError(f"A {name} holds several splits ({keys}). Choose a split: rows['{next(iter(rows))}'].")
        raise TypeError(
            f"A {name} of columns ({keys}) is no sequence of rows. Give datasets.Dataset.from_dict(dict(columns))."
        )
    if name in STREAMS or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise TypeError(
            f"Rows must have a length and be picked by number to be told apart; {name} is "
            f"{'a stream' if name in STREAMS or hasattr(rows, '__next__') else 'no sequence'}. Load the data set "
            "without streaming, collect() a lazy frame, or give list(rows)."
        )


def _origin(rows: Any) -> tuple[str, str]:
    """Name of the library a table comes from, and of its class, or of the class it derives from there."""
    for cls in type(rows).__mro__:
        library = cls.__module__.partition(".")[0]
        if library in ("pandas", "polars", "pyarrow"):
            return library, cls.__name__
    return "", ""


def _of_frame(frame: Any) -> Any:
    names = [str(name) for name in frame.columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"The data frame has several columns named {', '.join(twice)}; rename them.")
    frame = frame.set_axis(names, axis=1)
    try:
        return Dataset.from_pandas(frame, preserve_index=False)
    except (TypeError, ValueError, NotImplementedError):  # pictures, arrays, values of several types in one column
        return frame.to_dict("records")
