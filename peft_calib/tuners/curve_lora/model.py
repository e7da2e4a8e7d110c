"""CurveLoRA as a PEFT tuner."""

from __future__ import annotations

import torch
from peft import PeftConfig
from torch import nn

from ...internals.peft import StateDict
from ..factors import SlotTable
from ..heads import HeadTensors, stacked_heads, trained_modules
from ..model import FactorModel
from .anchors import Anchors, read_anchors
from .config import CurveLoraConfig
from .curved_modules import freeze_tensors, thaw_tensors
from .law import CurveLaw


class CurveLoraModel(FactorModel):
    """Adapts a model with a curve of LoRAs, every point of which solves the task (arXiv 2605.29580).

    In `.eval()` the factors are those of `eval_t`; in training each forward uses a fresh point. A prediction averages
    the curve; `peft_calib.curve_at` chooses a point.

    Args:
        model: The base model, changed in place.
        config: A `CurveLoraConfig`.
        adapter_name: Name of the adapter.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> base = nn.Sequential(nn.Linear(4, 4))
        >>> type(get_peft_model(base, CurveLoraConfig(target_modules=["0"])).base_model).__name__
        'CurveLoraModel'
    """

    prefix = "curvelora_"
    holder_name = "calib_curve"

    def build_law(self, config: CurveLoraConfig, slots: SlotTable) -> CurveLaw:
        """Make the curve; anchors are read once and saved with the adapter from then on."""
        anchors = None
        # a saved curve brings its anchors along, unless it was told not to
        if config.curve_mode == "anchored" and (config._slots_to_match is None or config.leaves_anchors_out):
            anchors = read_anchors(config, slots)
        heads = self._curved_heads(config, anchors)
        law = CurveLaw(config, slots, anchors, heads)
        if anchors is not None:
            config.anchor_hashes = anchors.hashes
        return law

    def _curved_heads(self, config: CurveLoraConfig, anchors: Anchors | None) -> HeadTensors | None:
        """Make modules trained whole part of the curve, or give them the tensors that all anchors share."""
        # the adapter that is being added is the last; an object may serve several
        adapter = [name for name, other in self.peft_config.items() if other is config][-1]
        if config.curve_modules_to_save:
            return stacked_heads(self.model, self.get_holder(self.model), adapter)
        modules = trained_modules(self.model, adapter)
        if config.curve_mode == "anchored":
            plain = {name: module for name, (_, module) in modules.items()}
            if anchors is not None:
                _load_shared_heads(plain, anchors.heads[0])
            for module in plain.values():
                freeze_tensors(module)
        return None

    def set_curve_mode(self, curve_mode: str, adapter_name: str = "default") -> None:
        """Freeze the anchors of a free curve (`"anchored"`), or thaw those of an anchored one (`"free"`), in place.

        The curve stays what it is, bit by bit; what changes is which control points train.

        Args:
            curve_mode: The new mode.
            adapter_name: Which adapter.

        Raises:
            ValueError: For an unknown mode.
        """
        config, holder = self.peft_config[adapter_name], self.get_holder(self.model)
        if curve_mode not in ("free", "anchored"):
            raise ValueError(f"curve_mode must be 'free' or 'anchored', got {curve_mode!r}.")
        if config.curve_mode == curve_mode:
            return
        config.curve_mode, config.anchor_adapters, config.anchor_hashes = curve_mode, None, None
        for _, module in trained_modules(self.model, adapter_name).values():
            if curve_mode == "anchored":
                freeze_tensors(module)
            else:
                thaw_tensors(module)
        old = holder.laws[adapter_name]
        trainable = any(parameter.requires_grad for parameter in old.parameters())
        device = old.num_generations.device
        law = old.converted(config)
        law.start_seed = old.start_seed
        holder.discard(adapter_name)
        holder.add(adapter_name, law, device, trainable or adapter_name in self.active_adapters)

    @classmethod
    def _is_saved(cls, config: PeftConfig, key: str) -> bool:
        return not (config.leaves_anchors_out and _is_anchor(key))

    @classmethod
    def names_in_model(
        cls, model: nn.Module, config: CurveLoraConfig, adapter_name: str, state_dict: StateDict
    ) -> StateDict:
        """Those of a file, with the anchors that lie in their own folders."""
        if config.leaves_anchors_out:  # read from their folders when the law was built
            saved, own = f"{cls.holder_name}.{cls.prefix}law.", cls._law_marker(adapter_name)
            anchors = {key: value for key, value in model.state_dict().items() if own in key and _is_anchor(key)}
            state_dict = {**{key.replace(own, saved, 1): value for key, value in anchors.items()}, **state_dict}
        return super().names_in_model(model, config, adapter_name, state_dict)


def _is_anchor(key: str) -> bool:
    return ".anchor_" in key


@torch.no_grad()
def _load_shared_heads(modules: dict[str, nn.Module], head: dict[str, torch.Tensor]) -> None:
    """Give modules trained whole the tensors that all anchors carry."""
    own = {f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.named_parameters()}
    if head.keys() != own.keys() or any(head[key].shape != own[key].shape for key in own):
        raise ValueError(
            f"The anchors carry the trained modules {sorted(head)}, the curve has {sorted(own)} (modules_to_save, or "
            "the head of the task type). They must be the same, for the same number of classes."
        )
    for key, tensor in own.items():
        tensor.copy_(head[key])
