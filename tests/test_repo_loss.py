# pytest tests/test_repo_loss.py
"""The Triton kernel of the rectified clipped loss against the reference in float64, in the
interpreter or on a GPU. test_equations.py tests the reference."""
import itertools
import math

import pytest
import torch

import kernels


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
    """Triton is no further from float64 than plain PyTorch in fp32. Returns Triton's results."""
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


@pytest.mark.parametrize("n", [0, 1, 33, 2048, 2049, 10000])
@pytest.mark.parametrize("clip_range", [0.0, 0.2, 1.5])
def test_loss_gradient_and_stats_at_odd_sizes(device, n, clip_range):
    check(random_tokens(n), device, clip_range)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_fp32(device, dtype):
    check(random_tokens(100, dtype=dtype), device)


def test_every_edge_at_once(device):
    """lambda, weight and advantages of 0 and both signs; ratios on both sides of each edge."""
    ratios = [1.0, 0.8 - 1e-4, 0.8 + 1e-4, 1.2 - 1e-4, 1.2 + 1e-4, 0.1, 10.0]
    table = itertools.product(
        [math.log(ratio) for ratio in ratios],  # log_probs
        [0.0, 2.0, -2.0],                       # reward_advantages
        [0.0, 1.0, -1.0],                       # cost_advantages
        [0.0, 0.5, 1e6],                        # lambdas
        [0.0, 1.0],                             # token_weight
    )
    new, reward, cost, lambdas, weight = torch.tensor(list(table)).unbind(1)
    _, _, stats = check([new, torch.zeros_like(new), reward, cost, lambdas, weight], device)
    assert stats["clip_fraction"].item() == pytest.approx(4 / 7)


def test_exactly_on_the_edge_the_gradient_is_whole(device):
    """With clip_range 0 and rho = 1 both branches are equal. That counts as not clipped."""
    per_token = random_tokens(50)
    per_token[0] = per_token[1]
    _, gradient, stats = check(per_token, device, 0.0)
    assert gradient.all() and stats["clip_fraction"] == 0


def test_stats_are_of_the_tokens_alone(device):
    """Every ratio is 1/2. The rest of the block, with ratio 1, is not counted."""
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
    if which < 2:  # a log-prob, old or new
        assert stats["ratio_max"].isnan()
        assert stats["approx_kl"].isnan()


def test_only_log_probs_have_a_gradient(device):
    log_probs, *data = [x.requires_grad_() for x in random_tokens(20, device=device)]
    for backend in ("triton", "reference"):
        loss, _ = kernels.repo_loss(log_probs, *data, backend=backend)
        loss.backward()
        assert log_probs.grad is not None
        assert all(tensor.grad is None for tensor in data)
