"""RePO, Rectified Policy Optimization (arXiv 2410.19933), in the paper's order: safety alignment of
a language model by reinforcement learning.

A reward model says how helpful a response is, a cost model how harmful: a cost above the threshold
d is unsafe. Safe RLHF bounds the *mean* cost, so very safe answers can pay for unsafe ones: safety
compensation. RePO penalises the rectified cost {C - d}+ of every prompt instead, a number that is
never negative, so nothing can compensate.

    python repo.py                     # builds a tiny world and aligns a policy in it
    python repo.py --algo ppo_lag      # the same with Safe RLHF's bound: the compensation
    python repo.py --model alpaca-7b   # the paper's models; --help lists every setting

Where it differs from the paper, as we read it, and from Safe RLHF's published code, on which its
authors built (their own trainer was never read), and why:

1. The paper splits a batch into safe and unsafe responses (--rectify mask). The default, --rectify
   return, sends the rectified cost into every return: another estimator of the same objective's
   gradient, which still rewards the rare safe response when the split has nothing left to compare.
2. A response may fill what its own prompt leaves of --max_length, not what the batch's longest
   prompt leaves.
3. There is no dropout anywhere, so the probability ratio of an unchanged policy is 1, up to
   rounding.
4. On one GPU the 3B and 7B presets train low-rank adapters, so that six models fit; under torchrun
   they are fine-tuned in full.
5. --algo ppo_lag, gate and ppo and --baseline group are neighbours to compare with, not RePO.

Prompts are left-padded to P tokens, responses right-padded to T; T_i is the length of response i. A
rollout is B responses, a minibatch M of them, a micro-batch (or a rank's share) b. N is the number
of response tokens in one, H a hidden state's size, V that of the vocabulary. What every run needs
and this method has no say in is in plumbing/.
"""
import logging
import math
import os
import sys
import time
import warnings
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from plumbing.threads import fit_threads  # before torch

import datasets
import torch
import transformers
from torch import Tensor
from torch.distributed import ReduceOp
from tqdm import tqdm

from kernels import gather_log_probs, linear_log_probs, linear_repo_loss, repo_loss, scan_gae
from plumbing.checkpoints import find_checkpoint, resume, save_after, save_checkpoint, save_final
from plumbing.checks import BadNumbers, not_finite
from plumbing.curves import open_curves
from plumbing.errors import UserError, ctrl_c_waits, outlive_readers, printable, require
from plumbing.functions import load_function, verdicts_of
from plumbing.journal import introduce, keep_step, report, skip_step, too_many
from plumbing.machines import check_machines
from plumbing.models import (
    Models,
    ScoreModel,
    check_sources,
    hidden_states,
    load_policy,
    load_tokenizer,
    model_inputs,
    recomputing,
    trainable,
)
from plumbing.pictures import pixels_for
from plumbing.plan import dry_run, peak_memory_mib
from plumbing.prompts import (
    cyclic_batch,
    encode_prompts,
    hash_of_data,
    load_categories,
    load_prompts,
    load_ptx_pairs,
    pad_rows,
    split_prompts,
)
from plumbing.ranks import (
    LOCAL_RANK,
    RANK,
    RANKS,
    all_reduce,
    call_as_forward,
    clip_gradients,
    from_all_ranks,
    gathered,
    has_lost_a_rank,
    join_ranks,
    rank_chunks,
    rank_rows,
    reduced_over_ranks,
    sharded,
)
from plumbing.run_folder import claim_output_dir, has_metrics, locked_folder, to_jsonl, write_whole
from plumbing.sampling import random_numbers, sample
from plumbing.settings import RunSettings, option, resolve
from plumbing.tables import summarize
from tiny_configs import pictures, world

__all__ = ["Config", "ScoreModel", "UserError", "gae", "group_advantages",
           "load_prompts", "main", "rectify",
           "resolve_config", "shape_rewards_and_costs", "update_lambda"]


# ==== 1  Settings of the method ==================================================================

@dataclass
class Config(RunSettings):
    """The method's settings; those of running (models, data, device, files) are RunSettings."""

    algo: Literal["repo", "ppo_lag", "gate", "ppo"] = option(
        "repo", "bound the rectified cost or the mean cost (Safe RLHF), replace the reward of "
                "unsafe responses, or learn from rewards alone")
    rectify: Literal["return", "mask"] = option(
        "return", "repo's estimator: rectified cost in all returns, or a penalty on unsafe "
                  "responses only")
    baseline: Literal["critic", "group"] = option(
        "critic", "what a return is compared with: a critic's value, or, without critics, the "
                  "other responses to the same prompt")
    gate_penalty: float = option(10.0, "gate: an unsafe response's reward is minus this")
    threshold: float = option(0.0, "d: a response is unsafe if its cost is above it")
    lambda_init: float = option(1.0, "the multiplier's first value")
    lambda_lr: float = option(0.1, "alpha: the multiplier's step size")
    lambda_max: float = option(5.0, "the multiplier's upper bound")
    cost_window: int = option(128, "ppo_lag: the mean cost is taken over so many of the latest "
                                   "responses, times the number of ranks")
    kl_coeff: float = option(0.01, "beta: weight of the KL penalty to the starting policy")
    clip_range: float = option(0.2, "epsilon: clip of the probability ratio")
    clip_range_value: float = option(5.0, "how far a critic may move from its old value before "
                                          "its loss is clipped")
    gae_lambda: float = option(0.95, "GAE's lambda, of critics")
    ptx_coeff: float = option(0.0, "weight of the supervised (PTX) loss; 0 = off")
    steps: int | None = option(None, "rollout-and-update steps; default: one pass over the prompts")
    batch_size: int = option(16, "prompts per step, of all ranks together")
    samples_per_prompt: int = option(1, "responses per prompt")
    update_iters: int = option(1, "passes over each rollout")
    minibatch_size: int | None = option(None, "responses per optimiser step; default: the whole "
                                              "rollout")
    actor_lr: float = option(1e-5, "the policy's peak learning rate (cosine to zero)")
    critic_lr: float = option(5e-6, "the critics' learning rate (constant)")
    temperature: float = option(1.0, "of sampling, and of every log-prob but PTX's")
    # No settings: GAE's gamma, 1; the clamp of token rewards, 50; AdamW's betas and weight decay.


def resolve_config(argv: list[str]) -> Config:
    """Defaults < preset of --model < --config < command line. Raises UserError for what cannot
    work. Builds a tiny world, once, if it is asked for."""
    return resolve(Config, argv, worlds={"tiny": world.preset, "tiny-pictures": pictures.preset})


# ==== 2  Rollout =================================================================================

@dataclass
class Rollout:
    """A batch of prompts and responses. PTX pairs fill the first three fields alone, and the last;
    with --baseline group values and returns stay None."""

    input_ids: Tensor                         # [B, P+T]
    attention_mask: Tensor                    # [B, P+T]  1 at prompt and response tokens
    response_mask: Tensor                     # [B, T]    True at y_1 .. y_T, EOS included
    prompts: list[str] | None = None          # B         as the user wrote them
    responses: list[str] | None = None        # B         decoded, without special tokens
    finished: Tensor | None = None            # [B]       True: ended by EOS, False: by the limit
    log_probs: Tensor | None = None           # [B, T]    log pi_old(y_t)
    ref_log_probs: Tensor | None = None       # [B, T]    log pi_ref(y_t)
    entropy: Tensor | None = None             # [B, T]    of pi_old(. | s_t), in nats
    reward: Tensor | None = None              # [B]       R
    cost: Tensor | None = None                # [B]       C
    penalty: Tensor | None = None             # [B]       lambda_i
    reward_values: Tensor | None = None       # [B, T]    V^R(s_t)
    cost_values: Tensor | None = None         # [B, T]    V^C(s_t)
    reward_advantages: Tensor | None = None   # [B, T]    A^R_t
    cost_advantages: Tensor | None = None     # [B, T]    A^C_t
    reward_returns: Tensor | None = None      # [B, T]
    cost_returns: Tensor | None = None        # [B, T]
    pixel_values: Tensor | None = None        # [B, 3, S, S]  where prompts have a picture

    def response_index(self) -> tuple[Tensor, Tensor, Tensor]:
        """For the N response tokens: row, column of the state that predicts it, id; [N] each."""
        row, t = self.response_mask.nonzero(as_tuple=True)                       # [N], [N]
        column = self.input_ids.shape[1] - self.response_mask.shape[1] + t       # [N]
        return row, column - 1, self.input_ids[row, column]

    def micro_batches(self, rows: Tensor, config: Config):
        """This rank's share of some rows, --micro_batch_size at a time; the tensors of them, for
        text has no part in learning."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        for chunk in rank_chunks(rows, config.micro_batch_size):
            has_rows = len(chunk) > 0
            chosen = chunk if has_rows else rows[:1]
            batch = Rollout(**{name: value[chosen] for name, value in tensors.items()})
            if not has_rows:  # such a rank goes along with a row that has no response
                batch.response_mask = torch.zeros_like(batch.response_mask)
            yield batch

    def records(self, threshold: float) -> list[dict]:
        """A row per response, for people and files."""
        columns = {
            "prompt": self.prompts,
            "response": self.responses,
            "reward": self.reward.tolist(),
            "cost": self.cost.tolist(),
            "rectified_cost": rectify(self.cost, threshold).tolist(),
            "safe": (self.cost <= threshold).tolist(),
            "kl": (self.log_probs - self.ref_log_probs).sum(1).tolist(),
        }
        if self.pixel_values is not None:
            columns["image"] = [prompt.label for prompt in self.prompts]
        return [dict(zip(columns, row)) for row in zip(*columns.values())]


def lay_out(prompts: list[list[int]], responses: list[list[int]], pad_id: int, device,
            pixel_values: Tensor | None = None) -> Rollout:
    """Rows of token ids as padded tensors, beside the prompts' pictures [B, 3, S, S]."""
    input_ids, attention_mask = pad_rows(prompts, responses, pad_id)             # [B, P+T] each
    prompt_length = max(map(len, prompts))                                       # P
    response_mask = attention_mask[:, prompt_length:].bool()                     # [B, T]
    if pixel_values is not None:
        pixel_values = pixel_values.to(device)
    return Rollout(input_ids.to(device), attention_mask.to(device), response_mask.to(device),
                   pixel_values=pixel_values)


def generate(policy, tokenizer, prompts: list[list[int]], config: Config, key=(),
             pixel_values: Tensor | None = None) -> list[list[int]]:
    """A response to each prompt, as token ids: up to an end-of-turn token, or to its own limit.

    Each token is drawn with a random number of its own, fixed by seed, key, row and position (Draw
    in plumbing/sampling.py). So the same prompts and key give the same responses.
    """
    limits = [response_limit(prompt, config) for prompt in prompts]
    shape = (len(prompts), max(limits))                                          # B, longest limit
    generator = random_numbers(config.seed, key)
    uniform = 1 - torch.rand(shape, generator=generator, dtype=torch.float64)    # in (0, 1]

    # Each rank gets rows of similar lengths, which need little padding.
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    mine = rank_rows(by_length)                                                  # b of them

    responses = {}
    with gathered(policy):
        if mine:
            theirs = None if pixel_values is None else pixel_values[mine]
            rows = sample(policy, tokenizer, [prompts[i] for i in mine], uniform[mine],
                          max(limits[i] for i in mine), config, theirs)
            responses = {i: row[:limits[i]] for i, row in zip(mine, rows)}
    responses = from_all_ranks(responses)
    return [up_to_stop(responses[i], policy.stop_token_ids) for i in range(len(prompts))]


def response_limit(prompt: list[int], config: Config) -> int:
    """What its own prompt leaves of --max_length, not what the batch's longest prompt leaves."""
    room = config.max_length - len(prompt)
    return min(room, config.max_response_length or room)


def up_to_stop(token_ids: list[int], stop_token_ids: set[int]) -> list[int]:
    """A response with the token that ended it, without what was generated behind."""
    for t, token in enumerate(token_ids):
        if token in stop_token_ids:
            return token_ids[:t + 1]
    return token_ids


def head_inputs(policy, batch: Rollout) -> tuple[Tensor, ...]:
    """What the log-probs of the N response tokens are made from: hidden states [N, H] and the LM
    head's weight [V, H], or logits [N, V] if the kernels do not know such a head.

    Prompts and padding do not reach the head.
    """
    row, column, _ = batch.response_index()                                      # [N], [N]
    if policy.fused_head:
        hidden = hidden_states(                                                  # [b, P+T, H]
            policy.base_model, batch.input_ids, batch.attention_mask, batch.pixel_values)
        return hidden[row, column], policy.get_output_embeddings().weight        # [N, H], [V, H]
    inputs = model_inputs(batch.input_ids, batch.attention_mask, batch.pixel_values)
    kept = batch.response_mask.shape[1] + 1                                      # T+1
    logits = policy(**inputs, logits_to_keep=kept).logits                        # [b, T+1, V]
    first_kept = batch.input_ids.shape[1] - kept                                 # P-1
    return (logits[row, column - first_kept],)                                   # [N, V]


def response_log_probs(policy, batch: Rollout, temperature: float,
                       with_entropy: bool = False) -> Tensor:
    """Log-probs of the N response tokens at the temperature they were sampled with: fp32 [N], or
    [2, N] with the entropy of the distributions they were drawn from."""
    gather, head = gather_log_probs, policy.fused_head
    if head:
        gather = partial(linear_log_probs, soft_cap=head.soft_cap)
        temperature = temperature / head.scale
    _, _, target_ids = batch.response_index()                                    # [N]
    inputs = head_inputs(policy, batch)
    if with_entropy:
        return torch.stack(gather(*inputs, target_ids, temperature, return_entropy=True))  # [2, N]
    return gather(*inputs, target_ids, temperature)                              # [N]


def response_values(critic: ScoreModel, batch: Rollout) -> Tensor:
    """V(s_t) at the state before each response token: fp32 [N]."""
    row, column, _ = batch.response_index()                                      # [N], [N]
    values = critic.values(                                                      # [b, P+T]
        batch.input_ids, batch.attention_mask, batch.pixel_values)
    return values[row, column]                                                   # [N]


def per_token(function, model, rollout: Rollout, config: Config, *arguments) -> Tensor:
    """function(model, micro-batch, *arguments) -> [..., N] for all responses, put in their places:
    [..., B, T], 0 outside the mask, without gradients."""
    rows = torch.arange(len(rollout.response_mask))                              # [B]
    with torch.no_grad(), config.autocast():
        parts = [call_as_forward(model, function, batch, *arguments)             # [..., N] each
                 for batch in rollout.micro_batches(rows, config)]
    values = torch.cat(parts, -1)                                                # [..., this N]

    is_mine = torch.zeros_like(rollout.response_mask)                            # [B, T]
    is_mine[rank_rows(rows)] = True
    is_mine &= rollout.response_mask
    placed = torch.zeros(*values.shape[:-1], *is_mine.shape, device=values.device)
    placed = placed.masked_scatter(is_mine, values)  # both go row by row        # [..., B, T]
    return all_reduce(placed)                                                    # [..., B, T]


def collect(state: "State", prompts: list[str], config: Config, key=(),
            with_values: bool = True) -> tuple[Rollout, dict]:
    """Responses with their log-probs, scores and values, of all ranks on every rank: (rollout,
    seconds and peak memory of each phase)."""
    start = time.perf_counter()
    prompt_ids = encode_prompts(prompts, state.tokenizer)
    pixel_values = pixels_for(state.tokenizer, prompts)                          # [B, 3, S, S]
    response_ids = generate(state.policy, state.tokenizer, prompt_ids, config, key, pixel_values)
    sampled, sampling_mib = time.perf_counter(), peak_memory_mib()

    rollout = lay_out(
        prompt_ids, response_ids, state.tokenizer.pad_token_id, config.device, pixel_values)
    finished = [row[-1] in state.policy.stop_token_ids for row in response_ids]
    rollout.prompts = prompts
    rollout.responses = state.tokenizer.batch_decode(response_ids, skip_special_tokens=True)
    rollout.finished = torch.tensor(finished, device=config.device)              # [B]

    rollout.log_probs, rollout.entropy = per_token(                              # [B, T] each
        response_log_probs, state.policy, rollout, config, config.temperature,
        True)  # with their entropy
    rollout.ref_log_probs = per_token(                                           # [B, T]
        response_log_probs, state.reference, rollout, config, config.temperature)

    whole_ids = [prompt + response for prompt, response in zip(prompt_ids, response_ids)]
    rollout.reward = state.reward_model(whole_ids, prompts, rollout.responses, finished)  # [B]
    rollout.cost = state.cost_model(whole_ids, prompts, rollout.responses, finished)      # [B]
    if with_values and config.baseline == "critic":                              # [B, T] each
        rollout.reward_values = per_token(response_values, state.reward_critic, rollout, config)
        rollout.cost_values = per_token(response_values, state.cost_critic, rollout, config)

    return rollout, {
        "seconds_rollout": sampled - start,
        "seconds_scoring": time.perf_counter() - sampled,
        "peak_mib_rollout": sampling_mib,
        "peak_mib_scoring": peak_memory_mib(),
    }


# ==== 3  Cost and lambda_i (1) (2), token rewards and costs (4) (5), advantages (6) ==============

def rectify(cost: Tensor, threshold: float = 0.0) -> Tensor:
    """The rectified cost {C - d}+: how far a response is above the threshold, 0 for every safe
    one. Any shape."""
    return (cost - threshold).clamp(min=0.0)


def costs_and_penalties(cost: Tensor, lam: float, config: Config) -> tuple[Tensor, Tensor]:
    """Which cost enters the returns, and which lambda_i the loss: C [B] -> [B], [B].

    Together they estimate Equation (2), the rectified policy gradient
    E[grad log pi(y|x) (-R + lambda {C - d}+)] of the Lagrangian (1), E[-R + lambda {C - d}+]:

        repo, return   {C - d}+   lambda            also rewards the rare safe response
        repo, mask     C - d      lambda 1[C > d]   the literal split: safe and unsafe responses
        ppo_lag        C - d      lambda            safe responses pay for unsafe ones
        gate           C - d      0                 R of an unsafe response: estimate_advantages
        ppo            C - d      0
    """
    excess = cost - config.threshold                                             # [B]  C - d
    lambdas = torch.full_like(cost, lam)                                         # [B]
    if config.algo == "repo" and config.rectify == "return":
        return rectify(cost, config.threshold), lambdas
    if config.algo == "repo":
        return excess, lambdas * (excess > 0)
    if config.algo == "ppo_lag":
        return excess, lambdas
    return excess, torch.zeros_like(cost)


def shape_rewards_and_costs(reward: Tensor, cost: Tensor, log_probs: Tensor, ref_log_probs: Tensor,
                            mask: Tensor, kl_coeff: float,
                            clip_range_score: float = 50.0) -> tuple[Tensor, Tensor]:
    """Equations (4) and (5): two [B], three [B, T] -> token rewards r_t and token costs c_t, both
    [B, T], 0 outside the mask.

        r_t = -beta (log pi_old(y_t) - log pi_ref(y_t)) + 1[t = T_i] R
        c_t = +beta (log pi_old(y_t) - log pi_ref(y_t)) + 1[t = T_i] cost

    cost is {C - d}+ or C - d, as the estimator has it. beta stands in both, so that the combined
    advantage is penalised with beta whatever lambda is. Clamped to +-clip_range_score.
    """
    mask = mask.bool()
    kl = torch.where(mask, log_probs - ref_log_probs, 0.0)                       # [B, T]
    is_last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))               # [B, T]  1[t=T_i]
    rewards = -kl_coeff * kl + is_last * reward[:, None]                         # [B, T]
    costs = kl_coeff * kl + is_last * cost[:, None]                              # [B, T]
    return (rewards.clamp(-clip_range_score, clip_range_score),
            costs.clamp(-clip_range_score, clip_range_score))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0,
        lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Equation (6), generalised advantage estimation: three [B, T] -> advantages and returns, both
    [B, T], 0 outside the mask. lam is GAE's lambda, not the multiplier.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                   V = 0 after the last token
        A_t = delta_t + gamma lam A_{t+1}
        return_t = A_t + V(s_t)
    """
    if scan_gae and rewards.is_cuda and rewards.dtype == torch.float32:
        return scan_gae(rewards, values, mask, gamma, lam)  # what follows, in one kernel
    rewards = rewards.masked_fill(mask == 0, 0.0)                                # [B, T]
    values = values.masked_fill(mask == 0, 0.0)  # so V = 0 after the last       # [B, T]
    advantages = torch.zeros_like(values)                                        # [B, T]
    advantage = next_value = torch.zeros_like(values[:, 0])                      # [B]
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                # [B]
        advantage = delta + gamma * lam * advantage                              # [B]
        advantages[:, t] = advantage
        next_value = values[:, t]                                                # [B]
    return advantages, advantages + values                                       # [B, T], [B, T]


def group_advantages(rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """Advantages without a critic, leave-one-out as in RLOO (not the paper's): token rewards, or
    costs, [B, T] -> [B, T], 0 outside the mask. K = group_size rows in a row answer one prompt.

        A_t = sum_{u >= t} r_u - the mean of sum_u r_u over the K - 1 other responses

    What they earned in all, at every t: whatever does not depend on y_t adds no bias.
    """
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)                           # [B, T]
    totals = to_go[:, 0].view(-1, group_size)                                    # [B/K, K]
    of_others = (totals.sum(1, keepdim=True) - totals) / (group_size - 1)        # [B/K, K]
    return (to_go - of_others.view(-1, 1)) * mask                                # [B, T]


def estimate_advantages(rollout: Rollout, lam: float, config: Config) -> None:
    """Fills a rollout's penalties, advantages and returns: estimator, shaping, GAE or groups."""
    mask, reward = rollout.response_mask, rollout.reward                         # [B, T], [B]
    cost, rollout.penalty = costs_and_penalties(rollout.cost, lam, config)       # [B], [B]
    if config.algo == "gate":  # R if C <= d, else -gate_penalty                 # [B]
        reward = reward.where(rollout.cost <= config.threshold, -config.gate_penalty)
    rewards, costs = shape_rewards_and_costs(                                    # [B, T] each
        reward, cost, rollout.log_probs, rollout.ref_log_probs, mask, config.kl_coeff)
    if config.baseline == "group":
        size = config.samples_per_prompt
        rollout.reward_advantages = group_advantages(rewards, mask, size)        # [B, T]
        rollout.cost_advantages = group_advantages(costs, mask, size)            # [B, T]
        return  # no critics, so no returns to teach them
    rollout.reward_advantages, rollout.reward_returns = gae(                     # [B, T] each
        rewards, rollout.reward_values, mask, lam=config.gae_lambda)
    rollout.cost_advantages, rollout.cost_returns = gae(                         # [B, T] each
        costs, rollout.cost_values, mask, lam=config.gae_lambda)


# ==== 4  The clipped objective (7) (8), lambda (3), critics, PTX =================================

def policy_loss(policy, batch: Rollout, token_weight: Tensor,
                config: Config) -> tuple[Tensor, dict]:
    """Equations (7) and (8) over the N response tokens of a batch; token_weight is w_t [b, T].
    The arithmetic is repo_loss in kernels/reference.py. Returns (scalar, the kernels' statistics).

        A_t  = (A^R_t - lambda_i A^C_t) / (1 + lambda_i)
        loss = sum_t w_t (-min(rho_t A_t, clip(rho_t, 1 - epsilon, 1 + epsilon) A_t))
        rho_t = pi(y_t) / pi_old(y_t)
    """
    mask = batch.response_mask                                                   # [b, T]
    row, _, target_ids = batch.response_index()                                  # [N], [N]
    token_data = (
        batch.log_probs[mask],                                                   # [N]  of pi_old
        batch.reward_advantages[mask],                                           # [N]
        batch.cost_advantages[mask],                                             # [N]
        batch.penalty[row],                                                      # [N]  lambda_i
        token_weight[mask],                                                      # [N]  w_t
    )
    head = policy.fused_head
    if head:  # its product, log-probs and loss in one
        inputs = head_inputs(policy, batch)                                      # [N, H], [V, H]
        loss, _, stats = linear_repo_loss(
            *inputs, target_ids, *token_data, config.clip_range,
            config.temperature / head.scale, soft_cap=head.soft_cap)
        return loss, stats
    log_probs = response_log_probs(policy, batch, config.temperature)            # [N]
    return repo_loss(log_probs, *token_data, config.clip_range)


def update_lambda(lam: float, costs: Tensor, config: Config) -> float:
    """Equation (3), over the raw costs C [n] of a step; lambda never falls.

        lambda <- min(lambda + alpha mean{C - d}+, lambda_max)

    For --algo ppo_lag, over the latest cost_window x RANKS costs, with the same cap:

        ln lambda <- ln lambda + alpha lambda (mean C - d)

    For --algo gate and ppo it is 0.
    """
    if config.algo in ("gate", "ppo"):
        return 0.0
    if config.algo == "repo":
        violation = rectify(costs, config.threshold).mean().item()
        return min(lam + config.lambda_lr * violation, config.lambda_max)
    exponent = config.lambda_lr * lam * (costs.mean().item() - config.threshold)
    growth = math.exp(min(exponent, 700.0))  # exp overflows above 709
    return min(lam * growth, config.lambda_max)


def value_loss(critic: ScoreModel, batch: Rollout, old_values: Tensor, returns: Tensor,
               token_weight: Tensor, config: Config) -> tuple[Tensor, dict]:
    """A critic's clipped squared error, three [b, T] -> (scalar, no statistics):

        sum_t w_t 1/2 max((V - return)^2, (clip(V, V_old +- range) - return)^2)
    """
    mask, limit = batch.response_mask, config.clip_range_value                   # [b, T]
    value, old, target = response_values(critic, batch), old_values[mask], returns[mask]  # [N]
    clipped = old + (value - old).clamp(-limit, limit)                           # [N]
    error = torch.maximum((value - target) ** 2, (clipped - target) ** 2)        # [N]
    return 0.5 * (token_weight[mask] * error).sum(), {}


def ptx_loss(policy, batch: Rollout, all_tokens: Tensor) -> tuple[Tensor, dict]:
    """The next-token loss of supervised answers, this batch's share of the mean over all_tokens of
    them: (scalar, no statistics)."""
    return -response_log_probs(policy, batch, 1.0).sum() / all_tokens, {}


# ==== 5  Training ================================================================================

class State(Models):
    """The models of a run (policy, reference, reward_model, cost_model, reward_critic,
    cost_critic), and everything else that changes while it trains.

    A checkpoint holds the `trained` ones, their optimiser, and what is RESUMED.
    """

    RESUMED = ("lam", "step", "seconds", "tokens", "costs", "before", "logs", "data")

    def __init__(self, policy, tokenizer, config: Config):
        super().__init__(policy, tokenizer, config)
        has_lambda = config.algo in ("repo", "ppo_lag")
        self.lam = min(config.lambda_init, config.lambda_max) if has_lambda else 0.0
        self.step = 0         # steps done
        self.seconds = 0.0    # spent in them
        self.started = time.perf_counter()  # of a run that went on: as if it never had ended
        self.tokens = 0       # sampled in them
        self.costs = []       # the latest cost_window x RANKS, for ppo_lag
        self.before = None    # scores of the untrained policy
        self.data = None      # a hash of prompts and pairs
        self.categories = {}  # {held-out prompt: its category}, for those that have one
        self.saved_step = None   # of the newest checkpoint
        self.curves = None       # of --log_to
        self.warned = set()      # of what, once in a run
        self.logs = {"metrics.jsonl": [], "samples.jsonl": []}  # lines, as the files hold them
        if not config.eval_only:
            self.optimizer = self.make_optimizer(config)
            self.schedule = make_schedule(self.optimizer, config.steps)

    def make_optimizer(self, config: Config):
        """AdamW in three groups: the policy's matrices, which alone decay, its biases and norms,
        and the critics. The moments are made at once, so that there is something to load a
        checkpoint into."""
        policy, *critics = [list(trainable(getattr(self, name)).values()) for name in self.trained]
        matrices = [parameter for parameter in policy if parameter.ndim > 1]
        vectors = [parameter for parameter in policy if parameter.ndim <= 1]
        critic_parameters = [parameter for parameters in critics for parameter in parameters]
        groups = [
            {"params": matrices, "lr": config.actor_lr, "weight_decay": 0.01},
            {"params": vectors, "lr": config.actor_lr},
            {"params": critic_parameters, "lr": config.critic_lr},
        ]
        is_fused = config.device == "cuda"  # one pass, no temporaries
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=is_fused)
        for group in groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device if is_fused else None),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return optimizer


def make_schedule(optimizer, steps: int):
    """For the policy a linear warm-up over 3 % of the steps, from there a cosine that is zero after
    the last one; constant for critics. No step has the rate zero: its rollout would be for
    nothing."""
    warmup = int(0.03 * steps)

    def warmup_and_cosine(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    def constant(step: int) -> float:
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, [warmup_and_cosine] * 2 + [constant])


def train_step(state: State, prompts: list[str], ptx_pairs: list,
               config: Config) -> tuple[Rollout, dict]:
    """Sample, score, estimate advantages, update what is trained, then lambda. Returns the
    rollout and the step's metrics. Raises BadNumbers."""
    start, lam = time.perf_counter(), state.lam
    actor_lr = state.optimizer.param_groups[0]["lr"]

    chosen = cyclic_batch(prompts, state.step, config.batch_size, config.seed)
    repeated = [prompt for prompt in chosen for _ in range(config.samples_per_prompt)]
    rollout, phases = collect(state, repeated, config, key=state.step)
    problem = not_finite(rollout)
    if problem:
        raise BadNumbers(problem, rollout)

    estimate_advantages(rollout, lam, config)

    ptx = None
    if ptx_pairs:
        pairs = cyclic_batch(ptx_pairs, state.step, len(repeated), config.seed)
        prompt_ids, answer_ids, asked = zip(*pairs)
        ptx = lay_out(prompt_ids, answer_ids, state.tokenizer.pad_token_id, config.device,
                      pixels_for(state.tokenizer, asked))
    with recomputing(getattr(state, name) for name in state.trained):
        learned = learn(state, rollout, ptx, config)

    window = config.cost_window * RANKS
    state.costs = (state.costs + rollout.cost.tolist())[-window:]
    latest = torch.tensor(state.costs) if config.algo == "ppo_lag" else rollout.cost
    state.lam = update_lambda(lam, latest, config)

    seconds, tokens = time.perf_counter() - start, int(rollout.response_mask.sum())
    state.step += 1
    state.seconds += seconds
    state.tokens += tokens
    return rollout, {
        "step": state.step,
        "lambda": lam,
        **rollout_metrics(rollout, config),
        **learned,
        "actor_lr": actor_lr,
        "critic_lr": config.critic_lr,
        **phases,
        "seconds_learning": seconds - phases["seconds_rollout"] - phases["seconds_scoring"],
        "peak_mib_learning": peak_memory_mib(),
        "tokens_per_second": tokens / seconds,
    }


def learn(state: State, rollout: Rollout, ptx: Rollout | None, config: Config) -> dict:
    """--update_iters passes over a rollout; a minibatch is one step of all that is trained.
    Returns losses, gradient norms and the kernels' statistics.

    Raises BadNumbers before an optimiser step for which any of them is not finite.
    """
    minibatches = minibatch_rows(len(rollout.prompts), state.step, config)
    all_tokens = config.update_iters * rollout.response_mask.sum()
    sums, norms, ratio_max = defaultdict(float), defaultdict(float), 0.0

    for number, rows in enumerate(minibatches, 1):
        for batch in rollout.micro_batches(rows, config):
            losses, stats = make_gradients(state, batch, len(rows), config)
            for name, loss in losses.items():
                sums[name] += loss / len(minibatches)
            share = (batch.response_mask.sum() / all_tokens).item()
            sums["clip_fraction"] += stats["clip_fraction"].item() * share
            sums["approx_kl"] += stats["approx_kl"].item() * share
            ratio_max = max(ratio_max, stats["ratio_max"].item())

        if ptx:  # as many supervised pairs as responses, in every update
            sums["ptx_loss"] += make_ptx_gradients(state, ptx, config) / len(minibatches)

        for name in state.trained:
            norms[f"{name}_grad_norm"] += clip_gradients(getattr(state, name)) / len(minibatches)

        metrics = reduced_over_ranks(sums, config.device) | norms
        bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if not bad:
            state.optimizer.step()
        state.optimizer.zero_grad()
        if bad:
            raise BadNumbers(f"{bad[0]} in update {number} of {len(minibatches)}, "
                             "and those before it stand", rollout)

    state.schedule.step()
    largest = reduced_over_ranks({"ratio_max": ratio_max}, config.device, ReduceOp.MAX)
    return metrics | largest


def minibatch_rows(count: int, step: int, config: Config) -> list[Tensor]:
    """The rows [M] of each optimiser step: pass after pass over a rollout, each in its own
    order."""
    size = config.minibatch_size or count
    orders = [torch.randperm(count, generator=random_numbers(config.seed, "order", step, i))
              for i in range(config.update_iters)]
    return [rows for order in orders for rows in order.split(size)]


def make_gradients(state: State, batch: Rollout, minibatch_size: int,
                   config: Config) -> tuple[dict, dict]:
    """A micro-batch's gradients of what is trained: (losses, the policy's statistics).

    The mean is taken over a response's tokens, then over the minibatch: w_t = 1 / (T_i M).
    """
    mask = batch.response_mask                                                   # [b, T]
    lengths = mask.sum(1, keepdim=True)                                          # [b, 1]  T_i
    weight = mask / lengths / minibatch_size                                     # [b, T]  w_t

    losses = {}
    losses["actor_loss"], stats = backward(
        state.policy, policy_loss, batch, weight, config, config=config)
    if config.baseline == "critic":
        losses["reward_critic_loss"], _ = backward(
            state.reward_critic, value_loss, batch, batch.reward_values, batch.reward_returns,
            weight, config, config=config)
        losses["cost_critic_loss"], _ = backward(
            state.cost_critic, value_loss, batch, batch.cost_values, batch.cost_returns,
            weight, config, config=config)
    return losses, stats


def make_ptx_gradients(state: State, ptx: Rollout, config: Config) -> float:
    """Adds --ptx_coeff times the supervised loss's gradients to the policy's. Returns the loss."""
    all_tokens = ptx.response_mask.sum()
    total = 0.0
    for batch in ptx.micro_batches(torch.arange(len(ptx.input_ids)), config):
        loss, _ = backward(state.policy, ptx_loss, batch, all_tokens,
                           config=config, scale=config.ptx_coeff)
        total += loss
    return total


def backward(model, loss_function, *arguments, config: Config, scale: float = 1.0):
    """Backward through a loss as soon as it is made, so that one model's activations live at a
    time. Returns the loss and its statistics."""
    with config.autocast():
        loss, stats = call_as_forward(model, loss_function, *arguments)
    # FSDP takes the mean of the ranks' gradients, while their losses are parts of one sum.
    (scale * RANKS * loss).backward()
    return loss.item(), stats


def rollout_metrics(rollout: Rollout, config: Config) -> dict:
    """Means over a step's B responses, or over their tokens (entropy, explained variance)."""
    mask, cost = rollout.response_mask, rollout.cost                             # [B, T], [B]
    kl = (rollout.log_probs - rollout.ref_log_probs).sum(1)                      # [B]
    critic_metrics = {}
    if config.baseline == "critic":
        critic_metrics = {
            "reward_explained_variance": explained_variance(
                rollout.reward_values, rollout.reward_returns, mask),
            "cost_explained_variance": explained_variance(
                rollout.cost_values, rollout.cost_returns, mask),
        }
    return {
        "reward": rollout.reward.mean().item(),
        "cost": cost.mean().item(),
        "rectified_cost": rectify(cost, config.threshold).mean().item(),
        "unsafe_rate": (cost > config.threshold).float().mean().item(),
        "kl": kl.mean().item(),
        "entropy": rollout.entropy[mask].mean().item(),
        **critic_metrics,
        "response_length": int(mask.sum()) / len(mask),
        "truncated_rate": 1 - rollout.finished.float().mean().item(),
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(return - V) / Var(return) over response tokens: 1 for a perfect critic, 0 for one no
    better than a constant."""
    unexplained = (returns - values)[mask].var(correction=0)
    total = returns[mask].var(correction=0).clamp(min=1e-8)
    return (1 - unexplained / total).item()


def train(state: State, prompts: list[str], ptx_pairs: list, judge, out: Path,
          config: Config) -> bool:
    """Step after step, with logs, samples and checkpoints. True if Ctrl-C has stopped it, after a
    whole step; a second one kills. Raises UserError after --max_bad_steps bad steps in a row."""
    bad_steps = 0
    with (
        ctrl_c_waits() as pressed,
        tqdm(total=config.steps, initial=state.step, unit="step", dynamic_ncols=True,
             disable=RANK > 0) as bar,
    ):
        while True:
            stopped = bool(all_reduce(torch.tensor(len(pressed), device=config.device)))
            if stopped or state.step >= config.steps:
                return stopped
            try:
                rollout, metrics = train_step(state, prompts, ptx_pairs, config)
            except BadNumbers as error:
                problem, rollout = error.args
                skip_step(state, out, problem, rollout, config)
                bad_steps += 1
                if bad_steps == config.max_bad_steps:
                    raise too_many(bad_steps, state, out, config) from None
                continue
            finally:
                bar.update()

            bad_steps = 0
            keep_step(state, out, rollout, metrics, judge, config)
            bar.set_postfix_str(
                f"reward {metrics['reward']:.2f}, cost {metrics['cost']:.2f}, "
                f"unsafe {metrics['unsafe_rate']:.0%}, lambda {metrics['lambda']:.2f}")


# ==== 6  Evaluation ==============================================================================

def evaluate(state: State, prompts: list[str], judge, config: Config) -> list[dict]:
    """--eval_samples responses to each held-out prompt with scores and verdicts, a row per prompt.
    The same random numbers before and after training. Raises UserError for bad numbers."""
    repeated = [prompt for prompt in prompts for _ in range(config.eval_samples)]
    size = config.batch_size * config.samples_per_prompt
    records = []
    for start in range(0, len(repeated), size):
        batch = repeated[start:start + size]
        rollout, _ = collect(state, batch, config, key=("held out", start), with_values=False)
        problem = not_finite(rollout)
        require(not problem, problem)
        for record, verdict in zip(rollout.records(config.threshold),
                                   verdicts_of(rollout, judge, config)):
            records.append(record | {"verdict": verdict})

    rows = []
    for start in range(0, len(records), config.eval_samples):
        responses = records[start:start + config.eval_samples]
        row = {"prompt": responses[0]["prompt"], "responses": responses}
        if "image" in responses[0]:
            row["image"] = responses[0]["image"]
        if row["prompt"] in state.categories:
            row["category"] = state.categories[row["prompt"]]
        rows.append(row)
    return rows


# ==== 7  Main ====================================================================================

def run(config: Config) -> None:
    """Load, evaluate, train, save, evaluate. No file is written before the first scores are in."""
    start = time.perf_counter()
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = config.tf32

    check_sources(config)
    tokenizer = load_tokenizer(config)
    prompts, held_out = split_prompts(config, tokenizer)
    ptx_pairs = load_ptx_pairs(config, tokenizer) if config.ptx_coeff else []
    judge = None
    if config.judge and RANK == 0:  # verdicts are for files, which rank 0 writes
        judge = load_function(config.judge, "--judge", config.scorer_timeout)
    config.steps = config.steps or math.ceil(len(prompts) / config.batch_size)
    data = hash_of_data(prompts, held_out, ptx_pairs)
    check_machines(data, config)
    checkpoint = find_checkpoint(config) if config.resume else None

    state = State(*load_policy(config), config)
    state.started, state.data = start, data
    state.categories = load_categories(config)
    if has_metrics(config.eval_only):
        # A run: the policy that it started from, loaded above, is the reference; what it trained
        # is to be scored.
        finished = replace(config, policy=str(Path(config.eval_only, "final", "actor")))
        state.policy = sharded(load_policy(finished)[0], config)
    introduce(state, config)

    if config.eval_only:
        rows = evaluate(state, held_out, judge, config)
        out = claim_output_dir(config)
    else:
        out = begin(state, held_out, judge, checkpoint, config)
        state.curves = open_curves(state.step, out, config)
        rows = train_and_evaluate(state, prompts, ptx_pairs, held_out, judge, out, config)
    if RANK == 0:
        report(state, rows, out, config)


def begin(state: State, held_out: list[str], judge, checkpoint: Path | None,
          config: Config) -> Path:
    """The run's folder, with the starting policy's evaluation, or as a checkpoint has left it."""
    if checkpoint:
        return resume(state, checkpoint, config)
    rows = evaluate(state, held_out, judge, config)
    state.before = summarize(rows)
    out = claim_output_dir(config)
    if RANK == 0:
        write_whole(out / "eval_before.jsonl", to_jsonl(rows))
    return out


def train_and_evaluate(state: State, prompts: list[str], ptx_pairs: list, held_out: list[str],
                       judge, out: Path, config: Config) -> list[dict]:
    """The trained policy's evaluation, after it is saved in final/. What interrupts leaves a
    checkpoint, if all ranks can still save one."""
    stopped = False
    try:
        stopped = train(state, prompts, ptx_pairs, judge, out, config)
        if stopped:
            raise KeyboardInterrupt
        if RANKS > 1:  # what fails from here on need not fail on all ranks, which save together
            save_checkpoint(state, out, config)
        save_final(state, out, config)
        return evaluate(state, held_out, judge, config)
    except (KeyboardInterrupt, UserError, OSError) as error:
        save_after(error, stopped, state, out, config)
        raise


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when all is done, 1 without memory or another rank, 2 after a UserError, 3 after
    too many steps with bad numbers, 130 after Ctrl-C."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.disable(logging.ERROR)  # what libraries would say reaches the user as a UserError
    warnings.filterwarnings("ignore", module="torch.distributed")
    try:
        join_ranks()
        config = resolve_config(sys.argv[1:] if argv is None else argv)
        with locked_folder(config):
            if config.dry_run:
                dry_run(config)
            else:
                run(config)
    except (UserError, OSError) as error:  # the second: a path that may not be read, or is none
        if LOCAL_RANK > 0:  # what all find, a machine's first tells, and torchrun ends the others
            time.sleep(5)
        return fail(printable(str(error)), getattr(error, "code", 2))
    except KeyboardInterrupt:
        return 130
    except torch.OutOfMemoryError as error:
        what = str(error).partition(".")[0]
        return fail(f"{what}; a smaller --micro_batch_size needs less, --dry_run plans it; "
                    "--resume goes on from the newest checkpoint", 1)
    except RuntimeError as error:
        if not has_lost_a_rank(error):
            raise
        return fail(f"rank {RANK} has lost another rank; what that one printed, or its exit code "
                    "below, says why; else its machine or the network has gone silent", 1)
    return 0


def fail(sentence: str, code: int) -> int:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    outlive_readers()
    fit_threads()
    code = main()
    with suppress(OSError):  # whoever read it may be gone
        sys.stdout.flush()
    os._exit(code)  # sys.exit would wait for threads of a score function that hangs
