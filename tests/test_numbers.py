# pytest tests/test_numbers.py
"""Numbers that go bad: the update is left out, the batch is kept, and after some in a row the run ends; policies that collapse."""
import json
import math

import pytest
import torch
from conftest import read_checkpoint, read_jsonl, write_policy
from test_run import FEW, stable
from transformers import AutoModelForCausalLM

import repo
from tiny_configs import checks

FLAGS = (*FEW, "--save_every", 1, "--keep_checkpoints", 9, "--minibatch_size", 4)


def spoiled(monkeypatch, what: str, steps: tuple, number=math.nan):
    """Makes one number of a kind bad in some steps (from 0)."""
    collect, now = repo.collect, []

    def remember(state, *arguments, **options):
        now[:] = [state.step]
        rollout, phases = collect(state, *arguments, **options)
        if what in ("reward", "cost", "log_probs", "ref_log_probs", "reward_values", "cost_values") and options.get("with_values", True) and state.step in steps:
            getattr(rollout, what)[1:2] = number
        return rollout, phases
    monkeypatch.setattr(repo, "collect", remember)
    if what in ("loss", "gradient"):
        policy_loss = repo.policy_loss

        def bad_loss(policy, batch, weight, config):
            loss, stats = policy_loss(policy, batch, weight, config)
            if now[0] in steps:
                one = next(policy.parameters()).flatten()[0]
                loss = loss + number if what == "loss" else loss + (0 * one).abs().sqrt()  # a root has no finite slope at 0
            return loss, stats
        monkeypatch.setattr(repo, "policy_loss", bad_loss)
    if what == "critic loss":
        value_loss = repo.value_loss
        monkeypatch.setattr(repo, "value_loss", lambda critic, batch, old, *more: value_loss(critic, batch, old + (number if now[0] in steps else 0), *more))


KINDS = ["reward", "cost", "log_probs", "ref_log_probs", "reward_values", "cost_values", "loss", "gradient", "critic loss"]


@pytest.mark.parametrize("what, number", [(what, math.nan) for what in KINDS] + [("reward", -math.inf), ("log_probs", -math.inf), ("loss", math.inf)])
def test_the_update_is_left_out_and_the_batch_kept(run, monkeypatch, what, number):
    spoiled(monkeypatch, what, (2,), number)
    code, out, printed = run(*FLAGS, "--steps", 3)  # its third and last step is bad
    assert code == 0 and printed.count("this update is left out") == 1
    rows, batch = read_jsonl(out / "metrics.jsonl"), read_jsonl(out / "bad-batch-3.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[2]["bad"] and "loss" not in rows[2] and not any("bad" in row for row in rows[:2])
    assert len(batch) == 8 and all(set(row) >= {"prompt", "response", "reward", "cost"} for row in batch)
    if what in ("reward", "cost"):
        assert batch[1][what] == str(number) and isinstance(batch[0][what], float) and f"--{what}_model gave {number}" in printed
    assert "NaN" not in (out / "bad-batch-3.jsonl").read_text() + (out / "metrics.jsonl").read_text()
    tensors, numbers = read_checkpoint(out / "checkpoints" / "step-2")
    actor = AutoModelForCausalLM.from_pretrained(out / "final" / "actor").state_dict()
    assert all(torch.equal(actor[name], tensors[f"policy.{name}"]) for name in actor)  # as the step before left it
    assert numbers["lam"] == json.loads((out / "summary.json").read_text())["lambda"] == rows[2]["lambda"]
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-1", "step-2"}


def test_after_three_in_a_row_it_ends_with_code_3_and_goes_on_from_the_last_good_checkpoint(run, tmp_path, monkeypatch):
    assert run(*FLAGS, "--steps", 6, out="whole")[0] == 0
    with monkeypatch.context() as patch:
        spoiled(patch, "cost", (0, 2, 3, 4))  # one alone does not count
        code, out, printed = run(*FLAGS, "--steps", 6)
    assert code == 3 and "error: stopped after 3 such steps in a row (--max_bad_steps)" in printed and "Traceback" not in printed
    assert {path.name for path in out.glob("bad-batch-*")} == {f"bad-batch-{n}.jsonl" for n in (1, 3, 4, 5)}
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-2"} and not (out / "summary.json").exists()
    code, out, _ = run(*FLAGS, "--steps", 6, "--resume")
    assert {path.name for path in out.glob("bad-batch-*")} == {"bad-batch-1.jsonl"}  # of the steps that stand
    assert code == 0 and [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert "bad" in read_jsonl(out / "metrics.jsonl")[0]
    with monkeypatch.context() as patch:
        spoiled(patch, "gradient", (3,))
        code, _, printed = run(*FLAGS, "--steps", 6, "--max_bad_steps", 1, out="one")
    assert code == 3 and "policy_grad_norm is nan" in printed
    assert run(*FLAGS, "--steps", 6, "--resume", out="one")[0] == 0  # with the bug gone, as if it had never been
    assert stable(read_jsonl(tmp_path / "one" / "metrics.jsonl")) == stable(read_jsonl(tmp_path / "whole" / "metrics.jsonl"))


def test_without_a_checkpoint_it_saves_what_it_has_before_it_ends(run, monkeypatch):
    with monkeypatch.context() as patch:
        spoiled(patch, "cost", (2, 3, 4))
        code, out, printed = run(*FEW, "--steps", 7)
    assert code == 3 and f"mend the cause and --resume from {out}/checkpoints/step-5; a lower learning rate" in printed
    code, out, _ = run(*FEW, "--steps", 7, "--resume")
    assert code == 0 and ["bad" in row for row in read_jsonl(out / "metrics.jsonl")] == [False, False, True, True, True, False, False]
    assert json.loads((out / "summary.json").read_text())["bad_steps"] == 3


def test_a_checkpoint_that_a_bad_step_has_missed_comes_after_the_next_good_one(run, monkeypatch):
    spoiled(monkeypatch, "cost", (3,))
    code, out, printed = run(*FEW, "--steps", 7, "--save_every", 2, "--keep_checkpoints", 9)
    assert code == 0 and sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-2", "step-5", "step-6"]
    assert "7 steps of repo (1 of them with bad numbers, left out) in" in printed


def test_one_bad_update_leaves_those_before_it(run, monkeypatch):
    """Of the two updates of step 3 the second is bad: the policy is neither what step 2 left, nor what both would make of it."""
    policy_loss, calls = repo.policy_loss, []

    def bad_at_last(*arguments):
        calls.append(1)
        loss, stats = policy_loss(*arguments)
        return loss * (math.nan if len(calls) == 6 else 1), stats
    whole = run(*FLAGS, "--micro_batch_size", 4, "--steps", 3, out="whole")[1]
    monkeypatch.setattr(repo, "policy_loss", bad_at_last)
    code, out, printed = run(*FLAGS, "--micro_batch_size", 4, "--steps", 3)
    assert code == 0 and "step 3: actor_loss is nan in update 2 of 2, and those before it stand; this update is left out" in printed and len(calls) == 6
    actor, both = (AutoModelForCausalLM.from_pretrained(folder / "final" / "actor").state_dict() for folder in (out, whole))
    before = read_checkpoint(out / "checkpoints" / "step-2")[0]
    assert not any(torch.equal(actor[name], before[f"policy.{name}"]) for name in actor if "proj" in name)
    assert all(tensor.isfinite().all() for tensor in actor.values()) and not all(torch.equal(actor[name], both[name]) for name in actor)


def test_before_anything_is_written_bad_numbers_are_bad_input(run, monkeypatch):
    monkeypatch.setattr(repo, "not_finite", lambda rollout: "the policy gave nan, not a finite number, to the response 'x'")
    code, out, printed = run(*FEW)
    assert code == 2 and "error: the policy gave nan" in printed and not out.exists()


def test_the_signs_of_a_collapse():
    assert checks.collapse(["", " ", "\n"], 1.0) == "all 3 responses are empty"
    assert checks.collapse(["no", "no"], 1.0) == "all 2 responses are the same, 'no'"
    assert checks.collapse(["a", "b"], 0.004) == "its entropy is 0.004 nats per token"
    assert checks.collapse(["a", "b"], 0.05) is checks.collapse(["no"], 0.05) is None


def test_a_collapsed_policy_is_warned_about_once(run, tmp_path, tokenizer):
    folder = write_policy(tmp_path / "mute", tokenizer)
    mute = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # hidden states of ones, of which only EOS wants any
        mute.model.norm.weight.zero_()
        mute.model.embed_tokens.weight.fill_(1.0)
        mute.model.norm.weight.fill_(1.0)
        for name, weight in mute.named_parameters():
            if "o_proj" in name or "down_proj" in name or "lm_head" in name:
                weight.zero_()
        mute.lm_head.weight[tokenizer.eos_token_id] = 1.0
    mute.save_pretrained(folder)
    code, _, printed = run(*FEW, "--policy", folder)
    assert code == 0 and printed.count("may have collapsed") == 1
    assert "warning: step 1: all 8 responses are empty; the policy may have collapsed" in printed
