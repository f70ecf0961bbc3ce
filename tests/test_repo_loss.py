# pytest tests/test_repo_loss.py
"""The Triton kernel of the rectified clipped loss, in the interpreter and, if any, on a GPU.

The tests of its equations are test_equations.py's.
"""
import itertools
import math

import pytest
import torch

from conftest import laid_out, tiny_config
from transformers import LlamaForCausalLM

import kernels
import repo
from plumbing.models import Head


def random_tokens(n, seed=0, dtype=torch.float32, device="cpu"):
    """log_probs, old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(n, generator=generator) * 8
    new = old + torch.randn(n, generator=generator) * 0.3
    reward, cost = torch.randn(2, n, generator=generator)
    lambdas, weight = torch.rand(2, n, generator=generator)
    per_token = new, old, reward, cost, lambdas * 4, weight / max(n, 1)
    return [tensor.to(device, dtype) for tensor in per_token]


def computed(per_token, clip_range, backend):
    """(loss, gradient, stats) on the CPU in float64."""
    log_probs, *data = per_token
    log_probs = log_probs.detach().requires_grad_()
    loss, stats = kernels.repo_loss(log_probs, *data, clip_range, backend=backend)
    assert loss.shape == ()
    assert all(value.shape == () and not value.requires_grad for value in stats.values())
    gradient, = torch.autograd.grad(loss, log_probs)
    assert gradient.dtype == log_probs.dtype
    stats = {key: value.cpu().double() for key, value in stats.items()}
    return loss.detach().cpu().double(), gradient.cpu().double(), stats


def check(per_token, device, clip_range=0.2):
    """Errors against float64 no larger than those of plain PyTorch in fp32.

    Plus a few units in the last place. Returns what `computed` does.
    """
    per_token = [tensor.to(device) for tensor in per_token]
    unchanged = [tensor.clone() for tensor in per_token]
    ours = computed(per_token, clip_range, "triton")
    plain = computed(per_token, clip_range, "reference")
    exact = computed([tensor.double() for tensor in per_token], clip_range, "reference")
    assert all(torch.equal(a, b) for a, b in zip(per_token, unchanged))

    unit = 8 * torch.finfo(torch.float32).eps
    scale = exact[1].abs().sum().clamp(min=1)
    assert (ours[0] - exact[0]).abs() <= (plain[0] - exact[0]).abs() + unit * scale

    gradient_unit = max(unit, torch.finfo(per_token[0].dtype).eps)
    error, plain_error = (ours[1] - exact[1]).abs(), (plain[1] - exact[1]).abs()
    assert (error <= plain_error + gradient_unit * exact[1].abs() + 1e-30).all()

    assert ours[2].keys() == exact[2].keys()
    for key, value in exact[2].items():
        error, plain_error = (ours[2][key] - value).abs(), (plain[2][key] - value).abs()
        assert error <= plain_error + unit * value.abs().clamp(min=1)
    return ours


@pytest.mark.parametrize("n", [0, 1, 7, 33, 2047, 2048, 2049, 10000])
@pytest.mark.parametrize("clip_range", [0.0, 0.2, 1.5])
def test_loss_gradient_and_stats_at_odd_sizes(device, n, clip_range):
    check(random_tokens(n), device, clip_range)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_fp32(device, dtype):
    check(random_tokens(100, dtype=dtype), device)


def test_every_edge_at_once(device):
    """Penalty, weight and advantages at 0 and of both signs, the ratio around the clip.

    That is at 1, and on both sides of both edges.
    """
    ratios = [1.0, 0.8 - 1e-4, 0.8 + 1e-4, 1.2 - 1e-4, 1.2 + 1e-4, 0.1, 10.0]
    table = itertools.product(
        [math.log(ratio) for ratio in ratios],  # log_probs
        [0.0, 2.0, -2.0],                       # reward_advantages
        [0.0, 1.0, -1.0],                       # cost_advantages
        [0.0, 0.5, 1e6],                        # lambdas
        [0.0, 1.0],                             # token_weight
    )
    new, reward, cost, lambdas, weight = torch.tensor(list(table)).unbind(1)
    _, gradient, stats = check([new, torch.zeros_like(new), reward, cost, lambdas, weight], device)
    assert stats["clip_fraction"].item() == pytest.approx(4 / 7)

    advantage = (reward - lambdas * cost) / (1 + lambdas)
    clipped = ((new > math.log(1.2)) & (advantage > 0)) | ((new < math.log(0.8)) & (advantage < 0))
    silent = clipped | (advantage == 0) | (weight == 0)
    assert torch.equal(gradient == 0, silent)
    # an advantage above 0 asks for a larger log-prob
    assert torch.equal(gradient * advantage < 0, ~silent)


def test_on_the_very_edge_the_gradient_is_whole(device):
    """clip_range 0 at rho = 1 is an edge that fp32 hits exactly.

    Both branches are equal there, and it counts as not clipped.
    """
    per_token = random_tokens(50)
    per_token[0] = per_token[1]
    _, gradient, stats = check(per_token, device, 0.0)
    _, _, reward, cost, lambdas, weight = (tensor.double() for tensor in per_token)
    expected = -weight * (reward - lambdas * cost) / (1 + lambdas)
    assert torch.allclose(gradient, expected, rtol=1e-5)
    assert stats["clip_fraction"] == 0


def test_a_cost_at_the_threshold_is_no_cost(device):
    """With the cost at d exactly, {C - d}+ is 0.

    As a return it adds nothing, and a lambdas of lambda * 1[C > d] is 0.
    """
    new, old, reward, cost, _, weight = random_tokens(20, device=device)
    rectified = repo.rectify(torch.full((20,), 1.5, device=device), threshold=1.5)
    assert not rectified.any()
    none = torch.zeros(20, device=device)
    with_it = computed([new, old, reward, cost * rectified, none, weight], 0.2, "triton")
    without = computed([new, old, reward, none, none, weight], 0.2, "triton")
    assert torch.equal(with_it[0], without[0])
    assert torch.equal(with_it[1], without[1])


def test_with_lambda_zero_the_loss_is_ppos(device):
    """lambda = 0: the cost has no say.

    PPO's own hand-computed case: ratios 2 and 1/2, A of both signs.
    """
    new = torch.tensor([2.0, 2.0, 0.5, 0.5], device=device).log()
    reward = torch.tensor([1.5, -2.0, 1.5, -1.0], device=device)
    weight = torch.full((4,), 0.25, device=device)
    zero = torch.zeros(4, device=device)
    loss, gradient, stats = computed([new, zero, reward, zero + 1e6, zero, weight], 0.2, "triton")
    assert loss.item() == pytest.approx(-(1.8 - 4 + 0.75 - 0.8) / 4)
    assert gradient.tolist() == pytest.approx([0.0, 1.0, -0.1875, 0.0])
    assert stats["ratio_max"].item() == pytest.approx(2.0)


def test_stats_are_of_the_tokens_alone(device):
    """Every ratio is 1/2; what fills the block up, with a ratio of 1, is not counted."""
    _, old, *others = random_tokens(5, device=device)
    _, _, stats = computed([old - math.log(2), old, *others], 0.2, "triton")
    assert stats["ratio_max"].item() == pytest.approx(0.5)
    assert stats["clip_fraction"].item() == pytest.approx(1.0)
    assert stats["approx_kl"].item() == pytest.approx(math.log(2) - 0.5)


def test_strided_and_expanded_inputs(device):
    new, old, reward, cost, lambdas, weight = random_tokens(2000, device=device)
    every_other = [tensor[::2] for tensor in (new, old, reward, cost)]
    strided = [*every_other, lambdas[:1].expand(1000), weight[::2]]
    a = computed(strided, 0.2, "triton")
    b = computed([tensor.clone() for tensor in strided], 0.2, "triton")
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_same_inputs_same_bits_and_two_backward_calls(device):
    per_token = random_tokens(10000, device=device)
    first, second = (computed(per_token, 0.2, "triton") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])

    new = per_token[0].requires_grad_()
    loss, _ = kernels.repo_loss(*per_token, backend="triton")
    (3 * loss).backward(retain_graph=True)
    assert torch.allclose(new.grad.cpu().double(), 3 * first[1])
    loss.backward()
    assert torch.allclose(new.grad.cpu().double(), 4 * first[1])


@pytest.mark.parametrize("which", range(6))
def test_a_nan_reaches_the_loss(device, which):
    per_token = random_tokens(3000, device=device)
    per_token[which][2500] = float("nan")
    loss, _, stats = computed(per_token, 0.2, "triton")
    assert loss.isnan()
    if which < 2:  # a log-prob, old or new: the ratio is one too
        assert stats["ratio_max"].isnan()
        assert stats["approx_kl"].isnan()


def test_only_log_probs_have_a_gradient(device):
    log_probs, *data = [x.requires_grad_() for x in random_tokens(20, device=device)]
    for backend in ("triton", "reference"):
        loss, _ = kernels.repo_loss(log_probs, *data, backend=backend)
        loss.backward()
        assert log_probs.grad is not None
        assert all(tensor.grad is None for tensor in data)


# ---- the script's own lines of (7) and (8), and the fused function in their place


@pytest.mark.parametrize("scale, soft_cap", [(1.0, 0.0), (0.5, 0.0), (1.0, 3.0)])
def test_script_and_kernel_give_the_same_loss_gradients_and_statistics(
    device, monkeypatch, tokenizer, scale, soft_cap
):
    torch.manual_seed(0)
    policy = LlamaForCausalLM(tiny_config(tokenizer)).to(device)
    policy.fused_head = Head(scale, soft_cap)
    batch = laid_out([[0, 4, 5], [0, 9]], [[7, 8, 1], [5, 1]])
    for name, value in list(vars(batch).items()):
        setattr(batch, name, value.to(device) if torch.is_tensor(value) else value)
    mask = batch.response_mask
    config = repo.Config(clip_range=0.2, temperature=0.7)
    with torch.no_grad():
        now = repo.response_log_probs(policy, batch, config.temperature)
    moved = now + torch.tensor([0.5, -0.5, 0.1, -0.1, 0.0], device=device)  # clipped, and not
    batch.log_probs = torch.zeros(2, 3, device=device).masked_scatter(mask, moved)
    batch.reward_advantages, batch.cost_advantages = torch.randn(2, 2, 3, device=device)
    batch.lambdas = torch.tensor([0.5, 3.0], device=device)
    weight = mask / mask.sum(1, keepdim=True) / 2

    results, used = [], []
    fused = repo.fused_policy_loss
    monkeypatch.setattr(repo, "fused_policy_loss", lambda *given: used.append(1) or fused(*given))
    for by_triton in (True, False):
        monkeypatch.setattr(repo, "runs_triton", lambda tensor, by_triton=by_triton: by_triton)
        policy.zero_grad()
        loss, statistics = repo.policy_loss(policy, batch, weight, config)
        loss.backward()
        results.append([loss.detach(), *(statistics[name] for name in sorted(statistics)),
                        *(parameter.grad.clone() for parameter in policy.parameters())])
    assert used == [1]
    for by_kernel, by_script in zip(*results):
        assert torch.allclose(by_kernel, by_script, rtol=1e-4, atol=1e-6)
