"""A head that says how likely a frozen classifier is to be wrong, prediction by prediction, and what it must beat."""

from .copied import CopiedHead
from .features import FeatureSet

__all__ = ["CopiedHead", "FeatureSet"]
