"""Activations of MLP neurons: how far they changed between two models, and patching one model with
the other's. After arXiv 2406.14144; neurons.py is the script.

A neuron's activation is an input of its MLP's down-projection.
"""
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import repo
from plumbing.errors import require
from plumbing.data import encode_prompts, pad_rows

# Of Llama's, GPT-2's and NeoX's kind.
DOWN_PROJECTIONS = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h")


def down_projections(model, source: str) -> list[nn.Module]:
    """One of each layer; its inputs are the layer's neurons. Raises UserError for other models."""
    found = [layer for name, layer in model.named_modules() if name.endswith(DOWN_PROJECTIONS)]
    require(found, f"{source}: {type(model).__name__} has no {', '.join(DOWN_PROJECTIONS)} whose "
                   "inputs would be its neurons")
    return found


@contextmanager
def seen_by(layers: list[nn.Module], see):
    """see(layer's number, its input) at every call; what it returns, if anything, is the input."""
    hooks = [layer.register_forward_pre_hook(
        lambda module, inputs, number=number: see(number, inputs[0]))
        for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Reader:
    """Reads B left-padded rows part by part, each token once, with a cache of its own."""

    def __init__(self, model, mask: Tensor):
        self.model, self.mask = model, mask                                      # mask [B, P]
        self.cache, self.read = None, 0

    def __call__(self, ids: Tensor, **options):
        """The model's output for the next n tokens [B, n]; behind the mask's end all count."""
        self.read += ids.shape[1]
        self.mask = F.pad(self.mask, (0, max(self.read - self.mask.shape[1], 0)), value=1)
        places = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]       # [B, n]
        output = self.model(ids, attention_mask=self.mask, position_ids=places,
                            past_key_values=self.cache, use_cache=True, **options)
        self.cache = output.past_key_values
        return output


# ---- change scores

@torch.no_grad()
def activations(model, source: str, ids: Tensor) -> Tensor:
    """Of one row of tokens: [1, T] -> [layers, T, neurons]."""
    seen = []
    with seen_by(down_projections(model, source), lambda _, inputs: seen.append(inputs[0])):
        model(ids)
    return torch.stack(seen)


def change_scores(start, aligned, rows: list[tuple[list, list]], of_prompts: bool) -> Tensor:
    """s of all neurons over the tokens of (prompt, answer) rows, or over the prompts' last ones:
    [layers, neurons]."""
    total, count = 0, 0
    for prompt, answer in rows:
        ids = torch.tensor([prompt + answer], device=start.device)
        change = activations(start, "START", ids) - activations(aligned, "ALIGNED", ids)
        change = change[:, len(prompt) - 1:len(prompt)] if of_prompts else change[:, len(prompt):]
        total, count = total + (change ** 2).sum(1), count + change.shape[1]
    return (total / count).sqrt()


# ---- patching

@torch.no_grad()
def answers(start, aligned, chosen: Tensor | None, rows: list[list[int]], tokenizer,
            max_tokens: int) -> list[list[int]]:
    """Greedy answers of the starting model, whose chosen neurons [layers, neurons] take the aligned
    model's activations; without `chosen`, its own."""
    ids, mask = pad_rows(rows, [[]] * len(rows), tokenizer.pad_token_id)         # [B, P] each
    ids, mask = ids.to(start.device), mask.to(start.device)
    reader, guide, theirs = Reader(start, mask), Reader(aligned, mask), {}

    def patched(number, inputs):
        return torch.where(chosen[number], theirs[number], inputs)

    stops, written = torch.tensor(sorted(start.stop_token_ids), device=ids.device), []
    ended = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)          # [B]
    while len(written) < max_tokens and not ended.all():
        if chosen is None:
            output = reader(ids, logits_to_keep=1)
        else:
            with seen_by(down_projections(aligned, "ALIGNED"), theirs.__setitem__):
                guide(ids, logits_to_keep=1)
            with seen_by(down_projections(start, "START"), patched):
                output = reader(ids, logits_to_keep=1)
        ids = output.logits[:, -1].argmax(-1, keepdim=True)                      # [B, 1]
        written.append(ids)
        ended |= torch.isin(ids[:, 0], stops)
    return [repo.up_to_stop(row, start.stop_token_ids)
            for row in torch.cat(written, 1).tolist()]


def top(scores: Tensor, share: float) -> Tensor:
    """The share of all neurons with the largest change, as [layers, neurons] of bools."""
    count = round(share * scores.numel())
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[scores.flatten().topk(count).indices] = True
    return chosen.view_as(scores)


# ---- what it makes of two models

@dataclass
class Pair:
    """Two models, prompts, and who judges: judge(prompts, responses) -> (safe, helpful) per
    response."""

    start: nn.Module
    aligned: nn.Module
    tokenizer: object
    prompts: list[str]
    judge: object
    max_tokens: int

    def __post_init__(self):
        one, other = (tuple(layer.weight.shape for layer in down_projections(model, name))
                      for model, name in ((self.start, "START"), (self.aligned, "ALIGNED")))
        require(one == other, "START and ALIGNED have MLPs of different shapes")
        self.rows = encode_prompts(self.prompts, self.tokenizer)

    def answers(self, model, chosen: Tensor | None = None) -> list[list[int]]:
        """Of a model, or of one with chosen neurons patched from ALIGNED."""
        return answers(model, self.aligned, chosen, self.rows, self.tokenizer, self.max_tokens)

    def judged(self, model, chosen: Tensor | None = None) -> tuple[float, float]:
        """Mean safety and helpfulness of these answers."""
        texts = self.tokenizer.batch_decode(self.answers(model, chosen), skip_special_tokens=True)
        safe, helpful = zip(*self.judge(self.prompts, texts))
        return sum(safe) / len(safe), sum(helpful) / len(helpful)

    def scores(self, of_prompts: bool) -> Tensor:
        rows = list(zip(self.rows, self.answers(self.aligned)))
        return change_scores(self.start, self.aligned, rows, of_prompts)


def restored(pair: Pair, scores: Tensor, shares: list[float], draws: int, seed: int) -> dict:
    """Safety and helpfulness of START, of ALIGNED, and of START with top and random shares of its
    neurons patched; what share of the gain in safety that restores (None without a gain)."""
    generator = torch.Generator().manual_seed(seed)
    start, aligned = pair.judged(pair.start), pair.judged(pair.aligned)
    gain = aligned[0] - start[0]

    def row(chosen):
        safe, helpful = pair.judged(pair.start, chosen)
        return {"safe": safe, "helpful": helpful,
                "restored": (safe - start[0]) / gain if gain else None}

    figures = {"start": start, "aligned": aligned, "top": {}, "random": {}}
    for share in tqdm(shares, unit="share", dynamic_ncols=True):
        figures["top"][share] = row(top(scores, share))
        if share < 1:
            noise = [torch.rand(scores.shape, generator=generator) for _ in range(draws)]
            figures["random"][share] = [row(top(each.to(scores.device), share)) for each in noise]
    return figures
