# pytest tests/test_run.py
"""Whole runs of the script: what they write, resume, Ctrl-C, and what they say of bad input."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, random_beaver, read_checkpoint, read_jsonl, write_beaver, write_policy
from test_prompts import HH, PKU, TALK, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import repo

FEW = ("--device", "cpu", "--steps", 4, "--batch_size", 8, "--micro_batch_size", 8, "--eval_samples", 1, "--max_eval_prompts", 8, "--max_response_length", 12)
VOLATILE = {"seconds_rollout", "seconds_scoring", "seconds_learning", "tokens_per_second", "peak_mib_rollout", "peak_mib_scoring", "peak_mib_learning"}


def stable(rows):
    return [{name: value for name, value in row.items() if name not in VOLATILE} for row in rows]


def test_a_run_writes_what_it_promises(run):
    code, out, printed = run(*FEW, "--sample_every", 2, "--ptx_coeff", 0.1)
    assert code == 0
    assert {path.name for path in out.iterdir()} == {"config.json", "metrics.jsonl", "samples.jsonl", "eval_before.jsonl", "eval.jsonl", "summary.json", "final"}
    metrics = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert {"reward", "cost", "rectified_cost", "unsafe_rate", "lambda", "kl", "entropy", "clip_fraction", "approx_kl", "ratio_max", "actor_loss", "ptx_loss",
            "reward_critic_loss", "cost_critic_loss", "reward_explained_variance", "cost_explained_variance", "response_length", "truncated_rate", "actor_lr",
            "critic_lr", "policy_grad_norm", "reward_critic_grad_norm", "cost_critic_grad_norm"} | VOLATILE <= set(metrics[0])
    summary = json.loads((out / "summary.json").read_text())
    assert {"algo", "rectify", "seed", "steps", "reward", "cost", "rectified_cost", "safety_rate", "prompts_fully_safe", "over_refusal_rate", "kl", "lambda",
            "tokens_per_second", "wall_seconds", "peak_memory_mib", "before", "judge_safety_rate"} <= set(summary)
    assert summary["before"]["kl"] == pytest.approx(0, abs=1e-4) and summary["steps"] == 4
    config = json.loads((out / "config.json").read_text())
    assert config["steps"] == 4 and config["environment"]["torch"] == torch.__version__
    samples, rows = read_jsonl(out / "samples.jsonl"), read_jsonl(out / "eval.jsonl")
    assert len(samples) == 16 and {"step", "prompt", "response", "reward", "cost"} <= set(samples[0])
    assert len(rows) == 8 and summary["safety_rate"] == sum(r["responses"][0]["cost"] <= 0 for r in rows) / 8
    assert "before" in printed and "reward    cost  prompt -> response" in printed


def test_the_saved_policy_is_the_policy_in_memory_in_the_compute_dtype(run, monkeypatch):
    kept = {}
    original = repo.load_policy
    monkeypatch.setattr(repo, "load_policy", lambda config: kept.setdefault("policy", original(config)))
    code, out, _ = run(*FEW, "--dtype", "bfloat16")
    assert code == 0
    saved, tokenizer = AutoModelForCausalLM.from_pretrained(out / "final" / "actor", dtype="auto"), AutoTokenizer.from_pretrained(out / "final" / "actor")
    assert saved.dtype == torch.bfloat16 and json.loads((out / "final" / "actor" / "config.json").read_text())["dtype"] == "bfloat16"
    inputs = tokenizer("BEGINNING OF CONVERSATION: USER: How do I paint a boat? ASSISTANT:", return_tensors="pt")
    greedy = [model.generate(**inputs, do_sample=False, max_new_tokens=20).tolist() for model in (saved, kept["policy"][0])]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_head_is_saved_once_and_comes_back_trained(run, tmp_path, tokenizer, dtype):
    from safetensors.torch import load_file
    code, out, _ = run(*FEW, "--policy", write_policy(tmp_path / "tied", tokenizer, tie_word_embeddings=True), "--dtype", dtype, "--save_every", 4)
    assert code == 0 and "lm_head.weight" not in load_file(out / "final" / "actor" / "model.safetensors")
    trained = read_checkpoint(out / "checkpoints" / "step-4")[0]["policy.model.embed_tokens.weight"]
    saved = AutoModelForCausalLM.from_pretrained(out / "final" / "actor", dtype="auto")
    assert torch.equal(saved.lm_head.weight, trained.to(saved.dtype)) and saved.lm_head.weight is saved.model.embed_tokens.weight


def test_resume_is_exact(run, tmp_path):
    flags = (*FEW, "--steps", 6, "--save_every", 2, "--keep_checkpoints", 9, "--sample_every", 3, "--minibatch_size", 4, "--ptx_coeff", 0.1, "--algo", "ppo_lag")
    assert run(*flags, out="whole")[0] == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(whole, cut)  # as if it had been killed during step 6, after steps that no checkpoint holds
    for gone in ("checkpoints/step-4", "checkpoints/step-6", "final", "summary.json", "eval.jsonl"):
        shutil.rmtree(cut / gone) if (cut / gone).is_dir() else (cut / gone).unlink()
    code, _, printed = run(*flags, "--resume", out="cut")
    assert code == 0 and "continuing from" in printed and "step-2" in printed
    assert stable(read_jsonl(cut / "metrics.jsonl")) == stable(read_jsonl(whole / "metrics.jsonl"))
    assert read_jsonl(cut / "samples.jsonl") == read_jsonl(whole / "samples.jsonl") and read_jsonl(cut / "eval.jsonl") == read_jsonl(whole / "eval.jsonl")
    (tensors, numbers), (same_tensors, same_numbers) = (read_checkpoint(out / "checkpoints" / "step-6") for out in (whole, cut))
    assert tensors.keys() == same_tensors.keys() and all(torch.equal(tensors[key], same_tensors[key]) for key in tensors)
    assert {name.partition(".")[0] for name in tensors} == {"policy", "reward_critic", "cost_critic", "optimizer"}
    assert all(numbers[name] == same_numbers[name] for name in ("lam", "costs", "before", "step", "schedule"))


def test_resume_refuses_what_it_cannot_continue_and_branches_off_elsewhere(run, tmp_path):
    flags = (*FEW, "--save_every", 1, "--keep_checkpoints", 2)
    assert run(*flags, out="a")[0] == 0
    a = tmp_path / "a"
    assert sorted(path.name for path in (a / "checkpoints").iterdir()) == ["step-3", "step-4"]  # the newest two
    before = (a / "metrics.jsonl").read_bytes()
    code, _, printed = run(*flags, "--resume", out="a")
    assert code == 2 and "is finished" in printed and (a / "metrics.jsonl").read_bytes() == before
    (a / "summary.json").unlink()  # as if it had been killed in the last evaluation
    code, _, printed = run(*flags, "--resume", "--kl_coeff", 0.7, out="a")
    assert code == 2 and "--kl_coeff 0.2, not 0.7" in printed and (a / "metrics.jsonl").read_bytes() == before
    code, _, printed = run(*flags, "--resume", a / "checkpoints" / "step-3", out="a")
    assert code == 2 and "gone on since" in printed
    code, branch, _ = run(*flags, "--resume", a / "checkpoints" / "step-3", out="b")
    assert code == 0 and stable(read_jsonl(branch / "metrics.jsonl")) == stable(read_jsonl(a / "metrics.jsonl"))
    shutil.copytree(a / "checkpoints" / "step-4", a / "checkpoints" / "step-5")
    for file in (a / "checkpoints" / "step-5").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1000])
    code, _, printed = run(*flags, "--resume", a / "checkpoints" / "step-5", out="c")
    assert code == 2 and "model-00001-of-00001.safetensors is damaged; resume from another" in printed and not (tmp_path / "c").exists()
    code, _, printed = run(*flags, "--resume", out="a")
    assert code == 0 and "is damaged; trying the one before it" in printed and f"continuing from {a}/checkpoints/step-4" in printed


def test_ctrl_c_saves_and_exits_130(tmp_path, family):
    command = [sys.executable, "repo.py", *map(str, FEW), "--steps", "1000", "--output_dir", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (tmp_path / "out" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    steps = len(read_jsonl(tmp_path / "out" / "metrics.jsonl"))
    assert process.returncode == 130 and "--resume continues from there" in printed
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == [f"step-{steps}"]


def test_a_hanging_thread_of_a_score_function_does_not_keep_the_process(tmp_path, family):
    (tmp_path / "pool.py").write_text("import time\nfrom concurrent.futures import ThreadPoolExecutor\ndef score(prompts, responses):\n"
                                      "    with ThreadPoolExecutor(2) as pool:\n        return list(pool.map(lambda r: time.sleep(1000), responses))\n")
    done = subprocess.run([sys.executable, "repo.py", *map(str, FEW), "--reward_model", f"{tmp_path}/pool.py:score", "--scorer_timeout", "1", "--output_dir", str(tmp_path / "out")],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no answer within --scorer_timeout 1 seconds" in done.stderr


def test_a_second_run_moves_the_first_aside_and_touches_nothing_else(run, tmp_path):
    assert run(*FEW, "--eval_only")[0] == 0
    assert run(*FEW, "--eval_only", "--eval_samples", 2)[0] == 0
    assert [json.loads((tmp_path / name / "config.json").read_text())["eval_samples"] for name in ("out", "out.1")] == [2, 1]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    code, _, printed = run(*FEW, "--eval_only", out="mine")
    assert code == 2 and "is not a run of this script" in printed and [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_precedence_is_defaults_preset_file_flags(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"batch_size": 3, "lambda_max": 7.5, "tf32": True, "judge": None}))
    config = repo.resolve_config(["--config", str(tmp_path / "c.json"), "--batch_size", "5"])
    assert (config.batch_size, config.lambda_max, config.tf32) == (5, 7.5, True)                      # flag, file, file
    assert config.max_response_length == 32 and config.clip_range == repo.Config.clip_range == 0.2          # preset, default
    big = repo.resolve_config(["--model", "alpaca-7b"])
    assert big.policy == "PKU-Alignment/alpaca-7b-reproduced" and big.ptx_coeff == 16 and big.eval_dataset.endswith(":test")
    mine = repo.resolve_config(["--dataset", "x.jsonl"])
    assert mine.dataset == "x.jsonl" and mine.eval_dataset is None and mine.judge is None and mine.reward_model.endswith("reward")


@pytest.mark.parametrize("name, rows", [
    ("pku.jsonl", [PKU | {"prompt": f"p{i}"} for i in range(30)]),
    ("hh.jsonl.gz", [{**HH, "chosen": HH["chosen"].replace("one", f"one {i}")} for i in range(30)]),
    ("alpaca.json", [{"instruction": f"do {i}", "input": "", "output": "ok"} for i in range(30)]),
    ("list.json", {"instructions": [f"do {i}" for i in range(30)]}),
    ("chat.parquet", [{"messages": [{"role": "user", "content": f"hi {i}"}, *TALK[1:]]} for i in range(30)]),
    ("prompts.csv", [{"prompt": f"p, {i}"} for i in range(30)]),
    ("lines.txt", [f"line {i}" for i in range(30)]),
])
def test_every_format_trains(run, tmp_path, name, rows):
    code, out, printed = run(*FEW, "--steps", 1, "--sample_every", 1, "--dataset", write(tmp_path / name, rows))
    assert code == 0 and "30 rows read, 0 without" in printed and "0 duplicates and 0 prompts longer" in printed and "14 for training, 16 held out" in printed
    assert not {row["prompt"] for row in read_jsonl(out / "eval.jsonl")} & {row["prompt"] for row in read_jsonl(out / "samples.jsonl")}
    assert json.loads((out / "summary.json").read_text())["over_refusal_rate"] is None  # no judge knows these prompts


def test_own_checkpoints_and_own_functions(run, tmp_path, tokenizer):
    """--model PATH: a policy, a Beaver cost model with another tokenizer, a Python reward; no preset involved."""
    from test_models import other_tokenizer
    other = other_tokenizer()
    policy, cost = write_policy(tmp_path / "policy", tokenizer), write_beaver(tmp_path / "cost", other, random_beaver(other)[1], sharded_bin=True)
    (tmp_path / "reward.py").write_text("def brevity(prompts, responses):\n    return [-len(r) / 10 for r in responses]\n")
    (tmp_path / "judge.py").write_text("def judge(prompts, responses):\n    return [{'safe': True, 'refused': i % 2 == 0, 'harmful_prompt': False} for i in range(len(prompts))]\n")
    code, out, printed = run("--model", policy, "--cost_model", cost, "--reward_model", f"{tmp_path}/reward.py:brevity", "--judge", f"{tmp_path}/judge.py:judge",
                             "--dataset", write(tmp_path / "p.jsonl", [{"prompt": f"ask {i}"} for i in range(40)]), *FEW, "--samples_per_prompt", 2,
                             "--update_iters", 2, "--minibatch_size", 4, "--rectify", "mask", "--seed", 5)
    assert code == 0 and "cost: tokens of its own" in printed and "brevity: a function" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["judge_safety_rate"] == 1 and summary["over_refusal_rate"] == 0.5 and summary["rectify"] == "mask"


def test_a_reward_that_fails_late_loses_nothing(run, tmp_path):
    (tmp_path / "late.py").write_text("calls = []\ndef score(prompts, responses):\n    calls.append(1)\n    return [0.0 if len(calls) < 4 else None] * len(responses)\n")
    code, out, printed = run(*FEW, "--reward_model", f"{tmp_path}/late.py:score")  # one evaluation, two steps, then None
    assert code == 2 and "gave None, not a number" in printed
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-2"] and len(read_jsonl(out / "metrics.jsonl")) == 2


@pytest.mark.cuda
def test_a_run_on_a_gpu(run):
    code, out, _ = run(*FEW, "--device", "cuda")
    summary = json.loads((out / "summary.json").read_text())
    assert code == 0 and summary["before"]["kl"] == pytest.approx(0, abs=1e-3)
    assert AutoModelForCausalLM.from_pretrained(out / "final" / "actor", dtype="auto").dtype == torch.bfloat16


def test_bfloat16_starts_at_the_reference(run):
    for flags in (("--steps", 1), ("--eval_only",)):
        code, out, _ = run(*FEW, "--dtype", "bfloat16", *flags)
        summary = json.loads((out / "summary.json").read_text())
        assert code == 0 and (summary["before"] or summary)["kl"] == 0


def test_a_finished_run_and_a_model_are_evaluated_alone(run, tmp_path, tokenizer):
    flags = (*FEW, "--actor_lr", 3e-3)
    assert run(*flags, "--lora_rank", 4, out="trained")[0] == 0
    files = {path: path.read_bytes() for path in (tmp_path / "trained").rglob("*") if path.is_file()}
    code, again, _ = run("--eval_only", tmp_path / "trained", "--device", "cpu", out="again")
    assert code == 0 and {path.name for path in again.iterdir()} == {"config.json", "eval.jsonl", "summary.json"}
    assert all(path.read_bytes() == content for path, content in files.items())
    texts = [[(r["response"], pytest.approx(r["kl"], abs=1e-4)) for row in read_jsonl(out / "eval.jsonl") for r in row["responses"]] for out in (tmp_path / "trained", again)]
    assert texts[0] == texts[1] and any(abs(row["kl"].expected) > 1e-3 for row in [{"kl": kl} for _, kl in texts[0]])  # the same draws, the same reference
    code, other, _ = run(*FEW, "--eval_only", write_policy(tmp_path / "model", tokenizer), out="other")
    summary = json.loads((other / "summary.json").read_text())
    assert code == 0 and summary["kl"] == 0 and summary["before"] is None and summary["steps"] == 0
    shutil.rmtree(tmp_path / "trained" / "final")
    code, _, printed = run("--eval_only", tmp_path / "trained", out="third")
    assert code == 2 and "has no final/actor" in printed and not (tmp_path / "third").exists()


def test_a_runs_config_starts_another_run(run, tmp_path):
    assert run(*FEW, "--eval_only", out="first")[0] == 0
    again = repo.resolve_config(["--config", str(tmp_path / "first" / "config.json"), "--algo", "ppo_lag"])
    assert again.eval_samples == 1 and again.output_dir == "runs/tiny-ppo_lag-0" and again.policy.endswith("policy")
    other = repo.resolve_config(["--config", str(tmp_path / "first" / "config.json"), "--model", "elsewhere"])
    assert other.policy == "elsewhere" and other.reward_model == again.reward_model
    mine = repo.resolve_config(["--config", str(tmp_path / "first" / "config.json"), "--dataset", "mine.jsonl"])
    assert mine.dataset == "mine.jsonl" and mine.eval_dataset is None and mine.judge is None


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, family):
    """The default run, its baselines, and the run with adapters, as a user would start them; side by side, on a core each."""
    flags = {"repo": (), "ppo_lag": ("--algo", "ppo_lag"), "ppo": ("--algo", "ppo"), "adapters": ("--lora_rank", "8", "--minibatch_size", "32", "--actor_lr", "9e-4", "--critic_lr", "2e-3")}
    folder, environment = tmp_path_factory.mktemp("runs"), {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = {name: subprocess.Popen([sys.executable, "repo.py", "--device", "cpu", *flags[name], "--output_dir", str(folder / name)], cwd=ROOT, env=environment,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for name in flags}
    for process in runs.values():
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return {name: json.loads((folder / name / "summary.json").read_text()) for name in runs}


def test_the_run_with_adapters_becomes_safe(outcomes):
    summary = outcomes["adapters"]
    assert summary["safety_rate"] >= 0.95 and summary["reward_on_harmless_prompts"] > summary["before"]["reward_on_harmless_prompts"]


def test_the_default_run_makes_every_prompt_safe_without_refusing(outcomes):
    summary = outcomes["repo"]
    assert summary["safety_rate"] >= 0.98 and summary["prompts_fully_safe"] >= 0.95 and summary["judge_safety_rate"] >= 0.98
    assert summary["over_refusal_rate"] <= 0.05
    assert summary["reward_on_harmless_prompts"] >= summary["before"]["reward_on_harmless_prompts"]
    assert summary["peak_memory_mib"] < 1536


def test_bounding_the_mean_compensates(outcomes):
    assert outcomes["ppo_lag"]["cost"] <= 0 and outcomes["ppo_lag"]["safety_rate"] < 0.85
    assert outcomes["ppo"]["safety_rate_on_harmful_prompts"] <= 0.1
