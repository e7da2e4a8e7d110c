"""Scores of any number of rows in fixed memory."""

from peft_calib.calibration.streaming.accumulator import CalibrationAccumulator

__all__ = ["CalibrationAccumulator"]
