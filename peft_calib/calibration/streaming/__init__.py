"""Scores of any number of rows in fixed memory."""

from .accumulator import CalibrationAccumulator

__all__ = ["CalibrationAccumulator"]
