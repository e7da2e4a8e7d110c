"""A calibration study on real text from end to end: three runs, and one table of them."""

from ..runs.embedded import embedded_model
from .data import TextData, load_text_data
from .run import demo_config, run_demo

__all__ = ["TextData", "demo_config", "embedded_model", "load_text_data", "run_demo"]
