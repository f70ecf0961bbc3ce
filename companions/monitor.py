"""A streaming monitor reads an answer while it is written, and stops it when it turns harmful.

    python -m companions.monitor                                    # shows itself in the tiny world
    python -m companions.monitor train --model BODY --data ROWS --out M
    python -m companions.monitor score --monitor M|RUN --data ROWS
    python -m companions.monitor watch --policy P --monitor M|RUN --dataset PROMPTS --theta T --k K

After arXiv 2506.09996. A head gives each token y_i of an answer a score z_i; the answer is stopped
once k tokens have had z_i >= theta. A RUN's own cost critic, final/cost_critic, is such a monitor
without further training: it judges every prefix already.

ROWS have the columns prompt, response, safe and, optionally, harmful_spans: [[from, to], ...] in
the answer's characters.
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
from plumbing.settings import option
from tiny_configs import world

# ---- the three commands


@dataclass
class TrainSettings(learning.Settings):
    """Train a monitor on answers that are labelled safe or unsafe."""

    alpha: float = option(1.0, "weight of the tokens' loss; 1 - alpha weighs the whole answer's")
    logic_weight: float = option(1.0, "weight of the loss that couples the two")

    def check(self) -> None:
        require(self.model != "tiny", "--model is missing")
        super().check()


@dataclass
class OnModels(learning.Common):
    """Settings of score and watch."""

    monitor: str | None = option(None, "a monitor, or a run, for its cost critic")
    theta: float | None = option(None, "a token with this score or more counts")
    k: int = option(1, "stop an answer after k such tokens")

    def check(self) -> None:
        super().check()
        for name in self.NEEDED:
            require(getattr(self, name) is not None, f"--{name} is missing")
        self.require_positive("k")


@dataclass
class ScoreSettings(OnModels):
    """Measure which of the given answers a monitor would stop."""

    NEEDED = "monitor", "data"
    data: str | None = option(None, "rows with prompt, response, safe and, optionally, "
                                   "harmful_spans")


@dataclass
class WatchSettings(OnModels):
    """Stop a policy's answers while it writes them."""

    NEEDED = "policy", "monitor", "dataset", "theta"
    policy: str | None = option(None, "the policy that answers")
    dataset: str | None = option(None, "prompts")
    max_prompts: int = option(16, "answer at most N prompts")
    max_response_length: int = option(64, "most tokens of an answer")


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
                                    "text only")
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
    """Measures given answers. Without --theta half of them choose it."""
    run = settings.config_for(settings.monitor)
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
    run = settings.config_for(settings.policy, max_response_length=settings.max_response_length)
    policy, tokenizer = load_policy(run)
    check_blind(tokenizer, f"--policy {settings.policy}")
    monitor, its_tokenizer = load_monitor(settings, run)
    prompts = load_prompts(settings.dataset)[:settings.max_prompts]
    require(reads_alike(its_tokenizer, tokenizer),
            f"--monitor {settings.monitor}: its tokenizer is not that of --policy")
    answers, cost = streaming.watched(policy.to(run.device), tokenizer, monitor, prompts,
                                      settings.theta, settings.k, run)
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


# ---- itself, in the tiny world

@dataclass
class ShowSettings:
    """Compare three monitors in the tiny world: cost model, trained monitor, a run's critic."""

    run: str = option("runs/monitor/run", "a run of the tiny world; trained if missing")
    out: str = option("runs/monitor", "the folder for rows and monitor")
    seed: int = option(0, "seed of rows, monitor and run")
    json: str | None = option(None, "also write the figures to this file")

    def check(self) -> None:
        pass


def write_rows(file: Path, prompts: list[str], answers: int, rng: random.Random) -> str:
    """Random answers of the tiny world, with the spans that its judge calls harmful."""
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

    live = WatchSettings(policy=family["policy"], monitor=str(out / "monitor"), device="cpu")
    run = live.config_for(family["policy"], max_response_length=32)
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
