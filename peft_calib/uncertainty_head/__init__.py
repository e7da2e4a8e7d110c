"""A head that says how likely a frozen classifier is to be wrong, prediction by prediction, and what it must beat."""

from .copied import CopiedHead, copy_head
from .features import FeatureSet, extract_features

__all__ = ["CopiedHead", "FeatureSet", "copy_head", "extract_features"]
