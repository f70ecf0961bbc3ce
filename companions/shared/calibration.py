"""A model that sees, looked into at its prompts' last tokens, and calibrated there. After arXiv
2502.13095; shiftdc.py is the script.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig

from companions.shared.patching import seen_by
from plumbing.errors import blame, require
from plumbing.models import model_inputs
from plumbing.data import pixels_for
from plumbing.pictures import Pictured, in_call, language_part
from plumbing.data import encode_prompts, pad_rows
from plumbing.settings import RunSettings

QUESTION = "What does the picture show?"
CAPTION_TOKENS = 48
BATCH = 8  # prompts at a time


def calibrated_layers(model, layers: str | None, source: str) -> list[nn.Module]:
    """Those that read what the layers of FIRST-LAST give. Raises UserError."""
    blocks = getattr(language_part(model.base_model), "layers", None)
    require(blocks is not None, f"{source}: its language model has no list of layers")
    last_but_one = len(blocks) - 1
    first, last = len(blocks) // 2, last_but_one
    if layers:
        with blame(f"--layers {layers}: must be FIRST-LAST, as 10-31"):
            first, last = map(int, layers.split("-"))
        require(1 <= first <= last <= last_but_one,
                f"--layers {layers}: of the {len(blocks)} layers of {source}, 1-{last_but_one} "
                "can be calibrated")
    return list(blocks[first:last + 1])  # counted from 0, these read what the chosen ones give


@dataclass
class Calibration:
    """Takes alpha of what pictures shift along the safety directions away."""

    of_texts: Tensor    # [n, N, H]  h of N prompts with captions
    directions: Tensor  # [n, H]     s
    alpha: float
    instead: Tensor     # [n, H]     what it is taken along: s, or a random direction as long

    def of(self, rows: slice):
        """What sees the states of some prompts: changes each layer's at its first call, while a
        prompt is read, and those of the last token alone. What is generated is left as it is."""
        waiting = set(range(len(self.directions)))

        def see(layer: int, hidden: Tensor) -> Tensor | None:
            if layer not in waiting:
                return None
            waiting.remove(layer)
            # From h as the layers before have been calibrated, so nothing is taken away twice.
            shift = hidden[:, -1].float() - self.of_texts[layer, rows]               # [B, H]  m
            taken = self.alpha * part_along(shift, self.directions[layer])           # [B, 1]
            hidden = hidden.clone()                                                  # [B, P, H]
            hidden[:, -1] -= (taken * self.instead[layer]).to(hidden.dtype)
            return hidden

        return see


@dataclass
class Subject:
    """A model with its tokenizer, the settings it was loaded with, and n of its layers."""

    model: nn.Module
    tokenizer: object
    run: RunSettings
    layers: list[nn.Module]

    def inputs(self, prompts: list[str]) -> dict:
        """Of B prompts, with pictures or without, padded on the left."""
        rows = encode_prompts(prompts, self.tokenizer)
        ids, mask = pad_rows(rows, [[]] * len(rows), self.tokenizer.pad_token_id)
        pixels = pixels_for(self.tokenizer, prompts)
        return {"input_ids": ids.to(self.run.device), "attention_mask": mask.to(self.run.device),
                **in_call(pixels, self.run.device)}

    @torch.inference_mode()
    def last_states(self, prompts: list[str]) -> Tensor:
        """h at the last token of each of N prompts: [n, N, H]."""
        batches = []
        for batch in in_batches(prompts, "reading"):
            at_last = [None] * len(self.layers)

            def see(layer: int, hidden: Tensor, at_last=at_last) -> None:
                at_last[layer] = hidden[:, -1].float()                               # [B, H]

            with seen_by(self.layers, see), self.run.autocast():
                self.model(**model_inputs(**self.inputs(batch)), logits_to_keep=1)
            batches.append(torch.stack(at_last))                                     # [n, B, H]
        return torch.cat(batches, 1)

    @torch.inference_mode()
    def answers(self, prompts: list[str], max_tokens: int,
                calibration: Calibration | None = None) -> list[str]:
        """Greedy ones to N prompts."""
        place_holder = self.model.config.image_token_id
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=max_tokens, suppress_tokens=[place_holder],
            eos_token_id=sorted(self.model.stop_token_ids),
            pad_token_id=self.tokenizer.pad_token_id)
        answers = []
        for batch in in_batches(prompts, "answering"):
            rows = slice(len(answers), len(answers) + len(batch))
            see = calibration.of(rows) if calibration else leave_alone
            inputs = self.inputs(batch)
            with seen_by(self.layers, see), self.run.autocast():
                ids = self.model.generate(**inputs, generation_config=settings)      # [B, P+T]
            new = ids[:, inputs["input_ids"].shape[1]:]
            answers += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def with_captions(self, prompts: list[Pictured]) -> list[str]:
        """The same as text: what the model says of a picture stands in its place."""
        questions = [Pictured(QUESTION, prompt.image) for prompt in prompts]
        return [captioned(prompt, caption)
                for prompt, caption in zip(prompts, self.answers(questions, CAPTION_TOKENS))]

    def safety_directions(self, safe: list[Pictured], unsafe: list[Pictured]) -> Tensor:
        """s: [n, H]. Raises UserError if there are none."""
        of_safe, of_unsafe = [self.last_states(self.with_captions(prompts)).mean(1)
                              for prompts in (safe, unsafe)]                         # [n, H]
        directions = of_safe - of_unsafe
        require((directions != 0).any(1).all(), "--safe and --unsafe: make no difference inside "
                                                "the model; are they the same prompts?")
        return directions


def leave_alone(layer: int, hidden: Tensor) -> None:
    pass


def captioned(prompt: str, caption: str) -> str:
    return f"The picture shows: {caption}\n{prompt}"


def in_batches(prompts: list[str], what: str):
    starts = range(0, len(prompts), BATCH)
    for start in tqdm(starts, what, delay=2, leave=False, dynamic_ncols=True):
        yield prompts[start:start + BATCH]


def part_along(shift: Tensor, direction: Tensor) -> Tensor:
    """m . s / s . s: [B, H], [H] -> [B, 1]."""
    return ((shift @ direction) / (direction @ direction))[:, None]


def random_like(directions: Tensor, seed: int) -> Tensor:
    """Random directions of the same lengths: [n, H] -> [n, H]."""
    drawn = torch.randn(directions.shape, generator=torch.Generator().manual_seed(seed))
    drawn = drawn.to(directions.device)
    return drawn * directions.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
