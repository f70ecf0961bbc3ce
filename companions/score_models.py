"""Reward and cost models for RePO, from preference pairs.

    python companions/score_models.py --role cost              # shows itself in the tiny world
    python companions/score_models.py --role reward --model BODY --data PAIRS --out DIR

A reward model learns which of two answers is better: Bradley-Terry, -log sigmoid(r_b - r_w). A cost
model learns which is more harmful, and each answer's sign, as Safe RLHF's do: above 0 is unsafe.
Pairs come in the columns of PKU-SafeRLHF (prompt, response_0, response_1, better_response_id,
safer_response_id, is_response_0_safe, is_response_1_safe) or of HH-RLHF (chosen, rejected), which
knows no signs. What is written is the Beaver layout, as repo.py loads it.
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from companions.learning import (  # noqa: E402
    Settings,
    learn_and_held_out,
    load_body,
    main_of,
    save,
    teach,
)
from plumbing.confidence import wilson  # noqa: E402
from plumbing.errors import blame, require, say  # noqa: E402
from plumbing.fitting import cost_loss, preference_loss, scores_of  # noqa: E402
from plumbing.models import ScoreModel, merged, save_score_model  # noqa: E402
from plumbing.prompts import encode_pairs, read_rows, to_pair  # noqa: E402
from plumbing.settings import option  # noqa: E402

TINY = {
    "data": "preferences.jsonl", "eval_data": "preferences_held_out.jsonl",
    "lr": 2e-3, "steps": 600, "batch_size": 32,
}


class Pair(NamedTuple):
    """Two answers to a prompt, as token ids from the prompt's first on."""

    prompt: str
    better: list[int]         # the safer one, for a cost model
    worse: list[int]
    is_unsafe: tuple | None   # whether better, whether worse is; None where nobody has said


@dataclass
class ScoreSettings(Settings):
    """A reward or a cost model from preference pairs."""

    role: Literal["reward", "cost"] = option("reward", "which of the two")
    max_tokens: int = option(512, "longer conversations are left out")


def pairs_of(source: str, flag: str, settings: ScoreSettings, tokenizer):
    """(prompts, pairs) of a file. Raises UserError for columns of no known kind, and for a cost
    model where nobody has said what is safe."""
    rows = read_rows(source, flag)
    columns = set(rows.column_names)
    better_id = "better_response_id" if settings.role == "reward" else "safer_response_id"
    if {"prompt", "response_0", "response_1", better_id} <= columns:
        read = read_two_responses(better_id, "is_response_0_safe" in columns)
    elif {"chosen", "rejected"} <= columns:
        read = read_chosen
    else:
        require(False, f"{flag} {source}: has the columns {', '.join(rows.column_names)}, but "
                       f"neither prompt, response_0, response_1, {better_id} nor chosen, rejected")
    with blame(f"{flag} {source}: a row does not hold what its columns promise"):
        texts = [read(row) for row in rows]
    require(settings.role == "reward" or all(unsafe for *_, unsafe in texts),
            f"{flag} {source}: says of no answer whether it is safe (is_response_0_safe), which a "
            "cost model learns")

    answers = [(prompt, answer) for prompt, *two, _ in texts for answer in two]
    ids = iter(prompt + answer for prompt, answer in encode_pairs(answers, tokenizer))
    pairs = [Pair(prompt, next(ids), next(ids), unsafe) for prompt, _, _, unsafe in texts]
    kept = [pair for pair in pairs
            if max(len(pair.better), len(pair.worse)) <= settings.max_tokens]
    require(kept, f"{flag} {source}: every pair is longer than --max_tokens {settings.max_tokens}")
    say(f"{flag} {source}: {len(kept):,} pairs; {len(pairs) - len(kept):,} longer than "
        "--max_tokens left out")
    return [pair.prompt for pair in kept], kept


def read_two_responses(better_id: str, has_signs: bool):
    """PKU-SafeRLHF: row -> (prompt, better, worse, whether each is unsafe)."""
    def read(row: dict) -> tuple:
        better = int(row[better_id])
        ids = better, 1 - better
        unsafe = tuple(not row[f"is_response_{i}_safe"] for i in ids) if has_signs else None
        return row["prompt"], *(row[f"response_{i}"] for i in ids), unsafe

    return read


def read_chosen(row: dict) -> tuple:
    """HH-RLHF: two conversations that differ in their last answer."""
    prompt, better = to_pair(row["chosen"])
    _, worse = to_pair(row["rejected"])
    return prompt, better, worse, None


def make_score_model(policy, run) -> ScoreModel:
    """The policy's body with a head of zeros; with --lora_rank the body learns by its adapters."""
    model = ScoreModel(policy.base_model.config, policy.base_model)
    nn.init.zeros_(model.score_head.weight)
    nn.init.zeros_(model.score_head.bias)
    return model.to(run.device)


def scored(model, pairs: list[Pair], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the better and of the worse answers: [B], [B]."""
    rows = [pair.better for pair in pairs] + [pair.worse for pair in pairs]
    return scores_of(model, rows, pad_id).chunk(2)


def loss_of(model, pairs: list[Pair], role: str, pad_id: int) -> torch.Tensor:
    better, worse = scored(model, pairs, pad_id)                                         # [B], [B]
    if role == "reward":
        return preference_loss(better - worse)
    is_unsafe = torch.tensor([pair.is_unsafe for pair in pairs], device=better.device)   # [B, 2]
    return cost_loss(worse - better, torch.stack([better, worse], 1), is_unsafe)


@torch.no_grad()
def accuracies(model, pairs: list[Pair], settings: ScoreSettings, pad_id: int) -> dict:
    """On held-out pairs: share in the right order and, for a cost model, of answers with the right
    sign; each with its 95 % interval."""
    better, worse = [], []
    for start in range(0, len(pairs), settings.batch_size):
        a, b = scored(model, pairs[start:start + settings.batch_size], pad_id)
        better, worse = better + a.tolist(), worse + b.tolist()
    is_reward = settings.role == "reward"
    found = {"pair_accuracy": [(a > b) == is_reward for a, b in zip(better, worse)]}
    if not is_reward:
        found["sign_accuracy"] = [
            (score > 0) == is_unsafe for pair, scores in zip(pairs, zip(better, worse))
            for score, is_unsafe in zip(scores, pair.is_unsafe)]
    figures = {}
    for name, right in found.items():
        share = sum(right) / len(right)
        figures |= {name: share, f"{name}_interval": wilson(share, len(right), 0.95)}
    return figures


def run(settings: ScoreSettings) -> dict:
    """Trains, tells the accuracies, saves; returns the figures."""
    torch.manual_seed(settings.seed)
    policy, tokenizer, as_run = load_body(settings)
    model, pad_id = make_score_model(policy, as_run), tokenizer.pad_token_id
    learn, held_out = learn_and_held_out(
        partial(pairs_of, settings=settings, tokenizer=tokenizer), settings)
    teach(model, lambda pairs: loss_of(model, pairs, settings.role, pad_id), learn, settings,
          as_run)
    figures = {"pairs": len(learn), "held_out_pairs": len(held_out),
               **accuracies(model, held_out, settings, pad_id)}
    for name in ("pair_accuracy", "sign_accuracy"):
        if name in figures:
            low, high = figures[f"{name}_interval"]
            say(f"{name} {figures[name]:.3f} on held-out pairs (95 %: {low:.3f} to {high:.3f})")
    if settings.out:
        save(settings.out, model, tokenizer, lambda folder: save_score_model(
            folder, model, merged(model.state_dict()), getattr(torch, as_run.dtype)))
    return figures


if __name__ == "__main__":
    sys.exit(main_of(ScoreSettings, run, TINY))
