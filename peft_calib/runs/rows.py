"""The rows of a run: trained on, calibrated on, tested on, and never two of these at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from ..provenance.columns import check_column, without_missing
from ..provenance.row_hashes import hash_rows
from ..provenance.splits import MAX_OVERLAP, RowSet, SplitRecord, calibration_split, check_unseen
from .settings import RunConfig
from .sources import FileFormat, read_splits, source_name
from .tasks import Task, task_class

#: A column that says where a row stood; as a number of rows it is no part of their hashes.
PLACE = "row_id"


@dataclass(frozen=True)
class RunRows:
    """What a run is trained and calibrated on, in canonical columns."""

    train: Dataset
    calibration: Dataset
    without_value: int = 0

    def to_dict(self) -> dict[str, Any]:
        """How many rows, and which (a digest of their contents)."""
        splits = {"train": self.train, "calibration": self.calibration}
        return {name: {"rows": len(rows), "digest": RowSet.of(rows).digest} for name, rows in splits.items()}


@dataclass(frozen=True)
class TestData:
    """Where to find rows to test on (the run's own if nothing is said), and which column says their groups."""

    __test__ = False  # the name begins like a test's

    source: Any = None
    subset: str | None = None
    split: str | None = None
    form: FileFormat = field(default_factory=FileFormat)
    drop_missing: bool = False
    group_column: str | None = None


@dataclass(frozen=True)
class TestRows:
    """Rows a finished run is measured on and has not seen, perhaps in groups; `keys` are hashes of their inputs.

    `cut` counts those that are longer than what the run reads, once that is known.
    """

    __test__ = False  # the name begins like a test's

    name: str
    rows: Dataset
    keys: np.ndarray
    left_out: int
    without_value: int = 0
    groups: tuple[Any, ...] | None = None
    cut: int = 0


def load_run_rows(config: RunConfig) -> tuple[Task, RunRows]:
    """The training rows, their classes, and calibration rows held out; equal inputs stay on one side of every cut."""
    splits = read_splits(config.data, config.subset, FileFormat(config.encoding, config.delimiter))
    task, train, without_value = learn_rows(config, splits)
    if config.test_fraction:
        train, _ = cut_rows(train, config.test_fraction, config.seed)
    train, calibration = cut_rows(train, config.calibration_fraction, config.seed)
    return task, RunRows(limited(train, config), calibration, without_value)


def learn_rows(config: RunConfig, splits: DatasetDict) -> tuple[Task, Dataset, int]:
    """The task with the classes of the training rows, these rows in canonical columns, and how many lacked a value."""
    kind = task_class(config.task)
    rows, without_value = filled(
        _split(splits, config.train_split, config.data), kind, config, config.data, config.drop_missing
    )
    task = kind.learn(config, rows)
    return task, task.canonical(rows, config.data, config.train_split), without_value


def limited(rows: Dataset, config: RunConfig) -> Dataset:
    """At most `max_train_rows` of the training rows, a random choice by class."""
    if config.max_train_rows is None or config.max_train_rows >= len(rows):
        return rows
    return cut_rows(rows, config.max_train_rows / len(rows), config.seed)[1]


def load_test_rows(
    task: Task, record: SplitRecord, where: TestData | None = None, purpose: str = "reported on"
) -> TestRows:
    """Rows to report on: those named, or the run's own; rows of which it has seen more than 5 % are refused.

    `purpose` is what they are for, in messages. Without a split: what the run held out (`test_fraction`), a labelled
    `test`, or else `validation`; a source of one split stands for itself.
    """
    config, where = task.config, where or TestData()
    given, subset, form = where.source, where.subset, where.form
    if given is None:
        given, subset = config.data, subset or config.subset
        form = FileFormat(form.encoding or config.encoding, form.delimiter or config.delimiter)
    own = where.source is None and subset == config.subset  # another subset of the run's data is other rows
    splits, source = read_splits(given, subset, form), source_name(given)
    if subset is not None and (source, subset) != (config.data, config.subset):
        source = f"{source}, {subset}"
    held_out = own and where.split is None and config.test_fraction > 0
    chosen = config.train_split if held_out else where.split or _default_split(splits, config, source, own)
    drop = where.drop_missing or config.drop_missing
    rows, without_value = filled(_split(splits, chosen, source), type(task), config, source, drop)
    canonical = task.canonical(rows, source, chosen)
    groups = None
    if where.group_column is not None:
        check_column(rows, where.group_column, "group", source)
        groups = rows[where.group_column][:]
        canonical = canonical.add_column(PLACE, list(range(len(canonical))))
    if held_out:
        name, canonical = f"{source} (held out)", cut_rows(canonical, config.test_fraction, config.seed)[1]
    else:
        name = source if len(splits) == 1 else f"{source} ({chosen})"
    found = replace(without_seen_rows(name, canonical, record, purpose), without_value=without_value)
    if groups is None:
        return found
    of_rows = tuple(groups[place] for place in found.rows[PLACE])
    return replace(found, rows=found.rows.remove_columns(PLACE), groups=of_rows)


def load_outside_rows(task: Task, source: Any, form: FileFormat, drop_missing: bool = False) -> TestRows:
    """Rows of other origin than the training rows, whose labels, if they have some, are not read."""
    splits, name = read_splits(source, form=form), source_name(source)
    chosen = "test" if "test" in splits else next(iter(splits))
    given = task.with_any_label(_split(splits, chosen, name))
    rows, without_value = filled(given, type(task), task.config, name, drop_missing)
    canonical = task.canonical(rows, name, chosen)
    return TestRows(name, canonical, hash_rows(canonical)[1], 0, without_value)


def without_seen_rows(name: str, rows: Dataset, record: SplitRecord, purpose: str = "reported on") -> TestRows:
    """Leave out the few rows that a run has seen by chance; refuse rows of which it has seen many."""
    kind, keys = hash_rows(rows)
    known = [s[kind].hashes for s in (record.trained_on, record.calibrated_on) if kind in s]
    seen = np.isin(keys, np.concatenate(known)) if known else np.zeros(len(keys), bool)
    if seen.sum() > MAX_OVERLAP * len(rows):
        check_unseen(record, rows, purpose)  # says which rows and what to do
        raise ValueError(
            f"{seen.sum()} of the {len(rows)} rows to be {purpose} are among those that the run was trained or "
            "calibrated on: the result would flatter. Name rows that were held out."
        )
    kept = np.flatnonzero(~seen)
    return TestRows(name, rows.select(kept), keys[kept], int(seen.sum()))


def _split(splits: DatasetDict, name: str, source: str) -> Dataset:
    if name not in splits:
        raise ValueError(f"{source} has no split {name!r}; it has {', '.join(splits)}")
    if not len(splits[name]):
        raise ValueError(f"the split {name!r} of {source} is empty: it holds no row")
    return splits[name]


def filled(rows: Dataset, kind: type[Task], config: RunConfig, source: str, drop: bool) -> tuple[Dataset, int]:
    """The rows without those that lack a value, where that was asked for."""
    if not drop:
        return rows, 0
    kept, count = without_missing(rows, kind.columns(config))
    if not len(kept):
        raise ValueError(
            f"{source}: none of its {count} rows has a value in each of {', '.join(kind.columns(config))}"
        )
    return kept, count


def _default_split(splits: DatasetDict, config: RunConfig, source: str, own: bool) -> str:
    if len(splits) == 1 and not own:
        return next(iter(splits))
    name = labelled_test_split(splits, config)
    if name is not None:
        return name
    raise ValueError(
        f"{source} has no labelled split 'test' or 'validation' (it has {', '.join(splits)}): name rows to test on "
        "with --data or --split, or train with --test-fraction"
    )


def labelled_test_split(splits: DatasetDict, config: RunConfig) -> str | None:
    """The split that a source brings to test on: `test`, or `validation` where the labels of that are withheld."""
    given = (name for name in ("test", "validation") if name in splits)
    return next((name for name in given if not is_hidden(splits[name], config.label_column)), None)


def is_hidden(rows: Dataset, column: str) -> bool:
    """Whether every label is withheld, as in GLUE's test splits."""
    return column in rows.column_names and all(label in (-1, "-1", None) for label in rows[column][:])


def cut_rows(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a share of the rows by class; rows with equal inputs stay on one side."""
    if round(fraction * len(rows)) < 1:
        raise ValueError(
            f"{len(rows)} rows are too few to hold out a share of {fraction:.3g}: bring more, or hold out "
            "another share"
        )
    return calibration_split(rows, fraction, seed, "label" if "label" in rows.column_names else None)
