"""Columns of a user's table, checked and brought to one form: texts are texts, labels are class indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset

__all__ = ["Classes", "check_column", "check_filled", "classes_of"]

#: More different strings than this, in most rows a new one, are texts and not classes.
MOST_STRING_CLASSES = 20

#: Names of the classes, and the index of each stored label.
Classes = tuple[tuple[str, ...], dict[Any, int]]


def check_column(rows: Dataset, column: str, what: str, source: str) -> None:
    """Raise `ValueError` if the rows have no such column; the message names those they have."""
    if column not in rows.column_names:
        raise ValueError(
            f"{source} has no column {column!r}; it has {', '.join(rows.column_names)}: say which one holds the {what}"
        )


def check_filled(values: Sequence[Any], what: str, source: str) -> None:
    """Raise `ValueError` for the first value that is no text, or an empty one."""
    for row, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{source}: row {row} has no {what} ({value!r}); remove such rows")


def classes_of(
    values: Mapping[str, Sequence[Any]], feature: object, source: str, label_names: Sequence[str] | None = None
) -> Classes:
    """Class names, and the index of each stored label.

    A `ClassLabel` column brings its names, `label_names` gives them; otherwise the different labels are the classes,
    in sorted order.

    Args:
        values: split to labels; `train` is among them.
        feature: the column's feature.
        source: where the rows come from, for messages.
        label_names: names of the classes in order; labels are then these names or their indices.

    Returns:
        The names and the index.

    Raises:
        ValueError: for labels that are missing, fractions, of mixed kinds, free text, or not among the names, and for
            fewer than two classes.
    """
    declared = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    if label_names is not None:
        names = tuple(label_names)
        if len(set(names)) < max(len(names), 2):
            raise ValueError(f"label_names must be at least two different names, got {list(names)}")
        index: dict[Any, int] = {position: position for position in range(len(names))}
        index |= {name: position for position, name in enumerate(names)}
    elif declared is not None:
        names, index = declared, {position: position for position in range(len(declared))}
    else:
        index = {}
    for split, labels in values.items():
        for row, label in enumerate(labels):
            fraction = isinstance(label, float) and not label.is_integer()
            if label is None or fraction or (index and label not in index):
                hint = f" ({', '.join(names)}, or an index below {len(names)})" if label_names is not None else ""
                raise ValueError(f"{source}: row {row} of {split} has the label {label!r}; a class is expected{hint}")
    return (names, index) if index else _found(values, source)


def _found(values: Mapping[str, Sequence[Any]], source: str) -> Classes:
    """The different labels as classes, in sorted order."""
    every = [label for labels in values.values() for label in labels]
    different = set(every)
    strings = sum(isinstance(label, str) for label in different)
    if 0 < strings < len(different):
        shown = ", ".join(repr(label) for label in sorted(different, key=str)[:5])
        raise ValueError(f"{source}: the labels mix strings and numbers ({shown}); use one kind")
    if strings > MOST_STRING_CLASSES and strings > len(every) / 2:
        raise ValueError(
            f"{source}: {strings} different strings in {len(every)} rows are no classes. Name the column of the "
            "labels, or map them to classes with label_names (a list of the class names)"
        )
    kinds = sorted(different)
    trained = set(values["train"])
    missing = [kind for kind in kinds if kind not in trained]
    if len(kinds) < 2 or missing:
        fault = f"the labels {missing} do not occur in its training rows" if missing else f"only the label(s) {kinds}"
        raise ValueError(f"{source}: at least two classes are needed, each with training rows; {fault}")
    names = tuple(str(int(kind)) if isinstance(kind, float) else str(kind) for kind in kinds)
    return names, {kind: position for position, kind in enumerate(kinds)}
