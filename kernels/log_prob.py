"""Log-probs of chosen tokens in Triton.

Each logit is read once in the forward and once in the backward, its gradient is written once.

Forward, for a row x of V logits, its target t and the temperature T, with m = max_j x_j:

    s       = sum_j exp((x_j - m) / T)
    log p_t = (x_t - m) / T - log s
    entropy = log s - (1 / s) sum_j exp((x_j - m) / T) (x_j - m) / T

Backward: log p_t = x_t / T - log sum_j exp(x_j / T), hence with the upstream gradient g of log p_t

    p_j               = exp((x_j - m) / T - log s)
    d log p_t / d x_j = (1[j = t] - p_j) / T
    grad_j            = (g / T) (1[j = t] - p_j)

m and log s are kept apart: their sum, one log-sum-exp, would lose the small one's digits where
logits are large. Exponentials are taken to base 2, the hardware's own, with log2(e) folded into
1 / T; log2_s is log s in that base.

One program handles one row. The widest load is 16 bytes: a group of GROUP logits, 8 in bf16 and
fp16, 4 in fp32. It may begin at multiples of 16 bytes only, where seven of eight rows do not (bf16,
V = 32001). So a row is cut in three; here its second one, whose first logit lies 2 bytes behind
such a multiple:

     head |                      3,999 whole groups                           | tail
    xxxxxxx|xxxxxxxx|xxxxxxxx|...|xxxxxxxx|xxxxxxxx|...|xxxxxxxx|...|xxxxxxxx|xx
           | lane 0 | lane 1 |...|lane 511| lane 0 |...| lane 0 |...|lane 414|
           |<--------- tile 0 ----------->|<- 1 to 6 ->|<----- tile 7 ------>|
           ^
           the first multiple of 16 bytes

- Head and tail, fewer than GROUP logits each, are loaded one by one.
- The groups are walked in tiles of LANES groups, one for each lane. A lane keeps a maximum and a
  sum of its own, so that the loop needs no exchange between threads; the lanes are merged once,
  behind it. A thread serves LANES / (32 NUM_WARPS) lanes.
- The last tile is masked, as it may be part of one; the others need no mask.

The gradient is laid out with the same remainders, so that its stores are wide as well.
"""
import math

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels import reference

# 4 warps are 128 threads, so 4 lanes and four 16-byte loads in flight for each: 64 bytes per
# thread, 8 KiB per tile. V = 32001 in bf16 is 4,000 groups: 7 tiles and 416 groups of an eighth.
LANES, NUM_WARPS = 512, 4

LOG2_E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # finite: -inf minus it is no NaN


@triton.jit
def split_row(row, vocab, i, GROUP: tl.constexpr):
    """A row's three parts: (begin, groups, columns, exists).

    begin is the column where whole groups begin, and how long the head is; groups is how many there
    are. i [n] counts places at the ends, GROUP in the head, then GROUP in the tail; columns [n] are
    their columns, exists [n] says whether there is a logit.
    """
    bytes_per_logit = row.dtype.element_ty.primitive_bitwidth // 8
    misplaced = row.to(tl.int64) // bytes_per_logit % GROUP  # a view may begin at any address
    begin = tl.minimum((GROUP - misplaced) % GROUP, vocab).to(tl.int32)
    groups = (vocab - begin) // GROUP

    columns = tl.where(i < GROUP, i, begin + groups * GROUP + i - GROUP)
    tail_length = vocab - begin - groups * GROUP
    exists = i < tl.where(i < GROUP, begin, tail_length + GROUP)
    return begin, groups, columns, exists


@triton.jit
def accumulate(x, maximum, total, weighted, scale, ENTROPY: tl.constexpr):
    """An online softmax that stays within a thread: x [lanes, n] into what each lane keeps.

    That is the maximum, the sum of exp and, for the entropy, the sum of exp * (x - maximum).
    """
    x = x.to(tl.float32)  # sums over 100,000 terms need it, and it is free beside the load
    new_maximum = tl.maximum(maximum, tl.max(x, 1))
    rescale = tl.exp2((maximum - new_maximum) * scale)
    difference = x - new_maximum[:, None]
    exp = tl.exp2(difference * scale)
    if ENTROPY:
        # the sum so far was taken of x - maximum, and moves with it
        so_far = rescale * weighted + (maximum - new_maximum) * (rescale * total)
        # a logit of -inf adds 0 * LOWEST, not 0 * inf
        weighted = so_far + tl.sum(exp * tl.maximum(difference, LOWEST), 1)
    return new_maximum, rescale * total + tl.sum(exp, 1), weighted


@triton.jit
def read_row(
    row, vocab, temperature,
    LANES: tl.constexpr, GROUP: tl.constexpr, ENTROPY: tl.constexpr,
):
    """One pass over a row: (maximum m, log2 of the sum s, mean of x - m under the softmax).

    The mean is 0 if ENTROPY is off.
    """
    scale = LOG2_E / temperature
    lane = tl.arange(0, LANES)
    begin, groups, end_columns, is_end = split_row(row, vocab, lane, GROUP)
    body = tl.multiple_of(row + begin, 16) + lane[:, None] * GROUP + tl.arange(0, GROUP)[None, :]

    # head and tail, a logit for a lane
    nothing = tl.zeros([LANES], tl.float32)
    ends = tl.load(row + end_columns, mask=is_end, other=float("-inf"))[:, None]
    maximum, total, weighted = accumulate(ends, nothing + LOWEST, nothing, nothing, scale, ENTROPY)

    # whole tiles, without a mask: nothing to fill in before a load
    full_tiles = groups // LANES
    for _ in range(full_tiles):
        tile = tl.load(body)
        maximum, total, weighted = accumulate(tile, maximum, total, weighted, scale, ENTROPY)
        body += LANES * GROUP

    # the last tile
    is_group = (full_tiles * LANES + lane < groups)[:, None]
    last = tl.load(body, mask=is_group, other=float("-inf"))
    maximum, total, weighted = accumulate(last, maximum, total, weighted, scale, ENTROPY)

    # the lanes meet, as two sums do in accumulate
    row_maximum = tl.max(maximum, 0)
    rescale = tl.exp2((maximum - row_maximum) * scale)
    s = tl.sum(rescale * total, 0)
    if ENTROPY:
        moved = rescale * weighted + (maximum - row_maximum) * (rescale * total)
        mean_difference = tl.sum(moved, 0) / s
    else:
        mean_difference = 0.0
    return row_maximum, tl.log2(s), mean_difference


@triton.jit
def log_prob_of(row, target, vocab, temperature, maximum, log2_s):
    is_token = (target >= 0) & (target < vocab)
    x = tl.load(row + target, mask=is_token, other=float("nan"))  # not another row's logit
    return (x.to(tl.float32) - maximum) / temperature - log2_s / LOG2_E


@triton.jit
def store_softmax(logits, gradient, offset, mask, maximum, log2_s, scale, factor):
    """factor * p_j where the mask holds."""
    x = tl.load(logits + offset, mask=mask).to(tl.float32)
    p = tl.exp2((x - maximum) * scale - log2_s)
    value = (factor * p).to(gradient.dtype.element_ty)  # rounded once, here
    tl.store(gradient + offset, value, mask=mask)


@triton.jit
def write_gradient(
    row, gradient_row, target, vocab, temperature, maximum, log2_s, log_prob, upstream,
    LANES: tl.constexpr, GROUP: tl.constexpr,
):
    """upstream * d log p_t / d x_j for a whole row.

    gradient_row may be row itself: each thread overwrites what it has just read, and nothing else.
    """
    scale = LOG2_E / temperature
    factor = upstream / temperature
    lane = tl.arange(0, LANES)
    begin, groups, end_columns, is_end = split_row(row, vocab, tl.arange(0, 2 * GROUP), GROUP)
    body = tl.multiple_of(row + begin, 16)
    gradient_body = tl.multiple_of(gradient_row + begin, 16)
    in_tile = lane[:, None] * GROUP + tl.arange(0, GROUP)[None, :]

    # -p_j everywhere
    store_softmax(row, gradient_row, end_columns, is_end, maximum, log2_s, scale, -factor)
    for tile in range(tl.cdiv(groups, LANES)):
        is_group = (tile * LANES + lane < groups)[:, None]
        offset = tile * LANES * GROUP + in_tile
        store_softmax(body, gradient_body, offset, is_group, maximum, log2_s, scale, -factor)

    # 1 - p_t at the target, in fp32: taken from a p that was rounded to bf16 it could be all error
    one_minus_p = 1 - tl.exp2(log_prob * LOG2_E)
    tl.debug_barrier()  # another thread has stored this column a moment ago; this is the last word
    value = (factor * one_minus_p).to(gradient_row.dtype.element_ty)
    is_token = (target >= 0) & (target < vocab)
    tl.store(gradient_row + target, value, mask=is_token)


@triton.jit(do_not_specialize=range(11))  # one binary whatever sizes, strides and alignments are
def forward_kernel(
    logits,                  # [A, B, V] bf16, fp16 or fp32; rows without gaps
    target_ids,              # [A * B] int64 or int32
    log_probs,               # [A * B] fp32, written
    maxima,                  # [A * B] fp32, written
    log2_sums,               # [A * B] fp32, written
    entropies,               # [A * B] fp32, written; None where ENTROPY is off
    inner,                   # B
    vocab,                   # V
    outer_stride: tl.int64,  # of logits, over A
    inner_stride: tl.int64,  # of logits, over B
    temperature,             # fp32, above 0
    LANES: tl.constexpr,     # groups in a tile
    GROUP: tl.constexpr,     # logits in 16 bytes
    ENTROPY: tl.constexpr,   # whether entropies are wanted
):
    n = tl.program_id(0).to(tl.int64)  # 32 bits end at 2^31 logits
    row = logits + n // inner * outer_stride + n % inner * inner_stride
    maximum, log2_s, mean_difference = read_row(row, vocab, temperature, LANES, GROUP, ENTROPY)
    target = tl.load(target_ids + n)
    log_prob = log_prob_of(row, target, vocab, temperature, maximum, log2_s)
    tl.store(log_probs + n, log_prob)
    tl.store(maxima + n, maximum)
    tl.store(log2_sums + n, log2_s)
    if ENTROPY:
        tl.store(entropies + n, log2_s / LOG2_E - mean_difference / temperature)


@triton.jit(do_not_specialize=range(14))
def backward_kernel(
    logits,                           # [A, B, V] bf16, fp16 or fp32; rows without gaps
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
    LANES: tl.constexpr,              # groups in a tile
    GROUP: tl.constexpr,              # logits in 16 bytes
):
    n = tl.program_id(0).to(tl.int64)
    row = logits + n // inner * outer_stride + n % inner * inner_stride
    gradient_row = gradient + n // inner * gradient_outer_stride + n % inner * gradient_inner_stride
    write_gradient(
        row,
        gradient_row,
        tl.load(target_ids + n),
        vocab,
        temperature,
        tl.load(maxima + n),
        tl.load(log2_sums + n),
        tl.load(log_probs + n),
        tl.load(upstream + n),
        LANES,
        GROUP,
    )


def forward_rows(logits, target_ids, temperature, log_probs, maxima, log2_sums, entropies=None):
    """The forward of [A, B, V] logits into [A * B] results."""
    rows = target_ids.numel()
    with torch.cuda.device_of(logits):
        forward_kernel[(rows,)](
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
            LANES=LANES,
            GROUP=16 // logits.element_size(),
            ENTROPY=entropies is not None,
            num_warps=NUM_WARPS,
        )


def backward_rows(
    logits, target_ids, temperature, log_probs, maxima, log2_sums, upstream, gradient,
):
    """The backward of [A, B, V] logits into their gradient.

    That is laid out as like_rows_of(logits), or is logits itself.
    """
    rows = target_ids.numel()
    with torch.cuda.device_of(logits):
        backward_kernel[(rows,)](
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
            LANES=LANES,
            GROUP=16 // logits.element_size(),
            num_warps=NUM_WARPS,
        )


def as_rows(logits):
    """Logits [..., V] as [A, B, V] with rows without gaps; a view where that can be one."""
    if logits.dim() == 1:
        rows = logits[None, None]
    else:
        rows = logits.reshape(-1, *logits.shape[-2:])  # a view for up to 3 dimensions
    return rows if rows.stride(2) == 1 else rows.contiguous()


def like_rows_of(logits):
    """An empty [A, B, V] whose rows begin at the same remainders of 16 bytes as logits' do."""
    group = 16 // logits.element_size()
    outer, inner, vocab = logits.shape
    inner_stride = at_least(vocab, logits.stride(1), group)
    outer_stride = at_least(inner_stride * inner, logits.stride(0), group)
    offset = logits.data_ptr() // logits.element_size() % group
    storage = logits.new_empty(outer_stride * outer + offset)
    return storage.as_strided(logits.shape, (outer_stride, inner_stride, 1), offset)


def at_least(extent, stride, group):
    """The smallest stride from extent on that has the same remainder of a group as the given."""
    return extent + (stride - extent) % group


class GatherLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target_ids, temperature, return_entropy):
        ctx.shape, ctx.temperature = logits.shape, temperature
        logits, target_ids = as_rows(logits), target_ids.contiguous()
        log_probs, maxima, log2_sums = (
            torch.empty(target_ids.shape, dtype=torch.float32, device=logits.device)
            for _ in range(3)
        )
        entropies = torch.empty_like(log_probs) if return_entropy else None
        forward_rows(logits, target_ids, temperature, log_probs, maxima, log2_sums, entropies)
        ctx.save_for_backward(logits, target_ids, log_probs, maxima, log2_sums)
        if not return_entropy:
            return log_probs
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        logits, target_ids, log_probs, maxima, log2_sums = ctx.saved_tensors
        gradient = like_rows_of(logits)
        backward_rows(
            logits, target_ids, ctx.temperature, log_probs, maxima, log2_sums,
            upstream.contiguous(), gradient,
        )
        return gradient.reshape(ctx.shape), None, None, None


def gather_log_probs(logits, target_ids, temperature=1.0, return_entropy=False):
    """log softmax(logits / temperature) at the targets: [..., V], [...] -> fp32 [...].

    With return_entropy a pair: the second is each row's entropy, fp32 [...].
    """
    if target_ids.numel() == 0:  # an empty grid cannot be launched
        return reference.gather_log_probs(logits, target_ids, temperature, return_entropy)
    return GatherLogProbs.apply(logits, target_ids, temperature, return_entropy)
