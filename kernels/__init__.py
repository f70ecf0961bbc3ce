"""The hot path of a policy update: log-probs over a large vocabulary, and the rectified clipped loss on them.

Four functions, and the choice of what computes them: plain PyTorch, the only backend so far. `backend` names one explicitly.
"""
from kernels import reference

__all__ = ["gather_log_probs", "linear_log_probs", "linear_repo_loss", "repo_loss"]

BACKENDS = {"reference": reference}


def _implementation(backend):
    if backend is None:
        return reference
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(map(repr, BACKENDS))}, or None")
    return BACKENDS[backend]


def gather_log_probs(logits, target_ids, temperature=1.0, *, backend=None):
    """Log-probs of chosen tokens.

    logits [..., V], target_ids [...] integers in [0, V), temperature > 0 -> fp32 [...], differentiable in logits.
    """
    return _implementation(backend).gather_log_probs(logits, target_ids, temperature)


def linear_log_probs(hidden, weight, target_ids, temperature=1.0, *, backend=None):
    """LM head and log-prob in one: hidden [N, H], weight [V, H], target_ids [N] -> fp32 [N], with the logits of a chunk of tokens at a time.

    Differentiable in hidden and weight.
    """
    return _implementation(backend).linear_log_probs(hidden, weight, target_ids, temperature)


def repo_loss(log_probs, old_log_probs, reward_advantages, cost_advantages, penalty, token_weight, clip_range=0.2, *, backend=None):
    """The rectified clipped objective over response tokens. All tensors [N].

    penalty is lambda_i of the token's response, token_weight its w_t. Returns (scalar loss, stats), stats being 0-d tensors:
    clip_fraction (share of tokens with |rho - 1| > clip_range), approx_kl (mean of rho - 1 - log rho), ratio_max.
    Only log_probs receives a gradient, -w_t rho_t A_t, or 0 where the clip is active.
    """
    return _implementation(backend).repo_loss(log_probs, old_log_probs, reward_advantages, cost_advantages, penalty, token_weight, clip_range)


def linear_repo_loss(hidden, weight, target_ids, old_log_probs, reward_advantages, cost_advantages, penalty, token_weight,
                     clip_range=0.2, temperature=1.0, *, backend=None):
    """repo_loss of linear_log_probs in one: returns (scalar loss, detached fp32 log-probs [N], stats)."""
    return _implementation(backend).linear_repo_loss(hidden, weight, target_ids, old_log_probs, reward_advantages, cost_advantages,
                                                     penalty, token_weight, clip_range, temperature)
