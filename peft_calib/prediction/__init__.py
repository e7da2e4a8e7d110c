"""K draws of an adapter as one prediction: probabilities, uncertainties and their cost."""

from .answering import GeneratedAnswers, generate_answers
from .dataset import predict_dataset
from .draws import curve_at, draws
from .engine import predict
from .frozen import load_frozen, predict_frozen
from .labels import LabelsPrediction
from .result import Prediction, RegressionPrediction
from .serving import predict_served
from .texts import GeneratedSamples, TextScores, sample_generate, score_texts

__all__ = [
    "GeneratedAnswers",
    "GeneratedSamples",
    "LabelsPrediction",
    "Prediction",
    "RegressionPrediction",
    "TextScores",
    "curve_at",
    "draws",
    "generate_answers",
    "load_frozen",
    "predict",
    "predict_dataset",
    "predict_frozen",
    "predict_served",
    "sample_generate",
    "score_texts",
]
