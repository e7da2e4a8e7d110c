"""A masked autoregressive flow on the rows of a core: one small network per factor, all evaluated together."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..transfer import IndexTable

#: Lower bound of the scale, so that the map stays invertible.
MIN_SCALE = 1e-3


class MaskedAffineFlow(nn.Module):
    """`v_j = (softplus(a_j) + 1e-3) u_j + b_j` with (a_j, b_j) a function of the entries before (Papamakarios 2017).

    The conditioner is a masked residual network: linear, two residual blocks of two linear maps, linear. Each factor
    has its own, shared by its rows. Every layer starts as the identity. Layers alternate the order of the coordinates.
    """

    def __init__(self, count: int, features: int, hidden: int, depth: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _AffineLayer(count, features, hidden, index % 2 == 1, generator) for index in range(depth)
        )

    def forward(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mapped rows of u (count, rows, features), and log |det| of each row, (count, rows)."""
        log_det = u.new_zeros(u.shape[:-1])
        for layer in self.layers:
            u, change = layer(u)
            log_det = log_det + change
        return u, log_det


class _AffineLayer(nn.Module):
    def __init__(self, count: int, features: int, hidden: int, reverse: bool, generator: torch.Generator) -> None:
        super().__init__()
        order = torch.arange(1, features + 1)
        order = order.flip(0) if reverse else order
        inner = torch.arange(hidden) % max(1, features - 1) + 1
        self.first = _MaskedLinear(count, inner[:, None] >= order, generator)
        self.blocks = nn.ModuleList(_MaskedLinear(count, inner[:, None] >= inner, generator) for _ in range(4))
        self.last = _MaskedLinear(count, order.repeat(2)[:, None] > inner, None)

    def forward(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.first(u)
        for inward, outward in (self.blocks[:2], self.blocks[2:]):
            hidden = hidden + outward(torch.relu(inward(torch.relu(hidden))))
        raw, shift = self.last(hidden).chunk(2, dim=-1)
        # the constant makes the scale 1 where the network says 0
        scale = nn.functional.softplus(raw + math.log(math.expm1(1 - MIN_SCALE))) + MIN_SCALE
        return scale * u + shift, scale.log().sum(-1)


class _MaskedLinear(nn.Module):
    """A stack of linear maps under one mask; zero without a generator."""

    def __init__(self, count: int, mask: torch.Tensor, generator: torch.Generator | None) -> None:
        super().__init__()
        outputs, inputs = mask.shape
        weight, bias = torch.zeros(count, outputs, inputs), torch.zeros(count, 1, outputs)
        if generator is not None:
            weight.uniform_(-1, 1, generator=generator).div_(math.sqrt(inputs))
            bias.uniform_(-1, 1, generator=generator).div_(math.sqrt(inputs))
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.mask, self._shape = IndexTable(mask.flatten()), mask.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = self.mask.on(x.device).view(self._shape)
        return torch.baddbmm(self.bias.to(x.dtype), x, (self.weight * mask).to(x.dtype).mT)
