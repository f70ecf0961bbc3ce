# pytest tests/test_ranks.py
"""Several ranks under torchrun learn what one process learns, go on from each other's checkpoints, and end together."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
else:
    import pytest
    from conftest import ROOT, read_jsonl
    from test_run import stable

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import repo

VARIANTS = {  # batches of 5 do not divide by 2 ranks, of 1 leave a rank without rows
    "repo": {}, "ppo_lag": {"algo": "ppo_lag"}, "mask, passes": {"rectify": "mask", "update_iters": 2, "minibatch_size": 3}, "one prompt": {"batch_size": 1},
    "ptx": {"ptx_coeff": 0.5}, "lora": {"lora_rank": 4}, "lora, ptx, checkpointing": {"lora_rank": 4, "ptx_coeff": 0.5, "gradient_checkpointing": True},
    "checkpointing": {"gradient_checkpointing": True}, "functions": {"reward_model": f"{__file__}:brevity"}, "bfloat16": {"dtype": "bfloat16"}}


def brevity(prompts, responses):
    return [-len(response) / 10 for response in responses]


def learn_each_variant(file: str, family: dict) -> None:
    """What every process does: two steps of each variant; rank 0 writes rollouts, metrics, gathered weights."""
    results = {}
    for name, changes in VARIANTS.items():
        settings = {**family, "device": "cpu", "dtype": "float32", "steps": 2, "batch_size": 5, "micro_batch_size": 2, "max_response_length": 12,
                    "actor_lr": 1e-3, "critic_lr": 1e-3, "judge": None, **changes}
        config = repo.Config(**settings)
        torch.manual_seed(0)
        policy, tokenizer = repo.load_policy(config)
        prompts = repo.load_prompts(config.dataset)[:20]
        pairs = repo.load_ptx_pairs(config, tokenizer)[:30] if config.ptx_coeff else []
        state = repo.State(policy, tokenizer, config)
        rollouts, metrics = zip(*(repo.train_step(state, prompts, pairs, config) for _ in range(2)))
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        weights = {key: value for model in repo.State.TRAINED for key, value in get_model_state_dict(getattr(state, model), options=options).items()}
        results[name] = [rollout.responses for rollout in rollouts], metrics, weights, state.lam
    if repo.RANK == 0:
        torch.save(results, file)


if __name__ == "__main__":
    if repo.RANKS > 1:
        distributed.init_process_group("gloo")
    learn_each_variant(sys.argv[1], json.loads(sys.argv[2]))
    sys.exit()


def start(ranks: int, *command, **options) -> subprocess.Popen:
    program = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.Popen([*program, *map(str, command)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **options)


def finished(process: subprocess.Popen, code: int | None = 0) -> str:
    printed, _ = process.communicate(timeout=120)
    assert code is None or process.returncode == code, printed
    return printed


@pytest.fixture(scope="module")
def learned(tmp_path_factory, family):
    """{number of ranks: what learn_each_variant wrote}."""
    folder = tmp_path_factory.mktemp("learned")
    for process in [start(ranks, __file__, folder / str(ranks), json.dumps(family)) for ranks in (1, 2)]:
        finished(process)
    return {ranks: torch.load(folder / str(ranks), weights_only=True) for ranks in (1, 2)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_learn_what_one_learns(learned, variant):
    (responses, metrics, weights, lam), (same_responses, same_metrics, same_weights, same_lam) = (learned[ranks][variant] for ranks in (1, 2))
    tolerance = 2e-2 if variant == "bfloat16" else 1e-5  # bf16: norms are fp32 in one process, bf16 in FSDP, and the sums round differently
    if variant == "bfloat16":
        responses, same_responses = responses[:1], same_responses[:1]
        metrics, same_metrics = metrics[:1], same_metrics[:1]
    assert responses == same_responses
    for one, two in zip(stable(metrics), stable(same_metrics)):
        assert one.keys() == two.keys()
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=tolerance, abs=tolerance), key
    assert weights.keys() == same_weights.keys() and len(weights) > 20
    assert all((weights[key] - same_weights[key]).abs().max() < tolerance for key in weights) and same_lam == pytest.approx(lam, abs=tolerance)


FEW = ("repo.py", "--device", "cpu", "--steps", 4, "--batch_size", 6, "--micro_batch_size", 2, "--eval_samples", 1, "--max_eval_prompts", 5,
       "--max_response_length", 12, "--actor_lr", 1e-3, "--critic_lr", 1e-3)


def assert_same_metrics(folder: Path, others: list[Path]) -> None:
    for other in others:
        for one, same in zip(stable(read_jsonl(folder / "metrics.jsonl")), stable(read_jsonl(other / "metrics.jsonl")), strict=True):
            assert all(same[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5) for key in one)


@pytest.mark.parametrize("flags, numbers", [((), (1, 4)), (("--lora_rank", 4), (1,))], ids=["full", "adapters"])
def test_a_run_of_two_ranks_goes_on_with_one_and_with_four(tmp_path, family, flags, numbers):
    from transformers import AutoModelForCausalLM
    whole = tmp_path / "whole"
    printed = finished(start(2, *FEW, *flags, "--save_every", 2, "--output_dir", whole))
    assert printed.count("4 steps of repo in") == 1 and printed.count("policy ") == 1 and "Traceback" not in printed  # one rank speaks
    shards = list((whole / "checkpoints" / "step-2").glob("*.safetensors"))
    assert len(shards) == 2 and not list(whole.rglob(".*"))
    assert set(json.loads((whole / "checkpoints" / "step-2" / "manifest.json").read_text())) == {"state.json", *(shard.name for shard in shards)}
    resumed = {ranks: tmp_path / str(ranks) for ranks in numbers}
    for process in [start(ranks, *FEW, *flags, "--output_dir", out, "--resume", whole / "checkpoints" / "step-2") for ranks, out in resumed.items()]:
        assert "continuing from" in finished(process)
    assert_same_metrics(whole, list(resumed.values()))
    actors = [AutoModelForCausalLM.from_pretrained(out / "final" / "actor").state_dict() for out in (whole, *resumed.values())]
    assert all(torch.allclose(actors[0][key], other[key], atol=1e-5) for other in actors[1:] for key in actors[0])
    shards[0].unlink()
    printed = finished(start(1, *FEW, *flags, "--output_dir", tmp_path / "holes", "--resume", whole / "checkpoints" / "step-2"), 2)
    assert "safetensors is missing; resume from another" in printed and not (tmp_path / "holes").exists()
    assert all((out / "eval.jsonl").is_file() and json.loads((out / "config.json").read_text())["environment"]["ranks"] == ranks for ranks, out in resumed.items())


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Process ids of torchrun's children, by rank."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    rank = {pid: [word for word in Path(f"/proc/{pid}/environ").read_text().split("\0") if word.startswith("RANK=")] for pid in pids}
    return [int(pid) for pid in sorted(pids, key=rank.get) if rank[pid]]


@pytest.fixture
def training(tmp_path, family):
    """A run of two ranks in the middle of its steps."""
    process = start(2, *FEW, "--steps", 5000, "--output_dir", tmp_path / "out")
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    yield process, tmp_path / "out"
    process.kill()


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_is_killed_the_other_ends_and_says_why(training, victim):
    process, _ = training
    os.kill(ranks_of(process)[victim], signal.SIGKILL)
    begin = time.monotonic()
    printed = finished(process, None)
    assert process.returncode != 0 and time.monotonic() - begin < 60
    assert "SIGKILL" in printed or "-9" in printed
    assert f"error: rank {1 - victim} has lost another rank" in printed and "[rank" not in printed  # no traceback of a rank


def test_ctrl_c_stops_all_ranks_after_a_whole_step_and_saves(training):
    process, out = training
    os.kill(process.pid, signal.SIGINT)
    printed = finished(process, None)
    assert process.returncode != 0 and "is saved, --resume continues from there" in printed
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{len(read_jsonl(out / 'metrics.jsonl'))}"]


def test_a_bug_on_one_rank_ends_all_with_its_traceback_first(tmp_path, family):
    (tmp_path / "bug.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport repo\nlearn = repo.learn\n"
                                     "repo.learn = lambda *arguments: learn(*arguments) if repo.RANK == 0 else 1 / 0\nsys.exit(repo.main())\n")
    begin = time.monotonic()
    process = start(2, tmp_path / "bug.py", *FEW[1:], "--output_dir", tmp_path / "out")
    printed = finished(process, None)
    assert process.returncode != 0 and time.monotonic() - begin < 60
    assert "[rank1]: ZeroDivisionError" in printed and "[rank0]: Traceback" not in printed
    assert printed.index("ZeroDivisionError") < (printed + "error: rank 0 has lost").index("error: rank 0 has lost")


def test_an_error_of_one_rank_ends_all_with_its_sentence(tmp_path, family):
    (tmp_path / "bad.py").write_text("import os\ndef score(prompts, responses):\n    assert os.environ['RANK'] == '0', 'no licence'\n    return [0.0] * len(responses)\n")
    begin = time.monotonic()
    process = start(2, *FEW, "--reward_model", f"{tmp_path}/bad.py:score", "--output_dir", tmp_path / "out")
    printed = finished(process, None)
    assert process.returncode != 0 and time.monotonic() - begin < 60
    assert printed.count("error: --reward_model") == 1 and "no licence" in printed and not (tmp_path / "out").exists()


def test_bad_numbers_on_one_rank_leave_out_the_update_on_all(tmp_path, family):
    (tmp_path / "bad.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport repo\ncollect, policy_loss, steps = repo.collect, repo.policy_loss, []\n"
        "def remember(state, *arguments, **options):\n    steps.append(state.step)\n    return collect(state, *arguments, **options)\n"
        "def bad(*arguments):\n    loss, stats = policy_loss(*arguments)\n    return loss * (float('nan') if repo.RANK == 1 and steps[-1] == 1 else 1), stats\n"
        "repo.collect, repo.policy_loss = remember, bad\nsys.exit(repo.main())\n")
    (tmp_path / "nan.py").write_text("import os\ncalls = []\ndef score(prompts, responses):\n    calls.append(1)\n"
                                     "    return [float('nan') if os.environ['RANK'] == '1' and len(calls) == 4 else 0.0] * len(responses)\n")
    printed = finished(start(2, tmp_path / "bad.py", *FEW[1:], "--reward_model", f"{tmp_path}/nan.py:score", "--output_dir", tmp_path / "out"))
    rows = read_jsonl(tmp_path / "out" / "metrics.jsonl")  # the reward's first call is the evaluation's
    assert [row.get("bad", "")[:17] for row in rows] == ["", "actor_loss is nan", "--reward_model ga", ""] and printed.count("this update is left out") == 2
