"""What a run saves: checkpoints/step-N to resume from, and final/ to use.

A checkpoint holds everything that changes while a run trains, and a manifest of its files' hashes.
Any number of ranks can resume it.
"""
import hashlib
import json
import shutil
import time
from pathlib import Path

from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from plumbing.errors import UserError, blame, require, say
from plumbing.adapters import merged, trainable
from plumbing.folder import (
    claim_output_dir,
    cut_back,
    renamed_when_complete,
    write_config,
    write_whole,
)
from plumbing.models import save_policy, save_tokenizer
from plumbing.ranks import RANK, RANKS, from_all_ranks
from plumbing.scorers import save_critic

# ---- Saving


def tensors_of(state) -> dict[str, Tensor]:
    """All tensors that training changes, by name: trained weights and AdamW's state. With several
    ranks each tensor is this rank's share."""
    tensors = {}
    for model in state.trained:
        for name, weight in trainable(getattr(state, model)).items():
            tensors[f"{model}.{name}"] = weight.detach()
            for key, value in state.optimizer.state[weight].items():
                tensors[f"optimizer.{model}.{name}.{key}"] = value.detach()
    return tensors


def save_checkpoint(state, out: Path, config) -> Path:
    """Writes checkpoints/step-N and removes all but the newest --keep_checkpoints. Each rank writes
    its shares of the tensors as safetensors."""
    folder = out / "checkpoints" / f"step-{state.step}"
    if state.saved_step == state.step:
        return folder
    tensors = tensors_of(state)
    with renamed_when_complete(folder) as temporary:
        with room_for(tensors, temporary):
            writer = dcp.HuggingFaceStorageWriter(temporary, save_distributed=True)
            dcp.save(tensors, storage_writer=writer, no_dist=RANKS == 1)
        if RANK == 0:
            numbers = {name: getattr(state, name) for name in state.RESUMED}
            numbers["schedule"] = state.schedule.state_dict()
            numbers["functions"] = state.functions
            numbers["wall_seconds"] = time.perf_counter() - state.started
            text = json.dumps({"state": numbers, "config": vars(config)})
            write_whole(temporary / "state.json", text)
        write_manifest(temporary)
    state.saved_step = state.step
    if RANK == 0:
        prune(out, state.step, config.keep_checkpoints)
        # Later checkpoints are damaged: the run was resumed from one before them.
        remove([folder for folder in checkpoints_in(out) if step_of(folder) > state.step])
    return folder


def save_after(error: BaseException, stopped: bool, state, out: Path, config) -> None:
    """Saves a checkpoint after an interruption, if all ranks can still save one together. stopped:
    by Ctrl-C, after a whole step. If they cannot, raises UserError with the error's sentence."""
    if getattr(error, "code", None) == 3:  # too many bad steps: a checkpoint is there
        return
    is_of_all = stopped or RANKS == 1 or getattr(error, "on_all_ranks", False)
    if is_of_all or state.saved_step == state.step:
        saved = save_checkpoint(state, out, config)
        say(f"interrupted; {saved} is saved, --resume continues from there")
    elif not isinstance(error, KeyboardInterrupt):
        raise UserError(f"{error}; only rank {RANK} has failed, so no checkpoint is saved; "
                        "--resume continues from the newest one, if --save_every is on")


def save_final(state, out: Path, config) -> None:
    """Writes final/: the policy as a plain model and the critics as score models, adapters merged,
    in the compute dtype."""
    save_whole(state.policy, out / "final" / "actor", save_policy, state.tokenizer, config)
    _, *critics = state.trained
    for name in critics:
        save_whole(getattr(state, name), out / "final" / name, save_critic, state.tokenizer,
                   config)


def save_whole(model, folder: Path, save, tokenizer, config) -> None:
    """Gathers a model's weights from all ranks. Rank 0 writes them."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    with renamed_when_complete(folder) as temporary, room_for(weights, temporary):
        if RANK == 0:
            save(temporary, model, merged(weights), config)
            save_tokenizer(tokenizer, temporary)


def room_for(tensors: dict, path: Path):
    """Tensors are written inside it. An error there says how many bytes they need and how many were
    free."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    free = shutil.disk_usage(path.parents[1]).free
    return blame(f"{path}: cannot be written; it takes {size:,} bytes, {free:,} were free; "
                 "the checkpoints before it are untouched")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints_in(out) -> list[Path]:
    """A run's complete checkpoints, oldest first."""
    folders = [folder for folder in Path(out, "checkpoints").glob("step-*")
               if folder.name.removeprefix("step-").isdigit()]
    return sorted(folders, key=step_of)


def prune(out: Path, step: int, keep: int) -> None:
    """Removes all but the newest `keep` of the checkpoints up to a step."""
    remove([folder for folder in checkpoints_in(out) if step_of(folder) <= step][:-keep])


def remove(checkpoints: list[Path]) -> None:
    for folder in checkpoints:
        temporary = folder.with_name(f".{folder.name}.tmp")  # a kill must not leave half of it
        folder.replace(temporary)
        shutil.rmtree(temporary)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(checkpoint: Path) -> None:
    """Writes manifest.json: the hash of each file. Every rank hashes its own files, because a
    shared file system may show them to other machines later."""
    written = [*checkpoint.glob(f"shard-{RANK + 1:05d}-*")]
    if RANK == 0:
        written.append(checkpoint / "state.json")
    hashes = from_all_ranks({path.name: sha256(path) for path in written})
    if RANK == 0:
        write_whole(checkpoint / "manifest.json", json.dumps(hashes, indent=2))


def damage_of(checkpoint: Path) -> str | None:
    """A sentence about the first damaged file of a checkpoint, or None."""
    try:
        expected = dict(json.loads((checkpoint / "manifest.json").read_text()))
    except (OSError, ValueError, TypeError):
        return "manifest.json is missing or damaged"

    # Only names of files in the folder are opened, so a manifest cannot point elsewhere.
    there = {path.name for path in checkpoint.iterdir()} - {"manifest.json"}
    of_this_rank = sorted(there & expected.keys())[RANK::RANKS]
    found = from_all_ranks({name: sha256(checkpoint / name) for name in of_this_rank})
    for name in expected:
        if name not in found:
            return f"{name} is missing"
        if found[name] != expected[name]:
            return f"{name} is damaged"
    for name in there - expected.keys():
        if name != ".DS_Store":  # macOS leaves it where somebody has looked
            return f"{name} does not belong to it"
    return None


# ---- Resuming

MAY_CHANGE_ON_RESUME = {
    "output_dir", "resume", "dry_run", "gpu_memory", "gradient_checkpointing", "tf32",
    "save_every", "keep_checkpoints", "sample_every", "eval_only", "micro_batch_size",
    "max_bad_steps", "confidence", "log_to",
}


def find_checkpoint(config) -> Path | None:
    """The checkpoint that --resume names: a path, or the newest undamaged one. None if the run in
    --output_dir has no checkpoint yet. Raises UserError if there is nothing to resume, or if
    settings have changed."""
    out, saved_here = Path(config.output_dir), checkpoints_in(config.output_dir)
    is_finished = (out / "summary.json").exists()
    if config.resume == "newest":
        if not saved_here and not is_finished:
            say(f"--resume: the run in {out} has no checkpoint yet, so it starts again")
            return None
        require(saved_here, f"--resume: the run in {out} is finished; "
                            "to repeat it, start without --resume")
        checkpoint = newest_undamaged(saved_here)
        is_newest = True
    else:
        checkpoint = Path(config.resume)
        require(checkpoint.is_dir(),
                f"--resume {checkpoint}: not a checkpoint, runs/.../checkpoints/step-N")
        damage = damage_of(checkpoint)
        require(not damage, f"--resume {checkpoint}: {damage}; resume from another")
        is_newest = checkpoint.resolve() in [folder.resolve() for folder in saved_here[-1:]]

    is_own = is_checkpoint_of(checkpoint, out)
    require(not is_own or (is_newest and not is_finished),
            f"--resume {checkpoint}: the run in {out} has gone on since, or is finished; "
            "to branch off, give another --output_dir")
    check_same_settings(checkpoint, config)
    return checkpoint


def newest_undamaged(checkpoints: list[Path]) -> Path:
    """The newest undamaged one of a run's checkpoints, given oldest first. Raises UserError if all
    are damaged."""
    *earlier, checkpoint = checkpoints
    damage = damage_of(checkpoint)
    if not damage:
        return checkpoint
    require(earlier, f"--resume {checkpoint}: {damage}; no checkpoint before it is left")
    say(f"--resume: {checkpoint} cannot be used, {damage}; trying the one before it")
    return newest_undamaged(earlier)


def is_checkpoint_of(checkpoint: Path, out: Path) -> bool:
    return checkpoint.resolve().parent.parent == out.resolve()


def check_same_settings(checkpoint: Path, config) -> None:
    with blame(f"--resume {checkpoint}: cannot be read"):
        saved = {**json.loads((checkpoint / "state.json").read_text())["config"]}
    for name, value in vars(config).items():
        before = saved.get(name, getattr(type(config), name))  # the default, of a newer setting
        require(name in MAY_CHANGE_ON_RESUME or before == value,
                f"--resume {checkpoint}: was saved with --{name} {before}, not {value}; "
                "use the same settings, or start a new run")


def resume(state, checkpoint: Path, config) -> Path:
    """Loads a checkpoint into a fresh state and its logs into --output_dir. A UserError comes
    before any file has changed."""
    out = Path(config.output_dir)
    saved = load_checkpoint(state, checkpoint)
    vars(state).update({name: saved[name] for name in state.RESUMED})
    # An older checkpoint has only the seconds of its steps.
    state.started -= saved.get("wall_seconds", saved["seconds"])
    state.schedule.load_state_dict(saved["schedule"])
    for group, rate in zip(state.optimizer.param_groups, state.schedule.get_last_lr()):
        group["lr"] = rate

    if is_checkpoint_of(checkpoint, out):
        state.saved_step = state.step
        write_config(config)
    else:
        claim_output_dir(config)
    if RANK == 0:
        cut_back(out, state.step, state.logs)
        prune(out, state.step, config.keep_checkpoints)
    say(f"continuing from {checkpoint}")
    return out


def load_checkpoint(state, checkpoint: Path) -> dict:
    """Reads a checkpoint's tensors into the state's tensors, in place. Returns its numbers. Raises
    UserError if they belong to other weights, prompts or pairs."""
    tensors, reader = tensors_of(state), dcp.HuggingFaceStorageReader(checkpoint)
    with blame(f"--resume {checkpoint}: cannot be read"):
        saved = json.loads((checkpoint / "state.json").read_text())["state"]
        metadata = reader.read_metadata().state_dict_metadata
        there = {(name, entry.size) for name, entry in metadata.items()}
        here = {(name, tensor.shape) for name, tensor in tensors.items()}
        require(there == here,
                f"--resume {checkpoint}: it holds other weights than this run trains: "
                f"{min(there ^ here, default=None)}")
        require(saved["data"] == state.data,
                f"--resume {checkpoint}: the prompts or PTX pairs have changed since; restore "
                "them, or start a new run")
        for flag, digest in saved.get("functions", {}).items():
            if state.functions.get(flag) != digest:
                say(f"warning: --{flag}: its file has changed since {checkpoint} was saved; scores "
                    "from before, those of the start too, do not compare with those from now on")
        dcp.load(tensors, storage_reader=reader, no_dist=RANKS == 1)
    return saved
