"""Getting numbers and pictures from a callback into the Trainer's logs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerState, TrainingArguments
from transformers.integrations.integration_utils import rewrite_logs

WAY_OUT = (
    "Give the callback to the Trainer as compute_metrics=callback.compute_metrics, preprocess_logits_for_metrics="
    "callback.preprocess_logits_for_metrics too, or take it out of callbacks=[...]"
)


#: Trackers of `report_to` whose modules log to the run that the Trainer's callback has begun.
TRACKERS = ("wandb", "trackio")


class LateLog:
    """Adds to logs that the Trainer's loggers have seen already, as they come before a user's callbacks.

    Numbers reach later callbacks, the Trainer's history and, of what is in `report_to`, TensorBoard by a writer of our
    own, wandb and trackio through the run that the Trainer has begun there.
    """

    def __init__(self) -> None:
        self._writer: Any = None

    def add(
        self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any], numbers: dict[str, float]
    ) -> None:
        """Adds numbers to logs that are on their way."""
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)
        shown = rewrite_logs(numbers)
        writer = self.writer(args, state)
        if writer is not None:
            for name, value in shown.items():
                writer.add_scalar(name, value, state.global_step)
        for tracker in _trackers(args, state):
            tracker.log({**shown, STEP: state.global_step})

    def add_figure(self, args: TrainingArguments, state: TrainerState, name: str, figure: Any) -> None:
        """Shows a picture wherever numbers go that can show one."""
        writer = self.writer(args, state)
        if writer is not None:
            writer.add_figure(name, figure, state.global_step)
            writer.flush()
        for tracker in _trackers(args, state):
            tracker.log({name: tracker.Image(_pixels(figure)), STEP: state.global_step})

    def writer(self, args: TrainingArguments, state: TrainerState) -> Any:
        """The writer, made when it is first needed; None without TensorBoard or off the main process."""
        if "tensorboard" not in (args.report_to or []) or not state.is_world_process_zero:
            return None
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or Path(args.output_dir or ".") / "runs" / "calibration"
            self._writer = SummaryWriter(log_dir=str(folder))
        return self._writer

    def close(self) -> None:
        """Ends the writer's file; the next number opens another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_writer": None}


#: What the Trainer's callbacks call the step there.
STEP = "train/global_step"


def _trackers(args: TrainingArguments, state: TrainerState) -> list[Any]:
    """The modules of trackers with a run under way; who has begun one has imported it."""
    if not state.is_world_process_zero:
        return []
    found = [sys.modules.get(name) for name in TRACKERS if name in (args.report_to or [])]
    return [module for module in found if module is not None and _has_run(module)]


def _has_run(module: Any) -> bool:
    if hasattr(module, "context_vars"):  # trackio, whose `run` is a module (findings/trackio_run_is_a_module.sh)
        return module.context_vars.current_run.get() is not None
    return getattr(module, "run", None) is not None


def _pixels(figure: Any) -> np.ndarray:
    """A figure as (height, width, 3) bytes."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


@dataclass
class Tally:
    """What was left out of an evaluation, and why."""

    steps: int = 0  # Batches of this evaluation
    skipped: int = 0  # Batches of which nothing was measured though they should have been
    unlabelled: int = 0  # Batches without labels
    reason: str = ""  # Why the first was skipped

    def skip(self, reason: str, batches: int = 1) -> None:
        """Note batches that are left out."""
        self.skipped += batches
        self.reason = self.reason or reason

    def problem(self, what: str) -> str | None:
        """The warning in words, if there is anything to warn of; `what` is missing."""
        if not self.skipped:
            return None
        some = f"{self.skipped} of {self.steps} batches are left out of the {what}"
        return f"{f'no {what}' if self.skipped == self.steps else some}: {self.reason.rstrip('.')}"


def metric_prefix(metrics: Mapping[str, Any]) -> str | None:
    """`"eval_"`, `"test_"`, ... of the metrics of an evaluation; None for other logs."""
    if "train_runtime" in metrics:
        return None
    names = [key for key in metrics if key.endswith("_runtime")]
    return names[0].removesuffix("runtime") if names else None
