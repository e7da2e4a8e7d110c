"""Modules trained whole, such as a new head, as part of the curve: one copy of their tensors a control point."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.func import functional_call

from ...internals.torch import MovesAlong
from ..holder import FactorHolder
from ..transfer import to_device
from .config import CurveLoraConfig

#: Tensors of modules, by module and tensor name.
Heads = dict[str, dict[str, torch.Tensor]]
#: Control points, (places, ...), with their places along the chain.
Parts = list[tuple[torch.Tensor, tuple[int, ...]]]


class HeadPoints(nn.Module):
    """Control points of the heads' tensors, with the coefficients of the factors.

    `heads` are the modules' tensors as they are now, `anchors` those of each anchor of an anchored curve (`None`
    leaves their buffers to be loaded), `moving` the control points that are trained.
    """

    def __init__(
        self, config: CurveLoraConfig, heads: Heads, anchors: Sequence[Heads] | None, moving: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.names = [(module, name) for module, tensors in heads.items() for name in tensors]
        self.moving, self.fixed = moving, config.shape.anchors
        self.anchored = config.curve_mode == "anchored"
        self.points = nn.ParameterDict()
        for module, name in self.names:
            start = heads[module][name].detach().float()
            if self.anchored:
                own = [
                    start if anchors is None else _tensor_of(anchor, module, name, start) for anchor in anchors or ()
                ]
                stack = torch.stack(own or [start] * len(self.fixed))
                self.register_buffer(f"anchor_{_key(module, name)}", stack)
                rows = [stack[i // config.shape.degree : i // config.shape.degree + 2].mean(0) for i in moving]
            else:
                rows = [start] * len(moving)
            if rows:
                self.points[_key(module, name)] = nn.Parameter(torch.stack(rows).clone())

    def at(self, coefficients: torch.Tensor) -> Heads:
        """The tensors (K, ...) at points with coefficients (K, N_cp)."""
        heads: Heads = {}
        for module, name in self.names:
            heads.setdefault(module, {})[name] = combined(self._parts(_key(module, name)), coefficients)
        return heads

    def _parts(self, key: str) -> Parts:
        parts = [(self.points[key], self.moving)] if key in self.points else []
        return [*parts, (getattr(self, f"anchor_{key}"), self.fixed)] if self.anchored else parts

    @torch.no_grad()
    def put(self, heads: Heads) -> None:
        for module, name in self.names:
            put(self._parts(_key(module, name)), heads[module][name])


def combined(parts: Parts, coefficients: torch.Tensor) -> torch.Tensor:
    """The points (K, ...) of coefficients (K, N_cp)."""
    total = None
    for points, places in parts:
        weights = coefficients if len(places) == coefficients.shape[1] else coefficients[:, list(places)]
        term = torch.tensordot(to_device(weights, points.device, points.dtype), points, 1)
        total = term if total is None else total + term
    return total


def put(parts: Parts, points: torch.Tensor) -> None:
    """Set control points to those of a whole chain, (N_cp, ...)."""
    for own, places in parts:
        own.copy_(points[list(places)])


_TEMPLATES = threading.RLock()


class CurvedModule(MovesAlong):
    """A module whose tensors come from the holder: what stands in PEFT's `modules_to_save` of a curved head."""

    def __init__(self, template: nn.Module, holder: FactorHolder, adapter: str, name: str) -> None:
        super().__init__()
        # tuples are no submodules: the template must neither be saved nor trained, nor the holder found twice
        self._template, self._holder = (template.requires_grad_(False),), (holder,)
        self.adapter, self.name = adapter, name

    def companions(self) -> tuple[nn.Module, ...]:
        return self._template

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the module with the tensors of the current points; the rows of K points come point-major."""
        if torch.compiler.is_compiling():
            return self._call(self._template[0], args, kwargs)
        with _TEMPLATES:  # a functional call puts its tensors into the one template for its duration
            return self._call(self._template[0], args, kwargs)

    def _call(self, template: nn.Module, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        tensors = self._tensors()
        template.train(self.training)
        count = len(next(iter(tensors.values())))
        if count == 1:
            return functional_call(template, {name: tensor[0] for name, tensor in tensors.items()}, args, kwargs)
        x, *rest = args
        outputs = [
            functional_call(template, {name: tensor[k] for name, tensor in tensors.items()}, (part, *rest), kwargs)
            for k, part in enumerate(x.chunk(count))
        ]
        return torch.cat(outputs)

    def _tensors(self) -> dict[str, torch.Tensor]:
        heads = self._holder[0].heads(self.adapter)[self.name]
        return {name: heads[name].to(like.dtype) for name, like in self._template[0].named_parameters()}

    @torch.no_grad()
    def materialize(self) -> nn.Module:
        """The module with the tensors of the current single point, as an ordinary module."""
        tensors = self._tensors()
        for name, parameter in self._template[0].named_parameters():
            parameter.data = tensors[name][0].detach().clone()
        return self._template[0]


def trained_modules(model: nn.Module, adapter: str) -> dict[str, tuple[ModulesToSaveWrapper, nn.Module]]:
    """The modules that an adapter trains whole, by name in the base model, with PEFT's wrappers."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            found[name] = (module, module.modules_to_save[adapter])
    return found


def freeze_tensors(module: nn.Module) -> None:
    """Turn a module's parameters into buffers: PEFT unfreezes parameters whenever an adapter is activated."""
    for part in module.modules():
        part._frozen_names = [name for name, _ in part.named_parameters(recurse=False, remove_duplicate=False)]
        for name in part._frozen_names:
            tensor = getattr(part, name).detach()
            delattr(part, name)
            part.register_buffer(name, tensor)


def thaw_tensors(module: nn.Module) -> None:
    """Turn what `freeze_tensors` froze back into parameters."""
    for part in module.modules():
        for name in part.__dict__.pop("_frozen_names", ()):
            tensor = getattr(part, name)
            delattr(part, name)
            part.register_parameter(name, nn.Parameter(tensor))


def _tensor_of(anchor: Heads, module: str, name: str, start: torch.Tensor) -> torch.Tensor:
    tensor = anchor.get(module, {}).get(name)
    if tensor is None and "." in name:  # saved names are split at the last dot
        tensor = anchor.get(f"{module}.{name.rpartition('.')[0]}", {}).get(name.rpartition(".")[2])
    if tensor is None or tensor.shape != start.shape:
        given = None if tensor is None else tuple(tensor.shape)
        raise ValueError(
            f"An anchor's {module}.{name} has shape {given}, the model's {tuple(start.shape)}: every anchor must "
            "carry the same modules_to_save as the curve, for the same number of classes."
        )
    return tensor.float()


def _key(module: str, name: str) -> str:
    return f"{module}.{name}".replace(".", "/")
