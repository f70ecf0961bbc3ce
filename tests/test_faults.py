# pytest tests/test_faults.py
"""What a day brings: processes killed at any instant and at every file they touch, full disks, damaged checkpoints, two runs in one folder."""
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import random_beaver, read_jsonl, write_beaver, write_policy
from safetensors.torch import load
from test_run import stable

import repo
from tiny_configs.folder import append, write_whole

FORKS = multiprocessing.get_context("forkserver")  # has everything imported and nothing begun: a process starts in no time
FORKS.set_forkserver_preload(["repo"])
WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def main(flags, log, kill_at=None, torn=False, file_size=None):
    """repo.main in a process of its own, killed at its n-th change of a file under --output_dir, or at the one named; `torn`: with half of that file written.
    `file_size`: what the operating system lets it write into one file."""
    repo.torch.set_num_threads(1)
    out, seen, busy = str(flags[-1]), [], threading.local()
    sys.stdout = sys.stderr = open(log, "w", buffering=1)

    def watch(event, arguments):
        is_write = event in WRITES or event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not is_write or getattr(busy, "now", False):
            return
        path = Path(str(arguments[0]))
        if not path.is_absolute() and event != "open" and arguments[-1] > 0:  # inside rmtree names are relative to an open folder
            path = Path(os.readlink(f"/proc/self/fd/{arguments[-1]}"), path)
        if not str(path).startswith(out):
            return
        seen.append(f"{event} {path.name}")
        if kill_at in (len(seen), seen[-1]):
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


class Case:
    """A small run, and what it leaves when nothing happens."""
    def __init__(self, folder: Path, tokenizer):
        self.folder = folder
        (folder / "reward.py").write_text("def brevity(prompts, responses):\n    return [-len(r) / 10 for r in responses]\n")
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(40)))
        self.flags = ("--model", write_policy(folder / "policy", tokenizer), "--reward_model", f"{folder}/reward.py:brevity", "--device", "cpu", "--cost_model",
                      write_beaver(folder / "cost", tokenizer, random_beaver(tokenizer)[1]), "--dataset", folder / "prompts.jsonl", "--steps", 6, "--save_every", 2,
                      "--batch_size", 4, "--eval_samples", 1, "--max_eval_prompts", 4, "--max_response_length", 8, "--sample_every", 3, "--actor_lr", 1e-3)
        self.run("first")  # starts the server
        begin = time.monotonic()
        assert self.run("whole", log="counted")[0] == 0
        self.seconds = time.monotonic() - begin
        self.writes = (folder / "counted").read_text().splitlines()
        self.left = self.what_is_left("whole")

    def start(self, out, *more, log=None, **options):
        log = self.folder / (log or f"{out}.log")
        process = FORKS.Process(target=main, args=((*self.flags, *more, "--output_dir", self.folder / out), log), kwargs=options)
        process.start()
        return process, log

    def run(self, out, *more, **options) -> tuple[int, str]:
        process, log = self.start(out, *more, **options)
        process.join(120)
        return process.exitcode, log.read_text()

    def what_is_left(self, out) -> dict:
        """Every file's content, but for times, the one setting that differs, and hashes."""
        folder = self.folder / out
        left = {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
        left["metrics.jsonl"] = stable(read_jsonl(folder / "metrics.jsonl"))
        for name in left:
            if name.endswith("state.json"):
                left[name] = {key: value for key, value in json.loads(left[name])["state"].items() if key not in ("seconds", "logs")}
            elif name.endswith("manifest.json"):
                left[name] = set(json.loads(left[name]))
            elif name.endswith(".safetensors"):  # whose order of tensors differs
                left[name] = {key: tensor.numpy().tobytes() for key, tensor in load(left[name]).items()}
            elif name == "summary.json":
                left[name] = {key: value for key, value in json.loads(left[name]).items() if key not in ("tokens_per_second", "wall_seconds", "peak_memory_mib")}
            elif name == "config.json":
                left[name] = json.loads(left[name]) | {"output_dir": None}
        return left

    def goes_on_to_the_same_end(self, out) -> None:
        code, printed = self.run(out, "--resume")
        if code == 2 and not (self.folder / out).exists():  # killed before it began
            assert "start without --resume" in printed
            code, printed = self.run(out)
        assert code == 0 or "is finished" in printed, printed
        left = self.what_is_left(out)
        assert left.keys() == self.left.keys()
        assert all(left[name] == self.left[name] for name in left), [name for name in left if left[name] != self.left[name]]


@pytest.fixture(scope="module")
def case(tmp_path_factory, tokenizer) -> Case:
    return Case(tmp_path_factory.mktemp("faults"), tokenizer)


def all_go_on(case, group: str, trials: list) -> None:
    """trial(name) kills a new run; each then goes on. Two at a time."""
    def one(number):
        name = f"{group}-{number}"
        assert not (case.folder / name).exists()
        trials[number](name)
        case.goes_on_to_the_same_end(name)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(len(trials))))


def test_killed_at_thirty_random_instants_it_goes_on_bit_for_bit(case):
    draw, reached = random.Random(0), []

    def killed_after(seconds):
        def trial(name):
            process, _ = case.start(name)
            time.sleep(seconds)
            process.kill()
            process.join()
            metrics = case.folder / name / "metrics.jsonl"
            reached.append(len(read_jsonl(metrics)) if metrics.exists() else None)
        return trial
    all_go_on(case, "instant", [killed_after(draw.uniform(0, 1.5 * case.seconds)) for _ in range(30)])  # two at a time are slower than one
    assert len({steps for steps in reached if steps}) >= 3, reached  # the instants were spread over the run


def test_killed_at_every_file_it_changes_it_goes_on_bit_for_bit(case):
    trials = [(n, False) for n in range(1, len(case.writes) + 1)] + [(n, True) for n, write in enumerate(case.writes, 1) if write.startswith("open")]

    def killed_at(n, torn):
        def trial(name):
            code, _ = case.run(name, kill_at=n, torn=torn)
            assert code == -signal.SIGKILL
        return trial
    assert len(trials) > 80 and {"os.rename .step-4.tmp", "os.rename step-2", "os.rename .actor.tmp", "os.rename .summary.json.tmp"} <= set(case.writes)
    all_go_on(case, "file", [killed_at(*trial) for trial in trials])


def killed_while_saving_step_4(case, name) -> Path:
    """A run with one checkpoint, step-2."""
    assert case.run(name, kill_at="os.rename .step-4.tmp")[0] == -signal.SIGKILL
    assert [path.name for path in (case.folder / name / "checkpoints").glob("step-*")] == ["step-2"]
    return case.folder / name


def test_a_full_disk_is_told_in_bytes_and_leaves_the_checkpoint_before(case):
    out = killed_while_saving_step_4(case, "full")
    before = case.what_is_left("full")
    tensors, = (out / "checkpoints" / "step-2").glob("*.safetensors")
    code, printed = case.run("full", "--resume", file_size=tensors.stat().st_size - 1)  # as a full disk: the system refuses the last byte
    errors = [line for line in printed.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in printed, printed
    assert "checkpoints/.step-4.tmp: cannot be written; it takes " in errors[0] and "bytes" in errors[0] and "were free" in errors[0] and "File too large" in errors[0]
    after = case.what_is_left("full")
    assert all(after[name] == before[name] for name in before if "step-2" in name) and not any("step-4" in name for name in after)
    case.goes_on_to_the_same_end("full")


def test_a_disk_that_is_full_at_the_end_is_told_too(case):
    """The trained policy is the first thing saved, before the last evaluation."""
    size = (case.folder / "whole" / "final" / "actor" / "model.safetensors").stat().st_size
    code, printed = case.run("end", "--save_every", 0, "--sample_every", 0, file_size=size - 1)
    assert code == 2 and "cannot be written; it takes" in printed and "Traceback" not in printed, printed
    assert not list((case.folder / "end").rglob("*.tmp"))


def test_what_comes_after_a_damaged_checkpoint_is_kept_before_it(case):
    shutil.copytree(case.folder / "whole", case.folder / "pruned")
    checkpoints = case.folder / "pruned" / "checkpoints"
    (case.folder / "pruned" / "summary.json").unlink()
    (checkpoints / "step-6" / "state.json").write_text("{")
    code, printed = case.run("pruned", "--resume", "--save_every", 1, "--keep_checkpoints", 1, kill_at="os.mkdir .step-6.tmp")
    assert code == -signal.SIGKILL and "step-6 cannot be used" in printed
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-5"], [path.name for path in checkpoints.iterdir()]
    assert case.run("pruned", "--resume", "--save_every", 1, "--keep_checkpoints", 1)[0] == 0


def test_a_run_that_is_moved_aside_arrives_whole_wherever_its_successor_is_killed(case):
    for n in range(1, 7):
        name = f"aside-{n}"
        shutil.copytree(case.folder / "whole", case.folder / name)
        assert case.run(name, kill_at=n)[0] == -signal.SIGKILL
        moved = case.what_is_left(f"{name}.1" if (case.folder / f"{name}.1").exists() else name)
        assert moved == case.left
        code, printed = case.run(name, "--resume")
        if code == 2:  # moved, and nothing begun, or not moved yet
            assert "there is no run in" in printed or "is finished" in printed, printed


def test_a_finished_run_without_checkpoints_is_not_repeated_by_resume(case):
    shutil.copytree(case.folder / "whole", case.folder / "done")
    shutil.rmtree(case.folder / "done" / "checkpoints")
    code, printed = case.run("done", "--resume")
    assert code == 2 and "is finished; to repeat it, start without --resume" in printed


def test_other_files_say_what_they_needed():
    with pytest.raises(repo.UserError, match="/dev/full: 1,234 bytes cannot be written .*No space left on device"):
        append(Path("/dev/full"), "x" * 1234)
    with pytest.raises(repo.UserError, match="/proc/summary.json: 4 bytes cannot be written"):
        write_whole(Path("/proc/summary.json"), "1234")


@pytest.mark.parametrize("name", ["*.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_it_used(case, name, damage):
    out = f"{damage}-{name[:5]}"
    shutil.copytree(case.folder / "whole", case.folder / out)
    for later in ("summary.json", "eval.jsonl"):
        (case.folder / out / later).unlink()
    file, = (case.folder / out / "checkpoints" / "step-6").glob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink() if damage == "gone" else file.write_bytes(content if damage == "flipped" else content[:-100])
    code, printed = case.run(out, "--resume", case.folder / out / "checkpoints" / "step-6")
    assert code == 2 and "resume from another" in printed
    case.goes_on_to_the_same_end(out)
    printed = (case.folder / f"{out}.log").read_text()
    assert "step-6 cannot be used, " in printed and "trying the one before it" in printed and "checkpoints/step-4\n" in printed


def test_without_any_whole_checkpoint_it_refuses(case):
    shutil.copytree(case.folder / "whole", case.folder / "none")
    (case.folder / "none" / "summary.json").unlink()
    for file in (case.folder / "none" / "checkpoints").glob("*/*.safetensors"):
        file.write_bytes(b"")
    code, printed = case.run("none", "--resume")
    assert code == 2 and "step-4" in printed and "no checkpoint before it is left" in printed


def test_the_second_run_in_a_folder_refuses_at_once(case):
    process, _ = case.start("shared", "--steps", 2000)
    while not (case.folder / "shared" / "metrics.jsonl").exists():
        time.sleep(0.05)
    for more in ((), ("--resume",), ("--eval_only",)):
        code, printed = case.run("shared", *more, log="second")
        assert code == 2 and printed.startswith("error: --output_dir") and "another run is writing there" in printed
    assert process.is_alive()
    process.kill()
    process.join()
    assert case.run("shared", "--resume", "--steps", 2000, log="third", kill_at=3)[0] == -signal.SIGKILL  # the lock died with its owner
