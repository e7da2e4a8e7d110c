"""Which laws a model carries, their regularisers and their parameters: the only loops that answer this."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .factors import Law
from .holder import FactorHolder


def holders_of(model: nn.Module) -> list[FactorHolder]:
    """The holders anywhere inside a model, one for each tuner type on each base model."""
    return [module for module in model.modules() if isinstance(module, FactorHolder)]


def laws_of(model: nn.Module, *, active: bool = False) -> Iterator[Law]:
    """The laws of all adapters anywhere in a model, whatever their methods, holder by holder.

    With `active` without those of adapters that are inactive or disabled, which no forward asks.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_calib import HyperLoraConfig
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), HyperLoraConfig(target_modules=["0"]))
        >>> [type(law).__name__ for law in laws_of(model)]
        ['HyperLaw']
    """
    for holder in holders_of(model):
        for name, law in holder.laws.items():
            if not active or (holder.enabled and name in holder.active):
                yield law


def regularization_loss(model: nn.Module) -> torch.Tensor | None:
    """The regulariser of the last training forward, for a loop that computes its loss from the logits.

    `outputs.loss` contains it already: add it only to a loss of your own.

    Args:
        model: The model that was called, or one that contains it.

    Returns:
        A scalar with a graph, once for each forward; `None` afterwards and outside training.

    Example:
        >>> regularization_loss(nn.Linear(2, 2)) is None
        True
    """
    pending = [term for holder in holders_of(model) for term in holder.take_pending()]
    return torch.stack(pending).sum() if pending else None


def param_groups(
    model: nn.Module, lr: float, *, variance_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters so that posterior variances have a learning rate of their own.

    A stock optimiser with a single group works too: the variances already move `variance_lr_multiplier` times as fast
    as their stored offsets, and this learning rate comes on top. Weight decay is kept off the variances, where it
    would pull towards their initial value.

    Args:
        model: A model with adapters.
        lr: Learning rate of means, bases, heads and all else.
        variance_lr: Learning rate of the variances' stored offsets; `lr` when omitted.
        weight_decay: Weight decay of all but the variances.

    Returns:
        Groups for any `torch.optim` optimiser. With the stock Trainer pass `optimizers=(AdamW(groups), None)` or
        `optimizer_cls_and_kwargs=(AdamW, {"params": groups})`.

    Raises:
        ValueError: If a learning rate is not positive, or nothing is trainable.

    Example:
        >>> [len(group["params"]) for group in param_groups(nn.Linear(2, 2), 1e-3)]
        [2]
    """
    variance_lr = lr if variance_lr is None else variance_lr
    if lr <= 0 or variance_lr <= 0:
        raise ValueError(f"Learning rates must be positive, got lr={lr!r} and variance_lr={variance_lr!r}.")
    spread = {id(p) for law in laws_of(model) for p in law.spread_parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("The model has no trainable parameter: load the adapter with is_trainable=True.")
    groups = [
        {"params": [p for p in trainable if id(p) not in spread], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in spread], "lr": variance_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
