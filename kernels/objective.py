"""The rectified clipped objective in Triton: one launch for loss, gradient and statistics.

Per token t of response i, with rho = exp(log pi - log pi_old), the multiplier lambda_i, the weight
w_t and the clip range epsilon:

    A    = (A_r - lambda_i A_c) / (1 + lambda_i)                               (7)
    loss = -sum_t w_t min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A)        (8)

Backward: d rho / d log pi = rho. The clipped branch is constant where it is the smaller one. So

    d loss / d log pi_t = -w_t rho A    if rho A <= clip(rho) A, else 0

The other inputs have no gradient. The forward stores this gradient, and the backward multiplies it
by the upstream gradient, a scalar. One program processes all tokens, so the sums always have the
same order, and the same inputs give the same bits. That is fast enough for N tokens, because their
logits are 10,000 times as many.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# 16 warps are 512 threads, so each has 4 tokens and makes 24 loads of 4 bytes from six arrays. That
# is 48 KiB in flight per turn of the loop. N = 8192 tokens take 4 turns.
BLOCK, NUM_WARPS = 2048, 16


@triton.jit
def clipped_objective(
    log_prob, old_log_prob, reward_advantage, cost_advantage, lam, weight,
    lowest_ratio, highest_ratio,
):
    """(7) and (8) for one token or for a block of tokens, all in fp32.

    Returns the terms of the loss, their gradients by log_prob, log rho, rho, and whether rho is
    outside the clip. A NaN must reach the loss, where the training step looks for it.
    """
    advantage = (reward_advantage - lam * cost_advantage) / (1 + lam)
    log_ratio = log_prob - old_log_prob
    ratio = tl.exp(log_ratio)
    not_too_low = tl.maximum(ratio, lowest_ratio, tl.PropagateNan.ALL)
    clipped_ratio = tl.minimum(not_too_low, highest_ratio, tl.PropagateNan.ALL)
    surrogate = ratio * advantage
    smaller = tl.minimum(surrogate, clipped_ratio * advantage, tl.PropagateNan.ALL)
    is_clipped = surrogate > clipped_ratio * advantage
    gradient = tl.where(is_clipped, 0.0, -weight * surrogate)
    return -weight * smaller, gradient, log_ratio, ratio, clipped_ratio != ratio


@triton.jit
def load_fp32(array, n, exists):
    """Elements n of an array in fp32, because a ratio in bf16 has only two digits."""
    return tl.load(array + n, mask=exists, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=range(12))  # one binary for any N and clip range
def loss_kernel(
    log_probs,            # [N] fp32, bf16 or fp16, as the next five
    old_log_probs,        # [N]
    reward_advantages,    # [N]
    cost_advantages,      # [N]
    lambdas,              # [N] lambda_i of the token's response
    token_weight,         # [N] w_t
    gradients,            # [N] fp32, written
    loss,                 # [] fp32, written
    stats,                # [3] fp32, written: clip_fraction, approx_kl, ratio_max
    count,                # N
    lowest_ratio,         # fp32, 1 - epsilon
    highest_ratio,        # fp32, 1 + epsilon
    BLOCK: tl.constexpr,  # tokens per turn of the loop
):
    loss_sum = tl.zeros([BLOCK], tl.float32)
    clipped_count = tl.zeros([BLOCK], tl.float32)
    kl_sum = tl.zeros([BLOCK], tl.float32)
    ratio_max = tl.zeros([BLOCK], tl.float32)

    for start in range(0, count, BLOCK):
        n = start + tl.arange(0, BLOCK)
        exists = n < count
        term, gradient, log_ratio, ratio, is_outside = clipped_objective(
            load_fp32(log_probs, n, exists),
            load_fp32(old_log_probs, n, exists),
            load_fp32(reward_advantages, n, exists),
            load_fp32(cost_advantages, n, exists),
            load_fp32(lambdas, n, exists),
            load_fp32(token_weight, n, exists),
            lowest_ratio,
            highest_ratio,
        )
        tl.store(gradients + n, gradient, mask=exists)

        # where there is no token, weight is 0 and ratio 1, so these three add 0
        loss_sum += term
        clipped_count += is_outside.to(tl.float32)
        kl_sum += ratio - 1 - log_ratio
        ratio_max = tl.maximum(ratio_max, tl.where(exists, ratio, 0.0), tl.PropagateNan.ALL)

    divisor = tl.maximum(count, 1)
    tl.store(loss, tl.sum(loss_sum, 0))
    tl.store(stats, tl.sum(clipped_count, 0) / divisor)
    kl = tl.sum(kl_sum, 0) / divisor
    tl.store(stats + 1, kl)
    # tl.max loses a NaN, the sum kl does not
    tl.store(stats + 2, tl.where(kl == kl, tl.max(ratio_max, 0), kl))


def launch_loss(per_token, clip_range):
    """(loss [], stats [3], gradients [N]) of six arrays [N], in loss_kernel's order."""
    log_probs, old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight = (
        tensor.contiguous() for tensor in per_token
    )
    loss, stats, gradients = empty_results(log_probs)
    with torch.cuda.device_of(loss):
        loss_kernel[(1,)](
            log_probs=log_probs,
            old_log_probs=old_log_probs,
            reward_advantages=reward_advantages,
            cost_advantages=cost_advantages,
            lambdas=lambdas,
            token_weight=token_weight,
            gradients=gradients,
            loss=loss,
            stats=stats,
            count=log_probs.numel(),
            lowest_ratio=1.0 - clip_range,
            highest_ratio=1.0 + clip_range,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return loss, stats, gradients


def empty_results(log_probs):
    """Empty loss [], stats [3] and gradients [N]."""
    shapes = (), (3,), log_probs.shape
    return tuple(log_probs.new_empty(shape, dtype=torch.float32) for shape in shapes)


def named(stats):
    return dict(zip(("clip_fraction", "approx_kl", "ratio_max"), stats.unbind()))


# ---- as an operator of PyTorch, which torch.compile does not look into

@torch.library.custom_op("repo::repo_loss", mutates_args=())
def loss_op(
    log_probs: Tensor, old_log_probs: Tensor, reward_advantages: Tensor, cost_advantages: Tensor,
    lambdas: Tensor, token_weight: Tensor, clip_range: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, statistics [3], gradients [N] of the log-probs)."""
    per_token = (
        log_probs, old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight,
    )
    return launch_loss(per_token, clip_range)


@loss_op.register_fake
def _(log_probs, old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight,
      clip_range):
    return empty_results(log_probs)


def keep_for_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # autograd makes no zeros for outputs without a gradient
    loss, stats, gradients = output
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(gradients)
    ctx.mark_non_differentiable(stats, gradients)


def backward(ctx, upstream, *_):
    gradients, = ctx.saved_tensors
    return (upstream * gradients).to(ctx.dtype), *[None] * 6


loss_op.register_autograd(once_differentiable(backward), setup_context=keep_for_backward)


def repo_loss(
    log_probs, old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight,
    clip_range=0.2,
):
    """The rectified clipped objective, (7) and (8): (scalar loss, stats).

    All inputs [N]; only log_probs has a gradient.
    """
    loss, stats, _ = loss_op(
        log_probs, old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight,
        float(clip_range),
    )
    return loss, named(stats)
