"""From bases and cores to stacked factors A (K, n, r, d_in) and B (K, n, d_out, r), group by group."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..factors import ShapeGroup
from .inducing import Whitened, combine

#: Whitened bases by group, side ("A" or "B") and role ("rows" or "columns").
Bases = Mapping[tuple[ShapeGroup, str, str], Whitened]
#: Something with one entry a factor, by group and side, that broadcasts over (K, n, R, C).
PerFactor = Mapping[tuple[ShapeGroup, str], torch.Tensor]
Pairs = dict[ShapeGroup, tuple[torch.Tensor, torch.Tensor]]


def groups_of(bases: Bases) -> list[ShapeGroup]:
    """The groups in `bases`, each once."""
    return list(dict.fromkeys(group for group, _, _ in bases))


def assemble(bases: Bases, cores: PerFactor, sigma: PerFactor | None) -> Pairs:
    """A and B of every group, `W = sigma G_r^T V G_c`, of cores V (K, n, R, C); with sigma 1 where it is omitted."""
    factors = {}
    for group in groups_of(bases):
        for side in "AB":
            V = cores[group, side] if sigma is None else cores[group, side] * sigma[group, side]
            factors[group, side] = combine(bases[group, side, "rows"].G, V, bases[group, side, "columns"].G)
    return {group: (factors[group, "A"], factors[group, "B"]) for group in groups_of(bases)}


def middle(bases: Bases, group: ShapeGroup) -> torch.Tensor:
    """X = G_c^B G_r^A^T, (n, C, R): what stands between the two cores of a slot, `B A = P (V_B X V_A) Q`."""
    return bases[group, "B", "columns"].G @ bases[group, "A", "rows"].G.mT


def assemble_core_form(bases: Bases, cores: PerFactor, sigma: PerFactor) -> Pairs:
    """A = Q, the same for every draw, and B = P M: the same product `B A = P M Q` as that of the factors.

    `P = sigma_B G_r^B^T` (n, d_out, R), `Q = sigma_A G_c^A` (n, C, d_in); M (K, n, R, C) stands under side `"A"`.
    """
    pairs = {}
    for group in groups_of(bases):
        P = bases[group, "B", "rows"].G.mT * sigma[group, "B"]
        Q = bases[group, "A", "columns"].G * sigma[group, "A"]
        pairs[group] = Q.unsqueeze(0), P @ cores[group, "A"]
    return pairs
