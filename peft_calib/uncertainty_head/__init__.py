"""A head that says how likely each prediction of a frozen classifier is to be wrong, and the baselines it must beat."""

from .copied import CopiedHead
from .features import FeatureSet

__all__ = ["CopiedHead", "FeatureSet"]
