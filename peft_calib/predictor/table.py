"""What is added to a table that was predicted, and the table with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset

from .answer import CalibratedPrediction

#: Names of the added columns; a prefix stands before each.
LABEL, PROBABILITY, ENTROPY, INFORMATION = "predicted_label", "probability", "entropy", "mutual_information"
ERROR, ANSWERED, SET = "error_probability", "answered", "set"


def added_names(prefix: str, classes: Sequence[str], further: Sequence[str] = ()) -> list[str]:
    """Names of the added columns; `classes` are those whose probabilities are added, too.

    `further` are those of `ERROR`, `ANSWERED` and `SET` that the predictor gives.
    """
    each = [f"{PROBABILITY}_{name}" for name in classes]
    own = (LABEL, PROBABILITY, ENTROPY, INFORMATION, *(name for name in (ERROR, ANSWERED, SET) if name in further))
    return [f"{prefix}{name}" for name in (*own, *each)]


def refuse_clash(columns: Sequence[str], added: Sequence[str], source: str, mend: str) -> None:
    """Raise `ValueError` where a table has a column of one of the added names."""
    twice = [name for name in added if name in columns]
    if twice:
        raise ValueError(
            f"{source} has columns named {', '.join(twice)}, as what is added would be; put something before the "
            f"added names with {mend}"
        )


def added_columns(found: CalibratedPrediction, names: Sequence[str]) -> dict[str, list]:
    """The added columns, under the names that `added_names` gave."""
    columns = [found.labels_predicted, found.probabilities.amax(-1).tolist()]
    columns += [found.entropy.tolist(), found.mutual_information.tolist()]
    columns += [] if found.error_probability is None else [found.error_probability.tolist()]
    columns += [] if found.answered is None else [found.answered.tolist()]
    columns += [] if found.sets is None else [found.label_sets]
    columns += found.probabilities.T.tolist()
    return dict(zip(names, columns, strict=False))  # the classes' own columns where they are named


def arrow_table(rows: Dataset, added: dict[str, list]) -> pa.Table:
    """Rows with further columns behind their own, in the types that the rows have."""
    table: pa.Table = rows.with_format("arrow")[:]
    for name, values in added.items():
        table = table.append_column(name, pa.array(values, _type_of(values[0])))
    return table


def _type_of(value: Any) -> pa.DataType | None:
    """The type of a column, where its values alone would not say it: a first list may be empty."""
    return pa.string() if isinstance(value, str) else pa.list_(pa.string()) if isinstance(value, list) else None
