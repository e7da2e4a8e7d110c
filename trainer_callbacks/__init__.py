"""Callbacks for the stock Trainer: thin shells over the rest of the package."""

from .calibration import CalibrationCallback, preprocess_logits_for_calibration
from .schedule import RegularizerScheduleCallback

__all__ = ["CalibrationCallback", "RegularizerScheduleCallback", "preprocess_logits_for_calibration"]
