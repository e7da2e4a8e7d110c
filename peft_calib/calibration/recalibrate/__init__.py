"""Post-hoc recalibration: methods fitted on held-out logits, and never reported on the rows they were fitted on."""

from ...json_files import Fields
from .base import LogitScaling, Recalibrator
from .linear import MatrixScaling, VectorScaling
from .per_class import BetaCalibration, HistogramCalibration, IsotonicCalibration, OneVersusRest
from .prior import PriorCorrection, PriorEstimate, estimate_prior
from .temperature import FEWEST_ROWS, TemperatureFit, TemperatureScaling, check_enough_rows

__all__ = [
    "BetaCalibration",
    "FEWEST_ROWS",
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

_ONE_VERSUS_REST = BetaCalibration, HistogramCalibration, IsotonicCalibration
_ON_LOGITS = MatrixScaling, PriorCorrection, TemperatureScaling, VectorScaling
_METHODS = {m.__name__: m for m in (*_ONE_VERSUS_REST, *_ON_LOGITS)}


def load_state(fields: Fields) -> Recalibrator:
    """The fitted method that a file holds, whichever it is."""
    return _METHODS[fields.text("method", among=list(_METHODS))].from_state(fields)
