"""LM head, log-prob and loss in one: the products of linear.py, three of them for each token.

linear_repo_loss computes its gradients in the forward. The clip depends on the log-prob itself, but
a chunk holds whole rows, so each log-prob is final before its row of G is written. Nothing is
computed twice.

The upstream gradient of the loss is a single number, which is known in the backward. The backward
multiplies dX and dW by it and casts them to the type of their tensors, in one pass over each.

An element of G is at most about as large as w_t, which is one over the number of tokens or less.
Small elements would be lost in fp16. So the forward computes SCALE times the gradients, and the
backward divides by SCALE, a power of 2, which rounds nothing.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear import add_gradients, chunks, compute_dtype, empty_gradients
from kernels.objective import clipped_objective, launch_loss, named
from kernels.rows import LANES, NUM_WARPS, log_prob_of, read_row, target_logit, write_gradient


SCALE = tl.constexpr(2.0 ** 12)


@triton.jit(do_not_specialize=range(14))  # one binary for all sizes, strides and alignments
def row_kernel(
    logits,                # [n, V] of a chunk, bf16, fp16 or fp32; overwritten by their gradient
    target_ids,            # [n] int64 or int32
    log_probs,             # [n] fp32, written
    old_log_probs,         # [n] fp32
    reward_advantages,     # [n] fp32
    cost_advantages,       # [n] fp32
    lambdas,               # [n] fp32, lambda_i of the token's response
    token_weight,          # [n] fp32, w_t
    vocab,                 # V
    stride: tl.int64,      # of logits, from row to row
    temperature,           # fp32, above 0
    soft_cap,              # fp32, c; read if CAPPED
    lowest_ratio,          # fp32, 1 - epsilon
    highest_ratio,         # fp32, 1 + epsilon
    LANES: tl.constexpr,   # groups in a tile
    GROUP: tl.constexpr,   # logits in 16 bytes
    CAPPED: tl.constexpr,  # whether the head has a soft cap
):
    """Computes a row's log-prob and its loss, and overwrites the row with its gradient."""
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    target = tl.load(target_ids + n)
    maximum, log2_s, _ = read_row(
        row, vocab, temperature, soft_cap, LANES, GROUP, CAPPED, False,
    )
    x = target_logit(row, target, vocab, soft_cap, CAPPED)
    log_prob = log_prob_of(x, temperature, maximum, log2_s)
    tl.store(log_probs + n, log_prob)

    _, upstream, _, _, _ = clipped_objective(
        log_prob,
        tl.load(old_log_probs + n),
        tl.load(reward_advantages + n),
        tl.load(cost_advantages + n),
        tl.load(lambdas + n),
        tl.load(token_weight + n),
        lowest_ratio,
        highest_ratio,
    )

    tl.debug_barrier()  # all threads read the target's logit before one overwrites it
    write_gradient(
        row, row, target, x, vocab, temperature, soft_cap, maximum, log2_s, log_prob,
        SCALE * upstream, LANES, GROUP, CAPPED,
    )


def launch_rows(logits, target_ids, log_probs, per_token, clip_range, temperature, soft_cap):
    """Writes log_probs [n], and SCALE times the gradient over a chunk's logits [n, V].

    per_token holds the old log-probs, both advantages, lambdas and the weights, each [n].
    """
    old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight = per_token
    with torch.cuda.device_of(logits):
        row_kernel[(len(logits),)](
            logits=logits,
            target_ids=target_ids,
            log_probs=log_probs,
            old_log_probs=old_log_probs,
            reward_advantages=reward_advantages,
            cost_advantages=cost_advantages,
            lambdas=lambdas,
            token_weight=token_weight,
            vocab=logits.shape[1],
            stride=logits.stride(0),
            temperature=float(temperature),
            soft_cap=float(soft_cap),
            lowest_ratio=1.0 - clip_range,
            highest_ratio=1.0 + clip_range,
            LANES=LANES,
            GROUP=16 // logits.element_size(),
            CAPPED=soft_cap > 0,
            num_warps=NUM_WARPS,
        )


# ---- as an operator of PyTorch, which torch.compile does not look into

@torch.library.custom_op("repo::linear_repo_loss", mutates_args=())
def loss_op(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, old_log_probs: Tensor,
    reward_advantages: Tensor, cost_advantages: Tensor, lambdas: Tensor, token_weight: Tensor,
    clip_range: float, temperature: float, soft_cap: float, dtype: torch.dtype,
    hidden_learns: bool, weight_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, log-probs, statistics, SCALE dX, SCALE dW). A gradient that is not needed is empty."""
    gradients = empty_gradients(hidden, weight, dtype, hidden_learns, weight_learns)
    per_token = [
        tensor.float().contiguous() for tensor in
        (old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight)
    ]
    x, w, target_ids = hidden.to(dtype), weight.to(dtype), target_ids.contiguous()
    log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)

    for rows, logits in chunks(x, w, weight_learns):
        launch_rows(
            logits, target_ids[rows], log_probs[rows],
            [tensor[rows] for tensor in per_token],
            clip_range, temperature, soft_cap,
        )
        add_gradients(logits, x, w, rows, *gradients)

    loss, stats, _ = launch_loss([log_probs, *per_token], clip_range)
    return loss, log_probs, stats, *gradients


@loss_op.register_fake
def _(hidden, weight, target_ids, old_log_probs, reward_advantages, cost_advantages, lambdas,
      token_weight, clip_range, temperature, soft_cap, dtype, hidden_learns, weight_learns):
    def empty(*shape):
        return hidden.new_empty(shape, dtype=torch.float32)

    gradients = empty_gradients(hidden, weight, dtype, hidden_learns, weight_learns)
    return empty(), empty(hidden.shape[0]), empty(3), *gradients


def keep_for_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # autograd makes no zeros for outputs without a gradient
    loss, log_probs, stats, *gradients = output
    hidden, weight, *_, hidden_learns, weight_learns = inputs
    ctx.dtypes = hidden.dtype, weight.dtype
    ctx.learns = hidden_learns, weight_learns
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(log_probs, stats, *gradients)


def backward(ctx, upstream, *_):
    # [1, 1], because PyTorch would round a 0-d factor to the gradient's type first
    factor = (upstream / SCALE.value).reshape(1, 1)
    gradients = [
        torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))
        if learns else None
        for gradient, dtype, learns in zip(ctx.saved_tensors, ctx.dtypes, ctx.learns)
    ]
    return *gradients, *[None] * 12


loss_op.register_autograd(once_differentiable(backward), setup_context=keep_for_backward)


def linear_repo_loss(
    hidden, weight, target_ids,
    old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight,
    clip_range=0.2, temperature=1.0, soft_cap=0.0,
):
    """repo_loss(linear_log_probs(...), ...): (scalar loss, detached fp32 log-probs [N], stats)."""
    learns = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    dtype = compute_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, log_probs, stats, _, _ = loss_op(
            hidden, weight, target_ids, old_log_probs, reward_advantages, cost_advantages,
            lambdas, token_weight, float(clip_range), float(temperature), float(soft_cap), dtype,
            *learns,
        )
    return loss, log_probs, named(stats)
