"""How far a posterior's standard deviations have moved from where they started."""

from __future__ import annotations

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_calib.tuners.laws import laws_of

from .adapter_state import whole
from .reporting import LateLog


class PosteriorSpreadCallback(TrainerCallback):
    """Logs, with every training loss, the ratio of a posterior's standard deviations to their start values.

    `posterior_sd_ratio` is the median over all entries, `posterior_sd_ratio_p05` and `_p95` are quantiles, and
    `posterior_sd_moved` is the share of entries that differ from their start by more than 1 %. A median that stays at
    1 says that nothing was learned about uncertainty: train longer, or raise `variance_lr_multiplier`. With
    conditional noise `posterior_noise_ratio` is the same for its scale.

    Example:
        >>> callback = PosteriorSpreadCallback()  # Trainer(..., callbacks=[callback])
    """

    def __init__(self) -> None:
        self._log = LateLog()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            self._log.add(args, state, logs, posterior_spread(kwargs["model"]))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._log.close()


@torch.no_grad()
def posterior_spread(model: torch.nn.Module) -> dict[str, float]:
    """Ratios of the posterior's standard deviations to their start values.

    Args:
        model: A model with adapters whose laws have scales (BayesianLoRA).

    Returns:
        The numbers that `PosteriorSpreadCallback` logs; none for a model without such an adapter.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_calib import BayesianLoraConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> model = get_peft_model(base, BayesianLoraConfig(target_modules=["0"]))
        >>> posterior_spread(model)["posterior_sd_ratio"]
        1.0
    """
    # all entries on the CPU, also where they are sharded
    scales = [
        (name, whole(ratios).float().cpu().flatten())
        for law in laws_of(model)
        for name, ratios in law.scales().items()
    ]
    cores = [ratios for name, ratios in scales if name != "noise"]
    noise = [ratios for name, ratios in scales if name == "noise"]
    numbers: dict[str, float] = {}
    if cores:
        ratios = torch.cat(cores)
        # evenly spaced entries: torch.quantile refuses more than 16 million
        some = ratios[:: -(-len(ratios) // 1_000_000)]
        low, middle, high = torch.quantile(some, torch.tensor([0.05, 0.5, 0.95])).tolist()
        numbers = {
            "posterior_sd_ratio": middle,
            "posterior_sd_ratio_p05": low,
            "posterior_sd_ratio_p95": high,
            "posterior_sd_moved": float(((ratios - 1).abs() > 0.01).float().mean()),
        }
    if noise:
        numbers["posterior_noise_ratio"] = float(torch.cat(noise).median())
    return numbers
