"""Which laws a model carries: the only loop over modules that answers this."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .factors import Law
from .holder import holders_of


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
