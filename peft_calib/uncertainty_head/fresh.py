"""A head that starts at fresh parameters instead of the frozen ones: what the papers' ablations compare with."""

from __future__ import annotations

import torch

from ..tuners.seeding import keyed_generator, uniform
from .copied import CopiedHead

_FRESH = 5  # purpose of a seed


def fresh_head(head: CopiedHead, seed: int) -> CopiedHead:
    """A head of the same shape whose linear maps are drawn as torch draws them, uniform within `1 / sqrt(inputs)`.

    Args:
        head: With one start; what is no linear map (a norm) stays.
        seed: Of the parameters.

    Raises:
        ValueError: If the functions have heads of their own.
    """
    if len(head.starts) > 1:
        raise ValueError("init='random' takes one head; these functions have heads of their own. Use init='copy'.")
    generator, start = keyed_generator(seed, _FRESH), dict(head.starts[0])
    for name in head.trained:
        weight = start.get(f"{name.rpartition('.')[0]}.weight".lstrip("."))
        if weight is not None and weight.dim() == 2:
            start[name] = uniform(tuple(start[name].shape), weight.shape[1] ** -0.5, generator)
    return CopiedHead(head.module, [start])


def from_frozen(deltas: list[torch.Tensor], start: CopiedHead, frozen: CopiedHead) -> list[torch.Tensor]:
    """Distances from a fresh start as distances from the frozen head."""
    moved = zip(start.trained, deltas, strict=True)
    return [delta + start.starts[0][name] - frozen.starts[0][name] for name, delta in moved]
