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


def leave_processes() -> None:
    """End the group of processes that this one is of, if there is one.

    For programs whose last act it is. A process of several that only ends takes the group's threads down with it, in
    an order that nobody sets: now and then it aborts ("terminate called without an active exception"), and the
    launcher reports a finished training as a failed one.
    """
    processes().destroy_process_group()
