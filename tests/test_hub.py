# pytest tests/test_hub.py
"""A hub that does not answer is told of in seconds, not after its libraries' many tries."""

import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pytest
from conftest import ROOT
from huggingface_hub import close_session, constants

from plumbing import hub

NAMES = ("--model", "alpaca-7b", "--device", "cpu")
REFUSAL = "error: cannot reach --policy PKU-Alignment/alpaca-7b-reproduced, --reward_model PKU"


@pytest.fixture
def silent():
    """The address of a server that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def online(monkeypatch):
    """Tests have no network; inside this one the libraries believe in one, without a proxy."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    close_session()  # which remembers proxies
    hub.check_hub.cache_clear()
    yield
    hub.check_hub.cache_clear()
    close_session()


def test_a_hub_that_never_answers_is_asked_once(run, online, silent, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    monkeypatch.setattr(hub, "SECONDS", 0.5)
    begin = time.monotonic()
    code, out, printed = run(*NAMES)
    assert code == 2 and REFUSAL in printed and not out.exists()
    assert time.monotonic() - begin < 5  # four names, and each has several files


def test_what_the_cache_holds_needs_no_answer(online, silent, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    hub.check_hub()
    assert constants.is_offline_mode() and datasets.config.HF_HUB_OFFLINE


class Missing(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


def test_any_answer_will_do(online, monkeypatch):
    with HTTPServer(("127.0.0.1", 0), Missing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        hub.check_hub()
        server.shutdown()
    assert not constants.is_offline_mode() and not datasets.config.HF_HUB_OFFLINE


@pytest.mark.exhaustive
@pytest.mark.parametrize("script", ["repo.py", "-m companions.supervised"])
def test_it_is_told_within_15_seconds(silent, tmp_path, script):
    flags = NAMES if script == "repo.py" else (
        "--model", "nobody/nothing", "--data", "nobody/pairs", "--out", tmp_path / "out")
    environment = {name: value for name, value in os.environ.items()
                   if not name.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": silent, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    begin = time.monotonic()
    command = [sys.executable, *script.split(), *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - begin < 15
