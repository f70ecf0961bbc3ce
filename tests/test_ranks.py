# pytest tests/test_ranks.py
"""Several ranks under torchrun learn what one process learns, go on from each other's checkpoints,
and end together."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
else:
    import pytest
    from conftest import ROOT, exhaustive, read_jsonl
    from safetensors.torch import load_file
    from test_run import stable

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import repo
from plumbing import checkpoints
from plumbing.training import State
from plumbing.checkpoints import damage_of
from plumbing.data import cyclic_batch, load_ptx_pairs
from plumbing.errors import UserError
from plumbing.models import load_policy
from plumbing.ranks import RANK, RANKS
from tiny_configs import pictures, world

# ---- what every process does

SETTINGS = {
    "device": "cpu",
    "dtype": "float32",
    "steps": 2,
    "batch_size": 5,
    "micro_batch_size": 2,
    "max_response_length": 12,
    "actor_lr": 1e-3,
    "critic_lr": 1e-3,
    "judge": None,
}
FUNCTIONS = Path(__file__).with_name("one_rank_fails.py")
VARIANTS = {  # batches of 5 do not divide by 2 ranks, of 1 leave a rank without rows
    "ppo_lag": {"algo": "ppo_lag", "cost_window": 8 // RANKS},  # of the 10 costs in two steps
    "mask, passes, a function": {
        "rectify": "mask", "update_iters": 2, "minibatch_size": 3,
        "reward_model": f"{FUNCTIONS}:brevity"},
    "one prompt": {"batch_size": 1},
    "groups": {"baseline": "group", "samples_per_prompt": 3},  # 15 rows: one group is split
    "lora, ptx, checkpointing": {"lora_rank": 4, "ptx_coeff": 0.5, "gradient_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
    "pictures, lora, ptx": {"model": "tiny-pictures", "lora_rank": 4, "ptx_coeff": 0.5},
}
EXHAUSTIVE = {  # parts of the others
    "repo": {},
    "ptx": {"ptx_coeff": 0.5},
    "lora": {"lora_rank": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "pictures": {"model": "tiny-pictures"},
}


FEW = (
    *("--device", "cpu", "--steps", "4", "--batch_size", "6", "--micro_batch_size", "2"),
    *("--eval_samples", "1", "--max_eval_prompts", "5", "--max_response_length", "12"),
    *("--actor_lr", "1e-3", "--critic_lr", "1e-3"),
)
WHOLE_RUNS = {"full": (), "adapters": ("--lora_rank", "4")}


def trained_weights(state) -> dict:
    """What is trained of the three models, gathered from all ranks."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = {}
    for model in state.trained:
        weights |= get_model_state_dict(getattr(state, model), options=options)
    return weights


def learn_each_variant(file: Path) -> None:
    """Two steps of each variant; rank 0 writes responses, metrics, weights and lambda."""
    results, families = {}, {"tiny": world.build(), "tiny-pictures": pictures.build()}
    few_pairs = {}  # by their file: to read all of it takes longer than a variant
    more = EXHAUSTIVE if "ALL_VARIANTS" in os.environ else {}
    for name, changes in (VARIANTS | more).items():
        family = families[changes.get("model", "tiny")]
        config = repo.Config(**family | SETTINGS | changes)
        torch.manual_seed(0)
        policy, tokenizer = load_policy(config)
        prompts = repo.load_prompts(config.dataset)[:20]
        if config.ptx_coeff and config.ptx_dataset not in few_pairs:
            few_pairs[config.ptx_dataset] = load_ptx_pairs(config, tokenizer)[:30]
        pairs = few_pairs[config.ptx_dataset] if config.ptx_coeff else []
        state = State(policy, tokenizer, config)
        responses, metrics = [], []
        for step in range(2):
            size = config.batch_size * config.samples_per_prompt
            rollout, row = repo.train_step(
                state, cyclic_batch(prompts, step, config.batch_size, config.seed),
                cyclic_batch(pairs, step, size, config.seed) if pairs else [], config)
            responses.append(rollout.responses)
            metrics.append(row)
        results[name] = responses, metrics, trained_weights(state), state.lam
    if RANK == 0:
        torch.save(results, file)


def run_whole(folder: Path) -> None:
    """Runs of the script, one after the other, in the processes that are there."""
    for name, flags in WHOLE_RUNS.items():
        code = repo.main([*FEW, *flags, "--save_every", "2", "--output_dir", str(folder / name)])
        assert code == 0
    reward = ("--reward_model", f"{FUNCTIONS}:ctrl_c")
    assert repo.main([*FEW, *reward, "--output_dir", str(folder / "ctrl-c")]) == 130


def run_with_bad_numbers(out: Path) -> None:
    """On rank 1 alone: of the loss in the second step, and of the reward in the third."""
    collect, policy_loss, steps = repo.collect, repo.policy_loss, []

    def remember(state, *arguments, **options):
        steps.append(state.step)
        return collect(state, *arguments, **options)

    def bad(*arguments):
        loss, stats = policy_loss(*arguments)
        return loss * (float("nan") if RANK == 1 and steps[-1] == 1 else 1), stats

    repo.collect, repo.policy_loss = remember, bad
    reward = ("--reward_model", f"{FUNCTIONS}:bad_number")
    assert repo.main([*FEW, *reward, "--output_dir", str(out)]) == 0


if __name__ == "__main__":
    if RANKS > 1:
        distributed.init_process_group("gloo")
    at = Path(sys.argv[1])
    learn_each_variant(at / f"learned-on-{RANKS}")
    if RANKS > 1:
        run_whole(at)
        run_with_bad_numbers(at / "bad-numbers")
    sys.exit()


# ---- the same learning


class Left(NamedTuple):
    """What the processes above have left."""

    folder: Path
    printed: str  # by two ranks
    learned: dict  # {number of ranks: {variant: what learn_each_variant wrote}}


@pytest.fixture(scope="module")
def by_ranks(long_runs) -> Left:
    """By one process and by two ranks; conftest.py starts them."""
    folder, learned = long_runs("by_ranks"), {}
    for ranks in (1, 2):
        learned[ranks] = torch.load(folder / f"learned-on-{ranks}", weights_only=True)
    return Left(folder, (folder / "two-ranks.log").read_text(), learned)


@pytest.mark.parametrize("variant", [*VARIANTS, *map(exhaustive, EXHAUSTIVE)])
def test_two_ranks_learn_what_one_learns(by_ranks, variant):
    responses, metrics, weights, lam = by_ranks.learned[1][variant]
    same_responses, same_metrics, same_weights, same_lam = by_ranks.learned[2][variant]
    tolerance = 1e-5
    if variant == "bfloat16":
        # Norms are fp32 in one process, bf16 in FSDP, and the sums round differently.
        tolerance = 2e-2
        responses, same_responses = responses[:1], same_responses[:1]
        metrics, same_metrics = metrics[:1], same_metrics[:1]
    assert responses == same_responses
    for one, two in zip(stable(metrics), stable(same_metrics)):
        assert one.keys() == two.keys()
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=tolerance, abs=tolerance), key
    assert weights.keys() == same_weights.keys() and len(weights) > 20
    for key in weights:
        difference = (weights[key] - same_weights[key]).abs()
        # AdamW makes whole steps, of 1e-3, of the smallest gradients too, rounding errors included.
        assert difference.mean() < tolerance / 10 and difference.max() < 10 * tolerance, key
    assert same_lam == pytest.approx(lam, abs=tolerance)


# ---- checkpoints of another number of ranks

def assert_same_metrics(folder: Path, other: Path) -> None:
    rows, same_rows = (stable(read_jsonl(out / "metrics.jsonl")) for out in (folder, other))
    for row, same in zip(rows, same_rows, strict=True):
        for key in row:
            assert same[key] == pytest.approx(row[key], rel=1e-5, abs=1e-5), key


def assert_same_models(folder: Path, other: Path) -> None:
    for name in ("actor", "reward_critic", "cost_critic"):
        weights = load_file(folder / "final" / name / "model.safetensors")
        same = load_file(other / "final" / name / "model.safetensors")
        assert weights.keys() == same.keys()
        assert all(torch.allclose(weights[key], same[key], atol=1e-5) for key in weights)


def test_one_rank_speaks(by_ranks):
    assert by_ranks.printed.count("4 steps of repo in") == len(WHOLE_RUNS)
    assert by_ranks.printed.count("policy ") == len(WHOLE_RUNS) + 2  # and what goes wrong
    assert "Traceback" not in by_ranks.printed


def test_a_checkpoint_of_two_ranks_is_whole_and_with_holes_refused(by_ranks, tmp_path):
    whole = by_ranks.folder / "full"
    assert not list(whole.rglob(".*"))
    checkpoint = shutil.copytree(whole / "checkpoints" / "step-2", tmp_path / "step-2")
    assert damage_of(checkpoint) is None
    shards = list(checkpoint.glob("*.safetensors"))
    assert len(shards) == 2
    shards[0].unlink()
    assert damage_of(checkpoint) == f"{shards[0].name} is missing"


def check_that_it_went_on(whole: Path, out: Path, ranks: int) -> None:
    assert_same_metrics(whole, out)
    assert_same_models(whole, out)
    assert (out / "eval.jsonl").is_file()
    assert json.loads((out / "config.json").read_text())["environment"]["ranks"] == ranks


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_a_run_of_two_ranks_goes_on_with_one(by_ranks, run, name):
    whole = by_ranks.folder / name
    checkpoint = whole / "checkpoints" / "step-2"
    code, out, printed = run(*FEW, *WHOLE_RUNS[name], "--resume", checkpoint)
    assert code == 0 and "continuing from" in printed
    check_that_it_went_on(whole, out, ranks=1)


@pytest.mark.exhaustive
def test_a_run_of_two_ranks_goes_on_with_four(by_ranks, tmp_path):
    whole, out = by_ranks.folder / "full", tmp_path / "out"
    more = ("--resume", whole / "checkpoints" / "step-2", "--output_dir", out)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    command = [*torchrun, "--nproc_per_node", "4", "repo.py", *FEW, *map(str, more)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "continuing from" in done.stdout, done.stderr[:6000]
    check_that_it_went_on(whole, out, ranks=4)


# ---- the end of one is the end of all


def test_ctrl_c_on_one_rank_stops_all_after_a_whole_step_and_saves(by_ranks):
    out = by_ranks.folder / "ctrl-c"
    [checkpoint] = (out / "checkpoints").iterdir()
    assert f"interrupted; {checkpoint} is saved, --resume continues from" in by_ranks.printed
    assert checkpoint.name == "step-2" and damage_of(checkpoint) is None
    assert len(read_jsonl(out / "metrics.jsonl")) == 2


@pytest.fixture(scope="session")
def one_rank_fails(long_runs) -> Path:
    """The folder with what two runs of two ranks have printed, in which rank 1 failed: see
    conftest.py, which has checked their exit codes, and one_rank_fails.py."""
    return long_runs("one_rank_fails")


def test_a_bug_on_one_rank_ends_all_with_its_traceback_first(one_rank_fails):
    printed = (one_rank_fails / "bug.txt").read_text()
    assert "[rank0]: Traceback" not in printed
    lost = printed.index("error: rank 0 has lost another rank")
    assert printed.index("[rank1]: ZeroDivisionError") < lost


def test_an_error_of_one_rank_is_told_once_and_all_save_a_checkpoint(one_rank_fails):
    """In the second step; what is saved is whole, and one process can go on from it."""
    printed = (one_rank_fails / "no-licence.txt").read_text()
    [sentence] = re.findall("error: --reward_model .*", printed)
    assert "no licence" in sentence and sentence.endswith(", on rank 1")
    [checkpoint] = (one_rank_fails / "no-licence" / "checkpoints").iterdir()
    assert f"interrupted; {checkpoint} is saved, --resume continues from there" in printed
    assert checkpoint.name == "step-1" and damage_of(checkpoint) is None
    assert len(list(checkpoint.glob("*.safetensors"))) == 2


def test_an_error_that_only_one_rank_has_met_saves_nothing_and_says_so(monkeypatch, tmp_path):
    """Of rank 0, when it writes a log: the others are in the next step already."""
    saved = []
    monkeypatch.setattr(checkpoints, "RANKS", 2)
    monkeypatch.setattr(checkpoints, "save_checkpoint", lambda *_: saved.append(1))
    state = SimpleNamespace(step=3, saved_step=2)

    def save_after(error, stopped=False):
        checkpoints.save_after(error, stopped, state, tmp_path, None)

    with pytest.raises(UserError, match="no room; only rank 0 has failed, so no checkpoint is sav"):
        save_after(UserError("no room"))
    with pytest.raises(UserError, match="only rank 0 has failed"):
        save_after(OSError("no room"))
    save_after(KeyboardInterrupt())  # at once, perhaps in the middle of a step
    save_after(UserError("three bad steps", code=3))
    assert not saved

    save_after(UserError("no licence, on rank 1", on_all_ranks=True))
    save_after(KeyboardInterrupt(), stopped=True)
    state.saved_step = 3  # then there is nothing left to do together
    save_after(UserError("a judge, which only rank 0 asks"))
    assert len(saved) == 3


def test_bad_numbers_on_one_rank_leave_out_the_update_on_all(by_ranks):
    assert by_ranks.printed.count("the rest of this step is skipped") == 2
    rows = read_jsonl(by_ranks.folder / "bad-numbers" / "metrics.jsonl")
    reasons = [row.get("bad", "")[:17] for row in rows]
    assert reasons == ["", "actor_loss is nan", "--reward_model ga", ""]
