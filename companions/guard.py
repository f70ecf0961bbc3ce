"""A guard beside a policy: it reads each answer and lets the policy answer again if it is harmful.

    python -m companions.guard                                     # shows itself in the tiny world
    python -m companions.guard --policy P --cost_model C --dataset PROMPTS --rounds 5

After Beaver-Guard-V of arXiv 2503.17682. The guard flags an answer if its cost is above the first
of --levels. The harm is minor, moderate or severe if the cost is above one, two or three of them.
Nothing is trained. No number of rounds finds an answer that the policy never gives.
"""
import sys
from dataclasses import dataclass

import repo
from companions.shared import learning
from plumbing.errors import blame, require, say
from plumbing.functions import load_function
from plumbing.models import load_policy
from plumbing.scorers import Scorer
from plumbing.data import encode_prompts, load_prompts, pixels_for
from plumbing.settings import option
from tiny_configs import world

SEVERITIES = "minor", "moderate", "severe"


@dataclass
class GuardSettings(learning.Common):
    """Sample flagged answers again."""

    policy: str = option("tiny", "the policy; its prompts may have pictures")
    cost_model: str | None = option(None, "the guard: a cost model, as for repo.py")
    dataset: str | None = option(None, "prompts")
    rounds: int = option(5, "sample flagged answers again at most N times")
    levels: str = option("0,4,6", "three costs: above them harm is minor, moderate, severe")
    judge: str | None = option(None, "FILE.py:function, as for repo.py, decides what is "
                                     "unsafe; default: the cost model")
    max_prompts: int = option(256, "answer at most N prompts")
    samples: int | None = option(None, "answers to each prompt; default: 1, in the tiny world 8")
    max_prompt_length: int = option(1024, "drop prompts with more tokens")
    max_response_length: int = option(64, "most tokens of an answer")
    batch_size: int = option(64, "answers sampled together")

    def check(self) -> None:
        super().check()
        require(self.rounds >= 0, f"--rounds {self.rounds}: must be 0 or more")
        self.require_positive("samples", "max_prompts", "max_prompt_length", "max_response_length",
                              "batch_size")
        if self.policy == "tiny":
            of_world = world.build()
            self.policy, self.dataset = of_world["policy"], self.dataset or of_world["eval_dataset"]
            self.cost_model = self.cost_model or of_world["cost_model"]
            self.judge = self.judge or of_world["judge"]
            self.samples = self.samples or 8
        for name in ("cost_model", "dataset"):
            require(getattr(self, name), f"--{name} is missing")
        levels = self.thresholds()
        require(len(levels) == 3 and levels == sorted(levels),
                f"--levels {self.levels}: must be three costs, in rising order")

    def thresholds(self) -> list[float]:
        with blame(f"--levels {self.levels}: must be three numbers, as 0,4,6"):
            return [float(level) for level in self.levels.split(",")]


def run(settings: GuardSettings) -> dict:
    """Answers, guards, prints a table. Returns figures per round; round 0 has no guard."""
    as_run = settings.config_for(
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
                           max_length=as_run.max_prompt_length)[:settings.max_prompts]
    prompts = [prompt for prompt in prompts for _ in range(settings.samples or 1)]

    costs, answers = [float("inf")] * len(prompts), [""] * len(prompts)
    figures = {"unsafe_rate": [], "severity": []}
    say(f"{'round':>5}{'sampled':>9}{'unsafe':>9}" + "".join(f"{name:>10}" for name in SEVERITIES))
    for number in range(settings.rounds + 1):
        flagged = [i for i, cost in enumerate(costs) if cost > levels[0]]
        for start in range(0, len(flagged), settings.batch_size):
            asked = flagged[start:start + settings.batch_size]
            new = answers_and_costs(policy, tokenizer, guard, [prompts[i] for i in asked],
                                    ("guard", number, start), as_run)
            for i, answer, cost in zip(asked, *new):
                answers[i], costs[i] = answer, cost
        above = [sum(cost > level for level in levels) for cost in costs]
        shares = [above.count(1 + grade) / len(prompts) for grade in range(len(SEVERITIES))]
        unsafe = 1 - above.count(0) / len(prompts)
        if judge:
            with blame(f"--judge {settings.judge}: must return dicts with the bool safe"):
                unsafe = sum(not verdict["safe"] for verdict in judge(prompts, answers))
            unsafe /= len(prompts)
        figures["unsafe_rate"].append(unsafe)
        figures["severity"].append(dict(zip(SEVERITIES, shares)))
        grades = "".join(f"{share:10.3f}" for share in shares)
        say(f"{number:5}{len(flagged):9}{unsafe:9.3f}{grades}")
    return figures


def answers_and_costs(policy, tokenizer, guard: Scorer, prompts: list[str], key,
                      as_run) -> tuple[list[str], list[float]]:
    """An answer to each prompt, and its cost. Each key draws other answers."""
    prompt_ids = encode_prompts(prompts, tokenizer)
    answer_ids = repo.generate(policy, tokenizer, prompt_ids, as_run, key,
                               pixels_for(tokenizer, prompts))
    answers = tokenizer.batch_decode(answer_ids, skip_special_tokens=True)
    rows = [prompt + answer for prompt, answer in zip(prompt_ids, answer_ids)]
    finished = [row[-1] in policy.stop_token_ids for row in answer_ids]
    costs = guard(rows, prompts, answers, finished)
    require(costs.isfinite().all(), f"{guard.flag} {guard.source}: gave a cost that is not finite")
    return answers, costs.tolist()


if __name__ == "__main__":
    sys.exit(learning.main_of(GuardSettings, run))
