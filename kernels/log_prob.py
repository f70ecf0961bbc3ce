"""Log-probs of chosen tokens from logits, in Triton. rows.py explains what one program does.

Logits are [A, B, V] here. A and B may have any strides, so a slice such as logits[:, :-1] needs no
copy. The logits of a row are adjacent in memory.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import reference
from kernels.rows import (
    LANES,
    LOG2_E,
    NUM_WARPS,
    log_prob_of,
    read_row,
    target_logit,
    write_gradient,
)


@triton.jit(do_not_specialize=range(12))  # one binary for all sizes, strides and alignments
def forward_kernel(
    logits,                  # [A, B, V] bf16, fp16 or fp32; each row contiguous
    target_ids,              # [A * B] int64 or int32
    log_probs,               # [A * B] fp32, written
    maxima,                  # [A * B] fp32, written
    log2_sums,               # [A * B] fp32, written
    entropies,               # [A * B] fp32, written; None without ENTROPY
    inner,                   # B
    vocab,                   # V
    outer_stride: tl.int64,  # of logits, over A
    inner_stride: tl.int64,  # of logits, over B
    temperature,             # fp32, above 0
    soft_cap,                # fp32, c; read if CAPPED
    LANES: tl.constexpr,     # groups in a tile
    GROUP: tl.constexpr,     # logits in 16 bytes
    CAPPED: tl.constexpr,    # whether the head has a soft cap
    ENTROPY: tl.constexpr,   # whether entropies are wanted
):
    n = tl.program_id(0).to(tl.int64)  # 32 bits are too few beyond 2^31 logits
    row = logits + n // inner * outer_stride + n % inner * inner_stride
    maximum, log2_s, mean_difference = read_row(
        row, vocab, temperature, soft_cap, LANES, GROUP, CAPPED, ENTROPY,
    )
    x = target_logit(row, tl.load(target_ids + n), vocab, soft_cap, CAPPED)
    tl.store(log_probs + n, log_prob_of(x, temperature, maximum, log2_s))
    tl.store(maxima + n, maximum)
    tl.store(log2_sums + n, log2_s)
    if ENTROPY:
        tl.store(entropies + n, log2_s / LOG2_E - mean_difference / temperature)


@triton.jit(do_not_specialize=range(15))
def backward_kernel(
    logits,                           # [A, B, V] bf16, fp16 or fp32; each row contiguous
    target_ids,                       # [A * B] int64 or int32
    log_probs,                        # [A * B] fp32, the forward's
    maxima,                           # [A * B] fp32, the forward's
    log2_sums,                        # [A * B] fp32, the forward's
    upstream,                         # [A * B] fp32, the gradients of log_probs
    gradient,                         # [A, B, V] as logits, written; may be logits itself
    inner,                            # B
    vocab,                            # V
    outer_stride: tl.int64,           # of logits, over A
    inner_stride: tl.int64,           # of logits, over B
    gradient_outer_stride: tl.int64,  # of gradient, over A
    gradient_inner_stride: tl.int64,  # of gradient, over B
    temperature,                      # fp32, above 0
    soft_cap,                         # fp32, c; read if CAPPED
    LANES: tl.constexpr,              # groups in a tile
    GROUP: tl.constexpr,              # logits in 16 bytes
    CAPPED: tl.constexpr,             # whether the head has a soft cap
):
    n = tl.program_id(0).to(tl.int64)
    row = logits + n // inner * outer_stride + n % inner * inner_stride
    gradient_row = gradient + n // inner * gradient_outer_stride + n % inner * gradient_inner_stride
    target = tl.load(target_ids + n)
    x = target_logit(row, target, vocab, soft_cap, CAPPED)
    tl.debug_barrier()  # all threads read the target's logit before one overwrites it
    write_gradient(
        row,
        gradient_row,
        target,
        x,
        vocab,
        temperature,
        soft_cap,
        tl.load(maxima + n),
        tl.load(log2_sums + n),
        tl.load(log_probs + n),
        tl.load(upstream + n),
        LANES,
        GROUP,
        CAPPED,
    )


def forward_rows(
    logits, target_ids, temperature, soft_cap, log_probs, maxima, log2_sums, entropies=None,
):
    """Writes the results [A * B] of logits [A, B, V]."""
    with torch.cuda.device_of(logits):
        forward_kernel[(target_ids.numel(),)](
            logits=logits,
            target_ids=target_ids,
            log_probs=log_probs,
            maxima=maxima,
            log2_sums=log2_sums,
            entropies=entropies,
            inner=logits.shape[1],
            vocab=logits.shape[2],
            outer_stride=logits.stride(0),
            inner_stride=logits.stride(1),
            temperature=float(temperature),
            soft_cap=float(soft_cap),
            LANES=LANES,
            GROUP=16 // logits.element_size(),
            CAPPED=soft_cap > 0,
            ENTROPY=entropies is not None,
            num_warps=NUM_WARPS,
        )


def backward_rows(
    logits, target_ids, temperature, soft_cap, log_probs, maxima, log2_sums, upstream, gradient,
):
    """Writes the gradient of logits [A, B, V].

    Its memory is like_rows_of(logits), or that of logits itself.
    """
    with torch.cuda.device_of(logits):
        backward_kernel[(target_ids.numel(),)](
            logits=logits,
            target_ids=target_ids,
            log_probs=log_probs,
            maxima=maxima,
            log2_sums=log2_sums,
            upstream=upstream,
            gradient=gradient,
            inner=logits.shape[1],
            vocab=logits.shape[2],
            outer_stride=logits.stride(0),
            inner_stride=logits.stride(1),
            gradient_outer_stride=gradient.stride(0),
            gradient_inner_stride=gradient.stride(1),
            temperature=float(temperature),
            soft_cap=float(soft_cap),
            LANES=LANES,
            GROUP=16 // logits.element_size(),
            CAPPED=soft_cap > 0,
            num_warps=NUM_WARPS,
        )


def as_rows(logits):
    """Logits [..., V] as [A, B, V] with contiguous rows, without a copy if that is possible."""
    if logits.dim() == 1:
        rows = logits[None, None]
    else:
        rows = logits.reshape(-1, *logits.shape[-2:])  # a view for up to 3 dimensions
    return rows if rows.stride(2) == 1 else rows.contiguous()


def like_rows_of(logits, first):
    """Memory for a gradient [A, B, V] in which each row is aligned as its row of logits is.

    The alignment is the address modulo 16 bytes. first is the address of the first row, counted in
    logits.
    """
    group = 16 // logits.element_size()
    outer, inner, vocab = logits.shape
    inner_stride = at_least(vocab, logits.stride(1), group)
    outer_stride = at_least(inner_stride * inner, logits.stride(0), group)
    offset = first % group
    storage = logits.new_empty(outer_stride * outer + offset)
    return storage.as_strided(logits.shape, (outer_stride, inner_stride, 1), offset)


def at_least(extent, stride, group):
    """The smallest stride of at least extent that equals the given stride modulo group."""
    return extent + (stride - extent) % group


# ---- as operators of PyTorch, which torch.compile does not look into

@torch.library.custom_op("repo::gather_log_probs", mutates_args=())
def gather_op(
    logits: Tensor, target_ids: Tensor, temperature: float, with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs, entropies, maxima, log2 sums). The backward needs the last two."""
    results = empty_results(logits, target_ids, with_entropy)
    log_probs, entropies, maxima, log2_sums = results
    forward_rows(
        as_rows(logits), target_ids.contiguous(), temperature, 0.0, log_probs, maxima, log2_sums,
        entropies if with_entropy else None,
    )
    return results


@gather_op.register_fake
def _(logits, target_ids, temperature, with_entropy):
    return empty_results(logits, target_ids, with_entropy)


def empty_results(logits, target_ids, with_entropy):
    """Memory for four results with a number per token. The second is empty without entropy."""
    def empty(*shape):
        return logits.new_empty(shape, dtype=torch.float32)

    entropies = empty(*target_ids.shape) if with_entropy else empty(0)
    return empty(*target_ids.shape), entropies, empty(*target_ids.shape), empty(*target_ids.shape)


@torch.library.custom_op("repo::gather_log_probs_backward", mutates_args=())
def gather_backward_op(
    upstream: Tensor, logits: Tensor, target_ids: Tensor, temperature: float, log_probs: Tensor,
    maxima: Tensor, log2_sums: Tensor,
) -> Tensor:
    """The gradient of the logits, as [A, B, V]."""
    rows = as_rows(logits)
    gradient = like_rows_of(rows, rows.data_ptr() // rows.element_size())
    backward_rows(
        rows, target_ids.contiguous(), temperature, 0.0, log_probs, maxima, log2_sums,
        upstream.contiguous(), gradient,
    )
    return gradient


@gather_backward_op.register_fake
def _(upstream, logits, target_ids, temperature, log_probs, maxima, log2_sums):
    rows = as_rows(logits)
    return like_rows_of(rows, rows.storage_offset())  # allocations begin at multiples of 16 bytes


def keep_for_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # autograd makes no zeros for outputs without a gradient
    logits, target_ids, ctx.temperature, _ = inputs
    log_probs, entropies, maxima, log2_sums = output
    ctx.save_for_backward(logits, target_ids, log_probs, maxima, log2_sums)
    ctx.mark_non_differentiable(entropies, maxima, log2_sums)


def backward(ctx, upstream, *_):
    logits, target_ids, *kept = ctx.saved_tensors
    gradient = gather_backward_op(upstream, logits, target_ids, ctx.temperature, *kept)
    return gradient.reshape(logits.shape), None, None, None


gather_op.register_autograd(once_differentiable(backward), setup_context=keep_for_backward)


def gather_log_probs(logits, target_ids, temperature=1.0, return_entropy=False):
    """log softmax(logits / temperature) at the targets: [..., V], [...] -> fp32 [...].

    With return_entropy a pair: the second is each row's entropy, fp32 [...].
    """
    if target_ids.numel() == 0:  # an empty grid cannot be launched
        return reference.gather_log_probs(logits, target_ids, temperature, return_entropy)
    log_probs, entropies, _, _ = gather_op(logits, target_ids, float(temperature), return_entropy)
    return (log_probs, entropies) if return_entropy else log_probs
