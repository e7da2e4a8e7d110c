"""Rows as a model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

EMPTY = "There is nothing to predict: no text was given."


@dataclass(frozen=True)
class Words:
    """The words of rows that a tagger reads.

    Attributes:
        texts: Those of each row.
        kept: Of each row, which of them have a token that is read, in order.
        marks: Of each token the tag of the word that begins with it, 0 where tags are not known; -100 elsewhere.
    """

    texts: Sequence[Sequence[str]]
    kept: Sequence[Sequence[int]]
    marks: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Encoded:
    """Inputs of the rows by name, their labels where they have any, how many rows were cut, and words if these count.

    The labels of words are lists, a tag for each word of a row.
    """

    columns: dict[str, list]
    labels: list[Any] | None = None
    num_cut: int = 0
    words: Words | None = None

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def as_dataset(self, order: Sequence[int]) -> Dataset:
        """The rows in an order."""
        labels = self.labels if self.words is None else self.words.marks
        columns = self.columns if labels is None else {**self.columns, "labels": labels}
        return Dataset.from_dict({name: [values[i] for i in order] for name, values in columns.items()})

    def select(self, kept: Sequence[int]) -> Encoded:
        """Some of the rows."""

        def of(values: Sequence[Any]) -> list[Any]:
            return [values[i] for i in kept]

        columns = {name: of(values) for name, values in self.columns.items()}
        words = None if self.words is None else Words(*map(of, (self.words.texts, self.words.kept, self.words.marks)))
        return Encoded(columns, None if self.labels is None else of(self.labels), self.num_cut, words)
