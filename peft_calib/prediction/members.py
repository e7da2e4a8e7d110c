"""Several adapters of one model as the draws of a prediction: a deep ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper

from .dataset import predict_dataset
from .result import Prediction


def predict_members(model: PeftModel, data: Any, adapter_names: Sequence[str], **options: Any) -> Prediction:
    """Predict a data set with each of some adapters: in one mixed batch where PEFT can, else one after the other.

    Args:
        model: With the adapters.
        data: As for `predict_dataset`.
        adapter_names: The members.
        options: Further arguments of `predict_dataset`.
    """
    names = list(adapter_names)
    if mixes_adapters(model):
        return _checked(predict_dataset(model, data, num_samples=len(names), adapter_names=names, **options))
    members = []
    for name in names:
        model.set_adapter(name)
        members.append(_checked(predict_dataset(model, data, how="mean", **options)))
    return Prediction.stack_draws(members)


def mixes_adapters(model: PeftModel) -> bool:
    """Whether stock PEFT can run several adapters in one batch: heads must be single layers for that."""
    single = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    heads = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    return all(isinstance(head.original_module, single) for head in heads)


def _checked(found: Any) -> Prediction:
    if not isinstance(found, Prediction):
        raise ValueError("The model answers with numbers; an ensemble of classes is expected.")
    return found
