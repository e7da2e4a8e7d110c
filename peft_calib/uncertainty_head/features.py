"""What a frozen model hands its classification head, row by row: all that an uncertainty head is fitted on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from ..calibration.fingerprint import softmax_hashes
from ..identity import adapter_digest
from ..prediction.dataset import dealt_batches, loader_of
from .located import locate
from .reading import FeatureReader, Read


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features, logits and labels of the items of some rows, from one pass of the frozen model.

    An item is what is predicted: a row, a token that has a label, the answer to a prompt. The first axis counts
    functions: 1 for a deterministic prediction, K for draws or members, whose probabilities are averaged.

    Attributes:
        features: `(K, N, D)` float32, the input of the classification head at the position it reads.
        logits: `(K, N, C)` float32, what that head answered.
        labels: `(N,)` int64, or None where rows are unlabelled.
        hashes: `(N,)` uint64, one hash for each item's row and label (`calibration.fingerprint`), against fits and
            reports on the same rows.
        options: `(N, C)` bool, the answers an item can have, or None if every item can have all.
        items: `(N, 2)` int64, row and token of each item of a token classification, or None for one item a row.
        adapter: Digest of the adapter (`peft_calib.identity`), or None for a model without one.
        num_forwards: What reading them cost, in units of one deterministic forward.
    """

    features: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor | None = None
    hashes: np.ndarray | None = None
    options: torch.Tensor | None = None
    items: torch.Tensor | None = None
    adapter: str | None = None
    num_forwards: float = 1.0

    def __len__(self) -> int:
        return self.logits.shape[1]

    @property
    def num_classes(self) -> int:
        """How many classes the logits are over."""
        return self.logits.shape[-1]

    @property
    def probabilities(self) -> torch.Tensor:
        """`(N, C)` float64, averaged over the functions; an option an item does not have gets 0."""
        logits = self.logits.double()
        if self.options is not None:
            logits = logits.masked_fill(~self.options, -torch.inf)
        return logits.softmax(-1).mean(0)

    @property
    def predicted(self) -> torch.Tensor:
        """`(N,)` int64, the class predicted for each item."""
        return self.probabilities.argmax(-1)

    @property
    def errors(self) -> torch.Tensor:
        """`(N,)` bool, where the prediction is not the label."""
        if self.labels is None:
            raise ValueError(
                "These features have no labels, so that errors are unknown. Extract them of labelled rows."
            )
        return self.predicted != self.labels

    def select(self, index: torch.Tensor) -> FeatureSet:
        """The items at `index`, `(M,)` int64 or `(N,)` bool."""
        index = index.nonzero().flatten() if index.dtype == torch.bool else index

        def picked(name: str, value: Any) -> Any:
            if value is None or name in ("adapter", "num_forwards"):
                return value
            if isinstance(value, np.ndarray):
                return value[index.numpy()]
            return value[:, index] if name in ("features", "logits") else value[index]

        return replace(self, **{field.name: picked(field.name, getattr(self, field.name)) for field in fields(self)})


def extract_features(
    model: nn.Module,
    rows: Any,
    *,
    task: str = "auto",
    label_tokens: Sequence[int | str] | None = None,
    tokenizer: Any = None,
    head_module: str | None = None,
    num_samples: int | None = 1,
    seed: int = 0,
    options: Any = None,
    batch_size: int = 32,
    collate_fn: Callable[[list], Mapping[str, Any]] | None = None,
    dropout: float | None = None,
    adapter_names: Sequence[str] | None = None,
    progress: bool = False,
    check: bool = True,
    accelerator: Any = None,
) -> FeatureSet:
    """Read what a frozen model hands its classification head, for all rows, in one pass.

    Only the input of the head is kept, at the position it reads: never the states of all layers. Every batch is held
    against a float32 copy of the head, which has to answer as the model did (`reading.TOLERANCES`). Neither the model,
    its mode, hooks and gradients, nor any random state is changed.

    Args:
        model: A classifier of sequences, tokens or images with or without an adapter, or a language model.
        rows: What `predict_dataset` takes, or one batch (a mapping of tensors).
        task: `"classification"`, `"token"`, `"next_token"` or `"auto"`.
        label_tokens: For a language model, the tokens that stand for the classes: ids, or texts of one token each.
        tokenizer: Pads the rows of a batch, and reads texts among the label tokens.
        head_module: Name of the head in the base model, where it has another name than `classifier`, `score` ...
        num_samples: Number of functions K: 1 for the deterministic model, more for draws of its adapter; as many as
            `predict` makes by itself when `None`.
        seed: Key of the draws.
        options: Answers that an item can have, where they differ: `(N, C)` bool, or `(N,)` how many of the first.
        batch_size: Rows of a batch.
        collate_fn: Makes a batch of a list of rows.
        dropout: Monte Carlo dropout on a stock LoRA with this probability, for draws.
        adapter_names: Adapters of the model that are the K functions.
        progress: Show a bar.
        check: Hold the features against the copied head.
        accelerator: The running `Accelerator`; a `PartialState` when `None`.

    Returns:
        The features, on the CPU; of a token classification the tokens that have a label (not -100).

    Raises:
        TypeError: If the rows are none of these, or draws are asked of a model without an adapter of this package.
        ValueError: For a model that is no classifier, a head that is not found or does not reproduce the logits,
            labels out of range, or what `predict_dataset` refuses.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = BertForSequenceClassification(BertConfig(num_labels=3, **sizes))
        >>> found = extract_features(model, {"input_ids": torch.ones(4, 6, dtype=torch.long)})
        >>> found.features.shape, found.logits.shape
        (torch.Size([1, 4, 8]), torch.Size([1, 4, 3]))
    """
    ways: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "dropout": dropout}
    words: dict[str, Any] = {"task": task, "label_tokens": label_tokens, "tokenizer": tokenizer}
    located = locate(model, head_module=head_module, adapter_names=adapter_names, **ways, **words)
    how: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": batch_size, "collate_fn": collate_fn}
    how |= {"options": options, "progress": progress, "accelerator": accelerator}
    return read_features(FeatureReader(located, check), rows, digest_of_functions(model, adapter_names), **how)


def read_features(
    reader: FeatureReader,
    rows: Any,
    adapter: str | None,
    *,
    tokenizer: Any = None,
    options: Any = None,
    batch_size: int = 32,
    collate_fn: Callable[[list], Mapping[str, Any]] | None = None,
    progress: bool = False,
    accelerator: Any = None,
    lenient: bool = False,
) -> FeatureSet:
    """The same with a reader that was set up before, for an adapter of a known digest.

    With `lenient` labels of which one is no class are left out, all of them, instead of refused.
    """
    if isinstance(rows, Mapping):
        return joined([reader(rows)], adapter, options, lenient)
    state = PartialState() if accelerator is None else accelerator
    root = reader.predictor.source.root
    loader, count = loader_of(rows, root, reader.of_tokens, batch_size, tokenizer, collate_fn, state, "tokenizer")
    batches = dealt_batches(loader, count, "rows", state, progress and state.is_main_process)
    parts = [(index, reader(batch)) for index, batch in batches]
    parts = gather_object(parts) if state.num_processes > 1 else parts
    return joined([part for _, part in sorted(parts, key=lambda part: part[0])], adapter, options, lenient)


def joined(parts: Sequence[Read], adapter: str | None, options: Any = None, lenient: bool = False) -> FeatureSet:
    """The features of batches in order, checked, as one set."""
    if not parts or not sum(part.features.shape[1] for part in parts):
        raise ValueError("The rows hold no item to predict: there is none, or no token of them has a label.")
    features, logits = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("features", "logits"))
    labelled = [part.labels for part in parts if part.labels is not None]
    if lenient and (len(labelled) < len(parts) or not are_classes(torch.cat(labelled), logits.shape[-1])):
        labelled = []
    if labelled and len(labelled) < len(parts):
        raise ValueError("Some batches have labels and some have none. Give labels for all rows, or for none.")
    labels = _class_ids(torch.cat(labelled), logits.shape[-1]) if labelled else None
    rows = sum(part.rows for part in parts)
    cost = sum(part.num_forwards * part.rows for part in parts) / rows
    allowed = _options(options, logits, None if lenient else labels)
    found = FeatureSet(features, logits, labels, options=allowed, adapter=adapter, num_forwards=cost)
    if parts[0].positions is not None:
        first = np.cumsum([0, *(part.rows for part in parts)]).tolist()
        placed = [part.positions + torch.tensor([start, 0]) for part, start in zip(parts, first, strict=False)]
        found = replace(found, items=torch.cat(placed))
    if labels is None:
        return found
    log_probabilities = found.probabilities.clamp_min(torch.finfo(torch.float64).tiny).log().numpy()
    return replace(found, hashes=softmax_hashes(log_probabilities, labels.numpy()))


def digest_of_functions(model: nn.Module, adapter_names: Sequence[str] | None = None) -> str | None:
    """The digest of a model's active adapter, of an ensemble of adapters in order, or None where it has none."""
    if adapter_names is not None:
        members = [adapter_digest(model, name) for name in adapter_names]
        return f"sha256:{hashlib.sha256(' '.join(members).encode()).hexdigest()}"
    try:
        return adapter_digest(model)
    except TypeError:
        return None


def are_classes(labels: torch.Tensor, num_classes: int) -> bool:
    """Whether labels are one class of a model each."""
    whole = labels.dim() == 1 and not labels.dtype.is_floating_point and labels.dtype != torch.bool
    return whole and bool(((labels >= 0) & (labels < num_classes)).all())


def _class_ids(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Labels as int64, checked to be classes of the model."""
    if labels.dim() != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(
            f"Labels must be one class id an item, whole numbers; got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} of {len(labels)} labels are no class of the model, which has {num_classes} (0 ... "
            f"{num_classes - 1}), such as {labels[wrong][0]} at item {int(wrong.nonzero()[0])}. Map labels as they "
            "were in training, and leave out rows without one."
        )
    return labels.long()


def _options(options: Any, logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
    """Which answers an item can have, (N, C) bool; None where all can have all."""
    if options is None:
        return None
    given, (items, classes) = torch.as_tensor(options), logits.shape[1:]
    if given.shape == (items,) and not given.dtype.is_floating_point and given.dtype != torch.bool:
        given = torch.arange(classes) < given[:, None]
    if given.shape != (items, classes) or given.dtype != torch.bool:
        raise ValueError(
            f"options must be a bool mask ({items}, {classes}) of the answers that items can have, or {items} whole "
            f"numbers of how many of the first they have; got {given.dtype} of shape {tuple(given.shape)}."
        )
    if (given.sum(1) < 2).any():
        few = int((given.sum(1) < 2).nonzero()[0])
        raise ValueError(f"Item {few} has fewer than two options, so that nothing is predicted. Leave it out.")
    if labels is not None and not given[torch.arange(items), labels].all():
        wrong = int((~given[torch.arange(items), labels]).nonzero()[0])
        raise ValueError(f"The label of item {wrong}, {int(labels[wrong])}, is not among its options.")
    return None if given.all() else given
