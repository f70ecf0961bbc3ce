# pytest tests/test_repo_loss.py
"""The Triton kernel of the rectified clipped loss, in the interpreter and, where there is one, on a GPU; its equations' own tests are test_equations'."""
import itertools
import math

import pytest
import torch

import kernels


def random_tokens(n, seed=0, dtype=torch.float32):
    """log_probs, old_log_probs, reward_advantages, cost_advantages, penalty, token_weight."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(n, generator=generator) * 8
    new = old + torch.randn(n, generator=generator) * 0.3
    reward, cost = torch.randn(2, n, generator=generator)
    penalty, weight = torch.rand(2, n, generator=generator)
    return [tensor.to(dtype) for tensor in (new, old, reward, cost, penalty * 4, weight / max(n, 1))]


def computed(tokens, clip_range, backend):
    """(loss, gradient, stats) on the CPU in float64."""
    log_probs, *others = tokens
    log_probs = log_probs.detach().requires_grad_()
    loss, stats = kernels.repo_loss(log_probs, *others, clip_range, backend=backend)
    assert loss.shape == () and all(value.shape == () and not value.requires_grad for value in stats.values())
    gradient, = torch.autograd.grad(loss, log_probs)
    assert gradient.dtype == log_probs.dtype
    return loss.detach().cpu().double(), gradient.cpu().double(), {key: value.cpu().double() for key, value in stats.items()}


def check(tokens, device, clip_range=0.2):
    """Errors against float64 no larger than plain PyTorch's in fp32, plus a few units in the last place."""
    tokens = [tensor.to(device) for tensor in tokens]
    unchanged = [tensor.clone() for tensor in tokens]
    ours, plain, exact = (computed(some, clip_range, backend) for some, backend in
                          ((tokens, "triton"), (tokens, "reference"), ([tensor.double() for tensor in tokens], "reference")))
    assert all(torch.equal(a, b) for a, b in zip(tokens, unchanged))
    unit = 8 * torch.finfo(torch.float32).eps
    gradient_unit = max(unit, torch.finfo(tokens[0].dtype).eps)
    scale = exact[1].abs().sum().clamp(min=1)
    assert (ours[0] - exact[0]).abs() <= (plain[0] - exact[0]).abs() + unit * scale
    assert ((ours[1] - exact[1]).abs() <= (plain[1] - exact[1]).abs() + gradient_unit * exact[1].abs() + 1e-30).all()
    assert ours[2].keys() == exact[2].keys()
    for key, value in exact[2].items():
        assert (ours[2][key] - value).abs() <= (plain[2][key] - value).abs() + unit * value.abs().clamp(min=1)
    return ours


@pytest.mark.parametrize("n", [0, 1, 7, 33, 2047, 2048, 2049, 10000])
@pytest.mark.parametrize("clip_range", [0.0, 0.2, 1.5])
def test_loss_gradient_and_stats_at_odd_sizes(device, n, clip_range):
    check(random_tokens(n), device, clip_range)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_fp32(device, dtype):
    check(random_tokens(100, dtype=dtype), device)


def test_every_edge_at_once(device):
    """Penalty, weight and advantages at 0 and of both signs, the ratio at 1 and on both sides of both edges of the clip."""
    ratios = [1.0, 0.8 - 1e-4, 0.8 + 1e-4, 1.2 - 1e-4, 1.2 + 1e-4, 0.1, 10.0]
    table = itertools.product([math.log(ratio) for ratio in ratios], [0.0, 2.0, -2.0], [0.0, 1.0, -1.0], [0.0, 0.5, 1e6], [0.0, 1.0])
    new, reward, cost, penalty, weight = torch.tensor(list(table)).unbind(1)
    _, gradient, stats = check([new, torch.zeros_like(new), reward, cost, penalty, weight], device)
    assert stats["clip_fraction"].item() == pytest.approx(4 / 7)
    advantage = (reward - penalty * cost) / (1 + penalty)
    clipped = ((new > math.log(1.2)) & (advantage > 0)) | ((new < math.log(0.8)) & (advantage < 0))
    silent = clipped | (advantage == 0) | (weight == 0)
    assert torch.equal(gradient == 0, silent)
    assert torch.equal((gradient * advantage < 0), ~silent)  # an advantage above 0 asks for a larger log-prob


def test_on_the_very_edge_the_gradient_is_whole(device):
    """clip_range 0 at rho = 1 is an edge that fp32 hits exactly: both branches are equal there, and it counts as not clipped."""
    tokens = random_tokens(50)
    tokens[0] = tokens[1]
    loss, gradient, stats = check(tokens, device, 0.0)
    _, _, reward, cost, penalty, weight = (tensor.double() for tensor in tokens)
    assert torch.allclose(gradient, -weight * (reward - penalty * cost) / (1 + penalty), rtol=1e-5) and stats["clip_fraction"] == 0


def test_a_cost_at_the_threshold_is_no_cost(device):
    """With the cost at d exactly, {C - d}+ is 0: as a return it adds nothing, and a penalty of lambda * 1[C > d] is 0."""
    import repo
    new, old, reward, cost, _, weight = random_tokens(20)
    rectified = repo.rectify(torch.full((20,), 1.5), threshold=1.5)
    with_it = computed([tensor.to(device) for tensor in (new, old, reward, cost * rectified, torch.zeros(20), weight)], 0.2, "triton")
    without = computed([tensor.to(device) for tensor in (new, old, reward, torch.zeros(20), torch.zeros(20), weight)], 0.2, "triton")
    assert not rectified.any() and torch.equal(with_it[0], without[0]) and torch.equal(with_it[1], without[1])


def test_without_penalty_the_loss_is_ppos(device):
    """lambda = 0: the cost has no say. PPO's own hand-computed case: ratios 2 and 1/2, A of both signs."""
    new, old = torch.tensor([2.0, 2.0, 0.5, 0.5], device=device).log(), torch.zeros(4, device=device)
    reward, zero, weight = torch.tensor([1.5, -2.0, 1.5, -1.0], device=device), torch.zeros(4, device=device), torch.full((4,), 0.25, device=device)
    loss, gradient, stats = computed([new, old, reward, zero + 1e6, zero, weight], 0.2, "triton")
    assert loss.item() == pytest.approx(-(1.8 - 4 + 0.75 - 0.8) / 4)
    assert gradient.tolist() == pytest.approx([0.0, 1.0, -0.1875, 0.0])
    assert stats["ratio_max"].item() == pytest.approx(2.0)


def test_stats_are_of_the_tokens_alone(device):
    new, *others = (tensor.to(device) for tensor in random_tokens(5))
    _, _, stats = computed([others[0] - math.log(2), *others], 0.2, "triton")  # every ratio is 1/2; what fills the block up is not counted
    assert [stats[name].item() for name in ("ratio_max", "clip_fraction", "approx_kl")] == pytest.approx([0.5, 1.0, math.log(2) - 0.5])


def test_strided_and_expanded_inputs(device):
    new, old, reward, cost, penalty, weight = (tensor.to(device) for tensor in random_tokens(2000))
    strided = [tensor[::2] for tensor in (new, old, reward, cost)] + [penalty[:1].expand(1000), weight[::2]]
    a, b = computed(strided, 0.2, "triton"), computed([tensor.clone() for tensor in strided], 0.2, "triton")
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_same_inputs_same_bits_and_two_backward_calls(device):
    tokens = [tensor.to(device) for tensor in random_tokens(10000)]
    first, second = (computed(tokens, 0.2, "triton") for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    new = tokens[0].requires_grad_()
    loss, _ = kernels.repo_loss(*tokens, backend="triton")
    (3 * loss).backward(retain_graph=True)
    assert torch.allclose(new.grad.cpu().double(), 3 * first[1])
    loss.backward()
    assert torch.allclose(new.grad.cpu().double(), 4 * first[1])


@pytest.mark.parametrize("which", range(6))
def test_a_nan_reaches_the_loss(device, which):
    tokens = [tensor.to(device) for tensor in random_tokens(3000)]
    tokens[which][2500] = float("nan")
    loss, _, stats = computed(tokens, 0.2, "triton")
    assert loss.isnan() and (which > 1 or stats["ratio_max"].isnan() and stats["approx_kl"].isnan())


def test_only_log_probs_have_a_gradient(device):
    tokens = [tensor.to(device).requires_grad_() for tensor in random_tokens(20)]
    for backend in ("triton", "reference"):
        loss, _ = kernels.repo_loss(*tokens, backend=backend)
        loss.backward()
        assert tokens[0].grad is not None and all(tensor.grad is None for tensor in tokens[1:])
