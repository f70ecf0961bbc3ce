# pytest tests/test_kernels.py
"""The four functions of the hot path, as their callers see them."""
import pytest
import torch

import kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 65), (2, 3, 1000), (4, 1), (0, 9)])
def test_gathered_log_probs_are_a_distribution(dtype, shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = [kernels.gather_log_probs(logits, torch.full(shape[:-1], v), 0.7) for v in range(shape[-1])]
    assert rows[0].dtype == torch.float32 and rows[0].shape == shape[:-1]
    assert torch.allclose(torch.stack(rows).exp().sum(0), torch.ones(shape[:-1]), atol=1e-5)


def test_temperature_and_hand_computed_log_probs():
    logits = torch.tensor([[0.0, 3.0 * torch.log(torch.tensor(3.0))]])  # at temperature 3: odds of 1 to 3
    assert kernels.gather_log_probs(logits, torch.tensor([1]), 3.0).exp().item() == pytest.approx(0.75)


def linear_inputs(n, h=8, v=33, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n)
    return (torch.randn(n, h, generator=generator, dtype=dtype).requires_grad_(), torch.randn(v, h, generator=generator, dtype=dtype).requires_grad_(),
            torch.randint(v, (n,), generator=generator))


@pytest.mark.parametrize("n", [0, 1, 1023, 1024, 1025])
def test_linear_log_probs_equal_gathering_from_all_logits(n):
    hidden, weight, targets = linear_inputs(n)
    chunked = kernels.linear_log_probs(hidden, weight, targets, 1.3)
    whole = kernels.gather_log_probs(hidden @ weight.T, targets, 1.3)
    upstream = torch.randn(n, dtype=torch.float64)
    assert torch.allclose(chunked, whole)
    for a, b in zip(torch.autograd.grad(chunked, (hidden, weight), upstream), torch.autograd.grad(whole, (hidden, weight), upstream)):
        assert torch.allclose(a, b, atol=1e-12)


def test_gradients_equal_finite_differences():
    hidden, weight, targets = linear_inputs(5, 3, 4)
    assert torch.autograd.gradcheck(lambda x, w: kernels.linear_log_probs(x, w, targets, 0.7), (hidden, weight))
    assert torch.autograd.gradcheck(lambda x: kernels.gather_log_probs(x, targets, 1.3), (torch.randn(5, 4, dtype=torch.float64, requires_grad=True),))


def test_linear_repo_loss_is_the_composition_and_detaches_its_log_probs():
    hidden, weight, targets = linear_inputs(20)
    others = [torch.rand(20, dtype=torch.float64) for _ in range(5)]
    loss, log_probs, stats = kernels.linear_repo_loss(hidden, weight, targets, *others, 0.2, 1.3)
    expected, expected_stats = kernels.repo_loss(kernels.linear_log_probs(hidden, weight, targets, 1.3), *others, 0.2)
    assert torch.equal(loss, expected) and not log_probs.requires_grad and stats == expected_stats
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))))


def test_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="backend='cuda'"):
        kernels.gather_log_probs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), backend="cuda")


@pytest.mark.cuda
def test_the_reference_on_a_gpu():
    logits, targets = torch.randn(33, 1000), torch.randint(1000, (33,))
    assert torch.allclose(kernels.gather_log_probs(logits.cuda(), targets.cuda()).cpu(), kernels.gather_log_probs(logits, targets), atol=1e-5)
