# pytest tests/test_threads.py
"""How many threads a process uses: as many as cores are free, and never against the user."""
import os
import runpy
import sys
import time

import pytest
import torch
from conftest import ROOT

from plumbing import threads as threading


@pytest.fixture
def given(monkeypatch) -> list:
    """What torch is given as its number of threads. The environment has nothing set."""
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is as before at the end
        monkeypatch.delenv(name)
    given = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    return given


@pytest.mark.parametrize("name, value, spins", [
    ("OMP_NUM_THREADS", "2", "2000"), ("GOMP_SPINCOUNT", "77", "77"),
    ("OMP_WAIT_POLICY", "active", None),
])
def test_what_the_user_has_set_stays(given, monkeypatch, name, value, spins):
    monkeypatch.setenv(name, value)
    runpy.run_path(str(ROOT / "plumbing" / "threads.py"))["fit_threads"]()
    assert os.environ[name] == value and os.environ.get("GOMP_SPINCOUNT") == spins
    assert bool(given) == (name != "OMP_NUM_THREADS")


@pytest.mark.parametrize("worked, threads", [(0.0, 4), (14.0, 3), (16.0, 2), (24.0, 2), (26.0, 1),
                                             (900.0, 1)])
def test_threads_by_hand(given, monkeypatch, worked, threads):
    """Four cores; others have worked so many seconds in the ten since the import."""
    monkeypatch.setattr(threading, "STARTED", (time.monotonic() - 10, 0.0, time.process_time()))
    monkeypatch.setattr(threading, "seconds_of_all_processes", lambda: worked)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    threading.fit_threads()
    assert given == [threads]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how busy its cores are")
def test_the_cores_work_at_least_as_long_as_this_process():
    before, begin = threading.seconds_of_all_processes(), time.monotonic()
    started = time.process_time()
    while time.process_time() - started < 0.3:
        pass
    worked, passed = threading.seconds_of_all_processes() - before, time.monotonic() - begin
    assert 0.2 < worked < os.cpu_count() * (passed + 0.1)
