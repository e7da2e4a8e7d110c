"""The processes of a run: one, or those that `accelerate launch` or `torchrun` started."""

from __future__ import annotations

import torch
from accelerate import PartialState


def on_cpu() -> bool:
    """Whether there is no accelerator to run on, so that processes talk through gloo."""
    return not torch.accelerator.is_available()


def processes() -> PartialState:
    """Accelerate's view of the processes; the first call joins them."""
    return PartialState(cpu=True) if on_cpu() else PartialState()
