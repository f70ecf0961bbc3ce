# pytest tests/test_operators.py
"""The Triton path as operators of PyTorch: under torch.compile, and what the same logits give."""
from functools import partial

import pytest
import torch
from conftest import exhaustive, grid
from test_linear import head, token_data

import kernels
from kernels import linear, linear_loss, log_prob, objective
from kernels.reference import gather_log_probs as exact_log_probs

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
CHUNK = 4
N, V, H = 2 * CHUNK + 3, 65, 16


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(linear, "rows_per_chunk", lambda *_: CHUNK)


# ---- what PyTorch asks of an operator: schemas, shapes without content, gradients, tracing

CHEAP = "test_schema", "test_autograd_registration", "test_faketensor"


@pytest.mark.parametrize("checks", [CHEAP, exhaustive((*CHEAP, "test_aot_dispatch_dynamic"))])
def test_operators_keep_their_word(device, monkeypatch, checks):
    hidden, weight, targets = head(N, V, H, device=device)
    logits = (hidden @ weight.T).detach()
    per_token = token_data(N, device)
    log_probs = torch.randn(N, device=device)
    for tensor in (hidden, weight, logits, log_probs):
        tensor.requires_grad_()
    settings = 0.7, 30.0, torch.float32

    check = partial(torch.library.opcheck, test_utils=checks)
    check(log_prob.gather_op, (logits, targets, 0.7, True))
    check(log_prob.gather_op, (logits[:, 1:-1], targets.clamp(max=9), 0.7, False))
    check(objective.loss_op, (log_probs, *per_token, 0.2))
    check(linear.linear_op, (hidden, weight, targets, *settings, True, True))
    for weight_learns, split in ((True, "whole"), (False, "whole"), (True, "even")):
        monkeypatch.setattr(linear, "SPLIT", split)
        everything = hidden, weight, targets, *per_token, 0.2, *settings, True, weight_learns
        check(linear_loss.loss_op, everything)

    three = [torch.randn(N, device=device) for _ in range(3)]
    fixed, x, w = (tensor.detach() for tensor in (logits, hidden, weight))
    check(log_prob.gather_backward_op, (three[0], fixed, targets, 0.7, *three))
    check(linear.linear_backward_op, (three[0], x, w, targets, *settings, True, True, True, *three))


def update(backend):
    """The loss of a policy's update with its own log-probs before, and something around both."""
    def step(hidden, weight, targets, *per_token):
        states = hidden.tanh()
        old, entropy = kernels.linear_log_probs(
            states, weight, targets, 0.7, return_entropy=True, backend=backend,
        )
        loss, log_probs, stats = kernels.linear_repo_loss(
            states, weight, targets, old.detach() + 0.1, *per_token, 0.2, 0.7, backend=backend,
        )
        gathered = kernels.gather_log_probs(states @ weight.T, targets, 0.7, backend=backend)
        other, _ = kernels.repo_loss(gathered, old.detach(), *per_token, backend=backend)
        return 2 * loss + other + old.mean(), log_probs, entropy, stats["approx_kl"]

    return step


def results(step, hidden, weight, *rest):
    hidden, weight = (tensor.detach().clone().requires_grad_() for tensor in (hidden, weight))
    outputs = step(hidden, weight, *rest)
    gradients = torch.autograd.grad(outputs[0], (hidden, weight))
    return [tensor.detach() for tensor in (*outputs, *gradients)]


@pytest.mark.parametrize("backend, dynamic, compiler", grid(
    ["triton", "reference"],
    [False, True],
    ["aot_eager", "inductor"],
    telling=[("triton", True, "aot_eager")],
))
def test_a_compiled_update_gives_the_same_numbers(device, tmp_path, monkeypatch, backend, dynamic,
                                                  compiler):
    # Elsewhere there may be a graph with chunks of another length, which is no part of its name.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inputs = *head(N, V, H, device=device), *token_data(N, device)[1:]
    torch.compiler.reset()
    compiled = torch.compile(update(backend), backend=compiler, fullgraph=True, dynamic=dynamic)
    for a, b in zip(results(update(backend), *inputs), results(compiled, *inputs), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    if dynamic:  # another number of tokens, and of chunks, is no reason to compile anew
        with torch.compiler.set_stance("fail_on_recompile"):
            fewer = *head(N - 5, V, H, device=device), *token_data(N - 5, device)[1:]
            results(compiled, *fewer)


def test_second_derivatives_are_refused(device):
    """They would be wrong: a gradient made in the forward is data."""
    hidden, weight, targets = head(N, V, H, device=device)
    hidden.requires_grad_(), weight.requires_grad_()
    log_probs = torch.randn(N, device=device, requires_grad=True)
    settings = {"backend": "triton"}
    for value, of in (
        (kernels.linear_log_probs(hidden, weight, targets, **settings).sum(), hidden),
        (kernels.linear_repo_loss(
            hidden, weight, targets, *token_data(N, device), **settings)[0], hidden),
        (kernels.repo_loss(log_probs, *token_data(N, device), **settings)[0], log_probs),
        (kernels.gather_log_probs(hidden, targets % H, **settings).sum(), hidden),
    ):
        gradient, = torch.autograd.grad(value ** 2, of, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.sum().backward()


# ---- the same logits, the same bits

@pytest.mark.parametrize("v, dtype", grid(
    [1, 64, 65, 1000, 9000, 32001],
    [torch.float32, torch.bfloat16, torch.float16],
    telling=[(65, torch.float32), (9000, torch.bfloat16)],
))
def test_log_probs_of_the_same_logits_are_the_same_bits(device, v, dtype):
    """From logits in rows as padded as a chunk's, from one chunk, from several, with the loss; and
    so the ratio of an unchanged policy is 1."""
    hidden, weight, targets = head(N, v, H, dtype=dtype, device=device)
    expected = torch.cat([
        kernels.gather_log_probs(logits, targets[rows], 0.7, backend="triton")
        for rows, logits in linear.chunks(hidden, weight, weight_learns=True)
    ])
    old, _ = kernels.linear_log_probs(
        hidden, weight, targets, 0.7, return_entropy=True, backend="triton",
    )
    assert torch.equal(old, expected)

    hidden.requires_grad_(), weight.requires_grad_()
    rest = [old, *token_data(N, device)[1:]]
    _, log_probs, stats = kernels.linear_repo_loss(
        hidden, weight, targets, *rest, 0.2, 0.7, backend="triton",
    )
    assert torch.equal(log_probs, expected)
    assert stats["ratio_max"] == 1 and stats["approx_kl"] == 0 and stats["clip_fraction"] == 0
    _, stats = kernels.repo_loss(log_probs, *rest, backend="triton")
    assert stats["ratio_max"] == 1 and stats["approx_kl"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_same_alignment_give_the_same_bits_wherever_they_lie(device, dtype):
    """The same row at every 8th place of a batch in which each begins elsewhere."""
    logits, targets = torch.randn(1, 1001, device=device).to(dtype) * 4, torch.tensor([7])
    many = logits.expand(17, -1).contiguous()
    log_probs = kernels.gather_log_probs(many, targets.to(device).expand(17), backend="triton")
    assert torch.equal(log_probs[0::8], log_probs[:1].expand(3))
    assert torch.equal(log_probs[3::8], log_probs[3:4].expand(2))
    exact = exact_log_probs(many.double(), targets.to(device).expand(17))
    assert (log_probs - exact).abs().max() < 2e-6  # elsewhere, to rounding


# ---- capped heads

def capped(hidden, weight, targets, *per_token, soft_cap):
    """As one would write it first, with a cap."""
    logits = soft_cap * torch.tanh(hidden @ weight.T / soft_cap)
    log_probs, entropy = exact_log_probs(logits, targets, 0.7, return_entropy=True)
    loss, _ = kernels.repo_loss(log_probs, *per_token, backend="reference")
    return loss, log_probs, entropy


@pytest.mark.parametrize("backend, dtype, soft_cap", grid(
    ["triton", "reference"],
    [torch.float32, torch.bfloat16],
    [0.5, 30.0],
    telling=[
        ("triton", torch.float32, 0.5),
        ("triton", torch.bfloat16, 30.0),
        ("reference", torch.float32, 30.0),
    ],
))
def test_a_soft_cap_against_float64(device, backend, dtype, soft_cap):
    """Logits of about +-10: nearly all of them at a cap of 0.5, bent at 30."""
    hidden, weight, targets = head(N, 300, H, dtype=dtype, device=device)
    hidden = hidden * 10
    x, w = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    per_token = token_data(N, device, log_prob=-8.0)
    loss, log_probs, entropy = capped(
        x, w, targets, *(t.double() for t in per_token), soft_cap=soft_cap,
    )
    exact = torch.autograd.grad(loss, (x, w), retain_graph=True)
    exact_of_log_probs = torch.autograd.grad(log_probs.sum(), (x, w))

    hidden.requires_grad_(), weight.requires_grad_()
    settings = {"soft_cap": soft_cap, "backend": backend}
    ours, entropies = kernels.linear_log_probs(
        hidden, weight, targets, 0.7, return_entropy=True, **settings,
    )
    fused, log_probs_too, _ = kernels.linear_repo_loss(
        hidden, weight, targets, *per_token, 0.2, 0.7, **settings,
    )
    bound = 2e-5 if dtype == torch.float32 else 3e-2  # a product's rounding, in the logits
    for result, truth in (
        (ours, log_probs),
        (log_probs_too, log_probs),
        (entropies, entropy),
        (fused, loss),
        *zip(torch.autograd.grad(fused, (hidden, weight)), exact),
        *zip(torch.autograd.grad(ours.sum(), (hidden, weight)), exact_of_log_probs),
    ):
        error = (result.detach().double() - truth).norm()
        assert error <= bound * truth.norm().clamp(min=0.1), (error, truth.norm())


def test_a_logit_at_its_cap_learns_nothing(device):
    hidden, weight, targets = head(N, V, H, device=device)
    hidden = (1e4 * hidden).requires_grad_()
    log_probs = kernels.linear_log_probs(
        hidden, weight, targets, soft_cap=2.0, backend="triton",
    )
    assert (log_probs >= -4 - torch.tensor(V).log()).all()  # by hand: between -2 and 2 each
    gradient, = torch.autograd.grad(log_probs.sum(), hidden)
    assert torch.isfinite(gradient).all() and gradient.abs().max() < 1e-3
