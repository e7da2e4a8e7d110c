"""Causal language modelling: every token of a text is predicted from those before it."""

from __future__ import annotations

from typing import ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...predictor.inputs import tokenized_texts
from ...provenance.columns import texts_of
from ..settings import RunConfig
from .base import Task, encoded
from .choice import check_decoder


class CausalLanguageModelling(Task):
    """Column `text_column`."""

    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    predict_task: ClassVar[str] = "next_token"

    @classmethod
    def learn(cls, config: RunConfig, rows: Dataset) -> CausalLanguageModelling:
        """Nothing to learn; the base model is checked."""
        check_decoder(config)
        return cls(config)

    @classmethod
    def columns(cls, config: RunConfig) -> list[str]:
        return list(config.text_column)

    def canonical(self, rows: Dataset, source: str, split: str) -> Dataset:
        """Column `text`."""
        (column,) = self.config.text_column
        return Dataset.from_dict({"text": texts_of(rows, column, "text", source)})

    def encode_training(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Tokens; `labels` are the tokens but for the first, which nothing predicts."""

        def encode(batch: dict[str, list]) -> dict[str, list]:
            tokens = tokenized_texts([batch["text"]], tokenizer, self.config.max_length)
            kept = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            return kept | {"labels": [[-100, *row[1:]] for row in tokens["input_ids"]]}

        kept = encoded(rows, encode).filter(lambda row: len(row["input_ids"]) > 1)
        if not len(kept):
            raise ValueError(f"{self.config.data}: no text has two tokens, so there is nothing to predict")
        return kept
