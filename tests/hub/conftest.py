"""A server that stands in for the Hub, and a client that asks it."""

from __future__ import annotations

import huggingface_hub.constants as constants
import pytest
from hub_server import TOKEN, HubServer

from peft_calib.hub import push


@pytest.fixture
def hub(monkeypatch):
    server = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(push, "PAUSE", 0.0)
    yield server
    server.close()
