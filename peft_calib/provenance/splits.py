"""Which rows an adapter has seen: a calibration split without leaks, recorded with the adapter, checked before use.

A temperature fitted on training rows, or a report on rows that something was fitted on, flatters. So a split is cut by
content, equal inputs on the same side; what an adapter was trained and calibrated on is written beside it as 64-bit
row hashes; and whoever fits or reports asks here first.
"""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..calibration.fingerprint import SplitFingerprint
from ..files import write_atomically
from ..json_files import Fields, parse_json, read_json, sealed
from .companions import attach_file, attached_file
from .row_hashes import hash_rows
from .row_tables import as_rows, pick_rows

#: Name of the record beside an adapter.
SPLIT_FILE = "calibration_split.json"
#: Share of rows that two sets may have in common: chance duplicates, not a re-used split.
MAX_OVERLAP = 0.05
FORMAT_VERSION = 1


@dataclass(frozen=True)
class RowSet:
    """A set of rows, known by the hashes of their inputs.

    Attributes:
        kind: What was hashed: `"tokens"`, or the names of the columns; only sets of one kind can be compared.
        hashes: Sorted uint64 hashes, (N,), one a row.
    """

    kind: str
    hashes: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, rows: Any) -> RowSet:
        """The set of a `datasets.Dataset`, of a data frame or another table, or of any sequence of rows.

        Args:
            rows: A `datasets.Dataset`, a table, or rows as mappings; labels and row numbers do not count.

        Raises:
            TypeError: If these are no rows (a `DatasetDict`, a stream), or they hold values that cannot be hashed.
            ValueError: If there is no row.
        """
        kind, hashes = hash_rows(rows)
        return cls(kind, np.sort(hashes))

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the sorted hashes; the same for the same rows in any order."""
        return SplitFingerprint.of_hashes(self.hashes).digest

    def __len__(self) -> int:
        return len(self.hashes)

    def overlap(self, other: RowSet) -> int:
        """Number of this set's rows whose inputs are in the other set too.

        Raises:
            ValueError: If the sets are of different kinds.
        """
        if self.kind != other.kind:
            raise ValueError(
                f"Rows known by {self.kind!r} cannot be compared with rows known by {other.kind!r}: hash both sets in "
                "the same form, either both tokenised or both as they were loaded."
            )
        return int(np.isin(self.hashes, other.hashes).sum())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; eleven bytes a row."""
        packed = base64.b64encode(self.hashes.astype("<u8").tobytes()).decode("ascii")
        return {"kind": self.kind, "num_rows": len(self), "digest": self.digest, "hashes": packed}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any] | Fields) -> RowSet:
        """The inverse of `to_dict`.

        Raises:
            ValueError: If the hashes do not have the recorded digest.
        """
        fields = state if isinstance(state, Fields) else Fields(state, SPLIT_FILE)
        try:
            hashes = np.frombuffer(base64.b64decode(fields.text("hashes"), validate=True), "<u8").astype(np.uint64)
        except ValueError:
            raise fields.wrong("hashes", "base64 of 64-bit hashes") from None
        found = cls(fields.text("kind"), hashes)
        if found.digest != fields.text("digest"):
            raise ValueError(
                f"{fields.source}: the record of a split is damaged, its {len(found)} row hashes do not have its "
                f"digest. {fields.mend}."
            )
        if fields.integer("num_rows", least=1) != len(found):
            raise fields.wrong("num_rows", f"{len(found)}, the number of its hashes")
        return found


@dataclass
class SplitRecord:
    """What an adapter was trained on and what was fitted on, each as row sets by kind.

    Attributes:
        trained_on: Rows that gradients came from.
        calibrated_on: Rows that a temperature, or whatever else, was fitted on, or a checkpoint chosen by.
    """

    trained_on: dict[str, RowSet] = field(default_factory=dict)
    calibrated_on: dict[str, RowSet] = field(default_factory=dict)

    def to_json(self) -> str:
        """The record as JSON."""
        parts = {
            name: {kind: rows.to_dict() for kind, rows in getattr(self, name).items()}
            for name in ("trained_on", "calibrated_on")
        }
        return json.dumps(sealed({"format_version": FORMAT_VERSION, **parts}), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> SplitRecord:
        """The inverse of `to_json`.

        Raises:
            ValueError: If the text is no record of this format.
        """
        return cls._from_fields(parse_json(text, SPLIT_FILE))

    @classmethod
    def _from_fields(cls, state: Fields) -> SplitRecord:
        if not state.has_version(FORMAT_VERSION):
            raise state.wrong("format_version", f"{FORMAT_VERSION}, which this release reads")
        parts = {}
        for name in ("trained_on", "calibrated_on"):
            sets = state.mapping(name)
            parts[name] = {kind: RowSet.from_dict(sets.mapping(kind)) for kind in sets}
        state.check_seal()
        return cls(**parts)


def calibration_split(
    dataset: Any, fraction: float = 0.1, seed: int = 0, stratify_by: str | None = None
) -> tuple[Any, Any]:
    """Cut a calibration split out of training rows, with no input on both sides of the cut.

    Rows with equal inputs stay together, whatever their labels. Which side a row falls on depends on its content and
    the seed, so the order of the rows does not matter; each side keeps it.

    Args:
        dataset: A `datasets.Dataset`; a pandas or polars data frame or a pyarrow table, whose index does not count; or
            any sequence of rows (mappings).
        fraction: Share of the rows to hold out, in (0, 1).
        seed: Key of the cut.
        stratify_by: Column whose values keep their shares on both sides, such as the label.

    Returns:
        The training and the calibration rows: datasets for a dataset, frames for a frame, lists for another sequence.

    Raises:
        TypeError: If these are no rows (a `DatasetDict`, a stream), or they hold values that cannot be hashed.
        ValueError: If the fraction is out of range, the column is unknown, or one side would be empty.

    Example:
        >>> rows = [{"text": f"row {i % 8}", "label": i % 2} for i in range(10)]
        >>> train, calibration = calibration_split(rows, fraction=0.3)
        >>> len(train), len(calibration)
        (7, 3)
        >>> {row["text"] for row in train} & {row["text"] for row in calibration}
        set()
    """
    if not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction!r}.")
    rows = as_rows(dataset)
    _, hashes = hash_rows(rows)
    strata = None if stratify_by is None else _strata(rows, stratify_by)
    inside = held_out_rows(hashes, fraction, seed, strata)
    return pick_rows(dataset, np.flatnonzero(~inside)), pick_rows(dataset, np.flatnonzero(inside))


def held_out_rows(hashes: np.ndarray, fraction: float, seed: int, strata: np.ndarray | None = None) -> np.ndarray:
    """`(N,)` bool, which rows of these hashes are held out: rows of equal inputs on one side, see `calibration_split`.

    Raises:
        ValueError: If all rows have the same input.
    """
    groups, first, group_of_row, sizes = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    if len(groups) < 2:
        raise ValueError(
            f"All {len(hashes)} rows have the same input, so no split can keep training and calibration rows apart."
        )
    strata = np.zeros(len(hashes), np.int64) if strata is None else strata
    order = np.argsort(_keyed(groups, seed), kind="stable")
    held_out = np.zeros(len(groups), bool)
    for stratum in np.unique(strata):
        members = order[strata[first[order]] == stratum]
        held_out[_fill(members, sizes, fraction)] = True
    if held_out.all() or not held_out.any():
        # strata too small to be cut one by one
        held_out[:] = False
        held_out[_fill(order, sizes, fraction) or int(np.argmin(sizes))] = True  # at least one input
    return held_out[group_of_row]


def distinct_rows(hashes: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Ascending places of one row of each input, the first that has its label.

    Rows of equal inputs are one observation. Where their labels differ, one of these is drawn, in proportion to how
    often it occurs, by a key of input and seed: the first would hang on how the table is sorted.

    Example:
        >>> distinct_rows(np.array([7, 8, 7, 9], np.uint64), np.array([0, 1, 0, 1]), seed=0).tolist()
        [0, 1, 3]
    """
    order = np.lexsort((np.arange(len(hashes)), labels, hashes))
    inputs, start, counts = np.unique(hashes[order], return_index=True, return_counts=True)
    drawn = start + (_keyed(inputs, seed) % counts.astype(np.uint64)).astype(np.int64)
    begins = np.ones(len(order), bool)
    begins[1:] = (np.diff(hashes[order]) != 0) | (np.diff(labels[order]) != 0)
    first = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    return np.sort(order[first[drawn]])


def record_split(
    target: nn.Module | str | Path,
    *,
    trained_on: Any = None,
    calibrated_on: Any = None,
    adapter_name: str | None = None,
) -> SplitRecord:
    """Record which rows an adapter was trained on and calibrated on.

    Args:
        target: A model with an adapter: the record is written beside it at every save, by whomever (Trainer
            checkpoints, `save_pretrained`, `push_to_hub`). Or the folder of a saved adapter: it is written at once.
        trained_on: Training rows or their `RowSet`; may be given in several calls and forms (texts, tokens).
        calibrated_on: Rows that something was fitted on after training, or a checkpoint was chosen by.
        adapter_name: Adapter of the model; the active one when `None`.

    Returns:
        The record as it now is.

    Raises:
        ValueError: If calibration rows are among the training rows (see `check_unseen`), or known in another form.
        TypeError: If the model has no adapter.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> record = record_split(folder, trained_on=[{"text": "a"}], calibrated_on=[{"text": "b"}])
        >>> len(read_split(folder).calibrated_on["text"])
        1
    """
    record = read_split(target, adapter_name)
    for name, rows in (("trained_on", trained_on), ("calibrated_on", calibrated_on)):
        if rows is not None:
            given = rows if isinstance(rows, RowSet) else RowSet.of(rows)
            getattr(record, name)[given.kind] = given
    for kind, rows in record.calibrated_on.items():
        if record.trained_on:
            # of another form, `overlap` refuses to compare them
            known = record.trained_on.get(kind) or next(iter(record.trained_on.values()))
            _refuse_overlap(rows, known, "calibrated on", "trained on")
    if isinstance(target, nn.Module):
        attach_file(target, SPLIT_FILE, record.to_json(), adapter_name)
    else:
        write_atomically(Path(target) / SPLIT_FILE, record.to_json())
    return record


def read_split(target: nn.Module | str | Path, adapter_name: str | None = None) -> SplitRecord:
    """The record of an adapter; empty where there is none.

    Args:
        target: A model that `record_split` was called on, or the folder of a saved adapter.
        adapter_name: Adapter of the model.

    Raises:
        ValueError: If the file is damaged or of another format.
    """
    if isinstance(target, nn.Module):
        text = attached_file(target, SPLIT_FILE, adapter_name)
        return SplitRecord() if text is None else SplitRecord.from_json(text)
    path = Path(target) / SPLIT_FILE
    return SplitRecord._from_fields(read_json(path)) if path.is_file() else SplitRecord()


def check_unseen(
    target: nn.Module | str | Path | SplitRecord, rows: Any, purpose: str = "reported on", *, fitting: bool = False
) -> int:
    """Refuse rows that an adapter has seen.

    Args:
        target: A model, a folder or a record.
        rows: The rows, or their `RowSet`.
        purpose: What they are wanted for, for the message.
        fitting: Whether something is fitted on them: then only training rows matter. A report needs rows that are in
            neither set.

    Returns:
        The number of rows in common, at most 5 % of the rows; a warning names it unless it is zero.

    Raises:
        ValueError: If more than 5 % of the rows were seen, or the record knows its rows in another form only.

    Example:
        >>> record = SplitRecord(trained_on={"text": RowSet.of([{"text": "a"}])})
        >>> check_unseen(record, [{"text": "b", "label": 0}])
        0
    """
    record = target if isinstance(target, SplitRecord) else read_split(target)
    given = rows if isinstance(rows, RowSet) else RowSet.of(rows)
    seen = 0
    for verb, known in (("trained on", record.trained_on), ("calibrated on", record.calibrated_on)):
        if verb == "calibrated on" and fitting:
            continue
        if known and given.kind not in known:
            given.overlap(next(iter(known.values())))  # says that the forms differ
        if known:
            seen += _refuse_overlap(given, known[given.kind], purpose, verb)
    return seen


def _refuse_overlap(rows: RowSet, known: RowSet, purpose: str, verb: str) -> int:
    common = rows.overlap(known)
    if common > MAX_OVERLAP * len(rows):
        raise ValueError(
            f"{common} of the {len(rows)} rows to be {purpose} are among the {len(known)} that the adapter was {verb} "
            f"(split {known.digest[:12]}): the result would flatter. Hold rows out before training: train, "
            "calibration = peft_calib.calibration_split(dataset)."
        )
    if common:
        warnings.warn(
            f"{common} of the {len(rows)} rows to be {purpose} occur among those that the adapter was {verb}: few "
            "enough to be duplicates by chance.",
            UserWarning,
            stacklevel=3,
        )
    return common


def _fill(members: np.ndarray, sizes: np.ndarray, fraction: float) -> list[int]:
    """Groups, in the given order, whose rows make up a fraction of all; at least one group stays out."""
    wanted = max(1, round(fraction * int(sizes[members].sum())))
    taken: list[int] = []
    rows = 0
    for group in members:
        if rows + sizes[group] <= wanted and len(taken) < len(members) - 1:
            taken.append(int(group))
            rows += int(sizes[group])
            if rows == wanted:
                break
    if not taken and len(members) > 1 and fraction * int(sizes[members].sum()) >= 0.5:
        taken = [int(members[np.argmin(sizes[members])])]
    return taken


def _keyed(values: np.ndarray, seed: int) -> np.ndarray:
    """Unrelated pseudo-random numbers for each seed, one a value (splitmix64)."""
    with np.errstate(over="ignore"):
        x = values + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _strata(dataset: Any, column: str) -> np.ndarray:
    names = getattr(dataset, "column_names", None) or (list(dataset[0]) if isinstance(dataset[0], Mapping) else [])
    if column not in names:
        raise ValueError(f"stratify_by={column!r} is no column of the data; it has {', '.join(map(str, names))}.")
    values = dataset[column] if hasattr(dataset, "column_names") else [row[column] for row in dataset]
    return np.unique(np.asarray([str(value) for value in values]), return_inverse=True)[1]
