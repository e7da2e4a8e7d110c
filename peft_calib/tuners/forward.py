"""One forward of a base model: what it asked for, and the factors that its layers read.

A forward runs from its first line to its last in one thread, so what belongs to it is kept by thread. What gradients
come back to is kept by thread as well, and once more for all: on an accelerator a backward runs in threads of its own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .asked import Asked
from .factors import Draw, Law, Mean, Train
from .generation import Contents, Generation, is_transformed
from .objective import Receipt


@dataclass(eq=False)
class Part:
    """What one forward has from one holder; `comparing` are laws evaluated at several functions on each row."""

    draw: Draw | None
    comparing: list[Law]
    factors: dict[str, Generation] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Functions evaluated on each row: several only where a law trains on several."""
        return max([1, *[law.train_samples for law in self.comparing]])

    def only(self, index: int) -> Part:
        """The factors of one of several functions."""
        return Part(self.draw, [], {name: made.only(index) for name, made in self.factors.items()})


def own_draw(law: Law, trains: bool, part: Part | None) -> Draw:
    """What a law is asked for where the call chain asks for nothing."""
    # a part of the base model that is called directly has only the rows it was given
    samples = law.train_samples if trains and part is not None and law in part.comparing else 1
    return Train(samples) if trains else Mean()


@dataclass(eq=False)
class Forward:
    """One forward of a base model that is under way.

    `trains` is what `Modes.begin_forward` answered, `parts` what it has from each holder, `lent` a configuration with
    a padding token on loan, see `padding`, `replay` the context in which layers below the first that varies answer
    with what they answered once.
    """

    root: nn.Module
    asked: Asked | None
    trains: bool
    parts: dict[nn.Module, Part] = field(default_factory=dict)
    lent: Any = None
    replay: AbstractContextManager[None] | None = None
    #: The inputs before their rows were repeated for `functions`, where they were.
    given: dict[str, Any] | None = None
    functions: int = 1

    @property
    def num_samples(self) -> int:
        return max([1, *[part.num_samples for part in self.parts.values()]])

    def end_replay(self) -> None:
        """Let the layers below the first that varies answer for themselves again."""
        if self.replay is not None:
            self.replay.__exit__(None, None, None)
            self.replay = None

    def only(self, index: int) -> Forward:
        """This forward for one of its functions."""
        parts = {holder: part.only(index) for holder, part in self.parts.items()}
        return Forward(self.root, self.asked, self.trains, parts)


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


def running_forward(root: nn.Module) -> Forward | None:
    """The innermost forward of a base model that is under way in this thread."""
    return next((forward for forward in reversed(_RUNNING.forwards) if forward.root is root), None)


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

    def settle(self) -> None:
        """Warn if the regularisers of the last training forward have reached no loss until now."""
        if self.unclaimed and self.receipt is not None and self.pending:
            self.receipt.settle()
        self.unclaimed = False

    def take(self) -> list[torch.Tensor]:
        pending, self.pending = self.pending, []
        if self.receipt is not None:
            self.receipt.claim()
        return pending


@dataclass
class ForwardState:
    """What a holder knows between the beginning of a forward and the end of its backward.

    Dictionaries are by adapter. A copy, or a pickle that is read, starts afresh: generations hang on an autograd
    graph, which can neither be copied nor pickled, and none of it is part of what a law is.
    """

    #: Of this thread.
    here: Here = field(default_factory=Here)
    #: The last generation of any thread that gradients may come back to: a backward on an accelerator runs in threads
    #: of its own, which have made none.
    latest: dict[str, Generation] = field(default_factory=dict)
    #: The last generation without gradients, with what it was made of.
    cached: dict[str, tuple[Generation, Contents]] = field(default_factory=dict)
    #: Whether gradients have come back to the generations that are alive.
    uses: dict[str, list[weakref.ref]] = field(default_factory=dict)
    #: What the forward has that torch.compile is building a graph of.
    tracing: Part | None = None
    #: The base model, once a forward of it has begun.
    root: weakref.ref[nn.Module] | None = None
    #: Checks of weights that are still to be loaded.
    awaited: dict[str, Callable[[], None]] = field(default_factory=dict)

    def keep(self, adapter: str, law: Law, generation: Generation, wants_graph: bool) -> None:
        """Keep what a later forward, or the backward of this one, will ask for."""
        if generation.has_graph and law.stochastic:
            alive = [use for use in self.uses.get(adapter, []) if use() is not None]
            self.uses[adapter] = [*alive, weakref.ref(generation.use)]
        if not wants_graph and not is_transformed(law):
            self.cached[adapter] = generation, Contents(law)

    def without_graph(
        self, adapter: str, law: Law, stamp: tuple, in_forward: bool, trusted: bool
    ) -> Generation | None:
        """The last generation without gradients, if it is still good."""
        generation, contents = self.cached.get(adapter, (None, None))
        if generation is None:
            return None
        if not trusted and not contents.hold(law):
            self.cached.pop(adapter, None)
            law.invalidate()
            return None
        return generation if generation.stamp == stamp and (law.cache or not in_forward) else None

    def with_graph(self, adapter: str, stamp: tuple, in_forward: bool) -> Generation | None:
        """This thread's last generation, if gradients may come back to it once more."""
        old = self.here.latest.get(adapter)
        if old is None:
            return None
        if old.leaves:
            if old.gradients_wait and old.stamp[1] != stamp[1]:
                raise RuntimeError(
                    "The optimiser stepped while gradients of the generated factors were still waiting, so the "
                    'generator learned nothing. With regenerate="step" call model.flush_grads() after the last '
                    'backward and before clipping or stepping, or use regenerate="forward".'
                )
            return old if old.stamp == stamp else None
        # a new graph for each forward of the base model; shared by direct calls of its parts
        shared = old.has_graph and old.stamp == stamp and not old.use.consumed and not in_forward
        return old if shared else None

    def check_single_forward(self, adapter: str) -> None:
        """Refuse to recompute a block of a stochastic law while several of its forwards wait for their backward."""
        open_uses = [use() for use in self.uses.get(adapter, [])]
        if sum(use is not None and not use.consumed for use in open_uses) > 1:
            raise RuntimeError(
                "Gradient checkpointing recomputes a block in backward, but since its forward the adapter has drawn "
                "other factors for another forward (of this thread or another), so the gradient would be wrong. Call "
                "backward (or drop the loss) after each forward, or switch gradient checkpointing off."
            )

    def forget(self, adapter: str) -> None:
        for kept in (self.cached, self.latest, self.here.latest):
            kept.pop(adapter, None)

    def __reduce__(self) -> tuple[type, tuple]:
        return ForwardState, ()
