"""Which stored label is which class: learned from the training rows, applied to any other rows of the same kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel

from .columns import classes_of

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
        cls, labels: Sequence[Any], feature: object, source: str, label_names: Sequence[str] | None = None
    ) -> LabelMap:
        """From the labels of the training rows.

        Args:
            labels: stored labels.
            feature: the column's feature; a `ClassLabel` brings its names.
            source: where the rows come from, for messages.
            label_names: names of the classes in order, where the user gave them.

        Raises:
            ValueError: for labels that are no classes, see `classes_of`.
        """
        names, index = classes_of({"train": labels}, feature, source, label_names)
        return cls(names, tuple(index.items()))

    def encode(self, labels: Sequence[Any], feature: object, source: str, split: str) -> list[int]:
        """Class index of each label.

        Raises:
            ValueError: for a label that the training rows did not have.
        """
        if isinstance(feature, ClassLabel) and set(feature.names) == set(self.names):
            labels = [feature.names[label] if label >= 0 else None for label in labels]
        index = {**{name: position for position, name in enumerate(self.names)}, **dict(self.values)}
        for row, label in enumerate(labels):
            if label not in index:
                raise ValueError(
                    f"{source}: row {row} of {split} has the label {label!r}; known are {', '.join(self.names)}"
                )
        return [index[label] for label in labels]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"names": list(self.names), "values": [list(pair) for pair in self.values]}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> LabelMap:
        """The inverse of `to_dict`."""
        return cls(tuple(state["names"]), tuple((value, int(index)) for value, index in state["values"]))
