"""A run's folder: whose it is, what lies in it complete, and under which settings and versions it was made.

A process may be killed at any moment. So every file but the logs gets its name when it is complete, a checkpoint has a manifest of its files' hashes,
and logs are cut back to the checkpoint from which a run goes on.
"""
import fcntl
import hashlib
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

from tiny_configs.inputs import blame, require, say
from tiny_configs.ranks import RANK, RANKS, barrier, from_all_ranks


def to_jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def is_run(folder: str | None) -> bool:
    return folder is not None and Path(folder, "metrics.jsonl").is_file()


def holds_run(out: Path) -> bool:
    """Whether a run was begun there: models have a config.json too, but no "environment" in it."""
    with suppress(OSError, ValueError):
        return "environment" in json.loads((out / "config.json").read_text())
    return False


def append(path: Path, text: str) -> None:
    with blame(f"{path}: {len(text):,} bytes cannot be written"), path.open("a") as file:
        file.write(text)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there as a whole, or as it was before."""
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


def room_for(tensors: dict, path: Path):
    """Inside it tensors are written; what fails is told with what they need and what there was."""
    size, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(path.parents[1]).free
    return blame(f"{path}: cannot be written; it takes {size:,} bytes, {free:,} were free; the checkpoints before it are untouched")


LOCKS = []  # descriptors of the folders that this process keeps for itself


def lock(out: Path) -> None:
    """Makes a run's folder, if it is not there, and keeps other processes on this machine out of it. Raises UserError if another has it."""
    with blame(f"--output_dir {out}: cannot be used"):
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        require(False, f"--output_dir {out}: another run is writing there; wait for it, or choose another")
    except OSError as error:  # some network file systems know no locks
        say(f"{out} cannot be locked ({error.strerror}); see to it that no other run writes there")
    LOCKS.append(descriptor)


@contextmanager
def held(config):
    """The run's folder is this process's alone as long as it lives, however it ends."""
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
            with suppress(OSError):  # it is not empty, as it should be
                out.rmdir()
        while LOCKS:
            os.close(LOCKS.pop())


def claim_output_dir(config) -> Path:
    """The run's folder, empty but for config.json: an earlier run there is moved aside."""
    out = Path(config.output_dir)
    if RANK == 0:
        if holds_run(out):
            here = Path(os.path.abspath(out))  # "." has no name
            aside = next(aside for n in range(1, sys.maxsize) if not (aside := here.with_name(f"{here.name}.{n}")).exists())
            with blame(f"--output_dir {out}: the run that is there cannot be moved aside; choose another"):
                here.rename(aside)
            lock(here)
            say(f"the earlier run in {out} is now {aside}")
        write_config(config)
    return out


def write_config(config) -> None:
    """config.json: every resolved setting, and what the run was made with."""
    if RANK > 0:
        return
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
    write_whole(Path(config.output_dir, "config.json"), json.dumps(vars(config) | {"resume": None, "environment": {
        "python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__, "datasets": datasets.__version__,
        "ranks": RANKS, "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "git_commit": git.stdout.strip() or None}}, indent=2))


@contextmanager
def renamed_when_complete(folder: Path):
    """A folder to write into that gets its name only when all ranks have written everything; its room is given back if they cannot."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    if RANK == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        with blame(f"{temporary}: cannot be written"):
            temporary.mkdir(parents=True)
    barrier()
    try:
        yield temporary
    except BaseException:
        if RANK == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    barrier()
    if RANK == 0:
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    barrier()


def cut_back(out: Path, step: int, logs: dict) -> None:
    """The run's files as they were at a step: what came later goes, and comes again; what a killed process has left unfinished goes too."""
    for path in [*out.glob(".*.json*.tmp"), *out.glob("checkpoints/.step-*.tmp"), *out.glob("final/.actor.tmp")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in out.glob("bad-batch-*.jsonl"):
        if step < int(path.stem.rpartition("-")[2]):
            path.unlink()
    for name, lines in logs.items():
        write_whole(out / name, "".join(lines))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def checkpoints_in(out) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted((folder for folder in Path(out, "checkpoints").glob("step-*") if folder.name[5:].isdigit()), key=step_of)


def prune(out: Path, step: int, keep: int, later: bool) -> None:
    """Of the checkpoints up to a step the newest stay; `later` ones go too, after a save: they are damaged, and the run went on from before them."""
    there = checkpoints_in(out)
    for folder in [folder for folder in there if step_of(folder) <= step][:-keep] + [folder for folder in there if later and step_of(folder) > step]:
        temporary = folder.with_name(f".{folder.name}.tmp")  # what is half removed is no checkpoint
        folder.replace(temporary)
        shutil.rmtree(temporary)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(checkpoint: Path) -> None:
    """manifest.json: the hash of each file. Every rank reads what it has written itself: a shared file system may show it other machines' files later."""
    own = [*checkpoint.glob(f"shard-{RANK + 1:05d}-*"), *[checkpoint / "state.json"] * (RANK == 0)]
    hashes = from_all_ranks({path.name: sha256(path) for path in own})
    if RANK == 0:
        write_whole(checkpoint / "manifest.json", json.dumps(hashes, indent=2))


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, if anything is."""
    try:
        expected = dict(json.loads((checkpoint / "manifest.json").read_text()))
    except (OSError, ValueError, TypeError):
        return "manifest.json is missing or damaged"
    there = {path.name for path in checkpoint.iterdir()} - {"manifest.json"}  # names, so that no manifest leads elsewhere
    found = from_all_ranks({name: sha256(checkpoint / name) for name in sorted(there & expected.keys())[RANK::RANKS]})
    wrong = [f"{name} is {'damaged' if name in found else 'missing'}" for name in expected if found.get(name, "") != expected[name]]
    return next(iter(wrong + [f"{name} does not belong to it" for name in there - expected.keys()]), None)


def find_checkpoint(config, may_change: set) -> Path | None:
    """The checkpoint that --resume names: the newest undamaged one, or one that the user points to; None if the run in --output_dir has none yet.
    Raises UserError if there is nothing to go on from, or the settings have changed."""
    out, own = Path(config.output_dir), checkpoints_in(config.output_dir)
    newest, is_finished = config.resume == "newest", (out / "summary.json").exists()
    if newest and not own and not is_finished:
        say(f"--resume: the run in {out} has no checkpoint yet, so it starts again")
        return None
    require(own or not newest, f"--resume: the run in {out} is finished; to repeat it, start without --resume")
    for checkpoint in reversed(own) if newest else [Path(config.resume)]:
        require(checkpoint.is_dir(), f"--resume {checkpoint}: not a checkpoint, runs/.../checkpoints/step-N")
        damage = damage_of(checkpoint)
        if not damage:
            break
        require(newest and checkpoint != own[0], f"--resume {checkpoint}: {damage}; {'no checkpoint before it is left' if newest else 'resume from another'}")
        say(f"--resume: {checkpoint} cannot be used, {damage}; trying the one before it")
    own_one = checkpoint.resolve().parent.parent == out.resolve()
    require(not own_one or not is_finished and (newest or checkpoint.resolve() == own[-1].resolve()),
            f"--resume {checkpoint}: the run in {out} has gone on since, or is finished; to branch off, give another --output_dir")
    with blame(f"--resume {checkpoint}: cannot be read"):
        saved = {**json.loads((checkpoint / "state.json").read_text())["config"]}
    for name, value in vars(config).items():
        require(name in may_change or saved.get(name) == value,
                f"--resume {checkpoint}: was saved with --{name} {saved.get(name)}, not {value}; use the same settings, or start a new run")
    return checkpoint
