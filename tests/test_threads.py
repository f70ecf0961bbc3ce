# pytest tests/test_threads.py
"""How many threads a process takes: what is free, and never against the user."""
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from plumbing import threads as threading

# By its path: the package imports more than is asked about.
ASK = ("import os, runpy, sys; runpy.run_path('plumbing/threads.py')['fit_threads'](); "
       "print(sys.modules['torch'].get_num_threads(), os.environ.get('GOMP_SPINCOUNT'))")
BUSY = [sys.executable, "-c", "while True: pass"]


def ask(**environment) -> list[str]:
    """(threads, spin count) of a fresh process in such an environment."""
    ours = {name: value for name, value in os.environ.items()
            if name not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, cwd=ROOT, env=ours | environment, text=True,
                          capture_output=True, check=True)
    return done.stdout.split()


@pytest.fixture
def busy_machine():
    """As many processes as there are cores, that never wait."""
    processes = [subprocess.Popen(BUSY) for _ in range(os.cpu_count())]
    yield
    for process in processes:
        process.kill()
        process.wait()


def test_what_the_user_has_set_stays():
    assert ask(OMP_NUM_THREADS="1", GOMP_SPINCOUNT="77") == ["1", "77"]
    assert ask(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="active") == ["2", "None"]


@pytest.mark.exhaustive
def test_what_the_user_has_set_stays_on_a_busy_machine(busy_machine):
    assert ask(OMP_NUM_THREADS="2", GOMP_SPINCOUNT="77") == ["2", "77"]


@pytest.mark.parametrize("worked, threads", [(0.0, 4), (14.0, 3), (16.0, 2), (24.0, 2), (26.0, 1),
                                             (900.0, 1)])
def test_threads_by_hand(monkeypatch, worked, threads):
    """Four cores; others have worked so many seconds in the ten since the import."""
    given = []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threading, "STARTED", (time.monotonic() - 10, 0.0, time.process_time()))
    monkeypatch.setattr(threading, "seconds_of_all_processes", lambda: worked)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    threading.fit_threads()
    assert given == [threads]


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how busy its cores are")
def test_on_a_busy_machine_one_thread_is_left(busy_machine):
    threads, spins = ask()
    assert int(threads) <= max(1, os.cpu_count() // 2) and spins == "2000"
