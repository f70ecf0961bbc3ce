"""One trial of each loaded model, before a run writes anything.

A few short rows go through a model as a run will send them: padded, with a shared beginning or
prompt, sampled, with a backward. What comes must be what the model's own library gives for each row
alone. So a model that does not respect masks, positions or its cache is refused, whatever its
family.
"""
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import LogitsProcessor

from plumbing.data import pad_rows
from plumbing.errors import blame, require, say
from plumbing.models import (
    generate,
    head_weight,
    hidden_states,
    learned_length,
    load_pretrained,
    model_inputs,
)
from plumbing.pictures import model_class
from plumbing.ranks import RANK, RANKS, call_as_forward, clip_gradients, gathered
from plumbing.scorers import SequenceClassifier
from plumbing.training import backward, recomputes

# What rounding explains, of the outputs' spread. Models that ignore a mask are off by 0.005 to 1.
# Two ways to compute SmolLM2-135M's logits in bfloat16 differ by 0.2, those of 3 tokens by 1; so
# models are compared in float32 where they can be.
TOLERANCE = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 0.5}

# Of the trial's rows: so many of a kind that a prompt is read once, and before it what both begin
# with; so many that all is read once but the prompts' last tokens.
OF_TWO_PROMPTS, OF_ONE_BEGINNING = (1, 1, 1, 2, 2, 2), (1, 1, 1, 3, 3, 3)


def try_models(models, config) -> None:
    """Raises UserError for the first model that a run could not use as it is."""
    rows = trial_rows(models.tokenizer, models.policy)
    source = f"{config.policy_flag()} {config.policy}"
    pad_id = models.tokenizer.pad_token_id
    check_length(models.policy.config, source, config)
    with in_float32(models.policy, config) as precise:
        expected = try_at_tokens(models.policy, run_logits, own_logits, rows, pad_id, source,
                                 precise)
        try_sampling(models.policy, models.tokenizer, rows, expected, source, precise)
    for scorer in (models.reward_model, models.cost_model):
        if not scorer.function:
            with in_float32(scorer.model, config) as precise:
                try_scorer(scorer, rows, precise)
    for name, model in models.trained_models():
        outputs = run_logits if name == "policy" else run_values
        what = source if name == "policy" else f"the {name.replace('_', ' ')}"
        try_backward(model, outputs, rows, what, config)


@contextmanager
def in_float32(model, config):
    """Yields a config, with which a model computes in float32 inside if its weights, exactly as
    they are, have room in that type. Sharded weights stay as they are."""
    weights = [weight for weight in (*model.parameters(), *model.buffers())
               if weight.dtype == torch.bfloat16]
    needed = 2 * sum(weight.nbytes for weight in weights)
    has_room = config.device != "cuda" or needed < torch.cuda.mem_get_info()[0]
    if RANKS > 1 or not has_room:
        with config.autocast():
            yield config
        return
    for weight in weights:
        weight.data = weight.data.float()
    yield replace(config, dtype="float32")
    for weight in weights:
        weight.data = weight.data.bfloat16()


def trial_rows(tokenizer, policy) -> list[list[int]]:
    """Four rows of ordinary tokens, the last of them in each: a short one, a long one, one that
    begins as the long one does, and one that differs from it in few tokens near its end."""
    special = {*tokenizer.all_special_ids, *getattr(policy, "stop_token_ids", ())}
    if getattr(tokenizer, "sight", None):
        special.add(tokenizer.convert_tokens_to_ids(tokenizer.sight.place_holder))
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    mixed = [ids[7919 * i % len(ids)] for i in range(30)]
    like_the_long = mixed[2:26] + mixed[25:21:-1]
    rows = mixed[:2], mixed[2:], mixed[2:19], like_the_long  # 17 are shared, and 24
    return [row + ids[-1:] for row in rows]


# ---- What a run makes of a model's call, and what the library does

def run_logits(policy, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, L], [B, L] -> [B, L, V], by the way that log-probs take."""
    head = policy.fused_head
    if head is None:
        return policy(**model_inputs(ids, mask)).logits.float()
    hidden = hidden_states(policy.base_model, ids, mask)                             # [B, L, H]
    return head.logits((hidden @ head_weight(policy).T).float())


def own_logits(policy, ids: Tensor) -> Tensor:
    """[1, L] -> [1, L, V]"""
    logits = policy(ids).logits.float()
    return logits[..., :len(head_weight(policy))] if policy.fused_head else logits


def run_states(model, ids: Tensor, mask: Tensor) -> Tensor:
    return hidden_states(model.base_model, ids, mask).float()                            # [B, L, H]


def own_states(model, ids: Tensor) -> Tensor:
    return model.model(ids).last_hidden_state.float()                                # [1, L, H]


def run_values(critic, ids: Tensor, mask: Tensor) -> Tensor:
    return critic.values(ids, mask)                                                  # [B, L]


# ---- The trials

@torch.no_grad()
def try_at_tokens(model, run_outputs, own_outputs, rows: list, pad_id: int, source: str,
                  config) -> list[Tensor]:
    """Of a model whose outputs at every token matter. Returns those of each row alone."""
    with blame(f"{source}: cannot read a row of tokens"):
        expected = [call_as_forward(model, own_outputs, torch.tensor([row], device=config.device))
                    for row in rows]
    for what, chosen, filler in (
        ("padded", [0, 1], pad_id),
        ("padded", [0, 1], rows[1][0]),  # the padding's content must not matter
        ("with a shared beginning", [1, 2], pad_id),
        ("with a shared prompt", OF_TWO_PROMPTS, pad_id),
    ):
        with blame(f"{source}: cannot read rows that are {what}"):
            outputs = at_tokens(model, run_outputs, [rows[i] for i in chosen], filler, config)
        for i, output in zip(chosen, outputs):
            compare(output, expected[i][0], f"{source}: a row {what}", config)
    # Without a Head the run makes whole logits, and the body may not be apart.
    of_long = run_states if getattr(model, "fused_head", True) else run_outputs
    try_longest(lambda rows: at_tokens(model, of_long, rows, pad_id, config)[0], rows, source,
                config)
    return expected


def at_tokens(model, run_outputs, rows: list, pad_id: int, config) -> list[Tensor]:
    """A model's outputs [T, ...] at each row's tokens, of rows that are padded on the left."""
    ids, mask = (part.to(config.device) for part in pad_rows(rows, [[]] * len(rows), pad_id))
    outputs = call_as_forward(model, run_outputs, ids, mask)                         # [B, L, ...]
    return [output[is_token] for output, is_token in zip(outputs, mask.bool())]


@torch.no_grad()
def try_longest(outputs_of_first, rows: list, source: str, config) -> None:
    """One row of --max_length tokens, and a short one beside it. `outputs_of_first` gives those of
    the first of some rows."""
    longest = [rows[1][i % len(rows[1])] for i in range(config.max_length)]
    with blame(f"{source}: cannot read a row of --max_length {config.max_length} tokens"):
        beside, alone = outputs_of_first([rows[-1], longest]), outputs_of_first([rows[-1]])
    compare(beside, alone, f"{source}: a row beside one of --max_length {config.max_length} tokens",
            config, "RoPE scaling may depend on a batch's longest row, so lower --max_length to "
                    "the model's original_max_position_embeddings, or choose another model")


class Dictated(LogitsProcessor):
    """Keeps the scores of each step, and dictates its tokens [B, T]."""

    def __init__(self, tokens: Tensor):
        self.tokens, self.scores = tokens, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        t = len(self.scores)
        self.scores.append(scores)
        return scores.scatter(1, self.tokens[:, t:t + 1], torch.inf)


@torch.no_grad()
def try_sampling(policy, tokenizer, rows: list, expected: list, source: str, config) -> None:
    """The distribution that a cached decoding step samples from must be the one whose log-probs are
    logged."""
    for chosen in ((0, 1), OF_ONE_BEGINNING):
        try_sampling_of(policy, tokenizer, rows, chosen, expected, source, config)


def try_sampling_of(policy, tokenizer, rows: list, chosen: tuple, expected: list, source: str,
                    config) -> None:
    count = 2
    said = [rows[i][-count:] for i in chosen]
    dictated = Dictated(torch.tensor(said, device=config.device))                    # [B, 2]
    with blame(f"{source}: cannot sample"), gathered(policy):
        generate(policy, tokenizer, [rows[i][:-count] for i in chosen], dictated, count, config,
                 may_compile=False)
    sampled = torch.stack(dictated.scores, 1)                                        # [B, 2, V]
    for scores, i in zip(sampled, chosen):
        logits = expected[i][0, -count - 1:-1]                                       # [2, V]
        scores = scores[:, :logits.shape[1]]
        can_be_sampled = scores[0].isfinite()                                        # [V]
        compare(scores[:, can_be_sampled], logits[:, can_be_sampled],
                f"{source}: a sampled token", config)


def try_scorer(scorer, rows: list, config) -> None:
    """Rows padded as for scoring; one has ended, the other was cut off."""
    source, model = f"{scorer.flag} {scorer.source}", scorer.model
    if not scorer.same_tokens:
        rows = trial_rows(scorer.tokenizer, None)
    is_classifier = isinstance(model, SequenceClassifier)
    check_length(scorer.model_config(), source, config)
    if not is_classifier:
        try_at_tokens(model, run_states, own_states, rows, scorer.tokenizer.pad_token_id, source,
                      config)
        return
    if scorer.tokenizer.eos_token:
        rows = [rows[0] + [scorer.tokenizer.eos_token_id], rows[1]]
    with blame(f"{source}: cannot score rows of different lengths, one ended and one cut off"):
        alone = [scorer.score_tokens([row], [""])[0] for row in rows[:2]]
        padded = scorer.score_tokens(rows[:2], ["", ""])
    require((torch.tensor(padded) - torch.tensor(alone)).norm()
            <= tolerance(config) * torch.tensor(alone).norm(),
            f"{source}: a padded row gets the score {padded[0]:.4g}, the row alone {alone[0]:.4g}; "
            "the model does not respect its attention mask, so choose another")

    def score_of_first(rows: list) -> Tensor:
        score = scorer.score_tokens(rows, [""] * len(rows))[0]
        return torch.tensor([score, -score])  # so their spread is the score's size

    try_longest(score_of_first, rows, source, config)


def try_backward(model, run_outputs, rows: list, source: str, config) -> None:
    """An update's forward and backward: with checkpointing, layers are in training mode."""
    ids, mask = pad_rows(rows[:2], [[], []], 0)
    ids, mask = ids.to(config.device), mask.to(config.device)                        # [2, L] each
    with torch.no_grad(), config.autocast():
        expected = call_as_forward(model, run_outputs, ids, mask)[mask.bool()]       # [N, ...]

    def loss(model, ids, mask, config):
        outputs = run_outputs(model, ids, mask)[mask.bool()]
        return outputs.mean(), outputs.detach()

    way = "with" if recomputes(model, config) else "without"
    with blame(f"{source}: cannot learn {way} gradient checkpointing"):
        _, outputs = backward(model, loss, ids, mask, config=config)
        norm = clip_gradients(model)
    model.zero_grad()
    compare(outputs, expected, f"{source}: a row during an update", config)
    require(norm < torch.inf, f"{source}: the gradient of a padded row is {norm}, not a number; "
                              "choose another model, or another --dtype")


def tolerance(config) -> float:
    is_fp32 = config.dtype == "float32"
    return TOLERANCE["tf32" if is_fp32 and config.tf32 else config.dtype]


def compare(outputs: Tensor, expected: Tensor, what: str, config,
            remedy="the model does not respect masks or positions, so choose another") -> None:
    """Raises UserError unless a row's outputs [L, ...] are those of the row alone."""
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    error = ((outputs - expected).norm() / spread.clamp(min=1e-12)).item()
    limit = tolerance(config)
    require(error <= limit,
            f"{what} gives other outputs than the row alone: off by {error:.2g} of their spread, "
            f"where rounding explains {limit:g}; {remedy}")


# ---- Lengths

def check_length(model_config, source: str, config) -> None:
    """Raises UserError for a --max_length that a model has not learned to read. Warns where it is
    made to extrapolate."""
    limit, extrapolates = learned_length(model_config)
    if config.max_length <= limit:
        return
    problem = f"{source}: --max_length {config.max_length} is above its max_position_embeddings"
    require(extrapolates, f"{problem}, {limit}; lower --max_length, and --max_prompt_length below")
    say(f"warning: {problem}, {limit}; it is made to extrapolate, which may cost quality")


# ---- What was saved

@torch.no_grad()
def problem_of_saved(state, folder, config) -> str | None:
    """A sentence if the saved policy's logits are not the live one's, else None."""
    row = trial_rows(state.tokenizer, state.policy)[1]
    with config.autocast():
        live = call_as_forward(state.policy, own_logits,
                               torch.tensor([row], device=config.device))            # [1, L, V]
    if RANK > 0:
        return None
    kind = model_class(sees=bool(state.tokenizer.sight))
    saved = load_pretrained(kind.from_pretrained, str(folder), "saved", config,
                            dtype=getattr(torch, config.dtype)).eval()
    logits = saved(torch.tensor([row])).logits.float()[..., :live.shape[-1]]
    live = live.cpu()
    error = ((logits - live).norm() / (live - live.mean(-1, keepdim=True)).norm()).item()
    if error <= tolerance(config):
        return None
    return (f"{folder}: the saved policy is not the trained one: its logits are off by {error:.2g} "
            "of their spread; do not use it, and report this")
