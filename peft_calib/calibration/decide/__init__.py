"""From a probability to a decision with a guarantee: thresholds to answer at, and sets of classes."""

from .bounds import NoGuaranteeError
from .by_group import GroupsReached, reached_by_group
from .page import decision_html
from .plots import reach_diagram, set_size_diagram, threshold_diagram
from .sets import ConformalSets
from .stored import load_decision
from .threshold import SelectiveThreshold

__all__ = [
    "ConformalSets",
    "GroupsReached",
    "NoGuaranteeError",
    "SelectiveThreshold",
    "decision_html",
    "load_decision",
    "reach_diagram",
    "reached_by_group",
    "set_size_diagram",
    "threshold_diagram",
]
