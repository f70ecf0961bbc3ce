"""Log-probs of chosen tokens in Triton: each logit is read once in the forward, once in the backward, and its gradient is written once.

Forward, for a row x of V logits, its target t and the temperature T, with m = max_j x_j:

    s = sum_j exp((x_j - m) / T)        log p_t = (x_t - m) / T - log s        entropy = log s - (1 / s) sum_j exp((x_j - m) / T) (x_j - m) / T

Backward: log p_t = x_t / T - log sum_j exp(x_j / T), hence with the upstream gradient g of log p_t

    d log p_t / d x_j = (1[j = t] - p_j) / T        grad_j = (g / T) (1[j = t] - p_j)        p_j = exp((x_j - m) / T - log s)

m and log s are kept apart: their sum, one log-sum-exp, would lose the small one's digits where logits are large. Exponentials are taken to base 2,
the hardware's own, with log2(e) folded into 1 / T; log2_s is log s in that base.

One program handles one row, in tiles of LANES groups; a group is 16 bytes of logits, one load. Each lane keeps a maximum and a sum of its own, so
that the loop needs no exchange between threads; the lanes are merged once, behind it. A row that does not begin at a multiple of 16 bytes (seven
of eight in bf16 at V = 32001) is cut in three: the logits before the first such multiple, whole groups, and the rest. Only the two ends, fewer
than GROUP logits each, are loaded one by one. The gradient is laid out with the same remainders, so that its stores are wide as well.
"""
import math

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels import reference

LANES, NUM_WARPS = 512, 4  # four 16-byte loads in flight per thread
LOG2_E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # where a maximum starts: finite, so that -inf minus it is not NaN


@triton.jit
def split_row(row, vocab, i, GROUP: tl.constexpr):
    """The row's three parts: where whole groups begin, how many there are, the column of the i-th logit at the ends and whether there is one."""
    misplaced = row.to(tl.int64) // (row.dtype.element_ty.primitive_bitwidth // 8) % GROUP  # from the address: a view may begin anywhere
    begin = tl.minimum((GROUP - misplaced) % GROUP, vocab).to(tl.int32)
    groups = (vocab - begin) // GROUP
    return begin, groups, tl.where(i < GROUP, i, begin + groups * GROUP + i - GROUP), i < tl.where(i < GROUP, begin, vocab - begin - groups * GROUP + GROUP)


@triton.jit
def accumulate(x, maximum, total, weighted, scale, ENTROPY: tl.constexpr):
    """x [lanes, n] into each lane's maximum, sum of exp and sum of exp * (x - maximum): an online softmax that stays within a thread."""
    x = x.to(tl.float32)  # sums over 100,000 terms need it, and it is free beside the load
    new_maximum = tl.maximum(maximum, tl.max(x, 1))
    rescale = tl.exp2((maximum - new_maximum) * scale)
    difference = x - new_maximum[:, None]
    exp = tl.exp2(difference * scale)
    if ENTROPY:  # a logit of -inf adds 0 * LOWEST, not 0 * inf
        weighted = rescale * weighted + (maximum - new_maximum) * (rescale * total) + tl.sum(exp * tl.maximum(difference, LOWEST), 1)
    return new_maximum, rescale * total + tl.sum(exp, 1), weighted


@triton.jit
def read_row(row, vocab, temperature, LANES: tl.constexpr, GROUP: tl.constexpr, ENTROPY: tl.constexpr):
    """One pass over a row: its maximum m, log2 of its sum s, and the mean of x - m under its softmax (0 if ENTROPY is off)."""
    scale = LOG2_E / temperature
    lane = tl.arange(0, LANES)
    begin, groups, end_columns, is_end = split_row(row, vocab, lane, GROUP)
    body = tl.multiple_of(row + begin, 16) + lane[:, None] * GROUP + tl.arange(0, GROUP)[None, :]

    nothing = tl.zeros([LANES], tl.float32)
    x = tl.load(row + end_columns, mask=is_end, other=float("-inf"))[:, None]
    maximum, total, weighted = accumulate(x, nothing + LOWEST, nothing, nothing, scale, ENTROPY)
    full_tiles = groups // LANES
    for _ in range(full_tiles):  # without a mask: nothing to fill in before a load
        maximum, total, weighted = accumulate(tl.load(body), maximum, total, weighted, scale, ENTROPY)
        body += LANES * GROUP
    x = tl.load(body, mask=(full_tiles * LANES + lane < groups)[:, None], other=float("-inf"))
    maximum, total, weighted = accumulate(x, maximum, total, weighted, scale, ENTROPY)

    row_maximum = tl.max(maximum, 0)
    rescale = tl.exp2((maximum - row_maximum) * scale)
    s = tl.sum(rescale * total, 0)
    mean_difference = tl.sum(rescale * weighted + (maximum - row_maximum) * (rescale * total), 0) / s if ENTROPY else 0.0
    return row_maximum, tl.log2(s), mean_difference


@triton.jit
def log_prob_of(row, target, vocab, temperature, maximum, log2_s):
    x = tl.load(row + target, mask=(target >= 0) & (target < vocab), other=float("nan"))  # a wrong id gives NaN, not another row's logit
    return (x.to(tl.float32) - maximum) / temperature - log2_s / LOG2_E


@triton.jit
def store_softmax(logits, gradient, offset, mask, maximum, log2_s, scale, factor):
    """factor * p_j where the mask holds."""
    x = tl.load(logits + offset, mask=mask).to(tl.float32)
    p = tl.exp2((x - maximum) * scale - log2_s)
    tl.store(gradient + offset, (factor * p).to(gradient.dtype.element_ty), mask=mask)  # rounded once, here


@triton.jit
def write_gradient(row, gradient_row, target, vocab, temperature, maximum, log2_s, log_prob, upstream, LANES: tl.constexpr, GROUP: tl.constexpr):
    """upstream * d log p_t / d x_j for a whole row. gradient_row may be row itself: each thread overwrites what it has just read, and nothing else."""
    scale, factor = LOG2_E / temperature, upstream / temperature
    lane = tl.arange(0, LANES)
    begin, groups, end_columns, is_end = split_row(row, vocab, tl.arange(0, 2 * GROUP), GROUP)
    body, gradient_body = tl.multiple_of(row + begin, 16), tl.multiple_of(gradient_row + begin, 16)
    offset = lane[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    store_softmax(row, gradient_row, end_columns, is_end, maximum, log2_s, scale, -factor)
    for tile in range(tl.cdiv(groups, LANES)):
        is_row = (tile * LANES + lane < groups)[:, None]
        store_softmax(body, gradient_body, tile * LANES * GROUP + offset, is_row, maximum, log2_s, scale, -factor)
    one_minus_p = 1 - tl.exp2(log_prob * LOG2_E)  # in fp32: taken from a p that was rounded to bf16 it could be all error
    tl.debug_barrier()  # another thread has stored this column a moment ago; the last word is this one
    tl.store(gradient_row + target, (factor * one_minus_p).to(gradient_row.dtype.element_ty), mask=(target >= 0) & (target < vocab))


@triton.jit(do_not_specialize=range(11))  # one binary whatever sizes, strides and alignments are
def forward_kernel(logits, target_ids, log_probs, maxima, log2_sums, entropies, inner, vocab, outer_stride: tl.int64, inner_stride: tl.int64,
                   temperature, LANES: tl.constexpr, GROUP: tl.constexpr, ENTROPY: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)  # 32 bits end at 2^31 logits
    row = logits + n // inner * outer_stride + n % inner * inner_stride
    maximum, log2_s, mean_difference = read_row(row, vocab, temperature, LANES, GROUP, ENTROPY)
    tl.store(log_probs + n, log_prob_of(row, tl.load(target_ids + n), vocab, temperature, maximum, log2_s))
    tl.store(maxima + n, maximum)
    tl.store(log2_sums + n, log2_s)
    if ENTROPY:
        tl.store(entropies + n, log2_s / LOG2_E - mean_difference / temperature)


@triton.jit(do_not_specialize=range(14))
def backward_kernel(logits, target_ids, log_probs, maxima, log2_sums, upstream, gradient, inner, vocab, outer_stride: tl.int64,
                    inner_stride: tl.int64, gradient_outer_stride: tl.int64, gradient_inner_stride: tl.int64, temperature,
                    LANES: tl.constexpr, GROUP: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    row = logits + n // inner * outer_stride + n % inner * inner_stride
    gradient_row = gradient + n // inner * gradient_outer_stride + n % inner * gradient_inner_stride
    write_gradient(row, gradient_row, tl.load(target_ids + n), vocab, temperature, tl.load(maxima + n), tl.load(log2_sums + n),
                   tl.load(log_probs + n), tl.load(upstream + n), LANES, GROUP)


def like_rows_of(logits):
    """An empty [A, B, V] whose rows begin at the same remainder of 16 bytes as those of logits."""
    group, strides, extent = 16 // logits.element_size(), [1], logits.shape[2]
    for size, stride in zip(logits.shape[1::-1], logits.stride()[1::-1]):
        strides.insert(0, extent + (stride - extent) % group)
        extent = strides[0] * size
    offset = logits.data_ptr() // logits.element_size() % group
    return logits.new_empty(extent + offset).as_strided(logits.shape, strides, offset)


def forward_rows(logits, target_ids, temperature, log_probs, maxima, log2_sums, entropy=None):
    """The forward of [A, B, V] logits into [A * B] results."""
    with torch.cuda.device_of(logits):
        forward_kernel[target_ids.numel(),](logits, target_ids, log_probs, maxima, log2_sums, entropy, *logits.shape[1:], *logits.stride()[:2],
                                            float(temperature), LANES, 16 // logits.element_size(), entropy is not None, num_warps=NUM_WARPS)


def backward_rows(logits, target_ids, temperature, log_probs, maxima, log2_sums, upstream, gradient):
    """The backward of [A, B, V] logits into their gradient, laid out as like_rows_of(logits) or logits itself."""
    with torch.cuda.device_of(logits):
        backward_kernel[target_ids.numel(),](logits, target_ids, log_probs, maxima, log2_sums, upstream, gradient, *logits.shape[1:],
                                             *logits.stride()[:2], *gradient.stride()[:2], float(temperature), LANES,
                                             16 // logits.element_size(), num_warps=NUM_WARPS)


class GatherLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target_ids, temperature, return_entropy):
        ctx.shape, ctx.temperature = logits.shape, temperature
        logits = logits.reshape(-1, *logits.shape[-2:]) if logits.dim() > 1 else logits[None, None]  # [A, B, V], a view for up to 3 dimensions
        logits, target_ids = logits if logits.stride(2) == 1 else logits.contiguous(), target_ids.contiguous()
        log_probs, *saved = (torch.empty(target_ids.shape, dtype=torch.float32, device=logits.device) for _ in range(3 + return_entropy))
        forward_rows(logits, target_ids, temperature, log_probs, *saved)
        ctx.save_for_backward(logits, target_ids, log_probs, *saved[:2])
        ctx.mark_non_differentiable(*saved[2:])
        return (log_probs, saved[2]) if return_entropy else log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        logits, target_ids, *saved = ctx.saved_tensors
        gradient = like_rows_of(logits)
        backward_rows(logits, target_ids, ctx.temperature, *saved, upstream.contiguous(), gradient)
        return gradient.reshape(ctx.shape), None, None, None


def gather_log_probs(logits, target_ids, temperature=1.0, return_entropy=False):
    """log softmax(logits / temperature) at the targets: [..., V], [...] -> fp32 [...], and the entropy of each row [...] if asked for."""
    if target_ids.numel() == 0:  # an empty grid cannot be launched
        return reference.gather_log_probs(logits, target_ids, temperature, return_entropy)
    return GatherLogProbs.apply(logits, target_ids, temperature, return_entropy)
