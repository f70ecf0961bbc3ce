"""A long run of the tiny world, for what a short one cannot show: whether memory, speed and disk
stay as they are.

    python tests/long_run.py [--steps 3000] [further settings of repo.py]

The policy hardly learns (a tiny rate), so that responses stay as long as they are and a step costs
the same all along. Prints the three figures and ends with code 1 if one is out of bounds. 3,000
steps take some 15 minutes on two cores.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
KEPT = 2
SETTINGS = (
    *("--device", "cpu", "--save_every", "50", "--keep_checkpoints", str(KEPT)),
    *("--actor_lr", "1e-7", "--critic_lr", "1e-7"),
)
MAX_GROWTH, MAX_SLOWDOWN = 0.05, 0.10


def resident_mib(process: int) -> float:
    """Raises FileNotFoundError or StopIteration once the process has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return kib / 1024


def size_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def watch(process: subprocess.Popen, out: Path) -> tuple[list, list]:
    """Looks each second until the process ends: [(steps done, its MiB)], [MiB of checkpoints]."""
    samples, disk = [], []
    metrics = out / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists():
            done = metrics.read_bytes().count(b"\n")
            try:
                samples.append((done, resident_mib(process.pid)))
                disk.append(size_mib(out / "checkpoints"))
            except (FileNotFoundError, StopIteration):
                pass  # between two looks a checkpoint went, or the process ended
        time.sleep(1)
    return samples, disk


def report(steps: int, samples: list, disk: list, rows: list[dict], one_mib: float) -> int:
    """Prints the figures of a whole run. 1 if one is out of bounds, else 0."""
    tenth = steps // 10
    memory = []
    for n in range(1, 10):
        within = range(n * tenth, (n + 1) * tenth)
        memory.append(fmean(mib for done, mib in samples if done in within))
    speed = []
    for n in range(10):
        part = rows[n * tenth : (n + 1) * tenth]
        speed.append(sum(row["tokens_per_second"] for row in part) / tenth)

    print(f"{steps} steps; by tenths of the run, from the second on")
    print("resident MiB      ", *(f"{value:8.1f}" for value in memory))
    print("tokens per second ", *(f"{value:8.0f}" for value in speed[1:]))
    growth = max(memory) / memory[0] - 1
    slowdown = 1 - speed[-1] / speed[1]
    print(
        f"memory grew by {growth:.1%} (bound {100 * MAX_GROWTH:.0f} %); "
        f"the last tenth is slower than the second by {slowdown:.1%} "
        f"(bound {100 * MAX_SLOWDOWN:.0f} %); checkpoints took at most {max(disk):.1f} MiB, "
        f"one takes {one_mib:.1f} (bound: {KEPT} and the one being written)"
    )
    too_much_disk = max(disk) > (KEPT + 1) * one_mib * 1.02
    return int(growth > MAX_GROWTH or slowdown > MAX_SLOWDOWN or too_much_disk)


def main(words: list[str]) -> int:
    steps = int(words[words.index("--steps") + 1]) if "--steps" in words else 3000
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "run"), Path(folder, "errors")
        command = [sys.executable, "repo.py", "--steps", str(steps), *SETTINGS, *words]
        command += ["--output_dir", str(out)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors
            )
        samples, disk = watch(process, out)
        if process.returncode:
            print(log.read_text()[-2000:])
            return 1
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        one_mib = size_mib(sorted((out / "checkpoints").iterdir())[0])
    return report(steps, samples, disk, rows, one_mib)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
