"""A run's folder: its files, its lock, and moving an earlier run aside.

A process may be killed at any moment. So a file gets its name only when it is complete. Logs grow
line by line; resume cuts them back to the checkpoint.
"""
import fcntl
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import datasets
import torch
import transformers

from plumbing.errors import blame, require, say
from plumbing.ranks import RANK, RANKS, barrier

# ---- Files


def to_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def append(path: Path, text: str) -> None:
    with blame(f"{path}: {len(text):,} bytes cannot be written"), path.open("a") as file:
        file.write(text)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file as a whole: after a kill it holds the new text, or still the old one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with blame(f"{path}: {len(text):,} bytes cannot be written"):
        try:
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def renamed_when_complete(folder: Path):
    """A temporary folder that gets its name when all ranks have written everything. After an error
    it is removed."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    if RANK == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        with blame(f"{temporary}: cannot be written"):
            temporary.mkdir(parents=True)
    try:
        barrier()
        yield temporary
        barrier()
    except BaseException:
        if RANK == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if RANK == 0:
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    barrier()


def cut_back(out: Path, step: int, logs: dict) -> None:
    """Restores the run's files as they were at a step. Removes later rows and files, and what a
    killed process left unfinished."""
    unfinished = [*out.glob(".*.json*.tmp"), *out.glob("checkpoints/.*.tmp"),
                  *out.glob("final/.*.tmp")]
    for path in unfinished:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in out.glob("bad-batch-*.jsonl"):
        if step < int(path.stem.rpartition("-")[2]):
            path.unlink()
    for name, lines in logs.items():
        write_whole(out / name, "".join(lines))


# ---- Which run it belongs to

def has_metrics(folder: str | None) -> bool:
    """Whether a run has trained in a folder."""
    return folder is not None and Path(folder, "metrics.jsonl").is_file()


def holds_run(out: Path) -> bool:
    """Whether a folder holds a run. Models have a config.json too, but without "environment"."""
    with suppress(OSError, ValueError):
        return "environment" in json.loads((out / "config.json").read_text())
    return False


LOCKS = []  # descriptors of the folders that this process has locked


def lock(out: Path) -> None:
    """Creates a run's folder if it is missing, and locks it against other processes on this
    machine. Raises UserError if another process holds the lock."""
    with blame(f"--output_dir {out}: cannot be used"):
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        require(False, f"--output_dir {out}: another run is writing there; "
                       "wait for it, or choose another")
    except OSError as error:  # some network file systems know no locks
        say(f"{out} cannot be locked ({error.strerror}); make sure that no other run writes there")
    LOCKS.append(descriptor)


@contextmanager
def locked_folder(config):
    """Locks the run's folder until this process ends, however it ends."""
    if RANK > 0 or config.dry_run:
        yield
        return
    out = Path(config.output_dir)
    is_new = not out.exists()
    try:
        lock(out)
        yield
    finally:
        if is_new and LOCKS:
            with suppress(OSError):  # not empty: the run has written into it
                out.rmdir()
        while LOCKS:
            os.close(LOCKS.pop())


def claim_output_dir(config) -> Path:
    """Moves an earlier run aside and writes config.json into the run's folder."""
    out = Path(config.output_dir)
    if RANK == 0:
        if holds_run(out):
            move_aside(Path(os.path.abspath(out)))  # "." has no name
        write_config(config)
    return out


def move_aside(out: Path) -> None:
    """Renames a run's folder to the first free name of OUT.1, OUT.2, ..."""
    number = 1
    while (aside := out.with_name(f"{out.name}.{number}")).exists():
        number += 1
    with blame(f"--output_dir {out}: the run that is there cannot be moved aside; choose another"):
        out.rename(aside)
    lock(out)
    say(f"the earlier run in {out} is now {aside}")


def write_config(config) -> None:
    """Writes config.json: every resolved setting, and the versions and hardware in use."""
    if RANK > 0:
        return
    # A shell reports a missing git by its exit code; subprocess would raise.
    git = subprocess.run("git rev-parse HEAD", shell=True, capture_output=True, text=True,
                         cwd=Path(__file__).resolve().parent)
    environment = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "ranks": RANKS,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git_commit": git.stdout.strip() or None,
    }
    settings = vars(config) | {"resume": None, "environment": environment}
    write_whole(Path(config.output_dir, "config.json"), json.dumps(settings, indent=2))
