"""A law's tensors lie in memory of their own, so that equal bits give equal answers on every processor.

What was loaded by assignment lies where the file put it, often 8 bytes behind a multiple of 64, and a matrix product
may round differently there: the BLAS takes other paths through memory that is not aligned, or laid out in another
order. The same bits would then give other logits after loading than before saving, on some processors only. PyTorch's
own allocations are aligned alike, so a copy is all that is needed.

Tensors that nobody else holds on to are moved for good: all when a law is added, copies of all when they are assigned
by `load_state_dict`, and buffers and frozen parameters whenever they are found elsewhere. A trainable parameter that
somebody has laid elsewhere *afterwards* stays there, because it may have become a part of a larger buffer through
which an optimiser writes (DeepSpeed, ZeroRedundancyOptimizer): a law would go on reading the copy while the training
moved the original. The law is then called with a copy made for the call, through which gradients flow back.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from .factors import Draw, Factors, Law

#: Bytes; what PyTorch's allocators keep.
ALIGNMENT = 64
# modules are shared between threads, and both ways below write to them
_moving = threading.RLock()


def is_astray(tensor: torch.Tensor) -> bool:
    """Whether a tensor whose memory can be judged lies unaligned or not row-major, as no fresh allocation would."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device.type not in ("cpu", "cuda"):
        return False
    try:
        return tensor.numel() > 0 and (tensor.data_ptr() % ALIGNMENT != 0 or not tensor.is_contiguous())
    except RuntimeError:  # a wrapper of torch.func, which has no memory
        return False


@torch.no_grad()
def settle(law: nn.Module, frozen_only: bool = False) -> None:
    """Move what is astray into memory of its own, all or frozen tensors only; the tensors stay the same objects."""
    with _moving, torch.inference_mode(False):
        for tensor in (*law.parameters(), *law.buffers()):
            if is_astray(tensor) and not (frozen_only and tensor.requires_grad):
                tensor.data = own_copy(tensor.detach())


def load_copies(law: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict, *_: Any) -> None:
    """Pre-hook of `load_state_dict`: `assign=True` assigns copies (a mapped file may also be written later)."""
    if local_metadata.get("assign_to_params_buffers", False):
        for key in [key for key in state_dict if key.startswith(prefix)]:
            if type(state_dict[key]) in (torch.Tensor, nn.Parameter):
                state_dict[key] = own_copy(state_dict[key].detach())


def answer(law: Law, draw: Draw) -> Factors:
    """Call a law with tensors that all lie in memory of their own."""
    if torch.compiler.is_compiling() or not any(map(is_astray, (*law.parameters(), *law.buffers()))):
        return law(draw)
    settle(law, frozen_only=True)
    with _moving:
        copies = {name: own_copy(p) for name, p in law.named_parameters() if is_astray(p)}
        law.invalidate()  # what it keeps between calls must not hang on copies that live for one
        try:
            return torch.func.functional_call(law, copies, (draw,))
        finally:
            law.invalidate()


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, through which gradients flow, in memory of its own and in row-major order."""
    return tensor.clone(memory_format=torch.contiguous_format)
