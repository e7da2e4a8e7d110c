"""Adapters: laws over LoRA factors, one tuner layer and one tuner model."""

from .bayesian_lora import BayesianLoraConfig, BayesianLoraModel
from .config import CalibLoraConfig
from .counting import CountingLaw
from .curve_lora import CurveLoraConfig, CurveLoraModel
from .ensemble_lora import EnsembleLoraConfig, EnsembleLoraModel
from .factors import Draw, Factors, Law, Mean, Points, Sample, Train
from .hyper_lora import HyperLoraConfig, HyperLoraModel
from .layer import FactorLinear
from .lora_factors import plain_start
from .model import FactorModel
from .posterior import Posterior, PosteriorConfig
from .slots import ShapeGroup, Slot, SlotTable

__all__ = [
    "BayesianLoraConfig",
    "BayesianLoraModel",
    "CalibLoraConfig",
    "CountingLaw",
    "CurveLoraConfig",
    "CurveLoraModel",
    "Draw",
    "EnsembleLoraConfig",
    "EnsembleLoraModel",
    "FactorLinear",
    "FactorModel",
    "Factors",
    "HyperLoraConfig",
    "HyperLoraModel",
    "Law",
    "Mean",
    "Points",
    "Posterior",
    "PosteriorConfig",
    "Sample",
    "ShapeGroup",
    "Slot",
    "SlotTable",
    "Train",
    "plain_start",
]
