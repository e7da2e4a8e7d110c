"""The one tuner layer: a linear map plus `s * B A x`, where a law elsewhere says what A and B are."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.other import transpose
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..internals.peft import TunerLayer, in_out_features
from .factors import NoFactorsError, Pair
from .holder import FactorHolder
from .low_rank import add_low_rank
from .rows import tile
from .shared_rows import rows_once
from .slots import Slot
from .uncalled import check_called


def unknown_recipe() -> Any:
    """Stand in for the way back to a torchao weight, which only a model loaded with a configuration for it knows.

    A layer calls it, and gets its error, before it touches a weight.
    """
    raise ValueError(
        "The base layer was quantised by torchao in place (quantize_), so nobody knows how a merged weight would be "
        "quantised again. Training and prediction work; to merge, load the base model with a "
        "transformers.TorchAoConfig as quantization_config, or export_lora and merge into the unquantised model."
    )


class FactorSlot(nn.Module):
    """What a layer keeps of one adapter: its index in the slot table, and its dropout; no parameters."""

    def __init__(self, index: int, dropout: float) -> None:
        super().__init__()
        self.index = index
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()


class FactorLinear(nn.Module, TunerLayer):
    """A linear map (`nn.Linear`, `Conv1D` or quantised) with low-rank updates read from a `FactorHolder`.

    Args:
        base_layer: The map to adapt, or a tuner layer of another method around it.
        holder: Where the laws of this tuner type live.
        fan_in_fan_out: Whether the base weight is stored (in, out).
        kwargs: Quantisation arguments of PEFT.

    Raises:
        TypeError: If the sizes of the map cannot be determined.
    """

    adapter_layer_names = ("factor_slots",)
    other_param_names = ("r", "lora_alpha", "scaling")

    def __init__(
        self, base_layer: nn.Module, holder: FactorHolder, fan_in_fan_out: bool = False, **kwargs: Any
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.in_features, self.out_features = in_out_features(self.get_base_layer())
        if self.in_features is None or self.out_features is None:
            raise TypeError(f"The sizes of {type(base_layer)} cannot be determined, so it cannot be adapted.")
        self.fan_in_fan_out = fan_in_fan_out
        self.factor_slots = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters = []
        self._merged_factors: dict[str, Pair] = {}
        self._holder = (holder,)  # a tuple is no submodule, yet follows copy and pickle

    @property
    def holder(self) -> FactorHolder:
        return self._holder[0]

    def update_layer(self, adapter_name: str, slot: Slot, index: int, lora_alpha: float, dropout: float) -> None:
        """Give the layer a slot of a new adapter; the factors follow when its law is built."""
        self.factor_slots[adapter_name] = FactorSlot(index, dropout).train(self.training)
        self.r[adapter_name] = slot.r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = slot.scaling

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Apply the base map and the update of each active adapter."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self._base_result(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, result, adapter_names)
        for adapter in self.active_adapters:
            if adapter in self.factor_slots:
                result = self._adapt(adapter, x, result)
        return result.to(dtype)

    def _base_result(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        once = rows_once(x) if isinstance(self.base_layer, SUPPORTED_BASE_LAYERS) else None
        if once is None:  # a layer of another method may draw something for each row
            return self.base_layer(x, *args, **kwargs)
        return tile(self.base_layer(once, *args, **kwargs), len(x) // len(once))

    def _adapt(self, adapter: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        slot = self.factor_slots[adapter]
        A, B, perturbation = self.holder.read(adapter, slot.index, x.device)
        x = self.cast_input(x, A.dtype)
        result = add_low_rank(result, slot.dropout(x), A, B, self.scaling[adapter])
        addition = None if perturbation is None else perturbation(self, adapter, x, A, B)
        return result if addition is None else result + addition

    def _check_adapter_names(self, x: torch.Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_batch_forward(self, x: torch.Tensor, result: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        for adapter in sorted(set(adapter_names) & set(self.factor_slots)):
            rows = [row for row, name in enumerate(adapter_names) if name == adapter]
            result[rows] = self._adapt(adapter, x[rows], result[rows]).to(result.dtype)
        return result

    def factors(self, adapter: str) -> Pair:
        """The deterministic factors A (r, d_in) and B (d_out, r) of an adapter, without gradients."""
        with torch.no_grad():
            return self.holder.generation(adapter).pairs[self.factor_slots[adapter].index]

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The weight update `s * B A` of an adapter, laid out like the base weight."""
        return self._delta(*self.factors(adapter), adapter)

    def _delta(self, A: torch.Tensor, B: torch.Tensor, adapter: str) -> torch.Tensor:
        # some CPUs have no fast half-precision matrix product
        wide = A.dtype if A.dtype in (torch.float32, torch.float64) else torch.float32
        delta = (B.to(wide) @ A.to(wide)) * self.scaling[adapter]
        return transpose(delta, self.fan_in_fan_out).to(A.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of adapters to the base weight.

        Args:
            safe_merge: Work on a copy and refuse a result that is not finite.
            adapter_names: Adapters to merge; the active ones when omitted.

        Raises:
            ValueError: If the law has no single pair of factors, the safe merge is not finite, or nobody knows how the
                base weight was quantised.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.factor_slots:
                continue
            if getattr(self.quantization_backend, "get_apply_tensor_subclass", None) is unknown_recipe:
                unknown_recipe()  # PEFT's backend would call it when the old weight is gone
            self.holder.check_exportable(adapter)
            A, B = (factor.clone() for factor in self._factors_to_merge(adapter, safe_merge))
            weight = self.get_base_weight()
            weight = weight.clone() if safe_merge else weight
            weight += self._delta(A, B, adapter).to(device=weight.device, dtype=weight.dtype)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(_broken(adapter))
            self.set_base_weight(weight)
            self._merged_factors[adapter] = (A, B)
            self.merged_adapters.append(adapter)
            self.holder.merged.add(adapter)

    def _factors_to_merge(self, adapter: str, safe_merge: bool) -> Pair:
        try:
            return self.factors(adapter)
        except NoFactorsError as error:
            if not safe_merge:
                raise
            raise ValueError(f"{_broken(adapter)}: {error}") from error

    def unmerge(self) -> None:
        """Take the merged updates out again, the very ones that were added."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            self.holder.merged.discard(adapter)
            weight = self.get_base_weight()
            delta = self._delta(*self._merged_factors.pop(adapter), adapter)
            weight -= delta.to(device=weight.device, dtype=weight.dtype)
            self.set_base_weight(weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is one LoRA; a law without a single pair of factors says no."""
        if adapter_name in self.holder.laws:
            self.holder.check_exportable(adapter_name)
        return True

    # ----------------------------------------------------------------- what PEFT tells a layer, for the holder too

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.holder.set_adapter(self.active_adapters, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.holder.enable(enabled)

    def set_requires_grad(self, adapter_names, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.holder.laws:
                self.holder.laws[name].requires_grad_(requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> FactorLinear:
        """Freeze or unfreeze the layer and the laws; transformers freezes a loaded adapter this way."""
        super().requires_grad_(requires_grad)
        self.holder.requires_grad_(requires_grad)
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.holder.discard(adapter_name)

    def moved(self, adapter_name: str, device: torch.device | None) -> None:
        self.holder.place(adapter_name, device)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self) if self.quantization_backend is not None else ""

    def __repr__(self) -> str:
        return "peft_calib." + super().__repr__()


def _broken(adapter: str) -> str:
    # PEFT's words, which its users look for
    return f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken"


#: Base layers that can be adapted without quantisation.
SUPPORTED_BASE_LAYERS = (nn.Linear, Conv1D)


def check_supported(base: nn.Module, parent: nn.Module, key: str, kwargs: dict) -> None:
    """Raise `ValueError` for a target module that cannot be adapted."""
    check_called(parent, key)
    if isinstance(base, SUPPORTED_BASE_LAYERS):
        return
    backend = resolve_quantization_backend(base, **kwargs)
    if backend is None or backend.layer_type != "linear":
        raise ValueError(
            f"Target module {key} is a {type(base).__name__}, which is not supported. Supported are torch.nn.Linear, "
            "transformers' Conv1D and the quantised linear layers PEFT knows (bitsandbytes, torchao, GPTQ, AWQ, HQQ, "
            "AQLM, EETQ, INC); embeddings and convolutions are not. Change target_modules, or train the module whole "
            "with modules_to_save."
        )
