"""Sequence classification: one label a text, or a pair of texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerBase

from ...artefact import Inputs
from ...predictor.inputs import tokenized_texts
from ...provenance.columns import check_column, texts_of
from ..labels import LabelMap
from ..settings import RunConfig
from .base import Task, encoded

TEXTS = ("text", "text_pair")


class SequenceClassification(Task):
    """Columns `text_column` (one or two) and `label_column`."""

    peft_task_type: ClassVar[str] = "SEQ_CLS"
    predict_task: ClassVar[str] = "classification"
    has_head: ClassVar[bool] = True
    auto_model: ClassVar[Any] = AutoModelForSequenceClassification

    @classmethod
    def learn(cls, config: RunConfig, rows: Dataset) -> SequenceClassification:
        check_column(rows, config.label_column, "label", config.data)
        feature = rows.features[config.label_column]
        labels = rows[config.label_column][:]
        return cls(config, LabelMap.learn(labels, feature, config.data, config.label_names, rows))

    @classmethod
    def columns(cls, config: RunConfig) -> list[str]:
        return [*config.text_column, config.label_column]

    def canonical(self, rows: Dataset, source: str, split: str) -> Dataset:
        """Columns `text`, `text_pair` for pairs, and `label`."""
        assert self.labels is not None
        columns = dict(zip(TEXTS, self.config.text_column, strict=False))
        texts = {key: texts_of(rows, column, "text", source) for key, column in columns.items()}
        name = self.config.label_column
        check_column(rows, name, "label", source)
        labels = self.labels.encode(rows[name][:], rows.features[name], source, split, rows)
        return Dataset.from_dict(texts | {"label": labels})

    def inputs(self) -> Inputs:
        columns = tuple(self.config.text_column)
        return replace(super().inputs(), text_columns=columns, label_column=self.config.label_column)

    def encode_training(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Tokens and `labels`."""

        def encode(batch: dict[str, list]) -> dict[str, list]:
            texts = [batch[name] for name in TEXTS if name in batch]
            return tokenized_texts(texts, tokenizer, self.config.max_length) | {"labels": batch["label"]}

        return encoded(rows, encode)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list], Any]:
        return DataCollatorWithPadding(tokenizer)
