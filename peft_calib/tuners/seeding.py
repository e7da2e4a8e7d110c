"""Private random generators keyed by integers, so that no call of this package moves the global random state."""

from __future__ import annotations

import hashlib
import operator
import warnings
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist

from ..internals.torch import default_store

#: How long a process waits for the seed of the first one before it takes its own.
PATIENCE = timedelta(seconds=60)
_asked: Counter[str] = Counter()


def keyed_generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator for a seed and further integers; neighbouring keys give unrelated streams.

    Example:
        >>> a, b = keyed_generator(0, 1), keyed_generator(0, 1)
        >>> bool(torch.rand(3, generator=a).equal(torch.rand(3, generator=b)))
        True
    """
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
