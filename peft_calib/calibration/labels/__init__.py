"""Several labels a row, of which any number may hold: what their probabilities are worth."""

from .report import LabelsReport, labels_report
from .scaling import LabelScaling
from .thresholds import LabelThresholds

__all__ = ["LabelScaling", "LabelThresholds", "LabelsReport", "labels_report"]
