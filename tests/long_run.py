"""A long run of the tiny world, for what a short one cannot show: whether memory, speed and disk stay as they are.

    python tests/long_run.py [--steps 3000] [further settings of repo.py]

The policy hardly learns (a tiny rate), so that responses stay as long as they are and a step costs the same all along. Prints the three figures and
ends with code 1 if one is out of bounds. 3,000 steps take some 15 minutes on two cores.
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


def resident_mib(process: int) -> float:
    return next(int(line.split()[1]) for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS")) / 1024


def size_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def main(words: list[str]) -> int:
    steps = int(words[words.index("--steps") + 1]) if "--steps" in words else 3000
    with tempfile.TemporaryDirectory() as folder:
        out, samples, disk = Path(folder, "run"), [], []  # (steps done, MiB), MiB of checkpoints
        command = [sys.executable, "repo.py", "--device", "cpu", "--steps", str(steps), "--save_every", "50", "--keep_checkpoints", str(KEPT), "--actor_lr", "1e-7",
                   "--critic_lr", "1e-7", *words, "--output_dir", str(out)]
        with Path(folder, "errors").open("w") as errors:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        while process.poll() is None:
            metrics, checkpoints = out / "metrics.jsonl", out / "checkpoints"
            if metrics.exists():
                done = metrics.read_bytes().count(b"\n")
                try:
                    samples.append((done, resident_mib(process.pid)))
                    disk.append(size_mib(checkpoints))
                except (FileNotFoundError, StopIteration):  # between two looks a checkpoint went, or the process ended
                    pass
            time.sleep(1)
        if process.returncode:
            print(Path(folder, "errors").read_text()[-2000:])
            return 1
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        one = size_mib(sorted((out / "checkpoints").iterdir())[0])
    tenth = steps // 10
    settled = [memory for done, memory in samples if tenth <= done < 2 * tenth]
    memory = [fmean(memory for done, memory in samples if n * tenth <= done < (n + 1) * tenth) for n in range(1, 10)]
    speed = [sum(row["tokens_per_second"] for row in rows[n * tenth:(n + 1) * tenth]) / tenth for n in range(10)]
    print(f"{steps} steps; by tenths of the run, from the second on")
    print("resident MiB      ", *(f"{value:8.1f}" for value in memory))
    print("tokens per second ", *(f"{value:8.0f}" for value in speed[1:]))
    growth, slowdown = max(memory) / fmean(settled) - 1, 1 - speed[-1] / speed[1]
    print(f"memory grew by {growth:.1%} (bound 5 %); the last tenth is slower than the second by {slowdown:.1%} (bound 10 %); "
          f"checkpoints took at most {max(disk):.1f} MiB, one takes {one:.1f} (bound: {KEPT} and the one being written)")
    return int(growth > 0.05 or slowdown > 0.10 or max(disk) > (KEPT + 1) * one * 1.02)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
