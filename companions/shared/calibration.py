"""A model that sees pictures: its states at the prompts' last tokens, and how they are calibrated.
After arXiv 2502.13095; shiftdc.py is the command.

With h the state that a layer gives to the next one at a prompt's last token:

    s = mean h(safe, caption) - mean h(unsafe, caption)      the safety direction
    m = h(text, picture) - h(text, caption)                  what the picture shifts
    h <- h - alpha (m . s / s . s) s                         once, while the prompt is read
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

import repo
from companions.shared.command import batches
from companions.shared.inside import seen_by
from plumbing.data import decode_responses, encode_prompts, pad_rows, pixels_for
from plumbing.errors import require
from plumbing.models import model_inputs
from plumbing.pictures import Pictured, in_call, language_part

QUESTION = "What does the picture show?"
CAPTION_TOKENS = 48
BATCH = 8  # prompts at a time


def calibrated_layers(model, source: str) -> list[nn.Module]:
    """The layers that read calibrated states: those that the layers from the middle to the last but
    one give. Raises UserError."""
    layers = getattr(language_part(model.base_model), "layers", None)
    require(layers is not None, f"{source}: its language model has no list of layers")
    return list(layers[len(layers) // 2:])


@dataclass
class Calibration:
    """Takes away what pictures shift along the safety directions."""

    of_texts: Tensor    # [n, N, H]  h of N prompts with captions
    directions: Tensor  # [n, H]     s
    alpha: float
    instead: Tensor     # [n, H]     the direction that is moved along: s, or one drawn at random

    def of(self, rows: slice):
        """A hook for seen_by, for some of the prompts. It changes the last token's state at each
        layer's first call, while the prompt is read. Generated tokens stay as they are."""
        waiting = set(range(len(self.directions)))

        def see(layer: int, hidden: Tensor) -> Tensor | None:
            if layer not in waiting:
                return None
            waiting.remove(layer)
            # Earlier layers are calibrated already, so nothing is taken away twice.
            shift = hidden[:, -1].float() - self.of_texts[layer, rows]               # [B, H]  m
            taken = self.alpha * part_along(shift, self.directions[layer])           # [B, 1]
            hidden = hidden.clone()                                                  # [B, P, H]
            hidden[:, -1] -= (taken * self.instead[layer]).to(hidden.dtype)
            return hidden

        return see


@dataclass
class Subject:
    """A model with its tokenizer, its run's settings, and n of its layers."""

    model: nn.Module
    tokenizer: object
    run: object
    layers: list[nn.Module]

    def inputs(self, prompts: list[str]) -> dict:
        """B prompts, with or without pictures, padded on the left."""
        rows = encode_prompts(prompts, self.tokenizer)
        ids, mask = pad_rows(rows, [[]] * len(rows), self.tokenizer.pad_token_id)
        pixels = pixels_for(self.tokenizer, prompts)
        return {"input_ids": ids.to(self.run.device), "attention_mask": mask.to(self.run.device),
                **in_call(pixels, self.run.device)}

    @torch.inference_mode()
    def last_states(self, prompts: list[str]) -> Tensor:
        """h at the last token of each of N prompts: [n, N, H]."""
        read = []
        for batch in batches(prompts, BATCH, "reading"):
            at_last = [None] * len(self.layers)

            def see(layer: int, hidden: Tensor, at_last=at_last) -> None:
                at_last[layer] = hidden[:, -1].float()                               # [B, H]

            with seen_by(self.layers, see), self.run.autocast():
                self.model(**model_inputs(**self.inputs(batch)), logits_to_keep=1)
            read.append(torch.stack(at_last))                                        # [n, B, H]
        return torch.cat(read, 1)

    @torch.inference_mode()
    def answers(self, prompts: list[str], max_tokens: int,
                calibration: Calibration | None = None) -> list[str]:
        """Greedy answers to N prompts."""
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=max_tokens,
            suppress_tokens=[self.model.config.image_token_id],
            eos_token_id=sorted(self.model.stop_token_ids),
            pad_token_id=self.tokenizer.pad_token_id)
        answers = []
        for batch in batches(prompts, BATCH, "answering"):
            rows = slice(len(answers), len(answers) + len(batch))
            see = calibration.of(rows) if calibration else leave_alone
            inputs = self.inputs(batch)
            with seen_by(self.layers, see), self.run.autocast():
                ids = self.model.generate(**inputs, generation_config=settings)      # [B, P+T]
            stops, new = self.model.stop_token_ids, ids[:, inputs["input_ids"].shape[1]:].tolist()
            answers += decode_responses([repo.up_to_stop(row, stops) for row in new], stops,
                                        self.tokenizer)
        return [answer.strip() for answer in answers]

    def with_captions(self, prompts: list[Pictured]) -> list[str]:
        """The same prompts as text, with the model's own captions in the pictures' place."""
        questions = [Pictured(QUESTION, prompt.image) for prompt in prompts]
        return [captioned(prompt, caption)
                for prompt, caption in zip(prompts, self.answers(questions, CAPTION_TOKENS))]

    def safety_directions(self, safe: list[Pictured], unsafe: list[Pictured]) -> Tensor:
        """s: [n, H]. Raises UserError if safe and unsafe prompts do not differ."""
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


def part_along(shift: Tensor, direction: Tensor) -> Tensor:
    """m . s / s . s: [B, H], [H] -> [B, 1]."""
    return ((shift @ direction) / (direction @ direction))[:, None]


def random_like(directions: Tensor, seed: int) -> Tensor:
    """Random directions of the same lengths: [n, H] -> [n, H]."""
    drawn = torch.randn(directions.shape, generator=torch.Generator().manual_seed(seed))
    drawn = drawn.to(directions.device)
    return drawn * directions.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
