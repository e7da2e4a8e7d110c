"""A head as plain float32 modules: whatever wraps it in the model is worked into its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..internals.torch import remove_all_hooks
from ..tuners.heads import StackedModule
from ..tuners.layer import FactorLinear


class FirstToken(nn.Module):
    """A head that takes the states of all tokens and reads the first, for features of one token: (N, D) to (N, C)."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Put the axis of the tokens back."""
        return self.head(features.unsqueeze(1))


@torch.no_grad()
def plain_head(module: nn.Module, adapter: str | None = None, rows: list[int] | None = None) -> nn.Module:
    """The function of a head in the model, for one draw, as modules of its own.

    A low-rank update of a linear map in it becomes part of the weight, W + s B A; a quantised weight is dequantised;
    of what adapters train whole the active one's copy is taken.

    Args:
        module: The head as it stands in the model.
        adapter: Of a head with several adapters, the one whose function is asked for; the active ones when `None`.
        rows: Rows to keep of a linear map over a vocabulary.

    Returns:
        A copy in evaluation mode, float32, on the CPU, without gradients and hooks.

    Raises:
        ValueError: If a wrapped layer in it is no linear map, or weights are not in memory.
    """
    names = None if adapter is None else [adapter]
    module = _active_copy(module, names)
    if isinstance(module, StackedModule):
        plain = module.copied()
    elif _is_linear(module):
        return _effective_linear(module, names, rows)
    else:
        inner = {id(part): _effective_linear(part, names) for part in _outermost(module)}
        memo: dict[int, Any] = dict(inner)
        plain = copy.deepcopy(module, memo)
    if rows is not None:
        plain = _effective_linear(plain, names, rows)
    return _settled(plain)


def _active_copy(module: nn.Module, names: list[str] | None) -> nn.Module:
    """What a wrapper of PEFT hands its input to."""
    if not isinstance(module, AuxiliaryTrainingWrapper):
        return module
    active = module.active_adapters if names is None else names
    if module.disable_adapters or not active or not isinstance(module, ModulesToSaveWrapper):
        return module.original_module
    own = module.modules_to_save
    return own[active[0]] if active[0] in own else module.original_module  # noqa: SIM401  (it has no get)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map, with or without updates, that has to be made plain."""
    return isinstance(module, (nn.Linear, BaseTunerLayer)) or hasattr(module, "W_q")


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """The linear maps in a module, those inside others excepted."""
    for child in module.children():
        if _is_linear(child):
            yield child
        else:
            yield from _outermost(child)


def _effective_linear(module: nn.Module, names: list[str] | None, rows: list[int] | None = None) -> nn.Module:
    """A linear map with the updates of its active adapters, (out, in)."""
    if isinstance(module, FactorLinear):
        base = _effective_linear(module.base_layer, names, rows)
        for name in () if module.merged or module.disable_adapters else names or module.active_adapters:
            if name in module.factor_slots:
                delta = module.get_delta_weight(name)
                base.weight += (delta if rows is None else delta[rows]).to(base.weight)
        return base
    if isinstance(module, BaseTunerLayer):
        return _effective_linear(_merged(module, names), names, rows)
    if not isinstance(module, nn.Linear) and not hasattr(module, "W_q"):
        raise ValueError(
            f"The head has a {type(module).__name__}, whose weights cannot be copied: heads of linear maps are known. "
            "Name another module with head_module=."
        )
    weight, bias = dequantize_module_weight(module), module.bias
    if weight.is_meta:
        raise ValueError("The weights of the head are not in memory (meta device). Load the model without offloading.")
    weight, bias = (None if x is None else (x if rows is None else x[rows]) for x in (weight, bias))
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(_own(weight), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(_own(bias), requires_grad=False)
    return plain.eval()


def _merged(layer: Any, names: list[str] | None) -> nn.Module:
    """The map under a tuner layer of PEFT, in float32, with its updates merged by PEFT itself."""
    base = layer.base_layer
    plain = _effective_linear(base, names)
    merged = copy.deepcopy(layer, {id(base): plain}).float()
    if not (layer.merged or layer.disable_adapters):
        merged.merge(adapter_names=list(layer.active_adapters) if names is None else names)
    return merged.get_base_layer()


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _settled(module: nn.Module) -> nn.Module:
    """Without hooks, gradients and training mode, in float32 on the CPU."""
    remove_all_hooks(module)
    return module.to("cpu").float().eval().requires_grad_(False)
