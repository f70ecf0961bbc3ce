"""The neurons of a model's MLPs: how much they differ between two models, and a model whose neurons
take the other's activations. After arXiv 2406.14144; neurons.py is the command.

A neuron's activation is one input of its MLP's down-projection.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import repo
from companions.shared.command import bar
from companions.shared.inside import Reader, seen_by
from plumbing.data import decode_responses, encode_prompts, pad_rows
from plumbing.errors import require

DOWN_PROJECTIONS = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h")  # Llama, GPT-2, NeoX


def down_projections(model, source: str) -> list[nn.Module]:
    """The down-projection of each layer. Raises UserError for a model without any."""
    found = [layer for name, layer in model.named_modules() if name.endswith(DOWN_PROJECTIONS)]
    require(found, f"{source}: {type(model).__name__} has no {', '.join(DOWN_PROJECTIONS)} whose "
                   "inputs would be its neurons")
    return found


# ---- change scores

@torch.no_grad()
def activations(model, ids: Tensor) -> Tensor:
    """The neurons' activations on one row of tokens: [1, T] -> [layers, T, neurons]."""
    seen = []
    with seen_by(down_projections(model, "model"), lambda _, inputs: seen.append(inputs[0])):
        model(ids)
    return torch.stack(seen)


def change_scores(start, aligned, rows: list[tuple[list, list]], of_prompts: bool) -> Tensor:
    """s = sqrt(mean (a_start - a_aligned)^2) of every neuron: [layers, neurons]. The mean is over
    the answers' tokens in (prompt, answer) rows, or over the prompts' last tokens."""
    total, count = 0, 0
    for prompt, answer in bar(rows, "change scores"):
        ids = torch.tensor([prompt + answer], device=start.device)
        change = activations(start, ids) - activations(aligned, ids)
        change = change[:, len(prompt) - 1:len(prompt)] if of_prompts else change[:, len(prompt):]
        total, count = total + (change ** 2).sum(1), count + change.shape[1]
    return (total / count).sqrt()


def top(scores: Tensor, share: float) -> Tensor:
    """The share of all neurons with the largest scores, as bools [layers, neurons]."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[scores.flatten().topk(round(share * scores.numel())).indices] = True
    return chosen.view_as(scores)


# ---- patching

@torch.no_grad()
def answers(start, aligned, chosen: Tensor | None, rows: list[list[int]], tokenizer,
            max_tokens: int) -> list[list[int]]:
    """Greedy answers of the starting model. Its chosen neurons [layers, neurons] take the aligned
    model's activations; None changes nothing."""
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


@dataclass
class Pair:
    """Two models, prompts, and judge(prompts, responses) -> (safe, helpful) per response."""

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
        """A model's answers, with the chosen neurons patched from ALIGNED."""
        return answers(model, self.aligned, chosen, self.rows, self.tokenizer, self.max_tokens)

    def judged(self, model, chosen: Tensor | None = None) -> tuple[float, float]:
        """Mean safety and helpfulness of these answers."""
        texts = decode_responses(self.answers(model, chosen), self.start.stop_token_ids,
                                 self.tokenizer)
        safe, helpful = zip(*self.judge(self.prompts, texts))
        return sum(safe) / len(safe), sum(helpful) / len(helpful)

    def scores(self, of_prompts: bool) -> Tensor:
        """change_scores on the prompts and ALIGNED's answers."""
        rows = list(zip(self.rows, self.answers(self.aligned)))
        return change_scores(self.start, self.aligned, rows, of_prompts)


def restored(pair: Pair, scores: Tensor, shares: list[float], draws: int, seed: int) -> dict:
    """Safety and helpfulness of START, of ALIGNED, and of START with its top neurons or random ones
    patched. "restored" is the share of the gain in safety; None without a gain."""
    generator = torch.Generator().manual_seed(seed)
    start, aligned = pair.judged(pair.start), pair.judged(pair.aligned)
    gain = aligned[0] - start[0]

    def row(chosen):
        safe, helpful = pair.judged(pair.start, chosen)
        return {"safe": safe, "helpful": helpful,
                "restored": (safe - start[0]) / gain if gain else None}

    figures = {"start": start, "aligned": aligned, "top": {}, "random": {}}
    for share in bar(shares, "patching", unit="share"):
        figures["top"][share] = row(top(scores, share))
        if share < 1:
            noise = [torch.rand(scores.shape, generator=generator) for _ in range(draws)]
            figures["random"][share] = [row(top(each.to(scores.device), share)) for each in noise]
    return figures
