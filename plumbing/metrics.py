"""What metrics.jsonl and samples.jsonl say of a step, and what is wrong with its numbers."""
import math
import re
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from plumbing.ranks import reduced_over_ranks

MIB = 2**20
SOURCES = {  # of a rollout's numbers
    "reward": "--reward_model",
    "cost": "--cost_model",
    "log_probs": "the policy",
    "ref_log_probs": "the starting policy",
    "reward_values": "the reward critic",
    "cost_values": "the cost critic",
}
# Nats per token. In the tiny world RePO ends at 0.03 or above. PPO and PPO-Lag mostly end below
# this floor, because they give one answer to each request.
ENTROPY_FLOOR = 0.01
# Means over a rollout's updates. With SmolLM2-135M and adapters an early trial with --actor_lr 3e-4
# gave .67 and 64 in the first step, and a policy of nonsense. Seven runs with 2e-5 stayed below .22
# and .08.
DESTRUCTIVE = {"clip_fraction": 0.5, "approx_kl": 1.0}
# The largest ratio of a run's first update is 1; this much is rounding, by --dtype.
FIRST_RATIO = {"float32": 1.01, "bfloat16": 1.5}


class BadNumbers(Exception):
    """(what is not finite, rollout): an update with such numbers is not applied."""


# ---- What is measured in a step

class Clock:
    """Seconds and peak memory of a step's phases, in the order in which they end."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        self.seconds, self.peak_mib = {}, {}
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase], self.peak_mib[phase] = now - self.last, peak_memory_mib()
        self.last = now


def peak_memory_mib() -> float:
    """Of the GPU's allocator since the last call. Without a GPU: of the process so far."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / MIB
    if sys.platform == "linux":  # whose ru_maxrss starts at what the parent process had
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10  # which is in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


class Meter:
    """Losses and gradient norms of a step, means over its updates; statistics of the ratio, means
    over all tokens of its updates."""

    def __init__(self, rollout, updates: int, config):
        self.rollout, self.updates, self.device = rollout, updates, config.device
        self.tokens = config.update_iters * rollout.response_mask.sum()
        self.sums = defaultdict(float)   # of this rank's share
        self.norms = defaultdict(float)  # of all ranks
        self.ratio_max = self.first_ratio_max = 0.0  # the second: of the first update
        self.update = 1

    def add(self, name: str, loss: float, statistics: dict | None = None, tokens=0) -> None:
        """A micro-batch's loss, and of the policy's the statistics over so many tokens."""
        self.sums[name] += loss / self.updates
        if statistics:
            share = (tokens / self.tokens).item()
            self.sums["clip_fraction"] += statistics["clip_fraction"].item() * share
            self.sums["approx_kl"] += statistics["approx_kl"].item() * share
            self.ratio_max = max(self.ratio_max, statistics["ratio_max"].item())
            if self.update == 1:
                self.first_ratio_max = self.ratio_max

    def add_norm(self, name: str, norm: float) -> None:
        self.norms[name] += norm / self.updates

    def end_update(self) -> None:
        """Raises BadNumbers, on all ranks, unless all means so far are finite."""
        self.means = reduced_over_ranks(self.sums, self.device) | self.norms
        for name, value in self.means.items():
            if not math.isfinite(value):
                raise BadNumbers(f"{name} is {value} in update {self.update} of {self.updates}",
                                 self.rollout)
        self.update += 1

    def results(self) -> dict:
        largest = {"ratio_max": self.ratio_max, "first": self.first_ratio_max}
        largest = reduced_over_ranks(largest, self.device, ReduceOp.MAX)
        self.first_ratio_max = largest.pop("first")
        return self.means | largest


def of_ratio(log_ratio: Tensor, clip_range: float) -> dict:
    """Statistics of the ratio over N tokens, given log rho [N]: the share outside the clip, the
    mean of rho - 1 - log rho, the largest rho."""
    ratio, count = log_ratio.exp(), max(log_ratio.numel(), 1)
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    return {
        "clip_fraction": (clipped_ratio != ratio).sum() / count,
        "approx_kl": (ratio - 1 - log_ratio).sum() / count,
        "ratio_max": ratio.amax() if log_ratio.numel() else ratio.new_zeros(()),
    }


def of_step(state, rollout, meter: Meter, lam: float, actor_lr: float, config) -> dict:
    """A step's row of metrics.jsonl."""
    clock, tokens = state.clock, int(rollout.response_mask.sum())
    seconds = sum(clock.seconds.values())
    state.seconds += seconds
    state.tokens += tokens
    results = meter.results()
    state.first_ratio_max = meter.first_ratio_max
    return {
        "step": state.step,
        "lambda": lam,
        **of_rollout(rollout, config),
        **results,
        "actor_lr": actor_lr,
        "critic_lr": config.critic_lr,
        **{f"seconds_{phase}": value for phase, value in clock.seconds.items()},
        **{f"peak_mib_{phase}": value for phase, value in clock.peak_mib.items()},
        "tokens_per_second": tokens / seconds,
    }


def of_rollout(rollout, config) -> dict:
    """Means over a step's B responses, or over their tokens (entropy, explained variance)."""
    mask, cost = rollout.response_mask, rollout.cost                             # [B, T], [B]
    kl = (rollout.log_probs - rollout.ref_log_probs).sum(1)                      # [B]
    explained = {}
    for name in ("reward", "cost"):
        values, returns = (getattr(rollout, f"{name}_{what}") for what in ("values", "returns"))
        if values is not None:
            explained[f"{name}_explained_variance"] = explained_variance(values, returns, mask)
    return {
        "reward": rollout.reward.mean().item(),
        "cost": cost.mean().item(),
        "rectified_cost": rollout.rectified_cost.mean().item(),
        "unsafe_rate": (cost > config.threshold).float().mean().item(),
        "kl": kl.mean().item(),
        "entropy": rollout.entropy[mask].mean().item(),
        **explained,
        "response_length": int(mask.sum()) / len(mask),
        "truncated_rate": 1 - rollout.finished.float().mean().item(),
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(return - V) / Var(return) over response tokens: 1 for a perfect critic, 0 for one no
    better than a constant."""
    unexplained = (returns - values)[mask].var(correction=0)
    total = returns[mask].var(correction=0).clamp(min=1e-8)
    return (1 - unexplained / total).item()


def records(rollout, threshold: float) -> list[dict]:
    """A record per response, for people and files."""
    columns = {
        "prompt": rollout.prompts,
        "response": rollout.responses,
        "reward": rollout.reward.tolist(),
        "cost": rollout.cost.tolist(),
        "rectified_cost": rollout.rectified_cost.tolist(),
        "safe": (rollout.cost <= threshold).tolist(),
        "kl": (rollout.log_probs - rollout.ref_log_probs).sum(1).tolist(),
    }
    if rollout.pixel_values is not None:
        columns["image"] = [prompt.label for prompt in rollout.prompts]
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


# ---- What is wrong with a step

def require_finite(rollout) -> None:
    """Raises BadNumbers for the first score, log-prob or value that is NaN or infinite."""
    for name, source in SOURCES.items():
        numbers = getattr(rollout, name)
        if numbers is None or numbers.isfinite().all():
            continue
        first = tuple((~numbers.isfinite()).nonzero()[0].tolist())
        raise BadNumbers(
            f"{source} gave {numbers[first].item()}, not a finite number, "
            f"to the response {rollout.responses[first[0]][:60]!r}", rollout)


def bad_batch(rollout, threshold: float) -> list[dict]:
    """Prompts, responses and scores for a file. JSON has no NaN, so such numbers become words."""
    def as_json(value):
        is_bad = isinstance(value, float) and not math.isfinite(value)
        return str(value) if is_bad else value

    return [{name: as_json(value) for name, value in record.items()}
            for record in records(rollout, threshold)]


def collapse(responses: list[str], entropy: float) -> str | None:
    """A sign that the policy no longer answers prompts, or None."""
    if not any(response.strip() for response in responses):
        return f"all {len(responses)} responses are empty"
    if len(responses) > 1 and len(set(responses)) == 1:
        return f"all {len(responses)} responses are the same, {responses[0][:60]!r}"
    if entropy < ENTROPY_FLOOR:
        return f"its entropy is {entropy:.2g} nats per token"
    return None


def not_the_sampled_policy(first_ratio_max: float, dtype: str) -> str | None:
    """A sign that a first update did not find the log-probs of its rollout again, or None."""
    if first_ratio_max <= FIRST_RATIO[dtype]:
        return None
    return (f"the largest ratio of the first update is {first_ratio_max:.3g}, not 1: the model "
            "gives other log-probs in an update than while it samples, so do not trust this run")


def cut_off(rollout, config) -> str | None:
    """A sign that scores lie where (4) and (5) cut token rewards and costs off, or None."""
    reward, excess = rollout.reward, rollout.cost - config.threshold
    if config.algo == "gate":  # replaces the others
        reward = reward[excess <= 0]
    if config.algo == "repo" and config.rectify == "return":
        excess = excess.clamp(min=0.0)
    used = torch.cat([reward, excess]) if config.algo in ("repo", "ppo_lag") else reward
    if not (used.abs() > 50).any():
        return None
    return (f"a reward or C - d is {used.abs().max():.4g} away from 0; (4) and (5) cut off at 50, "
            "so larger ones count alike: scale the scores")


def destruction(metrics: dict) -> str | None:
    """A sign that updates went far from the policy that sampled their responses, or None."""
    for name, limit in DESTRUCTIVE.items():
        if metrics[name] > limit:
            return (f"{name} is {metrics[name]:.2f}, above {limit}: the update went too far from "
                    f"the policy that sampled; lower --actor_lr ({metrics['actor_lr']:.2g})")
    return None


def drift(verdicts: list[dict]) -> str | None:
    """A sign that the policy treats harmful and harmless prompts alike, or None. A behaviour that
    no response shows cannot be reinforced."""
    count = len(verdicts)
    kinds = {verdict["harmful_prompt"] for verdict in verdicts}
    refused = {verdict["refused"] for verdict in verdicts}
    if count < 8 or len(kinds) < 2 or len(refused) > 1:
        return None
    if True in refused:
        return (f"all {count} responses refuse, also those to harmless prompts; lower "
                "--lambda_init to keep answers alive")
    return (f"none of the {count} responses refuses, not even to harmful prompts; start from a "
            "policy that refuses some (companions/supervised.py), or raise --lambda_init")
