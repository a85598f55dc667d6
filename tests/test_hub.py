"""Where nothing answers at the Hub, the cache alone is used."""

import os
import socket
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from vlmtune.hub import stay_offline_unless_reachable


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    stay_offline_unless_reachable.cache_clear()
    yield
    stay_offline_unless_reachable.cache_clear()


def test_nothing_answers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    stay_offline_unless_reachable()
    assert constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_proxy_may_reach_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    stay_offline_unless_reachable()
    assert not constants.HF_HUB_OFFLINE


def test_it_answers(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        stay_offline_unless_reachable()
    assert not constants.HF_HUB_OFFLINE
