# pytest tests/test_numbers.py
"""Numbers that go bad: the update is left out, the batch is kept, and after some in a row the run
ends; policies that collapse."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import read_checkpoint, read_jsonl, write_policy, write_python
from test_run import FEW
from transformers import AutoModelForCausalLM

import repo
from plumbing import metrics
from plumbing.metrics import BadNumbers, collapse, cut_off, destruction, drift

FLAGS = (*FEW, "--save_every", 1, "--keep_checkpoints", 9, "--minibatch_size", 4)


# ---- making numbers bad


def spoiled(monkeypatch, what: str, steps: tuple, number=math.nan):
    """Makes one number of a kind bad in some steps (from 0)."""
    require_finite, begun = metrics.require_finite, []  # an item per step

    def bad_score(rollout):
        if rollout.reward_values is not None:  # an evaluation has none
            if what in ("reward", "cost") and len(begun) in steps:
                getattr(rollout, what)[1] = number
            begun.append(1)
        require_finite(rollout)

    def spoil(name, bad):
        function = getattr(repo, name)

        def bad_in_some_steps(model, *arguments):
            loss, statistics = function(model, *arguments)
            return loss + bad(model) if len(begun) - 1 in steps else loss, statistics

        monkeypatch.setattr(repo, name, bad_in_some_steps)

    monkeypatch.setattr(metrics, "require_finite", bad_score)
    if what == "gradient":  # a root has no finite slope at 0
        spoil("policy_loss", lambda model: (0 * next(model.parameters())).abs().sqrt().sum())
    if what in ("policy_loss", "value_loss"):
        spoil(what, lambda model: number)


def names(folder, pattern="*") -> set[str]:
    return {path.name for path in folder.glob(pattern)}


def bad_steps(out) -> list[bool]:
    return ["bad" in row for row in read_jsonl(out / "metrics.jsonl")]


# ---- one bad step


@pytest.mark.parametrize("number", [math.nan, -math.inf])
@pytest.mark.parametrize("name, source", metrics.SOURCES.items())
def test_a_rollouts_numbers_are_finite(name, source, number):
    numbers = {name: torch.zeros(2, 3) for name in metrics.SOURCES}
    rollout = SimpleNamespace(responses=["a", "b"], **numbers)
    metrics.require_finite(rollout)
    numbers[name][1, 2] = number
    with pytest.raises(BadNumbers, match=f"{source} gave {number}, .* to the response 'b'"):
        metrics.require_finite(rollout)


@pytest.mark.parametrize("what, number", [
    ("reward", -math.inf), ("cost", math.nan), ("gradient", math.nan),
    ("policy_loss", math.nan), ("value_loss", math.nan),
])
def test_the_update_is_left_out_and_the_batch_kept(run, monkeypatch, what, number):
    spoiled(monkeypatch, what, (1,), number)
    code, out, printed = run(*FLAGS, "--steps", 2)  # its second and last step is bad
    assert code == 0 and printed.count("the rest of this step is skipped") == 1

    rows, batch = read_jsonl(out / "metrics.jsonl"), read_jsonl(out / "bad-batch-2.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and bad_steps(out) == [False, True]
    assert len(batch) == 8
    assert all(set(row) >= {"prompt", "response", "reward", "cost"} for row in batch)
    if what in ("reward", "cost"):
        assert batch[1][what] == str(number) and isinstance(batch[0][what], float)
        assert f"--{what}_model gave {number}" in printed
    for name in ("bad-batch-2.jsonl", "metrics.jsonl"):
        assert "NaN" not in (out / name).read_text()

    # All is as the step before left it.
    tensors, numbers = read_checkpoint(out / "checkpoints" / "step-1")
    actor = AutoModelForCausalLM.from_pretrained(out / "final" / "actor").state_dict()
    assert all(torch.equal(actor[name], tensors[f"policy.{name}"]) for name in actor)
    summary = json.loads((out / "summary.json").read_text())
    assert numbers["lam"] == summary["lambda"] == rows[1]["lambda"]
    assert names(out / "checkpoints") == {"step-1"}


def test_one_bad_update_leaves_those_before_it(run, monkeypatch):
    """Of the two updates of step 2 the second is bad."""
    policy_loss, calls = repo.policy_loss, []

    def bad_at_last(*arguments):
        calls.append(1)
        loss, statistics = policy_loss(*arguments)
        return loss * (math.nan if len(calls) == 4 else 1), statistics

    monkeypatch.setattr(repo, "policy_loss", bad_at_last)
    code, out, printed = run(*FLAGS, "--micro_batch_size", 4, "--steps", 2)
    assert code == 0 and len(calls) == 4
    assert "step 2: actor_loss is nan in update 2 of 2; the rest of this step is skip" in printed
    actor = AutoModelForCausalLM.from_pretrained(out / "final" / "actor").state_dict()
    before, _ = read_checkpoint(out / "checkpoints" / "step-1")
    moved = [name for name in actor if "proj" in name]
    assert not any(torch.equal(actor[name], before[f"policy.{name}"]) for name in moved)
    assert all(tensor.isfinite().all() for tensor in actor.values())


def test_a_checkpoint_that_a_bad_step_has_missed_comes_after_the_next_good_one(run, monkeypatch):
    spoiled(monkeypatch, "gradient", (3,))
    code, out, printed = run(*FEW, "--steps", 6, "--save_every", 2, "--keep_checkpoints", 9)
    assert code == 0
    assert names(out / "checkpoints") == {"step-2", "step-5", "step-6"}
    assert "6 steps of repo (1 of them with bad numbers, left out) in" in printed


# ---- several in a row


def test_after_three_in_a_row_it_ends_with_code_3_and_goes_on_from_the_last_good_checkpoint(
    run, monkeypatch
):
    with monkeypatch.context() as patch:
        spoiled(patch, "cost", (0, 2, 3, 4))  # one alone does not count
        code, out, printed = run(*FLAGS, "--steps", 6)
    assert code == 3 and "Traceback" not in printed
    assert "error: stopped after 3 such steps in a row (--max_bad_steps)" in printed
    assert names(out, "bad-batch-*") == {f"bad-batch-{n}.jsonl" for n in (1, 3, 4, 5)}
    assert names(out / "checkpoints") == {"step-2"}
    assert not (out / "summary.json").exists()

    code, out, _ = run(*FLAGS, "--steps", 6, "--resume")
    assert code == 0
    assert names(out, "bad-batch-*") == {"bad-batch-1.jsonl"}  # of the steps that stand
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert bad_steps(out)[0]


def test_without_a_checkpoint_it_saves_what_it_has_before_it_ends(run, monkeypatch):
    flags = (*FEW, "--steps", 4, "--max_bad_steps", 2)
    with monkeypatch.context() as patch:
        spoiled(patch, "cost", (1, 2))
        code, out, printed = run(*flags)
    assert code == 3
    mend = f"mend the cause and --resume from {out}/checkpoints/step-3; a lower learning rate"
    assert mend in printed
    code, out, _ = run(*flags, "--resume")
    assert code == 0
    assert bad_steps(out) == [False, True, True, False]
    assert json.loads((out / "summary.json").read_text())["bad_steps"] == 2


# ---- a policy that collapses


def test_the_signs_of_a_collapse():
    assert collapse(["", " ", "\n"], 1.0) == "all 3 responses are empty"
    assert collapse(["no", "no"], 1.0) == "all 2 responses are the same, 'no'"
    assert collapse(["a", "b"], 0.004) == "its entropy is 0.004 nats per token"
    assert collapse(["a", "b"], 0.05) is None
    assert collapse(["no"], 0.05) is None


def test_a_collapsed_policy_is_warned_about_once(run, tmp_path, tokenizer):
    folder = write_policy(tmp_path / "mute", tokenizer)
    mute = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # hidden states of ones, of which only EOS wants any
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


# ---- warnings of what numbers alone do not stop

def test_an_update_is_destructive_above_either_limit():
    calm = {"clip_fraction": 0.5, "approx_kl": 1.0, "actor_lr": 3e-4}
    assert destruction(calm) is None
    for name, value in (("clip_fraction", 0.67), ("approx_kl", 64.0)):
        assert f"{name} is {value:.2f}" in destruction(calm | {name: value})
        assert "--actor_lr (0.0003)" in destruction(calm | {name: value})


@pytest.mark.parametrize("algo, reward, cost, warns", [
    ("repo", 50.0, 49.0, False), ("repo", -50.1, 0.0, True), ("repo", 0.0, 49.5, True),
    ("repo", 0.0, -60.0, False), ("ppo_lag", 0.0, -60.0, True), ("gate", 60.0, 0.0, False),
    ("ppo", 0.0, 60.0, False), ("ppo", 60.0, 0.0, True)])
def test_scores_that_the_equations_cut_off(algo, reward, cost, warns):
    """d is -1, so C - d is 1 more than C."""
    rollout = repo.Rollout(*[None] * 3, reward=torch.tensor([0.0, reward]),
                      cost=torch.tensor([-1.0, cost]))
    assert bool(cut_off(rollout, repo.Config(algo=algo, threshold=-1.0))) == warns


def verdicts(harmful: str, harmless: str) -> list[dict]:
    """R is a refusal, any other letter an answer."""
    return [{"refused": letter == "R", "harmful_prompt": is_harmful}
            for letters, is_harmful in ((harmful, True), (harmless, False)) for letter in letters]


def test_a_behaviour_is_gone_when_both_kinds_of_prompts_get_one():
    assert "all 8 responses refuse" in drift(verdicts("RRRR", "RRRR"))
    assert "none of the 8 responses refuses" in drift(verdicts("aaaa", "aaaa"))
    assert drift(verdicts("RRRR", "aaaa")) is None  # as it should be
    assert drift(verdicts("Raaa", "aaaa")) is None
    assert drift(verdicts("RRRRRRRR", "")) is None  # who knows what harmless ones would get
    assert drift(verdicts("RRR", "RRRR")) is None   # too few to tell


SHORT = ("--device", "cpu", "--steps", 2, "--batch_size", 8, "--sample_every", 1,
         "--max_eval_prompts", 2, "--eval_samples", 1)


def test_a_run_says_once_that_its_updates_destroy(run, tmp_path):
    """--actor_lr 1 does; the judge sees that no answer is left that refuses."""
    file = write_python(tmp_path / "judge.py", """
        def answers(prompts, responses):
            return [{"safe": True, "refused": False, "harmful_prompt": number % 2 == 0}
                    for number, _ in enumerate(prompts)]
    """)
    code, _, printed = run(*SHORT, "--actor_lr", 1, "--minibatch_size", 4,
                           "--judge", f"{file}:answers")
    assert code == 0, printed
    assert printed.count("the update went too far from the policy that sampled") == 1
    assert printed.count("none of the 8 responses refuses") == 1


def test_a_judge_that_does_not_know_the_training_prompts_ends_no_run(run, tmp_path, family):
    """It is asked about them for a warning only."""
    file = write_python(tmp_path / "judge.py", f"""
        held_out = open({str(family["eval_dataset"])!r}).read()

        def knows(prompts, responses):
            assert all(prompt in held_out for prompt in prompts)
            return [{{"safe": True, "refused": False, "harmful_prompt": False}} for _ in prompts]
    """)
    code, out, printed = run(*SHORT, "--judge", f"{file}:knows")
    assert code == 0, printed
    assert json.loads((out / "summary.json").read_text())["judge_safety_rate"] == 1
