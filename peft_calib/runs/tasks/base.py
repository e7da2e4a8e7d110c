"""What the commands ask of a task: checked columns, a base model, and rows as the model takes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...artefact import Artefact, Inputs
from ...classes import class_options
from ...predictor.encoded import Encoded
from ...provenance.origins import with_column
from ..labels import LabelMap
from ..settings import RunConfig

#: Tokens that no row has.
UNCUT = 2**31 - 1


@dataclass(frozen=True)
class Task(ABC):
    """One way to read rows and to ask a model about them."""

    config: RunConfig
    labels: LabelMap | None = None

    #: PEFT's name of the task.
    peft_task_type: ClassVar[str]
    #: `task=` of `peft_calib.predict`.
    predict_task: ClassVar[str]
    #: What its items answer with, one of `predictor.kinds.KINDS`.
    kind: ClassVar[str] = "classes"
    #: What is learned of the training rows' labels, as `config.json` keeps it.
    learned: ClassVar[Any] = LabelMap
    #: Whether a head is trained along with the adapter.
    has_head: ClassVar[bool] = False
    #: Loads the base model.
    auto_model: ClassVar[Any] = AutoModelForCausalLM

    @classmethod
    @abstractmethod
    def learn(cls, config: RunConfig, rows: Dataset) -> Task:
        """The task with the classes of the training rows; refuses missing columns, and labels that are no classes."""

    @classmethod
    @abstractmethod
    def columns(cls, config: RunConfig) -> list[str]:
        """Columns in which a row must hold something."""

    @abstractmethod
    def canonical(self, rows: Dataset, source: str, split: str) -> Dataset:
        """The rows under canonical column names, checked."""

    def with_any_label(self, rows: Dataset) -> Dataset:
        """The rows with a label that nothing reads, for rows of other origin, which belong to no class."""
        if self.labels is None:
            raise ValueError(f"rows of other origin are told by confidence, of which {self.config.task} has none")
        return with_column(rows, self.config.label_column, [self.labels.values[0][0]] * len(rows))

    def load_model(self) -> PreTrainedModel:
        """The base model; a fresh head takes the global random state."""
        head = {} if self.labels is None or not self.has_head else class_options(self.labels.names, self.kind)
        return self.auto_model.from_pretrained(self.config.model, revision=self.config.revision, **head)

    def start_head(self, model: nn.Module, train: Dataset) -> None:
        """Where a fresh head starts; as transformers made it, as a rule. `train` are encoded rows."""
        del model, train

    @abstractmethod
    def encode_training(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Model inputs with `labels`, one row each."""

    def encode_prediction(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Inputs for `predict_dataset`, with `labels`, in the order of the rows; those of training as a rule."""
        return self.encode_training(rows, tokenizer)

    def num_cut(self, rows: Dataset, ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> int:
        """How many canonical rows are longer than what is read; `ids` are the tokens of `encode_prediction`."""
        short = list(ids)
        if len(short) == len(rows):  # those that fill it are looked at once more, whole; else rows without tokens left
            full = [row for row, tokens in enumerate(short) if len(tokens) >= self.config.max_length - 1]
            rows, short = rows.select(full), [short[row] for row in full]
        if not short:
            return 0
        whole = replace(self, config=replace(self.config, max_length=UNCUT)).encode_prediction(rows, tokenizer)
        return sum(len(read) < len(all_of_it) for read, all_of_it in zip(short, whole["input_ids"][:], strict=True))

    def encode_for_predictor(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """The same for a predictor of the run's adapter."""
        found = self.encode_prediction(rows, tokenizer)
        columns = {name: found[name][:] for name in found.column_names if name != "labels"}
        return Encoded(columns, found["labels"][:])

    @property
    def answers(self) -> str:
        """What a predictor of its adapter answers with: what its items do, as a rule."""
        return self.kind

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list], Any]:
        """Makes a training batch of encoded rows; labels a token as a rule."""
        return DataCollatorForTokenClassification(tokenizer)

    def class_indices(self, rows: Dataset) -> list[int]:
        """Class of each item of canonical rows; empty for a task without classes."""
        return [] if self.labels is None else rows["label"][:]

    def targets(self, rows: Dataset) -> list[Any]:
        """What is true of each canonical row, where the answer is no class."""
        raise NotImplementedError(f"{self.config.task} answers with {self.kind}")

    @property
    def target(self) -> tuple[float, float] | None:
        """Offset and scale of a number that is standardised for the training."""
        return None

    def inputs(self) -> Inputs:
        """How rows become inputs, for whoever predicts with the adapter alone."""
        return Inputs(max_length=self.config.max_length, batch_size=2 * self.config.batch_size)

    def described(self, tokenizer: PreTrainedTokenizerBase, base: str | None) -> Artefact:
        """What a prediction needs of the task and its settings; `base` is the base model's fingerprint."""
        classes, tokens = None if self.labels is None else self.labels.names, self.answer_tokens(tokenizer)
        ids = None if tokens is None else tuple(tokens)
        kind: dict[str, Any] = {"kind": self.kind, "target": self.target}
        return Artefact(classes, ids, self.inputs(), seed=self.config.seed, base=base, **kind)

    def answer_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
        """Token of each class, where a language model answers."""
        return None


def encoded(rows: Dataset, encode: Callable[[dict[str, list]], dict[str, Any]]) -> Dataset:
    """The columns that a function makes of batches of canonical rows.

    These are in memory, where there is nothing cached to be found. Without a fingerprint of ours datasets would hash
    the function and with it the tokenizer, every time: .1 s for one of 30,000 words, and more for most
    (`findings/datasets_map_in_memory_hashes_the_tokenizer.sh`).
    """
    fresh = generate_random_fingerprint()
    return rows.map(encode, batched=True, remove_columns=rows.column_names, new_fingerprint=fresh)


def load_model_config(config: RunConfig) -> PreTrainedConfig:
    """Configuration of the base model."""
    try:
        return AutoConfig.from_pretrained(config.model, revision=config.revision)
    except OSError as error:
        if Path(config.model).is_dir():
            raise
        told = str(error).strip().partition("\n")[0]
        raise OSError(f"{config.model} is no folder here, and cannot be read from the Hub: {told}") from error
