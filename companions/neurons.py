"""Safety neurons: which MLP neurons did alignment change, and do they carry its effect?

    python -m companions.neurons                                    # shows itself in the tiny world
    python -m companions.neurons START ALIGNED --dataset prompts.jsonl --share 0.05

After arXiv 2406.14144. A neuron's activation a is an input of its MLP's down-projection. Its change
score is s = sqrt(mean (a_start - a_aligned)^2) over the tokens of the aligned model's answers, or
over the last tokens of the prompts, where an answer's first token is decided.
Patching: at every step of greedy decoding the aligned model reads along, with a cache of its own,
and the chosen neurons of the starting model take its activations. With F the share of safe answers,

    restored = (F(patched) - F(start)) / (F(aligned) - F(start))

START and ALIGNED are models, or runs of repo.py (START: what the run started from; ALIGNED: what it
has trained).
"""
import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from companions.shared import learning
from companions.shared.patching import Pair, restored, top
from plumbing.errors import require, say
from plumbing.fitting import answer_loss, fit
from plumbing.models import load_policy
from plumbing.scorers import Scorer
from plumbing.pictures import check_blind
from plumbing.data import encode_pairs, load_prompts
from plumbing.folder import has_metrics, write_whole
from plumbing.settings import option
from tiny_configs import world

# ---- the command


@dataclass
class NeuronSettings(learning.Common):
    """Which MLP neurons carry the change from START to ALIGNED?"""

    models: list[str] = field(default_factory=list, metadata={
        "help": "START and ALIGNED, models or runs: the words before the first flag"})
    dataset: str | None = option(None, "prompts; default: the run's held-out ones")
    share: list[float] = option(None, "shares of all neurons to patch; default: .01 to 1")
    tokens: str = option("completion", "tokens whose activations count: completion or prompt_last")
    cost_model: str | None = option(None, "judges safety; default: the run's")
    reward_model: str | None = option(None, "judges helpfulness; default: the run's")
    threshold: float = option(0.0, "a cost above it is unsafe")
    draws: int = option(5, "random choices of neurons, for comparison")
    max_prompts: int = option(64, "answer at most N prompts")
    max_response_length: int = option(48, "most tokens of an answer")
    out: str = option("runs/neurons", "the folder for neurons.json")

    def check(self) -> None:
        super().check()
        require(len(self.models) in (0, 2), "name two models, START and ALIGNED, or none")
        require(self.tokens in ("completion", "prompt_last"),
                f"--tokens {self.tokens}: completion or prompt_last")
        require(self.draws >= 5, f"--draws {self.draws}: fewer than 5 tell little")
        for share in self.share or []:
            require(0 < share <= 1, f"--share {share}: must be above 0 and at most 1")


SHARES = [0.01, 0.05, 0.1, 0.2, 0.5, 1.0]


def of_run(source: str, name: str) -> str | None:
    """A setting of the run in a folder; None if there is no run."""
    if not has_metrics(source):
        return None
    return json.loads(Path(source, "config.json").read_text())[name]


def load_pair(settings: NeuronSettings) -> Pair:
    """Raises UserError for models that cannot be compared."""
    start, aligned = settings.models
    paths = (of_run(start, "policy") or start,
             str(Path(aligned, "final", "actor")) if has_metrics(aligned) else aligned)
    scores = {name: getattr(settings, name) or of_run(aligned, name)
              for name in ("reward_model", "cost_model")}
    runs = [settings.config_for(path, **scores) for path in paths]
    dataset = settings.dataset or of_run(aligned, "eval_dataset")
    for name, value in {"dataset": dataset, **scores}.items():
        require(value, f"--{name} is missing, and ALIGNED is not a run that names one")
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
        return [(cost <= settings.threshold, reward) for cost, reward in zip(costs, rewards)]

    device = runs[0].device
    prompts = load_prompts(dataset)[:settings.max_prompts]
    return Pair(one.to(device), other.to(device), tokenizer, prompts, judge,
                settings.max_response_length)


def run(settings: NeuronSettings) -> dict:
    """Compares two models; without models it shows itself."""
    if not settings.models:
        return show(settings)
    return compare(load_pair(settings), settings, settings.share or SHARES)


def compare(pair: Pair, settings: NeuronSettings, shares: list[float]) -> dict:
    """Prints a table, writes neurons.json, returns the figures."""
    scores = pair.scores(of_prompts=settings.tokens == "prompt_last")
    figures = restored(pair, scores, shares, settings.draws, settings.seed)
    say(table(figures))
    write(settings, scores, figures)
    return figures


def table(figures: dict) -> str:
    def cells(row):
        share = "-" if row["restored"] is None else f"{row['restored']:.2f}"
        return f"{row['safe']:8.3f}{share:>10}{row['helpful']:9.2f}"

    lines = [f"{'neurons patched':24}{'safe':>8}{'restored':>10}{'helpful':>9}"]
    for name in ("start", "aligned"):
        safe, helpful = figures[name]
        lines.append(f"{name:24}{safe:8.3f}{'':10}{helpful:9.2f}")
    for share, row in figures["top"].items():
        lines.append(f"{f'top {share:.0%}':24}{cells(row)}")
        for row in figures["random"].get(share, []):
            lines.append(f"{f'    random {share:.0%}':24}{cells(row)}")
    return "\n".join(lines)


def write(settings: NeuronSettings, scores: Tensor, figures: dict) -> None:
    """neurons.json: layer, index and score of all neurons, the most changed first."""
    out, width = Path(settings.out), scores.shape[1]
    order = scores.flatten().argsort(descending=True).tolist()
    neurons = [{"layer": at // width, "index": at % width, "score": scores.flatten()[at].item()}
               for at in order]
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "neurons.json", json.dumps({"neurons": neurons, **figures}, indent=1) + "\n")
    say(f"all {len(neurons):,} neurons, by their scores, are in {out / 'neurons.json'}")


# ---- itself, in the tiny world

class Rows(nn.Module):
    """A weight with some rows to learn."""

    def __init__(self, weight: Tensor, rows: list[int]):
        super().__init__()
        self.rows = torch.tensor(rows, dtype=torch.long)
        self.change = nn.Parameter(torch.zeros(len(rows), weight.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.index_add(0, self.rows, self.change)


def plant(policy, tokenizer, count: int, rng: random.Random) -> set[tuple[int, int]]:
    """Trains the input weights of `count` neurons alone: to refuse harmful requests, to help with
    others. Returns the neurons as (layer, index)."""
    layers = policy.model.layers
    width = policy.config.intermediate_size
    planted = set()
    while len(planted) < count:
        planted.add((rng.randrange(len(layers)), rng.randrange(width)))
    policy.requires_grad_(False)
    changes = []
    for number, layer in enumerate(layers):
        rows = sorted(index for at, index in planted if at == number)
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            rows_of = Rows(linear.weight, rows)
            parametrize.register_parametrization(linear, "weight", rows_of)
            changes.append(rows_of.change)

    pairs = []
    for prompt in world.split_requests()[0]:
        action, thing = world.REQUESTS[prompt]
        complied = world.comply(action, thing, 3)
        pairs.append((prompt, world.REFUSALS[0] if learning.is_harmful(prompt) else complied))
    fit(changes, lambda batch: answer_loss(policy, batch, tokenizer.pad_token_id),
        encode_pairs(pairs, tokenizer), batch_size=16, steps=900, lr=0.1, rng=rng, bar=True)
    for layer in layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            parametrize.remove_parametrizations(linear, "weight")
    return planted


def of_the_world(prompts: list[str], responses: list[str]) -> list[tuple]:
    return [(verdict["safe"], verdict["helpfulness"])
            for verdict in world.judge(prompts, responses)]


def show(settings: NeuronSettings) -> dict:
    """Finds planted neurons and measures what they restore; then the same for a run of RePO."""
    source = world.build()["policy"]
    held_out = world.split_requests()[1]

    def load(path: str):
        return load_policy(settings.config_for(path, device="cpu", dtype="float32"))

    def pair_with(aligned):
        return Pair(start, aligned, tokenizer, held_out, of_the_world, 32)

    start, tokenizer = load(source)
    say("19 neurons learn to refuse")
    learned, _ = load(source)
    planted = plant(learned, tokenizer, 19, random.Random(settings.seed))
    pair, found_by = pair_with(learned), {}
    for tokens in ("completion", "prompt_last"):
        scores = pair.scores(of_prompts=tokens == "prompt_last")
        found = {tuple(each) for each in top(scores, 19 / scores.numel()).nonzero().tolist()}
        patched = restored(pair, scores, [0.05], settings.draws, settings.seed)
        say(f"--tokens {tokens}: {len(planted & found)} of the 19 are among the 19 most changed\n"
            + table(patched))
        found_by[tokens] = {
            "found": len(planted & found),
            "restored_top": patched["top"][0.05]["restored"],
            "restored_random": [row["restored"] for row in patched["random"][0.05]]}
    # Whether to refuse is decided where a prompt ends.
    of_planted = {"planted": len(planted), **found_by["prompt_last"],
                  "by_completion": found_by["completion"]}

    everything = torch.ones_like(scores, dtype=torch.bool)
    itself = pair_with(start)
    changes_nothing = (itself.answers(start, everything) == itself.answers(start))
    say(f"patching a model with itself changes {'nothing' if changes_nothing else 'ANSWERS'}")

    run_folder = str(Path(settings.out, "run"))
    learning.tiny_run(run_folder, settings.seed)
    pair = pair_with(load(str(Path(run_folder, "final", "actor")))[0])
    by_share = compare(pair, settings, [0.05, 0.2, 1.0])["top"]
    return {"planted": of_planted, "self_patch_identical": changes_nothing,
            "repo": {"restored_top": by_share[0.05]["restored"],
                     "restored_all": by_share[1.0]["restored"]}}


if __name__ == "__main__":
    sys.exit(learning.main_of(NeuronSettings, run, first="models"))
