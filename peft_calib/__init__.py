"""Calibrated LoRA fine-tuning as a plugin of PEFT: importing it registers the methods.

A law over LoRA factors, an engine that predicts with it, and an honest measure of the result. What it holds is listed
in `__init__.pyi` and loaded when it is asked for, so that measuring calibration costs no PEFT.

Example:
    >>> import peft_calib
    >>> peft_calib.HyperLoraConfig(r=8, target_modules=["query", "value"]).peft_type.value
    'HYPERLORA'
"""

import lazy_loader

from .versions import __version__ as __version__
from .versions import check_peft_version
from .with_peft import register_with_peft

check_peft_version()  # a PEFT that cannot work is refused first
register_with_peft()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
