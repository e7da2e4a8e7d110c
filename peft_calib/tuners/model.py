"""The one tuner model: finds the slots, builds the law, and serves every PEFT entry point."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import CONFIG_NAME, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..identity import Identity
from ..internals.peft import StateDict, Tuner
from ..internals.torch import without_compiler
from .asked import forward_replaced
from .config import CalibLoraConfig
from .factors import Law
from .heads import materialized_heads
from .holder import FactorHolder
from .hooks import attach_hooks, detach_hooks
from .laws import holders_of
from .layer import FactorLinear, check_supported, unknown_recipe
from .memory import own_copy
from .objective import is_encoder_decoder
from .sealing import check_tensors_recorded, record_of
from .slots import Slot, SlotTable
from .state import (
    check_complete,
    check_on_arrival,
    embedding_names,
    modules_trained_whole,
    saved_name,
    train_biases,
    withdraw,
)


class FactorModel(Tuner):
    """Base of the tuner models; a method adds a prefix, a holder name and the class of its law.

    Args:
        model: The base model, changed in place.
        config: The method's configuration.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Create the law on the meta device, for weights that are loaded next.
    """

    tuner_layer_cls = FactorLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    #: Attribute of the base model that holds the laws. It must not contain `prefix`, after which transformers' loader
    #: inserts the adapter name.
    holder_name: ClassVar[str]
    #: What is built of a configuration and the slots it adapts.
    law_class: ClassVar[Callable[[Any, SlotTable], Law]]

    def build_law(self, config: CalibLoraConfig, slots: SlotTable) -> Law:
        """Make the law of a new adapter; for a method whose law takes more than its configuration and slots."""
        return type(self).law_class(config, slots)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Wrap the target modules and build the adapter's law; on an error the model is left as it was."""
        config = self.peft_config[adapter_name]
        config.take_seed(adapter_name)
        self._slots: list[Slot] = []
        self._expected_slots = None
        holder = self.get_holder(model)
        if holder is None:
            model.add_module(self.holder_name, FactorHolder(self.prefix))
        try:
            # the law's tensors do not name modules, so targets always come from the config, never from a state dict
            self._expected_slots = config._slots_to_match
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict=None)
            self._install_law(model, adapter_name, low_cpu_mem_usage)
        except Exception as error:
            self._roll_back(model, adapter_name, first=holder is None)
            if self._expected_slots is not None and isinstance(error, ValueError) and CONFIG_NAME not in str(error):
                raise ValueError(f"{CONFIG_NAME} does not fit this base model: {error}") from error
            raise

    def mark_trainable(self, model: nn.Module) -> None:
        """Hold the slots against those an adapter was saved with: the last place where one can turn back."""
        if self._expected_slots is not None:
            SlotTable(self._slots).check(self._expected_slots)
        super().mark_trainable(model)

    def _install_law(self, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        config, slots, holder = self.peft_config[adapter_name], SlotTable(self._slots), self.get_holder(model)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            law = self.build_law(config, slots)
        law.start_seed = config.start_seed
        layer = next(m for m in model.modules() if self._is_own(m, holder))
        device, dtype = layer.base_place()
        if dtype == torch.float64:
            law.to(dtype)
        holder.add(adapter_name, law, device, adapter_name in self.active_adapters and not config.inference_mode)
        if config.unverified:
            holder.now.awaited[adapter_name] = check_on_arrival(model, config, adapter_name)
        attach_hooks(model)

    def _roll_back(self, model: nn.Module, adapter_name: str, first: bool) -> None:
        for name, module in list(model.named_modules()):
            if self._is_own(module, self.get_holder(model)) and adapter_name in module.factor_slots:
                BaseTunerLayer.delete_adapter(module, adapter_name)
                if first:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, module.base_layer)
        if first:
            self._remove_holder(model)
        else:
            self.get_holder(model).discard(adapter_name)
        self.peft_config.pop(adapter_name, None)

    def adapt(
        self,
        config: CalibLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Give a target module a slot, and put our layer around it if there is none of this type yet."""
        if parameter_name is not None:
            raise ValueError(f"{type(self).__name__} adapts linear modules; target_parameters is not supported.")
        holder = self.get_holder(self.model)
        layer = target if self._is_own(target, holder) else self._wrap(config, target, parent, key, holder)
        r, alpha = config.rank_of(key), config.alpha_of(key)
        slot = Slot(without_compiler(key), layer.in_features, layer.out_features, r, config.scaling(r, alpha))
        layer.update_layer(adapter_name, slot, len(self._slots), alpha, config.lora_dropout)
        layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._slots.append(slot)
        if layer is not target:
            setattr(parent, target_name, layer)

    def _wrap(
        self, config: CalibLoraConfig, target: nn.Module, parent: nn.Module, key: str, holder: FactorHolder
    ) -> FactorLinear:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kwargs = {"get_apply_tensor_subclass": unknown_recipe, **get_quantization_kwargs(self)}
        check_supported(base, parent, key, kwargs)
        layer = FactorLinear(target, holder, fan_in_fan_out=isinstance(base, Conv1D), **kwargs)
        # beside layers in eval mode a new one must not start in training mode; a first adapter may be trained at once
        return layer.train(holder.training if len(holder.laws) else True)

    def _is_own(self, module: nn.Module, holder: FactorHolder | None) -> bool:
        return isinstance(module, FactorLinear) and module.holder is holder

    @classmethod
    def get_holder(cls, model: nn.Module) -> FactorHolder | None:
        """The holder of this tuner type inside a base model, or `None`."""
        return getattr(model, cls.holder_name, None)

    def _remove_holder(self, model: nn.Module) -> None:
        if hasattr(model, self.holder_name):
            delattr(model, self.holder_name)

    @classmethod
    def _find_holder(cls, model: nn.Module) -> FactorHolder:
        """The holder somewhere inside a wrapped model."""
        name = f"{cls.prefix}law"
        return next(holder for holder in holders_of(model) if holder.laws_name == name)

    def is_target(self, config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        """By the configuration; the laws are modules of the base model too, whoever's they are, and never targets."""
        return None if _is_inside_holder(self.model, key) else check_target_module_exists(config, key)

    def add_weighted_adapter(self, adapters: list[str], *_: Any, **__: Any) -> None:
        """Refused: laws cannot be added, only what they answer."""
        raise ValueError(
            f"add_weighted_adapter adds pairs of factors, and {type(self).__name__} has laws, which make them: there "
            f"is no weighted sum of {', '.join(adapters)}. Write each as a plain LoRA (export_lora), and add those in "
            "PEFT with combination_type='cat', which is exact; without trained heads, which PEFT does not add."
        )

    def get_law(self, adapter_name: str = "default") -> Law:
        return self.get_holder(self.model).laws[adapter_name]

    def get_factors(self, adapter_name: str = "default") -> list[tuple[Slot, torch.Tensor, torch.Tensor]]:
        """The deterministic LoRA factors of an adapter.

        Args:
            adapter_name: Adapter name.

        Returns:
            For each slot, in order: the slot, A of shape (r, d_in) and B of shape (d_out, r), detached. The weight
            update is `slot.scaling * B @ A`.

        Raises:
            ValueError: If the law has no single pair of factors.
        """
        law, holder = self.get_law(adapter_name), self.get_holder(self.model)
        holder.check_exportable(adapter_name)
        with torch.no_grad():
            pairs = holder.generation(adapter_name).pairs
        return [(slot, A.detach(), B.detach()) for slot, (A, B) in zip(law.slots, pairs, strict=True)]

    def flush_grads(self) -> None:
        """Finish the backward of `regenerate="step"`: call after the last backward, before clipping and stepping."""
        for adapter in self.active_adapters:
            self.get_holder(self.model).flush_grads(adapter)

    def invalidate_factors(self) -> None:
        """Forget cached factors; needed only after editing parameters through `.data`."""
        self.get_holder(self.model).invalidate()

    def cast(self, adapter_name: str, autocast: bool) -> None:
        """Leave a law in float32, in which it is made, or give it the base model's dtype where PEFT is told so."""
        if autocast:
            return
        holder = self.get_holder(self.model)
        dtype = next(module for module in self.model.modules() if self._is_own(module, holder)).base_place()[1]
        if dtype is not None and dtype.is_floating_point:
            holder.laws[adapter_name].to(dtype)

    def take_out(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Take the layers out, and what they read from; heads of a law stay as they are for its single draw."""
        with materialized_heads(self.model, self.peft_config):
            model = super().take_out(*args, **kwargs)
        self._remove_holder(model)
        detach_hooks(model)
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        detach_hooks(self.model)

    @contextmanager
    def mixing(self, adapter_names: list[str] | None, kwargs: dict[str, Any]) -> Iterator[None]:
        """Tell every layer the adapter of each row, in this call chain only."""
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(adapter_names) - {"__base__"} - set(self.get_holder(self.model).laws)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        beams = kwargs.get("num_beams")
        beams = beams if isinstance(beams, int) and beams > 1 else 1
        encoder = self.model.get_encoder() if beams > 1 and is_encoder_decoder(self.model) else None
        in_encoder = set(encoder.modules()) if encoder is not None else set()
        named = {}
        for module in self.model.modules():
            if isinstance(module, (FactorLinear, AuxiliaryTrainingWrapper)):
                # beam search repeats the decoder's rows, but not the encoder's
                names = [name for name in adapter_names for _ in range(1 if module in in_encoder else beams)]
                named[module] = partial(_with_adapter_names, names)
        with forward_replaced(named):
            yield

    @classmethod
    def _law_marker(cls, adapter_name: str) -> str:
        return f"{cls.holder_name}.{cls.prefix}law.{adapter_name}."

    @classmethod
    def tensors_to_save(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: StateDict, selected: StateDict
    ) -> StateDict:
        """What PEFT has selected, and the law; what the adapter is, is recorded in its configuration."""
        # bias="all" also selects the biases of modules_to_save, which PEFT adds by itself under their own names
        selected = {key: value for key, value in selected.items() if ".modules_to_save." not in key}
        # the config object may have served another adapter since: what is saved is this one's table and seed
        law = cls._find_holder(model).laws[adapter_name]
        config.slot_table, config.start_seed = law.slots.to_json(), law.start_seed
        marker = cls._law_marker(adapter_name)
        own = {key: value for key, value in state_dict.items() if marker in key and cls._is_saved(config, key)}
        saved = {**selected, **own}
        config.identity = cls._record(model, config, adapter_name, state_dict, saved)
        return saved

    @classmethod
    def _is_saved(cls, config: PeftConfig, key: str) -> bool:
        """Whether a tensor of the law goes into the adapter's file."""
        return True

    @classmethod
    def _record(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict, saved: dict
    ) -> dict[str, Any] | None:
        """What the adapter is, from all tensors that PEFT is about to write; none of a sharded one, or of no weights.

        Hashing a sharded tensor takes every process, and a state dict may be asked for by one.
        """
        tensors = {**saved, **modules_trained_whole(model, adapter_name, state_dict)}
        if any(isinstance(value, DTensor) or value.is_meta for value in tensors.values()):
            return None
        named = {cls.name_in_file(key, adapter_name): value for key, value in tensors.items()}
        return record_of(Identity.of(config, named))

    @classmethod
    def name_in_file(cls, key: str, adapter_name: str) -> str:
        marker = cls._law_marker(adapter_name)
        if marker in key:
            return key.replace(marker, f"{cls.holder_name}.{cls.prefix}law.", 1)
        return super().name_in_file(key, adapter_name)

    @classmethod
    def names_in_model(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: StateDict
    ) -> StateDict:
        """The tensors of a file under the names that they have in the model; refused unless they are all of them."""
        state_dict = super().names_in_model(model, config, adapter_name, state_dict)
        saved, own = f"{cls.holder_name}.{cls.prefix}law.", cls._law_marker(adapter_name)
        root = next((name for name, _ in model.named_modules() if name.endswith(cls.holder_name)), cls.holder_name)
        root = root.removesuffix(cls.holder_name)
        remapped = {root + own + k.partition(saved)[2] if saved in k else k: v for k, v in state_dict.items()}
        try:
            whole = model.state_dict()
            optional = [root + own + name for name in cls._find_holder(model).laws[adapter_name].optional_tensors]
            remapped = {key: whole[key] for key in optional if key in whole} | remapped
            own_keys = {key for key in whole if own in key}
            own_keys |= modules_trained_whole(model, adapter_name, whole, keep_names=True).keys()
            own_keys |= cls.peft_names(model, config, adapter_name, whole)
            bias, biases = cls._biases_brought(model, config, adapter_name, whole, remapped.keys() - own_keys)
            check_complete(whole, remapped, own, own_keys | biases | embedding_names(model, config))
            if config.unverified and config.inference_mode:
                names = {key: cls.name_in_file(saved_name(key), adapter_name) for key in remapped}
                check_tensors_recorded(config, {names[key]: value for key, value in remapped.items()})
            if bias != config.bias:
                train_biases(model, config, bias, biases)
            config.unverified = False
        except ValueError:
            withdraw(model, adapter_name)
            raise
        # a head may be assigned too; a law makes its own copies
        return {key: value if own in key else own_copy(value) for key, value in remapped.items()}

    @classmethod
    def _biases_brought(
        cls, model: nn.Module, config: CalibLoraConfig, adapter_name: str, state_dict: StateDict, extra: set[str]
    ) -> tuple[str, set[str]]:
        """What `bias` must be for tensors that are put into an adapter by hand, and the names of those biases."""
        biases = {key for key in extra if key in state_dict and key.rpartition(".")[2] == "bias"}
        # a file must agree with its own configuration, and other adapters must answer what they answered
        if biases and config._slots_to_match is None and len(model.peft_config) == 1:
            for bias in (f"{cls.prefix}only", "all"):
                trained = copy(config)
                trained.bias = bias
                names = cls.peft_names(model, trained, adapter_name, state_dict)
                if biases <= names:
                    return bias, {name for name in names if name.rpartition(".")[2] == "bias"}
        return config.bias, set()


def _is_inside_holder(model: nn.Module, key: str) -> bool:
    module = model
    for part in key.split("."):
        module = getattr(module, part)
        if isinstance(module, FactorHolder):
            return True
    return False


def _with_adapter_names(adapter_names: list[str], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **{**kwargs, "adapter_names": adapter_names})
