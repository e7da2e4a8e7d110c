"""Where the normals of a draw come from: a private generator a draw, or its mirror image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .factors import Sample
from .seeding import keyed_generator
from .transfer import to_device


class NormalSource(NamedTuple):
    """A stream of standard normals of a generator; sign -1 turns each into its negative, which is as normal."""

    generator: torch.Generator
    sign: int = 1

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next normals of the stream."""
        noise = torch.randn(shape, generator=self.generator, dtype=dtype)
        return noise if self.sign == 1 else -noise


class TracedSource:
    """The same stream inside a graph that torch.compile builds, where a generator cannot be held.

    Its key is seed and step, int64 (2,) on the CPU, so that every run of the graph reads them anew; the purpose comes
    between the two in the key of the stream.
    """

    def __init__(self, key: torch.Tensor, purpose: int) -> None:
        self.key, self.purpose = key, purpose
        self.sizes: list[int] = []
        self.ranks: list[int] = []

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.sizes, self.ranks = [*self.sizes, *shape], [*self.ranks, len(shape)]
        return _nth_normal(self.key, self.purpose, self.sizes, self.ranks, dtype)


@torch.library.custom_op("peft_calib::nth_normal", mutates_args=())
def _nth_normal(
    key: torch.Tensor, purpose: int, sizes: Sequence[int], ranks: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """The last of several tensors drawn one after the other from one stream; `sizes` are their shapes in a row."""
    seed, step = key.tolist()
    source, start = NormalSource(keyed_generator(seed, purpose, step)), 0
    for rank in ranks:
        noise = source.normal(tuple(sizes[start : start + rank]), dtype)
        start += rank
    return noise


@_nth_normal.register_fake
def _(key: torch.Tensor, purpose: int, sizes: Sequence[int], ranks: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tuple(sizes[len(sizes) - ranks[-1] :]), dtype=dtype)


def sources_of_draws(draw: Sample, purpose: int) -> list[NormalSource]:
    """One source for each of the draws asked for, keyed by the purpose, their seed and their index.

    All that is random in a draw is an odd function of its normals before any flow, so negating them gives a draw of
    the same distribution. An antithetic pair (2j, 2j + 1) shares the key 2j; each half is made on its own, so that
    chunks of a larger K may begin anywhere.

    Example:
        >>> a, b = sources_of_draws(Sample(2, antithetic=True), 0)
        >>> bool((a.normal((3,), torch.float32) == -b.normal((3,), torch.float32)).all())
        True
    """
    indices = range(draw.first, draw.first + draw.num_samples)
    if not draw.antithetic:
        return [NormalSource(keyed_generator(draw.seed, purpose, k)) for k in indices]
    return [NormalSource(keyed_generator(draw.seed, purpose, k - k % 2), 1 - 2 * (k % 2)) for k in indices]


@dataclass
class Normals:
    """Standard normals of K draws, tensor after tensor: the same whatever K is, on whatever device they are used."""

    sources: Sequence[NormalSource | TracedSource]

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        """The next ones, (K, *like.shape), with dtype and device of `like`."""
        return self.of(tuple(like.shape), like.dtype, like.device)

    def of(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The next ones, (K, *shape)."""
        return to_device(torch.stack([source.normal(shape, dtype) for source in self.sources]), device)
