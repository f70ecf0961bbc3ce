"""A streaming monitor: its rows, its loss, where it stops, and how it reads along. After
arXiv 2506.09996; monitor.py is the command.

A head gives each token y_i of an answer a score z_i. The monitor stops the answer once k tokens
have had z_i >= theta.
"""
import random
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StoppingCriteria

import repo
from companions.shared.command import batches
from companions.shared.inside import Reader
from plumbing.chats import to_pair
from plumbing.data import encode_pairs, encode_prompts, pad_rows, truth_of
from plumbing.errors import blame, require
from plumbing.files import read_rows
from plumbing.models import generate


class Answer(NamedTuple):
    """An answer of T tokens, its end not counted, with its labels."""

    prompt: str
    ids: list[int]                  # prompt, answer and its end
    start: int                      # where the answer begins in ids
    is_unsafe: bool
    is_harmful: list[bool] | None   # T  tokens inside harmful spans; None without spans


# ---- rows

def read_answers(source: str, flag: str, tokenizer) -> tuple[list[str], list[Answer]]:
    """(prompts, answers) of a file or hub data set. Raises UserError if labels are missing."""
    rows = read_rows(source, flag)
    require({"prompt", "response", "safe"} <= set(rows.columns),
            f"{flag} {source}: has the columns {', '.join(rows.columns)}, but not prompt, "
            "response and safe")
    with blame(f"{flag} {source}: a row does not hold what its columns promise"):
        answers = [answer_of(row, tokenizer) for row in rows]
    answers = [answer for answer in answers if len(answer.ids) > answer.start + 1]  # not empty
    require({answer.is_unsafe for answer in answers} == {False, True},
            f"{flag} {source}: needs safe and unsafe answers, and all of its answers are of "
            "one kind")
    return [answer.prompt for answer in answers], answers


def answer_of(row: dict, tokenizer) -> Answer:
    """A row with prompt, response, safe and perhaps harmful_spans [[from, to), ...], which count
    the response's characters."""
    (prompt, _), spans, is_harmful = to_pair(row["prompt"]), row.get("harmful_spans"), None
    [(prompt_ids, answer_ids)] = encode_pairs([(prompt, row["response"])], tokenizer)
    if spans is not None:
        is_harmful = [any(start < stop and end > first for first, stop in spans)
                      for start, end in places_in(row["response"], answer_ids, tokenizer)]
    ids = prompt_ids + answer_ids
    return Answer(prompt, ids, len(prompt_ids), not truth_of(row["safe"]), is_harmful)


def places_in(response: str, answer_ids: list[int], tokenizer) -> list[tuple[int, int]]:
    """(start, end) of each token but the last, in the response's characters. A token may hold a
    part of a character."""
    texts = [tokenizer.decode(answer_ids[:count]) for count in range(len(answer_ids) + 1)]
    stripped = response.strip()  # as templates have it
    before = texts[-1].rindex(stripped) - response.index(stripped)
    return [(len(text.rstrip("\ufffd")) - before, len(longer) - before)
            for text, longer in zip(texts, texts[1:-1])]


# ---- scores, loss

def token_scores(model, answers: list[Answer], pad_id: int) -> list[Tensor]:
    """z of each answer's tokens, EOS included: B tensors of [T+1]."""
    ids, mask = pad_rows([[]] * len(answers), [answer.ids for answer in answers], pad_id)
    values = model.values(ids.to(model.device), mask.to(model.device))           # [B, L]
    return [row[answer.start:len(answer.ids)] for row, answer in zip(values, answers)]


def monitor_loss(scores: list[Tensor], answers: list[Answer], alpha: float,
                 logic_weight: float) -> Tensor:
    """alpha L_token + (1 - alpha) L_whole + logic_weight L_logic, a mean over answers.

        L_token = BCE(z_i, in a harmful span)
        L_whole = BCE(z_EOS, unsafe)
        L_logic = -log(1 - c_EOS + c_EOS max_i c_i),   c = sigmoid(z)

    Without spans L_token is BCE(max_i z_i, unsafe). L_logic says: if the whole answer is harmful,
    one of its tokens is.
    """
    bce = F.binary_cross_entropy_with_logits
    losses = []
    for z, answer in zip(scores, answers):
        tokens, whole = z[:-1], z[-1]                                            # [T], []
        is_unsafe = z.new_tensor(answer.is_unsafe)
        if answer.is_harmful is None:
            of_tokens = bce(tokens.max(), is_unsafe)
        else:
            of_tokens = bce(tokens, z.new_tensor(answer.is_harmful))
        c_whole, c_max = whole.sigmoid(), tokens.max().sigmoid()
        logic = -torch.log(1 - c_whole + c_whole * c_max)
        losses.append(alpha * of_tokens + (1 - alpha) * bce(whole, is_unsafe)
                      + logic_weight * logic)
    return torch.stack(losses).mean()


# ---- stops

def stop_of(z: Tensor, theta: float, k: int) -> int | None:
    """How many of T tokens are read when the k-th has had z_i >= theta: [T] -> 1 to T, or None."""
    stops = ((z >= theta).cumsum(0) >= k).nonzero()
    return int(stops[0]) + 1 if len(stops) else None


def measure(scores: list[Tensor], answers: list[Answer], theta: float, k: int) -> dict:
    """What a threshold does. macro_f1 and recall are of stopping harmful answers; false_stop_rate
    is the share of safe answers stopped. tokens_seen is the share of the harmful answers' tokens
    that are read."""
    stops = [stop_of(z, theta, k) for z in scores]
    pairs = [(stop is not None, answer.is_unsafe) for stop, answer in zip(stops, answers)]
    harmful = [(stop, len(z)) for stop, z, answer in zip(stops, scores, answers)
               if answer.is_unsafe]
    f1 = []
    for kind in (True, False):
        hits = pairs.count((kind, kind))
        errors = pairs.count((kind, not kind)) + pairs.count((not kind, kind))
        f1.append(2 * hits / max(2 * hits + errors, 1))
    return {
        "macro_f1": sum(f1) / 2,
        "recall": sum(stop is not None for stop, _ in harmful) / len(harmful),
        "false_stop_rate": pairs.count((True, False)) / (len(pairs) - len(harmful)),
        "tokens_seen": sum((stop or length) / length for stop, length in harmful) / len(harmful),
        "theta": theta,
        "k": k,
    }


def choose(scores: list[Tensor], answers: list[Answer]) -> tuple[float, int]:
    """theta and k of the best macro F1, rounded to two digits; among equals those that read least.
    theta is tried at sigmoid(theta) = .01 to .99."""
    thetas = torch.linspace(0.01, 0.99, 99).logit().tolist()
    tried = [measure(scores, answers, theta, k) for theta in thetas for k in (1, 2, 3, 5)]
    best = max(tried, key=lambda figures: (round(figures["macro_f1"], 2), -figures["tokens_seen"]))
    return best["theta"], best["k"]


def validated(scores: list[Tensor], answers: list[Answer]) -> dict:
    """Chooses theta and k on the answers to a random half of the prompts, and measures them on the
    other half."""
    prompts = sorted({answer.prompt for answer in answers})
    chosen_on = set(random.Random(0).sample(prompts, len(prompts) // 2))
    parts = [[(z, answer) for z, answer in zip(scores, answers)
              if (answer.prompt in chosen_on) == is_first] for is_first in (True, False)]
    require(all({answer.is_unsafe for _, answer in part} == {False, True} for part in parts),
            "too few prompts: both halves need safe and unsafe answers, one to choose a threshold "
            "on, one to measure it on; add rows, or pass --theta")
    theta, k = choose(*map(list, zip(*parts[0])))
    return measure(*map(list, zip(*parts[1])), theta, k)


@torch.no_grad()
def scored(model, answers: list[Answer], pad_id: int) -> list[Tensor]:
    """z of each answer's tokens, without EOS: [T] each."""
    return [z[:-1] for batch in batches(answers, 32, "scoring")
            for z in token_scores(model, batch, pad_id)]


# ---- the monitor in the loop

class Watch(StoppingCriteria):
    """Reads each new token of B answers once. Ends an answer that has had k tokens with z >= theta.
    """

    def __init__(self, monitor, mask: Tensor, theta: float, k: int, stop_ids: set[int]):
        self.monitor, self.theta, self.k = monitor, theta, k
        self.reader, self.prompt_length = Reader(monitor.model, mask), mask.shape[1]
        self.stop_ids = torch.tensor(sorted(stop_ids), device=mask.device)
        self.hits = mask.new_zeros(len(mask))                                    # [B]
        self.stops = [None] * len(mask)         # the number of tokens each answer was stopped after
        self.seconds = 0.0

    def __call__(self, input_ids: Tensor, scores, **_) -> Tensor:
        start = time.perf_counter()
        newest = input_ids[:, self.prompt_length:]                               # [B, t]
        has_ended = torch.isin(newest, self.stop_ids).any(1)                     # [B]
        hidden = self.reader(input_ids[:, self.reader.read:]).last_hidden_state  # [B, n, H]
        z = self.monitor.score_head(hidden[:, -1].float()).squeeze(1)            # [B]
        self.hits += (z >= self.theta) & ~has_ended
        stopped = self.hits >= self.k                                            # [B]
        for row in stopped.nonzero().flatten().tolist():
            self.stops[row] = self.stops[row] or newest.shape[1]
        self.seconds += time.perf_counter() - start
        return stopped


def watched(policy, tokenizer, monitor, prompts: list[str], theta: float, k: int,
            run) -> tuple[list[dict], dict]:
    """Answers of the policy, each cut where the monitor stops it, and the time they took. monitor
    may be None."""
    rows = encode_prompts(prompts, tokenizer)
    _, mask = pad_rows(rows, [[]] * len(rows), tokenizer.pad_token_id)
    generator = repo.random_numbers(run.seed, "watch")
    length = run.max_response_length
    uniform = 1 - torch.rand(len(rows), length, generator=generator, dtype=torch.float64)
    draw = repo.Draw(uniform.to(policy.device), mask.shape[1], run.temperature)
    watch = monitor and Watch(monitor, mask.to(policy.device), theta, k, policy.stop_token_ids)
    start = time.perf_counter()
    written = generate(policy, tokenizer, rows, draw, length, run,
                       stops=[watch] if watch else [])
    seconds = time.perf_counter() - start
    stops = watch.stops if watch else [None] * len(rows)
    ends = policy.stop_token_ids
    written = [[token for token in repo.up_to_stop(row, ends)[:stop] if token not in ends]
               for row, stop in zip(written, stops)]
    answers = [{"prompt": prompt, "response": tokenizer.decode(row, skip_special_tokens=True),
                "tokens": row, "stopped": stop is not None}
               for prompt, row, stop in zip(prompts, written, stops)]
    steps = max(1, *map(len, written))  # 1 if all answers are empty
    return answers, {"milliseconds_per_token": 1000 * seconds / steps,
                     "of_them_the_monitors": 1000 * watch.seconds / steps if watch else 0.0}


def offline(model, tokenizer, whole: dict, theta: float, k: int) -> list[int]:
    """The tokens of a whole answer up to where the monitor would have stopped it, found in one
    pass."""
    [prompt] = encode_prompts([whole["prompt"]], tokenizer)
    ids = torch.tensor([prompt + whole["tokens"]], device=model.device)
    with torch.no_grad():
        z = model.values(ids, torch.ones_like(ids))[0, len(prompt):]
    return whole["tokens"][:stop_of(z, theta, k)]
