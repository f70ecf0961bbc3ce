"""The rectified clipped objective in Triton: loss, gradient and statistics of all response tokens in one launch.

Per token t of response i, with rho = exp(log pi - log pi_old), the penalty lambda_i, the weight w_t and the clip range epsilon:

    A = (A_r - lambda_i A_c) / (1 + lambda_i)                                       the paper's (7)
    loss = -sum_t w_t min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A)             the paper's (8)

Backward: d rho / d log pi = rho, and the clipped branch is constant where it is the smaller one, hence

    d loss / d log pi_t = -w_t rho A    if rho A <= clip(rho) A, else 0

Everything else is data. The forward has all it takes and stores this gradient; the backward only scales it by the upstream scalar. One program
walks over all tokens, so that sums are always taken in the same order: same inputs, same bits. A few arrays of N numbers are too little work for
that to be slow: the logits they come from are 10,000 times as many.
"""
import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

BLOCK, NUM_WARPS = 2048, 16


@triton.jit
def clipped_objective(log_prob, old_log_prob, reward_advantage, cost_advantage, penalty, weight, lowest_ratio, highest_ratio):
    """(7) and (8) for some tokens, all fp32: (terms of the loss, their gradients by log_prob, log rho, rho, whether rho is outside the clip)."""
    advantage = (reward_advantage - penalty * cost_advantage) / (1 + penalty)
    log_ratio = log_prob - old_log_prob
    ratio = tl.exp(log_ratio)
    clipped_ratio = tl.minimum(tl.maximum(ratio, lowest_ratio, tl.PropagateNan.ALL), highest_ratio, tl.PropagateNan.ALL)
    surrogate = ratio * advantage
    smaller = tl.minimum(surrogate, clipped_ratio * advantage, tl.PropagateNan.ALL)  # a NaN has to reach the loss, where it is noticed
    gradient = tl.where(surrogate > clipped_ratio * advantage, 0.0, -weight * surrogate)
    return -weight * smaller, gradient, log_ratio, ratio, clipped_ratio != ratio


@triton.jit(do_not_specialize=range(12))
def loss_kernel(log_probs, old_log_probs, reward_advantages, cost_advantages, penalty, token_weight, gradients, loss, stats, count, lowest_ratio,
                highest_ratio, BLOCK: tl.constexpr):
    loss_sum, clipped_count, kl_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    ratio_max = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        n = start + tl.arange(0, BLOCK)
        exists = n < count
        log_prob = tl.load(log_probs + n, mask=exists, other=0.0).to(tl.float32)  # fp32 whatever comes in: a ratio in bf16 has two digits
        old_log_prob = tl.load(old_log_probs + n, mask=exists, other=0.0).to(tl.float32)
        reward_advantage = tl.load(reward_advantages + n, mask=exists, other=0.0).to(tl.float32)
        cost_advantage = tl.load(cost_advantages + n, mask=exists, other=0.0).to(tl.float32)
        token_penalty = tl.load(penalty + n, mask=exists, other=0.0).to(tl.float32)
        weight = tl.load(token_weight + n, mask=exists, other=0.0).to(tl.float32)
        term, gradient, log_ratio, ratio, is_clipped = clipped_objective(log_prob, old_log_prob, reward_advantage, cost_advantage, token_penalty,
                                                                         weight, lowest_ratio, highest_ratio)
        tl.store(gradients + n, gradient, mask=exists)
        loss_sum += term  # 0 where no token exists: its weight is 0, its ratio 1
        clipped_count += is_clipped.to(tl.float32)
        kl_sum += ratio - 1 - log_ratio
        ratio_max = tl.maximum(ratio_max, tl.where(exists, ratio, 0.0), tl.PropagateNan.ALL)
    tokens = tl.maximum(count, 1)
    tl.store(loss, tl.sum(loss_sum, 0))
    tl.store(stats, tl.sum(clipped_count, 0) / tokens)
    kl = tl.sum(kl_sum, 0) / tokens
    tl.store(stats + 1, kl)
    tl.store(stats + 2, tl.where(kl == kl, tl.max(ratio_max, 0), kl))  # a maximum over lanes would lose a NaN, a sum does not


def launch_loss(tokens, clip_range):
    """(loss [], stats [3], gradients [N]) of the six arrays of N numbers."""
    count, device = tokens[0].numel(), tokens[0].device
    loss, stats, gradients = (torch.empty(shape, dtype=torch.float32, device=device) for shape in ((), 3, count))
    with torch.cuda.device_of(loss):
        loss_kernel[1,](*[tensor.contiguous() for tensor in tokens], gradients, loss, stats, count, 1.0 - clip_range, 1.0 + clip_range, BLOCK,
                        num_warps=NUM_WARPS)
    return loss, stats, gradients


def named(stats):
    return dict(zip(("clip_fraction", "approx_kl", "ratio_max"), stats.unbind()))


class RepoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tokens_and_clip_range):
        *tokens, clip_range = tokens_and_clip_range
        loss, stats, gradients = launch_loss(tokens, clip_range)
        ctx.save_for_backward(gradients)
        ctx.dtype = tokens[0].dtype
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        gradients, = ctx.saved_tensors
        return (upstream * gradients).to(ctx.dtype), *[None] * 6


def repo_loss(log_probs, old_log_probs, reward_advantages, cost_advantages, penalty, token_weight, clip_range=0.2):
    """The rectified clipped objective, all inputs [N]: (scalar loss, stats). Only log_probs has a gradient."""
    loss, stats = RepoLoss.apply(log_probs, old_log_probs, reward_advantages, cost_advantages, penalty, token_weight, clip_range)
    return loss, named(stats)
