# SPDX-License-Identifier: Apache-2.0
"""Seeing the forwards of an evaluation loop from a callback, which the Trainer does not show them to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.state import GradientState, PartialState
from accelerate.utils import gather, pad_across_processes


class Forward(NamedTuple):
    """Inputs, logits and labels of one forward in evaluation."""

    inputs: dict[str, Any]
    logits: Any
    labels: torch.Tensor


class ForwardWatcher:
    """Remembers the latest forward of a model in evaluation mode that had integer labels."""

    def __init__(self) -> None:
        self.model: Any = None
        self._handle: Any = None
        self._latest: Forward | None = None
        self._paused = False

    def attach(self, model: torch.nn.Module | None) -> None:
        """Watch a model, and no other."""
        if model is None or model is self.model:
            return
        if self._handle is not None:
            self._handle.remove()
        self.model = model
        self._handle = model.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if module.training or self._paused:
            return
        labels = kwargs.get("labels")
        logits = output.get("logits") if isinstance(output, Mapping) else None
        if isinstance(labels, torch.Tensor) and not labels.is_floating_point() and logits is not None:
            self._latest = Forward(kwargs, logits, labels)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch inside."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def take(self) -> Forward | None:
        """The latest forward, once."""
        latest, self._latest = self._latest, None
        return latest

    def __getstate__(self) -> dict[str, Any]:
        """Hooks and batches do not travel with a copy or a pickle of the callback."""
        return {**self.__dict__, "model": None, "_handle": None, "_latest": None}


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of this step on all processes, without those that pad the last batch, as the Trainer gathers them.

    Args:
        tensor: `(B, ...)`; of three dimensions, or two where the second is a position, it may differ in length.

    Returns:
        The rows of every process; the tensor itself where there is one.
    """
    if PartialState().num_processes == 1:
        return tensor
    rows = gather(pad_across_processes(tensor.contiguous(), dim=1, pad_index=-100) if tensor.dim() > 1 else tensor)
    state = GradientState()
    return rows[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else rows
