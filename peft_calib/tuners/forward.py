"""One forward of a base model: what it asked for, and the factors that its layers read.

A forward runs from its first line to its last in one thread, so what belongs to it is kept by thread. What gradients
come back to is kept by thread as well, and once more for all: on an accelerator a backward runs in threads of its own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .asked import Asked
from .factors import Draw, Law
from .generation import Contents, Generation
from .objective import Receipt


@dataclass(eq=False)
class Part:
    """What one forward has from one holder.

    `draw` is what the call chain asked for, `comparing` are the laws that are evaluated at several functions on each
    row.
    """

    draw: Draw | None
    comparing: list[Law]
    factors: dict[str, Generation] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Functions evaluated on each row: several only where a law trains on several."""
        return max([1, *[law.train_samples for law in self.comparing]])


@dataclass(eq=False)
class Forward:
    """One forward of a base model that is under way.

    `trains` is what `Modes.begin_forward` answered, `parts` what it has from each holder, `lent` a configuration with
    a padding token on loan, see `padding`.
    """

    root: nn.Module
    asked: Asked | None
    trains: bool
    parts: dict[nn.Module, Part] = field(default_factory=dict)
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


def running_part(holder: nn.Module) -> Part | None:
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
        #: The regularisers of the last training forward.
        self.pending: list[torch.Tensor] = []
        self.receipt: Receipt | None = None
        #: Whether they are in no loss yet.
        self.unclaimed = False


@dataclass
class ForwardState:
    """What a holder knows between the beginning of a forward and the end of its backward.

    A copy, or a pickle that is read, starts afresh: generations hang on an autograd graph, which can neither be copied
    nor pickled, and none of it is part of what a law is.

    Args:
        here: Of this thread.
        latest: The last generation of any thread that gradients may come back to, by adapter: a backward on an
            accelerator runs in threads of its own, which have made none.
        cached: The last generation without gradients, with what it was made of, by adapter.
        uses: Whether gradients have come back to the generations that are alive, by adapter.
        tracing: What the forward has that torch.compile is building a graph of.
        root: The base model, once a forward of it has begun.
        awaited: Checks of weights that are still to be loaded, by adapter.
    """

    here: Here = field(default_factory=Here)
    latest: dict[str, Generation] = field(default_factory=dict)
    cached: dict[str, tuple[Generation, Contents]] = field(default_factory=dict)
    uses: dict[str, list[weakref.ref]] = field(default_factory=dict)
    tracing: Part | None = None
    root: weakref.ref[nn.Module] | None = None
    awaited: dict[str, Callable[[], None]] = field(default_factory=dict)

    def forget(self, adapter: str) -> None:
        """Drop the generations of an adapter."""
        for kept in (self.cached, self.latest, self.here.latest):
            kept.pop(adapter, None)

    def __reduce__(self) -> tuple[type, tuple]:
        return ForwardState, ()
