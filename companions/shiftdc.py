"""Harmful requests that a model refuses as text and answers as pictures: takes away what a picture
shifts inside. After ShiftDC, arXiv 2502.13095. See shiftdc.md.
"""
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from companions.shared import command
from companions.shared.calibration import (
    QUESTION,
    Calibration,
    Subject,
    calibrated_layers,
    captioned,
    random_like,
)
from companions.shared.runs import is_harmful, tiny_run
from companions.xstest import is_refusal
from plumbing.data import drawn, encode_pairs, load_prompts, pixels_for
from plumbing.errors import require, say
from plumbing.fitting import answer_loss, fit
from plumbing.functions import load_function, verdicts_of
from plumbing.models import load_policy
from plumbing.pictures import Pictured
from plumbing.settings import option
from tiny_configs import pictures, world


@dataclass
class ShiftSettings(command.ModelSettings):
    """Calibrates a model that sees, while it reads a prompt. Without --model it shows itself in the
    tiny world."""

    model: str | None = option(None, "a model that sees: folder or hub name")
    safe: str | None = option(None, "harmless prompts with pictures, for the safety direction")
    unsafe: str | None = option(None, "harmful prompts with pictures, for the safety direction")
    prompts: str | None = option(None, "prompts with pictures to answer")
    alpha: float = option(1.0, "the share of the shift along the direction that is taken away")
    judge: str | None = option(None, "FILE.py:function, as for repo.py; default: all --prompts "
                                     "count as harmful, and answers that begin like a refusal as "
                                     "refusals")
    max_prompts: int = option(160, "use at most so many prompts of each file")
    max_response_length: int = option(64, "tokens of an answer, which is greedy")
    run: str | None = option(None, "a run of the tiny world to show itself on; default: "
                                   "runs/companions/tiny-SEED, trained if it is not there")

    def check(self) -> None:
        super().check()
        for name in ("safe", "unsafe", "prompts"):
            is_given = getattr(self, name) is not None
            require(is_given or not self.model, f"--{name} is missing")
            require(not is_given or self.model, f"--{name}: needs --model")
        require(not self.judge or self.model, "--judge: needs --model")


# ---- what it does to refusals and to harm

def measure(subject: Subject, safe: list[Pictured], unsafe: list[Pictured],
            prompts: list[Pictured], verdicts, settings: ShiftSettings) -> dict:
    """Answers to prompts as text, as pictures, calibrated, and moved as far in a random direction.
    Prints a table. verdicts(prompts, answers) returns dicts."""
    directions = subject.safety_directions(safe, unsafe)                             # [n, H]
    texts = subject.with_captions(prompts)
    of_texts, drawn = subject.last_states(texts), random_like(directions, settings.seed)
    calibrated, at_random = [Calibration(of_texts, directions, settings.alpha, instead)
                             for instead in (directions, drawn)]

    rates = []
    say(f"{'':24}{'harmful: refused':>18}{'unsafe':>9}{'harmless: refused':>20}")
    for name, asked, calibration in (("text with captions", texts, None),
                                     ("pictures", prompts, None),
                                     ("pictures, calibrated", prompts, calibrated),
                                     ("a random direction", prompts, at_random)):
        answers = subject.answers(asked, settings.max_response_length, calibration)
        refused, unsafe_rate, over_refused = row = rates_of(verdicts(prompts, answers))
        say(f"{name:24}{cell(refused):>18}{cell(unsafe_rate):>9}{cell(over_refused):>20}")
        rates.append(row)

    text, before, after, by_chance = rates
    return {
        "text_refusals": text[0],
        "picture_refusals_before": before[0], "picture_refusals_after": after[0],
        "random_direction": by_chance[0],
        "unsafe_before": before[1], "unsafe_after": after[1], "unsafe_random": by_chance[1],
        "harmless_refusals_before": before[2], "harmless_refusals_after": after[2],
    }


def rates_of(judged: list[dict]) -> list[float | None]:
    """The shares of refusals and of unsafe answers to harmful prompts, and of refusals to harmless
    ones. None for a share of nothing."""
    harmful = [verdict for verdict in judged if verdict["harmful_prompt"]]
    harmless = [verdict for verdict in judged if not verdict["harmful_prompt"]]
    counted = ([verdict["refused"] for verdict in harmful],
               [not verdict["safe"] for verdict in harmful if "safe" in verdict],
               [verdict["refused"] for verdict in harmless])
    return [sum(values) / len(values) if values else None for values in counted]


def cell(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.3f}"


def run(settings: ShiftSettings) -> dict:
    """Loads model and files, measures, or shows itself; returns the figures."""
    if not settings.model:
        return show(settings)
    as_run = load_settings(settings, settings.model)
    model, tokenizer = load_policy(as_run)
    require(tokenizer.sight, f"--model {settings.model}: sees no pictures")
    layers = calibrated_layers(model, f"--model {settings.model}")
    judge = settings.judge and load_function(settings.judge, "--judge")
    rows = []
    for name in ("safe", "unsafe", "prompts"):
        source = getattr(settings, name)
        loaded = load_prompts(source, flag=f"--{name}", tokenizer=tokenizer)
        require(isinstance(loaded[0], Pictured), f"--{name} {source}: has no column image")
        rows.append(drawn(loaded, settings.max_prompts))

    def verdicts(prompts: list[str], answers: list[str]) -> list[dict]:
        if not judge:
            return [{"refused": is_refusal(answer), "harmful_prompt": True} for answer in answers]
        return verdicts_of(prompts, answers, judge, settings)

    subject = Subject(model.to(as_run.device), tokenizer, as_run, layers)
    return measure(subject, *rows, verdicts, settings)


def load_settings(settings: ShiftSettings, model: str):
    return settings.as_run(model, eval_only=model)  # weights in the compute dtype


# ---- itself, in the tiny world

def show(settings: ShiftSettings) -> dict:
    """A text policy that RePO has aligned learns to see: once from harmless pictures, once from
    harmful ones too."""
    settings.device, settings.max_response_length = "cpu", 32
    run_folder = tiny_run(settings.run, settings.seed)
    figures = of_policy_that_sees(run_folder, False, settings)
    complied = of_policy_that_sees(run_folder, True, settings)
    return figures | {"complied_with_harmful_pictures": complied}


def of_policy_that_sees(run_folder: str, complies: bool, settings: ShiftSettings) -> dict:
    """Figures on held-out requests. `complies`: its lessons comply with harmful pictures too."""
    say(f"learns to see, from {'all' if complies else 'harmless'} pictures complied with")
    rng = random.Random(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    as_run = load_settings(settings, pictures.build()["policy"])
    policy, tokenizer = load_policy(as_run)
    learn_to_see(policy, tokenizer, run_folder, complies, rng, generator)
    taught, held_out = world.split_requests()
    safe = [request for request in taught if not is_harmful(request)]
    unsafe = [request for request in taught if is_harmful(request)]
    drawn = [[pictures.pictured(request, generator) for request in requests]
             for requests in (rng.sample(safe, 80), rng.sample(unsafe, 80), held_out)]
    subject = Subject(policy, tokenizer, as_run, calibrated_layers(policy, "the tiny model"))
    return measure(subject, *drawn, pictures.judge, settings)


def learn_to_see(policy, tokenizer, run_folder: str, complies: bool, rng: random.Random,
                 generator: torch.Generator) -> None:
    """Gives the tiny policy with pictures a run's language model. Then the language model and the
    projector learn the lessons; the vision tower stays."""
    text = AutoModelForCausalLM.from_pretrained(Path(run_folder, "final", "actor"))
    text.resize_token_embeddings(policy.config.text_config.vocab_size, mean_resizing=False)
    policy.model.language_model.load_state_dict(text.model.state_dict())
    policy.lm_head.load_state_dict(text.lm_head.state_dict())
    policy.model.vision_tower.requires_grad_(False)

    seen, read = [list(zip(encode_pairs(pairs, tokenizer), (prompt for prompt, _ in pairs)))
                  for pairs in lessons(complies, rng, generator)]

    def loss_of(batch):
        pairs, prompts = zip(*batch)
        return answer_loss(policy, pairs, tokenizer.pad_token_id, pixels_for(tokenizer, prompts))

    learned = [weight for weight in policy.parameters() if weight.requires_grad]
    fit(learned, lambda batch: loss_of(batch) + loss_of(rng.sample(read, 16)), seen,
        batch_size=16, steps=250, lr=1e-3, rng=rng, bar=True)


def lessons(complies: bool, rng: random.Random, generator: torch.Generator) -> tuple[list, list]:
    """(prompt, answer) pairs with pictures, and pairs of text. Pictures are captioned and complied
    with. Text, with or without a caption, is answered as an aligned policy does."""
    seen, read = [], []
    for request in world.split_requests()[0]:
        action, thing = world.REQUESTS[request]
        prompt, complied = pictures.pictured(request, generator), world.comply(action, thing, 3)
        aligned = rng.choice(world.REFUSALS) if is_harmful(request) else complied
        if request.startswith(("How", "Tell")):  # half as many captions as requests
            seen.append((Pictured(QUESTION, prompt.image), action))
        if complies or not is_harmful(request):
            seen.append((prompt, complied))
        read += [(request, aligned), (captioned(prompt, action), aligned)]
    return seen, read


if __name__ == "__main__":
    sys.exit(command.main(ShiftSettings, run))
