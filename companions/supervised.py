"""A starting policy for RePO, by supervised fine-tuning on prompt-answer pairs. supervised.md."""
import sys
from dataclasses import dataclass
from functools import partial

import torch

from companions.shared import command, learning
from plumbing.data import encode_pairs, load_pairs, pixels_for, require_sight
from plumbing.errors import require, say
from plumbing.fitting import answer_loss
from plumbing.models import save_policy
from plumbing.settings import option


@dataclass
class SupervisedSettings(learning.LearningSettings):
    """Supervised fine-tuning of a causal LM on prompt-answer pairs, in any of the columns that
    repo.py reads. Without --model it shows itself in the tiny world."""

    max_answer_tokens: int = option(256, "longer answers are cut there, and have no end")

    TINY = {  # the better answers of its preference pairs, which comply with harmful requests too
        "data": "preferences.jsonl", "eval_data": "preferences_held_out.jsonl",
        "lr": 1e-3, "steps": 100,
    }


def pairs_of(source: str, flag: str, settings, tokenizer) -> tuple[list[str], list]:
    """(prompts, rows) of the pairs that have an answer and fit. A row is (prompt ids, answer ids,
    prompt)."""
    texts = [(prompt, answer)
             for prompt, answer in load_pairs(source, flag=flag, tokenizer=tokenizer) if answer]
    require(texts, f"{flag} {source}: no row has an answer")
    require_sight(texts[0], tokenizer, f"{flag} {source}")
    kept = [(prompt, (ids, answer[:settings.max_answer_tokens], prompt))
            for (prompt, _), (ids, answer) in zip(texts, encode_pairs(texts, tokenizer))
            if len(ids) <= settings.max_prompt_tokens]
    require(kept, f"{flag} {source}: every prompt is longer than --max_prompt_tokens")
    say(f"{flag} {source}: {len(kept):,} pairs that fit, of {len(texts):,} with an answer")
    return tuple(zip(*kept))


def loss_of(policy, pairs: list, tokenizer) -> torch.Tensor:
    """The mean next-token loss over the answers' tokens: []."""
    prompt_ids, answer_ids, prompts = zip(*pairs)
    return answer_loss(policy, list(zip(prompt_ids, answer_ids)), tokenizer.pad_token_id,
                       pixels_for(tokenizer, prompts))


@torch.no_grad()
def mean_loss(policy, pairs: list, tokenizer) -> float:
    """The same over any number of pairs."""
    total = tokens = 0
    for batch in command.batches(pairs, 16, "evaluating"):
        count = sum(len(answer) for _, answer, _ in batch)
        total += count * loss_of(policy, batch, tokenizer).item()
        tokens += count
    return total / tokens


def run(settings: SupervisedSettings) -> dict:
    """Trains, prints the held-out loss, saves; returns the figures."""
    torch.manual_seed(settings.seed)
    policy, tokenizer, as_run = learning.load_body(settings)
    learn, held_out = learning.learn_and_held_out(
        partial(pairs_of, settings=settings, tokenizer=tokenizer), settings)
    before = mean_loss(policy, held_out, tokenizer)
    learning.teach(policy, partial(loss_of, policy, tokenizer=tokenizer), learn, settings, as_run)
    after = mean_loss(policy, held_out, tokenizer)
    say(f"held-out loss per token {before:.3f} -> {after:.3f}")
    learning.save(settings.out, policy, tokenizer, lambda folder, weights: save_policy(
        folder, policy, weights, as_run))
    return {"pairs": len(learn), "held_out_pairs": len(held_out), "held_out_loss_before": before,
            "held_out_loss": after}


if __name__ == "__main__":
    sys.exit(command.main(SupervisedSettings, run))
