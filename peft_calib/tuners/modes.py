"""Evaluation mode of a model that several threads share.

A module's mode is the one thing a prediction has to change on the shared model. So whoever needs evaluation mode says
so here: the first one in switches, the last one out switches back, and a training forward of somebody else waits until
then, or is refused where it could wait for ever. A model in evaluation mode already, as in any server, is never
switched and nobody waits.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_EVALUATING: ContextVar[tuple[object, ...]] = ContextVar("peft_calib_evaluating", default=())
_ALL: weakref.WeakKeyDictionary[nn.Module, Modes] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()

OPEN_ELSEWHERE = (
    "The model was in training mode and is in evaluation mode for draws that another thread or task has open, so a "
    "forward here would run in the wrong mode. Close them first, use peft_calib.predict there (for which a forward "
    "waits), call model.eval() before, or give each thread a model of its own."
)
SWITCHED = (
    "Another thread has put the model into training mode while this one was evaluating draws, so the answer would be "
    "wrong. Let a thread that trains and one that predicts take turns, or give each a model of its own."
)
RECOMPUTED = (
    "Gradient checkpointing recomputes a training forward while another thread has the model in evaluation mode, so "
    "the gradient would be wrong. Predict between the steps, in another thread with a model of its own, or train "
    "without gradient checkpointing."
)


class Modes:
    """Who needs one base model in evaluation mode, and in which mode its modules were before."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        #: For each one who evaluates: whether it leaves soon by itself.
        self.evaluating: dict[object, bool] = {}
        self.before: dict[nn.Module, bool] = {}
        #: Training forwards under way, by thread.
        self.training: dict[int, int] = {}
        #: Thread that called `train()` on the model last while somebody evaluated.
        self.switched_by: int | None = None
        self._switching = False

    @contextmanager
    def evaluation(self, model: nn.Module, brief: bool = True) -> Iterator[None]:
        """Evaluation mode inside; afterwards, when nobody else needs it, every module's own mode.

        `brief` says that the context is left without waiting for anybody, so that a training forward may wait for it.
        """
        token = object()
        try:
            with self.changed:
                self._enter(token, model, brief)
            _EVALUATING.set((*_EVALUATING.get(), token))
            yield
        finally:
            _EVALUATING.set(tuple(other for other in _EVALUATING.get() if other is not token))
            with self.changed:
                self.evaluating.pop(token, None)
                if not self.evaluating:
                    for module, mode in self.before.items():
                        module.training = mode
                    self.before, self.switched_by = {}, None
                self.changed.notify_all()

    def _enter(self, token: object, model: nn.Module, brief: bool) -> None:
        modules = list(model.modules())
        while any(module.training for module in modules) and self._others_train():
            self.changed.wait(1.0)
        self.evaluating[token] = brief
        for module in modules:
            self.before.setdefault(module, module.training)
        if any(module.training for module in modules):
            self._switching = True
            try:
                model.eval()
            finally:
                self._switching = False

    def _others_train(self) -> bool:
        alive = {thread.ident for thread in threading.enumerate()}
        return any(other in alive and other != threading.get_ident() for other in self.training)

    @property
    def _here(self) -> bool:
        """Whether this call chain is one that evaluates."""
        return any(token in self.evaluating for token in _EVALUATING.get())

    @property
    def _switched(self) -> bool:
        return any(self.before.values())

    def begin_forward(self, root: nn.Module) -> bool:
        """Let a forward begin, unless it would run in the wrong mode; true if it is one of training."""
        if not self.before and not root.training:  # `before` is there until every module has its mode back
            return False
        with self.changed:
            if self._here:
                self._check_mode(root)
                return False
            while self._switched:
                if not all(self.evaluating.values()):
                    raise RuntimeError(OPEN_ELSEWHERE)
                self.changed.wait()
            if root.training:
                thread = threading.get_ident()
                self.training[thread] = self.training.get(thread, 0) + 1
            return root.training

    def end_forward(self, root: nn.Module, trained: bool) -> None:
        """Say that a forward is over; what `begin_forward` returned tells which."""
        if trained:
            with self.changed:
                thread = threading.get_ident()
                self.training[thread] -= 1
                if not self.training[thread]:
                    del self.training[thread]
                self.changed.notify_all()
        elif self.evaluating and self._here:
            self._check_mode(root)

    def _check_mode(self, root: nn.Module) -> None:
        if root.training and self.switched_by not in (None, threading.get_ident()):
            raise RuntimeError(SWITCHED)

    def check_recomputation(self) -> None:
        """Raise `RuntimeError` if a training forward is recomputed while somebody else evaluates."""
        if self.evaluating and self._switched and not self._here:
            raise RuntimeError(RECOMPUTED)

    def note_switch(self, mode: bool) -> None:
        """Somebody called `train(mode)`; if it was not one who evaluates, that is how the model is left at the end."""
        if not self.evaluating:
            return
        with self.changed:
            if not self._switching and not self._here:
                self.switched_by = threading.get_ident()
                self.before = dict.fromkeys(self.before, mode)


def modes_of(root: nn.Module) -> Modes:
    """The modes of a base model."""
    with _LOCK:
        found = _ALL.get(root)
        if found is None:
            found = _ALL[root] = Modes()
        return found
