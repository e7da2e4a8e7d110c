# SPDX-License-Identifier: Apache-2.0
"""Seeing the logits of an evaluation loop from a callback, which the Trainer does not show them to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from peft_calib.calibration.inputs import as_numpy


class ForwardWatcher:
    """Remembers logits and labels of the latest forward in eval mode, and of every step told to keep."""

    def __init__(self, preprocess: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        self._preprocess = preprocess
        self._model: Any = None
        self._handle: Any = None
        self._latest: tuple[Any, Any] | None = None
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []

    def attach(self, model: torch.nn.Module | None) -> None:
        if model is None or model is self._model:
            return
        if self._handle is not None:
            self._handle.remove()
        self._model = model
        self._handle = model.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        labels = kwargs.get("labels")
        logits = output.get("logits") if isinstance(output, Mapping) else None
        if not module.training and isinstance(labels, torch.Tensor) and logits is not None:
            self._latest = (logits, labels)

    def keep(self) -> None:
        """Moves the latest forward to the store, on the CPU; regression and vocabularies are left alone."""
        latest, self._latest = self._latest, None
        if latest is None or latest[1].is_floating_point():
            return
        try:
            logits = self._preprocess(*latest)
        except ValueError as error:
            warnings.warn(f"CalibrationCallback skips this evaluation: {error}", UserWarning, stacklevel=2)
            return
        self._kept.append((as_numpy(logits), as_numpy(latest[1])))

    def clear(self) -> None:
        self._latest, self._kept = None, []

    def take(self) -> list[tuple[np.ndarray, np.ndarray]]:
        kept = self._kept
        self.clear()
        return kept

    def __getstate__(self) -> dict[str, Any]:
        """Hooks and batches do not travel with a copy or a pickle of the callback."""
        return {**self.__dict__, "_model": None, "_handle": None, "_latest": None, "_kept": []}
