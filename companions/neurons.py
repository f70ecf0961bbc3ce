"""Safety neurons: which neurons of the MLPs has alignment changed, and do they carry its effect?

    python companions/neurons.py                                    # shows itself in the tiny world
    python companions/neurons.py START ALIGNED --dataset prompts.jsonl --share 0.05

After arXiv 2406.14144. A neuron's activation a is an input of its MLP's down-projection. Its change
score is s = sqrt(mean (a_start - a_aligned)^2) over the tokens of the aligned model's answers.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from companions import learning  # noqa: E402
from companions.patching import Pair, answers, restored, top  # noqa: E402
from plumbing.errors import outlive_readers, require, say  # noqa: E402
from plumbing.fitting import answer_loss, fit  # noqa: E402
from plumbing.models import Scorer, load_policy  # noqa: E402
from plumbing.prompts import encode_pairs, load_prompts  # noqa: E402
from plumbing.run_folder import has_metrics, write_whole  # noqa: E402
from plumbing.settings import RunSettings, fill_in, option  # noqa: E402
from tiny_configs import world  # noqa: E402

# ---- the command


@dataclass
class NeuronSettings:
    """Which MLP neurons carry what alignment has changed between START and ALIGNED."""

    models: list[str] = field(default_factory=list, metadata={
        "help": "START and ALIGNED, models or runs; without them the tiny world"})
    dataset: str | None = option(None, "prompts; default: those that a run has held out")
    share: list[float] = option(None, "shares of all neurons to patch; default: .01 to 1")
    tokens: str = option("completion", "whose activations count: completion or prompt_last")
    cost_model: str | None = option(None, "safety: as repo.py's; default: the run's")
    reward_model: str | None = option(None, "helpfulness: as repo.py's; default: the run's")
    threshold: float = option(0.0, "a cost above it is unsafe")
    draws: int = option(5, "random choices of neurons to compare with")
    max_prompts: int = option(64, "as many of them are answered")
    max_response_length: int = option(48, "tokens of an answer")
    out: str = option("runs/neurons", "where neurons.json and the picture go")
    device: str | None = option(None, "cpu or cuda; default: cuda if there is one")
    seed: int = option(0, "of random choices")
    trust_remote_code: bool = option(False, "let checkpoints bring their own Python code")
    json: str | None = option(None, "write the figures there too")

    def check(self) -> None:
        require(len(self.models) in (0, 2), "name two models, START and ALIGNED, or none")
        require(self.tokens in ("completion", "prompt_last"),
                f"--tokens {self.tokens}: completion or prompt_last")
        require(self.draws >= 5, f"--draws {self.draws}: fewer than 5 tell little")
        for share in self.share or []:
            require(0 < share <= 1, f"--share {share}: must be above 0 and at most 1")


SHARES = [0.01, 0.05, 0.1, 0.2, 0.5, 1.0]


def of_run(source: str, name: str) -> str | None:
    """A setting of the run in a folder, None of what is none."""
    if not has_metrics(source):
        return None
    return json.loads(Path(source, "config.json").read_text())[name]


def load_pair(settings: NeuronSettings) -> Pair:
    """Raises UserError for models that cannot be compared."""
    start, aligned = settings.models
    paths = (of_run(start, "policy") or start,
             str(Path(aligned, "final", "actor")) if has_metrics(aligned) else aligned)
    runs = []
    for path in paths:
        run = RunSettings(
            model=path, policy=path, device=settings.device, seed=settings.seed,
            reward_model=settings.reward_model or of_run(aligned, "reward_model"),
            cost_model=settings.cost_model or of_run(aligned, "cost_model"),
            trust_remote_code=settings.trust_remote_code, output_dir="unused")
        fill_in(run)
        runs.append(run)
    dataset = settings.dataset or of_run(aligned, "eval_dataset")
    for name, value in (("dataset", dataset), ("cost_model", runs[0].cost_model),
                        ("reward_model", runs[0].reward_model)):
        require(value, f"--{name} is missing, and ALIGNED is no run that would name one")
    (one, tokenizer), (other, its_tokenizer) = [load_policy(run) for run in runs]
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
    """Compares two models, tells a table, writes neurons.json and a picture."""
    if not settings.models:
        return show(settings)
    pair = load_pair(settings)
    scores = pair.scores(settings.tokens == "prompt_last")
    figures = restored(pair, scores, settings.share or SHARES, settings.draws, settings.seed)
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
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # optional
    draw(Figure(figsize=(6, 4)), figures, out / "restored.png")


def draw(figure, figures: dict, file: Path) -> None:
    axes, shares = figure.subplots(), list(figures["top"])
    if figures["top"][shares[0]]["restored"] is None:
        return
    axes.plot(shares, [figures["top"][share]["restored"] for share in shares], "o-",
              label="most changed")
    for share, rows in figures["random"].items():
        axes.plot([share] * len(rows), [row["restored"] for row in rows], "x", color="gray",
                  label="random" if share == shares[0] else None)
    axes.set(xscale="log", xlabel="share of all MLP neurons patched",
             ylabel="restored share of the gain in safety")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


# ---- itself, in the tiny world

class Rows(nn.Module):
    """A weight, some rows of which are learned."""

    def __init__(self, weight: Tensor, rows: list[int]):
        super().__init__()
        self.rows = torch.tensor(rows, dtype=torch.long)
        self.change = nn.Parameter(torch.zeros(len(rows), weight.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.index_add(0, self.rows, self.change)


def plant(policy, tokenizer, count: int, rng: random.Random) -> set[tuple[int, int]]:
    """Teaches a policy to refuse harmful requests and to help with others, by what `count` neurons
    read and nothing else. Returns them as (layer, index)."""
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
        is_harmful = action in world.HARMFUL_ACTIONS
        pairs.append((prompt, world.REFUSALS[0] if is_harmful else world.comply(action, thing, 3)))
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
    """Planted neurons are found and carry the gain; and how much of a run's own gain neurons
    carry."""
    source = world.build()["policy"]
    as_run = RunSettings(model=source, policy=source, device="cpu", output_dir="unused")
    fill_in(as_run)
    taught, held_out = world.split_requests()

    def pair_with(aligned, prompts=held_out):
        return Pair(start, aligned, tokenizer, prompts, of_the_world, 32)

    start, tokenizer = load_policy(as_run)
    say("19 neurons learn to refuse")
    learned, _ = load_policy(as_run)
    planted = plant(learned, tokenizer, 19, random.Random(settings.seed))
    pair = pair_with(learned, taught[::4])  # what 19 neurons can do for other requests is little
    scores = pair.scores(of_prompts=False)
    found = {(int(at), int(index)) for at, index in top(scores, 19 / scores.numel()).nonzero()}
    of_planted = restored(pair, scores, [0.05], settings.draws, settings.seed)
    say(table(of_planted))
    everything = torch.ones_like(scores, dtype=torch.bool)
    itself = pair_with(start)
    figures = {
        "planted": {
            "planted": len(planted), "found": len(planted & found),
            "restored_top": of_planted["top"][0.05]["restored"],
            "restored_random": [row["restored"] for row in of_planted["random"][0.05]]},
        "self_patch_identical": answers(start, start, None, itself.rows, tokenizer, 32)
        == answers(start, start, everything, itself.rows, tokenizer, 32),
    }
    say(f"{figures['planted']['found']} of the 19 are among the 19 most changed; patching a model "
        f"with itself changes {'nothing' if figures['self_patch_identical'] else 'ANSWERS'}")

    run_folder = str(Path(settings.out, "run"))
    learning.tiny_run(run_folder, settings.seed)
    path = str(Path(run_folder, "final", "actor"))
    aligned, _ = load_policy(RunSettings(
        model=path, policy=path, device="cpu", dtype="float32", output_dir="unused"))
    pair = pair_with(aligned)
    scores = pair.scores(of_prompts=False)
    of_run_ = restored(pair, scores, [0.05, 0.2, 1.0], settings.draws, settings.seed)
    say(table(of_run_))
    write(settings, scores, of_run_)
    figures["repo"] = {"restored_top": of_run_["top"][0.05]["restored"],
                       "restored_all": of_run_["top"][1.0]["restored"]}
    return figures


if __name__ == "__main__":
    outlive_readers()
    arguments, named = sys.argv[1:], []
    while arguments and not arguments[0].startswith("--"):
        named.append(arguments.pop(0))
    sys.exit(learning.main_of(NeuronSettings, run, argv=[
        *(["--models", *named] if named else []), *arguments]))
