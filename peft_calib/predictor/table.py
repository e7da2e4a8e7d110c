"""What is added to a table that was predicted, and the table with it."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from datasets import Dataset

from .answer import CalibratedPrediction

#: Names of the added columns; a prefix stands before each.
LABEL, PROBABILITY, ENTROPY, INFORMATION = "predicted_label", "probability", "entropy", "mutual_information"
ERROR = "error_probability"


def added_names(prefix: str, classes: Sequence[str], errors: bool = False) -> list[str]:
    """Names of the added columns; `classes` are those whose probabilities are added, too, `errors` adds P(error)."""
    each = [f"{PROBABILITY}_{name}" for name in classes]
    own = (LABEL, PROBABILITY, ENTROPY, INFORMATION, *((ERROR,) if errors else ()))
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
    columns += found.probabilities.T.tolist()
    return dict(zip(names, columns, strict=False))  # the classes' own columns where they are named


def arrow_table(rows: Dataset, added: dict[str, list]) -> pa.Table:
    """Rows with further columns behind their own, in the types that the rows have."""
    table: pa.Table = rows.with_format("arrow")[:]
    for name, values in added.items():
        table = table.append_column(name, pa.array(values, pa.string() if isinstance(values[0], str) else None))
    return table
