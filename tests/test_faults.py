# pytest tests/test_faults.py
"""What a day brings: processes killed at any instant and at every file they touch, full disks,
damaged checkpoints."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from conftest import (
    FORKS,
    exhaustive,
    random_beaver,
    read_jsonl,
    write_beaver,
    write_policy,
    write_python,
)
from safetensors.torch import load
from test_run import stable

import repo
from plumbing.checkpoints import checkpoints_in, damage_of, newest_undamaged
from plumbing.errors import UserError
from plumbing.folder import append, write_whole

# Starting a process asks those before it whether they have ended, and an exit code is told once: a
# thread that starts one may take the code for which another thread waits, which then sees 255.
ONE_ASKS = threading.Lock()


# ---- what the processes do that are killed

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def changes_a_file(event: str, arguments: tuple) -> bool:
    """Whether an event of Python's audit hooks does, or opens a file to write."""
    if event == "open":
        flags = arguments[2]
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
    return event in CHANGES


def changed_path(event: str, arguments: tuple) -> Path:
    path = Path(str(arguments[0]))
    if event == "open" or path.is_absolute():
        return path
    folder = arguments[-1]  # inside rmtree names are relative to an open folder
    return Path(os.readlink(f"/proc/self/fd/{folder}"), path) if folder > 0 else path


def main(flags, log, kill_at=None, torn=False, file_size=None):
    """repo.main in a process of its own.

    kill_at: it is killed at its n-th change of a file under --output_dir, or at the change named.
    torn: with half of that file written.
    file_size: how many bytes the operating system lets it write into one file.
    """
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    out, seen, busy = str(flags[-1]), [], threading.local()

    def watch(event, arguments):
        if not changes_a_file(event, arguments) or getattr(busy, "now", False):
            return
        path = changed_path(event, arguments)
        if not str(path).startswith(out):
            return
        seen.append(f"{event} {path.name}")
        if kill_at not in (len(seen), seen[-1]):
            return
        busy.now = True
        if torn and event == "open":
            Path(arguments[0]).write_bytes(b'{"half')
        os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    code = repo.main([str(flag) for flag in flags])
    if log.name == "counted":
        log.write_text("\n".join(seen))
    sys.stdout.flush()
    os._exit(code)


# ---- the run that they do it to

REWARD = """
    def brevity(prompts, responses):
        return [-len(r) / 10 for r in responses]
"""
TIMES = ("tokens_per_second", "wall_seconds", "peak_memory_mib")


def without(settings: dict, *names: str) -> dict:
    return {name: value for name, value in settings.items() if name not in names}


def comparable(name: str, content: bytes | None):
    """A file's content, but for times, the one setting that differs, hashes and tensors' order."""
    if name.endswith("state.json"):
        return without(json.loads(content)["state"], "seconds", "wall_seconds", "logs")
    if name.endswith("manifest.json"):
        return set(json.loads(content))
    if name.endswith(".safetensors"):
        return {key: tensor.numpy().tobytes() for key, tensor in load(content).items()}
    if name == "summary.json":
        return without(json.loads(content), *TIMES)
    if name == "config.json":
        return without(json.loads(content), "output_dir")
    return content


class Case:
    """A small run, and what it leaves when nothing happens."""

    def __init__(self, folder: Path, tokenizer):
        self.folder = folder
        write_python(folder / "reward.py", REWARD)
        rows = [json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(40)]
        (folder / "prompts.jsonl").write_text("".join(rows))
        policy = write_policy(folder / "policy", tokenizer, num_hidden_layers=1,
                              tie_word_embeddings=True)  # smaller than the cost critic
        cost = write_beaver(folder / "cost", tokenizer, random_beaver(tokenizer)[1])
        self.flags = (
            *("--model", policy, "--cost_model", cost),
            *("--reward_model", f"{folder}/reward.py:brevity"),
            *("--dataset", folder / "prompts.jsonl", "--device", "cpu"),
            *("--steps", 6, "--save_every", 2, "--batch_size", 4, "--max_response_length", 4),
            *("--eval_samples", 1, "--max_eval_prompts", 4, "--sample_every", 3),
            *("--actor_lr", 1e-3),
        )
        self.run("first")  # starts the server
        begin = time.monotonic()
        assert self.run("whole", log="counted")[0] == 0
        self.seconds = time.monotonic() - begin
        self.changes = (folder / "counted").read_text().splitlines()
        self.left = self.what_is_left("whole")

    def start(self, out, *more, log=None, **options):
        log = self.folder / (log or f"{out}.log")
        flags = (*self.flags, *more, "--output_dir", self.folder / out)
        process = FORKS.Process(target=main, args=(flags, log), kwargs=options)
        with ONE_ASKS:
            process.start()
        return process, log

    def run(self, out, *more, **options) -> tuple[int, str]:
        """(exit code, what it printed)."""
        process, log = self.start(out, *more, **options)
        wait([process.sentinel], 120)
        with ONE_ASKS:
            return process.exitcode, log.read_text()

    def copy(self, out) -> Path:
        """The whole run, under another name."""
        return Path(shutil.copytree(self.folder / "whole", self.folder / out))

    def what_is_left(self, out) -> dict:
        """Each file and folder of a run, with what can be compared of its content."""
        folder, left = self.folder / out, {}
        for path in folder.rglob("*"):
            name = str(path.relative_to(folder))
            left[name] = comparable(name, path.read_bytes()) if path.is_file() else None
        left["metrics.jsonl"] = stable(read_jsonl(folder / "metrics.jsonl"))
        return left

    def goes_on_to_the_same_end(self, out) -> None:
        code, printed = self.run(out, "--resume")
        if code == 2 and not (self.folder / out).exists():  # killed before it began
            assert "start without --resume" in printed
            code, printed = self.run(out)
        assert code == 0 or "is finished" in printed, printed
        left = self.what_is_left(out)
        assert left.keys() == self.left.keys()
        other = [name for name in left if left[name] != self.left[name]]
        assert not other


@pytest.fixture(scope="module")
def case(tmp_path_factory, tokenizer) -> Case:
    return Case(tmp_path_factory.mktemp("faults"), tokenizer)


# ---- killed

KILLED = -signal.SIGKILL


def lines_in(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def all_go_on(case, group: str, trials: list) -> None:
    """trial(name) kills a new run; each then goes on. Two at a time."""

    def one(number):
        name = f"{group}-{number}"
        assert not (case.folder / name).exists()
        trials[number](name)
        case.goes_on_to_the_same_end(name)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(len(trials))))


@pytest.mark.exhaustive
def test_killed_at_random_instants_it_goes_on_bit_for_bit(case):
    """Each at a random instant after a step; the steps are spread over the run."""
    draw, reached = random.Random(0), []

    def killed_after(steps, seconds):
        def trial(name):
            process, _ = case.start(name)
            metrics = case.folder / name / "metrics.jsonl"
            while process.is_alive() and lines_in(metrics) < steps:
                time.sleep(0.002)
            time.sleep(seconds)
            process.kill()
            process.join()
            reached.append(lines_in(metrics))

        return trial

    trials = []
    for k in range(30):
        steps = round(6 * k / 29)
        # Short, because the machine may be less busy now than when the whole run was timed. After
        # the last step it is long enough for the last files.
        longest = case.seconds / (4 if steps == 6 else 24)
        trials.append(killed_after(steps, draw.uniform(0, longest)))
    all_go_on(case, "instant", trials)
    assert len(set(reached)) >= 3, reached


def killed_at(case, n, torn=False):
    def trial(name):
        code, _ = case.run(name, kill_at=n, torn=torn)
        assert code == KILLED

    return trial


SHARD = "shard-00001-model-00001-of-00001.safetensors"
TELLING = [  # change, how often it has happened before, whether half of the file is written
    ("open .config.json.tmp", 0, True),
    ("os.rename .eval_before.jsonl.tmp", 0, False),
    ("open metrics.jsonl", 2, True),
    (f"open {SHARD}", 1, True),
    ("open .manifest.json.tmp", 1, True),
    (f"os.remove {SHARD}", 0, False),  # of the oldest checkpoint, whose time is over
    ("os.rename .actor.tmp", 0, False),
    ("open .eval.jsonl.tmp", 0, True),
    ("os.rename .summary.json.tmp", 0, False),
]


def test_killed_at_a_change_of_each_kind_of_file_it_goes_on_bit_for_bit(case):
    trials = []
    for change, before, torn in TELLING:
        numbers = [n for n, each in enumerate(case.changes, 1) if each == change]
        trials.append(killed_at(case, numbers[before], torn))
    all_go_on(case, "kind", trials)


@pytest.mark.exhaustive
def test_killed_at_every_file_it_changes_it_goes_on_bit_for_bit(case):
    trials = []
    for n, change in enumerate(case.changes, 1):
        trials.append(killed_at(case, n))
        if change.startswith("open"):
            trials.append(killed_at(case, n, torn=True))
    assert len(trials) > 80
    for name in (".step-4.tmp", "step-2", ".summary.json.tmp"):
        assert f"os.rename {name}" in case.changes
    for name in (".actor.tmp", ".reward_critic.tmp", ".cost_critic.tmp"):
        assert f"os.rename {name}" in case.changes
    all_go_on(case, "file", trials)


@pytest.mark.parametrize("n", [2, *map(exhaustive, (1, 3, 4, 5, 6))])
def test_a_run_that_is_moved_aside_arrives_whole_wherever_its_successor_is_killed(case, n):
    name = f"aside-{n}"
    case.copy(name)
    assert case.run(name, kill_at=n)[0] == KILLED
    moved = f"{name}.1" if (case.folder / f"{name}.1").exists() else name
    assert case.what_is_left(moved) == case.left
    code, printed = case.run(name, "--resume")
    if code == 2:  # moved, and nothing begun, or not moved yet
        assert "there is no run in" in printed or "is finished" in printed, printed


# ---- a full disk; instead of one, the system refuses the last byte of a file


def steps_in(checkpoints: Path) -> list[str]:
    return [path.name for path in checkpoints.glob("step-*")]


def test_a_full_disk_is_told_in_bytes_and_leaves_the_checkpoint_before(case):
    checkpoints = case.folder / "full" / "checkpoints"
    assert case.run("full", kill_at="os.rename .step-4.tmp")[0] == KILLED
    assert steps_in(checkpoints) == ["step-2"]
    before = case.what_is_left("full")
    (tensors,) = (checkpoints / "step-2").glob("*.safetensors")

    code, printed = case.run("full", "--resume", file_size=tensors.stat().st_size - 1)
    assert code == 2 and "Traceback" not in printed, printed
    (error,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert "checkpoints/.step-4.tmp: cannot be written; it takes " in error
    assert "bytes" in error and "were free" in error and "File too large" in error

    after = case.what_is_left("full")
    assert all(after[name] == before[name] for name in before if "step-2" in name)
    assert not any("step-4" in name for name in after)
    case.goes_on_to_the_same_end("full")


def test_a_disk_that_is_full_at_the_end_keeps_the_models_that_are_saved(case):
    """The last one, the cost critic, is the largest."""
    size = (case.folder / "whole" / "final" / "cost_critic" / "model.safetensors").stat().st_size
    code, printed = case.run("end", "--save_every", 0, "--sample_every", 0, file_size=size - 1)
    assert code == 2 and "cannot be written; it takes" in printed, printed
    assert "Traceback" not in printed
    final = case.folder / "end" / "final"
    assert {path.name for path in final.iterdir()} == {"actor", "reward_critic"}
    assert not list((case.folder / "end").rglob("*.tmp"))


def test_other_files_say_what_they_needed():
    needed = "/dev/full: 1,234 bytes cannot be written .*No space left on device"
    with pytest.raises(UserError, match=needed):
        append(Path("/dev/full"), "x" * 1234)
    with pytest.raises(UserError, match="/proc/summary.json: 4 bytes cannot be written"):
        write_whole(Path("/proc/summary.json"), "1234")


# ---- damaged checkpoints


def test_what_comes_after_a_damaged_checkpoint_is_kept_before_it(case):
    out = case.copy("pruned")
    (out / "summary.json").unlink()
    (out / "checkpoints" / "step-6" / "state.json").write_text("{")
    flags = ("--resume", "--save_every", 1, "--keep_checkpoints", 1)
    code, printed = case.run("pruned", *flags, kill_at="os.mkdir .step-6.tmp")
    assert code == KILLED and "step-6 cannot be used" in printed
    assert steps_in(out / "checkpoints") == ["step-5"]
    assert case.run("pruned", *flags)[0] == 0


def do_damage(file: Path, damage: str) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    elif damage == "flipped":
        file.write_bytes(content)
    else:
        file.write_bytes(content[:-100])


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("name", ["*.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_recognised(case, tmp_path, name, damage):
    checkpoint = shutil.copytree(case.folder / "whole" / "checkpoints" / "step-6", tmp_path / "6")
    assert damage_of(checkpoint) is None
    [file] = checkpoint.glob(name)
    do_damage(file, damage)
    assert damage_of(checkpoint)


def test_the_run_goes_on_from_the_newest_checkpoint_that_is_whole(case):
    checkpoints = case.copy("damaged") / "checkpoints"
    (checkpoints.parent / "summary.json").unlink()
    (checkpoints / "step-6" / "manifest.json").unlink()
    case.goes_on_to_the_same_end("damaged")
    printed = (case.folder / "damaged.log").read_text()
    assert "step-6 cannot be used, " in printed and "trying the one before it" in printed
    assert "checkpoints/step-4\n" in printed

    for folder in checkpoints.iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(UserError, match="step-4: .*no checkpoint before it is left"):
        newest_undamaged(checkpoints_in(checkpoints.parent))
