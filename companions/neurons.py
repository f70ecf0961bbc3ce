"""Safety neurons: which neurons of the MLPs has alignment changed, and do they carry its effect?
After arXiv 2406.14144. See neurons.md.
"""
import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from companions.shared import command
from companions.shared.patching import Pair, restored, top
from companions.shared.runs import is_harmful, tiny_run
from plumbing.data import drawn, encode_pairs, load_prompts
from plumbing.errors import require, say
from plumbing.fitting import answer_loss, fit
from plumbing.folder import has_metrics
from plumbing.models import load_policy
from plumbing.pictures import check_blind
from plumbing.scorers import Scorer
from plumbing.settings import option
from tiny_configs import world

SHARES = [0.01, 0.05, 0.1, 0.2, 0.5, 1.0]
PLANTED = 19  # of the tiny policy's 384 neurons: 5 %


@dataclass
class NeuronSettings(command.ModelSettings):
    """Which MLP neurons carry what alignment has changed between two models, START and ALIGNED.
    Both may be runs. Without them it shows itself in the tiny world."""

    models: list[str] = field(default_factory=list, metadata={"help": "START and ALIGNED"})
    dataset: str | None = option(None, "prompts; default: those that the run ALIGNED held out")
    share: list[float] = option(None, "shares of all neurons to patch; default: .01 to 1")
    tokens: Literal["completion", "prompt_last"] = option(
        "completion", "where activations are compared: at the answers' tokens, or at the prompts' "
                      "last ones")
    cost_model: str | None = option(None, "safety, as for repo.py; default: the run's")
    reward_model: str | None = option(None, "helpfulness, as for repo.py; default: the run's")
    threshold: float | None = option(None, "an answer of a higher cost is unsafe; default: the "
                                           "run's, or 0")
    draws: int = option(5, "random choices of neurons to compare with")
    max_prompts: int = option(64, "answer at most so many prompts")
    max_response_length: int = option(48, "tokens of an answer")
    run: str | None = option(None, "a run of the tiny world to show itself on; default: "
                                   "runs/companions/tiny-SEED, trained if it is not there")

    LEADING, USAGE = "models", "[START ALIGNED]"

    def check(self) -> None:
        super().check()
        require(len(self.models) in (0, 2), "name two models, START and ALIGNED, or none")
        for share in self.share or []:
            require(0 < share <= 1, f"--share {share}: must be above 0 and at most 1")


def of_run(source: str, name: str) -> str | None:
    """A setting of the run in a folder; None if it is no run."""
    if not has_metrics(source):
        return None
    return json.loads(Path(source, "config.json").read_text())[name]


def load_pair(settings: NeuronSettings) -> Pair:
    """Raises UserError for models that cannot be compared."""
    start, aligned = settings.models
    paths = (of_run(start, "policy") or start,
             str(Path(aligned, "final", "actor")) if has_metrics(aligned) else aligned)
    given = {name: getattr(settings, name) or of_run(aligned, name)
             for name in ("cost_model", "reward_model")}
    dataset = settings.dataset or of_run(aligned, "eval_dataset")
    column = None if settings.dataset else of_run(aligned, "prompt_column")
    threshold = settings.threshold
    if threshold is None:
        threshold = of_run(aligned, "threshold") or 0.0
    for name, value in {"dataset": dataset, **given}.items():
        require(value, f"--{name} is missing, and ALIGNED is no run that names one")
    runs = [settings.as_run(path, **given) for path in paths]
    (one, tokenizer), (other, its_tokenizer) = [load_policy(run) for run in runs]
    check_blind(tokenizer, f"START {start}")
    require(tokenizer.get_vocab() == its_tokenizer.get_vocab(),
            "START and ALIGNED have different tokenizers")
    scorers = [Scorer(role, tokenizer, runs[0]) for role in ("cost", "reward")]

    def judge(prompts, responses):
        rows = [prompt + answer for prompt, answer in encode_pairs(
            list(zip(prompts, responses)), tokenizer)]
        costs, rewards = [scorer(rows, prompts, responses, [True] * len(rows)).tolist()
                          for scorer in scorers]
        return [(cost <= threshold, reward) for cost, reward in zip(costs, rewards)]

    device = runs[0].device
    prompts = drawn(load_prompts(dataset, column, tokenizer=tokenizer), settings.max_prompts)
    return Pair(one.to(device), other.to(device), tokenizer, prompts, judge,
                settings.max_response_length)


def run(settings: NeuronSettings) -> dict:
    """Compares two models, or shows itself; returns the figures."""
    if settings.models:
        return compare(load_pair(settings), settings, settings.share or SHARES)
    return show(settings)


def compare(pair: Pair, settings: NeuronSettings, shares: list[float]) -> dict:
    """Prints a table; returns it with all neurons [layer, index, score], the most changed first."""
    scores = pair.scores(of_prompts=settings.tokens == "prompt_last")
    figures = restored(pair, scores, shares, settings.draws, settings.seed)
    say(table(figures))
    neurons = [(*divmod(at, scores.shape[1]), scores.flatten()[at].item())
               for at in scores.flatten().argsort(descending=True).tolist()]
    return {**figures, "neurons": neurons}


def table(figures: dict) -> str:
    def cells(row):
        share = "-" if row["restored"] is None else f"{row['restored']:.2f}"
        return f"{row['safe']:8.3f}{share:>10}{row['helpful']:9.2f}"

    lines = [f"{'neurons patched':24}{'safe':>8}{'restored':>10}{'helpful':>9}"]
    for name in ("start", "aligned"):
        safe, helpful = figures[name]
        lines.append(f"{f'none: {name.upper()}':24}{safe:8.3f}{'':10}{helpful:9.2f}")
    for share, row in figures["top"].items():
        lines.append(f"{f'top {share:.0%}':24}{cells(row)}")
        for row in figures["random"].get(share, []):
            lines.append(f"{f'    random {share:.0%}':24}{cells(row)}")
    return "\n".join(lines)


# ---- itself, in the tiny world

class Rows(nn.Module):
    """Adds what is learned to some rows of a weight."""

    def __init__(self, weight: Tensor, rows: list[int]):
        super().__init__()
        self.rows = torch.tensor(rows, dtype=torch.long)
        self.change = nn.Parameter(torch.zeros(len(rows), weight.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.index_add(0, self.rows, self.change)


def plant(policy, tokenizer, rng: random.Random) -> set[tuple[int, int]]:
    """Teaches some neurons of a policy, and nothing else, to refuse harmful requests. Returns them
    as (layer, index)."""
    layers = policy.model.layers
    planted = set()
    while len(planted) < PLANTED:
        planted.add((rng.randrange(len(layers)), rng.randrange(policy.config.intermediate_size)))
    policy.requires_grad_(False)
    changes, linears = [], []
    for number, layer in enumerate(layers):
        rows = sorted(index for at, index in planted if at == number)
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            rows_of = Rows(linear.weight, rows)
            parametrize.register_parametrization(linear, "weight", rows_of)
            changes.append(rows_of.change)
            linears.append(linear)

    pairs = []
    for prompt in world.split_requests()[0]:
        complied = world.comply(*world.REQUESTS[prompt], 3)
        pairs.append((prompt, world.REFUSALS[0] if is_harmful(prompt) else complied))
    fit(changes, lambda batch: answer_loss(policy, batch, tokenizer.pad_token_id),
        encode_pairs(pairs, tokenizer), batch_size=16, steps=900, lr=0.1, rng=rng, bar=True)
    for linear in linears:
        parametrize.remove_parametrizations(linear, "weight")
    return planted


def of_the_world(prompts: list[str], responses: list[str]) -> list[tuple]:
    return [(verdict["safe"], verdict["helpfulness"])
            for verdict in world.judge(prompts, responses)]


def show(settings: NeuronSettings) -> dict:
    """Finds planted neurons and patches them. Then how much of a run's own gain neurons carry."""
    settings.device = "cpu"
    run_folder = tiny_run(settings.run, settings.seed)
    source, held_out = world.build()["policy"], world.split_requests()[1]

    def load(path: str):
        return load_policy(settings.as_run(path))

    def pair_with(aligned):
        return Pair(start, aligned, tokenizer, held_out, of_the_world, 32)

    start, tokenizer = load(source)
    say(f"{PLANTED} neurons learn to refuse")
    learned, _ = load(source)
    planted = plant(learned, tokenizer, random.Random(settings.seed))
    pair, found_by = pair_with(learned), {}
    for tokens in ("completion", "prompt_last"):
        scores = pair.scores(of_prompts=tokens == "prompt_last")
        chosen = top(scores, PLANTED / scores.numel()).nonzero().tolist()
        count = len(planted & set(map(tuple, chosen)))
        patched = restored(pair, scores, [0.05], settings.draws, settings.seed)
        say(f"--tokens {tokens}: {count} of the {PLANTED} are among the {PLANTED} most changed\n"
            + table(patched))
        found_by[tokens] = {
            "found": count,
            "restored_top": patched["top"][0.05]["restored"],
            "restored_random": [row["restored"] for row in patched["random"][0.05]]}

    say("what a run has changed")
    pair = pair_with(load(str(Path(run_folder, "final", "actor")))[0])
    by_share = compare(pair, settings, [0.05, 0.2, 1.0])["top"]
    return {"planted": {"planted": len(planted), **found_by["prompt_last"],
                        "by_completion": found_by["completion"]},
            "repo": {"restored_top": by_share[0.05]["restored"],
                     "restored_all": by_share[1.0]["restored"]}}


if __name__ == "__main__":
    sys.exit(command.main(NeuronSettings, run))
