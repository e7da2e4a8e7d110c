"""LoRA's own start: A uniform, B zero, so that training begins at the base model's function."""

from __future__ import annotations

import torch

from .config import CalibLoraConfig
from .factors import Pair, ShapeGroup, SlotTable
from .seeding import keyed_generator, uniform


def plain_start(config: CalibLoraConfig, slots: SlotTable) -> dict[ShapeGroup, Pair]:
    """Initial factors of all slots, keyed by the configuration's seed.

    Args:
        config: Of the method; with `init_weights=False` B is drawn as well.
        slots: The slots.

    Returns:
        For each shape group A (n, r, d_in) and B (n, d_out, r).
    """
    generator = keyed_generator(config.init_seed, 0)
    return {g: plain_factors(g, len(indices), config.init_weights, generator) for g, indices in slots.groups.items()}


def plain_factors(group: ShapeGroup, count: int, zero_b: bool, generator: torch.Generator) -> Pair:
    """A (count, r, d_in) and B (count, d_out, r) of slots of one shape."""
    bound = group.in_features**-0.5
    A = uniform((count, group.r, group.in_features), bound, generator)
    B = torch.zeros(count, group.out_features, group.r)
    return A, B if zero_b else B.uniform_(-bound, bound, generator=generator)
