"""What is made on the host and used on the device, on its way there without a wait."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def to_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Move a tensor (and cast it) such that the host does not wait for the device.

    A copy from ordinary memory makes the host wait even where `non_blocking` is set, because CUDA first has to bring
    the pages into memory that cannot move. So the tensor goes there at once; torch keeps that memory until the copy is
    over, and uses it again in the next step.
    """
    tensor = tensor if dtype is None else tensor.to(dtype)
    from_host = device.type == "cuda" and tensor.device.type == "cpu"
    if from_host and not torch.compiler.is_compiling():  # a graph has its own copies
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class IndexTable:
    """Integers as a tensor, made where it is needed.

    A buffer that is not saved would be lost when a model is moved to the meta device and materialised again
    (`to_empty`, FSDP and other sharded loaders): nothing could bring it back. Plain numbers cannot be lost.
    """

    def __init__(self, rows: Iterable[int]) -> None:
        self.rows = tuple(int(row) for row in rows)
        self._made: dict[torch.device, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def on(self, device: torch.device) -> torch.Tensor:
        """The indices as an int64 tensor on a device, where they are copied once."""
        found = self._made.get(device)
        if found is None:
            with torch.inference_mode(False):  # autograd saves indices, also those first used in inference mode
                found = torch.tensor(self.rows, dtype=torch.int64, device=device)
            if not torch.compiler.is_compiling() and device.type != "meta":
                self._made[device] = found  # a dictionary that fills up would have a graph built again
        return found

    def __getstate__(self) -> dict:
        return {"rows": self.rows, "_made": {}}
