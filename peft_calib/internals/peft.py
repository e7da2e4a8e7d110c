"""Names that PEFT keeps private, as read in PEFT 0.21.2: those a tuner overrides, under names of our own.

`Tuner` and `TunerLayer` only rename. What each hook is for stands here; what is done there stands with the subclass.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.utils import save_and_load
from torch import nn

StateDict = dict[str, torch.Tensor]


class Tuner(BaseTuner):
    """A tuner model, with PEFT's private hooks under public names; `super()` reaches PEFT's own."""

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        self.mark_trainable(model)

    def mark_trainable(self, model: nn.Module) -> None:
        """Called when all targets are wrapped, before PEFT touches anything else."""
        super()._mark_only_adapters_as_trainable(model)

    def _create_and_replace(self, peft_config: PeftConfig, *target: Any, current_key: str, **kwargs: Any) -> None:
        self.adapt(peft_config, *target, key=current_key, **kwargs)

    @abstractmethod
    def adapt(self, config: PeftConfig, *target: Any, **kwargs: Any) -> None:
        """Adapt one target module, named `target_name` in its parent and `key` in the model."""

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        return self.is_target(peft_config, key)

    @abstractmethod
    def is_target(self, config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        """Whether a module is to be adapted."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own also hands weight and bias over, which a head of several layers does not have
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self.cast(adapter_name, autocast_adapter_dtype)

    def cast(self, adapter_name: str, autocast: bool) -> None:
        """Called when PEFT has cast an adapter; without `autocast` it takes the dtype of the base model."""

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.take_out(*args, **kwargs)

    def take_out(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Take the adapters out of the model, merged or not."""
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        return self.mixing(kwargs.pop("adapter_names", None), kwargs)

    @abstractmethod
    def mixing(self, adapter_names: list[str] | None, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """Context of a forward or `generate` whose rows belong to the adapters named, one name a row."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: StateDict,
        unwanted_adapter_names: list,
    ) -> StateDict:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return cls.tensors_to_save(model, config, adapter_name, state_dict, selected)

    @classmethod
    def peft_names(cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: StateDict) -> set[str]:
        """Names of the tensors that PEFT itself counts to an adapter."""
        return set(super()._get_adapter_state_dict(model, config, adapter_name, state_dict, []))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return cls.name_in_file(key, adapter_name)

    @classmethod
    def name_in_file(cls, key: str, adapter_name: str) -> str:
        """A tensor's name without that of its adapter."""
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, *args: Any, **kwargs: Any) -> StateDict:
        return cls.names_in_model(*args, **kwargs)

    @classmethod
    def names_in_model(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: StateDict
    ) -> StateDict:
        """The tensors of a file under the names that they have in the model."""
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


class TunerLayer(BaseTunerLayer):
    """A tuner layer, likewise."""

    def base_place(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and dtype of the base weight; of one that Accelerate has offloaded, the device that it is used on."""
        base = self.get_base_layer()
        device, dtype = self._get_base_layer_device_and_dtype(base)
        return (device_of_use(base) if device == torch.device("meta") else device), dtype

    def cast_input(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """An input in the dtype of the factors, unless PEFT was told not to cast."""
        return self._cast_input_dtype(x, dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        self.moved(adapter_name, device or self.base_place()[0])

    def moved(self, adapter_name: str, device: torch.device | None) -> None:
        """Called when an adapter has been moved to the device of the base weight."""


def device_of_use(layer: nn.Module) -> torch.device:
    """Where Accelerate loads the weights of an offloaded layer in each call; meta for one that just has none."""
    hook = getattr(layer, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])  # several, one after the other
    found = next((h.execution_device for h in hooks if getattr(h, "execution_device", None) is not None), "meta")
    return torch.device(found)


def in_out_features(layer: nn.Module) -> tuple[int | None, int | None]:
    """Logical sizes of a linear map, quantised or not; `None` where PEFT cannot tell."""
    return _get_in_out_features(layer)


# --------------------------------------------------------------------- the enum of methods and the reading of configs


def extend_peft_types(name: str) -> PeftType:
    """Add a member to PEFT's enum of methods, which Python regards as closed."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)  # EnumType.__setattr__ refuses new members
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    if not (PeftType(name) is PeftType[name] is getattr(PeftType, name) and name in list(PeftType)):
        raise ImportError(f"peft_calib could not add {name} to peft.PeftType on this Python and PEFT version.")
    return member


def wrap_method_reading(around: Callable[[Callable[..., str]], Callable[..., str]]) -> None:
    """Put something around the function by which PEFT reads which method a saved adapter is of."""
    PeftConfig._get_peft_type = classmethod(around(PeftConfig._get_peft_type.__func__))  # type: ignore[method-assign,assignment]


def count_to_adapters(own: Callable[[nn.Module], Iterable[str]]) -> None:
    """Have PEFT's state dicts of the base model leave out children of modules that are no tuner layers.

    PEFT collects the names of what adapters have put into a model from tuner layers and auxiliary modules alone. `own`
    names the children of a module that are an adapter's, none for a module of others.
    """
    collect = save_and_load._get_adapter_state_dict_key_prefixes

    @wraps(collect)
    def with_ours(model: PeftModel) -> set[str]:
        named = model.base_model.model.named_modules()
        return collect(model) | {f"{name}.{child}".lstrip(".") for name, module in named for child in own(module)}

    save_and_load._get_adapter_state_dict_key_prefixes = with_ours
