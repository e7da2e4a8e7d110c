"""K draws of an adapter as one prediction: probabilities, uncertainties and their cost."""

from .draws import draws
from .engine import predict
from .result import Prediction, RegressionPrediction

__all__ = ["Prediction", "RegressionPrediction", "draws", "predict"]
