"""Regression: a number a text, or a pair of texts, such as a rating."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...predictor.inputs import tokenized_texts
from ...predictor.kinds.numbers import as_number
from ...provenance.columns import MEND, check_column, texts_of
from ...provenance.origins import at
from ..settings import RunConfig
from .base import encoded
from .sequence import TEXTS, SequenceClassification


@dataclass(frozen=True)
class NumberScale:
    """What the head is trained on: the number less an offset, in units of a scale; its name is that of its column.

    A fresh head learns numbers about 0 and 1 at the learning rate of classes, whatever the unit of the target.
    """

    names: tuple[str]
    offset: float
    scale: float

    #: Of classes that may be meant as one.
    alike: ClassVar[tuple] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"names": list(self.names), "offset": self.offset, "scale": self.scale}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> NumberScale:
        (name,) = state["names"]
        return cls((str(name),), float(state["offset"]), float(state["scale"]))


class Regression(SequenceClassification):
    """Columns `text_column` (one or two) and `label_column`, a number."""

    predict_task: ClassVar[str] = "regression"
    kind: ClassVar[str] = "numbers"
    learned: ClassVar[Any] = NumberScale

    @classmethod
    def learn(cls, config: RunConfig, rows: Dataset) -> Regression:
        """Mean and standard deviation of the training rows' numbers."""
        values = np.array(_numbers(rows, config.label_column, config.data, config.train_split))
        scale = float(values.std())
        if scale == 0.0:
            raise ValueError(f"{config.data}: every row has the number {values[0]:g}, so there is nothing to learn")
        return cls(config, NumberScale((config.label_column,), float(values.mean()), scale))  # type: ignore[arg-type]

    def canonical(self, rows: Dataset, source: str, split: str) -> Dataset:
        """Columns `text`, `text_pair` for pairs, and `target`."""
        columns = dict(zip(TEXTS, self.config.text_column, strict=False))
        texts = {key: texts_of(rows, column, "text", source) for key, column in columns.items()}
        return Dataset.from_dict(texts | {"target": _numbers(rows, self.config.label_column, source, split)})

    @property
    def target(self) -> tuple[float, float]:
        """Offset and scale."""
        assert isinstance(self.labels, NumberScale)
        return self.labels.offset, self.labels.scale

    def with_any_label(self, rows: Dataset) -> Dataset:
        raise ValueError("rows of other origin are told by confidence, of which a number has none")

    def encode_training(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Tokens, and `labels` about 0 and 1."""
        return self._encoded(rows, tokenizer, *self.target)

    def encode_prediction(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Tokens, and `labels` in their own unit."""
        return self._encoded(rows, tokenizer, 0.0, 1.0)

    def _encoded(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, offset: float, scale: float) -> Dataset:
        def encode(batch: dict[str, list]) -> dict[str, list]:
            texts = [batch[name] for name in TEXTS if name in batch]
            labels = [(value - offset) / scale for value in batch["target"]]
            return tokenized_texts(texts, tokenizer, self.config.max_length) | {"labels": labels}

        return encoded(rows, encode)

    def targets(self, rows: Dataset) -> list[Any]:
        return rows["target"][:]


def _numbers(rows: Dataset, column: str, source: str, split: str) -> list[float]:
    check_column(rows, column, "number", source)
    found = []
    for row, value in enumerate(rows[column][:]):
        number = as_number(value)
        if number is None:
            raise ValueError(
                f"{at(source, rows, row)}: row {row} of {split} has {value!r} in {column!r}; a number is expected; "
                f"{MEND}"
            )
        found.append(number)
    return found
