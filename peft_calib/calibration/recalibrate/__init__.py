# SPDX-License-Identifier: Apache-2.0
"""Post-hoc recalibration: methods fitted on held-out logits, and never reported on the rows they were fitted on."""

from peft_calib.calibration.recalibrate.base import LogitScaling, Recalibrator
from peft_calib.calibration.recalibrate.linear import MatrixScaling, VectorScaling
from peft_calib.calibration.recalibrate.per_class import (
    BetaCalibration,
    HistogramCalibration,
    IsotonicCalibration,
    OneVersusRest,
)
from peft_calib.calibration.recalibrate.temperature import (
    FEWEST_ROWS,
    TemperatureFit,
    TemperatureScaling,
    check_enough_rows,
)

__all__ = [
    "BetaCalibration",
    "FEWEST_ROWS",
    "HistogramCalibration",
    "IsotonicCalibration",
    "LogitScaling",
    "MatrixScaling",
    "OneVersusRest",
    "Recalibrator",
    "TemperatureFit",
    "TemperatureScaling",
    "VectorScaling",
    "check_enough_rows",
]
