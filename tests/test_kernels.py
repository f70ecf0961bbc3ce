# pytest tests/test_kernels.py
"""What the four functions refuse, which implementation they choose, and their derivatives."""
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import kernels


def test_gradients_equal_finite_differences():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, logits = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((5, 3), (4, 3), (5, 4))
    )
    targets = torch.tensor([0, 3, 1, 1, 2])
    assert torch.autograd.gradcheck(
        lambda x, w: kernels.linear_log_probs(x, w, targets, 0.7), (hidden, weight),
    )
    assert torch.autograd.gradcheck(
        lambda x: kernels.gather_log_probs(x, targets, 1.3), (logits,),
    )


PER_TOKEN = ["old_log_probs", "reward_advantages", "cost_advantages", "lambdas", "token_weight"]
ALL = ["gather_log_probs", "linear_log_probs", "repo_loss", "linear_repo_loss"]


def good(function):
    """Arguments of the function for N = 3, V = 5 and H = 2."""
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
def test_an_unknown_backend_is_refused_by_name(function):
    says = "^backend='cuda': it must be 'reference', 'triton' or None$"
    with pytest.raises(ValueError, match=says):
        getattr(kernels, function)(**good(function), backend="cuda")


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
            if argument == first and says == "shape":  # the message names the second of the two
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
    assert not kernels.runs_triton(torch.zeros(1))
    kernels.gather_log_probs(**good("gather_log_probs"))
    assert not used
    needs_interpreter = "^backend='triton': CPU tensors need Triton's interpreter"
    with pytest.raises(ValueError, match=needs_interpreter):
        kernels.gather_log_probs(**good("gather_log_probs"), backend="triton")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.runs_triton(torch.zeros(1))
    assert not kernels.runs_triton(torch.zeros(1, dtype=torch.float64))
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


@pytest.mark.cuda
def test_the_reference_on_a_gpu():
    logits, targets = torch.randn(33, 1000), torch.randint(1000, (33,))
    on_gpu = kernels.gather_log_probs(logits.cuda(), targets.cuda()).cpu()
    assert torch.allclose(on_gpu, kernels.gather_log_probs(logits, targets), atol=1e-5)
