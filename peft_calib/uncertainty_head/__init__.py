"""A head that says how likely a frozen classifier is to be wrong, prediction by prediction, and what it must beat."""

from ..calibration.entities import spans_of
from .answer import ErrorPrediction
from .copied import CopiedHead, copy_head
from .entities import Grouped, entities, sentences
from .features import FeatureSet, extract_features
from .grid import HeadSettings
from .head import UncertaintyHead
from .report import HeadReport

__all__ = [
    "CopiedHead",
    "ErrorPrediction",
    "FeatureSet",
    "Grouped",
    "HeadReport",
    "HeadSettings",
    "UncertaintyHead",
    "copy_head",
    "entities",
    "extract_features",
    "sentences",
    "spans_of",
]
