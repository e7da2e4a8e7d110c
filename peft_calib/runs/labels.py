"""Which stored label is which class: learned from the training rows, applied to any other rows of the same kind."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from ..provenance.columns import MEND
from ..provenance.origins import at, is_missing

#: More different labels than this, in most rows a new one, are texts or measurements and not classes.
MOST_CLASSES = 20
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
#: A list of texts or numbers as `DataFrame.to_csv` writes it: `['a', 'b']`, `[0, 1]`, `[]`; not a word in brackets.
_ITEM = r"""('[^']*'|"[^"]*"|[-+]?\d+(\.\d*)?)"""
WRITTEN_LIST = re.compile(rf"\[\s*({_ITEM}((\s*,\s*|\s+){_ITEM})*\s*,?)?\s*\]")


@dataclass(frozen=True)
class LabelMap:
    """Class names in order, and pairs of a stored label and its class."""

    names: tuple[str, ...]
    values: tuple[tuple[Any, int], ...]

    @classmethod
    def learn(
        cls,
        labels: Sequence[Any],
        feature: object,
        source: str,
        label_names: Sequence[str] | None = None,
        rows: Dataset | None = None,
    ) -> LabelMap:
        """From training rows: names of a `ClassLabel` (`feature`) or `label_names`, or else the different labels."""
        names: tuple[str, ...] = ()
        index: dict[Any, int] = {}
        if label_names is not None:
            names = tuple(label_names)
            if len(set(names)) < max(len(names), 2):
                raise ValueError(f"label_names must be at least two different names, got {list(names)}")
            for stored in (int, str, names.__getitem__):
                index |= {stored(position): position for position in range(len(names))}
        elif isinstance(feature, ClassLabel):
            names = tuple(feature.names)
            index = {position: position for position in range(len(names))}
        for row, label in enumerate(labels):
            where = at(source, rows, row)
            check_one_label(label, row, where)
            fraction = isinstance(label, float) and not label.is_integer()
            if is_missing(label) or fraction or (index and label not in index):
                hint = f" ({', '.join(names)}, or an index below {len(names)})" if label_names is not None else ""
                mend = f"; {MEND}" if is_missing(label) else ""
                raise ValueError(
                    f"{where}: row {row} of train has the label {label!r}; a class is expected{hint}{mend}"
                )
        if not index:
            names, index = _found(labels, source)
        return cls(names, tuple(index.items()))

    @property
    def alike(self) -> list[tuple[str, ...]]:
        """Names that differ in blanks or capitals only, and so are probably meant as one class."""
        groups: dict[str, list[str]] = {}
        for name in self.names:
            groups.setdefault(" ".join(name.split()).casefold(), []).append(name)
        return [tuple(group) for group in groups.values() if len(group) > 1]

    def encode(
        self,
        labels: Sequence[Any],
        feature: object,
        source: str,
        split: str,
        rows: Dataset | None = None,
        unit: str = "row",
    ) -> list[int]:
        """Class index of each label; one may be stored in another form than in training, as 1, 1.0 or "1"."""
        if isinstance(feature, ClassLabel) and set(feature.names) == set(self.names):
            labels = [feature.names[label] if label is not None and label >= 0 else None for label in labels]
        index = {**{name: position for position, name in enumerate(self.names)}, **dict(self.values)}
        numbers = {float(value): position for value, position in self.values if not isinstance(value, str)}
        found = []
        for row, label in enumerate(labels):
            where = at(source, rows, row)
            check_one_label(label, row, where)
            position = index.get(label, index.get(_word(label)))
            number = _number(label)
            if position is None and number is not None:  # learned as numbers, stored here as words
                position = numbers.get(number)
            if position is None:
                mend = f"; {MEND}" if is_missing(label) else ""
                raise ValueError(
                    f"{where}: {unit} {row} of {split} has the label {label!r}; known are "
                    f"{', '.join(self.names)}{mend}"
                )
            found.append(position)
        return found

    def to_dict(self) -> dict[str, Any]:
        return {"names": list(self.names), "values": [list(pair) for pair in self.values]}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> LabelMap:
        return cls(tuple(state["names"]), tuple((value, int(index)) for value, index in state["values"]))


def _word(label: Any) -> Any:
    """A number in words; anything else as it is."""
    if isinstance(label, (bool, int)):
        return str(label)
    return str(int(label)) if isinstance(label, float) and label.is_integer() else label


def _number(label: Any) -> float | None:
    try:
        return float(label)
    except (TypeError, ValueError):
        return None


def check_one_label(label: Any, row: int, where: str) -> None:
    """Raise `ValueError` for a row of several labels, also where a CSV file holds the list as Python writes it."""
    written = isinstance(label, str) and WRITTEN_LIST.fullmatch(label.strip()) is not None
    if written or isinstance(label, (list, tuple, dict, np.ndarray)):
        raise ValueError(
            f"{where}: row {row} has several labels ({str(label)[:60]}); one class a row is expected. Several "
            "labels a row are learned with --task multi-label"
        )


def _found(labels: Sequence[Any], source: str) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The different labels as classes, in sorted order: their names, and the index of each."""
    different = set(labels)
    strings = sum(isinstance(label, str) for label in different)
    if 0 < strings < len(different):
        shown = ", ".join(repr(label) for label in sorted(different, key=str)[:5])
        raise ValueError(f"{source}: the labels mix strings and numbers ({shown}); use one kind")
    if len(different) > MOST_CLASSES and len(different) > len(labels) / 2:
        kind = "strings" if strings else "numbers"
        raise ValueError(
            f"{source}: {len(different)} different {kind} in {len(labels)} rows are no classes. Name the column of "
            "the labels, or map them to classes with label_names (a list of the class names)"
        )
    numbers = strings and all(NUMBER.fullmatch(label) for label in different)
    # labels that are written numbers stand in the order of numbers: 2 before 10, whatever the file's format
    kinds = sorted(different, key=(lambda label: (float(label), label)) if numbers else None)
    if len(kinds) < 2:
        raise ValueError(
            f"{source}: at least two classes are needed, each with training rows; only the label(s) {kinds}"
        )
    names = tuple(str(int(kind)) if isinstance(kind, float) else str(kind) for kind in kinds)
    return names, {kind: position for position, kind in enumerate(kinds)}
