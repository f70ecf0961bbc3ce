"""How many CPU threads a process uses, and how they wait for each other.

Threads that wait for each other spin, which takes cores from the threads they wait for. Beside two
busy processes a run on two cores took six times as long. So threads spin only briefly, and there
are only as many as cores were free while torch was imported. What the user has set stays.

Import this module before torch, which reads these variables once.
"""
import os
import time
from pathlib import Path


def seconds_of_all_processes() -> float | None:
    """For how long all cores have worked since the machine started; None if this is not Linux."""
    try:
        times = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, *interrupts = map(int, times)  # the fourth and fifth are idle
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"
STARTED = time.monotonic(), seconds_of_all_processes(), time.process_time()

import torch  # noqa: E402


def busy_cores() -> float | None:
    """How many cores other processes have used, on average, since this module was imported."""
    started, all_before, own_before = STARTED
    if all_before is None:
        return None
    own = time.process_time() - own_before
    others = seconds_of_all_processes() - all_before - own
    return max(others / (time.monotonic() - started), 0.0)


def fit_threads() -> None:
    """Gives torch one thread per free core, and at least one."""
    busy = busy_cores()
    if "OMP_NUM_THREADS" in os.environ or busy is None:
        return
    free = round(os.cpu_count() - busy)
    torch.set_num_threads(max(1, min(torch.get_num_threads(), free)))
