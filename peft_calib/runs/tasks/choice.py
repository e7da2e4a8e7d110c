"""Multiple choice: a language model answers a prompt with one letter, and its loss is over that letter alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from string import ascii_uppercase
from typing import Any, ClassVar

from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ...artefact import Inputs
from ...predictor.inputs import choice_prompt, choices_of, letter_tokens, tokenized_prompts
from ...provenance.columns import check_column, texts_of
from ...provenance.origins import at, with_column
from ..labels import LabelMap
from ..settings import RunConfig
from .base import Task, encoded, load_model_config


class MultipleChoice(Task):
    """Columns `question_column`, `choices_column` and `label_column`; the answers are the letters A, B, ..."""

    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    predict_task: ClassVar[str] = "next_token"

    @classmethod
    def learn(cls, config: RunConfig, rows: Dataset) -> MultipleChoice:
        """As many letters as the training row with the most choices has."""
        check_prompt(config.prompt)
        check_decoder(config)
        most = max(len(choices) for choices in choices_of(rows, config.choices_column, config.data))
        if most > len(ascii_uppercase):
            raise ValueError(f"{config.data}: a row has {most} choices; letters are for {len(ascii_uppercase)}")
        letters = tuple(ascii_uppercase[:most])
        return cls(config, LabelMap(letters, tuple((letter, position) for position, letter in enumerate(letters))))

    @classmethod
    def columns(cls, config: RunConfig) -> list[str]:
        return [config.question_column, *config.choices_column, config.label_column]

    def canonical(self, rows: Dataset, source: str, split: str) -> Dataset:
        """Columns `question`, `choices` and `label`, the index of the right choice."""
        assert self.labels is not None
        config = self.config
        questions = texts_of(rows, config.question_column, "question", source)
        check_column(rows, config.label_column, "label", source)
        choices = choices_of(rows, config.choices_column, source)
        feature = rows.features[config.label_column]
        marks = _marks(rows, config)
        labels = []
        for row, (label, texts) in enumerate(zip(rows[config.label_column][:], choices, strict=True)):
            label = feature.names[label] if isinstance(feature, ClassLabel) and label >= 0 else label
            index = _answer(label, texts, None if marks is None else marks[row])
            if index is None or index >= len(self.labels.names):
                raise ValueError(
                    f"{at(source, rows, row)}: row {row} of {split} has the label {label!r}; expected is the position "
                    f"of one of its {len(texts)} choices (0, 1, ...), its letter (A, B, ...) or its text"
                )
            labels.append(index)
        most = max(map(len, choices))
        if most > len(self.labels.names):
            raise ValueError(
                f"{source}: a row of {split} has {most} choices; the run was trained for {len(self.labels.names)}"
            )
        return Dataset.from_dict({"question": questions, "choices": choices, "label": labels})

    def with_any_label(self, rows: Dataset) -> Dataset:
        """The first choice; positions are understood whatever the data call their choices."""
        return with_column(rows, self.config.label_column, [0] * len(rows))

    def answer_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token of each letter, with a leading space where the tokenizer has that as one token."""
        assert self.labels is not None
        try:
            return letter_tokens(self.labels.names, tokenizer)
        except ValueError as error:
            raise ValueError(f"{self.config.model} cannot answer with a letter: {error}") from error

    def inputs(self) -> Inputs:
        config = self.config
        return replace(
            super().inputs(),
            text_columns=(config.question_column,),
            choices_columns=tuple(config.choices_column),
            label_column=config.label_column,
            prompt=config.prompt,
        )

    def encode_prediction(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """The prompts, and the class as `labels`; what is too long loses its beginning."""

        def encode(batch: dict[str, list]) -> dict[str, list]:
            prompts = [self.prompt(*row) for row in zip(batch["question"], batch["choices"], strict=True)]
            return tokenized_prompts([prompts], tokenizer, self.config.max_length) | {"labels": batch["label"]}

        return encoded(rows, encode)

    def encode_training(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Prompt and answer token; `labels` are -100 but for the answer."""
        answers = self.answer_tokens(tokenizer)

        def append(row: dict[str, Any]) -> dict[str, Any]:
            ids, answer = row["input_ids"], answers[row["labels"]]
            return {"input_ids": [*ids, answer], "labels": [-100] * len(ids) + [answer]}

        prompts = self.encode_prediction(rows, tokenizer)
        return Dataset.from_list([append(row) for row in prompts]).map(_all_seen)

    def prompt(self, question: str, choices: Sequence[str]) -> str:
        """The text a model is asked to continue with a letter."""
        return choice_prompt(self.config.prompt, question, choices)


def check_prompt(prompt: str) -> None:
    """Raise `ValueError` unless a prompt shows the question and the choices, and nothing unknown."""
    try:
        shown = prompt.format(question="\0question", choices="\0choices")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"prompt takes {{question}} and {{choices}} and nothing else; got {prompt!r}") from error
    if "\0question" not in shown or "\0choices" not in shown:
        raise ValueError(f"prompt must show {{question}} and {{choices}}; got {prompt!r}")


def check_decoder(config: RunConfig) -> None:
    """Raise `ValueError` for a base model that is no decoder."""
    model = load_model_config(config)
    kind = model.model_type
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(model, "is_decoder", False)
    if encoder or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(model, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model} ({kind}) is no causal language model, which {config.task} needs. Name a decoder, or use "
            "--task seq-cls with an encoder."
        )


def _marks(rows: Dataset, config: RunConfig) -> list[list[str]] | None:
    """The data's own names of the choices, as in AI2's sets."""
    first = rows[0][config.choices_column[0]]
    if not isinstance(first, dict) or "label" not in first:
        return None
    return [row["label"] for row in rows[config.choices_column[0]][:]]


def _answer(label: Any, choices: list[str], marks: list[str] | None) -> int | None:
    """Position of the right choice."""
    if isinstance(label, str):
        names = marks or list(ascii_uppercase[: len(choices)])
        if label in names:
            return names.index(label)
        if choices.count(label) == 1:
            return choices.index(label)
        if not label.isdigit():
            return None
        label = int(label)
    whole = isinstance(label, (int, float)) and not isinstance(label, bool) and float(label).is_integer()
    return int(label) if whole and 0 <= label < len(choices) else None


def _all_seen(row: dict[str, Any]) -> dict[str, Any]:
    return {"attention_mask": [1] * len(row["input_ids"])}
