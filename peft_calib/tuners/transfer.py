"""What is made on the host and used on the device, on its way there without a wait."""

from __future__ import annotations

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
