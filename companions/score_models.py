"""Reward and cost models for RePO, from preference pairs.

    python -m companions.score_models --role cost              # shows itself in the tiny world
    python -m companions.score_models --role reward --model BODY --data PAIRS --out DIR

A reward model learns which of two answers is better: Bradley-Terry, -log sigmoid(r_b - r_w). A cost
model learns which is more harmful, and each answer's sign, as Safe RLHF's do: above 0 is unsafe.
Pairs come in the columns of PKU-SafeRLHF (prompt, response_0, response_1, better_response_id,
safer_response_id, is_response_0_safe, is_response_1_safe) or of HH-RLHF (chosen, rejected), which
knows no signs. What is written is the Beaver layout, as repo.py loads it.
"""
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from companions.shared import learning
from plumbing.reports import wilson
from plumbing.errors import say
from plumbing.fitting import cost_loss, preference_loss, scores_of
from plumbing.adapters import merged
from plumbing.scorers import ScoreModel, save_score_model
from plumbing.data import pixels_for
from plumbing.preferences import Pair, load_preferences
from plumbing.settings import option

TINY = {
    "data": "preferences.jsonl", "eval_data": "preferences_held_out.jsonl",
    "lr": 2e-3, "steps": 600, "batch_size": 32,
}


@dataclass
class ScoreSettings(learning.Settings):
    """Train a reward model or a cost model on preference pairs."""

    role: Literal["reward", "cost"] = option("reward", "train a reward model or a cost model")
    max_tokens: int = option(512, "drop longer conversations")


def make_score_model(policy, run) -> ScoreModel:
    """The policy's body with a head of zeros; with --lora_rank the body learns by its adapters."""
    model = ScoreModel(policy.base_model.config, policy.base_model)
    nn.init.zeros_(model.score_head.weight)
    nn.init.zeros_(model.score_head.bias)
    return model.to(run.device)


def scored(model, pairs: list[Pair], tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the better and of the worse answers: [B], [B]."""
    rows = [pair.better for pair in pairs] + [pair.worse for pair in pairs]
    pictures = pixels_for(tokenizer, [pair.prompt for pair in pairs] * 2)
    return scores_of(model, rows, tokenizer.pad_token_id, pictures).chunk(2)


def loss_of(model, pairs: list[Pair], role: str, tokenizer) -> torch.Tensor:
    better, worse = scored(model, pairs, tokenizer)                                      # [B], [B]
    if role == "reward":
        return preference_loss(better - worse)
    is_unsafe = torch.tensor([pair.is_unsafe for pair in pairs], device=better.device)   # [B, 2]
    return cost_loss(worse - better, torch.stack([better, worse], 1), is_unsafe)


@torch.no_grad()
def accuracies(model, pairs: list[Pair], settings: ScoreSettings, tokenizer) -> dict:
    """On held-out pairs: share in the right order and, for a cost model, of answers with the right
    sign; each with its 95 % interval."""
    better, worse = [], []
    for start in range(0, len(pairs), settings.batch_size):
        a, b = scored(model, pairs[start:start + settings.batch_size], tokenizer)
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
    """Trains, prints the accuracies, saves; returns the figures."""
    torch.manual_seed(settings.seed)
    policy, tokenizer, as_run = learning.load_body(settings)
    model = make_score_model(policy, as_run)
    learn, held_out = learning.learn_and_held_out(
        lambda source, flag: load_preferences(source, flag, settings.role, tokenizer,
                                              settings.max_tokens), settings)
    learning.teach(model, lambda pairs: loss_of(model, pairs, settings.role, tokenizer), learn,
                   settings, as_run)
    figures = {"pairs": len(learn), "held_out_pairs": len(held_out),
               **accuracies(model, held_out, settings, tokenizer)}
    for name in ("pair_accuracy", "sign_accuracy"):
        if name in figures:
            low, high = figures[f"{name}_interval"]
            say(f"{name} {figures[name]:.3f} on held-out pairs (95 %: {low:.3f} to {high:.3f})")
    if settings.out:
        learning.save(settings.out, model, tokenizer, lambda folder: save_score_model(
            folder, model, merged(model.state_dict()), getattr(torch, as_run.dtype)))
    return figures


if __name__ == "__main__":
    sys.exit(learning.main_of(ScoreSettings, run, TINY))
