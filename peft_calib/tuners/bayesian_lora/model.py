"""BayesianLoRA as a PEFT tuner."""

from __future__ import annotations

from ..factors import SlotTable
from ..lora_adapter import read_lora_factors
from ..model import FactorModel
from .config import BayesianLoraConfig
from .law import BayesianLaw


class BayesianLoraModel(FactorModel):
    """Adapts a model with LoRA factors drawn from a sparse-GP posterior (arXiv 2601.21003).

    In `.eval()` the factors are the posterior's mean; in training each forward uses one draw, and the Kullback-Leibler
    divergence from the prior is part of `outputs.loss`.

    Args:
        model: The base model, changed in place.
        config: A `BayesianLoraConfig`.
        adapter_name: Name of the adapter.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> base = nn.Sequential(nn.Linear(4, 4))
        >>> type(get_peft_model(base, BayesianLoraConfig(target_modules=["0"])).base_model).__name__
        'BayesianLoraModel'
    """

    prefix = "bayesianlora_"
    holder_name = "calib_bayesian"

    def build_law(self, config: BayesianLoraConfig, slots: SlotTable) -> BayesianLaw:
        """Make the posterior; a LoRA adapter to start from is read once and saved with the adapter from then on."""
        pairs = read_lora_factors(config.init_from, slots) if config.init_from is not None else None
        return BayesianLaw(config, slots, pairs)

    def kl(self, adapter_name: str = "default"):
        """KL of an adapter's posterior from its prior, in nats (with a flow an estimate from one draw)."""
        return self.get_law(adapter_name).kl()
