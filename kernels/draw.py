"""A token from each row's softmax, given the row's random number: the inverse of the cumulated
distribution, in one launch.

    token = min {j : sum_{i <= j} exp(y_i - m) >= u sum_i exp(y_i - m)},  y = x / T,  m = max_i y_i

The sums grow with j, so the token is how many of them stay below the level. All but y is float64,
as in plumbing/sampling.py: only the order of additions and the last bits of exp differ, so a draw
does only if its u falls within some 1e-12 of the border between two tokens. A row is read three
times, for its maximum, its sum and its token; B rows of fp32 are 4 B V bytes, which an L2 cache
holds.
"""
import torch
import triton
import triton.language as tl

BLOCK, NUM_WARPS = 4096, 8


@triton.jit
def scaled(row, j, vocab, temperature):
    """y_j in fp32, -inf where there is no token."""
    x = tl.load(row + j, mask=j < vocab, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, temperature)


@triton.jit(do_not_specialize=range(5))
def draw_kernel(
    logits,               # [B, V] fp32, bf16 or fp16, x
    uniform,              # [B] float64, in (0, 1], u
    tokens,               # [B] int64, written
    vocab,                # V
    temperature,          # fp32, above 0
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * vocab
    block = tl.arange(0, BLOCK)

    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        y = scaled(row, start + block, vocab, temperature)
        largest = tl.maximum(largest, y)
    maximum = tl.max(largest, 0).to(tl.float64)

    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        y = scaled(row, start + block, vocab, temperature)
        total += tl.exp(y.to(tl.float64) - maximum)
    level = tl.load(uniform + n) * tl.sum(total, 0)

    below = tl.zeros([], tl.float64)  # the sum of what lies before a block
    token = tl.zeros([], tl.int64)
    for start in range(0, vocab, BLOCK):
        j = start + block
        w = tl.exp(scaled(row, j, vocab, temperature).to(tl.float64) - maximum)
        is_below = (below + tl.cumsum(w, 0) < level) & (j < vocab)
        token += tl.sum(is_below.to(tl.int64), 0)
        below += tl.sum(w, 0)
    tl.store(tokens + n, tl.minimum(token, vocab - 1))


def draw(logits, uniform, temperature=1.0):
    """Tokens [B] of logits [B, V] and numbers [B] in (0, 1]."""
    logits, uniform = logits.contiguous(), uniform.double().contiguous()
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    with torch.cuda.device_of(logits):
        draw_kernel[(len(logits),)](
            logits, uniform, tokens, logits.shape[1], float(temperature),
            BLOCK=BLOCK, num_warps=NUM_WARPS,
        )
    return tokens
