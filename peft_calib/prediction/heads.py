"""What a model's logits mean: one row for each example, each token, or the next token of each prompt."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..tuners.asked import only_here
from ..tuners.rows import select_rows
from .adaptive import settled, settled_numbers
from .labels import LabelsPrediction
from .result import Prediction, RegressionPrediction

TASKS = ("auto", "classification", "labels", "regression", "token", "next_token")
#: What transformers calls a head of one sigmoid a label.
LABELS = "multi_label_classification"


@dataclass
class Items:
    """The items that one batch asks about; `positions` (N, 2) are row and token of each, None for one a row."""

    inputs: dict[str, Any]
    rows: int
    positions: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    media_tokens: tuple[int, ...] = ()

    @property
    def one_a_row(self) -> bool:
        """Whether every row is one item."""
        return self.positions is None or torch.equal(self.positions[:, 0].cpu(), torch.arange(self.rows))

    def select(self, index: torch.Tensor) -> Items:
        """The items of some rows, where every row is one item."""
        positions = self.positions
        if positions is not None:
            columns = positions[index.to(positions.device), 1]
            positions = torch.stack([torch.arange(len(index), device=columns.device), columns], dim=1)
        inputs = select_rows(self.inputs, self.rows, index, self.media_tokens)
        return Items(inputs, len(index), positions, media_tokens=self.media_tokens)


class Head(ABC):
    """How to ask a model about a batch, and how to read its answer."""

    #: What a prediction of it is.
    answers: type[Prediction | LabelsPrediction | RegressionPrediction] = Prediction

    def values(self, logits: torch.Tensor) -> torch.Tensor:
        """What the logits (..., C) of one draw say: a distribution over classes as a rule."""
        return logits.softmax(-1)

    def settled(self, samples: torch.Tensor, tolerance: float) -> torch.Tensor:
        """Which rows need no further draw, of values (n, N, C)."""
        return settled(samples, tolerance)

    def items(self, batch: dict[str, Any], rows: int) -> Items:
        """Prepare a batch for the model: without its labels, so that no loss is computed."""
        inputs = dict(batch)
        return self.asked(inputs, inputs.pop("labels", None), rows)

    @abstractmethod
    def asked(self, inputs: dict[str, Any], labels: torch.Tensor | None, rows: int) -> Items:
        """The items that a batch asks about."""

    @abstractmethod
    def read(self, logits: torch.Tensor, items: Items, count: int) -> torch.Tensor:
        """Logits of `count` draws as a tensor (count, N, C)."""

    @contextmanager
    def reading(self, root: nn.Module, items: Items) -> Iterator[None]:
        """What must be arranged in the model for the duration of a forward."""
        yield

    def share_of_positions(self, items: Items) -> float:
        """Part of the positions that the output layer over a vocabulary is applied to."""
        return 1.0


class ClassHead(Head):
    """One distribution over classes for each row: sequence or image classification, or one of several choices."""

    def asked(self, inputs: dict[str, Any], labels: torch.Tensor | None, rows: int) -> Items:
        return Items(inputs, rows, labels=labels)

    def read(self, logits: torch.Tensor, items: Items, count: int) -> torch.Tensor:
        """(count * B, C) to (count, B, C)."""
        if logits.dim() != 2:
            raise ValueError(
                f"The model answers with logits of shape {tuple(logits.shape)}, not with one row of class logits an "
                f"example. Say what they are with task=, one of {TASKS[1:]}."
            )
        return logits.unflatten(0, (count, -1))


class LabelsHead(ClassHead):
    """A probability for each of several labels, of which a row may have any: a sigmoid each."""

    answers = LabelsPrediction

    def values(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()

    def settled(self, samples: torch.Tensor, tolerance: float) -> torch.Tensor:
        return settled_numbers(samples, tolerance)


class RegressionHead(ClassHead):
    """One or several numbers for each row."""

    answers = RegressionPrediction

    def values(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def settled(self, samples: torch.Tensor, tolerance: float) -> torch.Tensor:
        return settled_numbers(samples, tolerance)


class TokenHead(Head):
    """One distribution over classes for each token that has a label, or else is not padding."""

    def asked(self, inputs: dict[str, Any], labels: torch.Tensor | None, rows: int) -> Items:
        mask = inputs.get("attention_mask")
        if labels is not None:
            keep = labels != -100
        elif mask is not None and mask.dim() == 2:
            keep = mask.bool()
        else:
            main = inputs.get("input_ids", inputs.get("inputs_embeds"))
            if main is None:
                raise ValueError("Token classification needs input_ids or inputs_embeds in the batch.")
            keep = torch.ones(main.shape[:2], dtype=torch.bool, device=main.device)
        return Items(inputs, rows, keep.nonzero(), None if labels is None else labels[keep])

    def read(self, logits: torch.Tensor, items: Items, count: int) -> torch.Tensor:
        """(count * B, T, C) to (count, N, C)."""
        if logits.dim() != 3:
            raise ValueError(f"Token classification needs logits (rows, tokens, classes), got {tuple(logits.shape)}.")
        row, position = items.positions.unbind(1)
        return logits.unflatten(0, (count, -1))[:, row, position]


class NextTokenHead(Head):
    """The token that follows each prompt; the output layer sees one position of each row only."""

    def __init__(self, root: Any, label_tokens: Sequence[int] | None = None) -> None:
        self.label_tokens = None if label_tokens is None else torch.tensor(label_tokens)
        self.output_layer = root.get_output_embeddings()
        self.config = root.config
        self.prefix = "decoder_" if getattr(root.config, "is_encoder_decoder", False) else ""
        self.takes_logits_to_keep = "logits_to_keep" in inspect.signature(root.forward).parameters

    def asked(self, inputs: dict[str, Any], labels: torch.Tensor | None, rows: int) -> Items:
        prefix = self.prefix
        if prefix and not any(name in inputs for name in ("decoder_input_ids", "decoder_inputs_embeds")):
            main = next(v for v in inputs.values() if isinstance(v, torch.Tensor) and v.dim() >= 2)
            start = self.config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.full((rows, 1), start, device=main.device)
        last = _last_positions(inputs, prefix, rows)
        tokens = _tokens(inputs, prefix)
        if self.takes_logits_to_keep and bool((last == tokens.shape[1] - 1).all()):
            inputs["logits_to_keep"] = 1
        positions = torch.stack([torch.arange(rows, device=last.device), last], dim=1)
        one_each = labels is not None and labels.dim() == 1
        return Items(inputs, rows, positions, labels if one_each else None)

    @contextmanager
    def reading(self, root: nn.Module, items: Items) -> Iterator[None]:
        """Hand the output layer the last position of each row only."""
        last = items.positions[:, 1]

        def keep_last(_: nn.Module, args: tuple) -> tuple:
            hidden = args[0]
            if hidden.shape[1] == 1:
                return args
            where = last.to(hidden.device).repeat(len(hidden) // len(last))
            return (hidden[torch.arange(len(hidden), device=hidden.device), where].unsqueeze(1), *args[1:])

        with only_here() as here:
            handle = self.output_layer.register_forward_pre_hook(here(keep_last))
            try:
                yield
            finally:
                handle.remove()

    def share_of_positions(self, items: Items) -> float:
        return 1 / _tokens(items.inputs, self.prefix).shape[1]

    def read(self, logits: torch.Tensor, items: Items, count: int) -> torch.Tensor:
        """(count * B, 1, V) to (count, B, C)."""
        if logits.shape[1] != 1:
            raise ValueError(
                f"{type(self.output_layer).__name__} was not called as a module, so the last positions could not be "
                "picked before the vocabulary. This model is not supported for next-token prediction."
            )
        logits = logits[:, 0]
        if self.label_tokens is not None:
            logits = logits.index_select(-1, self.label_tokens.to(logits.device))
        return logits.unflatten(0, (count, -1))


def _tokens(inputs: dict[str, Any], prefix: str) -> torch.Tensor:
    for name in (f"{prefix}input_ids", f"{prefix}inputs_embeds"):
        if inputs.get(name) is not None:
            return inputs[name]
    raise ValueError(f"A language model needs {prefix}input_ids or {prefix}inputs_embeds in the batch.")


def _last_positions(inputs: dict[str, Any], prefix: str, rows: int) -> torch.Tensor:
    tokens, mask = _tokens(inputs, prefix), inputs.get(f"{prefix}attention_mask")
    if mask is None or mask.dim() != 2:
        return torch.full((rows,), tokens.shape[1] - 1, device=tokens.device)
    if not mask.bool().any(dim=1).all():
        raise ValueError("A row of the batch consists of padding only, so it has no last token. Leave it out.")
    return mask.shape[1] - 1 - mask.bool().flip(1).int().argmax(dim=1)


def choose_head(root: nn.Module, task: str, label_tokens: Sequence[int] | None) -> Head:
    """The head that fits a model; `"auto"` tells by its output layer, class, number of labels and problem type."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}.")
    config = getattr(root, "config", None)
    has_vocabulary = getattr(root, "get_output_embeddings", lambda: None)() is not None
    if task == "auto":
        task = "next_token" if has_vocabulary else _task_of(root, config)
    if label_tokens is not None and task != "next_token":
        raise ValueError(f"label_tokens name answers of a language model, but {type(root).__name__} is none.")
    if task == "next_token":
        if not has_vocabulary:
            raise ValueError(f"{type(root).__name__} has no output layer over a vocabulary; choose another task.")
        return NextTokenHead(root, label_tokens)
    if task == "classification" and getattr(config, "problem_type", None) == LABELS:
        task = "labels"
    heads = {"classification": ClassHead, "labels": LabelsHead, "regression": RegressionHead, "token": TokenHead}
    return heads[task]()


def logits_of(output: Any) -> torch.Tensor:
    """The logits in what a model answers: a tensor, a mapping, or a tuple that begins with them."""
    if isinstance(output, torch.Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else output[0]
    if not isinstance(logits, torch.Tensor):
        raise ValueError(f"The model's output {type(output).__name__} has no logits to predict from.")
    return logits


def media_tokens(root: nn.Module) -> tuple[int, ...]:
    """Ids of the tokens that stand for images, videos and sounds in a text."""
    config = getattr(root, "config", None)
    kinds = [f"{kind}_{end}" for kind in ("image", "video", "audio") for end in ("token_id", "token_index")]
    found = (getattr(config, name, None) for name in kinds)
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int)))


def _task_of(root: nn.Module, config: Any) -> str:
    if "TokenClassification" in type(root).__name__:
        return "token"
    is_classifier = any(word in type(root).__name__ for word in ("SequenceClassification", "ImageClassification"))
    problem, one_number = getattr(config, "problem_type", None), getattr(config, "num_labels", None) == 1
    if problem == LABELS:
        return "labels"
    if (is_classifier and one_number) or problem == "regression":
        return "regression"
    return "classification"


def check_label_tokens(label_tokens: Sequence[int | str], tokenizer: Any, vocab_size: int | None) -> list[int]:
    """Token ids of the answers of a multiple-choice prompt; texts (such as `" A"`) must be one token each."""
    ids = []
    for label in label_tokens:
        if isinstance(label, str):
            if tokenizer is None:
                raise ValueError("label_tokens are texts; pass tokenizer=, or give token ids.")
            pieces = tokenizer(label, add_special_tokens=False)["input_ids"]
            if len(pieces) != 1:
                raise ValueError(
                    f"The label {label!r} is {len(pieces)} tokens, not one. Choose labels of a single token (often "
                    "with a leading space, like ' A')."
                )
            ids.append(int(pieces[0]))
        else:
            ids.append(int(label))
    if len(ids) < 2 or len(set(ids)) < len(ids):
        raise ValueError(f"label_tokens must be at least two different tokens, got {list(label_tokens)!r} = {ids}.")
    if vocab_size is not None and not all(0 <= i < vocab_size for i in ids):
        raise ValueError(f"label_tokens {ids} are not all in the vocabulary of {vocab_size} tokens.")
    return ids
