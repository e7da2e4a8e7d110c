"""Which tensors of a model are an adapter's, and whether those of a file are they: what saving and loading share."""

from __future__ import annotations

import re

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..internals.torch import without_fsdp
from .config import CalibLoraConfig
from .sealing import check_values


def modules_trained_whole(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor], keep_names: bool = False
) -> dict[str, torch.Tensor]:
    """Tensors of an adapter's `modules_to_save` and the like, named as in its file, or as the model does."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            name = without_fsdp(name)
            inside = {k.removeprefix(f"{name}."): v for k, v in state_dict.items() if k.startswith(f"{name}.")}
            state = module.adapter_state_dict(adapter_name, inside)
            names = module.adapter_state_dict_load_map(adapter_name) if keep_names else {}
            found.update({f"{name}.{names.get(key, key)}": value for key, value in state.items()})
    return found


def saved_name(key: str) -> str:
    """The name in its file of a tensor of a module trained whole."""
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", key)


def embedding_names(model: nn.Module, config: CalibLoraConfig) -> set[str]:
    """Names of embeddings that may come with an adapter: those it was saved with, or any where that is not known."""
    record = config.identity or {}
    if record.get("embeddings") is not None:
        return {name for key in record["embeddings"] for name in (key, f"base_model.model.{key}")}
    layers = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    return {
        f"{name}.{tensor}"
        for name, module in model.named_modules()
        if any(module is layer for layer in layers if layer is not None)
        for tensor, _ in module.named_parameters()
    }


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter whose weights were refused off the model again."""
    if not isinstance(model, PeftModel):
        return
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    else:
        model.base_model.unload()


def check_complete(
    expected: dict[str, torch.Tensor], given: dict[str, torch.Tensor], marker: str, allowed: set[str]
) -> None:
    """Compare an adapter's tensors with what the model needs; names every missing, extra or mis-shaped one."""
    prefix = "base_model.model."
    expected = {key.removeprefix(prefix): value for key, value in expected.items()}
    given = {key.removeprefix(prefix): value for key, value in given.items()}
    allowed = {key.removeprefix(prefix) for key in allowed}
    for key, value in given.items():
        if key in expected:
            check_values(key, value, SAFETENSORS_WEIGHTS_NAME, expected[key].dtype)
    problems = [f"missing tensor {key}" for key in expected if marker in key and key not in given]
    problems += [f"unexpected tensor {key}" for key in given if key not in expected]
    problems += [
        f"unexpected tensor {key}, which belongs to the base model"
        for key in given
        if key in expected and key not in allowed
    ]
    problems += [
        f"tensor {key} has shape {tuple(value.shape)}, expected {tuple(expected[key].shape)}"
        for key, value in given.items()
        if key in expected and value.shape != expected[key].shape
    ]
    if problems:
        raise ValueError(
            "The adapter's weights do not fit its configuration and this base model: "
            + "; ".join(problems)
            + ". Use the folder as save_pretrained wrote it, with the base model (and head size) it was trained on."
        )
