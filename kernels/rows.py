"""One row of logits in Triton: its log-prob, its entropy, and its gradient.

Each logit is read once in the forward and once in the backward, its gradient is written once.

Forward, for a row x of V logits, its target t and the temperature T, with m = max_j x_j:

    s       = sum_j exp((x_j - m) / T)
    log p_t = (x_t - m) / T - log s
    entropy = log s - (1 / s) sum_j exp((x_j - m) / T) (x_j - m) / T

Backward: log p_t = x_t / T - log sum_j exp(x_j / T), hence with the upstream gradient g of log p_t

    p_j               = exp((x_j - m) / T - log s)
    d log p_t / d x_j = (1[j = t] - p_j) / T
    grad_j            = (g / T) (1[j = t] - p_j)

A head with a soft cap c (Gemma's) has logits x = c tanh(z / c) of what its product gives, z. Then x
above is made from z as it is loaded, and dx / dz = 1 - (x / c)^2 is one more factor of grad_j. A
head's scale needs no code: it divides T.

m and log s are kept apart: their sum, one log-sum-exp, would lose the small one's digits where
logits are large. Exponentials are taken to base 2, the hardware's own, with log2(e) folded into
1 / T; log2_s is log s in that base.

One program handles one row. The widest load is 16 bytes: a group of GROUP logits, 8 in bf16 and
fp16, 4 in fp32. It may begin at multiples of 16 bytes only, where seven of eight rows do not (bf16,
V = 32001). So a row is cut in three; here its second one, whose first logit lies 2 bytes behind
such a multiple:

    front |                      3,999 whole groups                            | back
    xxxxxxx|xxxxxxxx|xxxxxxxx|...|xxxxxxxx|xxxxxxxx|...|xxxxxxxx|...|xxxxxxxx|xx
           | lane 0 | lane 1 |...|lane1023| lane 0 |...| lane 0 |...|lane 926|
           |<--------- tile 0 ----------->|<- 1, 2 --->|<----- tile 3 ------>|
           ^
           the first multiple of 16 bytes

- Front and back, fewer than GROUP logits each, are loaded one by one.
- The groups are walked in tiles of LANES groups, one for each lane. A lane keeps a maximum and a
  sum of its own, so that the loop needs no exchange between threads; the lanes are merged once,
  behind it. A thread serves LANES / (32 NUM_WARPS) lanes.
- The last tile is masked, as it may be part of one; the others need no mask.

The gradient is laid out with the same remainders, so that its stores are wide as well.

Every kernel takes LANES and NUM_WARPS from here. They fix the order of the sums, so the same logits
give the same bits in each, and where a policy has not changed, and its products have given the same
logits, its ratio is exactly 1. Rows that begin at other remainders of 16 bytes are cut elsewhere,
and may differ in the last bit.
"""
import math

import torch
import triton
import triton.language as tl

# Many threads on few rows, so that a row which is read twice is found in the L2 cache: 16 warps are
# 512 threads, 4 programs fill an SM, and 132 x 4 rows of V = 32001 in bf16 are 34 MB, of an H100's
# 50. 2 lanes and two 16-byte loads in flight for each thread are 64 KiB per SM, of the 16 to 24
# that keep its memory busy. V = 32001 is 4,000 groups: 3 tiles and 928 groups of a fourth.
LANES, NUM_WARPS = 1024, 16

LOG2_E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # finite: -inf minus it is no NaN


@triton.jit
def split_row(row, vocab, i, GROUP: tl.constexpr):
    """A row's three parts: (begin, groups, columns, exists).

    begin is the column where whole groups begin, and how long the front is; groups is how many
    there are. i [n] counts places at the ends, GROUP in the front, then GROUP in the back; columns
    [n] are their columns, exists [n] says whether there is a logit.
    """
    bytes_per_logit = row.dtype.element_ty.primitive_bitwidth // 8
    misplaced = row.to(tl.int64) // bytes_per_logit % GROUP  # a view may begin at any address
    begin = tl.minimum((GROUP - misplaced) % GROUP, vocab).to(tl.int32)
    groups = (vocab - begin) // GROUP

    columns = tl.where(i < GROUP, i, begin + groups * GROUP + i - GROUP)
    back_length = vocab - begin - groups * GROUP
    exists = i < tl.where(i < GROUP, begin, back_length + GROUP)
    return begin, groups, columns, exists


@triton.jit
def load_logits(pointers, mask, soft_cap, CAPPED: tl.constexpr):
    """Logits in fp32, behind the cap if there is one; -inf where the mask does not hold."""
    x = tl.load(pointers, mask=mask, other=float("-inf")).to(tl.float32)
    if CAPPED:
        x = tl.where(mask, behind_cap(x, soft_cap), float("-inf"))
    return x


@triton.jit
def behind_cap(x, soft_cap):
    """c tanh(x / c), by way of an exponential that may overflow or vanish: tanh is then 1 or -1."""
    return soft_cap - tl.fdiv(2 * soft_cap, 1 + tl.exp2(x * (2 * LOG2_E / soft_cap)))


@triton.jit
def slope_of_cap(x, soft_cap):
    """d x / d z of x = c tanh(z / c)."""
    tanh = x * (1 / soft_cap)
    return 1 - tanh * tanh


@triton.jit
def accumulate(x, maximum, total, weighted, scale, ENTROPY: tl.constexpr):
    """An online softmax that stays within a thread: x [lanes, n] into what each lane keeps.

    That is the maximum, the sum of exp and, for the entropy, the sum of exp * (x - maximum).
    """
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
    row, vocab, temperature, soft_cap,
    LANES: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
):
    """One pass over a row: (maximum m, log2 of the sum s, mean of x - m under the softmax).

    The mean is 0 if ENTROPY is off.
    """
    scale = LOG2_E / temperature
    lane = tl.arange(0, LANES)
    begin, groups, end_columns, is_end = split_row(row, vocab, lane, GROUP)
    body = tl.multiple_of(row + begin, 16) + lane[:, None] * GROUP + tl.arange(0, GROUP)[None, :]

    # front and back, a logit for a lane
    nothing = tl.zeros([LANES], tl.float32)
    ends = load_logits(row + end_columns, is_end, soft_cap, CAPPED)[:, None]
    maximum, total, weighted = accumulate(ends, nothing + LOWEST, nothing, nothing, scale, ENTROPY)

    # whole tiles, without a mask: nothing to fill in before a load
    full_tiles = groups // LANES
    for _ in range(full_tiles):
        tile = tl.load(body).to(tl.float32)
        if CAPPED:
            tile = behind_cap(tile, soft_cap)
        maximum, total, weighted = accumulate(tile, maximum, total, weighted, scale, ENTROPY)
        body += LANES * GROUP

    # the last tile
    is_group = (full_tiles * LANES + lane < groups)[:, None]
    last = load_logits(body, is_group, soft_cap, CAPPED)
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
def target_logit(row, target, vocab, soft_cap, CAPPED: tl.constexpr):
    """The target's logit; NaN, not another row's logit, where it is no token."""
    is_token = (target >= 0) & (target < vocab)
    x = tl.load(row + target, mask=is_token, other=float("nan")).to(tl.float32)
    if CAPPED:
        x = behind_cap(x, soft_cap)
    return x


@triton.jit
def log_prob_of(x, temperature, maximum, log2_s):
    return (x - maximum) / temperature - log2_s / LOG2_E


@triton.jit
def store_softmax(
    logits, gradient, offset, mask, maximum, log2_s, scale, factor, soft_cap, CAPPED: tl.constexpr,
):
    """factor * p_j where the mask holds, times the cap's derivative if there is one."""
    x = load_logits(logits + offset, mask, soft_cap, CAPPED)
    value = factor * tl.exp2((x - maximum) * scale - log2_s)
    if CAPPED:
        value *= slope_of_cap(x, soft_cap)
    value = value.to(gradient.dtype.element_ty)  # rounded once, here
    tl.store(gradient + offset, value, mask=mask)


@triton.jit
def write_gradient(
    row, gradient_row, target, x, vocab, temperature, soft_cap, maximum, log2_s, log_prob, upstream,
    LANES: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr,
):
    """upstream * d log p_t / d z_j for a whole row; x is the target's logit.

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
    store_softmax(
        row, gradient_row, end_columns, is_end, maximum, log2_s, scale, -factor, soft_cap, CAPPED,
    )
    for tile in range(tl.cdiv(groups, LANES)):
        is_group = (tile * LANES + lane < groups)[:, None]
        offset = tile * LANES * GROUP + in_tile
        store_softmax(
            body, gradient_body, offset, is_group, maximum, log2_s, scale, -factor, soft_cap,
            CAPPED,
        )

    # 1 - p_t at the target, in fp32: taken from a p that was rounded to bf16 it could be all error
    value = factor * (1 - tl.exp2(log_prob * LOG2_E))
    if CAPPED:
        value *= slope_of_cap(x, soft_cap)
    tl.debug_barrier()  # another thread has stored this column a moment ago; this is the last word
    is_token = (target >= 0) & (target < vocab)
    tl.store(gradient_row + target, value.to(gradient_row.dtype.element_ty), mask=is_token)
