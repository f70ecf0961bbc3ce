# pytest tests/test_equations.py
"""Equations (2) to (8): hand-computed numbers, definitions summed directly, and two paths to the
same loss."""

import ast
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import laid_out, read_checkpoint, read_jsonl
from test_models import PROMPTS, RESPONSES, write_architecture
from test_run import FEW

import repo
from plumbing import metrics
from plumbing.adapters import make_trainable, trainable
from plumbing.models import load_policy
from plumbing.training import State, make_schedule


def settings(**changes):
    return repo.Config(**{"algo": "repo", "lambda_lr": 0.1, "lambda_max": 5.0, **changes})


# ---- (3)


@pytest.mark.parametrize("changes, lam, costs, wanted", [
    ({}, 1.0, [2.0, -10.0, 1.0, -3.0], 1.075),  # {C}+ is 2, 0, 1, 0: mean 0.75
    ({"threshold": 1.5}, 1.0, [2.0, -10.0, 1.0, -3.0], 1.0125),  # {C - 1.5}+ is 0.5, 0, 0, 0
    ({}, 4.95, [2.0, -10.0, 1.0, -3.0], 5.0),
    ({}, 1.0, [-50.0, -1.0], 1.0),  # it never falls
    ({"algo": "ppo_lag"}, 2.0, [3.0, 1.0], 2 * math.exp(0.1 * 2 * 2)),
    ({"algo": "ppo_lag"}, 2.0, [4.0, -6.0], 2 * math.exp(0.1 * 2 * -1)),  # by compensation
    ({"algo": "ppo_lag", "threshold": 3.0}, 2.0, [3.0, 1.0], 2 * math.exp(0.1 * 2 * -1)),
    ({"algo": "ppo_lag", "lambda_lr": 100.0}, 4.0, [50.0], 5.0),  # without overflow
    ({"algo": "ppo"}, 2.0, [4.0], 0.0),
    ({"algo": "gate"}, 2.0, [4.0], 0.0),
])
def test_lambda_after_a_step(changes, lam, costs, wanted):
    found = repo.update_lambda(lam, torch.tensor(costs), settings(**changes))
    assert found == pytest.approx(wanted)


# ---- (2): which cost enters the returns, and which lambda_i the loss


@pytest.mark.parametrize(
    "algo, rectify, entering, weights",
    [
        ("repo", "return", [1.5, 0.0, 0.0], [3.0, 3.0, 3.0]),
        ("repo", "mask", [1.5, 0.0, -4.5], [3.0, 0.0, 0.0]),
        ("ppo_lag", "return", [1.5, 0.0, -4.5], [3.0, 3.0, 3.0]),
        ("ppo", "return", [1.5, 0.0, -4.5], [0.0, 0.0, 0.0]),
        ("gate", "return", [1.5, 0.0, -4.5], [0.0, 0.0, 0.0]),
    ],
)
def test_costs_and_lambdas(algo, rectify, entering, weights):
    config = settings(algo=algo, rectify=rectify, threshold=0.5)
    # The second costs as much as the threshold, and so it is safe.
    costs, lambdas = repo.costs_and_lambdas(torch.tensor([2.0, 0.5, -4.0]), 3.0, config)
    assert costs.tolist() == entering
    assert lambdas.tolist() == weights


@pytest.mark.parametrize("p", [0.9, 0.5, 0.2])
def test_return_estimates_the_gradient_and_mask_does_not(p):
    """One prompt, two responses of one token, exact critics. The safe one has R 1 and C -1, the
    unsafe one R 2 and C 1; lambda is 2 and pi(unsafe) = p. What matters is A(unsafe) - A(safe). By
    (2) it is (2 - 2) - 1 = -1."""
    reward, cost = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 1.0])
    zeros, mask = torch.zeros(2, 1), torch.ones(2, 1)
    differences = {}
    for rectify in ("return", "mask"):
        config = settings(rectify=rectify)
        cost_in_returns, lambdas = repo.costs_and_lambdas(cost, 2.0, config)
        rewards, costs = repo.shape_rewards_and_costs(
            reward, cost_in_returns, zeros, zeros, mask, 0.0)
        of_critics = [(1 - p) * scores[0] + p * scores[1] for scores in (rewards, costs)]
        values = [value.expand(2, 1) for value in of_critics]
        reward_advantages, _ = repo.gae(rewards, values[0], mask)
        cost_advantages, _ = repo.gae(costs, values[1], mask)
        new = torch.zeros(2, requires_grad=True)
        columns = new.detach(), reward_advantages[:, 0], cost_advantages[:, 0], lambdas
        loss, _ = loss_of(new, *columns, torch.ones(2))
        safe, unsafe = (-torch.autograd.grad(loss, new)[0]).tolist()  # at ratio 1: A
        differences[rectify] = unsafe - safe
    assert differences["return"] == pytest.approx(-1 / 3)  # away from the unsafe response: right
    assert differences["mask"] == pytest.approx(2 * p - 1)  # towards it, above one half


def loss_of(new, old, reward_advantages, cost_advantages, lambdas, weight, config=None):
    """policy_loss of responses of one token, given what it knows of each: six tensors [N]."""
    count = len(new)
    mask = torch.ones(count, 1).bool()
    batch = repo.Rollout(torch.zeros(count, 2).long(), torch.ones(count, 2), mask)
    batch.log_probs, batch.lambdas = old[:, None], lambdas
    batch.reward_advantages = reward_advantages[:, None]
    batch.cost_advantages = cost_advantages[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repo, "response_log_probs", lambda *_: new)
        policy = SimpleNamespace(fused_head=None)
        return repo.policy_loss(policy, batch, weight[:, None], config or settings())


# ---- (4) (5)


def test_scores_stand_at_the_last_response_token_and_beta_in_both():
    reward, cost = torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.0])
    log_probs = torch.tensor([[-1.0, -2.0, 9.0], [-1.0, 9.0, 9.0]])
    ref = torch.tensor([[-1.5, -1.0, 7.0], [-3.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    rewards, costs = repo.shape_rewards_and_costs(reward, cost, log_probs, ref, mask, kl_coeff=0.1)
    assert torch.allclose(rewards, torch.tensor([[-0.05, 3.1, 0.0], [-1.2, 0.0, 0.0]]))
    assert torch.allclose(costs, torch.tensor([[0.05, 1.9, 0.0], [0.2, 0.0, 0.0]]))


def test_token_scores_are_clamped_after_the_sum():
    reward, cost = torch.tensor([60.0]), torch.tensor([-90.0])
    zero, mask = torch.zeros(1, 1), torch.ones(1, 1)
    rewards, costs = repo.shape_rewards_and_costs(
        reward, cost, log_probs=zero + 40, ref_log_probs=zero, mask=mask, kl_coeff=0.5
    )
    assert rewards.item() == 40.0  # 60 - 20, not min(60, 50) - 20
    assert costs.item() == -50.0  # -90 + 20 is below


# ---- (6)


def random_batch(seed=0, shape=(5, 9)):
    """(rewards, values, mask), with responses of every length."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(shape, generator=generator, dtype=torch.float64)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
    return rewards, values, torch.arange(shape[1]) < lengths


def test_gae_is_the_direct_double_sum():
    rewards, values, mask = random_batch()
    gamma, lam = 0.97, 0.9
    advantages, returns = repo.gae(rewards, values, mask, gamma, lam)
    for row in range(len(mask)):
        length = int(mask[row].sum())
        r = rewards[row, :length].tolist()
        v = values[row, :length].tolist() + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            direct = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
            assert advantages[row, t].item() == pytest.approx(direct, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(direct + v[t], abs=1e-12)
    assert advantages[~mask].abs().sum() == 0
    assert returns[~mask].abs().sum() == 0


def test_gae_by_hand():
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 1.0]])
    advantages, returns = repo.gae(rewards, values, torch.ones(1, 2), gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[2.0, 1.0]]  # delta: 1.5, 1; A_1 = 1.5 + 0.5
    assert returns.tolist() == [[2.5, 2.0]]


def test_what_stands_outside_the_mask_changes_nothing():
    rewards, values, mask = random_batch(2)
    score = torch.ones(5, dtype=torch.float64)

    def all_results(rewards, values):
        shaped = repo.shape_rewards_and_costs(score, score, rewards, values, mask, 0.1)
        return *repo.gae(rewards, values, mask), *shaped

    beside = rewards.masked_fill(~mask, math.inf), values.masked_fill(~mask, math.nan)
    assert all(map(torch.equal, all_results(rewards, values), all_results(*beside)))


# ---- (7) (8)


def test_loss_by_hand():
    """Ratios 2, 2, 0.5, 0.5, 1, with A of both signs: only the pessimistic branch counts."""
    new = torch.tensor([2.0, 2.0, 0.5, 0.5, 1.0]).log().requires_grad_()
    old = torch.zeros(5)
    reward = torch.tensor([4.0, -4.0, 4.0, -4.0, 2.0])
    cost = torch.tensor([1.0, 0.0, 1.0, 0.0, -1.0])
    lambdas = torch.tensor([1.0, 1.0, 1.0, 3.0, 4.0])
    weight = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.5])
    # A = 3/2, -2, 3/2, -1, 6/5; terms min(2 A, 1.2 A) = 1.8, -4; min(0.5 A, 0.8 A) = 0.75, -0.8
    loss, stats = loss_of(new, old, reward, cost, lambdas, weight)
    assert loss.item() == pytest.approx(-(1.8 - 4 + 0.75 - 0.8) / 4 - 0.6, abs=1e-6)
    loss.backward()
    unclipped = [0.0, 0.25 * 2 * 2, -0.25 * 0.5 * 1.5, 0.0, -0.5 * 1.2]  # 0 where it is clipped
    assert new.grad.tolist() == pytest.approx(unclipped)
    assert stats["clip_fraction"].item() == pytest.approx(0.8)
    assert stats["ratio_max"].item() == pytest.approx(2.0)
    # rho - 1 - log rho: 1 - log 2 twice, log 2 - 0.5 twice, 0
    assert stats["approx_kl"].item() == pytest.approx(0.2)


def test_without_penalty_the_cost_has_no_say_and_with_a_huge_one_only_the_cost_has():
    torch.manual_seed(0)
    new, reward, cost, weight = torch.randn(4, 50)
    new, none, huge = 0.3 * new, torch.zeros(50), torch.full((50,), 1e12)
    assert torch.equal(loss_of(new, none, reward, cost, none, weight)[0],
                       loss_of(new, none, reward, 1e3 * cost, none, weight)[0])
    assert torch.allclose(loss_of(new, none, reward, cost, huge, weight)[0],
                          loss_of(new, none, -cost, cost, none, weight)[0])


def test_no_tokens_no_loss():
    empty = torch.zeros(0, requires_grad=True)
    loss, stats = loss_of(empty, *[torch.zeros(0)] * 5)
    loss.backward()
    assert loss.item() == 0
    assert all(value == 0 for value in stats.values())


def loss_gradients_and_statistics(loss_function, policy, batch, config) -> dict:
    weight = batch.response_mask / batch.response_mask.sum(1, keepdim=True) / len(batch.lambdas)
    policy.zero_grad()
    loss, statistics = loss_function(policy, batch, weight, config)
    loss.backward()
    gradients = {name: weight.grad.cpu() for name, weight in trainable(policy).items()}
    return {"loss": loss.detach().cpu(), **gradients,
            **{name: value.detach().cpu() for name, value in statistics.items()}}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's infinities
@pytest.mark.parametrize("name, rank, changes", [
    ("llama", 0, {}),
    ("llama", 2, {}),
    ("gemma2", 0, {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 0.5}),
    ("granite", 0, {"num_key_value_heads": 2, "logits_scaling": 0.25}),
])
def test_the_fused_path_is_the_scripts_own_lines(
    tmp_path, tokenizer, device, monkeypatch, name, rank, changes
):
    """Loss, gradients of all trained weights, and statistics: of the script's lines, of the same
    with whole logits, and of the fused loss by the reference and by Triton, which alone is chosen
    where Triton computes."""
    folder = str(write_architecture(tmp_path, tokenizer, name, **changes))
    config = repo.Config(policy=folder, device="cpu", dtype="float32", lora_rank=rank,
                         temperature=0.7, clip_range=0.1)
    policy, _ = load_policy(config)
    policy, head = make_trainable(policy, config), policy.fused_head
    batch = laid_out(PROMPTS, RESPONSES)
    mask = batch.response_mask
    with torch.no_grad():
        log_probs = repo.response_log_probs(policy, batch, config.temperature)
    batch.log_probs = torch.zeros(mask.shape).masked_scatter(mask, log_probs)
    batch.log_probs += torch.tensor([[0.05, 0.2, -0.2], [-0.05, -0.2, 0.0]])  # some are clipped
    batch.reward_advantages, batch.cost_advantages = torch.randn(2, *mask.shape)
    batch.lambdas = 2 * torch.rand(2)

    fused, chosen = repo.fused_policy_loss, []
    monkeypatch.setattr(repo, "fused_policy_loss", lambda *_: chosen.append(1) or fused(*_))
    results = {}
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        for way, function in (("script", repo.policy_loss), ("reference", fused)):
            results[way] = loss_gradients_and_statistics(function, policy, batch, config)
    assert not chosen
    policy.to(device)
    there = {key: value.to(device) for key, value in vars(batch).items() if value is not None}
    batch = repo.Rollout(**there)
    for way, its_head in (("Triton", head), ("whole logits", None)):
        policy.fused_head = its_head
        results[way] = loss_gradients_and_statistics(repo.policy_loss, policy, batch, config)
        assert len(chosen) == 1

    own = results.pop("script")
    assert 0 < own["clip_fraction"] < 1 and any(own[name].any() for name in trainable(policy))
    for way, others in results.items():
        assert others.keys() == own.keys()
        for key, value in own.items():
            assert torch.allclose(others[key], value, rtol=1e-4, atol=1e-6), (way, key)


# ---- rewards and costs


def test_each_advantage_is_taken_from_its_own_critic():
    """One response of one token: A^R = R - V^R and A^C = {C}+ - V^C; returns are R and {C}+."""
    rollout = repo.Rollout(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 1).bool())
    rollout.reward, rollout.cost = torch.tensor([4.0]), torch.tensor([3.0])
    rollout.log_probs = rollout.ref_log_probs = torch.zeros(1, 1)
    rollout.reward_values, rollout.cost_values = torch.tensor([[1.5]]), torch.tensor([[0.25]])
    repo.estimate_advantages(rollout, 2.0, settings(algo="repo"))
    assert rollout.reward_advantages.tolist() == [[2.5]]
    assert rollout.cost_advantages.tolist() == [[2.75]]
    assert rollout.reward_returns.tolist() == [[4.0]] and rollout.cost_returns.tolist() == [[3.0]]
    assert rollout.lambdas.tolist() == [2.0]


# ---- the gate


def test_the_gate_replaces_the_reward_of_unsafe_responses():
    """Three responses of one token and critics that say 0: the advantage is the reward, or -7."""
    rollout = repo.Rollout(torch.zeros(3, 2), torch.ones(3, 2), torch.ones(3, 1).bool())
    rollout.reward, rollout.cost = torch.tensor([4.0, 9.0, -1.0]), torch.tensor([-3.0, 0.5, 0.0])
    for name in ("log_probs", "ref_log_probs", "reward_values", "cost_values"):
        setattr(rollout, name, torch.zeros(3, 1))
    gate = settings(algo="gate", gate_penalty=7.0)
    repo.estimate_advantages(rollout, 0.0, gate)
    assert rollout.reward_advantages.tolist() == [[4.0], [-7.0], [-1.0]]
    assert rollout.lambdas.tolist() == [0.0, 0.0, 0.0]
    assert rollout.reward.tolist() == [4.0, 9.0, -1.0]  # as it is reported


# ---- critics


def test_ppo_moves_its_policy_as_ppo_lag_with_a_lambda_of_zero_which_has_a_cost_critic(family):
    states = {}
    for algo in ("ppo", "ppo_lag"):
        config = repo.Config(**family, algo=algo, lambda_init=0.0, device="cpu", dtype="float32",
                             steps=3, minibatch_size=4, max_response_length=8, actor_lr=1e-3)
        state = states[algo] = State(*load_policy(config), config)
        for _ in range(2):
            repo.train_step(state, repo.load_prompts(config.dataset)[:8], [], config)
    assert states["ppo"].cost_critic is None and states["ppo_lag"].cost_critic is not None
    for name, weight in trainable(states["ppo"].policy).items():
        assert torch.equal(weight, trainable(states["ppo_lag"].policy)[name]), name
        assert not torch.equal(weight, states["ppo"].reference.state_dict()[name]), name


@pytest.mark.parametrize("algo", ["ppo", "gate"])
def test_without_lambda_nothing_of_a_cost_critic_is_saved(run, algo):
    code, out, printed = run(*FEW, "--algo", algo, "--steps", 1, "--save_every", 1)
    assert code == 0, printed
    assert {path.name for path in (out / "final").iterdir()} == {"actor", "reward_critic"}
    tensors, _ = read_checkpoint(out / "checkpoints" / "step-1")
    (row,) = read_jsonl(out / "metrics.jsonl")
    assert "reward_critic_loss" in row and any("reward_critic" in name for name in tensors)
    assert not [name for name in [*tensors, *row] if "cost_critic" in name or "cost_ex" in name]


def test_value_loss_is_the_larger_of_plain_and_clipped(monkeypatch):
    values = torch.tensor([1.0, 12.0, 0.0, -12.0])
    monkeypatch.setattr(repo, "response_values", lambda critic, batch: values)
    batch = repo.Rollout(torch.zeros(1, 5), torch.ones(1, 5), torch.ones(1, 4).bool())
    old = torch.zeros(1, 4)
    returns = torch.tensor([[3.0, 11.0, 0.0, -10.0]])
    weight = torch.full((1, 4), 1 / 4)
    loss, _ = repo.value_loss(None, batch, weight, old, returns, settings())
    # (1-3)^2 = 4; the second moved by 12, clipped to 5: max((12-11)^2, (5-11)^2) = 36; the third
    # is exact; the last moved by -12, clipped to -5: max((-12+10)^2, (-5+10)^2) = 25
    assert loss.item() == pytest.approx(0.5 * (4 + 36 + 0 + 25) / 4)


def test_explained_variance():
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    mask = torch.tensor([[True, True, True, False]])
    their_mean = torch.tensor([[2.0, 2.0, 2.0, 0.0]])
    assert metrics.explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert metrics.explained_variance(torch.zeros(1, 4), returns, mask) == pytest.approx(0.0)
    assert metrics.explained_variance(their_mean, returns, mask) == pytest.approx(0.0)


# ---- what a step and its files tell


@pytest.fixture
def two_responses():
    """Of three tokens and of one; the first is as costly as the threshold, and so it is safe."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    rollout = repo.Rollout(torch.zeros(2, 4), torch.ones(2, 4), mask)
    rollout.prompts, rollout.responses = ["p", "q"], ["a", "b"]
    rollout.finished = torch.tensor([True, False])
    rollout.log_probs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]])
    rollout.ref_log_probs = torch.tensor([[-2.0, -2.0, -5.0], [-3.0, 0.0, 0.0]])
    rollout.entropy = torch.tensor([[0.5, 1.0, 1.5], [2.0, 99.0, 99.0]])
    rollout.reward, rollout.cost = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.5])
    rollout.rectified_cost = torch.tensor([0.0, 1.5])
    for name in ("reward_values", "cost_values", "reward_returns", "cost_returns"):
        setattr(rollout, name, torch.zeros(2, 3))
    return rollout


def test_a_steps_metrics_by_hand(two_responses):
    row = metrics.of_rollout(two_responses, settings(threshold=1.0))
    assert row["kl"] == pytest.approx((1 + 0 + 2 - 1) / 2)
    assert row["entropy"] == pytest.approx((0.5 + 1 + 1.5 + 2) / 4)
    assert row["unsafe_rate"] == 0.5 and row["rectified_cost"] == pytest.approx(0.75)
    assert row["response_length"] == 2 and row["truncated_rate"] == 0.5


def test_a_response_at_the_threshold_is_recorded_as_safe(two_responses):
    first, second = metrics.records(two_responses, threshold=1.0)
    assert first["safe"] and not second["safe"]
    assert (first["kl"], first["rectified_cost"], second["rectified_cost"]) == (3.0, 0.0, 1.5)


def test_a_steps_means_over_updates_and_over_tokens(two_responses):
    """Two passes over a response of three tokens and one of one, an update for each."""
    meter = metrics.Meter(two_responses, 4, settings(update_iters=2, device="cpu"))
    for loss, clip_fraction, ratio_max, tokens in (
        (1.0, 1.0, 2.0, 3), (2.0, 0.0, 5.0, 1), (3.0, 0.0, 1.0, 3), (6.0, 1.0, 3.0, 1),
    ):
        statistics = {"clip_fraction": clip_fraction, "approx_kl": 0.5, "ratio_max": ratio_max}
        statistics = {name: torch.tensor(value) for name, value in statistics.items()}
        meter.add("actor_loss", loss, statistics, tokens)
        meter.add_norm("policy_grad_norm", 2 * loss)
        meter.end_update()
    assert meter.results() == pytest.approx({
        "actor_loss": 3.0, "policy_grad_norm": 6.0, "clip_fraction": 0.5, "approx_kl": 0.5,
        "ratio_max": 5.0})


# ---- the optimiser


def test_the_rates_of_ten_and_of_a_hundred_steps():
    """Warm-up of 3 %: three of a hundred steps, none of ten."""
    weight = torch.nn.Parameter(torch.zeros(1))
    rates = {}
    for steps in (10, 100):
        groups = [{"params": [weight.detach().clone()]} for _ in range(3)]
        optimizer = torch.optim.SGD(groups, lr=8.0)
        schedule = make_schedule(optimizer, steps)
        rates[steps] = []
        for _ in range(steps):
            rates[steps].append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
        assert schedule.get_last_lr() == [0.0, 0.0, 8.0]

    of_policy = [matrices for matrices, vectors, _ in rates[100]]
    assert of_policy[:4] == [2.0, 4.0, 6.0, 8.0]
    assert of_policy[3] == max(of_policy) and of_policy[3:] == sorted(of_policy[3:], reverse=True)
    assert rates[10][0][0] == 8.0 and rates[10][5][0] == pytest.approx(4.0)  # half-way: half of it
    assert of_policy == [vectors for _, vectors, _ in rates[100]]
    assert {critics for _, _, critics in rates[100]} == {8.0}


def test_only_the_policys_matrices_decay(family):
    """A step without gradients, but with all of them zero: what moves has decayed."""
    config = repo.Config(**family, device="cpu", dtype="float32", steps=3,
                         actor_lr=0.1, critic_lr=0.3)
    state = State(*load_policy(config), config)
    before = {}
    for model in state.trained:
        for name, weight in trainable(getattr(state, model)).items():
            weight.grad = torch.zeros_like(weight)
            before[model, name] = weight.detach().clone()
    state.optimizer.step()
    for (model, name), old in before.items():
        new = trainable(getattr(state, model))[name]
        if model == "policy" and new.ndim == 2:
            assert torch.allclose(new, old * (1 - 0.1 * 0.01)), name
        else:
            assert torch.equal(new, old), (model, name)
    assert {new.ndim for new in trainable(state.policy).values()} == {1, 2}
    assert state.optimizer.param_groups[-1]["lr"] == 0.3


# ---- the script as a text

SOURCE = Path(repo.__file__).read_text()
FUNCTIONS = {
    node.name: node for node in ast.parse(SOURCE).body if isinstance(node, ast.FunctionDef)
}
PLACES = {  # where an equation is named, and from (3) on computed
    1: "costs_and_lambdas", 2: "costs_and_lambdas", 3: "update_lambda",
    4: "shape_rewards_and_costs", 5: "shape_rewards_and_costs", 6: "gae",
    7: "policy_loss", 8: "policy_loss",
}


@pytest.mark.parametrize("number", PLACES)
def test_an_equation_is_named_in_one_docstring_and_at_the_line_that_computes_it(number):
    named = [name for name, function in FUNCTIONS.items()
             if f"({number})" in (ast.get_docstring(function) or "")]
    assert named == [PLACES[number]]
    function = FUNCTIONS[named[0]]
    lines = SOURCE.splitlines()[function.body[1].lineno - 1:function.end_lineno]
    marked = sum(f"({number})" in line.rpartition("#")[2] for line in lines)
    assert marked == (number > 2)


@pytest.mark.parametrize("first, last", [
    ("generate", "collect"),
    ("rectify", "gae"),
    ("update_lambda", "policy_loss"),
    ("train_step", "update"),
])
def test_each_part_of_the_method_fits_a_screen(first, last):
    assert FUNCTIONS[last].end_lineno - FUNCTIONS[first].lineno + 1 <= 60


def test_the_sections_stand_in_order():
    numbers = re.findall(r"^# ==== (\d+)  ", SOURCE, re.M)
    assert numbers == [str(n) for n in range(1, 8)]
    assert max(map(len, SOURCE.splitlines())) <= 100  # the paper fits beside it
