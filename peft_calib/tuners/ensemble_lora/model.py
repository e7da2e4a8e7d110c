"""EnsembleLoRA as a PEFT tuner."""

from __future__ import annotations

import re
from typing import Any

from peft import PeftConfig
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ..heads import stacked_heads
from ..late import blocks_of
from ..model import FactorModel
from ..slots import SlotTable
from .config import EnsembleLoraConfig
from .law import EnsembleLaw

#: Heads that PEFT's models of a task have trained whole only when the adapter stands: too late for a member's own.
_HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


class EnsembleLoraModel(FactorModel):
    """Adapts the last layers of a model with K LoRAs, each with a head of its own.

    In training each row goes through the frozen layers once and through the others once a member; the loss is the mean
    of the members' losses. In `.eval()` the model is its first member; `peft_calib.predict` averages all of them.

    Args:
        model: The base model, changed in place.
        config: An `EnsembleLoraConfig`.
        adapter_name: Name of the adapter.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> base = nn.Sequential(nn.Linear(4, 4))
        >>> type(get_peft_model(base, EnsembleLoraConfig(target_modules=["0"])).base_model).__name__
        'EnsembleLoraModel'
    """

    prefix = "ensemblelora_"
    holder_name = "calib_ensemble"

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Find the layers that stay as they are, then adapt the others."""
        config = self.peft_config[adapter_name]
        if config.modules_to_save is None:
            config.modules_to_save = _HEADS.get(str(getattr(config.task_type, "value", config.task_type)))
        blocks = blocks_of(model)
        untouched = blocks[: config.first_layer(len(blocks))]
        self._below, self._adding, self._left_out = _modules_below(model, untouched), adapter_name, False
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            if not self._left_out:
                raise
            raise type(error)(
                f"layers={config.layers!r} leaves out every layer that target_modules={config.target_modules!r} names "
                f'of the {len(blocks)} of this model. Name modules of the last layers, or set layers="all".'
            ) from error

    def is_target(self, config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        """By the configuration, above the layers that stay as they are."""
        found = super().is_target(config, key)
        if not found or key not in self._below:
            return found
        self._left_out = True
        return None

    def build_law(self, config: EnsembleLoraConfig, slots: SlotTable) -> EnsembleLaw:
        """Make the members; modules trained whole become part of each."""
        return EnsembleLaw(config, slots, stacked_heads(self.model, self.get_holder(self.model), self._adding))


def _modules_below(model: nn.Module, untouched: list[nn.Module]) -> set[str]:
    """Names of the modules up to the last of some blocks, in the order of the model's modules."""
    if not untouched:
        return set()
    names = [name for name, _ in model.named_modules()]
    last = next(name for name, module in model.named_modules() if module is untouched[-1])
    inside = [position for position, name in enumerate(names) if name == last or name.startswith(f"{last}.")]
    return set(names[: inside[-1] + 1])
