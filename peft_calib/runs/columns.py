"""Columns of a user's table, checked and brought to one form: texts are texts, labels are class indices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from .origins import at, is_missing, select_rows

__all__ = ["Classes", "check_column", "classes_of", "texts_of", "without_missing"]

#: More different labels than this, in most rows a new one, are texts or measurements and not classes.
MOST_CLASSES = 20
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
#: A list of texts or numbers as `DataFrame.to_csv` writes it: `['a', 'b']`, `[0, 1]`, `[]`; not a word in brackets.
_ITEM = r"""('[^']*'|"[^"]*"|[-+]?\d+(\.\d*)?)"""
WRITTEN_LIST = re.compile(rf"\[\s*({_ITEM}((\s*,\s*|\s+){_ITEM})*\s*,?)?\s*\]")
#: What a row without a value needs.
MEND = "fill it in, or leave such rows out with --drop-missing"

#: Names of the classes, and the index of each stored label.
Classes = tuple[tuple[str, ...], dict[Any, int]]


def check_column(rows: Dataset, column: str, what: str, source: str) -> None:
    """Raise `ValueError` if the rows have no such column; the message names those they have."""
    if column in rows.column_names:
        return
    hint = ""
    if "messages" in rows.column_names and what == "text":
        hint = (
            ". A chat must be made a text first: write tokenizer.apply_chat_template(messages, tokenize=False) to a "
            "column of its own, or train with TRL's SFTTrainer, which takes our configurations"
        )
    elif {"prompt", "completion"} <= set(rows.column_names) and what == "text":
        hint = (
            ". Prompt and completion must be made one text first: write them, joined, to a column of its own, or "
            "train with TRL's SFTTrainer, which takes our configurations"
        )
    elif len(rows.column_names) == 1 and re.search(r"[^\w\s'-]", rows.column_names[0]):
        hint = ". If that is several columns, name what stands between them with --delimiter"
    raise ValueError(
        f"{source} has no column {column!r}; it has {', '.join(rows.column_names)}: say which one holds the {what}"
        + hint
    )


def texts_of(rows: Dataset, column: str, what: str, source: str) -> list[str]:
    """The texts of a column; whole numbers are read as their digits.

    Raises:
        ValueError: if there is no such column, or for the first value that is no text, or an empty one.
    """
    check_column(rows, column, what, source)
    values = rows[column][:]
    texts = []
    for row, value in enumerate(values):
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            value = str(value)
        if is_missing(value):
            raise ValueError(f"{at(source, rows, row)}: row {row} has no {what} ({value!r}); {MEND}")
        if isinstance(value, (list, dict)):
            chat = isinstance(value, list) and value and isinstance(value[0], dict) and "content" in value[0]
            mend = "make a chat one text with tokenizer.apply_chat_template" if chat else "join it to one text"
            raise ValueError(
                f"{at(source, rows, row)}: row {row} has a {type(value).__name__} for its {what} "
                f"({str(value)[:60]}); a text is expected: {mend}, in a column of its own"
            )
        if not isinstance(value, str):
            raise ValueError(
                f"{at(source, rows, row)}: row {row} has no {what} but the {type(value).__name__} {value!r}; write it "
                "as a text"
            )
        texts.append(value)
    return texts


def without_missing(rows: Dataset, columns: Sequence[str]) -> tuple[Dataset, int]:
    """Leave out the rows that lack a value in one of the columns.

    Returns:
        The other rows, and how many were left out.
    """
    present = [column for column in columns if column in rows.column_names]
    missing = np.zeros(len(rows), bool)
    for column in present:
        missing |= np.fromiter(map(is_missing, rows[column][:]), bool, len(rows))
    return (select_rows(rows, np.flatnonzero(~missing)) if missing.any() else rows), int(missing.sum())


def classes_of(
    values: Mapping[str, Sequence[Any]],
    feature: object,
    source: str,
    label_names: Sequence[str] | None = None,
    rows: Mapping[str, Dataset] | None = None,
) -> Classes:
    """Class names, and the index of each stored label.

    A `ClassLabel` column brings its names, `label_names` gives them; otherwise the different labels are the classes,
    in sorted order, numbers by their value.

    Args:
        values: split to labels; `train` is among them.
        feature: the column's feature.
        source: where the rows come from, for messages.
        label_names: names of the classes in order; labels are then these names or their indices.
        rows: split to the rows of the labels, for the lines in messages.

    Returns:
        The names and the index.

    Raises:
        ValueError: for labels that are missing, lists, fractions, of mixed kinds, free text, or not among the names,
            and for fewer than two classes.
    """
    declared = tuple(feature.names) if isinstance(feature, ClassLabel) else None
    if label_names is not None:
        names = tuple(label_names)
        if len(set(names)) < max(len(names), 2):
            raise ValueError(f"label_names must be at least two different names, got {list(names)}")
        index: dict[Any, int] = {position: position for position in range(len(names))}
        index |= {str(position): position for position in range(len(names))}
        index |= {name: position for position, name in enumerate(names)}
    elif declared is not None:
        names, index = declared, {position: position for position in range(len(declared))}
    else:
        index = {}
    for split, labels in values.items():
        for row, label in enumerate(labels):
            where = at(source, (rows or {}).get(split), row)
            check_one_label(label, row, where)
            fraction = isinstance(label, float) and not label.is_integer()
            if is_missing(label) or fraction or (index and label not in index):
                hint = f" ({', '.join(names)}, or an index below {len(names)})" if label_names is not None else ""
                mend = f"; {MEND}" if is_missing(label) else ""
                raise ValueError(
                    f"{where}: row {row} of {split} has the label {label!r}; a class is expected{hint}{mend}"
                )
    return (names, index) if index else _found(values, source)


def check_one_label(label: Any, row: int, where: str) -> None:
    """Raise `ValueError` for a row of several labels, also where a CSV file holds the list as Python writes it."""
    written = isinstance(label, str) and WRITTEN_LIST.fullmatch(label.strip()) is not None
    if written or isinstance(label, (list, tuple, dict, np.ndarray)):
        raise ValueError(
            f"{where}: row {row} has several labels ({str(label)[:60]}); one class a row is expected. Several "
            "labels a row are one question each: give every label a column of yes and no, and train a run for each, "
            "with --label-column"
        )


def _found(values: Mapping[str, Sequence[Any]], source: str) -> Classes:
    """The different labels as classes, in sorted order."""
    every = [label for labels in values.values() for label in labels]
    different = set(every)
    strings = sum(isinstance(label, str) for label in different)
    if 0 < strings < len(different):
        shown = ", ".join(repr(label) for label in sorted(different, key=str)[:5])
        raise ValueError(f"{source}: the labels mix strings and numbers ({shown}); use one kind")
    if len(different) > MOST_CLASSES and len(different) > len(every) / 2:
        kind = "strings" if strings else "numbers"
        raise ValueError(
            f"{source}: {len(different)} different {kind} in {len(every)} rows are no classes. Name the column of the "
            "labels, or map them to classes with label_names (a list of the class names)"
        )
    kinds = sorted(different, key=_by_value if strings and all(map(_is_number, different)) else None)
    trained = set(values["train"])
    missing = [kind for kind in kinds if kind not in trained]
    if len(kinds) < 2 or missing:
        fault = f"the labels {missing} do not occur in its training rows" if missing else f"only the label(s) {kinds}"
        raise ValueError(f"{source}: at least two classes are needed, each with training rows; {fault}")
    names = tuple(str(int(kind)) if isinstance(kind, float) else str(kind) for kind in kinds)
    return names, {kind: position for position, kind in enumerate(kinds)}


def _is_number(label: str) -> bool:
    return NUMBER.fullmatch(label) is not None


def _by_value(label: str) -> tuple[float, str]:
    """Labels that are written numbers stand in the order of numbers: 2 before 10, whatever the file's format."""
    return float(label), label
