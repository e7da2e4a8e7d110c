"""One forward of a base model: what it asked for, and the factors that its layers read.

A forward runs from its first line to its last in one thread, so what belongs to it is kept by thread. What gradients
come back to is kept by thread as well, and once more for all: on an accelerator a backward runs in threads of its own.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .asked import Asked
from .factors import Draw, Law
from .generation import Generation, Traced
from .objective import Receipt

if TYPE_CHECKING:
    from .holder import FactorHolder


@dataclass(eq=False)
class Part:
    """What one forward has from one holder.

    Args:
        draw: What the call chain asked for, if anything.
        comparing: Laws that are evaluated at several functions on each row.
    """

    draw: Draw | None
    comparing: list[Law]
    factors: dict[str, Generation] = field(default_factory=dict)
    traced: dict[str, Traced] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Functions evaluated on each row: several only where a law trains on several."""
        return max([1, *[law.train_samples for law in self.comparing]])


@dataclass(eq=False)
class Forward:
    """One forward of a base model that is under way.

    Args:
        root: The base model.
        asked: What the call chain asked of it.
        trains: What `Modes.begin_forward` answered.
        parts: What it has from each holder.
        lent: A configuration with a padding token on loan, see `padding`.
    """

    root: nn.Module
    asked: Asked | None
    trains: bool
    parts: dict[FactorHolder, Part] = field(default_factory=dict)
    lent: Any = None

    @property
    def num_samples(self) -> int:
        """Functions that a training forward evaluates on each row."""
        return max([1, *[part.num_samples for part in self.parts.values()]])


class _Running(threading.local):
    def __init__(self) -> None:
        self.forwards: list[Forward] = []


_RUNNING = _Running()


def push(forward: Forward) -> None:
    """Say that a forward begins in this thread."""
    _RUNNING.forwards.append(forward)


def pop(root: nn.Module) -> Forward | None:
    """Say that the innermost forward of a base model is over; what ran inside it is over as well."""
    forwards = _RUNNING.forwards
    for index in range(len(forwards) - 1, -1, -1):
        if forwards[index].root is root:
            found = forwards[index]
            del forwards[index:]
            return found
    return None


def is_running(root: nn.Module) -> bool:
    """Whether a forward of a base model is under way in this thread."""
    return any(forward.root is root for forward in _RUNNING.forwards)


def running_part(holder: FactorHolder) -> Part | None:
    """What the forward under way in this thread has from a holder."""
    for forward in reversed(_RUNNING.forwards):
        if holder in forward.parts:
            return forward.parts[holder]
    return None


class Here(threading.local):
    """What a holder keeps of the forwards of one thread when they are over."""

    def __init__(self) -> None:
        #: The last generation that gradients may come back to, by adapter.
        self.latest: dict[str, Generation] = {}
        #: Position of the slot that was read last by a direct call of a part of the model, by adapter.
        self.position: dict[str, int] = {}
        self.pending: list[torch.Tensor] = []
        self.receipt: Receipt | None = None
        self.unclaimed = False
        self.last_task_loss: torch.Tensor | None = None
        self.last_regularizer: torch.Tensor | None = None
