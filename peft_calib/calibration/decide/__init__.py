"""From a probability to a decision with a guarantee: thresholds to answer at, and sets of classes."""

from .bounds import NoGuaranteeError
from .plots import set_size_diagram, threshold_diagram
from .sets import ConformalSets
from .stored import load_decision
from .threshold import SelectiveThreshold

__all__ = [
    "ConformalSets",
    "NoGuaranteeError",
    "SelectiveThreshold",
    "load_decision",
    "set_size_diagram",
    "threshold_diagram",
]
