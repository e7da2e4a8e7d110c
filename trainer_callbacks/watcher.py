"""Seeing the forwards of an evaluation loop from a callback, which the Trainer does not show them to."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from accelerate.state import GradientState, PartialState
from accelerate.utils import gather, pad_across_processes
from transformers import Trainer

from peft_calib.tuners.objective import named_inputs

from .outputs import base_model_of, labels_among, output_names
from .reporting import WAY_OUT


class Forward(NamedTuple):
    """One forward in evaluation: its inputs by name, and the tensors that came out, by name or in order."""

    inputs: dict[str, Any]
    outputs: Any
    names: list[list[str]]


class ForwardWatcher:
    """Remembers the latest forward, in evaluation mode, of the models it was attached to."""

    def __init__(self) -> None:
        self.model: Any = None
        self._forget()

    def _forget(self) -> None:
        # a callback may serve two trainers, and a trainer makes a model anew with model_init
        self._handles: WeakKeyDictionary[torch.nn.Module, Any] = WeakKeyDictionary()
        self._latest: Forward | None = None
        self._source: weakref.ref | None = None
        self._paused = False

    def attach(self, model: torch.nn.Module | None) -> None:
        """Watch a model, the one whose forwards are asked for from now on."""
        if model is None:
            return
        self.model = model
        if model not in self._handles:
            self._handles[model] = model.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if module.training or self._paused or torch.is_grad_enabled():
            return
        named = module
        if args and any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values()):
            named = base_model_of(module)  # a PeftModel, which hands positions on to the model inside
        inputs = dict(named_inputs(named, args, kwargs))
        self._latest = Forward(inputs, _tensors_in(output), output_names(output, module))
        self._source = weakref.ref(module)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch inside."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @property
    def latest(self) -> Forward | None:
        """The latest forward, if it was one of the model."""
        return self._latest if self._source is not None and self._source() is self.model else None

    def take(self) -> Forward | None:
        """The latest forward of the model, once."""
        latest, self._latest = self.latest, None
        return latest

    def __getstate__(self) -> dict[str, Any]:
        """Hooks and batches do not travel with a copy or a pickle of the callback."""
        return {"model": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy watches nothing until it is attached."""
        self.__dict__.update(state)
        self._forget()


class UnknownLabels(ValueError):
    """The labels of a batch cannot be seen from a callback."""


def labels_of_step(inputs: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The classes of the batch that is evaluated on this process: of its forward, else of the loop; None without."""
    for batch in (inputs, _batch_of_loop()):
        found = [batch[name] for name in names if batch.get(name) is not None]
        if found:
            return labels_among(found[0] if len(found) == 1 else tuple(found), [n for n in names if n in batch])
    return None


def _batch_of_loop() -> Mapping[str, Any]:
    """The batch, with its labels, that the evaluation loop which calls is at.

    A callback is shown neither batches nor labels, and the events of an evaluation begin after its first batch, so
    there is nothing to hook into or to wrap. What remains is the frame of the loop itself: the Trainer's
    `evaluation_loop` keeps the batch as it was before `compute_loss` saw a copy of it.
    """
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals
        if frame.f_code.co_name == "evaluation_loop" and isinstance(found.get("self"), Trainer):
            batch = found.get("inputs")
            if isinstance(batch, Mapping):
                return _with_labels_of_step(found["self"], batch, found.get("labels"))
        frame = frame.f_back
    raise UnknownLabels(
        "the loss is formed outside the model, and this Trainer's own evaluation loop does not show the labels. "
        + WAY_OUT
    )


def _with_labels_of_step(trainer: Trainer, batch: Mapping[str, Any], labels: Any) -> Mapping[str, Any]:
    """The batch, with the labels that `prediction_step` answered if it took them out of the batch."""
    names = trainer.label_names
    if any(batch.get(name) is not None for name in names) or labels is None or not names:
        return batch
    if PartialState().num_processes > 1:  # gathered already, other than the logits
        raise UnknownLabels(f"prediction_step takes the labels out of the batch. {WAY_OUT}")
    columns = labels if isinstance(labels, (tuple, list)) else (labels,)
    return {**batch, **dict(zip(names, columns, strict=False))}


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of this step on all processes, as the Trainer gathers them: without those that pad the last batch."""
    if PartialState().num_processes == 1:
        return tensor
    rows = gather(pad_across_processes(tensor.contiguous(), dim=1, pad_index=-100) if tensor.dim() > 1 else tensor)
    state = GradientState()
    return rows[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else rows


def _tensors_in(output: Any) -> Any:
    """The tensors among the outputs; caches and lists of hidden states are not held on to."""
    if isinstance(output, Mapping):
        return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
    if isinstance(output, (tuple, list)):
        return tuple(value for value in output if isinstance(value, torch.Tensor))
    return output if isinstance(output, torch.Tensor) else ()
