"""Adapters: laws over LoRA factors, one tuner layer and one tuner model."""

from .bayesian_lora import BayesianLoraConfig, BayesianLoraModel
from .config import CalibLoraConfig
from .curve_lora import CurveLoraConfig, CurveLoraModel
from .factors import Draw, Factors, Law, ShapeGroup, Slot, SlotTable
from .hyper_lora import HyperLoraConfig, HyperLoraModel
from .layer import FactorLinear
from .model import FactorModel

__all__ = [
    "BayesianLoraConfig",
    "BayesianLoraModel",
    "CalibLoraConfig",
    "CurveLoraConfig",
    "CurveLoraModel",
    "Draw",
    "FactorLinear",
    "FactorModel",
    "Factors",
    "HyperLoraConfig",
    "HyperLoraModel",
    "Law",
    "ShapeGroup",
    "Slot",
    "SlotTable",
]
