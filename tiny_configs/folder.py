"""A run's folder: whose it is, what lies in it complete, and under which settings and versions it was made."""
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import transformers

from tiny_configs.inputs import say
from tiny_configs.ranks import RANK, RANKS, barrier


def to_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def is_run(folder: str | None) -> bool:
    return folder is not None and Path(folder, "metrics.jsonl").is_file()


def claim_output_dir(config) -> Path:
    """The run's folder, empty: an earlier run there is moved aside."""
    out = Path(config.output_dir)
    if RANK == 0 and (out / "config.json").exists():
        aside = next(aside for n in range(1, sys.maxsize) if not (aside := out.with_name(f"{out.name}.{n}")).exists())
        say(f"the earlier run in {out} is now {out.rename(aside)}")
    out.mkdir(parents=True, exist_ok=True)
    return out


def write_config(out: Path, config) -> None:
    """config.json: every resolved setting, and what the run was made with."""
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
    (out / "config.json").write_text(json.dumps(vars(config) | {"resume": None, "environment": {
        "python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__, "datasets": datasets.__version__,
        "ranks": RANKS, "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "git_commit": git.stdout.strip() or None}}, indent=2))


@contextmanager
def renamed_when_complete(folder: Path):
    """A folder to write into that gets its name only when all ranks have written everything."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    if RANK == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    yield temporary
    barrier()
    if RANK == 0:
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    barrier()


def checkpoints_in(out) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted((f for f in Path(out, "checkpoints").glob("step-*") if f.name[5:].isdigit()), key=lambda f: int(f.name[5:]))
