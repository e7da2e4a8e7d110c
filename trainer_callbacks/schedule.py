"""Telling laws where training stands, so that their schedules can follow."""

from __future__ import annotations

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_calib.tuners.holder import FactorHolder


class RegularizerScheduleCallback(TrainerCallback):
    """Drives the schedules of adapters: HyperLoRA's blending with its anchor, in optimiser steps.

    The numbers come from the Trainer's state, so a resumed run continues where it stopped. Without the callback every
    schedule stays at its start value.

    Example:
        >>> callback = RegularizerScheduleCallback()
        >>> # Trainer(model, args, train_dataset=..., callbacks=[callback])
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Set the schedules to the step a (resumed) run starts from."""
        _set_progress(args, state, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Move the schedules on after each optimiser step."""
        _set_progress(args, state, kwargs["model"])


def _set_progress(args: TrainingArguments, state: TrainerState, model) -> None:
    for module in model.modules():
        if isinstance(module, FactorHolder):
            for law in module.laws.values():
                law.set_progress(state.global_step, state.max_steps, args.gradient_accumulation_steps)
