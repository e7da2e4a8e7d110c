"""Gaussian perturbation of the adapted weights in training, which favours flat minima (Flat-LoRA, arXiv 2409.14396).

Row i of a perturbed weight `W' + eps` has noise of standard deviation `sigma_i = rho ||W'_i|| / sqrt(d_in)`, W' being
the weight with its update. No perturbed weight is ever stored: `"dense"` draws eps from a key, adds `x eps^T` to the
output, and draws it again in backward; `"local"` draws the effect `sigma_i ||x|| z` on each output (Kingma et al.
2015). The scale carries no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import transpose
from torch import nn

from ...internals.torch import version_of
from ..layer import FactorLinear
from ..seeding import keyed_generator


@torch.library.custom_op("peft_calib::keyed_normal", mutates_args=())
def keyed_normal(key: torch.Tensor, part: int, size: list[int], like: torch.Tensor) -> torch.Tensor:
    """Standard normals on the device of `like` from seed, step and part alone: equal keys, equal numbers."""
    seed, step = key.tolist()
    generator = keyed_generator(seed, step, part)
    if like.device.type != "cpu":  # a generator of that device, seeded by the same key
        generator = torch.Generator(device=like.device).manual_seed(generator.initial_seed())
    return torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)


@keyed_normal.register_fake
def _(key: torch.Tensor, part: int, size: list[int], like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(size)


class _DenseNoise(torch.autograd.Function):
    """`y = x E^T` with a matrix E of standard normals that is drawn again in backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, key: torch.Tensor, part: int, out_features: int) -> torch.Tensor:
        ctx.save_for_backward(key)
        ctx.part, ctx.size = part, [out_features, x.shape[-1]]
        return nn.functional.linear(x, keyed_normal(key, part, ctx.size, x))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (key,) = ctx.saved_tensors
        return grad @ keyed_normal(key, ctx.part, ctx.size, grad), None, None, None


class BaseNorms:
    """Squared norms of the base weights' rows, read again when one has changed or moved; copied and saved empty."""

    def __init__(self) -> None:
        self._squares: dict[int, tuple[tuple, torch.Tensor]] = {}

    def of(self, layer: FactorLinear, index: int) -> torch.Tensor:
        """float32 (d_out,) for one layer, whatever its weight is stored in."""
        if torch.compiler.is_compiling():
            return _row_squares(layer)  # a cache that fills up would have the graph built again
        base = layer.get_base_layer()
        stamp = tuple((t.data_ptr(), version_of(t), t.device) for t in (*base.parameters(), *base.buffers()))
        if index not in self._squares or self._squares[index][0] != stamp:
            self._squares[index] = stamp, _row_squares(layer)
        return self._squares[index][1]

    def __deepcopy__(self, memo: dict) -> BaseNorms:
        return BaseNorms()

    def __getstate__(self) -> dict:
        return {"_squares": {}}


def _row_squares(layer: FactorLinear) -> torch.Tensor:
    weight = transpose(layer.get_base_weight().detach(), layer.fan_in_fan_out)
    return weight.float().square().sum(1)


# not frozen: torch 2.11 cannot trace the making of a frozen dataclass, and compiled steps make one each forward
@dataclass
class WeightNoise:
    """What layers add to their outputs in one training forward; `key` is the seed and its number, int64 (2,)."""

    rho: torch.Tensor
    key: torch.Tensor
    kind: str
    norms: BaseNorms

    def __call__(
        self, layer: FactorLinear, adapter: str, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor
    ) -> torch.Tensor:
        """The addition (N, ..., d_out); points of one forward share the normal numbers and differ in scale only."""
        index = layer.factor_slots[adapter].index
        with torch.no_grad():
            sigma = self.scale(layer, index, A, B, layer.scaling[adapter]).to(x.dtype)
        num_points, out_features = len(sigma), sigma.shape[-1]
        if self.kind == "dense":
            y = _DenseNoise.apply(x, self.key, index, out_features)
        else:
            size = [x.shape[0] // num_points, *x.shape[1:-1], out_features]
            z = keyed_normal(self.key, index, size, x.detach())
            y = x.norm(dim=-1, keepdim=True) * (z if num_points == 1 else z.repeat(num_points, *[1] * (z.dim() - 1)))
        return (y.reshape(num_points, -1, out_features) * sigma.unsqueeze(1)).view(y.shape)

    def scale(self, layer: FactorLinear, index: int, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
        """Standard deviations (K, d_out) of the rows, without forming the updated weight.

        `||W0_i + s B_i A||^2 = ||W0_i||^2 + 2 s B_i (A W0_i^T) + s^2 B_i (A A^T) B_i^T`
        """
        A, B = (factor if factor.dim() == 3 else factor.unsqueeze(0) for factor in (A, B))
        base = layer.get_base_layer()
        # the base map applied to the rows of A, which a quantised layer can do without unpacking its weight
        products = base(A)
        bias = getattr(base, "bias", None)
        products = (products if bias is None else products - bias).float()
        A, B = A.float(), B.float()
        cross = (B * products.transpose(1, 2)).sum(-1)
        own = ((B @ (A @ A.transpose(1, 2))) * B).sum(-1)
        squares = self.norms.of(layer, index) + 2 * scaling * cross + scaling**2 * own
        return self.rho.to(squares) * (squares.clamp_min(0) / layer.in_features).sqrt()


def scheduled_rho(schedule: str, progress: float, cycles: int) -> float:
    """Factor of rho at part p: `1 - cos(2 pi f p)`, whose mean is 1; one rise, `(1 - cos(pi p)) / 2`; or 1."""
    if schedule == "cycles":
        return 1 - math.cos(2 * math.pi * cycles * progress)
    return (1 - math.cos(math.pi * progress)) / 2 if schedule == "flat_lora" else 1.0
