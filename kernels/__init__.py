"""The hot path of a policy update: log-probs over a large vocabulary, and the loss on them.

This module checks the arguments of the four functions and chooses what computes them. CUDA tensors
run the Triton kernels. CPU tensors run plain PyTorch, or Triton's interpreter if TRITON_INTERPRET=1
is set. float64 always runs plain PyTorch. `backend="reference"` or `backend="triton"` forces one.

reference.py is the specification. In Triton, rows.py works on one row of logits, log_prob.py
computes log-probs from logits, and objective.py computes the loss from log-probs. linear.py and
linear_loss.py add the LM head in front of them.
"""
import os

import torch

from kernels import reference

try:
    from kernels import linear, linear_loss, log_prob, objective
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    TRITON = {}  # some systems have no Triton; the reference runs on all
else:
    TRITON = {
        "gather_log_probs": log_prob.gather_log_probs,
        "linear_log_probs": linear.linear_log_probs,
        "repo_loss": objective.repo_loss,
        "linear_repo_loss": linear_loss.linear_repo_loss,
    }

__all__ = ["gather_log_probs", "linear_log_probs", "linear_repo_loss", "repo_loss", "runs_triton"]


def gather_log_probs(logits, target_ids, temperature=1.0, *, return_entropy=False, backend=None):
    """Log-probs of chosen tokens.

    logits [..., V], target_ids [...] int64 or int32 in [0, V), temperature > 0 -> fp32 [...],
    differentiable in logits. With return_entropy a pair: the second is the entropy of
    softmax(logits / temperature), fp32 [...] in nats, without gradient.
    """
    if logits.dim() == 0:
        raise ValueError("logits is a single number; its last dimension must be the vocabulary")
    _check_shape("target_ids", target_ids, logits.shape[:-1],
                 "logits has, without its last dimension,")
    _check_temperature(temperature)
    tensors = {"logits": logits, "target_ids": target_ids}
    function = _implementation("gather_log_probs", backend, tensors)
    return function(logits, target_ids, temperature, return_entropy)


def linear_log_probs(
    hidden, weight, target_ids, temperature=1.0, *,
    soft_cap=0.0, return_entropy=False, backend=None,
):
    """LM head and log-prob in one: hidden [N, H], weight [V, H], target_ids [N] -> fp32 [N].

    Only the logits of one chunk of tokens exist at a time. Differentiable in hidden and weight.
    With a soft_cap c > 0 the logits are c tanh(hidden @ weight.T / c). With return_entropy a pair,
    as in gather_log_probs.
    """
    _check_linear(hidden, weight, target_ids, temperature, soft_cap)
    tensors = {"hidden": hidden, "weight": weight, "target_ids": target_ids}
    function = _implementation("linear_log_probs", backend, tensors)
    return function(hidden, weight, target_ids, temperature, return_entropy, soft_cap)


def repo_loss(
    log_probs, old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight,
    clip_range=0.2, *, backend=None,
):
    """The rectified clipped objective over response tokens. All tensors [N].

    lambdas holds lambda_i of each token's response, token_weight holds w_t. Returns (scalar loss,
    stats). stats holds 0-d tensors: clip_fraction (share of tokens whose rho is outside
    1 +- clip_range), approx_kl (mean of rho - 1 - log rho) and ratio_max.

    Only log_probs receives a gradient: -w_t rho_t A_t, or 0 where the clip is active.
    """
    per_token = {
        "log_probs": log_probs,
        "old_log_probs": old_log_probs,
        "reward_advantages": reward_advantages,
        "cost_advantages": cost_advantages,
        "lambdas": lambdas,
        "token_weight": token_weight,
    }
    _check_loss(per_token, log_probs.numel(), clip_range)
    function = _implementation("repo_loss", backend, per_token)
    return function(*per_token.values(), clip_range)


def linear_repo_loss(
    hidden, weight, target_ids,
    old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight,
    clip_range=0.2, temperature=1.0, *, soft_cap=0.0, backend=None,
):
    """repo_loss of linear_log_probs: (scalar loss, detached fp32 log-probs [N], stats)."""
    per_token = {
        "old_log_probs": old_log_probs,
        "reward_advantages": reward_advantages,
        "cost_advantages": cost_advantages,
        "lambdas": lambdas,
        "token_weight": token_weight,
    }
    _check_linear(hidden, weight, target_ids, temperature, soft_cap)
    _check_loss(per_token, hidden.shape[0], clip_range)
    tensors = {"hidden": hidden, "weight": weight, "target_ids": target_ids, **per_token}
    function = _implementation("linear_repo_loss", backend, tensors)
    return function(*tensors.values(), clip_range, temperature, soft_cap)


def runs_triton(tensor):
    """Whether the Triton kernels compute with this tensor, unless a backend is forced."""
    can_run = tensor.is_cuda or _is_interpreted(tensor.device)
    return bool(TRITON) and can_run and tensor.dtype != torch.float64


def _is_interpreted(device):
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def _implementation(name, backend, tensors):
    """The function of that name for these tensors, given by argument name.

    Raises ValueError if no implementation can compute with the tensors, and if the backend is
    unknown or cannot compute with them.
    """
    _check_devices_and_dtypes(tensors)
    device = next(iter(tensors.values())).device
    has_double = any(tensor.dtype == torch.float64 for tensor in tensors.values())

    if backend is None:
        backend = "triton" if all(map(runs_triton, tensors.values())) else "reference"
    if backend == "reference":
        return getattr(reference, name)

    if backend != "triton":
        raise ValueError(f"backend={backend!r}: it must be 'reference', 'triton' or None")
    if not TRITON:
        raise ValueError("backend='triton': Triton is not installed here")
    if device.type == "cpu" and not _is_interpreted(device):
        raise ValueError("backend='triton': CPU tensors need Triton's interpreter, "
                         "TRITON_INTERPRET=1")
    if has_double:
        raise ValueError("backend='triton': the kernels compute in fp32, not float64; "
                         "use backend='reference'")
    return TRITON[name]


def _check_devices_and_dtypes(tensors):
    """All tensors must be on one device. target_ids must be int32 or int64, the others float."""
    first, device = next((argument, tensor.device) for argument, tensor in tensors.items())
    for argument, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):  # a DTensor: this rank holds only a part of it
            raise ValueError(f"{argument} is sharded over ranks; pass its full_tensor()")
        if tensor.device != device:
            raise ValueError(f"{argument} is on {tensor.device}, but {first} is on {device}; "
                             "move all tensors to one device")
        if argument == "target_ids":
            if tensor.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"target_ids is {tensor.dtype}; it must be int64 or int32")
        elif not tensor.is_floating_point():
            raise ValueError(f"{argument} is {tensor.dtype}; it must be a floating-point tensor")


def _check_linear(hidden, weight, target_ids, temperature, soft_cap):
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {list(hidden.shape)}; it must be [N, H]")
    vocab = weight.shape[0] if weight.dim() else 0
    _check_shape("weight", weight, (vocab, hidden.shape[1]), "hidden requires [V, H] =")
    _check_shape("target_ids", target_ids, hidden.shape[:1], "hidden has one row per token:")
    _check_temperature(temperature)
    if not soft_cap >= 0:
        raise ValueError(f"soft_cap={soft_cap}: it must be above 0, or 0 for no cap")


def _check_loss(per_token, count, clip_range):
    for argument, tensor in per_token.items():
        _check_shape(argument, tensor, (count,), "there is one number per token:")
    if not clip_range >= 0:
        raise ValueError(f"clip_range={clip_range}: it must not be negative")


def _check_shape(argument, tensor, expected, why):
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{argument} has shape {list(tensor.shape)}, but {why} {list(expected)}")


def _check_temperature(temperature):
    if not temperature > 0:  # also refuses NaN
        raise ValueError(f"temperature={temperature}: it must be above 0")
