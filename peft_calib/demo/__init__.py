"""A calibration study on real text from end to end: data, training, measuring, report."""

from .data import TextData, load_text_data
from .run import run_demo
from .training import TrainingSettings, embedded_model, predict_logits, train_adapter

__all__ = [
    "TextData",
    "TrainingSettings",
    "embedded_model",
    "load_text_data",
    "predict_logits",
    "run_demo",
    "train_adapter",
]
