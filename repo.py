"""RePO, Rectified Policy Optimization (arXiv 2410.19933): safety alignment of a language model by
reinforcement learning. This file follows a training step; README.md numbers the equations.

A reward model says how helpful a response is, a cost model how harmful. A response is unsafe if its
cost C is above the threshold d. Safe RLHF bounds the *mean* cost, so very safe responses can pay
for unsafe ones: safety compensation. RePO penalises the rectified cost {C - d}+ of every response.
It is never negative, so a safe response cannot offset an unsafe one.

    python repo.py                     # builds a tiny world and aligns a policy in it
    python repo.py --algo ppo_lag      # Safe RLHF's bound on the mean cost, to compare
    python repo.py --model alpaca-7b   # the paper's models; --help lists every setting

These are the main differences from the paper, and from Safe RLHF's published code, which its
authors built on. Nobody here has read the authors' own trainer.

1. --rectify return, the default, puts the rectified cost of all responses into the returns. That
   estimates (2), if responses have one length. --rectify mask is the paper's split into safe and
   unsafe responses as we read it. It does not estimate (2).
2. A response may use whatever --max_length leaves after its own prompt. In Safe RLHF the longest
   prompt of the batch sets one limit for all.
3. There is no dropout, so the probability ratio of an unchanged policy is 1, up to rounding.
4. On one GPU the 3B and 7B presets train low-rank adapters, so that six models fit.

--algo ppo_lag, gate and ppo and --baseline group are other methods, included for comparison.

Shapes: B responses in a rollout, M in a minibatch, b in a micro-batch. Prompts are padded on the
left to P tokens, responses on the right to T; response i has T_i tokens, and N is the number of
response tokens in a batch. H is the size of a hidden state, V that of the vocabulary.
"""
import hashlib
import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

from plumbing.threads import fit_threads  # sets what torch reads when it is imported

import torch
from torch import Tensor
from transformers import LogitsProcessor

from kernels import gather_log_probs, linear_log_probs, linear_repo_loss, runs_triton
from plumbing import data, metrics, models, plan, ranks, runs, settings, training
from plumbing.data import load_prompts
from plumbing.errors import UserError
from plumbing.scorers import ScoreModel
from plumbing.settings import option
from tiny_configs import pictures, world

__all__ = ["Config", "ScoreModel", "UserError", "gae", "group_advantages", "load_prompts", "main",
           "rectify", "resolve_config", "shape_rewards_and_costs", "update_lambda"]


# ==== 1  Settings of the method ==================================================================

@dataclass
class Config(settings.RunSettings):
    """The method's settings. RunSettings adds those of running: models, data, device, files."""

    algo: Literal["repo", "ppo_lag", "gate", "ppo"] = option(
        "repo", "repo bounds the rectified cost, ppo_lag the mean cost (Safe RLHF); gate replaces "
                "the reward of unsafe responses; ppo learns from rewards alone")
    rectify: Literal["return", "mask"] = option(
        "return", "with --algo repo: return puts the rectified cost into every return; mask "
                  "gives only unsafe responses a lambda (the paper's split as we read it)")
    baseline: Literal["critic", "group"] = option(
        "critic", "what is subtracted from a return: a critic's value, or, without critics, the "
                  "mean of the other responses to the same prompt")
    gate_penalty: float = option(10.0, "with --algo gate: an unsafe response's reward, negated")
    threshold: float = option(0.0, "d: a response is unsafe if its cost is above it")
    lambda_init: float = option(1.0, "the multiplier's first value")
    lambda_lr: float = option(0.1, "alpha: the multiplier's step size")
    lambda_max: float = option(5.0, "the multiplier's upper bound")
    cost_window: int = option(128, "with --algo ppo_lag: latest costs per rank to average over")
    kl_coeff: float = option(0.01, "beta: weight of the KL penalty to the starting policy")
    clip_range: float = option(0.2, "epsilon: clip of the probability ratio")
    clip_range_value: float = option(5.0, "clip of a critic's value around its old value")
    gae_lambda: float = option(0.95, "lambda of generalised advantage estimation")
    ptx_coeff: float = option(0.0, "weight of the supervised (PTX) loss; 0 turns it off")
    steps: int | None = option(None, "rollout-and-update steps; default: one pass over the prompts")
    batch_size: int = option(16, "prompts per step, of all ranks together")
    samples_per_prompt: int = option(1, "responses per prompt")
    update_iters: int = option(1, "passes over each rollout")
    minibatch_size: int | None = option(
        None, "responses per optimiser step; default: the whole rollout")
    actor_lr: float = option(1e-5, "the policy's peak learning rate (cosine to zero)")
    critic_lr: float = option(5e-6, "the critics' learning rate (constant)")
    temperature: float = option(1.0, "of sampling, and of every log-prob except PTX's")
    # Fixed: GAE's gamma 1, token rewards and costs clamped to +-50, gradient norms clipped to 1,
    # AdamW's betas (0.9, 0.95), its weight decay 0.01 on the policy's matrices.


def resolve_config(argv: list[str]) -> Config:
    """Later sources override earlier ones: defaults, the preset of --model, --config, the command
    line. Builds a tiny world, once, if --model names one. Raises UserError."""
    return settings.resolve(Config, argv, {"tiny": world.preset, "tiny-pictures": pictures.preset})


# ==== 2  Rollout =================================================================================

@dataclass
class Sequences:
    """Prompts and responses as padded token ids: what a model reads."""

    input_ids: Tensor                         # [B, P+T]
    attention_mask: Tensor                    # [B, P+T]  1 at prompt and response tokens
    response_mask: Tensor                     # [B, T]    True at y_1 .. y_T, stop token included
    pixel_values: Tensor | None = None        # [B, 3, S, S]  where prompts have a picture

    def response_tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """The N response tokens in the mask's order: row, column of the state before the token, and
        id; [N] each."""
        row, t = self.response_mask.nonzero(as_tuple=True)                       # [N], [N]
        column = self.input_ids.shape[1] - self.response_mask.shape[1] + t       # [N]  P + t
        state_column = column - 1                                                # [N]
        return row, state_column, self.input_ids[row, column]


@dataclass
class Rollout(Sequences):
    """A batch of prompts and sampled responses, with everything that an update learns from."""

    prompts: list[str] | None = None          # B         as the user wrote them
    responses: list[str] | None = None        # B         as text, without the stop token
    finished: Tensor | None = None            # [B]       True: by a stop token, False: by the limit
    log_probs: Tensor | None = None           # [B, T]    log pi_old(y_t)
    ref_log_probs: Tensor | None = None       # [B, T]    log pi_ref(y_t)
    entropy: Tensor | None = None             # [B, T]    of pi_old(. | s_t), in nats
    reward: Tensor | None = None              # [B]       R
    cost: Tensor | None = None                # [B]       C
    rectified_cost: Tensor | None = None      # [B]       {C - d}+
    lambdas: Tensor | None = None             # [B]       lambda_i
    reward_values: Tensor | None = None       # [B, T]    V^R(s_t)  if there is a reward critic
    cost_values: Tensor | None = None         # [B, T]    V^C(s_t)  if there is a cost critic
    reward_advantages: Tensor | None = None   # [B, T]    A^R_t
    cost_advantages: Tensor | None = None     # [B, T]    A^C_t
    reward_returns: Tensor | None = None      # [B, T]
    cost_returns: Tensor | None = None        # [B, T]


def random_numbers(*key) -> torch.Generator:
    """A generator that depends on its key alone. So a run draws the same numbers after a resume and
    on any number of ranks."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


class Draw(LogitsProcessor):
    """Draws each response's next token from the whole softmax at the sampling temperature: the
    first token whose cumulated probability reaches a uniform random number.

    Every response has its own numbers [T]. So it does not matter which rank samples it, and in
    which batch.
    """

    def __init__(self, uniform: Tensor, prompt_length: int, temperature: float):
        self.uniform = uniform                                                   # [B, T]
        self.prompt_length = prompt_length
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        t = input_ids.shape[1] - self.prompt_length
        probs = (scores / self.temperature).double().softmax(-1)                 # [B, V]
        cumulated = probs.cumsum(-1)                                             # [B, V]
        total = cumulated[:, -1:]  # 1, up to rounding                           # [B, 1]
        token = torch.searchsorted(cumulated, self.uniform[:, t:t + 1] * total)  # [B, 1]
        token = token.clamp(max=scores.shape[1] - 1)  # the index is V for NaN   # [B, 1]
        return scores.scatter(1, token, torch.inf)  # the library takes the largest one


def response_limit(prompt: list[int], config: Config) -> int:
    """How many tokens a response may have."""
    room = config.max_length - len(prompt)
    return min(room, config.max_response_length or room)


def up_to_stop(token_ids: list[int], stop_token_ids: set[int]) -> list[int]:
    """A response up to and including its first stop token."""
    for t, token in enumerate(token_ids):
        if token in stop_token_ids:
            return token_ids[:t + 1]
    return token_ids


def response_log_probs(policy, batch: Sequences, temperature: float, return_entropy: bool = False):
    """log pi(y_t) of the N response tokens, at the temperature that they were sampled with: fp32
    [N]. With return_entropy a pair: the second is the entropy of pi(. | s_t), [N].

    With a fused head, only the states before response tokens reach it, and the logits of one chunk
    of states exist at a time.
    """
    row, state_column, ids = batch.response_tokens()                             # [N] each
    head = policy.fused_head
    if head is None:  # the LM head has a bias, for example: all logits are made
        logits = models.response_logits(policy, batch)                           # [N, V]
        return gather_log_probs(logits, ids, temperature, return_entropy=return_entropy)
    hidden = models.hidden_states(policy.base_model, batch.input_ids, batch.attention_mask,
                                  batch.pixel_values)[row, state_column]         # [N, H]
    head_weight = models.head_weight(policy)                                     # [V, H]
    # A head has a scale or a soft cap, never both. Dividing the temperature by the scale multiplies
    # the logits by it.
    return linear_log_probs(
        hidden, head_weight, ids, temperature / head.scale, soft_cap=head.soft_cap,
        return_entropy=return_entropy)


def response_values(critic: ScoreModel, batch: Sequences) -> Tensor:
    """V(s_t) of the state before each response token: fp32 [N]."""
    row, state_column, _ = batch.response_tokens()                               # [N], [N]
    values = critic.values(batch.input_ids, batch.attention_mask, batch.pixel_values)   # [b, P+T]
    return values[row, state_column]                                             # [N]


def generate(policy, tokenizer, prompts: list[list[int]], config: Config, key=(),
             pixel_values: Tensor | None = None) -> list[list[int]]:
    """Samples a response to each prompt, as token ids: up to a stop token, or up to its
    response_limit. The same policy, seed, key and prompts give the same responses."""
    limits = [response_limit(prompt, config) for prompt in prompts]              # B
    generator = random_numbers(config.seed, key)
    uniform = 1 - torch.rand(  # [B, T] in (0, 1]: a token of probability 0 is never drawn
        len(prompts), max(limits), generator=generator, dtype=torch.float64)

    def sample(rows: list[int]) -> list[list[int]]:
        chosen = [prompts[i] for i in rows]
        draw = Draw(uniform[rows].to(config.device), max(map(len, chosen)), config.temperature)
        pixels = None if pixel_values is None else pixel_values[rows]
        longest = max(limits[i] for i in rows)
        return models.generate(policy, tokenizer, chosen, draw, longest, config, pixels)

    # Each rank samples rows of similar lengths, which need little padding.
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses = ranks.sampled_in_shares(sample, by_length, policy)
    return [up_to_stop(responses[i][:limits[i]], policy.stop_token_ids)
            for i in range(len(prompts))]


def collect(state: training.State, prompts: list[str], config: Config, key=(),
            with_values: bool = True) -> Rollout:
    """Samples a response to each prompt and scores it: a rollout without advantages, returns and
    lambdas. Raises BadNumbers if a score, log-prob or value is not finite."""
    tokenizer, policy = state.tokenizer, state.policy
    prompt_ids = data.encode_prompts(prompts, tokenizer)
    pixel_values = data.pixels_for(tokenizer, prompts, config.device)            # [B, 3, S, S]
    response_ids = generate(policy, tokenizer, prompt_ids, config, key, pixel_values)
    state.clock.lap("rollout")

    padded = data.lay_out(prompt_ids, response_ids, tokenizer.pad_token_id, config.device)
    rollout = Rollout(*padded, pixel_values)
    finished = [row[-1] in policy.stop_token_ids for row in response_ids]
    rollout.prompts = prompts
    rollout.responses = data.decode_responses(response_ids, policy.stop_token_ids, tokenizer)
    rollout.finished = torch.tensor(finished, device=config.device)              # [B]

    log_probs = partial(response_log_probs, temperature=config.temperature)
    rollout.log_probs, rollout.entropy = ranks.per_token(                        # [B, T] each
        partial(log_probs, return_entropy=True), policy, rollout, config)
    rollout.ref_log_probs = ranks.per_token(                                     # [B, T]
        log_probs, state.reference, rollout, config)

    whole_ids = [prompt + response for prompt, response in zip(prompt_ids, response_ids)]
    scored = whole_ids, prompts, rollout.responses, finished
    rollout.reward = state.reward_model(*scored)                                 # [B]  R
    rollout.cost = state.cost_model(*scored)                                     # [B]  C
    rollout.rectified_cost = rectify(rollout.cost, config.threshold)             # [B]  for metrics
    if with_values and state.reward_critic:
        rollout.reward_values = ranks.per_token(                                 # [B, T]
            response_values, state.reward_critic, rollout, config)
    if with_values and state.cost_critic:
        rollout.cost_values = ranks.per_token(                                   # [B, T]
            response_values, state.cost_critic, rollout, config)
    metrics.require_finite(rollout)
    state.clock.lap("scoring")
    return rollout


# ==== 3  Cost and lambda_i (1) (2), token rewards and costs (4) (5), advantages (6) ==============

def rectify(cost: Tensor, threshold: float = 0.0) -> Tensor:
    """{C - d}+, how far a response is above the threshold: 0 for every safe one. Any shape."""
    return (cost - threshold).clamp(min=0.0)


def costs_and_lambdas(cost: Tensor, lam: float, config: Config) -> tuple[Tensor, Tensor]:
    """Chooses the cost that enters the returns and the lambda_i that enters the loss, C [B] -> two
    [B]. The Lagrangian (1) is E[-R + lambda {C - d}+]. Its gradient (2), the rectified policy
    gradient, is E[grad log pi(y|x) (-R + lambda {C - d}+)].
        method         in returns   lambda_i
        repo, return   {C - d}+     lambda            estimates (2), up to 1 / (T_i (1 + lambda))
        repo, mask     C - d        lambda 1[C > d]   does not estimate (2): tiny_configs/README
        ppo_lag        C - d        lambda            safe responses pay for unsafe ones
        gate, ppo      not used     0                 A^C has no weight in the loss
    """
    excess = cost - config.threshold                                             # [B]  C - d
    lambdas = torch.full_like(cost, 0.0 if config.algo in ("gate", "ppo") else lam)   # [B]
    if config.algo == "repo" and config.rectify == "return":
        return rectify(cost, config.threshold), lambdas
    if config.algo == "repo":
        return excess, lambdas * (excess > 0)
    return excess, lambdas


def shape_rewards_and_costs(reward: Tensor, cost: Tensor, log_probs: Tensor, ref_log_probs: Tensor,
                            mask: Tensor, kl_coeff: float,
                            clip_range_score: float = 50.0) -> tuple[Tensor, Tensor]:
    """Equations (4) and (5): two [B], three [B, T] -> token rewards r_t and costs c_t, [B, T] each,
    0 outside the mask. With beta in both, the KL penalty of A_t has the weight beta for any lambda.

        r_t = -beta (log pi_old(y_t) - log pi_ref(y_t)) + 1[t = T_i] R
        c_t = +beta (log pi_old(y_t) - log pi_ref(y_t)) + 1[t = T_i] cost
    """
    mask = mask.bool()
    kl = torch.where(mask, log_probs - ref_log_probs, 0.0)                       # [B, T]
    is_last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))               # [B, T]  1[t=T_i]
    rewards = -kl_coeff * kl + is_last * reward[:, None]                         # [B, T]  (4)
    costs = kl_coeff * kl + is_last * cost[:, None]                              # [B, T]  (5)
    return (rewards.clamp(-clip_range_score, clip_range_score),
            costs.clamp(-clip_range_score, clip_range_score))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0,
        lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Equation (6), generalised advantage estimation: three [B, T] -> advantages and returns, both
    [B, T], 0 outside the mask. lam is GAE's lambda, not the multiplier.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)                   V = 0 after the last token
        A_t = delta_t + gamma lam A_{t+1},          return_t = A_t + V(s_t)
    """
    rewards = rewards.masked_fill(mask == 0, 0.0)                                # [B, T]
    values = values.masked_fill(mask == 0, 0.0)  # so V = 0 after the last       # [B, T]
    advantages = torch.zeros_like(values)                                        # [B, T]
    advantage = next_value = torch.zeros_like(values[:, 0])                      # [B]
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                # [B]
        advantage = delta + gamma * lam * advantage                              # [B]  A_t, (6)
        advantages[:, t] = advantage
        next_value = values[:, t]                                                # [B]
    return advantages, advantages + values                                       # [B, T], [B, T]


def estimate_advantages(rollout: Rollout, lam: float, config: Config) -> None:
    """Fills in a rollout's lambdas, advantages and returns."""
    mask, reward = rollout.response_mask, rollout.reward                         # [B, T], [B]
    cost_in_returns, rollout.lambdas = costs_and_lambdas(                        # [B], [B]
        rollout.cost, lam, config)
    if config.algo == "gate":  # R if C <= d, else -gate_penalty                 # [B]
        reward = reward.where(rollout.cost <= config.threshold, -config.gate_penalty)
    rewards, costs = shape_rewards_and_costs(                                    # [B, T] each
        reward, cost_in_returns, rollout.log_probs, rollout.ref_log_probs, mask, config.kl_coeff)

    if config.baseline == "group":
        size = config.samples_per_prompt
        rollout.reward_advantages = group_advantages(rewards, mask, size)        # [B, T]
        rollout.cost_advantages = group_advantages(costs, mask, size)            # [B, T]
        return
    rollout.reward_advantages, rollout.reward_returns = gae(                     # [B, T] each
        rewards, rollout.reward_values, mask, lam=config.gae_lambda)
    if config.algo in ("gate", "ppo"):  # lambda_i is 0, and there is no cost critic
        rollout.cost_advantages = torch.zeros_like(costs)                        # [B, T]
        return
    rollout.cost_advantages, rollout.cost_returns = gae(                         # [B, T] each
        costs, rollout.cost_values, mask, lam=config.gae_lambda)


def group_advantages(rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """Advantages without a critic, leave-one-out as in RLOO (not the paper's): token rewards, or
    costs, [B, T] -> [B, T], 0 outside the mask. K = group_size consecutive rows answer one prompt.

        A_t = sum_{u >= t} r_u - the mean of sum_u r_u over the K - 1 other responses

    The other responses' totals do not depend on y_t, so they add no bias.
    """
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)                           # [B, T]
    totals = to_go[:, 0].view(-1, group_size)                                    # [B/K, K]
    of_others = (totals.sum(1, keepdim=True) - totals) / (group_size - 1)        # [B/K, K]
    return (to_go - of_others.view(-1, 1)) * mask                                # [B, T]


# ==== 4  lambda (3), the rectified clipped objective (7) (8), critics, PTX =======================

def update_lambda(lam: float, costs: Tensor, config: Config) -> float:
    """Equation (3), over raw costs C [n]. lambda never falls.

        lambda <- min(lambda + alpha mean{C - d}+, lambda_max)

    costs are those of this step. With --algo ppo_lag they are those of the latest
    cost_window x RANKS responses, and the rule, with the same cap, is

        ln lambda <- ln lambda + alpha lambda (mean C - d)

    With --algo gate and ppo lambda is 0.
    """
    if config.algo in ("gate", "ppo"):
        return 0.0
    if config.algo == "repo":
        violation = rectify(costs, config.threshold).mean().item()
        return min(lam + config.lambda_lr * violation, config.lambda_max)        # (3)
    exponent = config.lambda_lr * lam * (costs.mean().item() - config.threshold)
    growth = math.exp(min(exponent, 700.0))  # exp overflows above 709
    return min(lam * growth, config.lambda_max)


def policy_loss(policy, batch: Rollout, token_weight: Tensor,
                config: Config) -> tuple[Tensor, dict]:
    """Equations (7) and (8) over the N response tokens of a batch; token_weight is w_t [b, T].
    Returns (scalar, statistics of the ratio).

        A_t  = (A^R_t - lambda_i A^C_t) / (1 + lambda_i)
        loss = sum_t w_t (-min(rho_t A_t, clip(rho_t, 1 - epsilon, 1 + epsilon) A_t))
        rho_t = pi(y_t) / pi_old(y_t)
    """
    if policy.fused_head and runs_triton(policy.get_output_embeddings().weight):
        return fused_policy_loss(policy, batch, token_weight, config)  # the same, in Triton
    mask = batch.response_mask                                                   # [b, T]
    row, _, _ = batch.response_tokens()                                          # [N]
    lambdas = batch.lambdas[row]                                                 # [N]  lambda_i
    reward_advantages = batch.reward_advantages[mask]                            # [N]  A^R_t
    cost_advantages = batch.cost_advantages[mask]                                # [N]  A^C_t
    log_probs = response_log_probs(policy, batch, config.temperature)            # [N]
    log_ratio = log_probs - batch.log_probs[mask]                                # [N]

    advantages = (reward_advantages - lambdas * cost_advantages) / (1 + lambdas)    # [N]  A_t, (7)
    ratio = log_ratio.exp()                                                      # [N]  rho_t
    clipped_ratio = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)    # [N]
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)    # [N]
    loss = -(token_weight[mask] * surrogate).sum()                               # []   (8)
    return loss, metrics.of_ratio(log_ratio.detach(), config.clip_range)


def fused_policy_loss(policy, batch: Rollout, token_weight: Tensor,
                      config: Config) -> tuple[Tensor, dict]:
    """What policy_loss computes, in one Triton function from the LM head to the loss. The logits
    [N, V] never exist as a whole."""
    mask, head = batch.response_mask, policy.fused_head
    row, state_column, ids = batch.response_tokens()                             # [N] each
    hidden = models.hidden_states(policy.base_model, batch.input_ids, batch.attention_mask,
                                  batch.pixel_values)[row, state_column]         # [N, H]
    loss, _, statistics = linear_repo_loss(
        hidden, models.head_weight(policy), ids, batch.log_probs[mask],
        batch.reward_advantages[mask], batch.cost_advantages[mask], batch.lambdas[row],
        token_weight[mask], config.clip_range, config.temperature / head.scale,
        soft_cap=head.soft_cap)
    return loss, statistics


def value_loss(critic: ScoreModel, batch: Rollout, token_weight: Tensor, old_values: Tensor,
               returns: Tensor, config: Config) -> tuple[Tensor, dict]:
    """A critic's clipped squared error, three [b, T] -> (scalar, no statistics):

        sum_t w_t 1/2 max((V - return)^2, (clip(V, V_old +- range) - return)^2)
    """
    mask, limit = batch.response_mask, config.clip_range_value                   # [b, T]
    value, old, target = response_values(critic, batch), old_values[mask], returns[mask]  # [N]
    clipped = old + (value - old).clamp(-limit, limit)                           # [N]
    error = torch.maximum((value - target) ** 2, (clipped - target) ** 2)        # [N]
    return 0.5 * (token_weight[mask] * error).sum(), {}


def ptx_loss(policy, batch: Sequences, token_count: Tensor, config: Config) -> tuple[Tensor, dict]:
    """The next-token loss of supervised answers, summed over this batch and divided by token_count,
    the answer tokens of all the step's pairs. Returns (scalar, no statistics)."""
    return -response_log_probs(policy, batch, 1.0).sum() / token_count, {}


# ==== 5  One training step =======================================================================

def train_step(state: training.State, prompts: list[str], ptx_pairs: list,
               config: Config) -> tuple[Rollout, dict]:
    """One step on some prompts, and on a supervised pair per response if PTX is on. Returns the
    rollout and the step's metrics. Raises BadNumbers before an update that is not finite; the
    step's earlier updates stand."""
    state.clock.start()
    lam, actor_lr = state.lam, state.optimizer.param_groups[0]["lr"]
    repeated = [prompt for prompt in prompts for _ in range(config.samples_per_prompt)]   # B
    rollout = collect(state, repeated, config, key=state.step)                   # sample, score
    estimate_advantages(rollout, lam, config)                                    # (4) (5) (6)

    ptx = None
    if ptx_pairs:
        ptx = Sequences(*data.lay_out_pairs(ptx_pairs, state.tokenizer, config.device))
    minibatches = minibatch_rows(len(repeated), state.step, config)              # [M] each
    meter = metrics.Meter(rollout, len(minibatches), config)
    for rows in minibatches:
        update(state, rollout, rows, ptx, meter, config)                         # (7) (8)
    state.schedule.step()

    state.costs = (state.costs + rollout.cost.tolist())[-config.cost_window * ranks.RANKS:]
    costs = torch.tensor(state.costs) if config.algo == "ppo_lag" else rollout.cost
    state.lam = update_lambda(lam, costs, config)                                # (3)
    state.step += 1
    state.clock.lap("learning")
    return rollout, metrics.of_step(state, rollout, meter, lam, actor_lr, config)


def update(state: training.State, rollout: Rollout, rows: Tensor, ptx: Sequences | None,
           meter: metrics.Meter, config: Config) -> None:
    """One optimiser step of policy and critics on the M rows of a minibatch. The policy also learns
    from all of the step's supervised pairs. training.backward calls loss(model, *arguments, config)
    and adds the gradients of a micro-batch to those before it."""
    for batch in ranks.micro_batches(rollout, rows, config.micro_batch_size):
        mask = batch.response_mask                                               # [b, T]
        token_weight = mask / mask.sum(1, keepdim=True) / len(rows)       # w_t of (8): 1 / (T_i M)
        loss, statistics = training.backward(
            state.policy, policy_loss, batch, token_weight, config=config)
        meter.add("actor_loss", loss, statistics, mask.sum())
        if state.reward_critic:
            loss, _ = training.backward(state.reward_critic, value_loss, batch, token_weight,
                                        batch.reward_values, batch.reward_returns, config=config)
            meter.add("reward_critic_loss", loss)
        if state.cost_critic:
            loss, _ = training.backward(state.cost_critic, value_loss, batch, token_weight,
                                        batch.cost_values, batch.cost_returns, config=config)
            meter.add("cost_critic_loss", loss)
    if ptx:
        pairs, token_count = torch.arange(len(ptx.input_ids)), ptx.response_mask.sum()
        for batch in ranks.micro_batches(ptx, pairs, config.micro_batch_size):
            loss, _ = training.backward(state.policy, ptx_loss, batch, token_count,
                                        config=config, scale=config.ptx_coeff)
            meter.add("ptx_loss", loss)

    for name, model in state.trained_models():
        meter.add_norm(f"{name}_grad_norm", ranks.clip_gradients(model))         # to 1
    meter.end_update()  # raises BadNumbers, before the step
    state.optimizer.step()
    state.optimizer.zero_grad()


def minibatch_rows(count: int, step: int, config: Config) -> list[Tensor]:
    """The rows [M] of each optimiser step: --update_iters passes over a rollout, each in its own
    order."""
    size = config.minibatch_size or count
    orders = [torch.randperm(count, generator=random_numbers(config.seed, "order", step, i))
              for i in range(config.update_iters)]
    return [rows for order in orders for rows in order.split(size)]


# ==== 6  Evaluation ==============================================================================

def evaluate(state: training.State, prompts: list[str], config: Config) -> list[dict]:
    """Samples --eval_samples responses to each held-out prompt and scores them: a record per
    response, in the order of the prompts. The random numbers are the same before and after
    training."""
    repeated = [prompt for prompt in prompts for _ in range(config.eval_samples)]
    size = config.batch_size * config.samples_per_prompt
    records = []
    for start in range(0, len(repeated), size):
        rollout = collect(state, repeated[start:start + size], config, key=("held out", start),
                          with_values=False)
        records += metrics.records(rollout, config.threshold)
    return records


# ==== 7  Main ====================================================================================

def main(argv: list[str] | None = None) -> int:
    """Returns 0 when all is done, 1 if memory runs out or another rank is lost, 2 after a
    UserError, 3 after too many steps with bad numbers, 130 after Ctrl-C."""
    with runs.Run() as run:  # turns an error into one sentence and run.code
        config = run.open(resolve_config, sys.argv[1:] if argv is None else argv)
        if config.dry_run:
            plan.dry_run(config)
            return 0
        run.load()                                      # models, prompts, the checkpoint to resume
        run.start(evaluate)                             # scores of the starting policy
        for prompts, ptx_pairs in run.steps():          # until --steps or Ctrl-C
            with run.one_step():                        # ends a step with bad numbers
                run.keep(*train_step(run.state, prompts, ptx_pairs, config))
        run.finish(evaluate)                            # final/, scores after it, summary.json
    return run.code


if __name__ == "__main__":
    fit_threads()
    sys.exit(main())
