# pytest tests/test_kernels.py
"""The four functions of the hot path, as their callers see them."""
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 65), (2, 3, 1000), (4, 1), (0, 9)])
def test_gathered_log_probs_are_a_distribution(dtype, shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    of_each_token = [
        kernels.gather_log_probs(logits, torch.full(shape[:-1], v), 0.7) for v in range(shape[-1])
    ]
    assert of_each_token[0].dtype == torch.float32
    assert of_each_token[0].shape == shape[:-1]
    sums = torch.stack(of_each_token).exp().sum(0)
    assert torch.allclose(sums, torch.ones(shape[:-1]), atol=1e-5)


def test_temperature_and_hand_computed_log_probs():
    logits = torch.tensor([[0.0, 3.0 * math.log(3.0)]])  # at temperature 3: odds of 1 to 3
    log_probs = kernels.gather_log_probs(logits, torch.tensor([1]), 3.0)
    assert log_probs.exp().item() == pytest.approx(0.75)


def linear_inputs(n, h=8, v=33):
    """hidden, weight, target_ids in float64."""
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=generator)


@pytest.mark.parametrize("n", [0, 1, 1023, 1024, 1025])
def test_linear_log_probs_equal_gathering_from_all_logits(n):
    hidden, weight, targets = linear_inputs(n)
    chunked = kernels.linear_log_probs(hidden, weight, targets, 1.3)
    gathered = kernels.gather_log_probs(hidden @ weight.T, targets, 1.3)
    assert torch.allclose(chunked, gathered)

    upstream = torch.randn(n, dtype=torch.float64)
    ours = torch.autograd.grad(chunked, (hidden, weight), upstream)
    expected = torch.autograd.grad(gathered, (hidden, weight), upstream)
    for a, b in zip(ours, expected):
        assert torch.allclose(a, b, atol=1e-12)


def test_gradients_equal_finite_differences():
    hidden, weight, targets = linear_inputs(5, 3, 4)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: kernels.linear_log_probs(x, w, targets, 0.7), (hidden, weight),
    )
    assert torch.autograd.gradcheck(
        lambda x: kernels.gather_log_probs(x, targets, 1.3), (logits,),
    )


def test_linear_repo_loss_is_the_composition_and_detaches_its_log_probs():
    hidden, weight, targets = linear_inputs(20)
    per_token = [torch.rand(20, dtype=torch.float64) for _ in range(5)]
    loss, log_probs, stats = kernels.linear_repo_loss(hidden, weight, targets, *per_token, 0.2, 1.3)
    composed = kernels.linear_log_probs(hidden, weight, targets, 1.3)
    expected, expected_stats = kernels.repo_loss(composed, *per_token, 0.2)
    assert torch.equal(loss, expected)
    assert not log_probs.requires_grad
    assert stats == expected_stats

    gradients = torch.autograd.grad(loss, (hidden, weight))
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients))


PER_TOKEN = ["old_log_probs", "reward_advantages", "cost_advantages", "lambdas", "token_weight"]
ALL = ["gather_log_probs", "linear_log_probs", "repo_loss", "linear_repo_loss"]


def good(function):
    """Arguments that the function takes: 3 tokens, 5 entries of vocabulary, 2 hidden dimensions."""
    per_token = {name: torch.zeros(3) for name in PER_TOKEN}
    ids = {"target_ids": torch.zeros(3, dtype=torch.long)}
    head = {"hidden": torch.zeros(3, 2), "weight": torch.zeros(5, 2), **ids}
    return {
        "gather_log_probs": {"logits": torch.zeros(3, 5), **ids},
        "linear_log_probs": head,
        "repo_loss": {"log_probs": torch.zeros(3), **per_token},
        "linear_repo_loss": {**head, **per_token},
    }[function]


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("backend", ["cuda", "Triton", ""])
def test_an_unknown_backend_is_refused_by_name(function, backend):
    says = f"^backend='{backend}': it must be 'reference', 'triton' or None$"
    with pytest.raises(ValueError, match=says):
        getattr(kernels, function)(**good(function), backend=backend)


@pytest.mark.parametrize("function", ALL)
def test_every_argument_is_refused_by_name_for_its_device_its_shape_and_its_type(function):
    first, *others = good(function)
    for argument, tensor in good(function).items():
        wrong = {
            "shape": tensor[(slice(-1),) * tensor.dim()],
            "is torch": tensor.to(torch.bool if argument == "target_ids" else torch.int64),
        }
        if argument != first:
            wrong["is on meta"] = tensor.to("meta")

        for says, value in wrong.items():
            with pytest.raises(ValueError) as error:
                getattr(kernels, function)(**{**good(function), argument: value})
            message = str(error.value)
            names_it = message.startswith(argument)
            if argument == first and says == "shape":  # of two that disagree, the second is named
                names_it = names_it or message.split()[0] in others
            assert names_it, (argument, says, message)
            assert says in message and "\n" not in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8, torch.bool, torch.float32])
def test_ids_that_cannot_index_are_refused(dtype):
    with pytest.raises(ValueError, match="^target_ids is torch"):
        kernels.gather_log_probs(torch.zeros(1, 2), torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("function, setting, value", [
    ("gather_log_probs", "temperature", 0.0),
    ("gather_log_probs", "temperature", float("nan")),
    ("linear_log_probs", "temperature", -1),
    ("linear_repo_loss", "temperature", 0),
    ("repo_loss", "clip_range", -0.1),
    ("linear_repo_loss", "clip_range", float("nan")),
])
def test_settings_out_of_range_are_refused_by_name(function, setting, value):
    with pytest.raises(ValueError, match=f"^{setting}={value}"):
        getattr(kernels, function)(**good(function), **{setting: value})


def test_logits_and_hidden_states_need_their_dimensions():
    with pytest.raises(ValueError, match="^logits is a single number"):
        kernels.gather_log_probs(torch.zeros(()), torch.zeros((), dtype=torch.long))
    hidden, weight, ids = torch.zeros(1, 3, 2), torch.zeros(5, 2), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="^hidden has shape"):
        kernels.linear_log_probs(hidden, weight, ids.long())


def test_the_backend_follows_device_environment_and_dtype(monkeypatch):
    used = []
    for name in kernels.TRITON:
        monkeypatch.setitem(kernels.TRITON, name, lambda *_, name=name: used.append(name))

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels.gather_log_probs(**good("gather_log_probs"))
    assert not used
    needs_interpreter = "^backend='triton': CPU tensors need Triton's interpreter"
    with pytest.raises(ValueError, match=needs_interpreter):
        kernels.gather_log_probs(**good("gather_log_probs"), backend="triton")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels.gather_log_probs(**good("gather_log_probs"), backend="reference")
    assert not used
    kernels.gather_log_probs(**good("gather_log_probs"))
    kernels.repo_loss(**good("repo_loss"))
    assert used == ["gather_log_probs", "repo_loss"]

    double = {**good("repo_loss"), "lambdas": torch.zeros(3, dtype=torch.float64)}
    assert kernels.repo_loss(**double)[0] == 0 and len(used) == 2
    with pytest.raises(ValueError, match="^backend='triton': the kernels compute in fp32"):
        kernels.repo_loss(**double, backend="triton")


def test_without_triton_everything_is_the_reference():
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
logits, ids = torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
kernels.gather_log_probs(logits, ids)
kernels.gather_log_probs(logits, ids, backend="triton")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    says = "ValueError: backend='triton': Triton is not installed here"
    assert done.stderr.strip().endswith(says), done.stderr


def test_entropy_of_the_reference():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 3.0, float("-inf"), 3.0]])
    targets = torch.tensor([1, 1])
    log_probs, entropy = kernels.gather_log_probs(logits, targets, 1.5, return_entropy=True)
    p = 1 / (1 + 2 * math.e ** 2)  # of the first token, and of each of the two likely ones:
    q = math.e ** 2 / (1 + 2 * math.e ** 2)
    expected = [math.log(4), -p * math.log(p) - 2 * q * math.log(q)]
    assert entropy.tolist() == pytest.approx(expected)
    assert not entropy.requires_grad
    assert torch.equal(log_probs, kernels.gather_log_probs(logits, targets, 1.5))


@pytest.mark.cuda
def test_the_reference_on_a_gpu():
    logits, targets = torch.randn(33, 1000), torch.randint(1000, (33,))
    on_gpu = kernels.gather_log_probs(logits.cuda(), targets.cuda()).cpu()
    assert torch.allclose(on_gpu, kernels.gather_log_probs(logits, targets), atol=1e-5)
