"""Token classification: a tag for each word, carried by the word's first token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

from ...artefact import Inputs
from ...predictor.encoded import Encoded
from ...predictor.kinds.entities import Entities
from ...predictor.words import first_tokens, tokenized_words, word_labels
from ...provenance.columns import check_column
from ...provenance.origins import at, is_missing, with_column
from ..labels import LabelMap
from ..settings import RunConfig
from .base import Task, encoded


class TokenClassification(Task):
    """Columns `tokens_column` (the words) and `tags_column` (one tag a word)."""

    peft_task_type: ClassVar[str] = "TOKEN_CLS"
    predict_task: ClassVar[str] = "token"
    has_head: ClassVar[bool] = True
    auto_model: ClassVar[Any] = AutoModelForTokenClassification

    @classmethod
    def learn(cls, config: RunConfig, rows: Dataset) -> TokenClassification:
        tags = _lists(rows, config.tags_column, "tags", config.data)
        for row, marks in enumerate(tags):
            if any(map(is_missing, marks)):
                raise ValueError(f"{at(config.data, rows, row)}: row {row} has a word without a tag ({marks!r})")
        flat = [tag for row in tags for tag in row]
        return cls(config, LabelMap.learn(flat, _inner(rows, config.tags_column), config.data, config.label_names))

    @classmethod
    def columns(cls, config: RunConfig) -> list[str]:
        return [config.tokens_column, config.tags_column]

    def canonical(self, rows: Dataset, source: str, split: str) -> Dataset:
        """Columns `tokens` and `labels` (class indices)."""
        assert self.labels is not None
        tokens = _lists(rows, self.config.tokens_column, "words", source)
        tags = _lists(rows, self.config.tags_column, "tags", source)
        feature = _inner(rows, self.config.tags_column)
        encoded = []
        for row, (words, marks) in enumerate(zip(tokens, tags, strict=True)):
            where = at(source, rows, row)
            if not words or not all(isinstance(word, (str, int)) for word in words):
                raise ValueError(f"{where}: row {row} has the words {words!r}; a list of texts is expected")
            if len(words) != len(marks):
                raise ValueError(f"{where}: row {row} has {len(words)} words and {len(marks)} tags")
            encoded.append(self.labels.encode(marks, feature, f"{where}: row {row}", "the row", unit="word"))
        return Dataset.from_dict({"tokens": [list(map(str, words)) for words in tokens], "labels": encoded})

    def with_any_label(self, rows: Dataset) -> Dataset:
        assert self.labels is not None
        words = _lists(rows, self.config.tokens_column, "words", self.config.data)
        return with_column(rows, self.config.tags_column, [[self.labels.values[0][0]] * len(row) for row in words])

    def class_indices(self, rows: Dataset) -> list[int]:
        """Tag of each word."""
        return [tag for tags in rows["labels"][:] for tag in tags]

    def encode_training(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Tokens, and `labels` at the first token of each word."""
        if not tokenizer.is_fast:
            raise ValueError(f"{self.config.model} has no fast tokenizer, which finds the words of the tokens")

        def encode(batch: dict[str, list]) -> dict[str, list]:
            options = {"is_split_into_words": True, "truncation": True, "max_length": self.config.max_length}
            tokens = tokenizer(batch["tokens"], **options)
            labels = [
                word_labels(first_tokens(tokens.word_ids(row)), tags) for row, tags in enumerate(batch["labels"])
            ]
            return dict(tokens) | {"labels": labels}

        return encoded(rows, encode)

    @property
    def answers(self) -> str:
        return Entities.name

    def inputs(self) -> Inputs:
        columns = (self.config.tokens_column,)
        return replace(super().inputs(), text_columns=columns, label_column=self.config.tags_column)

    def encode_for_predictor(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        return tokenized_words(rows["tokens"][:], rows["labels"][:], tokenizer, self.config.max_length)


def _lists(rows: Dataset, column: str, what: str, source: str) -> list[list]:
    check_column(rows, column, what, source)
    values = rows[column][:]
    for row, value in enumerate(values):
        if not isinstance(value, list):
            raise ValueError(
                f"{at(source, rows, row)}: row {row} has {value!r} in {column!r}; a list of {what} is expected, which "
                "JSON lines and Parquet files hold"
            )
    return values


def _inner(rows: Dataset, column: str) -> object:
    return getattr(rows.features[column], "feature", None)
