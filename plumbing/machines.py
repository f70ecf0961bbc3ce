"""Several machines: do all ranks run the same, and do they see one folder? Each machine has files
and a command line of its own. Without this check a difference would show in the results, or never.
"""
import hashlib
import time
import uuid
from pathlib import Path

import datasets
import torch
import transformers

from plumbing.errors import UserError, blame
from plumbing.ranks import RANK, RANKS, barrier, from_all_ranks

PROJECT = Path(__file__).resolve().parents[1]
SECONDS_TO_SEE = 60.0  # so late may a network file system show another machine's file


def check_machines(data: str, config) -> None:
    """Raises UserError, on all ranks, unless all have the same settings, code, libraries, data and
    --output_dir. Data are compared as a hash."""
    if RANKS == 1:
        return
    has = from_all_ranks({RANK: what_this_rank_has(data, config)})
    for rank in range(1, RANKS):
        for name in has[0].keys() | has[rank].keys():
            theirs, ours = has[rank].get(name), has[0].get(name)
            if theirs != ours:
                raise UserError(f"rank {rank} has {name} {theirs}, rank 0 {ours}; all machines "
                                "need the same settings, code and data", on_all_ranks=True)
    check_shared(Path(config.output_dir))


def what_this_rank_has(data: str, config) -> dict[str, str]:
    """{name: value}. Files and data are a few digits of a hash."""
    files = [PROJECT / "repo.py"]
    for room in ("tiny_configs", "plumbing", "kernels"):
        files += PROJECT.glob(f"{room}/*.py")
    return {
        **{f"--{name}": str(value) for name, value in vars(config).items()},
        **{str(file.relative_to(PROJECT)): hashlib.sha256(file.read_bytes()).hexdigest()[:8]
           for file in files},
        "prompts and PTX pairs": data[:8],
        **{library.__name__: library.__version__ for library in (torch, transformers, datasets)},
    }


def check_shared(out: Path) -> None:
    """Raises UserError, on all ranks, unless all see a file that rank 0 creates in the folder."""
    names = from_all_ranks({0: uuid.uuid4().hex} if RANK == 0 else {})
    file = out / f".{names[0]}.json.tmp"
    try:
        if RANK == 0:
            with blame(f"--output_dir {out}: cannot be written"):
                file.touch()
        barrier()
        sees = from_all_ranks({RANK: appears(file)})
    finally:
        if RANK == 0:
            file.unlink(missing_ok=True)
    blind = [rank for rank, seen in sees.items() if not seen]
    if blind:
        raise UserError(f"--output_dir {out}: rank {min(blind)} does not see what rank 0 writes "
                        "there; it must be a folder that all machines share", on_all_ranks=True)


def appears(file: Path) -> bool:
    deadline = time.monotonic() + SECONDS_TO_SEE
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
