"""Which laws a model carries, and their regularisers: the only loops over modules that answer this."""

from __future__ import annotations

from collections.abc import Iterator

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
