"""The generator network: from the embedding of a slot to its LoRA factors.

Trunk (one vector z of width h a slot, or a slot and side) and heads (z to an r x d block). Sizes and formulas are
those of HypeLoRA (arXiv 2603.19278) where it has them; the rank, factored and chunk heads keep the
last layer from exploding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """`nn.Linear` that computes in the dtype of its input.

    A class of its own, so that `target_modules="all-linear"` of a further adapter does not adapt the generator.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def seeded_dropout(x: torch.Tensor, p: float, generator: torch.Generator | None) -> torch.Tensor:
    """Dropout from a private generator; the identity without one."""
    if generator is None or p == 0:
        return x
    keep = torch.rand(x.shape, generator=generator) >= p
    return x * keep.to(x) / (1 - p)


def _norm(x: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)


class MLPTrunk(nn.Module):
    """`depth` hidden layers with exact GELU, (T, e) to (T, h); each slot by itself."""

    def __init__(self, embed_dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(embed_dim if i == 0 else hidden, hidden) for i in range(depth))

    def forward(self, u: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        for layer in self.layers:
            u = F.gelu(layer(u))
        return u


class EncoderLayer(nn.Module):
    """A post-norm transformer encoder layer with ReLU, as `nn.TransformerEncoderLayer`; its dropout is keyed."""

    def __init__(self, hidden: int, nhead: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.nhead, self.dropout = nhead, dropout
        self.in_proj, self.out_proj = Linear(hidden, 3 * hidden), Linear(hidden, hidden)
        self.ffn_in, self.ffn_out = Linear(hidden, ffn), Linear(ffn, hidden)
        self.norm_attention, self.norm_ffn = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """(T, H) to (T, H)."""

        def drop(t: torch.Tensor) -> torch.Tensor:
            return seeded_dropout(t, self.dropout, generator)

        x = _norm(x + drop(self._attend(x, drop)), self.norm_attention)
        update = self.ffn_out(drop(F.relu(self.ffn_in(x))))
        return _norm(x + drop(update), self.norm_ffn)

    def _attend(self, x: torch.Tensor, drop) -> torch.Tensor:
        tokens, hidden = x.shape
        q, k, v = self.in_proj(x).view(tokens, 3, self.nhead, hidden // self.nhead).permute(1, 2, 0, 3)
        weights = drop(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1))
        return self.out_proj((weights @ v).transpose(0, 1).reshape(tokens, hidden))


class TransformerTrunk(nn.Module):
    """Projection and `depth` encoder layers, (T, e) to (T, H), over all slots at once; token order does not matter."""

    def __init__(self, embed_dim: int, hidden: int, depth: int, nhead: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.token_proj = Linear(embed_dim, hidden)
        self.layers = nn.ModuleList(EncoderLayer(hidden, nhead, ffn, dropout) for _ in range(depth))

    def forward(self, u: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        x = self.token_proj(u)
        for layer in self.layers:
            x = layer(x, generator)
        return x


#: Where generated numbers stop growing linearly; trained LoRA factors stay below a tenth of it.
KNEE = 4.0


class Head(nn.Module):
    """Base of the heads: (n, h) to (n, r, d). `last` is the layer whose zero makes the output zero.

    Without a gain the output stays as it is (the authors' form). With it one Adam step moves a generated number about
    as far as it would move a LoRA entry, although many weights push it together; and beyond KNEE numbers grow like a
    logarithm, so that a wild step does not end in NaN and there is still a gradient that leads back.
    """

    last: Linear

    def __init__(self, gain: float | None) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Generate an (r, d) block for each row of z."""
        if self.gain is None:
            return self.blocks(z)
        return KNEE * torch.asinh(self.blocks(z) * (self.gain / KNEE))

    def blocks(self, z: torch.Tensor) -> torch.Tensor:
        """The blocks before the gain."""
        raise NotImplementedError


class FullHead(Head):
    """One linear map h -> r*d: (h+1)*r*d parameters. The authors' head."""

    def __init__(self, hidden: int, r: int, d: int, gain: float | None = None) -> None:
        super().__init__(gain)
        self.r, self.last = r, Linear(hidden, r * d)

    def blocks(self, z: torch.Tensor) -> torch.Tensor:
        return self.last(z).unflatten(-1, (self.r, -1))


class RankHead(Head):
    """`W GELU(z + rho_k) + b` for each rank k: (h+1)*d + r*h parameters. The default."""

    def __init__(self, hidden: int, r: int, d: int, gain: float | None = None) -> None:
        super().__init__(gain)
        self.rho, self.last = nn.Parameter(torch.randn(r, hidden)), Linear(hidden, d)

    def blocks(self, z: torch.Tensor) -> torch.Tensor:
        return self.last(F.gelu(z.unsqueeze(1) + self.rho.to(z.dtype)))


class FactoredHead(Head):
    """h -> q -> r*d, no bias in the first map: h*q + (q+1)*r*d parameters. A learned basis of q matrices."""

    def __init__(self, hidden: int, r: int, d: int, q: int, gain: float | None = None) -> None:
        super().__init__(gain)
        self.r, self.down, self.last = r, Linear(hidden, q, bias=False), Linear(q, r * d)

    def blocks(self, z: torch.Tensor) -> torch.Tensor:
        return self.last(self.down(z)).unflatten(-1, (self.r, -1))


class ChunkHead(Head):
    """`W GELU(z + rho_k + chi_j) + b` in C = ceil(d/c) chunks, overhang dropped: (h+1)*c + (r+C)*h parameters."""

    def __init__(self, hidden: int, r: int, d: int, c: int, gain: float | None = None) -> None:
        super().__init__(gain)
        self.d = d
        self.rho, self.chi = nn.Parameter(torch.randn(r, hidden)), nn.Parameter(torch.randn(math.ceil(d / c), hidden))
        self.last = Linear(hidden, c)

    def blocks(self, z: torch.Tensor) -> torch.Tensor:
        features = z[:, None, None] + (self.rho[:, None] + self.chi).to(z.dtype)
        return self.last(F.gelu(features)).flatten(2)[..., : self.d]


#: By the name that a configuration gives them.
HEADS: dict[str, type[Head]] = {"full": FullHead, "rank": RankHead, "factored": FactoredHead, "chunk": ChunkHead}
