"""CurveLoRA as a PEFT tuner."""

from __future__ import annotations

from ..factors import SlotTable
from ..model import FactorModel
from .anchors import read_anchors
from .config import CurveLoraConfig
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
        if config.curve_mode == "free" or config._slots_to_match is not None:
            return CurveLaw(config, slots)
        anchors = read_anchors(config, slots)
        config.anchor_hashes = anchors.hashes
        return CurveLaw(config, slots, anchors)
