"""EnsembleLoRA: independent LoRAs in the last layers of one model, over a trunk that all of them share."""

from ...registry import register_tuner
from .config import EnsembleLoraConfig
from .model import EnsembleLoraModel

register_tuner("ENSEMBLELORA", EnsembleLoraConfig, EnsembleLoraModel)

__all__ = ["EnsembleLoraConfig", "EnsembleLoraModel"]
