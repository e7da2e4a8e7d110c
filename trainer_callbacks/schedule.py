"""Telling laws where training stands, so that their schedules can follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_calib.tuners.laws import laws_of

from .loss import refuse_comparing_trainers


class RegularizerScheduleCallback(TrainerCallback):
    """Drives the schedules of adapters, and counts the training items where a law needs their number.

    HyperLoRA's blending with its anchor, BayesianLoRA's KL warm-up and its N, CurveLoRA's cycles of noise and strata.

    The numbers come from the Trainer's state, so a resumed run continues where it stopped. Without the callback every
    schedule stays at its start value.

    Example:
        >>> callback = RegularizerScheduleCallback()
        >>> # Trainer(model, args, train_dataset=..., callbacks=[callback])
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Refuse trainers that compare several forwards, if each would use another draw."""
        if kwargs.get("model") is not None:
            refuse_comparing_trainers(args, kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Set the schedules to the step a (resumed) run starts from, and count the training items where asked."""
        waiting = [law for law in laws_of(kwargs["model"]) if law.needs_num_train_examples]
        num_items = count_items(getattr(kwargs.get("train_dataloader"), "dataset", None)) if waiting else None
        for law in waiting if num_items else ():
            law.set_num_train_examples(num_items)
        _set_progress(args, state, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Move the schedules on after each optimiser step."""
        _set_progress(args, state, kwargs["model"])


def count_items(dataset: Any) -> int | None:
    """Number of items a training loss averages over in one epoch.

    Args:
        dataset: Rows as mappings, with a length.

    Returns:
        Rows where a row has one label; target tokens (labels other than -100, or all tokens but the first where labels
        are made later from `input_ids`) where it has several; `None` where that cannot be told.

    Example:
        >>> count_items([{"labels": 1}, {"labels": 0}]), count_items([{"labels": [-100, 4, 5]}])
        (2, 2)
    """
    if dataset is None or not hasattr(dataset, "__len__") or not len(dataset) or not hasattr(dataset[0], "get"):
        return None
    first = dataset[0]
    name = next((name for name in ("labels", "label") if first.get(name) is not None), None)
    if name is not None:
        if torch.as_tensor(first[name]).dim() == 0:
            return len(dataset)
        return sum(int((torch.as_tensor(row[name]) != -100).sum()) for row in dataset)
    if first.get("input_ids") is not None:
        return sum(len(row["input_ids"]) - 1 for row in dataset)
    return None


def _set_progress(args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
    for law in laws_of(model):
        law.set_progress(state.global_step, state.max_steps, args.gradient_accumulation_steps)
