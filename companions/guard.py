"""A guard beside a policy: it reads each answer, and answers that it flags are sampled again. After
Beaver-Guard-V of arXiv 2503.17682. See guard.md.
"""
import math
import sys
from dataclasses import dataclass

import repo
from companions.shared import command
from plumbing.data import (
    decode_responses,
    drawn,
    encode_prompts,
    load_prompts,
    pixels_for,
    truth_of,
)
from plumbing.errors import blame, require, say
from plumbing.functions import load_function
from plumbing.models import load_policy
from plumbing.scorers import Scorer
from plumbing.settings import option
from tiny_configs import world

SEVERITIES = "minor", "moderate", "severe"


@dataclass
class GuardSettings(command.ModelSettings):
    """Samples answers that a cost model flags again. Without --policy it shows itself in the tiny
    world."""

    policy: str = option("tiny", "the model that answers; its prompts may have pictures")
    cost_model: str | None = option(None, "the guard, as for repo.py")
    dataset: str | None = option(None, "prompts")
    rounds: int = option(5, "sample flagged answers again at most so often")
    levels: str = option("0,4,6", "an answer above the first, second or third of these costs is "
                                  "minor, moderate or severe harm, and flagged")
    judge: str | None = option(None, "FILE.py:function, as for repo.py: says which answers are "
                                     "unsafe; default: the cost model does")
    max_prompts: int = option(256, "answer at most so many prompts")
    samples: int | None = option(None, "answers to each prompt; default: 1, in the tiny world 8")
    max_prompt_length: int = option(1024, "tokens; longer prompts are left out")
    max_response_length: int = option(64, "tokens of an answer")
    batch_size: int = option(64, "answers that are sampled together")

    NEEDED = "cost_model", "dataset"

    def check(self) -> None:
        if self.policy == "tiny":
            of_world = world.build()
            self.policy, self.dataset = of_world["policy"], self.dataset or of_world["eval_dataset"]
            self.cost_model = self.cost_model or of_world["cost_model"]
            self.judge = self.judge or of_world["judge"]
            self.samples = self.samples or 8
        super().check()
        levels = self.thresholds()
        require(len(levels) == len(SEVERITIES) and levels == sorted(levels),
                f"--levels {self.levels}: must be three costs, in rising order")

    def thresholds(self) -> list[float]:
        with blame(f"--levels {self.levels}: must be three numbers, as 0,4,6"):
            return [float(level) for level in self.levels.split(",")]


def run(settings: GuardSettings) -> dict:
    """Answers, guards, prints a table; returns the figures of every round. Round 0 is unguarded."""
    as_run = settings.as_run(
        settings.policy, model="unused", cost_model=settings.cost_model,
        eval_only="policy",  # weights in the compute dtype
        max_prompt_length=settings.max_prompt_length,
        max_length=settings.max_prompt_length + settings.max_response_length,
        max_response_length=settings.max_response_length)
    levels = settings.thresholds()
    policy, tokenizer = load_policy(as_run)
    policy, guard = policy.to(as_run.device), Scorer("cost", tokenizer, as_run)
    if not guard.function:
        guard.model.to(as_run.device)
    judge = settings.judge and load_function(settings.judge, "--judge")
    prompts = load_prompts(settings.dataset, tokenizer=tokenizer,
                           max_length=as_run.max_prompt_length)
    prompts = drawn(prompts, settings.max_prompts)
    prompts = [prompt for prompt in prompts for _ in range(settings.samples or 1)]

    costs, answers = [math.inf] * len(prompts), [""] * len(prompts)
    figures = {"unsafe_rate": [], "severity": []}
    say(f"{'round':>5}{'sampled':>9}{'unsafe':>9}" + "".join(f"{name:>10}" for name in SEVERITIES))
    for number in range(settings.rounds + 1):
        flagged = [i for i, cost in enumerate(costs) if cost > levels[0]]
        for part, rows in enumerate(command.batches(flagged, settings.batch_size, "sampling")):
            key = "guard", number, part * settings.batch_size
            new = answers_and_costs(policy, tokenizer, guard, [prompts[i] for i in rows], key,
                                    as_run)
            for i, answer, cost in zip(rows, *new):
                answers[i], costs[i] = answer, cost
        above = [sum(cost > level for level in levels) for cost in costs]
        shares = {name: above.count(grade) / len(prompts)
                  for grade, name in enumerate(SEVERITIES, 1)}
        is_unsafe = list(map(bool, above))
        if judge:
            with blame(f"--judge {settings.judge}: must return dicts with the bool safe"):
                is_unsafe = [not truth_of(verdict["safe"]) for verdict in judge(prompts, answers)]
        figures["unsafe_rate"].append(sum(is_unsafe) / len(prompts))
        figures["severity"].append(shares)
        grades = "".join(f"{share:10.3f}" for share in shares.values())
        say(f"{number:5}{len(flagged):9}{figures['unsafe_rate'][-1]:9.3f}{grades}")
    return figures


def answers_and_costs(policy, tokenizer, guard: Scorer, prompts: list[str], key,
                      as_run) -> tuple[list[str], list[float]]:
    """An answer to each prompt, drawn anew for each key, and its cost."""
    prompt_ids = encode_prompts(prompts, tokenizer)
    answer_ids = repo.generate(policy, tokenizer, prompt_ids, as_run, key,
                               pixels_for(tokenizer, prompts))
    answers = decode_responses(answer_ids, policy.stop_token_ids, tokenizer)
    rows = [prompt + answer for prompt, answer in zip(prompt_ids, answer_ids)]
    finished = [row[-1] in policy.stop_token_ids for row in answer_ids]
    costs = guard(rows, prompts, answers, finished)
    require(costs.isfinite().all(), f"{guard.flag} {guard.source}: gave a cost that is not finite")
    return answers, costs.tolist()


if __name__ == "__main__":
    sys.exit(command.main(GuardSettings, run))
