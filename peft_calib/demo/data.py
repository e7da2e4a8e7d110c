"""Text classification data for a calibration study: train, calibration and test rows that share no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from ..runs.embedded import DOCUMENTATION as EMBEDDED
from ..runs.embedded import OUTSIDE
from ..runs.rows import cut_rows, filled, is_hidden, learn_rows, limited, load_outside_rows
from ..runs.settings import RunConfig
from ..runs.sources import FileFormat, read_splits, source_name
from ..runs.tasks import Task

DOCUMENTATION = "documentation"  # what the embedded data set is called here
#: Of its 500 sentences a library, 250 are tested on, 100 calibrated on, 150 trained on.
EMBEDDED_FRACTIONS: dict[str, Any] = {"test_fraction": 0.5, "calibration_fraction": 0.4}


@dataclass(frozen=True)
class TextData:
    """Splits with `text` (`text_pair`) and `label`, class names, texts of other origin, and rows left out."""

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

    Splits that the source brings are kept: `test` (or, if its labels are hidden, `validation`) is the test set,
    and `validation` the calibration set where both are labelled. What is missing is cut out of `train`, by class
    and with a private generator; equal texts stay together.

    Args:
        source: `"documentation"` (embedded, no network), the path of a .csv, .tsv, .json, .jsonl or .parquet file or
            of a folder of such files, the id of a Hub data set, or a table in memory (a data frame, a
            `datasets.Dataset` or `DatasetDict`, a list of rows).
        text_column: The column of the text, or two columns for sentence pairs.
        label_column: The column of the label: strings, integers or a `ClassLabel`.
        subset: Configuration name of a Hub data set, such as `"sst2"` of `"nyu-mll/glue"`.
        outside: A source of out-of-distribution texts with the same text column; the embedded set brings its own.
        calibration_fraction: Share of the training rows held out for calibration, in (0, 1).
        test_fraction: Share of all rows held out for the test, in (0, 1), where the source has no test split.
        max_train_rows: Keep at most this many training rows (a random choice by class), after the cuts.
        seed: Seed of the cuts.
        encoding: Of text files that are not UTF-8, such as `"cp1252"`.
        delimiter: Of CSV files whose delimiter cannot be found from their rows.
        drop_missing: Leave out rows that lack a text or a label, instead of refusing them.

    Returns:
        The three splits with class names.

    Raises:
        ValueError: If a column is missing, a text or a label is empty, there are fewer than two classes, a fraction
            is out of range, a file has an unknown type, or a split would have no row.
        FileNotFoundError: If the path of a file does not exist.

    Example:
        >>> data = load_text_data("documentation", seed=0)
        >>> len(data.train), len(data.calibration), len(data.test), len(data.label_names)
        (1050, 700, 1750, 7)
    """
    if not test_fraction > 0:
        raise ValueError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    fractions: dict[str, Any] = {"test_fraction": test_fraction, "calibration_fraction": calibration_fraction}
    source, outside, fractions = with_embedded(source, outside, fractions)
    columns = [text_column] if isinstance(text_column, str) else [*text_column]
    config = RunConfig(
        data=source_name(source), model="any", text_column=columns, label_column=label_column,
        max_train_rows=max_train_rows, seed=seed, drop_missing=drop_missing, **fractions,
    )  # fmt: skip
    form = FileFormat(encoding, delimiter)
    splits = read_splits(source, subset, form)
    task, train, left_out = learn_rows(config, splits)
    train, calibration, test, lacking = _held_out(splits, train, task, config)
    other = None
    if outside is not None:
        other = load_outside_rows(task, outside, form, drop_missing).rows.remove_columns("label")
    assert task.labels is not None
    name = config.data.removeprefix("embedded:")
    return TextData(name, train, calibration, test, task.labels.names, other, left_out + lacking)


def _held_out(
    splits: DatasetDict, train: Dataset, task: Task, config: RunConfig
) -> tuple[Dataset, Dataset, Dataset, int]:
    """Train, calibration and test rows, and rows left out: labelled splits of the source, or cuts of `train`."""
    given, left_out = [], 0
    for name in ("validation", "test"):
        if name in splits and not is_hidden(splits[name], config.label_column):
            rows, count = filled(splits[name], type(task), config, config.data, config.drop_missing)
            given.append(task.canonical(rows, config.data, name))
            left_out += count
    found = []
    for fraction in (config.test_fraction, config.calibration_fraction):
        if given:
            rows = given.pop()
        else:
            train, rows = cut_rows(train, fraction, config.seed)
        found.append(rows)
    test, calibration = found
    return limited(train, config), calibration, test, left_out


def with_embedded(source: Any, outside: Any, fractions: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Source, texts of other origin and shares to hold out, where `"documentation"` stands for the embedded set."""
    if not isinstance(source, (str, Path)) or str(source) != DOCUMENTATION:
        return source, outside, fractions
    return EMBEDDED, OUTSIDE if outside is None else outside, EMBEDDED_FRACTIONS
