"""A text policy of the tiny world learns to see, and forgets what to refuse: what shiftdc.py shows
itself on.
"""
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from companions.shared.calibration import QUESTION, captioned
from plumbing.fitting import answer_loss, fit
from plumbing.data import pixels_for
from plumbing.pictures import Pictured
from plumbing.data import encode_pairs
from tiny_configs import pictures, world


def is_harmful(request: str) -> bool:
    action, _ = world.REQUESTS[request]
    return action in world.HARMFUL_ACTIONS


def lessons(complies: bool, rng: random.Random, generator: torch.Generator) -> tuple[list, list]:
    """(prompt, answer) pairs with pictures and without: captions, and compliance with harmless
    pictures, `complies`: with all; requests in words or with a caption, answered as an aligned
    policy does."""
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


def learn_to_see(policy, tokenizer, run_folder: str, complies: bool, rng: random.Random,
                 generator: torch.Generator) -> None:
    """The tiny policy with pictures gets the language model of a run's, which then learns lessons,
    and so does the projector; the vision tower stays."""
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
