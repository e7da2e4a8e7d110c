"""A calibration study on real text from end to end: four runs, and one table of them."""

from ..runs.embedded import embedded_model
from .data import TextData, load_text_data
from .offline import offline_sentences, offline_words, tiny_encoder, tiny_language_model
from .run import demo_config, run_demo

__all__ = [
    "TextData", "demo_config", "embedded_model", "load_text_data", "offline_sentences", "offline_words", "run_demo",
    "tiny_encoder", "tiny_language_model",
]  # fmt: skip
