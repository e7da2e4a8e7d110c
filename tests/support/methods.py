"""Every law, those of this package and one from outside, by what its tests need to build it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from families import Family
from gauss_lora import GaussLoraConfig
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from peft_calib import BayesianLoraConfig, CurveLoraConfig, EnsembleLoraConfig, HyperLoraConfig
from peft_calib.tuners import CalibLoraConfig, FactorModel, Law
from peft_calib.tuners.holder import FactorHolder


@dataclass(frozen=True)
class Method:
    """A configuration class with the fields its law is tested with."""

    config_class: type[CalibLoraConfig]
    fields: dict[str, Any] = field(default_factory=dict)

    def config(self, **fields: Any) -> CalibLoraConfig:
        return self.config_class(**{"r": 4, **self.fields, **fields})

    @property
    def tuner(self) -> type[FactorModel]:
        return PEFT_TYPE_TO_TUNER_MAPPING[self.config_class().peft_type]

    def adapt(self, family: Family, adapter_name: str = "default", base_seed: int = 0, **fields: Any) -> PeftModel:
        """A fresh model of a family under this method."""
        config = self.config(**{"target_modules": list(family.targets), **fields})
        return get_peft_model(family.build(base_seed), config, adapter_name=adapter_name)

    def holder(self, model: PeftModel) -> FactorHolder:
        return self.tuner.get_holder(model.get_base_model())

    def law(self, model: PeftModel, adapter_name: str = "default") -> Law:
        return self.holder(model).laws[adapter_name]


METHODS = {
    "hyper": Method(HyperLoraConfig),
    "hyper-random": Method(HyperLoraConfig, {"a_mode": "random", "seed": 0}),
    "bayesian": Method(BayesianLoraConfig, {"num_train_examples": 100}),
    "curve": Method(CurveLoraConfig),
    "ensemble": Method(EnsembleLoraConfig, {"layers": "all"}),
    "ensemble-late": Method(EnsembleLoraConfig, {"num_members": 3}),
    "gauss": Method(GaussLoraConfig),
}


def from_outside(path: str) -> Method:
    """The method whose configuration class is `module:Class`."""
    module, _, name = path.partition(":")
    return Method(getattr(importlib.import_module(module), name))
