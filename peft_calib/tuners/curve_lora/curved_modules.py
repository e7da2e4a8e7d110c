"""Modules trained whole, such as a new head, as part of the curve: one copy of their tensors a control point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..heads import HeadTensors, head_key
from ..transfer import to_device
from .config import CurveLoraConfig

#: Control points, (places, ...), with their places along the chain.
Parts = list[tuple[torch.Tensor, tuple[int, ...]]]


class HeadPoints(nn.Module):
    """Control points of the heads' tensors, with the coefficients of the factors.

    `heads` are the modules' tensors as they are now, `anchors` those of each anchor of an anchored curve (`None`
    leaves their buffers to be loaded), `moving` the control points that are trained.
    """

    def __init__(
        self,
        config: CurveLoraConfig,
        heads: HeadTensors,
        anchors: Sequence[Mapping[str, torch.Tensor]] | None,
        moving: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.names = [(module, name) for module, tensors in heads.items() for name in tensors]
        self.moving, self.fixed = moving, config.shape.anchors
        self.anchored = config.curve_mode == "anchored"
        self.points = nn.ParameterDict()
        for module, name in self.names:
            start = heads[module][name].detach().float()
            if self.anchored:
                own = [_tensor_of(anchor, f"{module}.{name}", start) for anchor in anchors or ()]
                stack = torch.stack(own or [start] * len(self.fixed))
                self.register_buffer(f"anchor_{head_key(module, name)}", stack)
                rows = [stack[i // config.shape.degree : i // config.shape.degree + 2].mean(0) for i in moving]
            else:
                rows = [start] * len(moving)
            if rows:
                self.points[head_key(module, name)] = nn.Parameter(torch.stack(rows).clone())

    def at(self, coefficients: torch.Tensor) -> HeadTensors:
        """The tensors (K, ...) at points with coefficients (K, N_cp)."""
        heads: HeadTensors = {}
        for module, name in self.names:
            heads.setdefault(module, {})[name] = combined(self._parts(head_key(module, name)), coefficients)
        return heads

    def _parts(self, key: str) -> Parts:
        parts = [(self.points[key], self.moving)] if key in self.points else []
        return [*parts, (getattr(self, f"anchor_{key}"), self.fixed)] if self.anchored else parts

    @torch.no_grad()
    def put(self, heads: HeadTensors) -> None:
        for module, name in self.names:
            put(self._parts(head_key(module, name)), heads[module][name])


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


def _tensor_of(anchor: Mapping[str, torch.Tensor], name: str, start: torch.Tensor) -> torch.Tensor:
    tensor = anchor.get(name)
    if tensor is None or tensor.shape != start.shape:
        given = None if tensor is None else tuple(tensor.shape)
        raise ValueError(
            f"An anchor's {name} has shape {given}, the model's {tuple(start.shape)}: every anchor must "
            "carry the same modules_to_save as the curve, for the same number of classes."
        )
    return tensor.float()
