"""How tokens are drawn: by the library's generate, each with a random number of its own."""
import hashlib

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from kernels import draw_tokens
from plumbing.pictures import in_call
from plumbing.prompts import pad_rows
from plumbing.ranks import RANKS


def random_numbers(*key) -> torch.Generator:
    """A generator that is a function of its key alone, so that neither a resumed run nor another
    number of ranks draws anything else."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


class Draw(LogitsProcessor):
    """Draws each response's next token from the whole softmax: the one in which its uniform number
    for that position falls, counted along the cumulated probabilities.

    So a response depends on its own row of numbers [B, T] alone, neither on the rest of its batch
    nor on who samples it.
    """

    def __init__(self, uniform: Tensor, prompt_length: int, temperature: float):
        self.uniform = uniform                                                   # [B, T]
        self.prompt_length = prompt_length
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        t = input_ids.shape[1] - self.prompt_length
        if draw_tokens and scores.is_cuda:  # what follows, in one kernel
            token = draw_tokens(scores, self.uniform[:, t], self.temperature)[:, None]   # [B, 1]
            return scores.scatter_(1, token, torch.inf)
        probs = (scores / self.temperature).double().softmax(-1)                 # [B, V]
        cumulated = probs.cumsum(-1)                                             # [B, V]
        level = self.uniform[:, t:t + 1] * cumulated[:, -1:]                     # [B, 1]
        token = torch.searchsorted(cumulated, level)                             # [B, 1]
        token = token.clamp(max=scores.shape[1] - 1)  # NaN are past the end      # [B, 1]
        return scores.scatter(1, token, torch.inf)  # which the library's argmax will take


def sample(policy, tokenizer, prompts: list[list[int]], uniform: Tensor, max_tokens: int,
           config, pixel_values: Tensor | None = None, stops=()) -> list[list[int]]:
    """The library's generate, with Draw for a sampler: b prompts, perhaps with pictures
    [b, 3, S, S], uniform numbers [b, T] -> token ids, also those behind an end. `stops`: stopping
    criteria of the library's."""
    input_ids, mask = pad_rows(prompts, [[]] * len(prompts), tokenizer.pad_token_id)
    prompt_length = input_ids.shape[1]                                           # P
    draw = Draw(uniform.to(config.device), prompt_length, config.temperature)
    settings = GenerationConfig(
        do_sample=False,  # the largest of the scores, which Draw has chosen
        max_new_tokens=max_tokens,
        eos_token_id=sorted(policy.stop_token_ids),
        pad_token_id=tokenizer.pad_token_id,
        cache_implementation="static" if can_compile(policy, config) else None,
    )
    processors, sight = [draw], getattr(tokenizer, "sight", None)
    if sight:  # no answer shows a picture
        place_holder = tokenizer.convert_tokens_to_ids(sight.place_holder)
        processors.insert(0, SuppressTokensLogitsProcessor([place_holder], config.device))
    # Of a slice of hidden states the library's product would copy the head, once for each row.
    whole = policy.get_output_embeddings().register_forward_pre_hook(
        lambda head, inputs: inputs[0].contiguous())
    with whole, torch.inference_mode(), config.autocast():
        token_ids = policy.generate(
            input_ids=input_ids.to(config.device),                               # [b, P]
            attention_mask=mask.to(config.device),                               # [b, P]
            **in_call(pixel_values, config.device),                              # [b, 3, S, S]
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(stops),
            synced_gpus=False,
        )                                                                        # [b, P+T]
    return token_ids[:, prompt_length:].tolist()


def can_compile(policy, config) -> bool:
    """With a cache of fixed shape the library compiles its steps on a GPU; but not where FSDP has
    its hooks, nor where autocast makes other dtypes than the weights'."""
    is_in_compute_dtype = policy.dtype == getattr(torch, config.dtype)
    return config.device == "cuda" and RANKS == 1 and is_in_compute_dtype
