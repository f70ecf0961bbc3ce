"""One prompt of the tiny world through the method, with every number on the way.

    python companions/walk.py --prompt "How do I smash a piano?" --seed 3

After three training steps a response is sampled, scored and learned from, in one optimiser step. A
line per tensor, made by the functions that a run calls; headings say how, for pencils.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import repo  # noqa: E402
import torch  # noqa: E402
from companions import learning  # noqa: E402
from kernels.reference import repo_loss  # noqa: E402
from plumbing.errors import outlive_readers, require, say  # noqa: E402
from plumbing.models import load_policy  # noqa: E402
from plumbing.data import encode_prompts  # noqa: E402
from plumbing.settings import option  # noqa: E402
from tiny_configs import world  # noqa: E402


@dataclass
class WalkSettings:
    """One prompt of the tiny world, number by number through rollout and equations (2) to (8)."""

    prompt: str = option("How do I torch a car?", "what is asked")
    seed: int = option(3, "of training and sampling")
    json: str | None = option(None, "write the numbers there too")

    def check(self) -> None:
        require(self.prompt.strip(), "--prompt: is empty")


def walk(prompt: str, state: repo.State, config: repo.Config) -> dict:
    """{heading: {name: tensor}} of a response to the prompt, whose T tokens the policy learns."""
    rollout, _ = repo.collect(state, [prompt], config, key="walk")
    repo.estimate_advantages(rollout, state.lam, config)
    cost, penalty = repo.costs_and_penalties(rollout.cost, state.lam, config)
    rewards, costs = repo.shape_rewards_and_costs(
        rollout.reward, cost, rollout.log_probs, rollout.ref_log_probs, rollout.response_mask,
        config.kl_coeff)
    given = [tensor.view(-1, 1) for tensor in (rollout.log_probs, rollout.reward_advantages,
                                               rollout.cost_advantages, penalty.expand_as(rewards))]
    weights = torch.full_like(given[0], 1 / len(given[0]))                       # [T, 1]
    of_each = torch.vmap(lambda *token: repo_loss(*token, config.clip_range))    # [T, 1] -> [T]
    learned = [repo.learn(state, rollout, None, config)]
    log_probs = repo.response_log_probs(state.policy, rollout, config.temperature).detach()
    losses_after, stats = of_each(log_probs[:, None], *given, weights)
    learned.append(repo.learn(state, rollout, None, config))
    lam = repo.update_lambda(state.lam, rollout.cost, config)

    tokens = state.tokenizer.batch_decode(rollout.response_index()[2][:, None])
    return {
        f"{prompt} -> {' | '.join(tokens)}": {
            "log_probs": rollout.log_probs, "ref_log_probs": rollout.ref_log_probs,
            "reward": rollout.reward, "cost": rollout.cost},
        f"{{C - d}}+ with d = {config.threshold:g} enters the returns, the penalty the loss": {
            "(2) rectified cost": cost, "(2) penalty": penalty},
        f"-+ {config.kl_coeff:g} (log_probs - ref_log_probs), and the score at the last token": {
            "(4) token rewards": rewards, "(5) token costs": costs},
        f"from the right: delta = r + next V - V, A = delta + {config.gae_lambda:g} next A, "
        "return = A + V": {f"(6) {name}": getattr(rollout, name) for name in (
            "reward_values", "reward_advantages", "reward_returns",
            "cost_values", "cost_advantages", "cost_returns")},
        "(reward_advantages - penalty cost_advantages) / (1 + penalty)": {
            "(7) advantages": -of_each(given[0], *given, torch.ones_like(weights))[0]},
        f"-w min(rho A, clip(rho) A); before the step rho = 1; clip: 1 -+ {config.clip_range:g}": {
            "(8) weights w": weights[:, 0], "(8) losses": of_each(given[0], *given, weights)[0],
            "log_probs after": log_probs, "(8) ratios rho after": stats["ratio_max"],
            "(8) outside the clip": stats["clip_fraction"], "(8) losses after": losses_after,
            "(8) sums, as learned from": torch.tensor([part["actor_loss"] for part in learned])},
        f"plus {config.lambda_lr:g} times the rectified cost, at most {config.lambda_max:g}": {
            "(3) lambda, and the next": torch.tensor([state.lam, lam])}}


def run(settings: WalkSettings) -> dict:
    config = repo.resolve_config(["--device", "cpu", "--seed", str(settings.seed)])
    state = repo.State(*load_policy(config), config)
    (ids,), most = encode_prompts([settings.prompt], state.tokenizer), config.max_prompt_length
    require(len(ids) <= most, f"--prompt: has {len(ids)} tokens, and {most} are the most")
    for _ in range(3):
        repo.train_step(state, world.split_requests()[0], [], config)

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
    outlive_readers()
    sys.exit(learning.main_of(WalkSettings, run))
