"""Text classification data for a calibration study: train, calibration and test rows that share no text.

One function serves the embedded data set, a user's own CSV, JSON lines or Parquet file, and any Hub data set. The
calibration split is cut out of the training rows: whatever is fitted after training (a temperature, say) is fitted
there, never on the rows it is reported on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from peft_calib.runs.columns import check_column, check_one_label, classes_of, texts_of, without_missing
from peft_calib.runs.origins import at
from peft_calib.runs.sources import FileFormat, read_splits, source_name

from .sentences import CLASSES, documentation_sentences

__all__ = ["DOCUMENTATION", "TextData", "load_text_data"]

DOCUMENTATION = "documentation"  # the name of the embedded data set
#: Labels of a split whose answers are withheld.
WITHHELD = {-1, "-1", None}


@dataclass(frozen=True)
class TextData:
    """Splits with the columns ``text`` (``text_pair`` where two were named) and ``label`` (a class index).

    Attributes:
        name: where the rows came from.
        train, calibration, test: the three splits; no text occurs in two of those that were cut here.
        label_names: the name of each class index.
        outside: texts from another distribution, without labels, or ``None``.
        left_out: rows without a text or a label that were left out.
    """

    name: str
    train: Dataset
    calibration: Dataset
    test: Dataset
    label_names: tuple[str, ...]
    outside: Dataset | None = None
    left_out: int = 0


def load_text_data(
    source: Any = DOCUMENTATION,
    *,
    text_column: str | Sequence[str] = "text",
    label_column: str = "label",
    subset: str | None = None,
    outside: Any = None,
    calibration_fraction: float = 0.2,
    test_fraction: float = 0.2,
    max_train_rows: int | None = None,
    seed: int = 0,
    encoding: str | None = None,
    delimiter: str | None = None,
    drop_missing: bool = False,
) -> TextData:
    """Load text classification data and hold out what a calibration study needs.

    Splits that the source brings are kept: ``test`` (or, if its labels are hidden, ``validation``) is the test set,
    and ``validation`` the calibration set where both are labelled. What is missing is cut out of ``train``, by class
    and with a private generator; equal texts stay together.

    Args:
        source: ``"documentation"`` (embedded, no network), the path of a .csv, .tsv, .json, .jsonl or .parquet file or
            of a folder of such files, the id of a Hub data set, or a table in memory (a data frame, a
            ``datasets.Dataset`` or ``DatasetDict``, a list of rows).
        text_column: the column of the text, or two columns for sentence pairs.
        label_column: the column of the label: strings, integers or a ``ClassLabel``.
        subset: configuration name of a Hub data set, such as ``"sst2"`` of ``"nyu-mll/glue"``.
        outside: a source of out-of-distribution texts with the same text column; the embedded set brings its own.
        calibration_fraction: share of the training rows held out for calibration, in (0, 1).
        test_fraction: share of all rows held out for the test, in (0, 1), where the source has no test split.
        max_train_rows: keep at most this many training rows (a random choice by class), after the cuts.
        seed: seed of the cuts.
        encoding: of text files that are not UTF-8, such as ``"cp1252"``.
        delimiter: of CSV files whose delimiter cannot be found from their rows.
        drop_missing: leave out rows that lack a text or a label, instead of refusing them.

    Returns:
        The three splits with class names.

    Raises:
        ValueError: if a column is missing, a text or a label is empty, there are fewer than two classes, a fraction
            is out of range, a file has an unknown type, or a split would have no row.
        FileNotFoundError: if the path of a file does not exist.

    Example:
        >>> data = load_text_data("documentation", seed=0)
        >>> len(data.train), len(data.calibration), len(data.test), len(data.label_names)
        (1050, 700, 1750, 7)
    """
    for name, value in (("calibration_fraction", calibration_fraction), ("test_fraction", test_fraction)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    if isinstance(source, (str, Path)) and str(source) == DOCUMENTATION:
        return _documentation(seed, max_train_rows)
    columns = [text_column] if isinstance(text_column, str) else list(text_column)
    form, name = FileFormat(encoding, delimiter), source_name(source)
    found, left_out = read_splits(source, subset, form), 0
    if drop_missing:
        found, left_out = _filled(found, [*columns, label_column])
    splits, label_names = _labelled(found, columns, label_column, name)
    rng = np.random.default_rng(seed)
    train = splits["train"]
    held_out = [splits[name] for name in ("validation", "test") if name in splits]
    test = held_out.pop() if held_out else None
    if test is None:
        train, test = _cut(train, test_fraction, rng)
    calibration = held_out.pop() if held_out else None
    if calibration is None:
        train, calibration = _cut(train, calibration_fraction, rng)
    if max_train_rows is not None and max_train_rows < len(train):
        _, train = _cut(train, max_train_rows / len(train), rng)
    other = None
    if outside is not None:
        apart = DatasetDict(test=_first_split(read_splits(outside, form=form)))
        apart = _filled(apart, columns)[0] if drop_missing else apart
        other = _texts(apart["test"], columns, source_name(outside))
    return TextData(name, train, calibration, test, label_names, other, left_out)


def _documentation(seed: int, max_train_rows: int | None) -> TextData:
    """The embedded set: of each library's 500 sentences, 250 are tested on, 100 calibrated on, 150 trained on."""
    inside, outside = documentation_sentences(per_library=500, outside=200)
    names = tuple(library.label for library in CLASSES)
    labels = [names.index(row.label) for row in inside]
    rows = Dataset.from_dict({"text": [row.text for row in inside], "label": labels})
    rng = np.random.default_rng(seed)
    rest, test = _cut(rows, 1 / 2, rng)
    train, calibration = _cut(rest, 2 / 5, rng)
    if max_train_rows is not None and max_train_rows < len(train):
        _, train = _cut(train, max_train_rows / len(train), rng)
    return TextData(
        DOCUMENTATION, train, calibration, test, names, Dataset.from_dict({"text": [r.text for r in outside]})
    )


def _first_split(data: DatasetDict) -> Dataset:
    return data["test"] if "test" in data else data[next(iter(data))]


def _filled(splits: DatasetDict, columns: list[str]) -> tuple[DatasetDict, int]:
    """The splits without rows that lack a value; a split whose every label is withheld stays, to be recognised."""
    parts = {name: without_missing(rows, columns) for name, rows in splits.items()}
    kept = {name: (rows, count) if len(rows) else (splits[name], 0) for name, (rows, count) in parts.items()}
    return DatasetDict({name: rows for name, (rows, _) in kept.items()}), sum(count for _, count in kept.values())


def _texts(rows: Dataset, columns: list[str], source: str) -> Dataset:
    """The text columns under their canonical names, checked."""
    if not 1 <= len(columns) <= 2:
        raise ValueError(f"text_column names one column, or two for sentence pairs; got {columns}")
    named = zip(("text", "text_pair"), columns, strict=False)
    texts = {name: texts_of(rows, column, "text", source) for name, column in named}
    return Dataset.from_dict(texts)


def _labelled(
    data: DatasetDict, columns: list[str], label_column: str, source: str
) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """Every labelled split with canonical columns, and the class names."""
    for rows in data.values():
        check_column(rows, label_column, "label", source)
    if "train" not in data:
        raise ValueError(f"{source} has no split 'train'; it has {', '.join(data)}")
    values = {split: rows[label_column][:] for split, rows in data.items() if split in ("train", "validation", "test")}
    for split, labels in values.items():
        for row, label in enumerate(labels):
            check_one_label(label, row, at(source, data[split], row))
    hidden = {split for split, labels in values.items() if split != "train" and set(labels) <= WITHHELD}
    values = {split: labels for split, labels in values.items() if split not in hidden}
    names, index = classes_of(values, data["train"].features[label_column], source, rows=data)
    splits = {
        split: _texts(data[split], columns, source).add_column("label", [index[label] for label in labels])
        for split, labels in values.items()
    }
    return splits, names


def _cut(rows: Dataset, fraction: float, rng: np.random.Generator) -> tuple[Dataset, Dataset]:
    """Split off ``fraction`` of the distinct texts of every class; rows of equal text stay together."""
    keys = (
        list(zip(rows["text"][:], rows["text_pair"][:], strict=True))
        if "text_pair" in rows.column_names
        else rows["text"][:]
    )
    groups: dict[object, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    labels = rows["label"][:]
    by_class: dict[int, list[list[int]]] = {}
    for members in groups.values():
        by_class.setdefault(labels[members[0]], []).append(members)
    cut: list[int] = []
    for label in sorted(by_class):
        texts = by_class[label]
        for position in rng.permutation(len(texts))[: round(fraction * len(texts))]:
            cut += texts[position]
    chosen = set(cut)
    rest = [row for row in range(len(rows)) if row not in chosen]
    if not cut or not rest:
        raise ValueError(
            f"{len(rows)} rows are too few to hold out a share of {fraction:.3g}: "
            "bring more, or hold out another share"
        )
    return rows.select(rest), rows.select(sorted(cut))
