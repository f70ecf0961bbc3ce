"""LM head, log-prob and loss in one: the products of linear.py, three of them for each token.

linear_repo_loss makes its gradients in the forward: the clip depends on the log-prob itself, but a
chunk holds whole rows, so each log-prob is final before its row of G is written. Nothing is
computed twice.

dW [V, H] is the largest thing here, so nothing passes over an fp32 head's but one product per
chunk: the first one stores, later ones add, and the last one, which waits for the backward,
multiplies by the upstream scalar what is there as well as what it adds. Two numbers, beta and
alpha, do that to a product, if the CPU knows them: so it waits for the forward to end, and has no
lead when the backward begins. A pass over dW takes 350 us (computed: V = 32001, H = 4096, read and
written at 3 TB/s), a kernel's launch some 10. The last chunk's G lives until then. dX [N, H] is
smaller, and multiplied in place.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear import (
    add_product,
    chunks,
    compute_dtype,
    gradients_of,
    in_their_types,
    linear_log_probs,
    new_buffer,
    split,
)
from kernels.objective import clipped_objective, launch_loss, named, repo_loss
from kernels.rows import LANES, NUM_WARPS, log_prob_of, read_row, target_logit, write_gradient


@triton.jit(do_not_specialize=range(15))  # one binary whatever sizes, strides and alignments are
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
    soft_cap,              # fp32, c; read where CAPPED is on
    lowest_ratio,          # fp32, 1 - epsilon
    highest_ratio,         # fp32, 1 + epsilon
    gradient_scale,        # fp32, a factor of the gradient
    LANES: tl.constexpr,   # groups in a tile
    GROUP: tl.constexpr,   # logits in 16 bytes
    CAPPED: tl.constexpr,  # whether the head has a cap
):
    """A row of logits becomes its own gradient, by way of its log-prob and the loss on it."""
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

    tl.debug_barrier()  # every thread has read the target's logit before any thread overwrites it
    write_gradient(
        row, row, target, x, vocab, temperature, soft_cap, maximum, log2_s, log_prob,
        upstream * gradient_scale, LANES, GROUP, CAPPED,
    )


def launch_rows(logits, target_ids, log_probs, per_token, clip_range, temperature, soft_cap, scale):
    """A chunk's logits [n, V] into log_probs [n] and, in place, scale times their gradient.

    per_token holds old log-probs, both advantages, lambdas and weight, each [n].
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
            gradient_scale=scale,
            LANES=LANES,
            GROUP=16 // logits.element_size(),
            CAPPED=soft_cap > 0,
            num_warps=NUM_WARPS,
        )


def gradient_scale(count):
    """w_t is about 1 / N, so fp16 would lose the gradients' small entries. A power of 2, because it
    rounds nothing."""
    return 2.0 ** count.bit_length()


# ---- as operators of PyTorch, which torch.compile takes as they are

@torch.library.custom_op("repo::linear_repo_loss", mutates_args=())
def loss_op(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, old_log_probs: Tensor,
    reward_advantages: Tensor, cost_advantages: Tensor, lambdas: Tensor, token_weight: Tensor,
    clip_range: float, temperature: float, soft_cap: float, dtype: torch.dtype,
    hidden_learns: bool, weight_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, log-probs, statistics; dX, dW of all chunks but the last, the last one's G), the
    gradients times gradient_scale(N)."""
    hidden_gradient, weight_gradient = gradients_of(
        hidden, weight, dtype, hidden_learns, weight_learns,
    )
    per_token = [
        tensor.float().contiguous() for tensor in
        (old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight)
    ]
    x, w, target_ids = hidden.to(dtype), weight.to(dtype), target_ids.contiguous()
    log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)
    slices, buffer = split(x, weight_learns), new_buffer(x, w, weight_learns)

    for rows, logits in chunks(x, w, slices, buffer):
        launch_rows(
            logits, target_ids[rows], log_probs[rows],
            [tensor[rows] for tensor in per_token],
            clip_range, temperature, soft_cap, gradient_scale(len(hidden)),
        )
        if hidden_learns:
            torch.mm(logits, w, out=hidden_gradient[rows])
        if weight_learns and rows is not slices[-1]:
            add_product(weight_gradient, logits.t(), x[rows], beta=float(rows.start > 0))

    loss, stats, _ = launch_loss([log_probs, *per_token], clip_range)
    last_gradient = buffer if weight_learns else buffer.new_empty(0)
    return loss, log_probs, stats, hidden_gradient, weight_gradient, last_gradient


@loss_op.register_fake
def _(hidden, weight, target_ids, old_log_probs, reward_advantages, cost_advantages, lambdas,
      token_weight, clip_range, temperature, soft_cap, dtype, hidden_learns, weight_learns):
    def empty(*shape):
        return hidden.new_empty(shape, dtype=torch.float32)

    gradients = gradients_of(hidden, weight, dtype, hidden_learns, weight_learns)
    buffer = new_buffer(hidden.to(dtype), weight, weight_learns)
    last_gradient = buffer if weight_learns else buffer.new_empty(0)
    return empty(), empty(hidden.shape[0]), empty(3), *gradients, last_gradient


@torch.library.custom_op(
    "repo::finish_gradients", mutates_args=("hidden_gradient", "weight_gradient"),
    tags=(torch.Tag.cudagraph_unsafe,),
)
def finish_op(
    hidden_gradient: Tensor, weight_gradient: Tensor, last_gradient: Tensor, hidden: Tensor,
    upstream: Tensor, hidden_learns: bool, weight_learns: bool,
) -> None:
    """The upstream factor, and to dW the last chunk's product: upstream (dW + G^T X)."""
    factor = upstream / gradient_scale(len(hidden))
    if hidden_learns:
        hidden_gradient.mul_(factor)
    slices = split(hidden, weight_learns)
    if weight_learns and slices:
        x = hidden[slices[-1]].to(last_gradient.dtype)
        last_gradient = last_gradient[:len(x), :len(weight_gradient)]
        alpha = factor.item()
        beta = alpha if len(slices) > 1 else 0.0
        add_product(weight_gradient, last_gradient.t(), x, beta, alpha)


@finish_op.register_fake
def _(hidden_gradient, weight_gradient, last_gradient, hidden, upstream, hidden_learns,
      weight_learns):
    pass


def keep_for_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    loss, log_probs, stats, *ctx.begun = output
    ctx.settings = inputs[8:]
    ctx.save_for_backward(*inputs[:8])
    ctx.mark_non_differentiable(log_probs, stats, *ctx.begun)


def backward(ctx, upstream, *_):
    hidden, weight, *_ = ctx.saved_tensors
    if ctx.begun is None:  # a kept graph, whose first backward has used it up
        ctx.begun = loss_op(*ctx.saved_tensors, *ctx.settings)[3:]
    (*gradients, last_gradient), ctx.begun = ctx.begun, None

    learns = ctx.settings[-2:]
    finish_op(*gradients, last_gradient, hidden, upstream, *learns)
    return *in_their_types(gradients, (hidden, weight), learns), *[None] * 12


loss_op.register_autograd(once_differentiable(backward), setup_context=keep_for_backward)


def linear_repo_loss(
    hidden, weight, target_ids,
    old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight,
    clip_range=0.2, temperature=1.0, soft_cap=0.0,
):
    """repo_loss(linear_log_probs(...), ...): (scalar loss, detached fp32 log-probs [N], stats)."""
    per_token = old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight
    hidden_learns = torch.is_grad_enabled() and hidden.requires_grad
    weight_learns = torch.is_grad_enabled() and weight.requires_grad
    if not (hidden_learns or weight_learns):
        log_probs = linear_log_probs(hidden, weight, target_ids, temperature, soft_cap=soft_cap)
        loss, stats = repo_loss(log_probs, *per_token, clip_range)
        return loss, log_probs, stats

    dtype = compute_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, log_probs, stats, *_ = loss_op(
            hidden, weight, target_ids, *per_token, float(clip_range), float(temperature),
            float(soft_cap), dtype, hidden_learns, weight_learns,
        )
    return loss, log_probs, named(stats)
