"""BayesianLoRA: a sparse-GP posterior over the LoRA factors."""

from ...registry import register_tuner
from .config import BayesianLoraConfig
from .law import BayesianLaw, BayesianLoraModel

register_tuner("BAYESIANLORA", BayesianLoraConfig, BayesianLoraModel)

__all__ = ["BayesianLaw", "BayesianLoraConfig", "BayesianLoraModel"]
