"""A server that stands in for the Hub, and a client that asks it."""

import pytest
from hub_server import client_of_a_hub


@pytest.fixture
def hub(monkeypatch):
    with client_of_a_hub(monkeypatch) as server:
        yield server
