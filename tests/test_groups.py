# pytest tests/test_groups.py
"""--baseline group: a response beside the other responses to its prompt, and no critics."""

import itertools

import pytest
import torch
from conftest import read_checkpoint, read_jsonl
from test_run import FEW, stable

from repo import group_advantages

GROUPS = (*FEW, "--baseline", "group", "--batch_size", 4, "--samples_per_prompt", 2)


def test_three_responses_to_each_of_two_prompts():
    """By hand: the totals are 3, 1, 5 and 0, 4, 2, so the others' means 3, 4, 2 and 3, 1, 2."""
    rewards = torch.tensor([
        [1.0, 0.0, 2.0],
        [0.0, 1.0, 0.0],
        [5.0, 0.0, 0.0],
        [-1.0, 1.0, 0.0],
        [0.0, 0.0, 4.0],
        [0.5, 0.5, 1.0],
    ])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()
    by_hand = torch.tensor([
        [3 - 3.0, 2 - 3, 2 - 3],
        [1 - 4.0, 1 - 4, 0],
        [5 - 2.0, 0, 0],
        [0 - 3.0, 1 - 3, 0],
        [4 - 1.0, 4 - 1, 4 - 1],
        [2 - 2.0, 1.5 - 2, 1 - 2],
    ])
    assert torch.equal(group_advantages(rewards, mask, 3), by_hand)


def test_what_all_responses_to_a_prompt_earn_alike_changes_nothing():
    torch.manual_seed(0)
    rewards, mask = torch.randn(6, 5), torch.ones(6, 5).bool()
    richer = rewards.clone()
    richer[:3, -1] += 7.0
    advantages = group_advantages(rewards, mask, 3)
    assert torch.allclose(group_advantages(richer, mask, 3), advantages, atol=1e-5)


@pytest.mark.parametrize("group_size", [2, 3])
def test_its_policy_gradient_has_no_bias(group_size):
    """Three answers of one token: the expectation over all groups, each with its probability, is
    the gradient of the expected reward, by the definition of it."""
    logits = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    log_probs = logits.log_softmax(0)
    (wanted,) = torch.autograd.grad(log_probs.exp() @ reward, logits, retain_graph=True)

    surrogate = 0
    for answers in itertools.product(range(3), repeat=group_size):
        chosen = torch.tensor(answers)
        mask = torch.ones(group_size, 1).bool()
        advantages = group_advantages(reward[chosen, None], mask, group_size)[:, 0]
        probability = log_probs[chosen].sum().exp().detach()
        surrogate = surrogate + probability * (log_probs[chosen] * advantages).mean()
    (got,) = torch.autograd.grad(surrogate, logits)
    assert torch.allclose(got, wanted, atol=1e-12)


def test_a_run_has_no_critics_and_resumes_exactly(run):
    flags = (*GROUPS, "--actor_lr", 1e-3, "--save_every", 2)
    code, whole, _ = run(*flags, out="whole")
    assert code == 0
    assert [path.name for path in (whole / "final").iterdir()] == ["actor"]
    tensors, _ = read_checkpoint(whole / "checkpoints" / "step-4")
    owners = {name.removeprefix("optimizer.").partition(".")[0] for name in tensors}
    assert owners == {"policy"}
    rows = read_jsonl(whole / "metrics.jsonl")
    assert not [name for name in rows[0] if "variance" in name or "critic_loss" in name]
    assert all(row["policy_grad_norm"] > 0 for row in rows)

    code, again, _ = run(*flags, "--resume", whole / "checkpoints" / "step-2", out="again")
    assert code == 0
    assert stable(read_jsonl(again / "metrics.jsonl")) == stable(rows)
    same, _ = read_checkpoint(again / "checkpoints" / "step-4")
    assert all(torch.equal(same[name], tensor) for name, tensor in tensors.items())


def test_the_responses_to_a_prompt_stand_together(run):
    code, out, _ = run(*GROUPS, "--steps", 1, "--sample_every", 1)
    assert code == 0
    prompts = [row["prompt"] for row in read_jsonl(out / "samples.jsonl")]
    assert len(prompts) == 8 and prompts[::2] == prompts[1::2] and len(set(prompts)) == 4


def test_one_response_has_no_others(run):
    code, out, printed = run(*FEW, "--baseline", "group")
    assert code == 2 and not out.exists()
    assert "set --samples_per_prompt to 2 or more" in printed


def test_a_dry_run_plans_no_critics(run):
    needed = {}
    for baseline in ("critic", "group"):
        code, _, printed = run(*GROUPS, "--baseline", baseline, "--dry_run")
        assert code == 0
        assert (" critic  " in printed) == (baseline == "critic")
        (weights,) = [line for line in printed.splitlines() if line.startswith("weights   ")]
        needed[baseline] = float(weights.split()[1])
    assert needed["group"] < 0.7 * needed["critic"]
