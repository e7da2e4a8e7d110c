"""The device a benchmark runs on: its memory, and what makes the host wait for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operations whose answer the host has to wait for.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")


class Cuda:
    """A CUDA device."""

    kind = "cuda"
    dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name()

    @contextmanager
    def peak(self) -> Iterator[dict[str, int]]:
        """Bytes at the peak of a block, beyond those in use at its start."""
        found, before = {}, torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        torch.cuda.synchronize()
        found["bytes"] = torch.cuda.max_memory_allocated() - before

    @contextmanager
    def traffic(self, _: torch.nn.Module, __: dict) -> Iterator[Counter]:
        """Copies between host and device, by kind, and how often the host waited, inside a block."""
        found: Counter = Counter()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
            yield found
        for event in record.key_averages():
            if event.key.startswith("Memcpy") and "DtoD" not in event.key:
                found[event.key] += event.count
            elif event.key in ("cudaStreamSynchronize", "cudaEventSynchronize"):
                found["waits"] += event.count


class StandIn:
    """The CPU in the place of a device, on which the same script runs; its times and bytes mean nothing."""

    kind = "cpu"
    dtype = torch.float32
    name = "stand-in (CPU)"

    @contextmanager
    def peak(self) -> Iterator[dict[str, int]]:
        found: dict[str, int] = {}
        yield found
        found["bytes"] = 1

    @contextmanager
    def traffic(self, model: torch.nn.Module, batch: dict) -> Iterator[Counter]:
        """How often the host would wait: reads of what is made of parameters, buffers or the batch."""
        found: Counter = Counter()
        with _Follow([*model.parameters(), *model.buffers(), *batch.values()], found):
            yield found


class _Follow(TorchDispatchMode):
    """Follows what would live on a device through every operation, and counts the values that the host looks at."""

    def __init__(self, tensors: list[torch.Tensor], found: Counter) -> None:
        super().__init__()
        self.found = found
        # storages are kept alive: one that is freed and given to another tensor would pass for it
        self.there = {storage._cdata: storage for storage in map(torch.Tensor.untyped_storage, tensors)}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        out = func(*args, **kwargs)
        if any(x.untyped_storage()._cdata in self.there for x in inputs):
            name = func.overloadpacket.__name__
            if name in WAITS or (name == "index" and any(x.dtype == torch.bool for x in inputs[1:])):
                self.found["waits"] += 1
            for result in tree_leaves(out):
                if isinstance(result, torch.Tensor):
                    self.there[result.untyped_storage()._cdata] = result.untyped_storage()
        return out
