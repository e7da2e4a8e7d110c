"""HyperLoRA: a generator network emits the LoRA factors."""

from ...registry import register_tuner
from .config import HyperLoraConfig
from .law import HyperLaw, HyperLoraModel

register_tuner("HYPERLORA", HyperLoraConfig, HyperLoraModel)

__all__ = ["HyperLaw", "HyperLoraConfig", "HyperLoraModel"]
