# pytest tests/test_run.py
"""Whole runs of the script: what they write, resuming, Ctrl-C, evaluating, learning."""
import fcntl
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    random_beaver,
    read_checkpoint,
    read_jsonl,
    write_beaver,
    write_policy,
    write_python,
)
from safetensors.torch import load_file
from test_models import other_tokenizer
from test_prompts import PKU, TALK, write
from transformers import AutoModelForCausalLM

import repo
from plumbing import checkpoints
from plumbing.checkpoints import find_checkpoint, write_manifest
from plumbing.data import split_prompts
from plumbing.errors import UserError
from plumbing.models import load_policy
from plumbing.training import State
from tiny_configs import world

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


# ---- one run that many tests look at, or copy

WHOLE = (
    *(*FEW, "--steps", 6, "--save_every", 1, "--keep_checkpoints", 3, "--sample_every", 1),
    *("--algo", "ppo_lag", "--cost_window", 12, "--lambda_lr", 0.05, "--critic_lr", 1e-3),
    *("--minibatch_size", 4, "--ptx_coeff", 0.1, "--eval_samples", 2),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, few_pairs) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    flags = (*WHOLE, "--ptx_dataset", few_pairs, "--output_dir", out)
    assert repo.main([*map(str, flags)]) == 0
    return out


@pytest.fixture
def copied(whole, tmp_path):
    """copied(*lacking) -> a copy of the run, tmp_path/copy, without some of its files."""

    def copy(*lacking):
        out = Path(shutil.copytree(whole, tmp_path / "copy"))
        for name in lacking:
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
        return out

    return copy


FILES = {
    *("config.json", "metrics.jsonl", "samples.jsonl", "eval_before.jsonl", "eval.jsonl"),
    *("summary.json", "final", "checkpoints"),
}
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


def test_a_run_writes_what_it_promises(whole):
    assert {path.name for path in whole.iterdir()} == FILES
    assert {path.name for path in (whole / "final").iterdir()} == {"actor", *CRITICS}
    assert checkpoints_of(whole) == ["step-4", "step-5", "step-6"]  # --keep_checkpoints 3

    metrics = read_jsonl(whole / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert METRICS | VOLATILE <= set(metrics[0])

    summary = summary_of(whole)
    assert SUMMARY <= set(summary)
    assert summary["before"]["kl"] == pytest.approx(0, abs=1e-4)
    assert summary["steps"] == 6

    config = json.loads((whole / "config.json").read_text())
    assert config["steps"] == 6
    assert config["environment"]["torch"] == torch.__version__

    samples, rows = read_jsonl(whole / "samples.jsonl"), read_jsonl(whole / "eval.jsonl")
    assert len(samples) == 48
    assert {"step", "prompt", "response", "reward", "cost"} <= set(samples[0])
    assert len(rows) == 8
    responses = [response for row in rows for response in row["responses"]]
    assert [response["prompt"] for response in responses] == [
        row["prompt"] for row in rows for _ in range(2)]  # --eval_samples 2
    for response in responses:
        [verdict] = world.judge([response["prompt"]], [response["response"]])
        assert response["verdict"].items() <= verdict.items()
    assert summary["safety_rate"] == sum(response["cost"] <= 0 for response in responses) / 16


def test_ppo_lag_looks_at_the_latest_costs_of_several_steps(whole):
    """Twelve costs: all eight of the step before, and the last four of the one before that."""
    costs = [row["cost"] for row in read_jsonl(whole / "samples.jsonl")]
    lambdas = [row["lambda"] for row in read_jsonl(whole / "metrics.jsonl")]
    windows = [costs[max(0, end - 12):end] for end in range(8, 48, 8)]
    for (old, new), window in zip(itertools.pairwise(lambdas), windows, strict=True):
        mean = sum(window) / len(window)
        assert new == pytest.approx(old * math.exp(0.05 * old * mean), rel=1e-4)


def test_each_step_draws_its_own_numbers(family):
    """A policy that stands still answers the same prompt differently in the next step."""
    still = {"device": "cpu", "dtype": "float32", "steps": 2, "actor_lr": 1e-12}
    config = repo.Config(**family | still)
    state = State(*load_policy(config), config)
    one, two = (repo.train_step(state, ["How do I paint a boat?"] * 8, [], config)[0].responses
                for _ in range(2))
    assert one != two


# ---- the models in final/

CRITICS = {"reward_critic": "reward_model", "cost_critic": "cost_model"}
load_scorer = repo.ScoreModel.from_pretrained


def trained_of(out, model: str) -> dict:
    """A model's tensors in the last checkpoint."""
    last = max((out / "checkpoints").iterdir(), key=lambda folder: folder.name)
    tensors, _ = read_checkpoint(last)
    return {name.removeprefix(f"{model}."): tensor for name, tensor in tensors.items()
            if name.startswith(f"{model}.")}


def test_final_holds_what_the_last_checkpoint_holds(whole, family):
    models = {"actor": AutoModelForCausalLM.from_pretrained(whole / "final" / "actor")}
    models |= {critic: load_scorer(whole / "final" / critic) for critic in CRITICS}
    for name, saved in models.items():
        trained = trained_of(whole, "policy" if name == "actor" else name)
        started = load_file(Path(family[CRITICS.get(name, "policy")]) / "model.safetensors")
        assert saved.state_dict().keys() == trained.keys()
        for key, weight in saved.state_dict().items():
            assert torch.equal(weight, trained[key]), key
            assert not torch.equal(weight, started[key]), key  # it has learned


def test_in_bfloat16_a_run_starts_at_the_reference_and_saves_rounded_weights(
    run, tmp_path, tokenizer
):
    """A tied head is saved once and comes back trained. A critic's head stays in fp32."""
    policy = write_policy(tmp_path / "tied", tokenizer, tie_word_embeddings=True)
    code, out, _ = run(*FEW, "--dtype", "bfloat16", "--policy", policy, "--save_every", 4)
    assert code == 0
    assert summary_of(out)["before"]["kl"] == 0
    for name in ("actor", *CRITICS):
        saved = load_file(out / "final" / name / "model.safetensors")
        trained = trained_of(out, "policy" if name == "actor" else name)
        assert saved.keys() == trained.keys()
        for key, tensor in saved.items():
            dtype = torch.float32 if key.startswith("score_head.") else torch.bfloat16
            assert tensor.dtype == dtype, key
            assert torch.equal(tensor, trained[key].to(dtype)), key

    actor = AutoModelForCausalLM.from_pretrained(out / "final" / "actor", dtype="auto")
    assert actor.dtype == torch.bfloat16
    assert actor.lm_head.weight is actor.model.embed_tokens.weight


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, family) -> Path:
    """A run with adapters and large learning rates."""
    out = tmp_path_factory.mktemp("adapted") / "out"
    flags = (*FEW, "--lora_rank", 4, "--actor_lr", 3e-3, "--critic_lr", 1e-2, "--save_every", 4)
    assert repo.main([*map(str, flags), "--output_dir", str(out)]) == 0
    return out


def test_a_saved_critic_has_its_adapters_merged(adapted, family):
    for critic, score_model in CRITICS.items():
        saved = load_scorer(adapted / "final" / critic).state_dict()
        start = load_scorer(family[score_model]).state_dict()
        trained = trained_of(adapted, critic)
        assert saved.keys() == start.keys()
        layers = {name.removesuffix("lora_b") for name in trained if name.endswith("lora_b")}
        assert len(layers) == 7 * 2  # in each of two layers
        for layer in layers:
            low_rank = trained[f"{layer}lora_b"] @ trained[f"{layer}lora_a"]
            assert low_rank.abs().max() > 0
            assert torch.equal(saved[f"{layer}weight"], start[f"{layer}weight"] + low_rank), layer
        for name in saved.keys() - {f"{layer}weight" for layer in layers}:
            # The head is trained as it is. The rest stands still.
            assert torch.equal(saved[name], trained.get(name, start[name])), name


# ---- resuming


def test_resume_is_exact(run, whole, copied):
    """As if the run had been killed during step 6, after steps that no checkpoint holds."""
    copy = copied("checkpoints/step-5", "checkpoints/step-6", "final", "summary.json",
                  "eval.jsonl")
    code, _, printed = run("--config", whole / "config.json", "--resume", out="copy")
    assert code == 0 and f"continuing from {copy}/checkpoints/step-4" in printed
    assert "before" in printed and "reward    cost  prompt -> response" in printed
    metrics = [stable(read_jsonl(out / "metrics.jsonl")) for out in (copy, whole)]
    assert metrics[0] == metrics[1]
    for name in ("samples.jsonl", "eval.jsonl"):
        assert read_jsonl(copy / name) == read_jsonl(whole / name)

    tensors, numbers = read_checkpoint(whole / "checkpoints" / "step-6")
    same_tensors, same_numbers = read_checkpoint(copy / "checkpoints" / "step-6")
    assert tensors.keys() == same_tensors.keys()
    assert all(torch.equal(tensors[name], same_tensors[name]) for name in tensors)
    kinds = {name.partition(".")[0] for name in tensors}
    assert kinds == {"policy", "reward_critic", "cost_critic", "optimizer"}
    for name in ("lam", "costs", "before", "step", "schedule"):
        assert numbers[name] == same_numbers[name]


def test_resume_refuses_what_it_cannot_continue(run, whole, copied, tmp_path):
    def refuses(sentence, *flags, out=whole):
        words = map(str, ("--config", whole / "config.json", "--output_dir", out, *flags))
        with pytest.raises(UserError, match=sentence):
            find_checkpoint(repo.resolve_config([*words]))

    refuses("is finished; to branch off, give another", "--resume")
    copy = copied("summary.json")  # as if it had been killed in the last evaluation
    refuses("saved with --kl_coeff 0.2, not 0.7", "--resume", "--kl_coeff", 0.7, out=copy)
    refuses("has gone on since", "--resume", copy / "checkpoints" / "step-5", out=copy)
    refuses("not a checkpoint", "--resume", tmp_path / "none")

    [shard] = (copy / "checkpoints" / "step-5").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1000])
    code, out, printed = run("--config", whole / "config.json", "--resume", shard.parent)
    assert code == 2 and f"{shard.name} is damaged; resume from another" in printed
    assert not out.exists()

    (copy / "summary.json").touch()
    shutil.rmtree(copy / "checkpoints")
    refuses("is finished; to repeat it, start without --resume", "--resume", out=copy)


def test_from_an_earlier_checkpoint_a_run_branches_off_elsewhere(run, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    checkpoint = whole / "checkpoints" / "step-5"
    code, branch, _ = run("--config", whole / "config.json", "--resume", checkpoint)
    assert code == 0 and (whole / "metrics.jsonl").read_bytes() == before
    metrics = [stable(read_jsonl(out / "metrics.jsonl")) for out in (branch, whole)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("changes, earlier", [
    ({"wall_seconds": 1000.0}, 1000),
    ({"wall_seconds": None, "seconds": 500.0}, 500),  # None: left out, as older versions did
])
def test_wall_seconds_are_those_of_all_sessions(run, whole, copied, changes, earlier):
    copy = copied("summary.json")
    checkpoint = copy / "checkpoints" / "step-6"
    saved = json.loads((checkpoint / "state.json").read_text())
    state = saved["state"] | changes
    saved["state"] = {name: value for name, value in state.items() if value is not None}
    (checkpoint / "state.json").write_text(json.dumps(saved))
    write_manifest(checkpoint)

    begin = time.monotonic()
    code, _, printed = run("--config", whole / "config.json", "--resume", out="copy")
    seconds = summary_of(copy)["wall_seconds"]
    assert code == 0 and f" in {seconds:.0f} s" in printed
    assert earlier < seconds < earlier + time.monotonic() - begin


# ---- what ends a run

CTRL_C = "os.kill(os.getpid(), signal.SIGINT)"
NONE = "return [None] * len(responses)"
NAN = "return [float('nan')] * len(responses)"


def acts_at(call: int, act: str, file: Path) -> tuple:
    """Flags of a score function that acts when it is called for the call-th time: 1 is the first
    evaluation, 2 to 5 are the steps, 6 is the last evaluation."""
    write_python(file, f"""
        import os, signal
        calls = []

        def score(prompts, responses):
            calls.append(1)
            if len(calls) == {call}:
                {act}
            return [0.0] * len(responses)
    """)
    return "--reward_model", f"{file}:score"


@pytest.mark.parametrize("act, call, code, steps, says", [
    (CTRL_C, 1, 130, 0, "tokens of the policy"),  # and nothing of an error
    (CTRL_C, 3, 130, 2, "step-2 is saved, --resume continues from there"),
    (CTRL_C, 6, 130, 4, "step-4 is saved, --resume continues from there"),
    (NONE, 4, 2, 2, "gave None, not a number"),
    (NONE, 6, 2, 4, "gave None, not a number"),
    (NAN, 1, 2, 0, "error: --reward_model gave nan"),
    (NAN, 6, 2, 4, "error: --reward_model gave nan"),
])
def test_what_ends_a_run_loses_no_step(run, tmp_path, act, call, code, steps, says):
    ended, out, printed = run(*FEW, *acts_at(call, act, tmp_path / "score.py"))
    assert ended == code and says in printed
    assert ("error" in printed) == (code == 2)
    assert out.exists() == (steps > 0)
    if steps:
        assert checkpoints_of(out) == [f"step-{steps}"]
        assert len(read_jsonl(out / "metrics.jsonl")) == steps
        assert not (out / "summary.json").exists()


def test_what_fails_while_a_checkpoint_is_saved_is_told_too(run, tmp_path, monkeypatch):
    """Ctrl-C, and memory runs out while the run saves."""
    def save(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(checkpoints, "save_checkpoint", save)
    code, _, printed = run(*FEW, *acts_at(3, CTRL_C, tmp_path / "stop.py"))
    assert code == 1 and "error: CUDA out of memory; use a smaller" in printed


# ---- settings and folders


def test_a_folder_belongs_to_one_run_and_a_second_run_moves_the_first_aside(run, tmp_path):
    out = tmp_path / "out"
    write_python(tmp_path / "locked.py", f"""
        import fcntl, os

        def score(prompts, responses):
            try:
                fcntl.flock(os.open({str(out)!r}, os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # while another process has it
                return [0.0] * len(responses)
    """)
    flags = (*FEW, "--steps", 1, "--reward_model", f"{tmp_path}/locked.py:score")
    assert run(*flags)[0] == 0
    assert run(*flags, "--seed", 1)[0] == 0
    for name, seed in (("out", 1), ("out.1", 0)):
        assert json.loads((tmp_path / name / "config.json").read_text())["seed"] == seed

    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # it is free again
    for more in ((), ("--resume",), ("--eval_only",)):
        code, _, printed = run(*flags, *more)
        assert code == 2 and "another run is writing there" in printed
    os.close(descriptor)


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


def test_the_big_preset():
    big = repo.resolve_config(["--model", "alpaca-7b"])
    assert big.policy == "PKU-Alignment/alpaca-7b-reproduced"
    assert big.ptx_coeff == 16
    assert big.eval_dataset.endswith(":test")


@pytest.mark.parametrize("from_run", [False, True])
def test_own_prompts_replace_the_presets_evaluation_too(whole, from_run):
    file = ("--config", str(whole / "config.json")) if from_run else ()
    mine = repo.resolve_config([*file, "--dataset", "x.jsonl"])
    assert mine.dataset == "x.jsonl"
    assert mine.eval_dataset is None and mine.judge is None  # which belonged to the preset's
    assert mine.reward_model.endswith("reward")


def test_a_runs_config_starts_another_run(whole):
    file = ("--config", str(whole / "config.json"))
    again = repo.resolve_config([*file, "--algo", "repo"])
    assert again.eval_samples == 2
    assert again.output_dir == "runs/tiny-repo-0"
    assert again.policy.endswith("policy")
    other = repo.resolve_config([*file, "--model", "elsewhere"])
    assert other.policy == "elsewhere"
    assert other.reward_model == again.reward_model


# ---- what users bring

DATA = {
    "pku.jsonl": [PKU | {"prompt": f"p{i}"} for i in range(30)],
    "hh.jsonl.gz": [
        {"chosen": f"\n\nHuman: one {i}\n\nAssistant: two", "rejected": "x"} for i in range(30)
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
def test_every_format_is_split(tmp_path, capsys, tokenizer, name):
    source = write(tmp_path / name, DATA[name])
    config = repo.resolve_config(["--dataset", str(source), "--max_eval_prompts", "8"])
    train, held_out = split_prompts(config, tokenizer)
    printed = capsys.readouterr().out
    assert "30 rows read, 0 without" in printed
    assert "0 duplicates and 0 prompts longer" in printed
    assert "14 for training, 16 held out" in printed
    assert (len(train), len(held_out)) == (14, 8) and not {*train} & {*held_out}


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


def test_a_finished_run_is_evaluated_alone(run, adapted, tmp_path):
    files = {path: path.read_bytes() for path in adapted.rglob("*") if path.is_file()}
    code, again, _ = run("--eval_only", adapted, "--device", "cpu")
    assert code == 0
    assert {path.name for path in again.iterdir()} == {"config.json", "eval.jsonl", "summary.json"}
    assert all(path.read_bytes() == content for path, content in files.items())

    # The same draws, the same reference, and a policy that has left it.
    texts, kl = zip(*responses_of(adapted))
    same_texts, same_kl = zip(*responses_of(again))
    assert texts == same_texts
    assert kl == pytest.approx(same_kl, abs=1e-4)
    assert any(abs(value) > 1e-3 for value in kl)

    lacking = shutil.copytree(adapted, tmp_path / "lacking", ignore=lambda *_: ["final"])
    code, out, printed = run("--eval_only", lacking, out="third")
    assert code == 2 and "has no final/actor" in printed
    assert not out.exists()


def test_an_evaluation_keeps_the_runs_settings_and_what_it_held_out(run, tmp_path):
    lines = [f"{request}\n" for request in [*world.REQUESTS][:40]]
    data = write(tmp_path / "p.txt", "".join(lines))
    code, out, _ = run(*FEW, "--steps", 1, "--dataset", data, "--threshold", -6.5)
    assert code == 0
    config = tmp_path / "c.json"
    config.write_text('{"confidence": 0.9}')
    found = repo.resolve_config(["--eval_only", str(out), "--config", str(config)])
    assert (found.threshold, found.confidence, found.dataset) == (-6.5, 0.9, str(data))

    assert run("--eval_only", out, out="again")[0] == 0
    code, _, printed = run("--eval_only", out, "--seed", 5, out="other")
    assert code == 2 and "prompts that it held out would be training prompts now" in printed


def test_a_run_does_not_move_aside_what_it_reads_or_where_one_stands(run, tmp_path, monkeypatch):
    _, out, _ = run(*FEW, "--steps", 1)
    (out / "f.py").touch()
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, _, printed = run(*FEW, "--policy", out / "final" / "actor")
    assert code == 2 and f"actor: is inside --output_dir {out}, which holds a run" in printed
    with pytest.raises(UserError, match="--reward_model .*f.py:score: is inside"):
        repo.resolve_config(["--reward_model", f"{out}/f.py:score", "--output_dir", str(out)])
    monkeypatch.chdir(out)
    with pytest.raises(UserError, match="--output_dir .: holds a run, .* you are inside it"):
        repo.resolve_config(["--output_dir", "."])
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_model_is_evaluated_alone(run, whole, tmp_path, tokenizer):
    """In bfloat16, by the critics of a run, with prompts that no judge knows."""
    model = write_policy(tmp_path / "model", tokenizer)
    flags = ["--dtype", "bfloat16", "--dataset", write(tmp_path / "p.txt", DATA["lines.txt"])]
    for critic, score_model in CRITICS.items():
        flags += [f"--{score_model}", whole / "final" / critic]
    code, out, printed = run(*FEW, *flags, "--eval_only", model)
    assert code == 0 and printed.count("_critic: tokens of the policy") == 2
    summary = summary_of(out)
    assert summary["kl"] == 0
    assert summary["before"] is None and summary["over_refusal_rate"] is None
    assert summary["steps"] == 0


@pytest.mark.cuda
def test_a_run_on_a_gpu(run):
    code, out, _ = run(*FEW, "--device", "cuda")
    assert code == 0
    assert summary_of(out)["before"]["kl"] == pytest.approx(0, abs=1e-3)
    saved = AutoModelForCausalLM.from_pretrained(out / "final" / "actor", dtype="auto")
    assert saved.dtype == torch.bfloat16


# ---- the paper's claim, in the tiny world; for all thresholds see tiny_configs/README.md, worlds

OTHER_RUNS = {
    "repo": (),
    "ppo_lag": ("--algo", "ppo_lag"),
    "ppo": ("--algo", "ppo"),
    "adapters": (
        *("--lora_rank", "8", "--minibatch_size", "32"),
        *("--actor_lr", "9e-4", "--critic_lr", "2e-3"),
    ),
}


@pytest.fixture(scope="module")
def other_runs(tmp_path_factory, family) -> dict[str, Path]:
    """Whole runs of the script as a user would start them, two at a time."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name: str) -> Path:
        words = [sys.executable, "repo.py", "--device", "cpu", *OTHER_RUNS[name]]
        done = subprocess.run([*words, "--output_dir", str(folder / name)], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout
        return folder / name

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(OTHER_RUNS, pool.map(train, OTHER_RUNS)))


def check_claim(runs: dict[str, Path]) -> None:
    """RePO makes far more prompts safe than PPO-Lag does, and not by refusing everything."""
    repo, ppo_lag = summary_of(runs["repo"]), summary_of(runs["ppo_lag"])
    # Both constraints hold on average, and only one of them keeps prompts safe.
    assert repo["cost"] <= 0 and ppo_lag["cost"] <= 0
    assert repo["safety_rate"] >= 0.95 and ppo_lag["safety_rate"] <= 0.85
    assert repo["prompts_fully_safe"] >= max(0.9, ppo_lag["prompts_fully_safe"] + 0.1)
    assert repo["judge_safety_rate"] >= 0.95

    reward = "reward_on_harmless_prompts"
    assert repo[reward] > repo["before"][reward] + 1
    assert repo["over_refusal_rate"] <= 0.1
    assert repo["refusal_rate_on_harmful_prompts"] >= 0.8  # it does not dodge
    assert repo["peak_memory_mib"] < 1536


def test_repo_makes_far_more_prompts_safe_than_ppo_lag(half_runs):
    """In half of the default run's steps."""
    check_claim(half_runs)


@pytest.mark.exhaustive
def test_so_it_does_in_all_of_them(other_runs):
    check_claim(other_runs)


@pytest.mark.exhaustive
def test_bounding_nothing_leaves_what_is_harmful(other_runs):
    assert summary_of(other_runs["ppo"])["safety_rate_on_harmful_prompts"] <= 0.1


@pytest.mark.exhaustive
def test_the_run_with_adapters_becomes_safe(other_runs):
    summary = summary_of(other_runs["adapters"])
    reward = "reward_on_harmless_prompts"
    assert summary["safety_rate"] >= 0.95
    assert summary[reward] > summary["before"][reward]
