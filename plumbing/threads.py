"""How many CPU threads a process takes, and how they wait for each other.

The threads of small products spin while they wait. Where another process needs the core, whoever
is waited for does not get it: beside two busy processes a run on two cores took six times as long.
So they spin briefly, and there are as many of them as cores were free while torch was imported.
What the user has set stays. To be imported before torch, which reads these variables once.
"""
import os
import time
from pathlib import Path


def seconds_of_all_processes() -> float | None:
    """How long the cores have worked since the machine began; None where Linux does not tell."""
    try:
        times = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, *interrupts = map(int, times)  # the others: idle, waiting for disks
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"
STARTED = time.monotonic(), seconds_of_all_processes(), time.process_time()

import torch  # noqa: E402


def busy_cores() -> float | None:
    """How many cores other processes have kept busy since this module was imported."""
    started, all_before, own_before = STARTED
    if all_before is None:
        return None
    own = time.process_time() - own_before
    others = seconds_of_all_processes() - all_before - own
    return max(others / (time.monotonic() - started), 0.0)


def fit_threads() -> None:
    """Gives torch as many threads as there are free cores, at least one."""
    busy = busy_cores()
    if "OMP_NUM_THREADS" in os.environ or busy is None:
        return
    free = round(os.cpu_count() - busy)
    torch.set_num_threads(max(1, min(torch.get_num_threads(), free)))
