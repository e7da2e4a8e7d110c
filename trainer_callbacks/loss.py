"""The regulariser for trainers that form their own loss, and a clear no to those for which it has no meaning."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from peft_calib.tuners.laws import holders_of, laws_of, regularization_loss
from peft_calib.tuners.objective import is_in

#: TRL's trainers whose loss compares several forwards of one model.
COMPARES_FORWARDS = tuple("DPO GRPO KTO RLOO PPO CPO ORPO Online Distillation GKD NashMD XPO".split())


class RegularizedLossMixin:
    """Adds the regulariser to the loss of a Trainer that forms it without the model's own, by one forward a batch.

    For TRL's `RewardTrainer`, for the stock Trainer with label smoothing or `compute_loss_func`, and for a subclass
    with a `compute_loss` of its own (class weights, a focal loss), which it goes before. Where the loss has the
    regulariser already, because it is made of the model's own loss, nothing is added.

    It enters once for each optimiser step, however the step is cut: where the Trainer divides the loss by the
    accumulation steps, it divides the regulariser too; where the loss is divided by `num_items_in_batch` already, the
    regulariser is divided by the steps here. Which of the two holds is told by the Trainer's own rule, and by its
    attribute `loss_is_scaled_for_ga` where a loss is an exception.

    Example:
        >>> from transformers import Trainer
        >>> class RegularizedTrainer(RegularizedLossMixin, Trainer):
        ...     pass
    """

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The trainer's loss plus the regulariser, unless that is in it."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)  # type: ignore[misc]
        holders = holders_of(model) if torch.is_grad_enabled() else []
        missing = [term for holder in holders for term in holder.pending if not is_in(loss, term)]
        if missing:
            regularization_loss(model)  # claimed
            term = torch.stack([each.float() if each.dtype != torch.float64 else each for each in missing]).sum()
            # fewer steps than configured in the last one of an epoch
            steps = getattr(self, "current_gradient_accumulation_steps", None)
            steps = int(steps or self.args.gradient_accumulation_steps)  # type: ignore[attr-defined]
            share = 1 / steps if self._divides_itself(kwargs.get("num_items_in_batch")) else 1.0
            loss = loss + share * term.to(loss.device, torch.promote_types(loss.dtype, torch.float32))
        return (loss, outputs) if return_outputs else loss

    def _divides_itself(self, num_items_in_batch: Any) -> bool:
        """Whether the Trainer leaves the loss as it is, because all that a step accumulates divides it already."""
        told = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        counted = getattr(self, "model_accepts_loss_kwargs", False) and num_items_in_batch is not None
        return bool(counted or getattr(self, "compute_loss_func", None) is not None)


def refuse_comparing_trainers(args: TrainingArguments, model: torch.nn.Module) -> None:
    """Refuse trainers whose loss is formed from several forwards, for adapters that draw anew in each."""
    name = type(args).__name__
    if not type(args).__module__.startswith("trl.") or not name.startswith(COMPARES_FORWARDS):
        return
    stochastic = sorted({law.method for law in laws_of(model, active=True) if law.stochastic})
    if stochastic:
        raise ValueError(
            f"{name.removesuffix('Config')}Trainer forms its loss from several forwards, each of which would use "
            f"another draw of {', '.join(stochastic)}; that is not supported. Train LoRA or HyperLoRA with a "
            "fixed A there, and make the result Bayesian afterwards with peft_calib.bayesianize."
        )
