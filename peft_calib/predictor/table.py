"""What is added to a table that was predicted, and the table with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset

#: Names of the added columns; a prefix stands before each.
LABEL, PROBABILITY, ENTROPY, INFORMATION = "predicted_label", "probability", "entropy", "mutual_information"
ERROR, ANSWERED, SET = "error_probability", "answered", "set"
#: Of labels, and of numbers.
LABELS, GIVEN, RULED_OUT = "predicted_labels", "given", "ruled_out"
NUMBER = ("mean", "sd", "lower", "upper")
#: Of words.
ENTITIES = "entities"


def added_names(prefix: str, columns: Sequence[str], outputs: Sequence[str]) -> list[str]:
    """Names of the added columns; `outputs` are those whose probabilities are added, too."""
    return [f"{prefix}{name}" for name in (*columns, *(f"{PROBABILITY}_{name}" for name in outputs))]


def refuse_clash(columns: Sequence[str], added: Sequence[str], source: str, mend: str) -> None:
    """Raise `ValueError` where a table has a column of one of the added names."""
    twice = [name for name in added if name in columns]
    if twice:
        raise ValueError(
            f"{source} has columns named {', '.join(twice)}, as what is added would be; put something before the "
            f"added names with {mend}"
        )


def added_columns(found: Any, names: Sequence[str]) -> dict[str, list]:
    """The added columns of an answer, under the names that `added_names` gave."""
    return dict(zip(names, found.added(), strict=False))  # the outputs' own columns where they are named


def column_types(found: Any, names: Sequence[str]) -> dict[str, pa.DataType]:
    """Types of those added columns whose values do not say them."""
    return dict(zip(names, found.added_types(), strict=False))


def arrow_table(rows: Dataset, added: dict[str, list], types: Mapping[str, pa.DataType] | None = None) -> pa.Table:
    """Rows with further columns behind their own, in the types that the rows have, or that are said of them."""
    table: pa.Table = rows.with_format("arrow")[:]
    for name, values in added.items():
        table = table.append_column(name, pa.array(values, (types or {}).get(name) or _type_of(values[0])))
    return table


def _type_of(value: Any) -> pa.DataType | None:
    """The type of a column, where its values alone would not say it: a first list may be empty."""
    return pa.string() if isinstance(value, str) else pa.list_(pa.string()) if isinstance(value, list) else None
