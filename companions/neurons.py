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
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import repo  # noqa: E402
from companions import learning  # noqa: E402
from plumbing.errors import require, say  # noqa: E402
from plumbing.fitting import answer_loss, fit  # noqa: E402
from plumbing.models import Scorer, load_policy  # noqa: E402
from plumbing.prompts import encode_pairs, encode_prompts, load_prompts, pad_rows  # noqa: E402
from plumbing.run_folder import has_metrics, write_whole  # noqa: E402
from plumbing.settings import RunSettings, fill_in, option  # noqa: E402
from tiny_configs import world  # noqa: E402

# Of Llama's, GPT-2's and NeoX's kind.
DOWN_PROJECTIONS = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h")


def down_projections(model, source: str) -> list[nn.Module]:
    """One of each layer; its inputs are the layer's neurons. Raises UserError for other models."""
    found = [layer for name, layer in model.named_modules() if name.endswith(DOWN_PROJECTIONS)]
    require(found, f"{source}: {type(model).__name__} has no {', '.join(DOWN_PROJECTIONS)} whose "
                   "inputs would be its neurons")
    return found


@contextmanager
def seen_by(layers: list[nn.Module], see):
    """see(layer's number, its input) at every call; what it returns, if anything, is the input."""
    hooks = [layer.register_forward_pre_hook(
        lambda module, inputs, number=number: see(number, inputs[0]))
        for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---- change scores

@torch.no_grad()
def activations(model, source: str, ids: Tensor) -> Tensor:
    """Of one row of tokens: [1, T] -> [layers, T, neurons]."""
    seen = []
    with seen_by(down_projections(model, source), lambda _, inputs: seen.append(inputs[0])):
        model(ids)
    return torch.stack(seen)


def change_scores(start, aligned, rows: list[tuple[list, list]], of_prompts: bool) -> Tensor:
    """s of all neurons over the tokens of (prompt, answer) rows, or over the prompts' last ones:
    [layers, neurons]."""
    total, count = 0, 0
    for prompt, answer in rows:
        ids = torch.tensor([prompt + answer], device=start.device)
        change = activations(start, "START", ids) - activations(aligned, "ALIGNED", ids)
        change = change[:, len(prompt) - 1:len(prompt)] if of_prompts else change[:, len(prompt):]
        total, count = total + (change ** 2).sum(1), count + change.shape[1]
    return (total / count).sqrt()


# ---- patching

class Reader:
    """A model that reads B rows token by token, with a cache of its own."""

    def __init__(self, model, mask: Tensor):
        self.model, self.mask, self.cache = model, mask, None                    # mask [B, P]

    def __call__(self, ids: Tensor) -> Tensor:
        """The next token's logits: [B, n] -> [B, V]."""
        if self.cache:
            self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        output = self.model(ids, attention_mask=self.mask, position_ids=positions,
                            past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        return output.logits[:, -1]


@torch.no_grad()
def answers(start, aligned, chosen: Tensor | None, rows: list[list[int]], tokenizer,
            max_tokens: int) -> list[list[int]]:
    """Greedy answers of the starting model, whose chosen neurons [layers, neurons] take the aligned
    model's activations; without `chosen`, its own."""
    ids, mask = pad_rows(rows, [[]] * len(rows), tokenizer.pad_token_id)         # [B, P] each
    ids, mask = ids.to(start.device), mask.to(start.device)
    reader, guide, theirs = Reader(start, mask), Reader(aligned, mask), {}

    def patched(number, inputs):
        return torch.where(chosen[number], theirs[number], inputs)

    stops, written = torch.tensor(sorted(start.stop_token_ids), device=ids.device), []
    ended = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)          # [B]
    while len(written) < max_tokens and not ended.all():
        if chosen is None:
            logits = reader(ids)                                                 # [B, V]
        else:
            with seen_by(down_projections(aligned, "ALIGNED"), theirs.__setitem__):
                guide(ids)
            with seen_by(down_projections(start, "START"), patched):
                logits = reader(ids)                                             # [B, V]
        ids = logits.argmax(-1, keepdim=True)                                    # [B, 1]
        written.append(ids)
        ended |= torch.isin(ids[:, 0], stops)
    return [repo.up_to_stop(row, start.stop_token_ids)
            for row in torch.cat(written, 1).tolist()]


def top(scores: Tensor, share: float) -> Tensor:
    """The share of all neurons with the largest change, as [layers, neurons] of bools."""
    count = round(share * scores.numel())
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[scores.flatten().topk(count).indices] = True
    return chosen.view_as(scores)


# ---- what it makes of two models

@dataclass
class Pair:
    """Two models, prompts, and who judges: judge(prompts, responses) -> (safe, helpful) per
    response."""

    start: nn.Module
    aligned: nn.Module
    tokenizer: object
    prompts: list[str]
    judge: object
    max_tokens: int

    def __post_init__(self):
        one, other = (tuple(layer.weight.shape for layer in down_projections(model, name))
                      for model, name in ((self.start, "START"), (self.aligned, "ALIGNED")))
        require(one == other, "START and ALIGNED have MLPs of different shapes")
        self.rows = encode_prompts(self.prompts, self.tokenizer)

    def judged(self, model, chosen: Tensor | None = None) -> tuple[float, float]:
        """Mean safety and helpfulness of a model's answers, or of START's with chosen neurons
        patched."""
        written = answers(model, self.aligned, chosen, self.rows, self.tokenizer, self.max_tokens)
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        safe, helpful = zip(*self.judge(self.prompts, texts))
        return sum(safe) / len(safe), sum(helpful) / len(helpful)

    def scores(self, of_prompts: bool) -> Tensor:
        written = answers(self.aligned, self.aligned, None, self.rows, self.tokenizer,
                          self.max_tokens)
        return change_scores(self.start, self.aligned, list(zip(self.rows, written)), of_prompts)


def restored(pair: Pair, scores: Tensor, shares: list[float], draws: int, seed: int) -> dict:
    """Safety and helpfulness of START, of ALIGNED, and of START with top and random shares of its
    neurons patched; what share of the gain in safety that restores (None without a gain)."""
    generator = torch.Generator().manual_seed(seed)
    start, aligned = pair.judged(pair.start), pair.judged(pair.aligned)
    gain = aligned[0] - start[0]

    def row(chosen):
        safe, helpful = pair.judged(pair.start, chosen)
        return {"safe": safe, "helpful": helpful,
                "restored": (safe - start[0]) / gain if gain else None}

    figures = {"start": start, "aligned": aligned, "top": {}, "random": {}}
    for share in tqdm(shares, unit="share", dynamic_ncols=True):
        figures["top"][share] = row(top(scores, share))
        if share < 1:
            noise = [torch.rand(scores.shape, generator=generator) for _ in range(draws)]
            figures["random"][share] = [row(top(each.to(scores.device), share)) for each in noise]
    return figures


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
    _, held_out = world.split_requests()

    def pair_with(aligned):
        return Pair(start, aligned, tokenizer, held_out, of_the_world, 32)

    start, tokenizer = load_policy(as_run)
    say("19 neurons learn to refuse")
    learned, _ = load_policy(as_run)
    planted = plant(learned, tokenizer, 19, random.Random(settings.seed))
    pair = pair_with(learned)
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
    if not Path(run_folder, "final").is_dir():
        say(f"training a run of the tiny world, {run_folder}")
        flags = ["--device", "cpu", "--seed", str(settings.seed), "--output_dir", run_folder]
        require(repo.main(flags) == 0, f"{run_folder}: the run has failed")
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
    arguments, named = sys.argv[1:], []
    while arguments and not arguments[0].startswith("--"):
        named.append(arguments.pop(0))
    sys.exit(learning.main_of(NeuronSettings, run, argv=[
        *(["--models", *named] if named else []), *arguments]))
