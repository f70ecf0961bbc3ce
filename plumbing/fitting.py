"""Supervised learning for the models that a run of RePO starts from: a policy from answers, reward
and cost models from comparisons. The tiny world and the companions use it.
"""
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from plumbing.models import Head
from plumbing.pictures import in_call
from plumbing.data import pad_rows


def fit(parameters: list[nn.Parameter], batch_loss, rows: list, batch_size: int, steps: int,
        lr: float, rng: random.Random, bar: bool = False) -> None:
    """AdamW, warmed up and annealed to zero, over random batches."""
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=0.3, cycle_momentum=False)
    progress = tqdm(range(steps), unit="step", dynamic_ncols=True, disable=not bar)
    for _ in progress:
        loss = batch_loss(rng.sample(rows, batch_size))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if bar:
            progress.set_postfix_str(f"loss {loss.item():.3f}")


def answer_loss(policy, batch: list[tuple[list, list]], pad_id: int,
                pixel_values: Tensor | None = None) -> Tensor:
    """The next-token loss of B supervised (prompt ids, answer ids), perhaps with pictures
    [B, 3, S, S]: the mean over all answer tokens, []."""
    rows = [prompt + answer for prompt, answer in batch]
    ids, mask = pad_rows([[]] * len(rows), rows, pad_id)                                 # [B, L]
    ids, mask = ids.to(policy.device), mask.to(policy.device)
    starts = torch.tensor([len(prompt) for prompt, _ in batch], device=ids.device)       # [B]
    places = torch.arange(ids.shape[1], device=ids.device)                               # [L]
    is_answer = (places >= starts[:, None]) & mask.bool()                                # [B, L]
    # The padding is on the right, so no real token attends to it.
    head, inputs = getattr(policy, "fused_head", Head()), in_call(pixel_values, ids.device)
    if head:
        output = policy.base_model(ids, use_cache=False, **inputs)
        hidden = output.last_hidden_state                                                # [B, L, H]
        products = policy.get_output_embeddings()(hidden[:, :-1][is_answer[:, 1:]])      # [N, V]
        logits = head.logits(products)                                                   # [N, V]
    else:
        output = policy(ids, use_cache=False, **inputs)
        logits = output.logits[:, :-1][is_answer[:, 1:]]                                 # [N, V]
    return F.cross_entropy(logits.float(), ids[is_answer])


def scores_of(model, rows: list[list[int]], pad_id: int,
              pixel_values: Tensor | None = None) -> Tensor:
    """The scores at the last tokens of N rows, perhaps with pictures [N, 3, S, S]: [N]."""
    ids, mask = pad_rows([[]] * len(rows), rows, pad_id)                                 # [N, L]
    ids, mask = ids.to(model.device), mask.to(model.device)
    output = model.model(ids, use_cache=False, **in_call(pixel_values, ids.device))
    hidden = output.last_hidden_state                                                    # [N, L, H]
    last = mask.sum(1) - 1                                                               # [N]
    at_last = hidden[torch.arange(len(rows), device=ids.device), last]                   # [N, H]
    with torch.autocast(ids.device.type, enabled=False):
        return model.score_head(at_last.float()).squeeze(1)                              # [N]


def preference_loss(margins: Tensor) -> Tensor:
    """The Bradley-Terry loss of margins, score of the better answer minus score of the worse. Any
    shape."""
    return -F.logsigmoid(margins).mean()


def cost_loss(margins: Tensor, costs: Tensor, is_unsafe: Tensor) -> Tensor:
    """Safe RLHF's loss of a cost model: it learns which answer is more harmful, and a positive cost
    for unsafe answers. costs and is_unsafe have the same shape, two answers per margin."""
    signs = 2 * is_unsafe.int() - 1
    return preference_loss(margins) - 2 * F.logsigmoid(signs * costs).mean()
