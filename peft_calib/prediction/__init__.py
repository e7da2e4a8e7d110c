"""K draws of an adapter as one prediction: probabilities, uncertainties and their cost."""

from .dataset import predict_dataset
from .draws import draws
from .engine import predict
from .frozen import load_frozen, predict_frozen
from .result import Prediction, RegressionPrediction

__all__ = [
    "Prediction",
    "RegressionPrediction",
    "draws",
    "load_frozen",
    "predict",
    "predict_dataset",
    "predict_frozen",
]
