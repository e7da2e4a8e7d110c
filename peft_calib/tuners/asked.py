"""What one call chain asks of a model: draws are an argument that travels with the calls, no state of the model.

`asking` puts draws in place in a context variable, and the one hook on the base model looks there. So two threads,
two asyncio tasks, two generators that are advanced in turn, and calls inside each other get their own answers, and a
copy of a model made inside knows nothing of it. The innermost question about a base model counts.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

from torch import nn

from .factors import Draw


@dataclass(eq=False)
class Asked:
    """One question about a base model: `draws` by the holder's id, `None` for its mean.

    It acts only while its `owner` runs, the generator whose body entered the context, if one did.
    """

    root: nn.Module
    draws: Mapping[int, Draw | None]
    num_samples: int = 1
    owner: FrameType | None = None
    open: bool = True
    #: Whether a module around the base model has repeated the rows of the forward under way.
    repeated: bool = False


_ASKED: ContextVar[tuple[Asked, ...]] = ContextVar("peft_calib_asked", default=())
# The same questions once more, of this thread: torch.compile guards on a thread-local, but cannot read a ContextVar.
# The attribute is absent while there is none, so that threads which never asked share one graph with the others.
_TRACED = threading.local()


@contextmanager
def asking(root: nn.Module, draws: Mapping[int, Draw | None], num_samples: int = 1) -> Iterator[Asked]:
    """Ask something of a base model, see `Asked`, in every forward inside, of this call chain only."""
    asked = Asked(root, draws, num_samples, _generator_that_entered())
    _ASKED.set((*_ASKED.get(), asked))
    _TRACED.asked = (*getattr(_TRACED, "asked", ()), asked)
    try:
        yield asked
    finally:
        # a task begun inside has a copy of the variable, and generators may leave in any order
        asked.open, asked.owner = False, None
        _ASKED.set(tuple(other for other in _ASKED.get() if other is not asked))
        left = tuple(other for other in getattr(_TRACED, "asked", ()) if other is not asked)
        if left:
            _TRACED.asked = left
        else:
            _TRACED.__dict__.pop("asked", None)


def asked_of(root: nn.Module) -> Asked | None:
    """The innermost question about a base model in this call chain."""
    for asked in reversed(_ASKED.get()):
        if asked.open and asked.root is root and (asked.owner is None or _is_running(asked.owner)):
            return asked
    return None


def asked_for(holder: object) -> Draw | None:
    """What this call chain asks of a holder, if anything."""
    for asked in reversed(_ASKED.get()):
        if asked.open and id(holder) in asked.draws and (asked.owner is None or _is_running(asked.owner)):
            return asked.draws[id(holder)]
    return None


def asked_while_tracing(root: nn.Module) -> Asked | None:
    """The same for code that torch.compile is tracing."""
    for asked in reversed(getattr(_TRACED, "asked", ())):
        if asked.root is root:
            return asked
    return None


def _generator_that_entered() -> FrameType | None:
    """The frame of the generator whose own `with` statement is being entered.

    Generators that are themselves contexts (`contextlib.contextmanager`) stand for the code that enters them: what
    they put in place is meant for the body of that code's `with`.
    """
    frame = sys._getframe(1)
    while frame is not None:
        inside = frame.f_back
        if frame.f_code.co_filename == contextlib.__file__ or (
            _is_generator(frame) and inside is not None and inside.f_code.co_filename == contextlib.__file__
        ):
            frame = inside
            continue
        return frame if _is_generator(frame) else None
    return None


def _is_generator(frame: FrameType) -> bool:
    return bool(frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR))


def _is_running(owner: FrameType) -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame is owner:
            return True
        frame = frame.f_back
    return False


# --------------------------------------------------------------------- changes of modules that one call chain sees

_CHAIN: ContextVar[tuple[object, ...]] = ContextVar("peft_calib_chain", default=())
_SHIMS = threading.RLock()


@contextmanager
def _chained() -> Iterator[object]:
    """A token that this call chain carries inside; generators may leave in any order."""
    token = object()
    _CHAIN.set((*_CHAIN.get(), token))
    try:
        yield token
    finally:
        _CHAIN.set(tuple(other for other in _CHAIN.get() if other is not token))


@contextmanager
def only_here() -> Iterator[Callable[[Callable], Callable]]:
    """Make hooks act in this call chain only, although all threads call the modules they hang on.

    Yields what turns a forward hook or forward pre-hook (without keyword arguments: such a hook may lose them while
    another thread removes it) into one that does nothing elsewhere.
    """
    with _chained() as token:
        yield lambda hook: partial(_if_in_chain, token, hook)


def _if_in_chain(token: object, hook: Callable, *args: Any) -> Any:
    return hook(*args) if token in _CHAIN.get() else None


@contextmanager
def forward_replaced(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of modules in this call chain only, by functions of it and its arguments."""
    shims: list[_Shim] = []
    with _chained() as token:
        with _SHIMS:
            for module, replacement in replacements.items():
                shim = module.__dict__.get("forward")
                if not isinstance(shim, _Shim):
                    shim = module.__dict__["forward"] = _Shim(module, shim)
                shim.by_chain[token] = replacement
                shims.append(shim)
        try:
            yield
        finally:
            with _SHIMS:
                for shim in shims:
                    shim.leave(token)


class _Shim:
    """Stands in for the forward of a module while some call chain replaces it."""

    def __init__(self, module: nn.Module, own: Callable | None) -> None:
        self.module, self.own = module, own
        self.by_chain: dict[object, Callable] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.own or partial(type(self.module).forward, self.module)
        for token in reversed(_CHAIN.get()):
            if token in self.by_chain:
                return self.by_chain[token](forward, *args, **kwargs)
        return forward(*args, **kwargs)

    def leave(self, token: object) -> None:
        """Forget one call chain; with the last, give the module its own forward back."""
        self.by_chain.pop(token, None)
        if self.by_chain or self.module.__dict__.get("forward") is not self:
            return
        if self.own is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.own
