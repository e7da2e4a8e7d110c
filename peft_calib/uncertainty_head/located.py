"""Where the classification head of a model is, and how the model is asked so that it can be watched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..calibration.recalibrate.temperature import HEAD_NAMES
from ..prediction.engine import BatchPredictor, choose_source
from ..prediction.heads import NextTokenHead
from ..prediction.labels import LabelsPrediction
from ..prediction.result import Prediction


@dataclass(frozen=True)
class Located:
    """A model set up to be predicted with, and the head in it that is to be watched and copied.

    Attributes:
        predictor: Asks the model for its K functions on a batch.
        module: The head as it stands in the model, with whatever wraps it.
        name: Its name in the base model.
        adapters: For an ensemble of adapters, the adapter of each function.
    """

    predictor: BatchPredictor
    module: nn.Module
    name: str
    adapters: tuple[str, ...] | None = None

    @property
    def label_tokens(self) -> list[int] | None:
        """The rows of an output layer over a vocabulary that stand for the classes."""
        tokens = getattr(self.predictor.head, "label_tokens", None)
        return None if tokens is None else tokens.tolist()


def locate(
    model: nn.Module,
    *,
    task: str = "auto",
    label_tokens: Sequence[int | str] | None = None,
    tokenizer: Any = None,
    head_module: str | None = None,
    num_samples: int | None = 1,
    seed: int = 0,
    dropout: float | None = None,
    adapter_names: Sequence[str] | None = None,
    memory_budget: int | None = None,
) -> Located:
    """Find the head of a model that is to be asked in some way; the arguments are those of `extract_features`."""
    how = "mean" if num_samples == 1 and dropout is None and adapter_names is None else "sample"
    source = choose_source(model, how, seed, dropout, adapter_names)
    _check_in_place(source.root)
    options: dict[str, Any] = {"task": task, "label_tokens": label_tokens, "tokenizer": tokenizer}
    count = None if num_samples == 1 and adapter_names is not None else num_samples
    predictor = BatchPredictor(source, how, count, seed, budget=memory_budget, **options)
    if predictor.head.answers is not Prediction:
        what = "labels that may hold together" if predictor.head.answers is LabelsPrediction else "numbers"
        raise ValueError(
            f"{type(source.root).__name__} answers with {what}, not with a distribution over classes, so that no "
            "prediction of it is right or wrong. An uncertainty head needs a classifier with two classes or more."
        )
    if isinstance(predictor.head, NextTokenHead) and predictor.head.label_tokens is None:
        raise ValueError(
            f"{type(source.root).__name__} is a language model. Say which tokens answer its prompts: "
            "label_tokens=[' A', ' B', ...] with tokenizer=, or their ids. Free generation has no right answer."
        )
    name, module = _find(model, source.root, predictor, head_module)
    names = None if adapter_names is None else tuple(adapter_names)
    return Located(predictor, module, name, names)


def _find(
    model: nn.Module, root: nn.Module, predictor: BatchPredictor, head_module: str | None
) -> tuple[str, nn.Module]:
    """Name and module of the head."""
    if head_module is not None:
        for owner in (root, model):
            found = dict(owner.named_modules()).get(head_module)
            if found is not None:
                return head_module, found
        raise ValueError(
            f"{type(root).__name__} has no module {head_module!r}. Its parts are {_children(root)}; head_module= "
            "takes a name of model.named_modules()."
        )
    if isinstance(predictor.head, NextTokenHead):
        output = predictor.head.output_layer
        return next((name for name, module in root.named_modules() if module is output), "lm_head"), output
    for name in HEAD_NAMES:
        if isinstance(getattr(root, name, None), nn.Module):
            return name, getattr(root, name)
    whole = [(name, child) for name, child in root.named_children() if isinstance(child, ModulesToSaveWrapper)]
    if len(whole) == 1:
        return whole[0]
    raise ValueError(
        f"{type(root).__name__} has no classification head by one of the names {', '.join(HEAD_NAMES)}. Its parts are "
        f"{_children(root)}. Name the module that answers with logits: head_module='...'."
    )


def _children(root: nn.Module) -> list[str]:
    return [name for name, _ in root.named_children()]


def _check_in_place(root: nn.Module) -> None:
    layers = [module for module in root.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("The adapter is disabled, so its errors cannot be seen. Enable it first.")
    if any(layer.merged for layer in layers):
        raise ValueError(
            "The adapter is merged into the base weights, which are then those of another base model: a head that was "
            "fitted so would belong to none that can be loaded. Call unmerge_adapter() first, or do not merge."
        )
