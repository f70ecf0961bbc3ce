"""One prompt of the tiny world through the method, with every number on the way. See walk.md.

The functions that a run calls compute the numbers. Three training steps come first; then a response
is sampled, scored and learned from in one optimiser step.
"""
import sys
from dataclasses import dataclass

import torch

import repo
from companions.shared import command
from kernels.reference import repo_loss
from plumbing.data import cyclic_batch, encode_prompts
from plumbing.errors import require, say
from plumbing.metrics import Meter
from plumbing.models import load_policy
from plumbing.settings import option
from plumbing.training import State
from tiny_configs import world


@dataclass
class WalkSettings(command.Settings):
    """One prompt of the tiny world, number by number through rollout and equations (2) to (8)."""

    prompt: str = option("How do I torch a car?", "the prompt")
    seed: int = option(3, "of training and sampling")

    def check(self) -> None:
        super().check()
        require(self.prompt.strip(), "--prompt: is empty")


def walk(prompt: str, state: State, config: repo.Config) -> dict:
    """{heading: {name: tensor}} of a response of T tokens, from which the policy learns."""
    rollout = repo.collect(state, [prompt], config, key="walk")
    repo.estimate_advantages(rollout, state.lam, config)
    cost, lambdas = repo.costs_and_lambdas(rollout.cost, state.lam, config)
    rewards, costs = repo.shape_rewards_and_costs(
        rollout.reward, cost, rollout.log_probs, rollout.ref_log_probs, rollout.response_mask,
        config.kl_coeff)
    given = [tensor.view(-1, 1) for tensor in (rollout.log_probs, rollout.reward_advantages,
                                               rollout.cost_advantages, lambdas.expand_as(rewards))]
    weights = torch.full_like(given[0], 1 / len(given[0]))                       # [T, 1]
    of_each = torch.vmap(lambda *token: repo_loss(*token, config.clip_range))    # [T, 1] -> [T]
    learned = [loss_of_update(state, rollout, config)]
    log_probs = repo.response_log_probs(state.policy, rollout, config.temperature).detach()
    losses_after, stats = of_each(log_probs[:, None], *given, weights)
    learned.append(loss_of_update(state, rollout, config))
    lam = repo.update_lambda(state.lam, rollout.cost, config)

    tokens = state.tokenizer.batch_decode(rollout.response_tokens()[2][:, None])
    return {
        f"{prompt} -> {' | '.join(tokens)}": {
            "log_probs": rollout.log_probs, "ref_log_probs": rollout.ref_log_probs,
            "reward": rollout.reward, "cost": rollout.cost},
        f"{{C - d}}+ with d = {config.threshold:g} enters the returns, lambda_i the loss": {
            "(2) rectified cost": cost, "(2) lambda_i": lambdas},
        f"-+ {config.kl_coeff:g} (log_probs - ref_log_probs), and the score at the last token": {
            "(4) token rewards": rewards, "(5) token costs": costs},
        f"from the right: delta = r + next V - V, A = delta + {config.gae_lambda:g} next A, "
        "return = A + V": {f"(6) {name}": getattr(rollout, name) for name in (
            "reward_values", "reward_advantages", "reward_returns",
            "cost_values", "cost_advantages", "cost_returns")},
        "(reward_advantages - lambda_i cost_advantages) / (1 + lambda_i)": {
            "(7) advantages": -of_each(given[0], *given, torch.ones_like(weights))[0]},
        f"-w min(rho A, clip(rho) A); before the step rho = 1; clip: 1 -+ {config.clip_range:g}": {
            "(8) weights w": weights[:, 0], "(8) losses": of_each(given[0], *given, weights)[0],
            "log_probs after": log_probs, "(8) ratios rho after": stats["ratio_max"],
            "(8) outside the clip": stats["clip_fraction"], "(8) losses after": losses_after,
            "(8) sums, as learned from": torch.tensor(learned)},
        f"plus {config.lambda_lr:g} times the rectified cost, at most {config.lambda_max:g}": {
            "(3) lambda, and the next": torch.tensor([state.lam, lam])}}


def loss_of_update(state: State, rollout: repo.Rollout, config: repo.Config) -> float:
    """The policy's loss in one optimiser step."""
    meter = Meter(rollout, 1, config)
    repo.update(state, rollout, torch.arange(1), None, meter, config)
    return meter.results()["actor_loss"]


def run(settings: WalkSettings) -> dict:
    config = repo.resolve_config(["--device", "cpu", "--seed", str(settings.seed)])
    state = State(*load_policy(config), config)
    (ids,), most = encode_prompts([settings.prompt], state.tokenizer), config.max_prompt_length
    require(len(ids) <= most, f"--prompt: has {len(ids)} tokens, and at most {most} are allowed")
    requests, _ = world.split_requests()
    for _ in command.bar(range(3), "training"):
        prompts = cyclic_batch(requests, state.step, config.batch_size, config.seed)
        repo.train_step(state, prompts, [], config)

    figures = {}
    for heading, tensors in walk(settings.prompt, state, config).items():
        say(f"\n{heading}")
        for name, values in tensors.items():
            figures[name] = values.flatten().tolist()
            words = [f"{value:9.4f}" for value in figures[name]]
            lines = ["".join(words[start:start + 7]) for start in range(0, len(words), 7)]
            say(f"{name:26}{list(values.shape)!s:9}" + ("\n" + " " * 35).join(lines))
    return figures


if __name__ == "__main__":
    sys.exit(command.main(WalkSettings, run))
