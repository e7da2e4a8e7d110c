"""What transformers' own `load_adapter` brings, held against the record once it is there.

That loader asks a method before it reads the weights and when it has put them in place, not in between, and it puts
whatever a file holds wherever the name leads. So the base model's parameters are noted when the law is built, and when
the loader freezes the adapter, its last step, the law's tensors must be the recorded ones and the base model's the
same as before. An adapter that is loaded to be trained on is not frozen, and is not checked here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from torch.distributed.tensor import DTensor

from ..identity import ADAPTER_MENDS, ON_PURPOSE, is_own, tensor_hash
from .config import CalibLoraConfig
from .sealing import FLOATS, recorded
from .state import embedding_names, saved_name

_PREFIX = "base_model.model."


def check_on_arrival(model: nn.Module, config: CalibLoraConfig, adapter_name: str) -> Callable[[], None]:
    """Note the base model as it is, for a check when the weights of an adapter have been loaded.

    The check does nothing if another way of loading has verified the weights. It raises `ValueError` if a tensor of
    the adapter is not the recorded one, or the file has overwritten one of the base model.
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
