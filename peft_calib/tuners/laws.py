"""Which laws a model carries: the only loop over modules that answers this."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .factors import Law
from .holder import holders_of


def laws_of(model: nn.Module, *, active: bool = False) -> Iterator[Law]:
    """Find the laws of all adapters on a model, whatever their methods.

    Args:
        model: A model, or anything that contains one (a `PeftModel`, a wrapper of a trainer).
        active: Leave out the laws of adapters that are inactive or disabled, which no forward asks.

    Yields:
        Each law once: holder by holder in the order of the model's modules, and in the order in which adapters were
        added.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_calib import HyperLoraConfig
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), HyperLoraConfig(target_modules=["0"]))
        >>> [type(law).__name__ for law in laws_of(model)]
        ['HyperLaw']
        >>> with model.disable_adapter():
        ...     list(laws_of(model, active=True))
        []
    """
    for holder in holders_of(model):
        for name, law in holder.laws.items():
            if not active or (holder.enabled and name in holder.active):
                yield law
