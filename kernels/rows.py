"""One row of logits in Triton: its log-prob, its entropy, and its gradient.

The forward reads each logit once. The backward reads it once more and writes its gradient once.

Forward, for a row x of V logits, its target t and the temperature T, with m = max_j x_j:

    s       = sum_j exp((x_j - m) / T)
    log p_t = (x_t - m) / T - log s
    entropy = log s - (1 / s) sum_j exp((x_j - m) / T) (x_j - m) / T

Backward: log p_t = x_t / T - log sum_j exp(x_j / T). With the upstream gradient g of log p_t,

    p_j               = exp((x_j - m) / T - log s)
    d log p_t / d x_j = (1[j = t] - p_j) / T
    grad_j            = (g / T) (1[j = t] - p_j)

A head with a soft cap c (Gemma's) has the logits x = c tanh(z / c), where z is its product. The
program computes x from z when it loads z. Then grad_j has one more factor, dx / dz = 1 - (x / c)^2.

m and log s are stored separately, because their sum would lose the digits of log s where logits are
large. The hardware computes exponentials to base 2, so log2(e) is part of the factor of x, and
log2_s is log s to base 2.

One program handles one row. The widest load is 16 bytes, which is a group of GROUP logits: 8 in
bf16 and fp16, 4 in fp32. A wide load must begin at a multiple of 16 bytes, but seven of eight rows
do not (bf16, V = 32001). So a row is cut into three parts. This is the second row of a batch, whose
first logit lies 2 bytes behind a multiple of 16:

    front |                      3,999 whole groups                            | back
    xxxxxxx|xxxxxxxx|xxxxxxxx|...|xxxxxxxx|xxxxxxxx|...|xxxxxxxx|...|xxxxxxxx|xx
           | lane 0 | lane 1 |...|lane1023| lane 0 |...| lane 0 |...|lane 926|
           |<--------- tile 0 ----------->|<- 1, 2 --->|<----- tile 3 ------>|
           ^
           the first multiple of 16 bytes

- Front and back have fewer than GROUP logits each, which are loaded one by one.
- A tile is LANES groups, one for each lane. Each lane keeps its own maximum and its own sum, so the
  loop over tiles exchanges nothing between threads. The lanes are merged once, after the loop.
  A thread serves LANES / (32 NUM_WARPS) lanes.
- The last tile may be incomplete, so it has a mask. The others need none.

A row of the gradient has the alignment of its row of logits, so its stores are 16 bytes wide too.

LANES and NUM_WARPS fix the order of the sums, and every kernel takes them from here. So the same
logits give the same bits in every kernel: if the policy and its logits have not changed, its ratio
is exactly 1. A row with another alignment is cut elsewhere and may differ in the last bit.
"""
import math

import torch
import triton
import triton.language as tl

# Many threads on few rows, so that the second reading of a row finds it in the L2 cache. 16 warps
# are 512 threads, and 4 programs fill an SM. 132 x 4 rows of V = 32001 in bf16 are 34 MB; an H100's
# L2 has 50. A thread serves 2 lanes and has two 16-byte loads in flight, which is 64 KiB per SM; 16
# to 24 keep the memory busy. At V = 128256 the cache holds only a quarter of 132 x 4 rows. Programs
# that walk over rows, so that fewer rows are in flight, need 40 registers on sm_90, which leaves
# room for 3 per SM; with 32 warps and 2,048 lanes they spill.
LANES, NUM_WARPS = 1024, 16

LOG2_E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # finite, because -inf - (-inf) is NaN


@triton.jit
def split_row(row, vocab, i, GROUP: tl.constexpr):
    """A row's three parts: (begin, groups, columns, exists).

    begin is the length of the front, and the column where whole groups begin. groups is the number
    of whole groups. i [n] numbers the places of the ends: GROUP in front, then GROUP in the back.
    columns [n] holds their columns, and exists [n] says which of them hold a logit.
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
    """Logits in fp32, after the cap if there is one. They are -inf outside the mask."""
    x = tl.load(pointers, mask=mask, other=float("-inf")).to(tl.float32)
    if CAPPED:
        x = tl.where(mask, behind_cap(x, soft_cap), float("-inf"))
    return x


@triton.jit
def behind_cap(x, soft_cap):
    """c tanh(x / c). If the exponential overflows or vanishes, the result is c or -c."""
    return soft_cap - tl.fdiv(2 * soft_cap, 1 + tl.exp2(x * (2 * LOG2_E / soft_cap)))


@triton.jit
def slope_of_cap(x, soft_cap):
    """d x / d z of x = c tanh(z / c)."""
    tanh = x * (1 / soft_cap)
    return 1 - tanh * tanh


@triton.jit
def accumulate(x, maximum, total, weighted, scale, ENTROPY: tl.constexpr):
    """An online softmax within each lane: adds x [lanes, n] to what the lane keeps.

    A lane keeps the maximum, the sum of exp and, for the entropy, the sum of exp * (x - maximum).
    """
    new_maximum = tl.maximum(maximum, tl.max(x, 1))
    rescale = tl.exp2((maximum - new_maximum) * scale)
    difference = x - new_maximum[:, None]
    exp = tl.exp2(difference * scale)
    if ENTROPY:
        # the sum so far holds x - maximum, so it changes with the maximum
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

    # front and back: one logit per lane
    nothing = tl.zeros([LANES], tl.float32)
    ends = load_logits(row + end_columns, is_end, soft_cap, CAPPED)[:, None]
    maximum, total, weighted = accumulate(ends, nothing + LOWEST, nothing, nothing, scale, ENTROPY)

    # whole tiles, without a mask
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

    # merge the lanes, as accumulate merges two sums
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
    """The target's logit, or NaN if the target is outside the vocabulary."""
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
    """Stores factor * p_j, times the derivative of the cap if there is one."""
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
    """Writes upstream * d log p_t / d z_j for a whole row. x is the target's logit.

    gradient_row may be row itself, because each thread overwrites only what it has just read.
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
    # from the last tile to the first, because the caches hold what read_row has read last
    for tile in range(tl.cdiv(groups, LANES) - 1, -1, -1):
        is_group = (tile * LANES + lane < groups)[:, None]
        offset = tile * LANES * GROUP + in_tile
        store_softmax(
            body, gradient_body, offset, is_group, maximum, log2_s, scale, -factor, soft_cap,
            CAPPED,
        )

    # 1 - p_t at the target in fp32, because 1 minus a p_t rounded to bf16 could be all error
    value = factor * (1 - tl.exp2(log_prob * LOG2_E))
    if CAPPED:
        value *= slope_of_cap(x, soft_cap)
    tl.debug_barrier()  # another thread has stored -p_t here, and this store must come after it
    is_token = (target >= 0) & (target < vocab)
    tl.store(gradient_row + target, value.to(gradient_row.dtype.element_ty), mask=is_token)
