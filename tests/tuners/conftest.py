"""Fixtures for the tuner tests."""

import pytest
from families import FAMILIES, Family
from peft import PeftModel, get_peft_model

from peft_calib import HyperLoraConfig


@pytest.fixture(params=list(FAMILIES))
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def bert() -> Family:
    return FAMILIES["bert"]


@pytest.fixture
def adapt():
    """Adapt a fresh model of a family with HyperLoRA."""

    def build(family: Family, adapter_name: str = "default", base_seed: int = 0, **fields) -> PeftModel:
        config = HyperLoraConfig(**{"r": 4, "target_modules": list(family.targets), **fields})
        return get_peft_model(family.build(base_seed), config, adapter_name=adapter_name)

    return build
