"""--log_to: metrics and summary as curves, by a library's own writer."""
import uuid
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from plumbing.errors import blame, require
from plumbing.ranks import RANK
from plumbing.folder import write_whole


class Curves(NamedTuple):
    log: Callable  # log({name: number}, step)
    close: Callable


def check_log_to(config) -> None:
    require(not config.log_to or find_spec(config.log_to),
            f"--log_to {config.log_to}: needs that package (pip install {config.log_to})")


def open_curves(step: int, out: Path, config) -> Curves | None:
    """Those of a run's folder, which go on after this step; None without --log_to, and on ranks
    that do not write. Raises UserError for what the library cannot do."""
    if RANK > 0 or not config.log_to:
        return None
    with blame(f"--log_to {config.log_to}: cannot begin"):
        if config.log_to == "tensorboard":
            library = import_module("torch.utils.tensorboard")
            # Of a run that was cut off, what came after its checkpoint is not shown.
            writer = library.SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
            return Curves(lambda numbers, step: add(writer, numbers, step), writer.close)

        library, file = import_module(config.log_to), out / "run_id.txt"
        if not file.exists():
            write_whole(file, uuid.uuid4().hex[:8])
        run_id, name = file.read_text(), out.resolve().name
        known_by = {"name": f"{name}-{run_id}"}
        if config.log_to == "wandb":
            known_by = {"name": name, "id": run_id, "dir": str(out)}
        library.init(project="repo", config=vars(config), resume="allow", **known_by)
        return Curves(library.log, library.finish)


def add(writer, numbers: dict, step: int) -> None:
    for name, value in numbers.items():
        writer.add_scalar(name, value, step)
    writer.flush()
