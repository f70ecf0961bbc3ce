# pytest tests/test_hub.py
"""A hub that does not answer is reported in seconds, not after many attempts of its libraries."""

import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pytest
from huggingface_hub import close_session, constants

from plumbing import hub

NAMES = ("--model", "alpaca-7b", "--device", "cpu")
REFUSAL = "error: cannot reach --policy PKU-Alignment/alpaca-7b-reproduced, --reward_model PKU"


@pytest.fixture
def silent():
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def online(monkeypatch):
    """Inside it the libraries believe in a network without a proxy."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "SECONDS", 0.5)
    close_session()  # it remembers proxies
    hub.check_hub.cache_clear()
    yield
    hub.check_hub.cache_clear()
    close_session()


def test_without_an_answer_the_libraries_use_their_cache(online, silent, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    hub.check_hub()
    assert constants.is_offline_mode() and datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_never_answers_is_asked_once(run, online, silent, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    begin = time.monotonic()
    code, out, printed = run(*NAMES)
    assert code == 2 and REFUSAL in printed and not out.exists()
    assert time.monotonic() - begin < 5  # four names, each with several files


class Missing(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


def test_any_answer_will_do(online, monkeypatch):
    with HTTPServer(("127.0.0.1", 0), Missing) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(hub, "SECONDS", 5)
        hub.check_hub()
    assert not constants.is_offline_mode() and not datasets.config.HF_HUB_OFFLINE
