"""One artefact, one loader: an adapter that answers texts with calibrated probabilities, wherever it is asked."""

from .answer import CalibratedPrediction
from .loading import load
from .predictor import Predictor
from .scorer import Scorer
from .served import predict_served
from .shards import predict_to

__all__ = ["CalibratedPrediction", "Predictor", "Scorer", "load", "predict_served", "predict_to"]
