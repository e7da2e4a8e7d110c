"""Fixtures for the prediction tests: the tuner tests' tiny models."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tuners"))
from families import FAMILIES, Family


@pytest.fixture(params=list(FAMILIES))
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def bert() -> Family:
    return FAMILIES["bert"]


@pytest.fixture
def llama() -> Family:
    return FAMILIES["llama"]
