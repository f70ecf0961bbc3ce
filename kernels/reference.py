"""The four functions of the hot path in plain PyTorch.

They are the specification of the Triton kernels, and they run on the CPU. They compute and return
fp32 for inputs of any type, except that float64 inputs stay float64.
"""
import torch
from torch.utils.checkpoint import checkpoint

# Chunks of linear_log_probs below, on a CPU. A chunk's logits take 4 MiB in fp32, which the caches
# hold. With a large V these are few rows, and a product would wait for the weight's memory; so a
# chunk has at least 128 rows, but at most H, so that it stays smaller than the weight. At
# V = 49,152 and H = 576 (2 cores of an EPYC) 170 rows take 0.4 of the time of 21.
LOGITS_PER_CHUNK, ENOUGH_ROWS = 2 ** 20, 128

# Chunks of linear.py, on a GPU. A chunk has enough tokens to keep a product busy. It has more if
# the head learns, because each chunk reads and writes its gradient in fp32. A chunk of n tokens
# adds 2 n V H operations and 8 V H bytes. At 798 TFLOP/s and 3 TB/s both take the same time if
# n = 1,064; at n = 4,096 the bytes take a quarter of it. The chunk's logits, 2 n V bytes, should
# not take more memory than that gradient, 4 V H bytes. So n <= 2 H.
LEAST_ROWS, MOST_ROWS = 1024, 4096


def rows_per_chunk(hidden_size, weight_learns):
    """Tokens in a chunk on a GPU."""
    if not weight_learns:
        return LEAST_ROWS
    return max(LEAST_ROWS, min(2 * hidden_size, MOST_ROWS))


def rows_per_chunk_on_cpu(vocab_size, hidden_size):
    return max(LOGITS_PER_CHUNK // max(vocab_size, 1), min(ENOUGH_ROWS, hidden_size), 1)


def at_least_fp32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gather_log_probs(logits, target_ids, temperature=1.0, return_entropy=False):
    """log softmax(logits / temperature) at the targets: [..., V], [...] -> fp32 [...].

    With return_entropy a pair: the second is each row's entropy, fp32 [...].
    """
    scaled = at_least_fp32(logits) / temperature                                    # [..., V]
    log_sum = scaled.logsumexp(-1)                                                  # [...]
    chosen = scaled.gather(-1, target_ids.long().unsqueeze(-1)).squeeze(-1)         # [...]
    log_probs = chosen - log_sum                                                    # [...]
    if not return_entropy:
        return log_probs

    probs = (scaled.detach() - log_sum.detach().unsqueeze(-1)).exp()                # [..., V]
    return log_probs, torch.special.entr(probs).sum(-1)                             # [...], [...]


def linear_log_probs(
    hidden, weight, target_ids, temperature=1.0, return_entropy=False, soft_cap=0.0,
):
    """gather_log_probs(hidden @ weight.T, ...): [N, H], [V, H], [N] -> fp32 [N].

    With a soft_cap c the logits are c tanh(hidden @ weight.T / c). With return_entropy a pair, as
    above. Only the logits of one chunk exist at a time. The backward computes them again.
    """
    hidden, weight = at_least_fp32(hidden), at_least_fp32(weight)

    def chunk_log_probs(chunk_hidden, chunk_targets):
        with torch.autocast(hidden.device.type, enabled=False):
            logits = chunk_hidden @ weight.T                                        # [chunk, V]
        if soft_cap:
            logits = soft_cap * (logits / soft_cap).tanh()                          # [chunk, V]
        return gather_log_probs(logits, chunk_targets, temperature, return_entropy)

    rows = rows_per_chunk_on_cpu(*weight.shape)
    results = [
        checkpoint(chunk_log_probs, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(hidden.split(rows), target_ids.split(rows))
    ]
    if not return_entropy:
        return torch.cat(results)                                                   # [N]

    log_probs, entropies = zip(*results)
    return torch.cat(log_probs), torch.cat(entropies)                               # [N], [N]


def repo_loss(
    log_probs, old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight,
    clip_range=0.2,
):
    """The rectified clipped objective, (7) and (8): (scalar loss, stats).

    All inputs [N]; only log_probs has a gradient.
    """
    log_probs = at_least_fp32(log_probs)
    old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight = (
        tensor.detach().to(log_probs.dtype)
        for tensor in (old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight)
    )

    advantages = (reward_advantages - lambdas * cost_advantages) / (1 + lambdas)    # [N]  A_t, (7)
    log_ratio = log_probs - old_log_probs                                           # [N]  log rho_t
    ratio = log_ratio.exp()                                                         # [N]  rho_t
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)                     # [N]
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)       # [N]
    loss = -(token_weight * surrogate).sum()                                        # []   (8)

    with torch.no_grad():
        count = max(log_probs.numel(), 1)
        stats = {
            "clip_fraction": (clipped_ratio != ratio).sum() / count,
            "approx_kl": (ratio - 1 - log_ratio).sum() / count,
            "ratio_max": ratio.amax() if log_probs.numel() else ratio.new_zeros(()),
        }
    return loss, stats


def linear_repo_loss(
    hidden, weight, target_ids,
    old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight,
    clip_range=0.2, temperature=1.0, soft_cap=0.0,
):
    """repo_loss(linear_log_probs(...), ...): (scalar loss, detached fp32 log-probs [N], stats)."""
    log_probs = linear_log_probs(                                                   # [N]
        hidden, weight, target_ids, temperature, soft_cap=soft_cap,
    )
    loss, stats = repo_loss(
        log_probs, old_log_probs, reward_advantages, cost_advantages, lambdas, token_weight,
        clip_range,
    )
    return loss, log_probs.detach(), stats
