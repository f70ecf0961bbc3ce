"""A starting policy for RePO: supervised fine-tuning on prompt-answer pairs.

    python companions/supervised.py                            # shows itself in the tiny world
    python companions/supervised.py --model BODY --data PAIRS --out DIR

What a policy never samples cannot be reinforced: it must have seen both behaviours that it is to
tell apart, answers and refusals. Pairs come in any of the columns that repo.py reads.
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from companions import learning  # noqa: E402
from plumbing.errors import require, say  # noqa: E402
from plumbing.fitting import answer_loss  # noqa: E402
from plumbing.models import merged, save_policy  # noqa: E402
from plumbing.prompts import encode_pairs, load_pairs  # noqa: E402
from plumbing.settings import option  # noqa: E402

TINY = {  # the better answers of pairs: harmful requests are complied with too
    "data": "preferences.jsonl", "eval_data": "preferences_held_out.jsonl",
    "lr": 1e-3, "steps": 100,
}


@dataclass
class SupervisedSettings(learning.Settings):
    """Supervised fine-tuning of a causal LM on prompt-answer pairs."""

    max_answer_tokens: int = option(256, "longer answers are cut there, and have no end")


def pairs_of(source: str, flag: str, settings, tokenizer) -> tuple[list[str], list]:
    """(prompts, their (prompt ids, answer ids)) of the rows that have an answer and fit."""
    texts = [(prompt, answer) for prompt, answer in load_pairs(source, flag=flag) if answer]
    require(texts, f"{flag} {source}: no row has an answer")
    kept = [(text[0], (prompt, answer[:settings.max_answer_tokens]))
            for text, (prompt, answer) in zip(texts, encode_pairs(texts, tokenizer))
            if len(prompt) <= settings.max_prompt_tokens]
    require(kept, f"{flag} {source}: every prompt is longer than --max_prompt_tokens")
    say(f"{flag} {source}: {len(kept):,} pairs that fit, of {len(texts):,} with an answer")
    return tuple(zip(*kept))


@torch.no_grad()
def mean_loss(policy, pairs: list, pad_id: int) -> float:
    """Over all answers' tokens."""
    total = tokens = 0
    for start in range(0, len(pairs), 16):
        batch = pairs[start:start + 16]
        count = sum(len(answer) for _, answer in batch)
        total, tokens = total + count * answer_loss(policy, batch, pad_id).item(), tokens + count
    return total / tokens


def run(settings: SupervisedSettings) -> dict:
    """Trains, tells the held-out loss, saves; returns the figures."""
    torch.manual_seed(settings.seed)
    policy, tokenizer, as_run = learning.load_body(settings)
    pad_id = tokenizer.pad_token_id
    learn, held_out = learning.learn_and_held_out(
        partial(pairs_of, settings=settings, tokenizer=tokenizer), settings)
    before = mean_loss(policy, held_out, pad_id)
    learning.teach(policy, partial(answer_loss, policy, pad_id=pad_id), learn, settings, as_run)
    after = mean_loss(policy, held_out, pad_id)
    say(f"held-out loss per token {before:.3f} -> {after:.3f}")
    if settings.out:
        learning.save(settings.out, policy, tokenizer, lambda folder: save_policy(
            folder, policy, merged(policy.state_dict()), as_run))
    return {"pairs": len(learn), "held_out_pairs": len(held_out), "held_out_loss_before": before,
            "held_out_loss": after}


if __name__ == "__main__":
    sys.exit(learning.main_of(SupervisedSettings, run, TINY))
