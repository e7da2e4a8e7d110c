"""Make a trained LoRA Bayesian: fit a posterior around it while its function stays what it is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ..identity import saved_alone
from ..items import count_batch, count_items
from ..tuners.bayesian_lora import BayesianLaw, BayesianLoraConfig
from ..tuners.lora_options import more_than_factors

_FROM_LORA = ("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform")
_FROM_LORA += ("layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "task_type")


def bayesianize(
    model: PeftModel,
    batches: Iterable[dict[str, Any]],
    *,
    num_epochs: int = 1,
    learning_rate: float = 5e-3,
    adapter_name: str = "default",
    **fields: Any,
) -> PeftModel:
    """Turn a trained LoRA into a BayesianLoRA by fitting its variances only.

    The LoRA becomes the posterior's mean, exactly; mean, bases and head stay frozen while the evidence lower bound is
    maximised over the spread of the cores, with the base model in evaluation mode. Accuracy in `.eval()` is therefore
    unchanged, and draws show where the training data left the adapter undetermined.

    Args:
        model: A `PeftModel` with a plain LoRA. Its LoRA layers are taken out: use the returned model from here on.
        batches: Training batches, dicts that the model takes, labels included; a `DataLoader` as a rule. Passed over
            `num_epochs` times.
        num_epochs: Passes over the batches.
        learning_rate: Of AdamW on the stored offsets of the variances.
        adapter_name: Which adapter; the new one has the same name.
        fields: Fields of `BayesianLoraConfig`. `num_train_examples` may be left out where `batches` is a list, or has
            a `dataset` with a length: the items are counted (rows, or target tokens). Sizes, scaling and targets are
            the LoRA's.

    Returns:
        The Bayesian model in evaluation mode, all of its adapter trainable.

    Raises:
        TypeError: If the model carries no plain LoRA: variants of other functions, and starts such as PiSSA's, whose
            factors belong to changed weights of the base model, are none.
        ValueError: If the number of training items is unknown, there are no batches, or they give no loss.
    """
    config = _lora_config(model, adapter_name)
    if num_epochs < 1 or (isinstance(batches, Sized) and len(batches) == 0):
        raise ValueError("There are no batches (or num_epochs is below 1), so no variance could be fitted.")
    if "num_train_examples" not in fields:
        fields["num_train_examples"] = _num_examples(batches, model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = saved_alone(model, adapter_name, Path(scratch))
        inherited = {name: getattr(config, name) for name in _FROM_LORA}
        fitted = BayesianLoraConfig(**{**inherited, **fields, "init_from": str(folder)})
        bayesian = get_peft_model(model.unload(), fitted, adapter_name=adapter_name)
    law = bayesian.base_model.get_law(adapter_name)
    _fit_spread(bayesian, law, batches, num_epochs, learning_rate)
    return bayesian.eval()


def _lora_config(model: PeftModel, adapter_name: str) -> LoraConfig:
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(model, PeftModel) or not isinstance(config, LoraConfig) or type(config) is not LoraConfig:
        raise TypeError(
            f"bayesianize takes a PeftModel whose adapter {adapter_name!r} is a plain LoRA, got "
            f"{type(model).__name__} with {type(config).__name__}."
        )
    if (more := more_than_factors(vars(config))) is not None:
        raise TypeError(f"bayesianize takes a plain LoRA, whose factors are all of it, and this one has {more}.")
    return config


def _num_examples(batches: Iterable[dict[str, Any]], model: PeftModel) -> int:
    """Rows, or target tokens of a language model: what the loss of all batches averages over."""
    if isinstance(batches, Sequence):
        counts = [count_batch(batch, model) for batch in batches]
        found = None if None in counts else sum(counts)  # type: ignore[arg-type]
    else:
        found = count_items(getattr(batches, "dataset", None), getattr(batches, "collate_fn", None), model)
    if not found:
        raise ValueError(
            "The number of training items is unknown: pass num_train_examples (rows, or target tokens for language "
            "modelling), or a list of batches with labels, or a DataLoader over a data set with a length."
        )
    return found


def _fit_spread(
    model: PeftModel, law: BayesianLaw, batches: Iterable[dict[str, Any]], num_epochs: int, learning_rate: float
) -> None:
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    spread = law.spread_parameters()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in spread:
        parameter.requires_grad_(True)
    model.eval()
    law.train()  # draws, while dropout in the base model stays off
    optimizer = torch.optim.AdamW(spread, lr=learning_rate, weight_decay=0.0)
    device, steps = spread[0].device, 0
    try:
        for _ in range(num_epochs):
            for batch in batches:
                optimizer.zero_grad()
                loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
                if loss is None:
                    raise ValueError("The model returned no loss for a batch; bayesianize needs batches with labels.")
                loss.backward()
                optimizer.step()
                steps += 1
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
            parameter.grad = None
    if steps == 0:
        raise ValueError("There were no batches, so no variance was fitted.")
