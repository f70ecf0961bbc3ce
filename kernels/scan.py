"""GAE as one scan: T steps that wait for each other become log T.

    A_t = delta_t + c A_{t+1},  c = gamma lambda

is a map x -> a x + b of what comes behind, with a = c and b = delta_t. Two such maps after each
other are one again: first (a, b), then (a', b') on top, give (a a', a' b + b'). That operation is
associative, so halves of a row can be taken together in any bracketing, all at the same time: a
parallel scan. From a row's end to its beginning it yields, at each t, the map of everything from t
on, and A_t is what it makes of the advantage behind the block, 0 at the row's end.
"""
import torch
import triton
import triton.language as tl

BLOCK, NUM_WARPS = 1024, 4  # tokens at a time: most responses are one block


@triton.jit
def after(a, b, a_on_top, b_on_top):
    return a * a_on_top, a_on_top * b + b_on_top


@triton.jit(do_not_specialize=range(8))
def gae_kernel(
    rewards,              # [B, T] fp32
    values,               # [B, T] fp32
    mask,                 # [B, T] bool
    advantages,           # [B, T] fp32, written
    returns,              # [B, T] fp32, written
    length,               # T
    gamma,                # fp32
    lam,                  # fp32, GAE's lambda
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * length
    behind = 0.0  # the advantage at the first token of the block behind
    for start in range(tl.cdiv(length, BLOCK) * BLOCK - BLOCK, -1, -BLOCK):
        t = start + tl.arange(0, BLOCK)
        is_token = tl.load(mask + row + t, mask=t < length, other=0) != 0
        has_next = tl.load(mask + row + t + 1, mask=t + 1 < length, other=0) != 0
        reward = tl.load(rewards + row + t, mask=is_token, other=0.0)
        value = tl.load(values + row + t, mask=is_token, other=0.0)
        next_value = tl.load(values + row + t + 1, mask=has_next, other=0.0)

        delta = reward + gamma * next_value - value
        decay = tl.zeros_like(delta) + gamma * lam
        a, b = tl.associative_scan((decay, delta), 0, after, reverse=True)
        advantage = a * behind + b
        behind = tl.sum(tl.where(t == start, advantage, 0.0), 0)

        tl.store(advantages + row + t, advantage, mask=t < length)
        tl.store(returns + row + t, advantage + value, mask=t < length)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Equation (6) of three [B, T], in fp32: advantages and returns [B, T], as repo.gae."""
    rewards, values, mask = rewards.contiguous(), values.contiguous(), mask.bool().contiguous()
    advantages, returns = torch.empty_like(values), torch.empty_like(values)
    with torch.cuda.device_of(values):
        gae_kernel[(len(values),)](
            rewards, values, mask, advantages, returns, values.shape[1], float(gamma), float(lam),
            BLOCK=BLOCK, num_warps=NUM_WARPS,
        )
    return advantages, returns
