"""A head that says how likely a frozen classifier is to be wrong, prediction by prediction, and what it must beat."""

from .answer import ErrorPrediction
from .copied import CopiedHead, copy_head
from .features import FeatureSet, extract_features
from .grid import HeadSettings
from .head import UncertaintyHead
from .report import HeadReport

__all__ = [
    "CopiedHead",
    "ErrorPrediction",
    "FeatureSet",
    "HeadReport",
    "HeadSettings",
    "UncertaintyHead",
    "copy_head",
    "extract_features",
]
