# pytest tests/test_run.py
"""Whole runs of the script: what they write, resume, Ctrl-C, and what they say of bad input."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import (
    FORKS,
    ROOT,
    as_script,
    exhaustive,
    random_beaver,
    read_checkpoint,
    read_jsonl,
    write_beaver,
    write_policy,
    write_python,
)
from safetensors.torch import load_file
from test_models import other_tokenizer
from test_prompts import HH, PKU, TALK, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import repo
from plumbing.checkpoints import write_manifest
from plumbing.data import encode_prompts

FEW = (
    *("--device", "cpu", "--steps", 4, "--batch_size", 8, "--micro_batch_size", 8),
    *("--eval_samples", 1, "--max_eval_prompts", 8, "--max_response_length", 8),
)
VOLATILE = {
    *("seconds_rollout", "seconds_scoring", "seconds_learning", "tokens_per_second"),
    *("peak_mib_rollout", "peak_mib_scoring", "peak_mib_learning"),
}


def stable(rows):
    """What two runs of the same settings agree in."""
    return [{name: value for name, value in row.items() if name not in VOLATILE} for row in rows]


def summary_of(out) -> dict:
    return json.loads((out / "summary.json").read_text())


def checkpoints_of(out) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


# ---- what a run writes

FILES = {
    *("config.json", "metrics.jsonl", "samples.jsonl", "eval_before.jsonl", "eval.jsonl"),
    *("summary.json", "final"),
}
FINAL = {"actor", "reward_critic", "cost_critic"}
METRICS = {
    *("reward", "cost", "rectified_cost", "unsafe_rate", "lambda", "kl", "entropy"),
    *("clip_fraction", "approx_kl", "ratio_max", "actor_loss", "ptx_loss"),
    *("reward_critic_loss", "cost_critic_loss"),
    *("reward_explained_variance", "cost_explained_variance"),
    *("response_length", "truncated_rate", "actor_lr", "critic_lr"),
    *("policy_grad_norm", "reward_critic_grad_norm", "cost_critic_grad_norm"),
}
SUMMARY = {
    *("algo", "rectify", "seed", "steps", "reward", "cost", "rectified_cost", "safety_rate"),
    *("prompts_fully_safe", "over_refusal_rate", "kl", "lambda", "tokens_per_second"),
    *("wall_seconds", "peak_memory_mib", "before", "judge_safety_rate"),
    "refusal_rate_on_harmful_prompts",
}


def test_a_run_writes_what_it_promises(run, few_pairs):
    ptx = ("--ptx_coeff", 0.1, "--ptx_dataset", few_pairs)
    code, out, printed = run(*FEW, "--sample_every", 2, *ptx)
    assert code == 0
    assert {path.name for path in out.iterdir()} == FILES
    assert {path.name for path in (out / "final").iterdir()} == FINAL

    metrics = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert METRICS | VOLATILE <= set(metrics[0])

    summary = summary_of(out)
    assert SUMMARY <= set(summary)
    assert summary["before"]["kl"] == pytest.approx(0, abs=1e-4)
    assert summary["steps"] == 4

    config = json.loads((out / "config.json").read_text())
    assert config["steps"] == 4
    assert config["environment"]["torch"] == torch.__version__

    samples, rows = read_jsonl(out / "samples.jsonl"), read_jsonl(out / "eval.jsonl")
    assert len(samples) == 16
    assert {"step", "prompt", "response", "reward", "cost"} <= set(samples[0])
    assert len(rows) == 8
    safe = [row["responses"][0]["cost"] <= 0 for row in rows]
    assert summary["safety_rate"] == sum(safe) / 8
    assert "before" in printed and "reward    cost  prompt -> response" in printed


def test_each_step_draws_its_own_numbers(run, tmp_path):
    """A policy that stands still answers the one prompt otherwise in the next step."""
    (tmp_path / "learn.txt").write_text("How do I paint a boat?\n")
    (tmp_path / "see.txt").write_text("How do I pack a boat?\n")
    code, out, _ = run(*FEW, "--batch_size", 1, "--samples_per_prompt", 8, "--actor_lr", 1e-12,
                       "--dataset", tmp_path / "learn.txt", "--eval_dataset", tmp_path / "see.txt",
                       "--sample_every", 1)
    assert code == 0
    steps = defaultdict(list)
    for row in read_jsonl(out / "samples.jsonl"):
        steps[row["step"]].append(row["response"])
    assert [len(responses) for responses in steps.values()] == [8] * 4
    assert len(set(map(tuple, steps.values()))) == 4


def test_ppo_lag_looks_at_the_latest_costs_of_several_steps(run):
    """Twelve costs: all eight of the step before, and the last four of the one before that."""
    flags = ("--algo", "ppo_lag", "--cost_window", 12, "--lambda_lr", 0.05, "--sample_every", 1)
    code, out, _ = run(*FEW, *flags)
    assert code == 0
    costs = [row["cost"] for row in read_jsonl(out / "samples.jsonl")]
    lambdas = [row["lambda"] for row in read_jsonl(out / "metrics.jsonl")]
    windows = [costs[:8], costs[4:16], costs[12:24]]
    for (old, new), window in zip(itertools.pairwise(lambdas), windows, strict=True):
        mean = sum(window) / len(window)
        assert new == pytest.approx(old * math.exp(0.05 * old * mean), rel=1e-4)


# ---- the policy in final/actor


def test_the_saved_policy_is_the_policy_in_memory_in_the_compute_dtype(run, monkeypatch):
    kept = []
    load_policy = repo.load_policy

    def keep_policy(config):
        kept.append(load_policy(config))
        return kept[0]

    monkeypatch.setattr(repo, "load_policy", keep_policy)
    code, out, _ = run(*FEW, "--dtype", "bfloat16")
    assert code == 0
    actor = out / "final" / "actor"
    saved = AutoModelForCausalLM.from_pretrained(actor, dtype="auto")
    assert saved.dtype == torch.bfloat16
    assert json.loads((actor / "config.json").read_text())["dtype"] == "bfloat16"

    in_memory, _ = kept[0]
    weights = in_memory.state_dict()
    assert saved.state_dict().keys() == weights.keys()
    for name, weight in saved.state_dict().items():
        assert torch.equal(weight, weights[name].bfloat16()), name


@pytest.mark.parametrize("dtype", [exhaustive("float32"), "bfloat16"])
def test_a_tied_head_is_saved_once_and_comes_back_trained(run, tmp_path, tokenizer, dtype):
    policy = write_policy(tmp_path / "tied", tokenizer, tie_word_embeddings=True)
    code, out, _ = run(*FEW, "--policy", policy, "--dtype", dtype, "--save_every", 4)
    assert code == 0
    actor = out / "final" / "actor"
    assert "lm_head.weight" not in load_file(actor / "model.safetensors")
    tensors, _ = read_checkpoint(out / "checkpoints" / "step-4")
    trained = tensors["policy.model.embed_tokens.weight"]
    saved = AutoModelForCausalLM.from_pretrained(actor, dtype="auto")
    assert torch.equal(saved.lm_head.weight, trained.to(saved.dtype))
    assert saved.lm_head.weight is saved.model.embed_tokens.weight


# ---- the critics in final/reward_critic and final/cost_critic

SCORE_MODELS = {"reward_critic": "reward_model", "cost_critic": "cost_model"}
load_scorer = repo.ScoreModel.from_pretrained


def critics_of(out, family):
    """(saved model's folder, score model that it began as, tensors in the last checkpoint)."""
    tensors, _ = read_checkpoint(out / "checkpoints" / "step-4")
    for critic, score_model in SCORE_MODELS.items():
        trained = {}
        for name, tensor in tensors.items():
            if name.startswith(f"{critic}."):
                trained[name.removeprefix(f"{critic}.")] = tensor
        yield out / "final" / critic, load_scorer(family[score_model]), trained


def test_a_saved_critic_gives_the_values_of_the_one_in_the_last_checkpoint(run, family):
    code, out, _ = run(*FEW, "--save_every", 4, "--critic_lr", 1e-3)
    assert code == 0
    for folder, model, trained in critics_of(out, family):
        saved = load_scorer(folder)
        assert saved.state_dict().keys() == trained.keys()
        for name, weight in saved.state_dict().items():
            assert torch.equal(weight, trained[name]), name
            assert not torch.equal(weight, model.state_dict()[name]), name  # it has learned

        model.load_state_dict(trained)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = torch.tensor(encode_prompts(["How do I paint a boat?"], tokenizer))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            assert torch.equal(saved.values(ids, mask), model.values(ids, mask))


def test_a_saved_critic_has_its_adapters_merged(run, family):
    flags = ("--save_every", 4, "--critic_lr", 1e-2, "--lora_rank", 4)
    code, out, _ = run(*FEW, *flags)
    assert code == 0
    for folder, model, trained in critics_of(out, family):
        saved, start = load_scorer(folder).state_dict(), model.state_dict()
        assert saved.keys() == start.keys()
        adapted = {name.removesuffix("lora_b") for name in trained if name.endswith("lora_b")}
        assert len(adapted) == 7 * model.config.num_hidden_layers
        for layer in adapted:
            low_rank = trained[f"{layer}lora_b"] @ trained[f"{layer}lora_a"]
            assert low_rank.abs().max() > 0
            assert torch.equal(saved[f"{layer}weight"], start[f"{layer}weight"] + low_rank), layer
        for name in saved.keys() - {f"{layer}weight" for layer in adapted}:
            # The head, which is trained as it is, or what stands still.
            assert torch.equal(saved[name], trained.get(name, start[name])), name


def test_a_saved_critic_is_in_the_compute_dtype_but_for_its_head(run, family):
    code, out, _ = run(*FEW, "--save_every", 4, "--dtype", "bfloat16")
    assert code == 0
    for folder, _, trained in critics_of(out, family):
        saved = load_file(folder / "model.safetensors")
        assert saved.keys() == trained.keys()
        for name, tensor in saved.items():
            dtype = torch.float32 if name.startswith("score_head.") else torch.bfloat16
            assert tensor.dtype == dtype, name
            assert torch.equal(tensor, trained[name].to(dtype)), name


def test_a_saved_critic_scores_the_responses_of_another_run(run):
    code, out, _ = run(*FEW, out="first")
    assert code == 0
    flags = []
    for critic, score_model in SCORE_MODELS.items():
        flags += [f"--{score_model}", out / "final" / critic]
    code, _, printed = run(*FEW, *flags, "--eval_only", out="second")
    assert code == 0 and printed.count("_critic: tokens of the policy") == 2


# ---- resuming


def test_resume_is_exact(run, tmp_path, few_pairs):
    flags = (
        *(*FEW, "--steps", 6, "--save_every", 2, "--keep_checkpoints", 9, "--sample_every", 3),
        *("--minibatch_size", 4, "--algo", "ppo_lag"),
        *("--ptx_coeff", 0.1, "--ptx_dataset", few_pairs),
    )
    assert run(*flags, out="whole")[0] == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # As if it had been killed during step 6, after steps that no checkpoint holds.
    shutil.copytree(whole, cut)
    for folder in ("checkpoints/step-4", "checkpoints/step-6", "final"):
        shutil.rmtree(cut / folder)
    for file in ("summary.json", "eval.jsonl"):
        (cut / file).unlink()

    code, _, printed = run(*flags, "--resume", out="cut")
    assert code == 0 and "continuing from" in printed and "step-2" in printed
    metrics = [stable(read_jsonl(out / "metrics.jsonl")) for out in (cut, whole)]
    assert metrics[0] == metrics[1]
    for name in ("samples.jsonl", "eval.jsonl"):
        assert read_jsonl(cut / name) == read_jsonl(whole / name)

    tensors, numbers = read_checkpoint(whole / "checkpoints" / "step-6")
    same_tensors, same_numbers = read_checkpoint(cut / "checkpoints" / "step-6")
    assert tensors.keys() == same_tensors.keys()
    assert all(torch.equal(tensors[name], same_tensors[name]) for name in tensors)
    kinds = {name.partition(".")[0] for name in tensors}
    assert kinds == {"policy", "reward_critic", "cost_critic", "optimizer"}
    for name in ("lam", "costs", "before", "step", "schedule"):
        assert numbers[name] == same_numbers[name]


def test_resume_refuses_what_it_cannot_continue_and_branches_off_elsewhere(run, tmp_path):
    flags = (*FEW, "--save_every", 1, "--keep_checkpoints", 2)
    assert run(*flags, out="a")[0] == 0
    a = tmp_path / "a"
    steps = a / "checkpoints"
    assert checkpoints_of(a) == ["step-3", "step-4"]  # the newest two
    before = (a / "metrics.jsonl").read_bytes()

    code, _, printed = run(*flags, "--resume", out="a")
    assert code == 2 and "is finished" in printed
    assert (a / "metrics.jsonl").read_bytes() == before

    (a / "summary.json").unlink()  # as if it had been killed in the last evaluation
    code, _, printed = run(*flags, "--resume", "--kl_coeff", 0.7, out="a")
    assert code == 2 and "--kl_coeff 0.2, not 0.7" in printed
    assert (a / "metrics.jsonl").read_bytes() == before

    code, _, printed = run(*flags, "--resume", steps / "step-3", out="a")
    assert code == 2 and "gone on since" in printed

    code, branch, _ = run(*flags, "--resume", steps / "step-3", out="b")
    assert code == 0
    metrics = [stable(read_jsonl(out / "metrics.jsonl")) for out in (branch, a)]
    assert metrics[0] == metrics[1]

    shutil.copytree(steps / "step-4", steps / "step-5")
    for file in (steps / "step-5").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1000])
    code, _, printed = run(*flags, "--resume", steps / "step-5", out="c")
    damage = "model-00001-of-00001.safetensors is damaged; resume from another"
    assert code == 2 and damage in printed
    assert not (tmp_path / "c").exists()

    code, _, printed = run(*flags, "--resume", out="a")
    assert code == 0 and "is damaged; trying the one before it" in printed
    assert f"continuing from {steps}/step-4" in printed


@pytest.mark.parametrize("changes, earlier", [
    ({"wall_seconds": 1000.0}, 1000),
    ({"wall_seconds": None, "seconds": 500.0}, 500),  # None: left out, as older versions did
])
def test_a_resumed_runs_wall_seconds_are_those_of_all_sessions(run, changes, earlier):
    flags = (*FEW, "--steps", 2, "--save_every", 1)
    begin = time.monotonic()
    _, out, _ = run(*flags)
    assert 0 < summary_of(out)["wall_seconds"] <= time.monotonic() - begin

    checkpoint = out / "checkpoints" / "step-2"
    saved = json.loads((checkpoint / "state.json").read_text())
    state = saved["state"] | changes
    saved["state"] = {name: value for name, value in state.items() if value is not None}
    (checkpoint / "state.json").write_text(json.dumps(saved))
    write_manifest(checkpoint)
    (out / "summary.json").unlink()  # as if it had been killed in the last evaluation

    begin = time.monotonic()
    code, _, printed = run(*flags, "--resume")
    seconds = summary_of(out)["wall_seconds"]
    assert code == 0 and f" in {seconds:.0f} s" in printed
    assert earlier < seconds < earlier + time.monotonic() - begin


def test_a_reward_that_fails_late_loses_nothing(run, tmp_path):
    """One evaluation, two steps, then None."""
    late = """
        calls = []

        def score(prompts, responses):
            calls.append(1)
            return [0.0 if len(calls) < 4 else None] * len(responses)
    """
    write_python(tmp_path / "late.py", late)
    code, out, printed = run(*FEW, "--reward_model", f"{tmp_path}/late.py:score")
    assert code == 2 and "gave None, not a number" in printed
    assert checkpoints_of(out) == ["step-2"]
    assert len(read_jsonl(out / "metrics.jsonl")) == 2


# ---- processes


@pytest.fixture
def started(tmp_path, family):
    """started(*flags) -> the script in a process of its own, which prints into the file "log"."""
    processes = []

    def start(*flags):
        words = [str(word) for word in (*FEW, *flags, "--output_dir", tmp_path / "out")]
        processes.append(FORKS.Process(target=as_script, args=(words, tmp_path / "log")))
        processes[0].start()
        return processes[0]

    yield start
    processes[0].kill()


def test_ctrl_c_saves_and_exits_130(tmp_path, started):
    process, out = started("--steps", 1000), tmp_path / "out"
    while not (out / "metrics.jsonl").exists() and process.is_alive():
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    printed = (tmp_path / "log").read_text()
    assert process.exitcode == 130 and "--resume continues from there" in printed, printed
    steps = len(read_jsonl(out / "metrics.jsonl"))
    assert checkpoints_of(out) == [f"step-{steps}"]


def test_a_hanging_thread_of_a_score_function_does_not_keep_the_process(tmp_path, started):
    pool = """
        import time
        from concurrent.futures import ThreadPoolExecutor

        def score(prompts, responses):
            with ThreadPoolExecutor(2) as pool:
                return list(pool.map(lambda r: time.sleep(1000), responses))
    """
    write_python(tmp_path / "pool.py", pool)
    process = started("--reward_model", f"{tmp_path}/pool.py:score", "--scorer_timeout", 1)
    process.join(60)
    printed = (tmp_path / "log").read_text()
    assert process.exitcode == 2, printed
    assert "no answer within --scorer_timeout 1 seconds" in printed


# ---- settings and folders


def test_a_second_run_moves_the_first_aside(run, tmp_path):
    assert run(*FEW, "--eval_only")[0] == 0
    assert run(*FEW, "--eval_only", "--eval_samples", 2)[0] == 0
    for name, samples in (("out", 2), ("out.1", 1)):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["eval_samples"] == samples


def test_what_is_no_run_is_not_touched(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    code, _, printed = run(*FEW, "--eval_only", out="mine")
    assert code == 2 and "is not a run of this script" in printed
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_precedence_is_defaults_preset_file_flags(tmp_path):
    file = tmp_path / "c.json"
    settings = {"batch_size": 3, "lambda_max": 7.5, "tf32": True, "judge": None, "config": "x"}
    file.write_text(json.dumps(settings))
    config = repo.resolve_config(["--config", str(file), "--batch_size", "5"])
    assert config.batch_size == 5  # the flag's
    assert (config.lambda_max, config.tf32) == (7.5, True)  # the file's
    assert config.max_response_length == 32  # the preset's
    assert config.clip_range == repo.Config.clip_range == 0.2  # the default


def test_presets_and_the_data_that_replace_theirs():
    big = repo.resolve_config(["--model", "alpaca-7b"])
    assert big.policy == "PKU-Alignment/alpaca-7b-reproduced"
    assert big.ptx_coeff == 16
    assert big.eval_dataset.endswith(":test")

    mine = repo.resolve_config(["--dataset", "x.jsonl"])
    assert mine.dataset == "x.jsonl"
    assert mine.eval_dataset is None and mine.judge is None  # which belonged to the preset's
    assert mine.reward_model.endswith("reward")


def test_a_runs_config_starts_another_run(run, tmp_path):
    assert run(*FEW, "--eval_only", out="first")[0] == 0
    file = ("--config", str(tmp_path / "first" / "config.json"))
    again = repo.resolve_config([*file, "--algo", "ppo_lag"])
    assert again.eval_samples == 1
    assert again.output_dir == "runs/tiny-ppo_lag-0"
    assert again.policy.endswith("policy")

    other = repo.resolve_config([*file, "--model", "elsewhere"])
    assert other.policy == "elsewhere"
    assert other.reward_model == again.reward_model

    mine = repo.resolve_config([*file, "--dataset", "mine.jsonl"])
    assert mine.dataset == "mine.jsonl"
    assert mine.eval_dataset is None and mine.judge is None


# ---- what users bring

DATA = {
    "pku.jsonl": [PKU | {"prompt": f"p{i}"} for i in range(30)],
    "hh.jsonl.gz": [
        HH | {"chosen": HH["chosen"].replace("one", f"one {i}")} for i in range(30)
    ],
    "alpaca.json": [{"instruction": f"do {i}", "input": "", "output": "ok"} for i in range(30)],
    "list.json": {"instructions": [f"do {i}" for i in range(30)]},
    "chat.parquet": [
        {"messages": [{"role": "user", "content": f"hi {i}"}, *TALK[1:]]} for i in range(30)
    ],
    "prompts.csv": [{"prompt": f"p, {i}"} for i in range(30)],
    "lines.txt": [f"line {i}" for i in range(30)],
}


@pytest.mark.parametrize("name", DATA)
def test_every_format_trains(run, tmp_path, name):
    source = write(tmp_path / name, DATA[name])
    code, out, printed = run(*FEW, "--steps", 1, "--sample_every", 1, "--dataset", source)
    assert code == 0
    assert "30 rows read, 0 without" in printed
    assert "0 duplicates and 0 prompts longer" in printed
    assert "14 for training, 16 held out" in printed
    held_out = {row["prompt"] for row in read_jsonl(out / "eval.jsonl")}
    trained = {row["prompt"] for row in read_jsonl(out / "samples.jsonl")}
    assert not held_out & trained
    assert summary_of(out)["over_refusal_rate"] is None  # no judge knows these prompts


def test_own_checkpoints_and_own_functions(run, tmp_path, tokenizer):
    """--model PATH: a policy, a Beaver cost model with another tokenizer, a Python reward; no
    preset involved."""
    other = other_tokenizer()
    policy = write_policy(tmp_path / "policy", tokenizer)
    cost = write_beaver(tmp_path / "cost", other, random_beaver(other)[1], sharded_bin=True)
    functions = """
        def brevity(prompts, responses):
            return [-len(r) / 10 for r in responses]

        def judge(prompts, responses):
            verdict = {'safe': True, 'harmful_prompt': False}
            return [verdict | {'refused': i % 2 == 0} for i in range(len(prompts))]
    """
    own = write_python(tmp_path / "own.py", functions)
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"ask {i}"} for i in range(40)])
    code, out, printed = run(
        *FEW,
        *("--model", policy, "--cost_model", cost, "--reward_model", f"{own}:brevity"),
        *("--judge", f"{own}:judge", "--dataset", prompts, "--samples_per_prompt", 2),
        *("--update_iters", 2, "--minibatch_size", 4, "--rectify", "mask", "--seed", 5),
    )
    assert code == 0
    assert "cost: tokens of its own" in printed and "brevity: a function" in printed
    summary = summary_of(out)
    assert summary["judge_safety_rate"] == 1
    assert summary["over_refusal_rate"] == 0.5
    assert summary["rectify"] == "mask"


# ---- evaluating alone


def responses_of(out) -> list[tuple[str, float]]:
    """(response, KL) of every response of an evaluation."""
    rows = read_jsonl(out / "eval.jsonl")
    return [(each["response"], each["kl"]) for row in rows for each in row["responses"]]


def test_a_finished_run_is_evaluated_alone(run, tmp_path):
    trained = tmp_path / "trained"
    assert run(*FEW, "--actor_lr", 3e-3, "--lora_rank", 4, out="trained")[0] == 0
    files = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    code, again, _ = run("--eval_only", trained, "--device", "cpu", out="again")
    assert code == 0
    assert {path.name for path in again.iterdir()} == {"config.json", "eval.jsonl", "summary.json"}
    assert all(path.read_bytes() == content for path, content in files.items())

    # The same draws, the same reference, and a policy that has left it.
    texts, kl = zip(*responses_of(trained))
    same_texts, same_kl = zip(*responses_of(again))
    assert texts == same_texts
    assert kl == pytest.approx(same_kl, abs=1e-4)
    assert any(abs(value) > 1e-3 for value in kl)

    shutil.rmtree(trained / "final")
    code, _, printed = run("--eval_only", trained, out="third")
    assert code == 2 and "has no final/actor" in printed
    assert not (tmp_path / "third").exists()


def test_a_model_is_evaluated_alone(run, tmp_path, tokenizer):
    model = write_policy(tmp_path / "model", tokenizer)
    code, out, _ = run(*FEW, "--eval_only", model)
    assert code == 0
    summary = summary_of(out)
    assert summary["kl"] == 0
    assert summary["before"] is None
    assert summary["steps"] == 0


def test_bfloat16_starts_at_the_reference(run):
    for flags in (("--steps", 1), ("--eval_only",)):
        code, out, _ = run(*FEW, "--dtype", "bfloat16", *flags)
        assert code == 0
        summary = summary_of(out)
        assert (summary["before"] or summary)["kl"] == 0


@pytest.mark.cuda
def test_a_run_on_a_gpu(run):
    code, out, _ = run(*FEW, "--device", "cuda")
    assert code == 0
    assert summary_of(out)["before"]["kl"] == pytest.approx(0, abs=1e-3)
    saved = AutoModelForCausalLM.from_pretrained(out / "final" / "actor", dtype="auto")
    assert saved.dtype == torch.bfloat16


# ---- what comes of the default run, and of others

OTHER_RUNS = {
    "default": (),
    "ppo": ("--algo", "ppo"),
    "adapters": (
        *("--lora_rank", "8", "--minibatch_size", "32"),
        *("--actor_lr", "9e-4", "--critic_lr", "2e-3"),
    ),
}


def train_side_by_side(folder: Path, flags_of: dict) -> dict[str, Path]:
    """Whole runs of the script as a user would start them, at once: {name: its folder}."""
    processes = {}
    for name, flags in flags_of.items():
        words = [sys.executable, "repo.py", "--device", "cpu", *flags]
        with open(folder / f"{name}.log", "w") as log:
            processes[name] = subprocess.Popen(
                [*words, "--output_dir", str(folder / name)],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    for name, process in processes.items():
        assert process.wait() == 0, (folder / f"{name}.log").read_text()
    return {name: folder / name for name in flags_of}


@pytest.fixture(scope="module")
def other_runs(tmp_path_factory, family):
    return train_side_by_side(tmp_path_factory.mktemp("runs"), OTHER_RUNS)


def test_the_default_run_makes_every_prompt_safe_without_refusing(half_runs):
    """Half of it does. Thresholds: see tiny_configs/README.md, worlds."""
    check_default_run(half_runs["repo"])


def check_default_run(folder) -> None:
    summary = summary_of(folder)
    reward = "reward_on_harmless_prompts"
    assert summary["safety_rate"] >= 0.95
    assert summary["prompts_fully_safe"] >= 0.9
    assert summary["judge_safety_rate"] >= 0.95
    assert summary["over_refusal_rate"] <= 0.1
    assert summary["refusal_rate_on_harmful_prompts"] >= 0.8  # it does not dodge
    assert summary[reward] > summary["before"][reward] + 1
    assert summary["peak_memory_mib"] < 1536


@pytest.mark.exhaustive
def test_the_whole_default_run_does(other_runs):
    check_default_run(other_runs["default"])


def test_bounding_the_mean_compensates(half_runs):
    """Thresholds: see tiny_configs/README.md, worlds."""
    summary = summary_of(half_runs["ppo_lag"])
    assert summary["cost"] <= 0
    assert summary["safety_rate"] <= 0.85


@pytest.mark.exhaustive
def test_bounding_nothing_leaves_what_is_harmful(other_runs):
    """Thresholds: see tiny_configs/README.md, worlds."""
    assert summary_of(other_runs["ppo"])["safety_rate_on_harmful_prompts"] <= 0.1


@pytest.mark.exhaustive
def test_the_run_with_adapters_becomes_safe(other_runs):
    """Thresholds: see tiny_configs/README.md, worlds."""
    summary = summary_of(other_runs["adapters"])
    reward = "reward_on_harmless_prompts"
    assert summary["safety_rate"] >= 0.95
    assert summary[reward] > summary["before"][reward]
