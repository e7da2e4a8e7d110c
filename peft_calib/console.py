"""What a run shows while it works, instead of the libraries, and the random generators that it hands back."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class StepProgress(TrainerCallback):
    """Optimiser steps as a bar, or as a few lines; `metrics` are shown after an evaluation, else the loss."""

    def __init__(self, progress: Progress, description: str, metrics: list[str]) -> None:
        self.progress, self.description, self.metrics = progress, description, metrics

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task(self.description, total=state.max_steps, completed=state.global_step)
        if state.global_step:
            self.progress.console.print(f"{self.description}: resumed at step {state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)
        quarter = max(1, state.max_steps // 4)
        if not self.progress.console.is_terminal and state.global_step % quarter == 0:
            self.progress.console.print(f"{self.description}: step {state.global_step} of {state.max_steps}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        names = {name: f"eval_{name}" for name in self.metrics if f"eval_{name}" in (metrics or {})}
        if not names and metrics and "eval_loss" in metrics:
            names = {"loss": "eval_loss"}
        if names:
            shown = ", ".join(f"{name} {metrics[key]:.4f}" for name, key in names.items())
            self.progress.console.print(f"{self.description}: epoch {state.epoch:.4g}, calibration rows: {shown}")


def progress_bars(console: Console, *, disable: bool = False) -> Progress:
    """A set of bars."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=disable)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' bars and notes; their settings are put back afterwards."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled(), datasets.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars[0]:
            transformers.logging.enable_progress_bar()
        if bars[1]:
            datasets.enable_progress_bars()


@contextmanager
def own_random_state(seed: int | None = None) -> Iterator[None]:
    """Hand the global generators back as they were: the Trainer, fresh heads and collators use them.

    With a seed, random numbers of the CPU are the same in every run inside.
    """
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the legacy state is what must be restored
    try:
        with torch.random.fork_rng(devices=None if seed is None else []):
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
