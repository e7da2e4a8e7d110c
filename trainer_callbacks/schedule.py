"""Telling laws where training stands, so that their schedules can follow."""

from __future__ import annotations

import warnings

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_calib.items import count_items
from peft_calib.tuners.laws import laws_of

from .loss import refuse_comparing_trainers

UNCOUNTED = (
    "RegularizerScheduleCallback cannot count the training items: the data set is a stream, or its batches have no "
    "labels. Tell the number in the adapter's configuration, num_train_examples: the rows of one epoch, or its target "
    "tokens for language modelling (for an endless stream, items of a step x max_steps)."
)


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
        loader = kwargs.get("train_dataloader")
        if waiting and loader is not None:
            dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
            num_items = count_items(dataset, collate, kwargs["model"])
            if num_items is None:
                warnings.warn(UNCOUNTED, UserWarning, stacklevel=2)
            for law in waiting if num_items else ():
                law.set_num_train_examples(num_items)
        self.on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        for law in laws_of(kwargs["model"]):
            law.set_progress(state.global_step, state.max_steps, args.gradient_accumulation_steps)
