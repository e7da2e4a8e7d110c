"""CurveLoRA: low-loss curves through the space of LoRA factors."""

from ...registry import register_tuner
from .config import CurveLoraConfig
from .model import CurveLoraModel

register_tuner("CURVELORA", CurveLoraConfig, CurveLoraModel)

__all__ = ["CurveLoraConfig", "CurveLoraModel"]
