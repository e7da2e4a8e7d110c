"""Post-hoc recalibration: methods fitted on held-out logits, and never reported on the rows they were fitted on."""

from .base import LogitScaling, Recalibrator
from .fitted import FittedMethod, load_state
from .linear import MatrixScaling, VectorScaling
from .per_class import BetaCalibration, HistogramCalibration, IsotonicCalibration, OneVersusRest
from .prior import PriorCorrection, PriorEstimate, estimate_prior
from .temperature import FEWEST_ROWS, TemperatureFit, TemperatureScaling, check_enough_rows

__all__ = [
    "BetaCalibration",
    "FEWEST_ROWS",
    "FittedMethod",
    "HistogramCalibration",
    "IsotonicCalibration",
    "LogitScaling",
    "MatrixScaling",
    "OneVersusRest",
    "PriorCorrection",
    "PriorEstimate",
    "Recalibrator",
    "TemperatureFit",
    "TemperatureScaling",
    "VectorScaling",
    "check_enough_rows",
    "estimate_prior",
    "load_state",
]
