# SPDX-License-Identifier: Apache-2.0
"""Measuring calibration: numbers with intervals and noise floors, from probabilities and labels alone.

Needs numpy and torch only; pictures need matplotlib. Nothing here knows about adapters.
"""

from peft_calib.calibration.answers import log_probabilities
from peft_calib.calibration.recalibrate import (
    BetaCalibration,
    HistogramCalibration,
    IsotonicCalibration,
    MatrixScaling,
    TemperatureFit,
    TemperatureScaling,
    VectorScaling,
)
from peft_calib.calibration.report.conventions import CONVENTIONS
from peft_calib.calibration.report.plots import (
    before_after_diagram,
    classwise_diagram,
    confidence_histogram,
    reliability_diagram,
    risk_coverage_diagram,
)
from peft_calib.calibration.report.report import CalibrationReport, calibration_report
from peft_calib.calibration.resampling.comparison import Comparison, compare, compare_many
from peft_calib.calibration.scores.uncertainty import DrawUncertainty, draw_uncertainty
from peft_calib.calibration.streaming.accumulator import CalibrationAccumulator

__all__ = [
    "BetaCalibration",
    "CONVENTIONS",
    "CalibrationAccumulator",
    "CalibrationReport",
    "Comparison",
    "DrawUncertainty",
    "HistogramCalibration",
    "IsotonicCalibration",
    "MatrixScaling",
    "TemperatureFit",
    "TemperatureScaling",
    "VectorScaling",
    "before_after_diagram",
    "calibration_report",
    "classwise_diagram",
    "compare",
    "compare_many",
    "confidence_histogram",
    "draw_uncertainty",
    "log_probabilities",
    "reliability_diagram",
    "risk_coverage_diagram",
]
