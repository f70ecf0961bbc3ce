"""Deliberate bugs, a line each: would the tests notice?

    python tests/mutations.py                        # every bug; an hour or two
    python tests/mutations.py --only gae lambda      # those with such a word in their name
    python tests/mutations.py --likely-only          # without the whole suite for survivors

Each bug is put into a fresh copy of the project. The test files that should notice it run there;
if they pass, the whole fast suite does. Code 1 if a bug survives in what an equation or a README
promises.
"""

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Tests that wait for whole runs of two minutes: left out of the files that are likely to notice.
SLOW = "far_more_prompts or trains_the_one"
LIMIT = 1800  # seconds for one run of pytest; a bug that makes it hang is noticed by that


@dataclass(frozen=True)
class Bug:
    """`old`, which stands in the file once, becomes `new`."""

    file: str
    tests: str  # the files likely to notice: "run faults" is test_run.py, then test_faults.py
    name: str
    old: str
    new: str
    is_covered: bool = True  # by an equation, or by what one of the README.md files promises


BUGS = [
    # ---- repo.py: lambda (3), estimators (2), the rectifier
    Bug("repo.py", "equations", "rectifier: no clamp",
        "return (cost - threshold).clamp(min=0.0)", "return cost - threshold"),
    Bug("repo.py", "equations", "rectifier: threshold with the wrong sign",
        "return (cost - threshold).clamp", "return (cost + threshold).clamp"),
    Bug("repo.py", "equations", "lambda: falls on safe steps",
        "rectify(costs, config.threshold).mean()", "(costs - config.threshold).mean()"),
    Bug("repo.py", "equations", "lambda: the sum of violations for their mean",
        "rectify(costs, config.threshold).mean()", "rectify(costs, config.threshold).sum()"),
    Bug("repo.py", "equations", "lambda: no cap",
        "return min(lam + config.lambda_lr * violation, config.lambda_max)",
        "return lam + config.lambda_lr * violation"),
    Bug("repo.py", "equations", "lambda: PPO-Lag's rule is linear",
        "growth = math.exp(min(exponent, 700.0))", "growth = 1 + exponent"),
    Bug("repo.py", "equations", "lambda: PPO-Lag forgets the threshold",
        "(costs.mean().item() - config.threshold)", "costs.mean().item()"),
    Bug("repo.py", "run equations", "lambda: PPO-Lag looks at this step's costs alone",
        'costs = torch.tensor(state.costs) if config.algo == "ppo_lag" else rollout.cost',
        "costs = rollout.cost"),
    Bug("repo.py", "rollout", "lambda: a step updates it before it is used",
        "(rollout, lam, config)                                    # (4) (5) (6)",
        "(rollout, update_lambda(lam, rollout.cost, config), config)"),
    Bug("repo.py", "rollout", "lambda: a step leaves it as it is",
        "state.lam = update_lambda(lam, costs, config)", "state.lam = lam"),
    Bug("repo.py", "equations", "estimator: mask takes a cost at the threshold for unsafe",
        "lambdas * (excess > 0)", "lambdas * (excess >= 0)"),
    Bug("repo.py", "equations", "costs and lambdas: mask penalises safe responses too",
        "return excess, lambdas * (excess > 0)", "return excess, lambdas * 1"),
    Bug("repo.py", "equations", "estimator: PPO is penalised",
        '0.0 if config.algo in ("gate", "ppo") else lam)', "lam)"),
    Bug("repo.py", "equations", "estimator: PPO-Lag is rectified",
        'config.algo == "repo" and config.rectify', 'config.algo != "ppo" and config.rectify'),

    # ---- repo.py: token rewards and costs (4) (5), advantages (6)
    Bug("repo.py", "equations", "shaping: the KL in the costs has the rewards' sign",
        "costs = kl_coeff * kl", "costs = -kl_coeff * kl"),
    Bug("repo.py", "equations", "shaping: the KL is the other way round",
        "torch.where(mask, log_probs - ref_log_probs, 0.0)",
        "torch.where(mask, ref_log_probs - log_probs, 0.0)"),
    Bug("repo.py", "equations", "shaping: the score stands in the last column",
        "is_last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))",
        "is_last = torch.arange(mask.shape[1]) == mask.shape[1] - 1"),
    Bug("repo.py", "equations", "shaping: the score stands in the padding too",
        "is_last = mask & (mask.cumsum(1)", "is_last = (mask.cumsum(1)"),
    Bug("repo.py", "equations", "shaping: the clamp comes before the sum",
        "is_last * reward[:, None]              ", "is_last * reward[:, None].clip(-50, 50)"),
    Bug("repo.py", "equations", "shaping: costs are not clamped",
        "costs.clamp(-clip_range_score, clip_range_score))", "costs)"),
    Bug("repo.py", "equations", "GAE: no next value",
        "+ gamma * next_value - values[:, t]", "- values[:, t]"),
    Bug("repo.py", "equations", "GAE: no gamma before the next value",
        "+ gamma * next_value", "+ next_value"),
    Bug("repo.py", "equations", "GAE: no gamma before the next advantage",
        "delta + gamma * lam * advantage", "delta + lam * advantage"),
    Bug("repo.py", "equations", "GAE: no lambda",
        "delta + gamma * lam * advantage", "delta + gamma * advantage"),
    Bug("repo.py", "equations", "GAE: starts anew at each token",
        "advantage = delta + gamma * lam * advantage", "advantage = delta"),
    Bug("repo.py", "equations", "GAE: the last token has a next value",
        "advantage = next_value = torch.zeros_like(values[:, 0])",
        "advantage, next_value = torch.zeros_like(values[:, 0]), values[:, -1]"),
    Bug("repo.py", "equations", "GAE: values outside the mask stay",
        "values = values.masked_fill(mask == 0, 0.0)", "values = values.clone()"),
    Bug("repo.py", "equations", "GAE: returns without the value",
        "return advantages, advantages + values", "return advantages, advantages"),
    Bug("repo.py", "groups", "group: a response is among its own others",
        "of_others = (totals.sum(1, keepdim=True) - totals) / (group_size - 1)",
        "of_others = totals.mean(1, keepdim=True).expand_as(totals)"),
    Bug("repo.py", "groups", "group: rewards up to a token, not from it on",
        "to_go = (rewards * mask).flip(1).cumsum(1).flip(1)", "to_go = rewards.cumsum(1)"),
    Bug("repo.py", "groups", "group: padding has an advantage",
        "return (to_go - of_others.view(-1, 1)) * mask", "return to_go - of_others.view(-1, 1)"),
    Bug("repo.py", "groups", "group: one response to a prompt after the other prompts'",
        "totals = to_go[:, 0].view(-1, group_size)",
        "totals = to_go[:, 0].view(group_size, -1).T"),
    Bug("repo.py", "equations", "gate: closed at the threshold itself",
        "where(rollout.cost <= config.threshold", "where(rollout.cost < config.threshold"),
    Bug("repo.py", "equations", "gate: an unsafe response is rewarded",
        "config.threshold, -config.gate_penalty)", "config.threshold, config.gate_penalty)"),
    Bug("plumbing/settings.py", "groups", "group: of one response",
        "config.samples_per_prompt > 1", "config.samples_per_prompt > 0"),
    Bug("plumbing/__init__.py", "house", "names: another package is taken for our kernels",
        'if name == "kernels"', 'if name == "kernel"'),
    Bug("plumbing/data.py", "prompts", "prompts: a behavior without its context",
        'parts = [row.get("ContextString"), row["Behavior"]]', 'parts = [row["Behavior"]]'),
    Bug("plumbing/plan.py", "plan", "plan: shared weights count for each model",
        "{id(weight): weight for weight in weights}.values()", "weights"),
    Bug("plumbing/plan.py", "plan", "plan: every rank holds all weights",
        "nbytes(weights) / RANKS", "nbytes(weights)"),
    Bug("plumbing/plan.py", "plan", "plan: one layer's activations for all",
        "return sum(of_layers) * tokens, moving", "return max(of_layers) * tokens, moving"),
    Bug("plumbing/plan.py", "plan", "plan: all layers' caches as the first's",
        "return 2 * sum(widths) * count", "return 2 * 2 * next(widths) * count"),
    Bug("plumbing/plan.py", "plan", "plan: scoring at the same time as learning",
        '("sampling", "scoring", "learning")]', '("sampling", "learning")]'),
    Bug("plumbing/plan.py", "plan", "plan: what does not fit is not refused",
        "require(flags in fitting,", "require(fitting,"),
    Bug("plumbing/reports.py", "confidence", "interval: one-sided quantile",
        "inv_cdf((1 + confidence) / 2)", "inv_cdf(confidence)"),
    Bug("plumbing/reports.py", "confidence", "bound: of fewer hits than there are",
        "for k in range(hits + 1))", "for k in range(hits))"),
    Bug("plumbing/reports.py", "confidence", "bound: two-sided",
        "bootstrapped(values, 2 * confidence - 1)", "bootstrapped(values, confidence)"),
    Bug("plumbing/reports.py", "confidence", "bound: prompts that are safe",
        'sum(not scores["prompts_fully_safe"]', 'sum(bool(scores["prompts_fully_safe"])'),
    Bug("repo.py", "equations", "GAE: costs with the rewards' values",
        "costs, rollout.cost_values, mask", "costs, rollout.reward_values, mask"),

    # ---- (7) (8), weights, critics, PTX
    Bug("kernels/reference.py", "equations", "(7): not divided by 1 + lambda",
        "(reward_advantages - lambdas * cost_advantages) / (1 + lambdas)",
        "(reward_advantages - lambdas * cost_advantages)"),
    Bug("kernels/reference.py", "equations", "(7): plus lambda times the cost",
        "(reward_advantages - lambdas * cost", "(reward_advantages + lambdas * cost"),
    Bug("kernels/reference.py", "equations", "(8): the larger of the two",
        "torch.minimum(ratio * advantages", "torch.maximum(ratio * advantages"),
    Bug("kernels/reference.py", "equations", "(8): the clip has one side",
        "ratio.clamp(1 - clip_range, 1 + clip_range)", "ratio.clamp(max=1 + clip_range)"),
    Bug("kernels/reference.py", "repo_loss", "(8): approx_kl without rho - 1",
        "(ratio - 1 - log_ratio).sum()", "(-log_ratio).sum()"),
    Bug("repo.py", "equations", "script (7): not divided by 1 + lambda",
        "lambdas * cost_advantages) / (1 + lambdas)", "lambdas * cost_advantages)"),
    Bug("repo.py", "equations", "script (7): costs are added",
        "(reward_advantages - lambdas * cost", "(reward_advantages + lambdas * cost"),
    Bug("repo.py", "equations", "script (7): the first response's lambda for all",
        "batch.lambdas[row]          ", "batch.lambdas[0 * row]      "),
    Bug("repo.py", "equations", "script (8): the ratio is the wrong way round",
        "log_ratio = log_probs - batch.log_probs[mask]",
        "log_ratio = batch.log_probs[mask] - log_probs"),
    Bug("repo.py", "equations", "script (8): the larger of the two",
        "torch.minimum(ratio * advantages", "torch.maximum(ratio * advantages"),
    Bug("repo.py", "equations", "script (8): the clip has one side",
        "ratio.clamp(1 - config.clip_range, 1 + config.clip_range)",
        "ratio.clamp(max=1 + config.clip_range)"),
    Bug("repo.py", "equations", "script (8): the loss rises with the surrogate",
        "loss = -(token_weight[mask]", "loss = (token_weight[mask]"),
    Bug("repo.py", "equations", "script (8): all tokens weigh the same",
        "(token_weight[mask] * surrogate).sum()", "surrogate.mean()"),
    Bug("repo.py", "models equations", "script (8): the temperature is dropped",
        "(policy, batch, config.temperature)", "(policy, batch, 1.0)"),
    Bug("repo.py", "equations", "fused: without kernels too",
        "if policy.fused_head and runs_triton(policy.get_output_embeddings().weight):",
        "if policy.fused_head:"),
    Bug("repo.py", "equations", "fused: with a head that the kernels do not know",
        "if policy.fused_head and runs", "if runs"),
    Bug("repo.py", "equations", "fused: rewards and costs are exchanged",
        "batch.reward_advantages[mask], batch.cost_advantages[mask], batch.lambdas",
        "batch.cost_advantages[mask], batch.reward_advantages[mask], batch.lambdas"),
    Bug("repo.py", "equations", "fused: --clip_range is ignored",
        "token_weight[mask], config.clip_range,", "token_weight[mask], 0.2,"),
    Bug("repo.py", "equations", "fused: the temperature is dropped",
        "config.temperature / head.scale,", "1 / head.scale,"),
    Bug("repo.py", "equations", "fused: lambda of another response",
        "batch.cost_advantages[mask], batch.lambdas[row],",
        "batch.cost_advantages[mask], batch.lambdas[0 * row],"),
    Bug("plumbing/training.py", "equations", "critics: of a cost that has no weight",
        'if config.algo in ("gate", "ppo"):', "if False:"),
    Bug("repo.py", "rollout ranks", "w_t: per batch, not per response",
        "mask / mask.sum(1, keepdim=True) / len(rows)", "mask / mask.sum()"),
    Bug("repo.py", "rollout ranks", "w_t: over the micro-batch, not the minibatch",
        "mask.sum(1, keepdim=True) / len(rows)", "mask.sum(1, keepdim=True) / len(mask)"),
    Bug("repo.py", "equations", "critic: the smaller of the plain and the clipped error",
        "error = torch.maximum((value", "error = torch.minimum((value"),
    Bug("repo.py", "equations", "critic: the clip has one side",
        "(value - old).clamp(-limit, limit)", "(value - old).clamp(max=limit)"),
    Bug("repo.py", "rollout models", "critic: the value of the state after the token",
        "return values[row, state_column]", "return values[row, state_column + 1]"),
    Bug("plumbing/training.py", "models", "critic: its head begins as it happens to be",
        "{name: torch.zeros_like(weight) for name, weight in head.items()}",
        "{name: torch.ones_like(weight) for name, weight in head.items()}"),
    Bug("plumbing/training.py", "equations", "critic: learns at the policy's rate",
        '"lr": config.critic_lr}', '"lr": config.actor_lr}'),
    Bug("plumbing/training.py", "equations", "weight decay: of biases and norms too",
        '{"params": vectors, "lr": config.actor_lr}',
        '{"params": vectors, "lr": config.actor_lr, "weight_decay": 0.01}'),
    Bug("plumbing/training.py", "rollout run", "PTX: its weight is ignored",
        "(scale * RANKS * loss).backward()", "(RANKS * loss).backward()"),
    Bug("repo.py", "rollout", "PTX: a sum, not a mean over tokens",
        "1.0).sum() / token_count, {}", "1.0).sum(), {}"),
    Bug("plumbing/training.py", "equations", "policy's rate: no cosine",
        "return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2", "return 1.0"),
    Bug("plumbing/training.py", "equations", "policy's rate: the cosine begins with the warm-up",
        "(step - warmup) / (steps - warmup)", "step / steps"),
    Bug("plumbing/ranks.py", "rollout run", "gradients: not cut to a norm of 1",
        "clip_grad_norm_(model.parameters(), 1.0)", "clip_grad_norm_(model.parameters(), 1e9)"),
    Bug("plumbing/metrics.py", "numbers", "gradients: a step with bad numbers is taken",
        "if not math.isfinite(value):", "if False:"),
    Bug("repo.py", "numbers", "gradients: bad numbers are found after the step",
        "meter.end_update()  #", "state.optimizer.step(), meter.end_update()  #"),
    Bug("repo.py", "numbers", "rollout: bad scores are learned from",
        "metrics.require_finite(rollout)", "pass"),
    Bug("repo.py", "lora run", "gradients: those of the update before stay",
        "state.optimizer.zero_grad()", "pass"),

    # ---- rollout: log-probs, masks, sampling, minibatches
    Bug("kernels/reference.py", "log_prob", "gather: the temperature is dropped",
        "scaled = at_least_fp32(logits) / temperature", "scaled = at_least_fp32(logits)"),
    Bug("kernels/reference.py", "log_prob", "gather: in bf16 if that comes in",
        "return tensor.to(torch.promote_types(tensor.dtype, torch.float32))", "return tensor"),
    Bug("repo.py", "rollout", "gather: the target is one too early",
        "return row, state_column, self.input_ids[row, column]",
        "return row, state_column, self.input_ids[row, state_column]"),
    Bug("repo.py", "rollout", "gather: the token's own position, not the one before",
        "state_column = column - 1", "state_column = column"),
    Bug("plumbing/models.py", "models", "gather: whole logits from one position too late",
        "first_kept = batch.input_ids.shape[1] - kept",
        "first_kept = batch.input_ids.shape[1] - kept + 1"),
    Bug("kernels/reference.py", "log_prob", "entropy: a mean over the vocabulary",
        "entr(probs).sum(-1)", "entr(probs).mean(-1)"),
    Bug("repo.py", "rollout", "old log-probs: at temperature 1",
        "partial(log_probs, return_entropy=True)",
        "partial(log_probs, temperature=1.0, return_entropy=True)"),
    Bug("repo.py", "rollout", "reference's log-probs: at temperature 1",
        "log_probs, state.reference, rollout",
        "partial(log_probs, temperature=1.0), state.reference, rollout"),
    Bug("repo.py", "equations", "fused: the head's scale is forgotten",
        "config.temperature / head.scale,", "config.temperature,"),
    Bug("repo.py", "models", "head: its scale is forgotten in the old log-probs",
        "ids, temperature / head.scale", "ids, temperature"),
    Bug("repo.py", "models", "head: its cap is forgotten in the old log-probs",
        "soft_cap=head.soft_cap,", "soft_cap=0.0,"),
    Bug("repo.py", "equations", "fused: the head's cap is forgotten",
        "soft_cap=head.soft_cap)", "soft_cap=0.0)"),
    Bug("plumbing/models.py", "models", "head: the config is believed",
        "return head if is_head else None", "return head"),
    Bug("plumbing/adapters.py", "lora", "LoRA: no gradient past A",
        "(dy @ weight).addmm_(dlow, a)", "(dy @ weight)"),
    Bug("plumbing/training.py", "run lora", "reference: the policy itself",
        "reference = second_model(policy, config).requires_grad_(False)", "reference = policy"),
    Bug("plumbing/models.py", "models", "positions: padding counts",
        "position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)",
        "position_ids = torch.ones_like(input_ids).cumsum(1) - 1"),
    Bug("plumbing/data.py", "rollout", "padding: prompts on the right",
        "ids.append([pad_id] * left + prompt + response",
        "ids.append(prompt + [pad_id] * left + response"),
    Bug("repo.py", "rollout", "response: its EOS is dropped",
        "return token_ids[:t + 1]", "return token_ids[:t]"),
    Bug("repo.py", "rollout", "response: the limit of the longest prompt for all",
        "[response_limit(prompt, config) for prompt in prompts]",
        "[response_limit(max(prompts, key=len), config)] * len(prompts)"),
    Bug("repo.py", "rollout run", "response: one that is cut off counts as finished",
        "finished = [row[-1] in policy.stop_token_ids for", "finished = [True for"),
    Bug("repo.py", "rollout", "sampling: all responses share a row of numbers",
        "self.uniform[:, t:t + 1]", "self.uniform[:1, t:t + 1]"),
    Bug("repo.py", "rollout", "sampling: one number for all of a response's tokens",
        "t = input_ids.shape[1] - self.prompt_length", "t = 0"),
    Bug("repo.py", "rollout", "sampling: the temperature is dropped",
        "(scores / self.temperature).double()", "scores.double()"),
    Bug("repo.py", "rollout ranks", "sampling: numbers go by length, not by row",
        "uniform[rows].to(config.device)", "uniform[:len(rows)]"),
    Bug("repo.py", "run ranks", "sampling: every step draws the same numbers",
        "collect(state, repeated, config, key=state.step)", "collect(state, repeated, config)"),
    Bug("repo.py", "run", "evaluation: other numbers before and after",
        'key=("held out", start)', "key=(state.step, start)"),
    Bug("repo.py", "groups", "samples_per_prompt: one response at most",
        "for prompt in prompts for _ in range(config.samples_per_prompt)]",
        "for prompt in prompts]"),
    Bug("repo.py", "rollout", "minibatches: their order is no function of seed and step",
        'generator=random_numbers(config.seed, "order", step, i))', ")"),
    Bug("repo.py", "rollout", "minibatches: every pass has the same order",
        '"order", step, i))', '"order", step))'),

    # ---- kernels in Triton
    Bug("kernels/objective.py", "repo_loss", "Triton loss: halves are not widened",
        "other=0.0).to(tl.float32)", "other=0.0)"),
    Bug("kernels/objective.py", "repo_loss", "Triton loss: the gradient without rho",
        "-weight * surrogate)", "-weight * advantage)"),
    Bug("kernels/objective.py", "repo_loss", "Triton loss: on the edge of the clip no gradient",
        "is_clipped = surrogate > clipped", "is_clipped = surrogate >= clipped"),
    Bug("kernels/objective.py", "repo_loss", "Triton loss: ratio_max of tokens that are none",
        "tl.where(exists, ratio, 0.0)", "ratio"),
    Bug("kernels/objective.py", "repo_loss", "Triton loss: a NaN is lost in ratio_max",
        "tl.where(kl == kl, tl.max(ratio_max, 0), kl)", "tl.max(ratio_max, 0)"),
    # The interpreter's minimum keeps a NaN: only on a GPU do the tests notice.
    Bug("kernels/objective.py", "repo_loss", "Triton loss: a GPU's minimum loses a NaN",
        "clipped_ratio * advantage, tl.PropagateNan.ALL)", "clipped_ratio * advantage)",
        is_covered=False),
    Bug("kernels/objective.py", "repo_loss", "Triton loss: the upstream gradient is dropped",
        "(upstream * gradients).to(ctx.dtype)", "gradients.to(ctx.dtype)"),
    Bug("kernels/rows.py", "log_prob", "Triton gather: sums are not rescaled",
        "rescale = tl.exp2((maximum - new_maximum) * scale)", "rescale = 1.0"),
    Bug("kernels/rows.py", "log_prob", "Triton gather: the last tile loses a group",
        "is_group = (full_tiles * LANES + lane < groups)",
        "is_group = (full_tiles * LANES + lane < groups - 1)"),
    Bug("kernels/rows.py", "log_prob", "Triton gather: the row's tail is lost",
        "begin, back_length + GROUP)", "begin, GROUP)"),
    Bug("kernels/rows.py", "log_prob", "Triton gather: what is no token has a log-prob",
        'mask=is_token, other=float("nan"))', "mask=is_token, other=0.0)"),
    Bug("kernels/rows.py", "log_prob", "Triton gather: the entropy's sum does not move",
        "so_far = rescale * weighted + (maximum - new_maximum) * (rescale * total)",
        "so_far = rescale * weighted"),
    Bug("kernels/rows.py", "log_prob", "Triton gather: the gradient without 1 / temperature",
        "factor = upstream / temperature", "factor = upstream"),
    Bug("kernels/rows.py", "log_prob", "Triton gather: 1 at the target, not 1 - p",
        "value = factor * (1 - tl.exp2(log_prob * LOG2_E))", "value = factor"),
    Bug("kernels/rows.py", "operators", "Triton cap: what is not there has a logit",
        'x = tl.where(mask, behind_cap(x, soft_cap), float("-inf"))',
        "x = behind_cap(x, soft_cap)"),
    Bug("kernels/rows.py", "operators", "Triton cap: no derivative",
        "return 1 - tanh * tanh", "return 1 + 0 * tanh"),
    Bug("kernels/rows.py", "operators", "Triton rows: the target is not behind the cap",
        "        x = behind_cap(x, soft_cap)", "        x = x + 0 * soft_cap"),
    Bug("kernels/linear.py", "linear", "Triton linear: all chunks take the first one's upstream",
        "log2_sums[rows], upstream[rows],", "log2_sums[rows], upstream[:len(logits)],"),
    Bug("kernels/linear_loss.py", "linear", "Triton linear: each chunk takes the first targets",
        "logits, target_ids[rows], log_probs[rows],",
        "logits, target_ids[:len(logits)], log_probs[rows],"),
    Bug("kernels/linear.py", "linear", "Triton linear: each chunk overwrites dW",
        "beta = 0.0 if is_first else 1.0", "beta = 0.0"),
    Bug("kernels/linear.py", "linear", "Triton linear: the first chunk adds to what was there",
        "beta = 0.0 if is_first else 1.0", "beta = 1.0"),
    Bug("kernels/linear.py", "linear", "Triton linear: dX without the last V mod 8 tokens",
        "is_first=part.stop == vocab", "is_first=True"),
    Bug("kernels/linear.py", "linear", "Triton linear: dW is summed in the weight's type",
        "make(weight.shape if weight_needs else 0, dtype=torch.float32)",
        "make(weight.shape if weight_needs else 0)"),
    Bug("kernels/linear_loss.py", "linear", "Triton linear: gradients keep their scale",
        "(upstream / SCALE.value).reshape", "upstream.reshape"),
    Bug("kernels/linear_loss.py", "linear", "Triton linear: gradients without the upstream factor",
        "(upstream / SCALE.value).reshape", "(upstream / upstream / SCALE.value).reshape"),
    Bug("kernels/linear_loss.py", "linear", "Triton linear: the factor is rounded to bf16",
        ".reshape(1, 1)", ".to(ctx.saved_tensors[0].dtype)"),
    Bug("kernels/linear_loss.py", "linear", "Triton linear: zeros for what has no gradient",
        "ctx.set_materialize_grads(False)", "pass"),
    Bug("kernels/linear_loss.py", "linear", "Triton linear: no scale, which fp16 needs",
        "SCALE = tl.constexpr(2.0 ** 12)", "SCALE = tl.constexpr(1.0)", is_covered=False),
    Bug("kernels/reference.py", "linear", "reference linear: all logits in one chunk",
        "rows = rows_per_chunk_on_cpu(*weight.shape)", "rows = max(len(hidden), 1)"),
    Bug("kernels/reference.py", "linear", "reference linear: chunks take others' targets",
        "target_ids.split(rows))", "target_ids.roll(1).split(rows))"),

    # ---- prompts and pairs
    Bug("plumbing/data.py", "prompts", "prompts: duplicates stay",
        "list(dict.fromkeys(prompt for prompt, _ in pairs))", "[prompt for prompt, _ in pairs]"),
    Bug("plumbing/data.py", "prompts", "prompts: held-out ones are trained on",
        "[prompt for prompt in prompts if prompt not in unseen]", "list(prompts)"),
    Bug("plumbing/data.py", "prompts", "prompts: those with special tokens stay",
        "[prompt for prompt in prompts if not spelled.search(prompt)]", "list(prompts)"),
    Bug("plumbing/data.py", "prompts", "prompts: one of exactly the longest length goes",
        "if length <= max_length]", "if length < max_length]"),
    Bug("plumbing/data.py", "prompts", "prompts: an EOS that the tokenizer appends stays",
        "return [row[:-1] for row in rows]", "return rows"),
    Bug("plumbing/data.py", "prompts", "prompts: a second BOS beside a chat template's",
        "adds_special = not tokenizer.chat_template", "adds_special = True"),
    Bug("plumbing/data.py", "prompts", "prompts: every epoch in the same order",
        "(seed * 1_000_003 + epoch)", "(seed * 1_000_003)"),
    Bug("plumbing/data.py", "prompts", "pairs: the safer response, not the better one",
        "float(row['better_response_id'])", "float(row['safer_response_id'])"),
    Bug("plumbing/data.py", "prompts", "pairs: the label False as text counts as safe",
        "label is not None and not truth_of(label)", "label is False"),
    Bug("plumbing/data.py", "chats prompts", "pairs: answers without their end",
        "[*answer, end]", "answer"),
    Bug("plumbing/data.py", "chats", "pairs: a token across the border takes a part of the answer",
        "if whole[:len(ids)] != ids:", "if False:"),
    Bug("plumbing/data.py", "prompts", "pairs: PTX learns unsafe answers",
        "None if safe_only and is_labelled_unsafe(row) else answer", "answer"),
    Bug("plumbing/chats.py", "chats", "chats: a quoted transcript becomes turns",
        "return text if to_messages(text) == messages else Chat(text, messages)", "return text"),
    Bug("plumbing/data.py", "chats", "pairs: PTX teaches what a template writes without an end",
        "[ends > 0] * len(pairs)", "[True] * len(pairs)"),
    Bug("plumbing/data.py", "chats", "prompts: those with a word that is an added token go",
        " and not token.content.isalnum()", ""),
    Bug("plumbing/files.py", "input prompts", "csv: an open quotation mark takes all that follows",
        'csv.reader(text_of(file, ""), strict=True)', 'csv.reader(text_of(file, ""))'),
    Bug("plumbing/scorers.py", "chats", "score: the policy's tokens where the template has others",
        "if texts[i] == said + end * ended:", "if True:"),
    Bug("plumbing/data.py", "chats", "chats: turns that a template leaves out are lost",
        "lost = [role for word, role in words.items() if word not in text]", "lost = []"),
    Bug("plumbing/data.py", "chats", "chats: the token that ended a response is shown",
        "ids[:-1] if ids and ids[-1] in stop_token_ids else ids for ids", "ids for ids"),
    Bug("plumbing/models.py", "chats", "chats: the model's config lists no end",
        "listed = listed or ids_in", "listed or ids_in"),
    Bug("plumbing/models.py", "chats", "chats: the template's date is the clock's",
        "None, config.date", "None, None"),
    Bug("plumbing/settings.py", "chats", "chats: a resumed run reads another date",
        'if config.resume == "newest":', "if False:"),
    Bug("plumbing/files.py", "prompts", "files: a mark of the encoding is text",
        '"utf-8-sig"', '"utf-8"'),

    # ---- models
    Bug("plumbing/scorers.py", "models", "score: read at a column that ignores left padding",
        "last = attention_mask.cumsum(1).argmax(1, keepdim=True)",
        "last = attention_mask.sum(1, keepdim=True) - 1"),
    Bug("plumbing/scorers.py", "models", "score: a normaliser shifts costs",
        'self.normalizer["mean"] if self.role == "reward" else 0.0', 'self.normalizer["mean"]'),
    Bug("plumbing/data.py", "chats models", "score: unfinished answers get an end",
        "texts.append(text if ended else text.removesuffix(end))", "texts.append(text)"),
    Bug("plumbing/scorers.py", "chats", "score: the policy's end, not the template's",
        "row[:-1] + self.closing if ended", "row if ended"),
    Bug("plumbing/scorers.py", "chats", "score: whatever the template",
        "each.chat_template, each.bos_token", "each.bos_token"),
    Bug("plumbing/scorers.py", "models", "score: a classifier's sign is turned",
        "logits[:, self.unsafe] - logits[:, 1 - self.unsafe]",
        "logits[:, 1 - self.unsafe] - logits[:, self.unsafe]"),
    Bug("plumbing/scorers.py", "models", "score: the head is not in fp32",
        '_keep_in_fp32_modules_strict = ["score_head", "normalizer"]',
        '_keep_in_fp32_modules_strict = ["normalizer"]'),
    Bug("plumbing/scorers.py", "models", "score: trained heads may be missing",
        'optional={"score_head.bias"},', 'optional={"score_head.bias", "score_head.weight"},'),
    Bug("plumbing/adapters.py", "lora", "LoRA: factor A is scaled as a layer's weight",
        "scale = 2 * linear.in_features ** 0.5 / rank", "scale = linear.in_features ** -0.5"),
    Bug("plumbing/adapters.py", "lora", "LoRA: factor B does not begin at zero",
        "torch.zeros(linear.out_features, rank, device=device)",
        "torch.full((linear.out_features, rank), 1e-3, device=device)"),
    Bug("plumbing/adapters.py", "lora", "LoRA: adapters are not merged",
        ".float() + low_rank", ".float()"),
    Bug("plumbing/scorers.py", "models", "final: a critic keeps its score model's normaliser",
        'if not name.startswith("normalizer.")}', 'if name != "normalizer."}'),
    Bug("plumbing/scorers.py", "models", "final: a critic's values are normalised again",
        '"score_bias": True, "do_normalize": False}', '"score_bias": True}'),
    Bug("plumbing/checkpoints.py", "run lora", "final: adapters are not merged",
        "save(temporary, model, merged(weights), config)",
        "save(temporary, model, weights, config)"),

    # ---- runs: files, resuming, ranks
    Bug("plumbing/checkpoints.py", "run", "resume: logs are not cut back",
        "cut_back(out, state.step, state.logs)", "cut_back(out, state.step, {})"),
    Bug("plumbing/checkpoints.py", "run", "resume: lambda begins anew",
        "for name in state.RESUMED})", 'for name in state.RESUMED if name != "lam"})'),
    Bug("plumbing/checkpoints.py", "run", "resume: the schedule begins anew",
        'state.schedule.load_state_dict(saved["schedule"])', 'saved["schedule"]'),
    Bug("plumbing/checkpoints.py", "run", "resume: the next step has the first one's rate",
        'group["lr"] = rate', 'group["rate"] = rate'),
    Bug("plumbing/checkpoints.py", "input", "resume: with other prompts",
        'require(saved["data"] == state.data,', "require(True,"),
    Bug("plumbing/checkpoints.py", "run", "resume: with another kl_coeff",
        '"confidence", "log_to",', '"confidence", "log_to", "kl_coeff",'),
    Bug("plumbing/checkpoints.py", "faults run", "manifest: its hashes are not compared",
        "if found[name] != expected[name]:", "if False:"),
    Bug("plumbing/checkpoints.py", "faults run", "manifest: the hashes of another file",
        "{name: sha256(checkpoint / name) for",
        '{name: sha256(checkpoint / "manifest.json") for'),
    Bug("plumbing/checkpoints.py", "hostile run", "manifest: unknown files are let in",
        "for name in there - expected.keys():", "for name in ():"),
    Bug("plumbing/checkpoints.py", "run", "prune: one checkpoint too many stays",
        "[:-keep])", "[:-keep - 1])"),
    Bug("plumbing/checkpoints.py", "run", "prune: the newest go",
        "[:-keep])", "[keep:])"),
    Bug("plumbing/folder.py", "run", "lock: others may have it too",
        "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
    Bug("plumbing/folder.py", "run", "lock: it is never given back",
        "LOCKS.append(descriptor)", "pass"),
    Bug("plumbing/folder.py", "run", "folder: an earlier run is not moved aside",
        "if holds_run(out):", "if False:"),
    Bug("repo.py", "ranks", "ranks: PPO-Lag's window is one rank's",
        "-config.cost_window * ranks.RANKS:", "-config.cost_window:"),
    Bug("plumbing/training.py", "ranks", "ranks: the gradient is their mean",
        "(scale * RANKS * loss).backward()", "(scale * loss).backward()"),
    Bug("plumbing/ranks.py", "ranks", "ranks: metrics of one rank",
        "all_reduce(values, op).tolist()", "values.tolist()"),
    Bug("plumbing/ranks.py", "ranks", "ranks: log-probs of one rank",
        "all_reduce(placed.masked_scatter(is_mine, values))",
        "placed.masked_scatter(is_mine, values)"),
    Bug("plumbing/ranks.py", "ranks", "ranks: the row that fills an empty share counts",
        "torch.zeros_like(part.response_mask)", "part.response_mask"),
    Bug("plumbing/errors.py", "ranks", "ranks: an error of one is its own",
        "failed = from_all_ranks(failed)", "failed = dict(failed)"),
    Bug("plumbing/checkpoints.py", "ranks", "ranks: an error of all saves nothing",
        'stopped or RANKS == 1 or getattr(error, "on_all_ranks", False)', "stopped or RANKS == 1"),
    Bug("plumbing/ranks.py", "ranks", "ranks: a lost one is a traceback",
        'isinstance(error, distributed.DistError) or "gloo/transport" in str(error)',
        "isinstance(error, distributed.DistError)"),
    Bug("plumbing/ranks.py", "hosts", "machines: a silent connection stays",
        "(socket.TCP_USER_TIMEOUT, 1000 * SILENCE)", "(socket.TCP_USER_TIMEOUT, 0)"),
    Bug("plumbing/machines.py", "hosts", "machines: what only one has is not compared",
        "has[0].keys() | has[rank].keys()", "has[0].keys()"),
    Bug("plumbing/machines.py", "hosts", "machines: data are not compared",
        '"prompts and PTX pairs": data[:8]', '"prompts and PTX pairs": ""'),
    Bug("plumbing/machines.py", "hosts", "machines: a folder of one's own is taken for shared",
        "if blind:", "if False:"),
    Bug("plumbing/threads.py", "threads", "threads: busy cores count as free",
        "free = round(os.cpu_count() - busy)", "free = os.cpu_count()"),

    # ---- runs: steps, what interrupts them, evaluation
    Bug("plumbing/runs.py", "run", "Ctrl-C: the steps go on",
        "if self.stopped or state.step >= config.steps:", "if state.step >= config.steps:"),
    Bug("plumbing/runs.py", "run", "Ctrl-C: it ends the run as if all steps were done",
        "            raise KeyboardInterrupt", "            return"),
    Bug("plumbing/runs.py", "run", "Ctrl-C: the exit code of success",
        'return 130, ""', 'return 0, ""'),
    Bug("plumbing/runs.py", "run", "an error: no checkpoint is saved",
        "isinstance(error, KeyboardInterrupt | UserError | OSError)",
        "isinstance(error, KeyboardInterrupt)"),
    Bug("plumbing/runs.py", "run", "an error while a checkpoint is saved is a traceback",
        "except (Exception, KeyboardInterrupt) as other:", "except UserError as other:"),
    Bug("plumbing/runs.py", "run", "bad numbers of an evaluation are a traceback",
        "raise UserError(error.args[0]) from None", "raise"),
    Bug("plumbing/runs.py", "ranks", "a bad step: its gradients are in the next one",
        "state.optimizer.zero_grad()", "pass"),
    Bug("plumbing/runs.py", "numbers", "bad steps: they never end the run",
        "if self.bad_steps < self.config.max_bad_steps:", "if True:"),
    Bug("plumbing/runs.py", "numbers", "--save_every: a bad step on a multiple loses a checkpoint",
        "if state.step // config.save_every > saved:", "if state.step % config.save_every == 0:"),
    Bug("plumbing/runs.py", "run", "evaluation: rows of other prompts",
        "records[i * config.eval_samples:(i + 1) * config.eval_samples]",
        "records[i::len(self.held_out)]"),
    Bug("plumbing/runs.py", "run", "evaluation: one verdict for all responses",
        "for record, verdict in zip(records, verdicts)]",
        "for record, verdict in zip(records, verdicts[:1] * len(records))]"),
    Bug("plumbing/runs.py", "run", "--eval_only: the policy that the run started from",
        "self.state.policy = sharded(load_policy(trained)[0], config)",
        "sharded(load_policy(trained)[0], config)"),

    # ---- what is told or refused, not silent
    Bug("plumbing/data.py", "prompts", "data: the first prompts of a file stand for all",
        "random.Random(0).sample(range(len(prompts)), min(count, len(prompts)))",
        "range(min(count, len(prompts)))"),
    Bug("plumbing/data.py", "input", "data: an answer alone is read as a prompt",
        'require_turns(row["chosen"])', "pass"),
    Bug("plumbing/preferences.py", "learning", "preferences: answers to different conversations",
        "return (prompt, better, worse, None) if prompt == other else None",
        "return prompt, better, worse, None"),
    Bug("companions/shared/learning.py", "learning", "learning: a folder that is taken is replaced",
        "require(place.name and is_free,", "require(place.name,"),
    Bug("companions/shared/learning.py", "learning", "learning: NaN weights are saved",
        "require(all(weight.isfinite().all() for weight in weights),", "require(True,"),
    Bug("plumbing/metrics.py", "numbers", "scores beyond the cut are not told",
        "used = torch.cat([reward, excess]) if", "used = reward if"),
    Bug("plumbing/scorers.py", "models", "scorer: rows longer than it has learned",
        "if longest > limit and not (extrapolates or self.has_warned):", "if False:"),
    Bug("plumbing/checkpoints.py", "input", "resume: a changed score function is not told",
        "if state.functions.get(flag) != digest:", "if False:"),
    Bug("plumbing/runs.py", "run", "--eval_only: held-out prompts that were trained on",
        "moved = held_out.intersection(map(str, training_prompts))", "moved = set()"),
    Bug("plumbing/settings.py", "run", "a run's own model is moved aside",
        "require(not any(is_inside(path, out) for path in paths),", "require(True,"),

    # ---- settings
    Bug("plumbing/settings.py", "run", "settings: a file beats the command line",
        "layered(preset, *layers)", "layered(preset, *layers[::-1])"),
    Bug("plumbing/settings.py", "run", "settings: a preset beats a file",
        "layered(preset, *layers)", "layered(*layers[:-1], preset, layers[-1])"),
    Bug("plumbing/settings.py", "confidence", "settings: a threshold below zero is refused",
        'fits, wanted = True, "a finite number"', 'fits, wanted = value >= 0, "a finite number"'),
    Bug("plumbing/settings.py", "input", "settings: 0 where there must be more is taken",
        'value > 0, "a finite number above 0"', 'value >= 0, "a finite number above 0"'),
    Bug("plumbing/settings.py", "run", "settings: other prompts keep the preset's judge",
        '"eval_dataset", "prompt_column", "judge")', '"eval_dataset", "prompt_column")'),
    Bug("plumbing/settings.py", "hostile", "settings: a file lets code of checkpoints run",
        '"environment", "trust_remote_code", "output_dir", "eval_only")',
        '"environment", "output_dir", "eval_only")'),
    Bug("plumbing/settings.py", "input", "settings: those of a file that do not exist are ignored",
        "settings = {**json.loads(Path(path).read_text())}",
        "settings = {'steps': json.loads(Path(path).read_text()).get('steps')}"),
    Bug("plumbing/settings.py", "input run", "settings: defaults count as given",
        "vars(parser.parse_args(words, nothing))", "vars(parser.parse_args(words))"),
    Bug("plumbing/settings.py", "input", "--help: a default of 0 is not shown",
        "type(action.default) in (int, float, str) and", "action.default and"),
    Bug("plumbing/functions.py", "input", "functions: a wrong number of results is taken",
        "require(len(results) == len(responses),", "require(True,"),
    Bug("plumbing/functions.py", "input", "functions: a judge's results are not looked at",
        "return [{name: truth_of(verdict[name]) for name in names} for verdict in judged]",
        "return judged"),
    Bug("plumbing/errors.py", "hostile", "terminal: what steers it is printed",
        "character if character.isprintable() or", "character if True or"),
    Bug("plumbing/errors.py", "input", "functions: a user's sys.exit() ends the run",
        "except BaseException as error:", "except Exception as error:"),

    # ---- metrics and scores
    Bug("plumbing/metrics.py", "run rollout", "metrics: the next step's lambda",
        '"lambda": lam,', '"lambda": state.lam,'),
    Bug("plumbing/metrics.py", "equations", "metrics: the KL is a mean over tokens",
        "kl = (rollout.log_probs - rollout.ref_log_probs).sum(1)",
        "kl = (rollout.log_probs - rollout.ref_log_probs).mean(1)"),
    Bug("plumbing/metrics.py", "equations", "metrics: the entropy of padding counts",
        "rollout.entropy[mask].mean()", "rollout.entropy.mean()"),
    Bug("repo.py", "rollout", "metrics: rectified costs without the threshold",
        "= rectify(rollout.cost, config.threshold)", "= rectify(rollout.cost)"),
    Bug("plumbing/metrics.py", "equations", "metrics: a loss is a sum over updates",
        "self.sums[name] += loss / self.updates", "self.sums[name] += loss"),
    Bug("plumbing/metrics.py", "equations", "metrics: statistics are sums over passes",
        "self.tokens = config.update_iters * rollout", "self.tokens = rollout"),
    Bug("plumbing/metrics.py", "equations", "metrics: ratio_max of the last micro-batch",
        'max(self.ratio_max, statistics["ratio_max"].item())', 'statistics["ratio_max"].item()'),
    Bug("plumbing/metrics.py", "equations", "metrics: a cost at the threshold is unsafe",
        "(cost > config.threshold).float()", "(cost >= config.threshold).float()"),
    Bug("plumbing/metrics.py", "equations",
        "metrics: explained variance of values that are shifted",
        "(returns - values)[mask].var(correction=0)", "((returns - values)[mask] ** 2).mean()"),
    Bug("plumbing/metrics.py", "equations", "scores: a cost at the threshold is unsafe",
        "(rollout.cost <= threshold)", "(rollout.cost < threshold)"),
    Bug("plumbing/reports.py", "run compare", "scores: fully safe if any response is",
        "[all(response", "[any(response"),
    Bug("plumbing/reports.py", "compare", "scores: over-refusal over all requests",
        '["refused"] for response in harmless]', '["refused"] for response in judged]'),

    # ---- what stands around a run
    Bug("plumbing/checkpoints.py", "run", "resume: the seconds of earlier sessions are forgotten",
        'state.started -= saved.get("wall_seconds", saved["seconds"])', "pass"),
    Bug("plumbing/hub.py", "hub", "hub: no answer is an answer",
        "[reason] = answers or [f", "[reason] = answers or [None and f"),
    Bug("plumbing/hub.py", "hub", "hub: trouble is an answer",
        "return status == 429 or status >= 500", "return False"),
    Bug("plumbing/hub.py", "hub", "hub: a resumed run takes the newest commit",
        "COMMITS.get(key) or revision", "revision"),
    Bug("plumbing/hub.py", "hub", "hub: weights are fetched for a config",
        "[]) * with_weights", "[])"),
    Bug("plumbing/hub.py", "hub", "hub: no file is damaged",
        "if content.hexdigest() != name:", "if False:"),
    Bug("plumbing/files.py", "hub", "data sets: the first configuration that has the split",
        "* (config == default)", "* True"),
    Bug("plumbing/models.py", "hub", "hub: generation_config.json is read from nowhere",
        'folder_of(config.policy, config.policy_flag(), config) / "gen',
        'Path(config.policy) / "gen'),
    Bug("plumbing/settings.py", "hub", "--eval_only: pairs that are never used are loaded",
        "bool(self.ptx_coeff) and not self.eval_only", "bool(self.ptx_coeff)"),
    Bug("plumbing/errors.py", "hosts", "ranks: a lost one is told as a full disk",
        "if has_lost_a_rank(first):", "if False:"),
    Bug("plumbing/reports.py", "curves", "curves: steps that were lost are shown",
        "purge_step=step + 1", "purge_step=None"),
    Bug("plumbing/reports.py", "curves", "curves: a resumed run is another one",
        "if not file.exists():", "if True:"),
    Bug("plumbing/models.py", "models", "shared beginning: one row decides",
        "(beginnings == beginnings[0]).all(0)", "(beginnings == beginnings[0]).any(0)"),
    Bug("plumbing/models.py", "models", "shared beginning: gaps are passed over",
        "are_equal.cumprod(0).sum()", "are_equal.sum()"),
    Bug("plumbing/models.py", "models", "shared beginning: all of the shortest row",
        "shortest = min(map(len, rows)) - 1", "shortest = min(map(len, rows))"),
    Bug("plumbing/models.py", "models", "shared prompt: each row has its neighbour's cache",
        "cache.reorder_cache(which)", "cache.reorder_cache(which.sort().values)"),
    Bug("plumbing/models.py", "models", "shared prompt: the cache's columns stay positions",
        "if use_cache:  # its columns are positions", "if False:"),
    Bug("plumbing/models.py", "models", "shared prompt: one too many columns",
        "return int(best) + 1 if pays", "return int(best) + 2 if pays"),
    Bug("plumbing/models.py", "models", "shared prompt: a row may have no token in it",
        "(has_begun * (len(input_ids)", "((len(input_ids)"),
    Bug("plumbing/models.py", "gguf", "a .gguf file's quantisation is kept",
        "policy.hf_quantizer.remove_quantization_config(policy)", "pass"),
    Bug("plumbing/metrics.py", "numbers", "drift: harmful prompts alone tell",
        "len(kinds) < 2", "len(kinds) < 1"),
    Bug("plumbing/metrics.py", "numbers", "destruction: the wrong way round",
        "if metrics[name] > limit:", "if metrics[name] < limit:"),
    Bug("companions/xstest.py", "xstest", "XSTest: held-out questions are trained on",
        "learn += asked[len(asked) // 5:]", "learn += asked"),
    Bug("companions/xstest.py", "xstest", "XSTest: every compliance is safe",
        'not question["is_unsafe"]}))', "True}))"),
    Bug("companions/shared/streaming.py", "monitor", "monitor: a score of theta does not count",
        "((z >= theta).cumsum(0) >= k)", "((z > theta).cumsum(0) >= k)"),
    Bug("companions/shared/streaming.py", "monitor", "monitor: theta is chosen on what is reported",
        "theta, k = choose(*map(list, zip(*parts[0])))",
        "theta, k = choose(*map(list, zip(*parts[1])))"),
    Bug("companions/shared/inside.py", "neurons", "reader: padding takes places",
        "position_ids=places", "position_ids=None"),
    Bug("companions/shared/inside.py", "neurons", "reader: what is new is masked",
        "value=1)", "value=0)"),
    Bug("companions/shared/streaming.py", "monitor", "monitor: EOS counts as a token",
        "self.hits += (z >= self.theta) & ~has_ended", "self.hits += z >= self.theta",
        is_covered=False),
    Bug("companions/shared/streaming.py", "monitor", "monitor: no logic",
        "+ logic_weight * logic)", ")"),
    Bug("companions/shared/streaming.py", "monitor",
        "monitor: harmful answers not stopped cost nothing",
        "sum((stop or length) / length", "sum((stop or 0) / length"),
    Bug("companions/shared/streaming.py", "monitor", "monitor: the answer goes on behind the stop",
        "repo.up_to_stop(row, ends)[:stop]", "repo.up_to_stop(row, ends)"),
    Bug("companions/neurons.py", "neurons", "neurons: --tokens is passed over",
        "of_prompts=settings.tokens == \"prompt_last\"", "of_prompts=False"),
    Bug("companions/shared/patching.py", "neurons", "neurons: the others are patched",
        "torch.where(chosen[number], theirs[number], inputs)",
        "torch.where(chosen[number], inputs, theirs[number])"),
    Bug("companions/shared/patching.py", "neurons", "neurons: scores of the prompt's tokens",
        "else change[:, len(prompt):]", "else change"),
    Bug("companions/page.py", "page", "page: texts of models may end the script",
        'json.dumps(value).replace("<", "\\\\u003c")', "json.dumps(value)"),
    Bug("companions/page.py", "page", "page: names of groups are markup",
        "return html.escape(printable(str(words)))", "return printable(str(words))"),
    Bug("companions/page.py", "page", "page: before training is after it",
        'shown["before"] = evaluated(before[asked(row)])',
        'shown["before"] = evaluated(row)'),
    Bug("companions/page.py", "page", "page: other prompts' responses before training",
        "rows if rows.keys() == {asked(row) for row in run.prompts} else {}", "rows"),
    Bug("companions/page.py", "page", "page: one run's interval for several seeds",
        "if len(summaries) > 1 or not edges:", "if not edges:"),
    Bug("companions/shared/runs.py", "compare", "curves: lambda is smoothed",
        'if metric != "lambda":', "if True:"),
    Bug("companions/compare.py", "compare", "compare: a prompt's change against another prompt",
        "summarize([old_rows[asked(row)]])", "summarize(old[:1])"),
    Bug("companions/compare.py", "compare", "compare: a run with other settings is taken again",
        "return all(value is None or", "return any(value is None or"),
    Bug("companions/shared/command.py", "command", "companions: 0 is above 0",
        "fits = value >= 0 if may_be_zero else value > 0", "fits = value >= 0"),
    Bug("companions/walk.py", "walk", "walk: the ratio of one step to itself",
        "of_each(log_probs[:, None], *given, weights)", "of_each(given[0], *given, weights)"),
    Bug("companions/walk.py", "walk", "walk: a cost that is not rectified",
        "rollout.reward, cost, rollout.log_probs", "rollout.reward, -cost, rollout.log_probs"),
    Bug("companions/walk.py", "walk", "walk: lambda before the step and again",
        "repo.update_lambda(state.lam, rollout.cost, config)", "state.lam"),
    # ---- pictures
    Bug("plumbing/pictures.py", "pictures", "pictures: the same text is the same prompt",
        'super().__eq__(other) and self.digest == getattr(other, "digest", None)',
        "super().__eq__(other)"),
    Bug("plumbing/data.py", "pictures", "pictures: one place-holder for all states",
        "sight.place_holder * sight.count", "sight.place_holder"),
    Bug("plumbing/models.py", "pictures", "pictures: the policy learns without them",
        "inputs = model_inputs(input_ids, attention_mask, pixel_values)",
        "inputs = model_inputs(input_ids, attention_mask)"),
    Bug("plumbing/scorers.py", "pictures", "pictures: critics do not look",
        "hidden_states(self.model, input_ids, attention_mask, pixel_values)",
        "hidden_states(self.model, input_ids, attention_mask)"),
    Bug("repo.py", "pictures", "pictures: another row's while sampling",
        "pixel_values[rows]", "pixel_values[:len(rows)]"),
    Bug("plumbing/scorers.py", "pictures", "pictures: score models do not look",
        "inputs = [ids, mask, pixels_for(self.tokenizer, prompts)]", "inputs = [ids, mask, None]"),
    Bug("plumbing/scorers.py", "pictures", "pictures: seen alike whatever the processor",
        '(getattr(each, "sight", None), each.chat_template', "(each.chat_template"),
    Bug("plumbing/adapters.py", "pictures", "pictures: the tower is trained",
        "vision_tower(model).requires_grad_(False)", "vision_tower(model)"),
    Bug("plumbing/adapters.py", "pictures", "pictures: adapters in the tower too",
        "language_part(model.base_model).modules()", "model.base_model.modules()"),
    Bug("plumbing/models.py", "pictures", "pictures: an answer may show one",
        "never.append(tokenizer.convert_tokens_to_ids(tokenizer.sight.place_holder))", "pass"),
    Bug("plumbing/preferences.py", "pictures", "pictures: BeaverTails-V's ids from 0",
        "ids = better, 3 - better", "ids = 3 - better, better"),
    Bug("plumbing/data.py", "pictures", "pictures: rows without one among others",
        "require(missing in (0, len(rows)),", "require(True,"),
    Bug("plumbing/data.py", "pictures", "pictures: who sees reads no prompts without one",
        'if getattr(tokenizer, "sight", None):', "if has_picture:"),
    Bug("plumbing/pictures.py", "pictures", "pictures: a file is how it is called",
        "content = image.read_bytes()", "content = str(image).encode()"),
    Bug("plumbing/pictures.py", "pictures", "pictures: a text may show more than its picture",
        "while self.place_holder in text:", "if self.place_holder in text:"),
    Bug("plumbing/data.py", "pictures", "pictures: PTX is blind",
        "pixels_for(tokenizer, prompts, device))", "None)"),
    Bug("companions/supervised.py", "pictures", "pictures: supervised learning is blind",
        "pixels_for(tokenizer, prompts))", "None)"),
    Bug("companions/guard.py", "guard", "guard: blind",
        "pixels_for(tokenizer, prompts))", "None)"),
    Bug("plumbing/ranks.py", "ranks", "ranks: a tower that is called first counts as the whole",
        "call_as_forward(model, lambda model: None)", "pass"),
    Bug("companions/guard.py", "guard", "guard: minor harm passes",
        "if cost > levels[0]]", "if cost > levels[1]]"),
    Bug("companions/guard.py", "guard", "guard: every round draws the same",
        'key = "guard", number, part', 'key = "guard", 0, part'),
    Bug("companions/guard.py", "guard", "guard: the judge is not asked",
        "settings.judge and load_function", "None and load_function"),
    Bug("companions/shared/calibration.py", "shiftdc", "shiftdc: what is generated is changed too",
        "waiting.remove(layer)", "waiting.add(layer)"),
    Bug("companions/shared/calibration.py", "shiftdc", "shiftdc: divided by the direction's length",
        "(direction @ direction)", "direction.norm()"),
    Bug("companions/shared/calibration.py", "shiftdc", "shiftdc: captions of other prompts",
        "self.of_texts[layer, rows]", "self.of_texts[layer, :1]"),

    # ---- plumbing/trial.py: what a user's checkpoint holds
    Bug("plumbing/trial.py", "trial families", "trial: whatever comes is rounding",
        'TOLERANCE = {"float32": 1e-3', 'TOLERANCE = {"float32": 1e3'),
    Bug("plumbing/trial.py", "families", "trial: nothing is sampled",
        "for scores, i in zip(sampled, chosen):", "for scores, i in ():"),
    Bug("plumbing/trial.py", "trial", "trial: a short row for the longest",
        "for i in range(config.max_length)]", "for i in range(9)]"),
    Bug("plumbing/trial.py", "families", "trial: compared in bfloat16",
        "if RANKS > 1 or not has_room:", "if True:"),
    Bug("plumbing/trial.py", "families", "trial: the longest row is alone",
        "outputs_of_first([rows[-1], longest])", "outputs_of_first([longest, rows[-1]][1:])"),
    Bug("plumbing/trial.py", "families", "trial: the padding is always the same",
        '("padded", [0, 1], rows[1][0]),', '("padded", [0, 1], pad_id),'),
    Bug("plumbing/trial.py", "trial", "trial: any length was learned",
        "if config.max_length <= limit:", "if True:"),
    Bug("plumbing/trial.py", "trial", "trial: every architecture extrapolates",
        "require(extrapolates, f", "require(True, f"),
    Bug("plumbing/runs.py", "trial", "final: a saved policy that differs is not told",
        "require(not problem, problem)", "pass"),
    Bug("plumbing/models.py", "trial", "final: an own head is dropped where the config ties it",
        "if any(live[name] is not live[other]", "if any(name == other"),
    Bug("plumbing/models.py", "trial", "dropout: functional dropout stays",
        'if isinstance(value, float) and "drop" in name:', "if False:"),
    Bug("plumbing/models.py", "trial", "dropout: the saved config has none",
        "model.base_model.published_config = published", "pass"),
    Bug("plumbing/models.py", "trial", "load: weights without a place are dropped",
        "require(not left_out,", "require(True,"),
    Bug("plumbing/models.py", "trial", "load: an adapter is ignored",
        'require(not (path / "adapter_config.json").is_file(),', "require(True,"),
    Bug("plumbing/models.py", "trial", "sampling: ids without a token",
        "never = [draw], list(policy.tokenless)", "never = [draw], []"),
    Bug("plumbing/models.py", "trial", "log-probs: ids without a token have a share",
        "return weight[:-len(policy.tokenless)] if policy.tokenless else weight", "return weight"),
    Bug("plumbing/metrics.py", "trial", "ratio: whatever the first is",
        "if first_ratio_max <= FIRST_RATIO[dtype]:", "if True:"),
    Bug("plumbing/scorers.py", "trial", "score: the names of labels are not read",
        "unsafe = 0 if told[0] is True or told[1] is False else 1", "unsafe = 1"),
    Bug("plumbing/scorers.py", "trial", "score: names that are not known are passed over",
        "require(are_clear and (None", "require((None"),
    Bug("plumbing/scorers.py", "trial", "score: a config's mean shifts costs",
        'mean = mean if role == "reward" else 0.0', "pass"),
    Bug("plumbing/scorers.py", "families", "score: the config's width is believed",
        "nn.Linear(self.model.get_input_embeddings().weight.shape[1], 1)",
        "nn.Linear(config.get_text_config().hidden_size, 1)"),
]


# ---- a copy of the project with a bug in it

def mutated(bug: Bug) -> str:
    """The file's text with the bug. Exits with a sentence if its line has changed."""
    text = (ROOT / bug.file).read_text()
    count = text.count(bug.old)
    if count != 1:
        sys.exit(f"{bug.name}: {bug.old!r} is {count} times in {bug.file}, and must be once; "
                 "mend the bug in tests/mutations.py")
    text = text.replace(bug.old, bug.new)
    ast.parse(text)  # a bug that is no Python would show nothing
    return text


def copy_project(folder: Path, bug: Bug | None) -> None:
    """Into a new folder. Tiny worlds are shared; one that the bug would change, being another by
    its fingerprint, is built in the copy and goes with it."""
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", "runs", "cache", "*mutations.py")
    shutil.copytree(ROOT, folder, ignore=left_out)
    worlds = folder / "tiny_configs" / "cache"
    worlds.mkdir()
    for world in (ROOT / "tiny_configs" / "cache").glob("*"):
        (worlds / world.name).symlink_to(world)
    if bug:
        (folder / bug.file).write_text(mutated(bug))


def first_failure(folder: Path, files: list[str]) -> str | None:
    """Runs pytest on test files there, or on all: the first test that fails, None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    if files:
        command += ["-k", f"not ({SLOW})"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    printed = folder.parent / "printed.txt"
    with printed.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        return f"the limit of {LIMIT} s"
    finally:
        end_group_of(process)
    if code == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", printed.read_text(), re.M)
    if not failed:
        sys.exit(f"pytest ended with code {code}:\n{printed.read_text()[-3000:]}")
    return failed[1]


def end_group_of(process: subprocess.Popen) -> None:
    """Ends pytest, if it still runs, and whatever it has started and left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    process.wait()


# ---- all bugs

@dataclass(frozen=True)
class Outcome:
    noticed_by: str | None
    seconds: float


def try_out(bug: Bug | None, likely: list[str], likely_only: bool) -> Outcome:
    """What becomes of a bug, or of the project as it is."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "project")
        copy_project(folder, bug)
        noticed_by = first_failure(folder, likely)
        if not noticed_by and not likely_only:
            noticed_by = first_failure(folder, [])
    return Outcome(noticed_by, time.monotonic() - begin)


def likely_files(bugs: list[Bug]) -> list[str]:
    names = dict.fromkeys(name for bug in bugs for name in bug.tests.split())
    return [f"tests/test_{name}.py" for name in names]


def report(bugs: list[Bug], outcomes: list[Outcome]) -> int:
    """The last lines, and the exit code."""
    survivors = [bug for bug, outcome in zip(bugs, outcomes) if not outcome.noticed_by]
    covered = [bug for bug in survivors if bug.is_covered]
    print(f"\n{len(bugs) - len(survivors)} of {len(bugs)} bugs noticed; {len(survivors)} survive, "
          f"{len(covered)} of them in what an equation or a README promises")
    for bug in survivors:
        print(f"    {'promised' if bug.is_covered else 'other   '}  {bug.file}: {bug.name}")
    return 1 if covered else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME",
                        help="bugs whose names contain one of these")
    parser.add_argument("--likely-only", action="store_true",
                        help="only the test files that are likely to notice")
    parser.add_argument("--jobs", type=int, default=1, help="so many bugs at a time")
    flags = parser.parse_args()
    bugs = [bug for bug in BUGS if any(part.lower() in bug.name.lower() for part in flags.only)]
    for bug in bugs:
        mutated(bug)  # exits before the first run if one has no line any more

    subprocess.run([sys.executable, "-m", "tiny_configs.world"], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)  # once, for all copies
    healthy = try_out(None, likely_files(bugs), likely_only=True)
    if healthy.noticed_by:
        sys.exit(f"without any bug {healthy.noticed_by} fails; nothing can be said")
    print(f"without a bug: all pass in {healthy.seconds:.0f} s", flush=True)

    def outcome_of(bug):
        return try_out(bug, likely_files([bug]), flags.likely_only)

    outcomes = []
    with ThreadPoolExecutor(flags.jobs) as pool:
        for bug, outcome in zip(bugs, pool.map(outcome_of, bugs)):
            fate = f"caught by {outcome.noticed_by}" if outcome.noticed_by else "SURVIVED"
            print(f"{bug.name}: {fate} in {outcome.seconds:.0f} s", flush=True)
            outcomes.append(outcome)
    return report(bugs, outcomes)


if __name__ == "__main__":
    sys.exit(main())
