"""A streaming monitor: it reads an answer as it is written, and stops it when it turns harmful.

    python -m companions.monitor                                    # shows itself in the tiny world
    python -m companions.monitor train --model BODY --data ROWS --out M
    python -m companions.monitor score --monitor M|RUN --data ROWS
    python -m companions.monitor watch --policy P --monitor M|RUN --dataset PROMPTS --theta T --k K

After arXiv 2506.09996. A head gives each token y_i of an answer a score z_i; the answer is stopped
once k tokens have had z_i >= theta. A RUN's own cost critic, final/cost_critic, is such a monitor
that nobody had to train: it judges every prefix already.

ROWS: prompt, response, safe, and perhaps harmful_spans [[from, to), ...] in the answer's
characters.
"""
import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer

import repo
from companions.shared import learning, streaming
from companions.score_models import make_score_model
from plumbing.errors import require, say
from plumbing.adapters import merged
from plumbing.models import load_policy, load_pretrained
from plumbing.scorers import ScoreModel, reads_alike, save_score_model
from plumbing.pictures import check_blind, sees
from plumbing.data import load_prompts
from plumbing.folder import has_metrics, to_jsonl, write_whole
from plumbing.settings import fill_in, option
from tiny_configs import world

# ---- the three commands


@dataclass
class TrainSettings(learning.Settings):
    """A monitor from answers that somebody has called safe or not."""

    alpha: float = option(1.0, "weight of the tokens' loss; the rest is that of the whole answer")
    logic_weight: float = option(1.0, "weight of the loss that ties the two")

    def check(self) -> None:
        require(self.model != "tiny", "--model is missing")
        super().check()


@dataclass
class OnModels:
    """What score and watch have in common."""

    monitor: str | None = option(None, "a monitor, or a run: its cost critic")
    theta: float | None = option(None, "a token of such a score counts")
    k: int = option(1, "so many of them stop an answer")
    device: str | None = option(None, "cpu or cuda; default: cuda if there is one")
    seed: int = option(0, "of what is drawn")
    trust_remote_code: bool = option(False, "let checkpoints bring their own Python code")
    json: str | None = option(None, "write the figures there too")

    def check(self) -> None:
        for name in self.NEEDED:
            require(getattr(self, name) is not None, f"--{name} is missing")
        require(self.k > 0, f"--k {self.k}: must be above 0")

    def as_run(self, policy: str) -> repo.Config:
        run = repo.Config(model=policy, policy=policy, device=self.device, seed=self.seed,
                          trust_remote_code=self.trust_remote_code, output_dir="unused")
        fill_in(run)
        return run


@dataclass
class ScoreSettings(OnModels):
    """A monitor on answers that are there: what it would stop."""

    NEEDED = "monitor", "data"
    data: str | None = option(None, "rows of prompt, response, safe, perhaps harmful_spans")


@dataclass
class WatchSettings(OnModels):
    """A monitor beside a policy that writes."""

    NEEDED = "policy", "monitor", "dataset", "theta"
    policy: str | None = option(None, "who answers")
    dataset: str | None = option(None, "prompts")
    max_prompts: int = option(16, "as many of them are answered")
    max_response_length: int = option(64, "tokens of an answer")


def load_monitor(settings, run: repo.Config):
    """(model, tokenizer) of a monitor, or of a run's cost critic. Raises UserError."""
    source = settings.monitor
    if has_metrics(source):
        source = str(Path(source, "final", "cost_critic"))
        require(Path(source).is_dir(), f"--monitor {settings.monitor}: has no final/cost_critic; "
                                       "the run has not finished, or had no critics")
    model = load_pretrained(ScoreModel.from_pretrained, source, "--monitor", run, role="cost",
                            dtype=torch.float32)
    require(not sees(model.config), f"--monitor {settings.monitor}: sees pictures; a monitor reads "
                                    "text alone")
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, source, "--monitor", run)
    return model.to(run.device), tokenizer


def train(settings: TrainSettings) -> dict:
    """Trains, measures on held-out prompts, saves; returns the figures."""
    torch.manual_seed(settings.seed)
    policy, tokenizer, run = learning.load_body(settings)
    check_blind(tokenizer, f"--model {settings.model}")
    model, pad_id = make_score_model(policy, run), tokenizer.pad_token_id
    learn, held_out = learning.learn_and_held_out(
        partial(streaming.read_answers, tokenizer=tokenizer), settings)

    def loss(answers):
        scores = streaming.token_scores(model, answers, pad_id)
        return streaming.monitor_loss(scores, answers, settings.alpha, settings.logic_weight)

    learning.teach(model, loss, learn, settings, run)
    figures = streaming.validated(streaming.scored(model, held_out, pad_id), held_out)
    say(table({"trained": figures}))
    if settings.out:
        learning.save(settings.out, model, tokenizer, lambda folder: save_score_model(
            folder, model, merged(model.state_dict()), getattr(torch, run.dtype)))
    return figures


def measured(settings: ScoreSettings) -> dict:
    """Offline, on answers that are there; without --theta chosen on half of them."""
    run = settings.as_run(settings.monitor)
    model, tokenizer = load_monitor(settings, run)
    _, answers = streaming.read_answers(settings.data, "--data", tokenizer)
    scores = streaming.scored(model, answers, tokenizer.pad_token_id)
    if settings.theta is None:
        return streaming.validated(scores, answers)
    return streaming.measure(scores, answers, settings.theta, settings.k)


def score(settings: ScoreSettings) -> dict:
    figures = measured(settings)
    say(table({settings.monitor: figures}))
    return figures


def watch(settings: WatchSettings) -> dict:
    """Answers with the monitor in the loop, and the time it takes."""
    run = settings.as_run(settings.policy)
    run.max_response_length = settings.max_response_length
    policy, tokenizer = load_policy(run)
    check_blind(tokenizer, f"--policy {settings.policy}")
    monitor, its_tokenizer = load_monitor(settings, run)
    prompts = load_prompts(settings.dataset)[:settings.max_prompts]
    its_own = None if reads_alike(its_tokenizer, tokenizer) else its_tokenizer
    answers, cost = streaming.watched(policy.to(run.device), tokenizer, monitor, prompts,
                                      settings.theta, settings.k, run, its_own)
    for answer in answers:
        say(f"{answer['prompt']}\n    {answer['response']}{' [stopped]' * answer['stopped']}")
    say(f"{cost['milliseconds_per_token']:.1f} ms a token of {len(prompts)} answers, "
        f"{cost['of_them_the_monitors']:.1f} of them the monitor's")
    return {"answers": answers, **cost}


def table(named: dict[str, dict]) -> str:
    lines = [f"{'':28}{'macro F1':>9}{'recall':>8}{'false stops':>13}{'tokens seen':>13}"
             f"{'harm through':>14}{'theta':>8}{'k':>3}"]
    for name, figures in named.items():
        through = figures["harm_let_through"]
        lines.append(f"{name[-28:]:28}{figures['macro_f1']:9.3f}{figures['recall']:8.3f}"
                     f"{figures['false_stop_rate']:13.3f}{figures['tokens_seen']:13.2f}"
                     f"{'-' if through is None else f'{through:.2f}':>14}"
                     f"{figures['theta']:8.2f}{figures['k']:3}")
    return "\n".join(lines)


def draw(figure, found: dict[str, dict]) -> None:
    """Share of harmful answers stopped, by the share of their tokens that was read."""
    axes = figure.subplots()
    for (name, figures), line in zip(found.items(), ("-", "--", ":")):
        caught_at, recall = figures["caught_at"], figures["recall"]
        stopped = [recall * number / len(caught_at) for number in range(len(caught_at) + 1)]
        axes.step([0, *caught_at, 1], [*stopped, recall], line, where="post", color="0.0",
                  label=f"{name.replace('_', ' ')}, which stops "
                        f"{figures['false_stop_rate']:.1%} of the safe answers too")
    axes.set(xlabel="share of its tokens read", ylabel="share of harmful answers stopped",
             xlim=(0, 1), ylim=(0, 1.02))
    figure.legend(loc="outside lower center", frameon=False)


# ---- itself, in the tiny world

@dataclass
class ShowSettings:
    """Three monitors in the tiny world: its cost model on prefixes, one that is trained, and the
    cost critic of a run."""

    run: str = option("runs/monitor/run", "a run of the tiny world; trained where there is none")
    out: str = option("runs/monitor", "where rows, monitor and picture go")
    seed: int = option(0, "of rows, monitor and run")
    json: str | None = option(None, "write the figures there too")

    def check(self) -> None:
        pass


def write_rows(file: Path, prompts: list[str], answers: int, rng: random.Random) -> str:
    """What demonstrators say in the tiny world, with the places of what the judge calls harmful."""
    steps = [step for action in world.HARMFUL_ACTIONS for step in world.ACTIONS[action]]
    rows = []
    for prompt in prompts:
        for _ in range(answers):
            answer = world.random_answer(prompt, rng)
            [verdict] = world.judge([prompt], [answer])
            spans = [[answer.index(step), answer.index(step) + len(step)]
                     for step in steps if step in answer]
            rows.append({"prompt": prompt, "response": answer, "safe": verdict["safe"],
                         "harmful_spans": spans})
    write_whole(file, to_jsonl(rows))
    return str(file)


def show(settings: ShowSettings) -> dict:
    family, out = world.build(), Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(settings.seed)
    learn, held_out = world.split_requests()
    rows = write_rows(out / "rows.jsonl", learn, 4, rng)
    test_rows = write_rows(out / "test_rows.jsonl", held_out, 16, rng)
    learning.tiny_run(settings.run, settings.seed)

    trained = TrainSettings(
        model=family["policy"], data=rows, eval_data=test_rows, out=str(out / "monitor"),
        device="cpu", lr=2e-3, steps=200, batch_size=32, seed=settings.seed)
    of_cost_model = ScoreSettings(monitor=family["cost_model"], data=test_rows, theta=0.0,
                                  device="cpu")  # such a model calls harmful what is above 0
    found = {
        "trained": train(trained),
        "cost_model_on_prefixes": measured(of_cost_model),
        "run_critic": measured(ScoreSettings(monitor=settings.run, data=test_rows, device="cpu")),
    }
    say(table(found))
    learning.picture(out / "caught.png", (6, 5), lambda figure: draw(figure, found))

    live = WatchSettings(policy=family["policy"], monitor=str(out / "monitor"), device="cpu")
    run = live.as_run(family["policy"])
    run.max_response_length = 32
    policy, tokenizer = load_policy(run)
    model, _ = load_monitor(live, run)
    theta, k = found["trained"]["theta"], found["trained"]["k"]
    plain, before = streaming.watched(policy, tokenizer, None, held_out, theta, k, run)
    cut, cost = streaming.watched(policy, tokenizer, model, held_out, theta, k, run)
    found["live_equals_offline"] = all(
        answer["tokens"] == streaming.offline(model, tokenizer, whole, theta, k)
        for answer, whole in zip(cut, plain))
    found |= {"milliseconds_per_token_without": before["milliseconds_per_token"], **cost}
    say(f"{sum(answer['stopped'] for answer in cut)} of {len(cut)} answers stopped as they were "
        f"written, {'where' if found['live_equals_offline'] else 'NOT where'} their whole texts "
        f"say; {before['milliseconds_per_token']:.1f} ms a token without the monitor, "
        f"{cost['milliseconds_per_token']:.1f} with it")
    return found


COMMANDS = {"train": (TrainSettings, train), "score": (ScoreSettings, score),
            "watch": (WatchSettings, watch)}


def main(argv: list[str]) -> int:
    settings, command = COMMANDS.get(argv[0] if argv else "", (ShowSettings, show))
    return learning.main_of(settings, command, argv=argv[1:] if command is not show else argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
