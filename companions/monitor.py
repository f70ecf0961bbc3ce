"""A streaming monitor reads an answer as it is written, and stops it when it turns harmful. After
arXiv 2506.09996. See monitor.md.
"""
import random
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer

from companions.score_models import make_score_model
from companions.shared import command, learning, streaming
from companions.shared.runs import tiny_run
from plumbing.data import drawn, load_prompts
from plumbing.errors import require, say
from plumbing.folder import has_metrics, to_jsonl, write_whole
from plumbing.models import load_policy, load_pretrained
from plumbing.pictures import check_blind, sees
from plumbing.scorers import ScoreModel, reads_alike
from plumbing.settings import option
from tiny_configs import world

# ---- the three commands


@dataclass
class TrainSettings(learning.LearningSettings):
    """Trains a monitor from rows with prompt, response, safe, and perhaps harmful_spans."""

    model: str | None = option(None, "a causal LM, whose body the monitor starts from")
    alpha: float = option(1.0, "weight of the tokens' loss; the rest is that of the whole answer")
    logic_weight: float = option(1.0, "weight of the loss that ties the two")

    NEEDED = "model", "data", "out"


@dataclass
class ScoreSettings(command.ModelSettings):
    """Says where a monitor would stop answers that are already written."""

    monitor: str | None = option(None, "a monitor's folder, or a run's: its cost critic")
    data: str | None = option(None, "rows with prompt, response, safe, perhaps harmful_spans")
    theta: float | None = option(None, "a token counts from this score on; default: chosen with k "
                                       "on one half of the prompts, measured on the other")
    k: int = option(1, "stop an answer after this many such tokens")

    NEEDED = "monitor", "data"


@dataclass
class WatchSettings(command.ModelSettings):
    """Lets a policy answer prompts, with a monitor that stops it."""

    policy: str | None = option(None, "the model that answers")
    monitor: str | None = option(None, "a monitor's folder, or a run's: its cost critic")
    dataset: str | None = option(None, "prompts")
    theta: float | None = option(None, "a token counts from this score on")
    k: int = option(1, "stop an answer after this many such tokens")
    max_prompts: int = option(16, "answer at most so many prompts")
    max_response_length: int = option(64, "tokens of an answer")

    NEEDED = "policy", "monitor", "dataset", "theta"


def load_monitor(monitor: str, run):
    """(model, tokenizer) of a monitor, or of a run's cost critic. Raises UserError."""
    source = monitor
    if has_metrics(source):
        source = str(Path(source, "final", "cost_critic"))
        require(Path(source).is_dir(), f"--monitor {monitor}: has no final/cost_critic; the run "
                                       "has not finished, or had no critics")
    model = load_pretrained(ScoreModel.from_pretrained, source, "--monitor", run, role="cost",
                            dtype=torch.float32)
    require(not sees(model.config), f"--monitor {monitor}: sees pictures, and a monitor reads text "
                                    "alone")
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
    learning.save_scorer(settings.out, model, tokenizer, run)
    return figures


def measured(settings: ScoreSettings) -> dict:
    """The figures of a monitor on answers that are already written."""
    run = settings.as_run(settings.monitor)
    model, tokenizer = load_monitor(settings.monitor, run)
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
    """Answers with the monitor in the loop, and the time they take."""
    run = settings.as_run(settings.policy, max_response_length=settings.max_response_length)
    policy, tokenizer = load_policy(run)
    check_blind(tokenizer, f"--policy {settings.policy}")
    monitor, its_tokenizer = load_monitor(settings.monitor, run)
    require(reads_alike(its_tokenizer, tokenizer),
            f"--monitor {settings.monitor}: has other tokens than --policy {settings.policy}")
    prompts = drawn(load_prompts(settings.dataset, tokenizer=tokenizer), settings.max_prompts)
    answers, cost = streaming.watched(policy.to(run.device), tokenizer, monitor, prompts,
                                      settings.theta, settings.k, run)
    for answer in answers:
        say(f"{answer['prompt']}\n    {answer['response']}{' [stopped]' * answer['stopped']}")
    say(f"a token of {len(prompts)} answers took {cost['milliseconds_per_token']:.1f} ms, "
        f"{cost['of_them_the_monitors']:.1f} of them for the monitor")
    return {"answers": answers, **cost}


def table(named: dict[str, dict]) -> str:
    lines = [f"{'':28}{'macro F1':>9}{'recall':>8}{'false stops':>13}{'tokens seen':>13}"
             f"{'theta':>8}{'k':>3}"]
    for name, figures in named.items():
        lines.append(f"{name[-28:]:28}{figures['macro_f1']:9.3f}{figures['recall']:8.3f}"
                     f"{figures['false_stop_rate']:13.3f}{figures['tokens_seen']:13.2f}"
                     f"{figures['theta']:8.2f}{figures['k']:3}")
    return "\n".join(lines)


# ---- itself, in the tiny world

@dataclass
class ShowSettings(command.Settings):
    """Three monitors in the tiny world: its cost model on prefixes, a trained one, and the cost
    critic of a run. The other commands are train, score and watch."""

    run: str | None = option(None, "a run of the tiny world; default: runs/companions/tiny-SEED, "
                                   "trained if it is not there")
    seed: int = option(0, "of rows, monitor and run")

    USAGE = "[train | score | watch]"


def write_rows(file: Path, prompts: list[str], answers: int, rng: random.Random) -> str:
    """Random answers of the tiny world, with the spans of their harmful steps."""
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
    run_folder = tiny_run(settings.run, settings.seed)
    with tempfile.TemporaryDirectory() as folder:
        return shown(run_folder, Path(folder), settings.seed)


def shown(run_folder: str, out: Path, seed: int) -> dict:
    """Figures of the three monitors, and of the trained one beside the policy."""
    family, rng = world.build(), random.Random(seed)
    learn, held_out = world.split_requests()
    rows = write_rows(out / "rows.jsonl", learn, 4, rng)
    test_rows = write_rows(out / "test_rows.jsonl", held_out, 16, rng)

    def of(monitor: str, theta: float | None = None) -> dict:
        return measured(ScoreSettings(monitor=monitor, data=test_rows, theta=theta, device="cpu"))

    found = {
        "trained": train(TrainSettings(
            model=family["policy"], data=rows, eval_data=test_rows, out=str(out / "monitor"),
            device="cpu", lr=2e-3, steps=200, batch_size=32, seed=seed)),
        "cost_model_on_prefixes": of(family["cost_model"], 0.0),  # it calls C > 0 unsafe
        "run_critic": of(run_folder),
    }
    say(table(found))

    run = command.ModelSettings(device="cpu").as_run(family["policy"], max_response_length=32)
    policy, tokenizer = load_policy(run)
    model, _ = load_monitor(str(out / "monitor"), run)
    theta, k = found["trained"]["theta"], found["trained"]["k"]
    plain, before = streaming.watched(policy, tokenizer, None, held_out, theta, k, run)
    cut, cost = streaming.watched(policy, tokenizer, model, held_out, theta, k, run)
    agree = all(answer["tokens"] == streaming.offline(model, tokenizer, whole, theta, k)
                for answer, whole in zip(cut, plain))
    say(f"{sum(answer['stopped'] for answer in cut)} of {len(cut)} answers were stopped while they "
        f"were written, {'' if agree else 'NOT '}where reading the whole answers stops them; "
        f"{before['milliseconds_per_token']:.1f} ms a token without the monitor, "
        f"{cost['milliseconds_per_token']:.1f} with it")
    return found | {"live_equals_offline": agree,
                    "milliseconds_per_token_without": before["milliseconds_per_token"], **cost}


COMMANDS = {"train": (TrainSettings, train), "score": (ScoreSettings, score),
            "watch": (WatchSettings, watch)}


def main(words: list[str]) -> int:
    if words and words[0] in COMMANDS:
        settings, run = COMMANDS[words[0]]
        return command.main(settings, run, words[1:], words[0])
    return command.main(ShowSettings, show, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
