"""Where random numbers come from: private generators keyed by integers, which leave the global random state alone."""

from __future__ import annotations

import hashlib
import operator
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..internals.torch import default_store
from .factors import Sample
from .transfer import to_device

#: How long a process waits for the seed of the first one before it takes its own.
PATIENCE = timedelta(seconds=60)
_asked: Counter[str] = Counter()


def keyed_generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator for a seed and further integers; neighbouring keys give unrelated streams."""
    try:
        state = operator.index(seed) & (2**63 - 1)
    except TypeError:
        raise ValueError(f"A seed must be an integer, got {seed!r}.") from None
    for part in key:
        mixed = torch.Generator().manual_seed((state * 6364136223846793005 + part + 1442695040888963407) % 2**63)
        state = int(torch.randint(2**62, (), generator=mixed))
    return torch.Generator().manual_seed(state)


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> torch.Tensor:
    """Numbers in [-bound, bound), on the CPU whatever the default device: a seed means the same numbers everywhere."""
    return (torch.rand(shape, generator=generator, device="cpu") * 2 - 1) * bound


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
    """
    indices = range(draw.first, draw.first + draw.num_samples)
    if not draw.antithetic:
        return [NormalSource(keyed_generator(draw.seed, purpose, k)) for k in indices]
    return [NormalSource(keyed_generator(draw.seed, purpose, k - k % 2), 1 - 2 * (k % 2)) for k in indices]


@dataclass
class Normals:
    """Standard normals of K draws, tensor after tensor: the same whatever K is, on whatever device they are used.

    With a `scale` other than 1 they are multiplied by it.
    """

    sources: Sequence[NormalSource | TracedSource]
    scale: float = 1.0

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        """The next ones, (K, *like.shape), with dtype and device of `like`."""
        return self.of(tuple(like.shape), like.dtype, like.device)

    def of(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The next ones, (K, *shape)."""
        drawn = torch.stack([source.normal(shape, dtype) for source in self.sources])
        return to_device(drawn if self.scale == 1.0 else drawn * self.scale, device)


def seed_of_adapter(adapter_name: str) -> int:
    """A seed for an adapter whose configuration names none, from PyTorch's seed and the adapter's name.

    It follows `torch.manual_seed` and `transformers.set_seed`, as LoRA's start does, but leaves the random state where
    it is. Processes that train together must start from one seed, whatever each of them has given to PyTorch: all take
    that of the first.
    """
    digest = hashlib.sha256(f"{torch.initial_seed()} {adapter_name}".encode()).digest()
    seed = int.from_bytes(digest[:8], "big") >> 1
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _first_process_seed(seed, adapter_name)
    return seed


def _first_process_seed(seed: int, adapter_name: str) -> int:
    # Through the store and not by a broadcast: a process that builds a model which the others do not build must not
    # hang. The n-th adapter of a name that one process builds is taken for the n-th that the others build.
    _asked[adapter_name] += 1
    store, key = default_store(), f"peft_calib/seed/{adapter_name}/{_asked[adapter_name]}"
    if dist.get_rank() == 0:
        store.set(key, str(seed))
        return seed
    try:
        store.wait([key], PATIENCE)
    except RuntimeError:
        warnings.warn(
            f"Process 0 has not built the adapter {adapter_name!r} within {PATIENCE.seconds} seconds, so this process "
            "takes a seed of its own. Where processes train together, give the configuration a seed.",
            stacklevel=2,
        )
        return seed
    return int(store.get(key))
