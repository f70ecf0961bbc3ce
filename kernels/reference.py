"""The four functions of the hot path in plain PyTorch: the specification of the fused kernels, and what runs on the CPU.

Products, softmax and loss are computed in fp32 whatever the inputs' type, and returned so; in float64 if given float64, which is how the tests
compare them with finite differences.
"""
import torch
from torch.utils.checkpoint import checkpoint

LOGITS_PER_CHUNK = 2 ** 20  # in the linear_* functions: 4 MiB in fp32, what a CPU's caches hold
ROWS_PER_CHUNK = 1024       # in those of linear.py: enough tokens to keep a GPU's product busy


def gather_log_probs(logits, target_ids, temperature=1.0, return_entropy=False):
    """log softmax(logits / temperature) at the targets: [..., V], [...] -> fp32 [...], and each row's entropy [...] if asked for."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature              # [..., V]
    log_sum = scaled.logsumexp(-1)                                                                   # [...]
    log_probs = scaled.gather(-1, target_ids.long().unsqueeze(-1)).squeeze(-1) - log_sum             # [...]
    if not return_entropy:
        return log_probs
    probs = (scaled.detach() - log_sum.detach().unsqueeze(-1)).exp()                                 # [..., V]
    return log_probs, torch.special.entr(probs).sum(-1)                                              # [...], [...]


def linear_log_probs(hidden, weight, target_ids, temperature=1.0, return_entropy=False):
    """gather_log_probs(hidden @ weight.T, ...): [N, H], [V, H], [N] -> fp32 [N], and the entropies [N] if asked for.

    Logits are made chunk by chunk and made again in the backward: no more than LOGITS_PER_CHUNK exist at one time.
    """
    hidden, weight = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (hidden, weight))

    def chunk_log_probs(chunk_hidden, chunk_targets):
        with torch.autocast(hidden.device.type, enabled=False):
            logits = chunk_hidden @ weight.T                                                         # [chunk, V]
        return gather_log_probs(logits, chunk_targets, temperature, return_entropy)                  # [chunk], or two of them

    rows = max(LOGITS_PER_CHUNK // max(len(weight), 1), 1)
    chunks = zip(hidden.split(rows), target_ids.split(rows))
    results = [checkpoint(chunk_log_probs, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return tuple(map(torch.cat, zip(*results))) if return_entropy else torch.cat(results)            # [N], or two of them


def repo_loss(log_probs, old_log_probs, reward_advantages, cost_advantages, penalty, token_weight, clip_range=0.2):
    """The rectified clipped objective, all inputs [N]: (scalar loss, stats). Only log_probs has a gradient."""
    log_probs = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
    data = old_log_probs, reward_advantages, cost_advantages, penalty, token_weight
    old_log_probs, reward_advantages, cost_advantages, penalty, token_weight = (tensor.detach().to(log_probs.dtype) for tensor in data)
    advantages = (reward_advantages - penalty * cost_advantages) / (1 + penalty)                     # A_t, paper's (7)    [N]
    log_ratio = log_probs - old_log_probs                                                            # log rho_t           [N]
    ratio = log_ratio.exp()                                                                          # rho_t               [N]
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)                                      # [N]
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)                        # [N]
    loss = -(token_weight * surrogate).sum()                                                         # paper's (8)         []
    with torch.no_grad():
        count = max(log_probs.numel(), 1)
        stats = {
            "clip_fraction": (clipped_ratio != ratio).sum() / count,
            "approx_kl": (ratio - 1 - log_ratio).sum() / count,
            "ratio_max": ratio.amax() if log_probs.numel() else ratio.new_zeros(()),
        }
    return loss, stats


def linear_repo_loss(hidden, weight, target_ids, old_log_probs, reward_advantages, cost_advantages, penalty, token_weight,
                     clip_range=0.2, temperature=1.0):
    """repo_loss(linear_log_probs(...), ...): (scalar loss, detached fp32 log-probs [N], stats)."""
    log_probs = linear_log_probs(hidden, weight, target_ids, temperature)                            # [N]
    loss, stats = repo_loss(log_probs, old_log_probs, reward_advantages, cost_advantages, penalty, token_weight, clip_range)
    return loss, log_probs.detach(), stats
