"""Reward and cost models for RePO, from preference pairs. See score_models.md.

A reward model learns which of two answers is better (Bradley-Terry). A cost model learns which is
more harmful, and the sign of each answer, as Safe RLHF's do: above 0 is unsafe.
"""
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from companions.shared import command, learning
from plumbing.data import pixels_for
from plumbing.errors import say
from plumbing.fitting import cost_loss, preference_loss, scores_of
from plumbing.preferences import Pair, load_preferences
from plumbing.reports import wilson
from plumbing.scorers import ScoreModel
from plumbing.settings import option


@dataclass
class ScoreSettings(learning.LearningSettings):
    """A reward or a cost model from preference pairs, in the columns of PKU-SafeRLHF or, for a
    reward model, of HH-RLHF. Without --model it shows itself in the tiny world."""

    role: Literal["reward", "cost"] = option("reward", "which of the two")
    max_tokens: int = option(512, "longer conversations are left out")

    TINY = {
        "data": "preferences.jsonl", "eval_data": "preferences_held_out.jsonl",
        "lr": 2e-3, "steps": 600, "batch_size": 32,
    }


def make_score_model(policy, run) -> ScoreModel:
    """The policy's body with a head of zeros."""
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
def accuracies(model, pairs: list[Pair], role: str, tokenizer) -> dict:
    """Shares of held-out pairs in the right order and, for a cost model, of answers with the right
    sign; each with its 95 % interval."""
    scores = torch.cat([torch.stack(scored(model, batch, tokenizer), 1)                  # [N, 2]
                        for batch in command.batches(pairs, 32, "evaluating")]).tolist()
    rights = {"pair_accuracy": [better > worse if role == "reward" else worse > better
                                for better, worse in scores]}
    if role == "cost":
        rights["sign_accuracy"] = [
            (score > 0) == is_unsafe for pair, of_pair in zip(pairs, scores)
            for score, is_unsafe in zip(of_pair, pair.is_unsafe)]
    figures = {}
    for name, right in rights.items():
        share = sum(right) / len(right)
        low, high = wilson(share, len(right), 0.95)
        say(f"{name} {share:.3f} on held-out pairs (95 %: {low:.3f} to {high:.3f})")
        figures |= {name: share, f"{name}_interval": (low, high)}
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
    figures = accuracies(model, held_out, settings.role, tokenizer)
    learning.save_scorer(settings.out, model, tokenizer, as_run)
    return {"pairs": len(learn), "held_out_pairs": len(held_out), **figures}


if __name__ == "__main__":
    sys.exit(command.main(ScoreSettings, run))
