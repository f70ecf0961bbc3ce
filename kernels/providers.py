"""The implementations that the benchmark compares: callables that return a scalar.

Some libraries have no function with temperature or clip. Then the mean log-prob is measured, which
is the nearest that they compute, and the provider's name says so.
"""
import importlib
from functools import partial

import torch
import torch.nn.functional as F

import kernels
from kernels import linear, reference

TEMPERATURE = 1.0  # libraries without a temperature compute with 1
# These write the gradient over their logits, so each call needs new logits.
OVERWRITES = {("gather_log_probs", "Liger (mean log-prob)")}


def ours(function, split="whole", **settings):
    """One of our four functions, reduced to its loss or the mean of its log-probs."""
    def call(*tensors):
        linear.SPLIT = split  # the backward follows before another provider is called
        result = function(*tensors, **settings)
        return result[0] if isinstance(result, tuple) else result.mean()

    return call


def plain_log_probs(hidden, weight, target_ids):
    """LM head and log-prob in plain PyTorch, in the type of the inputs."""
    logits = hidden @ weight.T
    return kernels.gather_log_probs(logits, target_ids, TEMPERATURE, backend="reference")


def plain_mean(hidden, weight, target_ids):
    return plain_log_probs(hidden, weight, target_ids).mean()


def plain_loss(hidden, weight, target_ids, *per_token):
    log_probs = plain_log_probs(hidden, weight, target_ids)
    return kernels.repo_loss(log_probs, *per_token, backend="reference")[0]


def reference_mean(logits, target_ids):
    return reference.gather_log_probs(logits, target_ids).mean()


def reference_loss(*per_token):
    return reference.repo_loss(*per_token)[0]


def imported(module, name):
    return getattr(importlib.import_module(module), name)


def torch_linear():
    return partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


def liger_grpo(rows):
    make_loss = imported("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    loss = make_loss(beta=0.0, use_ref_model=False, loss_type="bnpo")
    length = max(rows // 16, 1)  # it takes sequences: 16 of equal length

    def call(hidden, weight, target_ids, old_log_probs, advantages, *_):
        hidden, target_ids, old_log_probs = (
            tensor.unflatten(0, (-1, length)) for tensor in (hidden, target_ids, old_log_probs)
        )
        mask = torch.ones_like(target_ids)
        return loss(
            hidden, weight, target_ids, mask, advantages[:len(hidden)],
            old_per_token_logps=old_log_probs,
        )[0]

    return call


def providers(rows, splits=("whole",)):
    """{function: {provider: load}}. load() imports its library and returns the callable.

    The functions with an LM head are providers once per split (linear.py).
    """
    liger, cut = "liger_kernel.transformers.functional", "cut_cross_entropy"
    gather, linear_gather = kernels.gather_log_probs, kernels.linear_log_probs
    loss, linear_loss = kernels.repo_loss, kernels.linear_repo_loss

    def with_splits(function):
        return {f"ours ({split})": partial(ours, function, split) for split in splits}

    return {
        "gather_log_probs": {
            "ours": partial(ours, gather),
            "reference": partial(ours, gather, backend="reference"),
            "torch.compile": partial(torch.compile, reference_mean),
            "Liger (mean log-prob)": partial(imported, liger, "liger_cross_entropy"),
            "quack (mean log-prob)": partial(imported, "quack.cross_entropy", "cross_entropy"),
        },
        "linear_log_probs": {
            **with_splits(linear_gather),
            "reference": partial(ours, linear_gather, backend="reference"),
            "eager": lambda: plain_mean,
            "torch.compile": partial(torch.compile, plain_mean),
            "F.linear_cross_entropy (mean log-prob)": torch_linear,
            "Liger (mean log-prob)": partial(imported, liger, "liger_fused_linear_cross_entropy"),
            "quack (mean log-prob)": partial(
                imported, "quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
            "cut-cross-entropy": partial(imported, cut, "linear_cross_entropy"),
        },
        "repo_loss": {
            "ours": partial(ours, loss),
            "reference": partial(ours, loss, backend="reference"),
            "torch.compile": partial(torch.compile, reference_loss),
        },
        "linear_repo_loss": {
            **with_splits(linear_loss),
            "reference": partial(ours, linear_loss, backend="reference"),
            "eager": lambda: plain_loss,
            "torch.compile": partial(torch.compile, plain_loss),
            "Liger GRPO (no cost, one advantage per response)": partial(liger_grpo, rows),
        },
    }


def inputs(function, rows, vocab, hidden_size, dtype, device, peaked):
    """(the function's tensors, n). The first n of them learn.

    If peaked, the target has nearly all of the probability, as with most tokens of a trained model.
    """
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=device)
    targets = torch.randint(vocab, (rows,), generator=generator, device=device)
    per_token = [
        random(rows) * 0.1 - (0.1 if peaked else 10.0),     # old_log_probs
        random(rows),                                       # reward_advantages
        random(rows),                                       # cost_advantages
        random(rows).abs(),                                 # lambdas
        torch.full((rows,), 1 / rows, device=device),       # token_weight
    ]

    if function == "repo_loss":
        log_probs = per_token[0] + 0.1 * random(rows)
        return [log_probs, *per_token], 1

    if function == "gather_log_probs":
        logits = random(rows, vocab, dtype=dtype)
        if peaked:
            logits.scatter_(1, targets[:, None], 20.0)
        return [logits, targets], 1

    weight = random(vocab, hidden_size, dtype=dtype) / hidden_size ** 0.5
    hidden = weight[targets] * 20 if peaked else random(rows, hidden_size, dtype=dtype)
    if function == "linear_log_probs":
        return [hidden, weight, targets], 2
    return [hidden, weight, targets, *per_token], 2


def floor(function, backward, rows, vocab, hidden_size, itemsize):
    """(bytes to move, floating-point operations) that every implementation needs."""
    if function.startswith("linear"):
        products = 3 if backward else 1
        return 0, 2 * products * rows * vocab * hidden_size
    if function == "gather_log_probs":  # the backward reads the logits and writes their gradient
        passes = 3 if backward else 1
        return passes * rows * vocab * itemsize, 0
    arrays = 9 if backward else 6
    return 4 * arrays * rows, 0
