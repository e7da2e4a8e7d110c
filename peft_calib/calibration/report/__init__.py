"""The report of one set of predictions, as numbers, text, page and pictures."""

from .report import CalibrationReport, calibration_report

__all__ = ["CalibrationReport", "calibration_report"]
