# SPDX-License-Identifier: Apache-2.0
"""The regulariser for trainers that form their own loss, and a clear no to those for which it has no meaning."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from peft_calib.tuners.holder import holders_of, regularization_loss
from peft_calib.tuners.laws import laws_of

#: TRL's trainers whose loss compares several forwards of one model.
COMPARES_FORWARDS = (
    "DPO",
    "GRPO",
    "KTO",
    "RLOO",
    "PPO",
    "CPO",
    "ORPO",
    "Online",
    "Distillation",
    "GKD",
    "NashMD",
    "XPO",
)


class RegularizedLossMixin:
    """Adds the regulariser to the loss of a Trainer that forms it without the model's own, by one forward a batch.

    For TRL's `RewardTrainer`, and for the stock Trainer with label smoothing or `compute_loss_func`. Where the model's
    own loss is used, it contains the regulariser already and nothing is added. The sum needs a loss that is a mean
    over the micro-batch, which the Trainer then divides by the accumulation steps.

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
        if any(holder.unclaimed for holder in holders_of(model)):
            term = regularization_loss(model)
            if term is not None:
                loss = loss + term.to(loss.device, torch.promote_types(loss.dtype, torch.float32))
        return (loss, outputs) if return_outputs else loss


def refuse_comparing_trainers(args: TrainingArguments, model: torch.nn.Module) -> None:
    """Refuse trainers whose loss is formed from several forwards, for adapters that draw anew in each.

    DPO, GRPO and their kin compare log-probabilities of two forwards (chosen and rejected, new and old policy). With a
    fresh draw in each, the ratio is noise of the draws, and no forward's loss has a place for the regulariser.

    Args:
        args: The trainer's arguments, whose class tells the trainer.
        model: The model.

    Raises:
        ValueError: If an active adapter is stochastic in training and the trainer is such a one.
    """
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
