"""Which stored label is which class: learned from the training rows, applied to any other rows of the same kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset

from .columns import MEND, check_one_label, classes_of
from .origins import at, is_missing

__all__ = ["LabelMap"]


@dataclass(frozen=True)
class LabelMap:
    """Class names in order, and the class of each stored label.

    Attributes:
        names: name of each class.
        values: stored label and its class, in pairs.

    Example:
        >>> labels = LabelMap.learn(["no", "yes", "no"], None, "rows.csv")
        >>> labels.names, labels.encode(["yes"], None, "test.csv", "train")
        (('no', 'yes'), [1])
    """

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
        """From the labels of the training rows.

        Args:
            labels: stored labels.
            feature: the column's feature; a `ClassLabel` brings its names.
            source: where the rows come from, for messages.
            label_names: names of the classes in order, where the user gave them.
            rows: the rows of the labels, for the lines in messages.

        Raises:
            ValueError: for labels that are no classes, see `classes_of`.
        """
        names, index = classes_of(
            {"train": labels}, feature, source, label_names, None if rows is None else {"train": rows}
        )
        return cls(names, tuple(index.items()))

    def encode(
        self,
        labels: Sequence[Any],
        feature: object,
        source: str,
        split: str,
        rows: Dataset | None = None,
        unit: str = "row",
    ) -> list[int]:
        """Class index of each label.

        A label may be stored in another form than the training rows had it, as 1, 1.0 or "1".

        Args:
            labels: stored labels.
            feature: the column's feature.
            source: where the rows come from, for messages.
            split: name of the split, for messages.
            rows: the rows of the labels, for the lines in messages.
            unit: what has one label, for messages.

        Raises:
            ValueError: for a label that the training rows did not have.
        """
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
        """Plain values for JSON."""
        return {"names": list(self.names), "values": [list(pair) for pair in self.values]}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> LabelMap:
        """The inverse of `to_dict`."""
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
