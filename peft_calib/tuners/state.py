"""Which tensors of a model are an adapter's, and whether those of a file are they: what saving and loading share."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from ..identity import ADAPTER_MENDS, ON_PURPOSE, is_own, tensor_hash
from ..internals.torch import without_fsdp
from .config import CalibLoraConfig
from .sealing import FLOATS, check_values, recorded

_PREFIX = "base_model.model."


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
        return {name for key in record["embeddings"] for name in (key, _PREFIX + key)}
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


def train_biases(model: nn.Module, config: CalibLoraConfig, bias: str, biases: set[str]) -> None:
    """Make an adapter one that trains biases of the base model: those that are loaded now would not be saved else."""
    # asks the method, whose values may not go with it; the record is of the adapter without them
    replace(config, bias=bias, identity=None)
    config.bias = bias
    if not config.inference_mode:
        for name, parameter in model.named_parameters():
            if without_fsdp(name) in biases:
                parameter.requires_grad_(True)
    warnings.warn(
        f"The tensors hold biases of the base model, which this adapter has not trained. From now on it does: its "
        f"configuration has bias={bias!r}, so that they are saved with it.",
        stacklevel=5,
    )


def check_complete(
    expected: dict[str, torch.Tensor], given: dict[str, torch.Tensor], marker: str, allowed: set[str]
) -> None:
    """Compare an adapter's tensors with what the model needs; names every missing, extra or mis-shaped one."""
    expected = {key.removeprefix(_PREFIX): value for key, value in expected.items()}
    given = {key.removeprefix(_PREFIX): value for key, value in given.items()}
    allowed = {key.removeprefix(_PREFIX) for key in allowed}
    for key, value in given.items():
        if key in expected:
            check_values(key, value, SAFETENSORS_WEIGHTS_NAME, expected[key].dtype)
    problems = [f"missing tensor {key}" for key in expected if marker in key and key not in given]
    problems += [f"unexpected tensor {key}" for key in given if key not in expected]
    problems += [
        f"unexpected tensor {key}, which belongs to the base model"
        + (" (a bias is loaded where the configuration's `bias` trains it)" if key.endswith("bias") else "")
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


def check_on_arrival(model: nn.Module, config: CalibLoraConfig, adapter_name: str) -> Callable[[], None]:
    """Note the base model as it is, for a check when transformers' own `load_adapter` has loaded an adapter's weights.

    That loader asks a method before it reads the weights and when it has put them in place, not in between, and it
    puts whatever a file holds wherever the name leads. So the base model's parameters are noted when the law is built,
    and when the loader freezes the adapter, its last step, the law's tensors must be the recorded ones and the base
    model's the same as before. The check does nothing if another way of loading has verified the weights, or the
    adapter is loaded to be trained on, which freezes nothing.
    """
    before = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    root = weakref.ref(model)

    def check() -> None:
        model = root()
        if model is None or not config.unverified or not config.inference_mode:
            return
        config.unverified = False
        _check_base(model, config, before)
        _check_own(model, config, adapter_name)

    return check


def _check_base(model: nn.Module, config: CalibLoraConfig, before: dict[str, weakref.ref]) -> None:
    allowed = embedding_names(model, config)
    for name, parameter in model.named_parameters():
        whole = ".modules_to_save." in name or "_law." in name or is_own(name, config)
        if name in before and before[name]() is not parameter and not whole and name not in allowed:
            raise ValueError(
                f"{SAFETENSORS_WEIGHTS_NAME}: unexpected tensor {name}, which belongs to the base model and is "
                f"overwritten there now. Load the base model anew. {ADAPTER_MENDS}."
            )


def _check_own(model: nn.Module, config: CalibLoraConfig, adapter_name: str) -> None:
    saved = recorded(config)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    if saved is None or any(isinstance(value, DTensor) or value.is_meta for value in state.values()):
        return
    found = {saved_name(name).removeprefix(_PREFIX): value for name, value in state.items()}
    for name, expected in saved.tensors.items():
        # the loader has cast what it read to the law's dtype; a narrower file comes back exactly
        if name not in found or not any(tensor_hash(form) == expected for form in _forms(found[name])):
            raise ValueError(
                f"{SAFETENSORS_WEIGHTS_NAME}: the tensor {name} is missing, or not the one that was saved. "
                f"{ADAPTER_MENDS}. {ON_PURPOSE}."
            )


def _forms(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor, *(tensor.to(dtype) for dtype in FLOATS if tensor.dtype in FLOATS and dtype != tensor.dtype)]
