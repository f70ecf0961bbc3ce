"""Policies: loaded, checked, run forward, saved.

Weights are data: a checkpoint brings safetensors or a pickle that may hold tensors only. Python
code of its own runs only with --trust_remote_code.
"""
import copy
import math
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)
from transformers.cache_utils import DynamicCache, DynamicLayer

from plumbing import hub
from plumbing.data import encode_prompts, end_of_turn, pad_rows, render, render_prompt
from plumbing.errors import UserError, blame, require, say
from plumbing.files import check_pointer, find_part, is_data_set
from plumbing.functions import check_function, is_function
from plumbing.pictures import (
    check_count,
    check_sight,
    in_call,
    load_sight,
    model_class,
    save_processor,
    sees,
    set_chat_template,
)
from plumbing.ranks import RANKS
from plumbing.settings import PRESETS

MIN_SHARED = 16  # tokens: a second call of a body takes as long as a few

# ---- Loading


def load_pretrained(from_pretrained, source: str, flag: str, config, **options):
    """from_pretrained(source); the source may be a .gguf file. Raises UserError for any problem
    with a folder, a file or a hub name."""
    has_weights = from_pretrained not in (AutoConfig.from_pretrained, AutoTokenizer.from_pretrained)
    path = folder_of(source, flag, config, has_weights and not config.dry_run)
    problem = "cannot be loaded"
    if path.is_file() and path.suffix == ".gguf":
        require(find_spec("gguf") and find_spec("accelerate"),
                f"{flag} {source}: reading .gguf files takes two more packages "
                "(pip install gguf accelerate)")
        path, options["gguf_file"] = path.parent, path.name
    elif from_pretrained == AutoTokenizer.from_pretrained:
        problem = "its tokenizer cannot be loaded"
    require(not (path / "adapter_config.json").is_file(),
            f"{flag} {source}: holds a LoRA adapter (adapter_config.json); merge it into its base "
            "model first (peft: merge_and_unload), and give the merged model")
    with hub.explained(f"{flag} {source}", problem, path):
        try:
            return from_pretrained(str(path), trust_remote_code=config.trust_remote_code, **options)
        except NotImplementedError as error:  # the library compares tied weights without content
            require("Meta tensors" not in str(error),
                    f"{flag} {source}: has two weights that its config.json ties, lm_head.weight "
                    "perhaps, and one has another shape than config.json says")
            raise


def folder_of(source: str, flag: str, config, with_weights: bool = False) -> Path:
    """Where a model is: here, or in the cache of the hub. Raises UserError."""
    path = Path(source).expanduser()
    if path.exists():
        check_pointer(path, f"{flag} {source}")
        return path
    require(hub.is_name(source), f"{flag} {source}: is none of {', '.join(PRESETS)}, and there is "
                                 "no such folder or file")
    return hub.model_folder(source, f"{flag} {source}", with_weights, not config.dry_run)


def shape_of(kind, path, dtype, trust_remote_code, **where) -> PreTrainedModel:
    """Takes the place of kind.from_pretrained: builds the model from its config on the meta device,
    where tensors have no content."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **where)
    with torch.device("meta"):
        return kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def check_sources(config) -> None:
    """A first look at everything that a run will load; it fixes the commits of what is on the hub.
    Raises one UserError for all models and data sets that cannot be had from there, or one for the
    first model or function that is not what its flag needs."""
    models = {
        config.policy_flag(): config.policy,
        "--reward_model": config.reward_model,
        "--cost_model": config.cost_model,
    }
    data = {"--dataset": config.dataset, "--eval_dataset": config.eval_dataset}
    if config.needs_pairs():
        data["--ptx_dataset"] = config.ptx_dataset
    data = {flag: source for flag, source in data.items()
            if source and is_data_set(source) and hub.is_name(source)}
    on_hub = [(flag, source, "model") for flag, source in models.items()
              if hub.is_name(source) and not is_function(source)]
    look_at_hub(on_hub + [(flag, source, "dataset") for flag, source in data.items()])
    config.commits = hub.fixed()

    for flag, source in models.items():
        if is_function(source):
            check_function(source, flag)
        else:
            model_config = load_pretrained(AutoConfig.from_pretrained, source, flag, config)
            check_sight(model_config, f"{flag} {source}")
            load_pretrained(AutoTokenizer.from_pretrained, source, flag, config)
    if config.judge:
        check_function(config.judge, "--judge")
    parts = [find_part(source, flag) for flag, source in data.items()]
    for part in parts:
        hub.announce(part.place, [file for each in parts if each.place == part.place
                                  for file in each.files])


def look_at_hub(sources: list[tuple[str, str, str]]) -> None:
    """Fixes the commit of each (flag, source, kind). Raises one UserError for all that cannot be
    had."""
    problems = {}
    for flag, source, kind in sources:
        label = f"{flag} {source.partition(':')[0]}"
        try:
            hub.look(source, kind, label)
        except UserError as error:
            problems.setdefault(str(error).removeprefix(f"{label}: "), []).append(label)
    require(not problems, "; ".join(f"{', '.join(labels)}: {problem}"
                                    for problem, labels in problems.items()))


# ---- The policy and its tokenizer

def load_tokenizer(config):
    """The policy's tokenizer. Raises UserError if it cannot end a response."""
    source = f"{config.policy_flag()} {config.policy}"
    tokenizer = tokenizer_with_sight(config.policy, config.policy_flag(), config)
    require(tokenizer.eos_token, f"{source}: its tokenizer has no EOS token, so no response would "
                                 "end; set eos_token in tokenizer_config.json")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # masks tell where padding is

    unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    with blame(f"{source}: its tokenizer cannot be used"):
        [trial] = encode_prompts(["a"], tokenizer)
        require(not unknown & set(trial),
                f"{source}: its tokenizer cannot encode {render_prompt('a', tokenizer)!r}")
    return tokenizer


def tokenizer_with_sight(source: str, flag: str, config):
    """A model's tokenizer. Its `sight` says how the model reads pictures; None if it reads none.
    Raises UserError for a chat template that fails or leaves the user's text out."""
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, source, flag, config)
    tokenizer.sight, tokenizer.date = None, config.date
    if not source.endswith(".gguf"):  # always a language model, and its config is slow to read
        model_config = load_pretrained(AutoConfig.from_pretrained, source, flag, config)
        tokenizer.sight = load_sight(model_config, tokenizer,
                                     str(folder_of(source, flag, config)), flag)
        if tokenizer.sight:
            set_chat_template(tokenizer, tokenizer.sight.source)
    with blame(f"{flag} {source}: its chat template fails"):
        text = render([{"role": "user", "content": "turn 0."}], tokenizer)
    require("turn 0." in text, f"{flag} {source}: its chat template leaves out what the user says; "
                               "perhaps it reads a list of parts, where it should read text")
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Writes the tokenizer, and the image processor of a model that reads pictures."""
    tokenizer.save_pretrained(folder)
    if getattr(tokenizer, "sight", None):
        save_processor(tokenizer.sight, folder)


def load_policy(config):
    """(policy, its tokenizer). Weights that are trained are fp32, others in the compute dtype.
    Raises UserError."""
    flag, tokenizer = config.policy_flag(), load_tokenizer(config)
    is_frozen = config.lora_rank or config.eval_only
    dtype = getattr(torch, config.dtype) if is_frozen else torch.float32
    kind = model_class(sees=bool(tokenizer.sight))
    if config.dry_run:
        policy = load_pretrained(partial(shape_of, kind), config.policy, flag, config, dtype=dtype)
    else:
        policy, report = load_pretrained(
            kind.from_pretrained, config.policy, flag, config, dtype=dtype,
            output_loading_info=True, ignore_mismatched_sizes=True)
        check_loaded(policy, report, f"{flag} {config.policy}",
                     "a policy must bring all its weights, in its config's shapes")
        if config.policy.endswith(".gguf"):  # its weights are plain now, and saved as such
            policy.hf_quantizer.remove_quantization_config(policy)
    policy.eval()
    take_out_dropout(policy)
    check_policy(policy, tokenizer, f"{flag} {config.policy}")
    if tokenizer.sight:
        check_count(policy, tokenizer.sight, f"{flag} {config.policy}")

    policy.stop_token_ids = stop_token_ids(policy.config, tokenizer, config)
    # Sampling uses the plain softmax. The checkpoint's own top_p or temperature is only kept here
    # until the policy is saved.
    policy.published_generation_config = policy.generation_config
    policy.generation_config = GenerationConfig()
    policy.tokenless = ids_without_token(policy, tokenizer)
    policy.fused_head = Head() if config.dry_run else find_head(policy)
    if not policy.fused_head:
        reason = "its token ids have gaps" if has_gaps(policy) else (
            "its logits are more than hidden states times a matrix with a scale or a soft cap "
            "(perhaps a bias)")
        say(f"{flag} {config.policy}: {reason}; so all logits are computed, with more memory")
    return policy, tokenizer


def learned_length(model_config) -> tuple[float, bool]:
    """How many tokens a model has learned to read, infinity if its config does not say; and whether
    its architecture is made to go beyond: ALiBi, RoPE with scaling, positions that are only
    relative."""
    text_config = model_config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or 0
    rope = getattr(text_config, "rope_parameters", None) or {}
    each = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # per kind of layer
    is_scaled = any(part.get("rope_type", "default") != "default" for part in each)
    is_relative = not getattr(text_config, "position_biased_input", True)
    extrapolates = getattr(text_config, "alibi", False) or is_scaled or is_relative
    return limit if limit > 0 else math.inf, bool(extrapolates)


def stop_token_ids(model_config, tokenizer, config) -> set[int]:
    """EOS, the end of turn that the chat template writes, and the tokens that the model lists in
    generation_config.json or, if that lists none, in config.json. Raises UserError for a file that
    cannot be read."""
    file = folder_of(config.policy, config.policy_flag(), config) / "generation_config.json"
    listed = set()
    if file.is_file():
        with hub.explained(f"{config.policy_flag()} {file}", "cannot be read", file):
            listed = ids_in(GenerationConfig.from_pretrained(str(file.parent)).eos_token_id)
    listed = listed or ids_in(getattr(model_config.get_text_config(), "eos_token_id", None))
    return {tokenizer.eos_token_id, end_of_turn(tokenizer)} | listed


def ids_in(listed: list[int] | int | None) -> set[int]:
    listed = listed if isinstance(listed, list) else [listed]
    return {int(token) for token in listed if token is not None}


def take_out_dropout(model: PreTrainedModel) -> None:
    """Sets all of a loaded model's dropout probabilities to 0. Layers that checkpoint are in
    training mode during an update, and would obey them. The body keeps the published config, which
    is saved with the trained weights."""
    published = copy.deepcopy(model.config)
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        set_dropout_to_0(module)
    model.base_model.published_config = published


def set_dropout_to_0(owner: nn.Module | PreTrainedConfig) -> None:
    """Of a module and its config, or of a config and those in it."""
    for name, value in vars(owner).items():
        if isinstance(value, float) and "drop" in name:
            setattr(owner, name, 0.0)
        elif isinstance(value, PreTrainedConfig):
            set_dropout_to_0(value)


def published_config(body) -> PreTrainedConfig:
    """A copy of the config that a body was loaded with, or made from."""
    return copy.deepcopy(getattr(body, "published_config", body.config))


def ids_without_token(policy, tokenizer) -> list[int]:
    """The ids that the policy could sample but its tokenizer has no token for. Many checkpoints pad
    their matrices with such rows."""
    rows = len(policy.get_output_embeddings().weight)
    return sorted(set(range(rows)) - set(tokenizer.get_vocab().values()))


def has_gaps(policy) -> bool:
    """Whether ids without a token lie between the others."""
    rows = len(policy.get_output_embeddings().weight)
    return bool(policy.tokenless) and policy.tokenless[0] < rows - len(policy.tokenless)


# ---- Checks

# Buffers that models made themselves, some in older versions of the library: rotary frequencies,
# causal masks, positions.
HARMLESS = (r"rotary|inv_freq|masked_bias$|causal_mask$|(attn|attention)\.bias$|position_ids$|"
            r"\.version$")


def check_loaded(model, report: dict, source: str, needed: str, optional=frozenset(),
                 may_have_heads: bool = False) -> None:
    """Raises UserError for weights that the checkpoint lacks or has in another shape, because the
    library then makes them up, and for weights that the library left out. A file may have heads of
    other tasks if `may_have_heads`: what is in no part of the model, poolers, a normaliser's
    count."""
    missing = sorted(set(report["missing_keys"]) - optional)
    prefixes = {there.removesuffix(name) for name in missing[:1] for there in
                report["unexpected_keys"] if there.endswith(f".{name}")}
    hint = f"; the file has it as {min(prefixes)}{missing[0]}" if prefixes else ""
    require(not missing, f"{source}: has no {', '.join(missing[:3])}; {needed}{hint}")

    other = sorted(f"{name} {list(there)}, not {list(here)}"
                   for name, there, here in report["mismatched_keys"])
    require(not other, f"{source}: has {', '.join(other[:3])}; {needed}")

    buffers = dict(model.named_buffers())
    parts = {part for whole in (model, model.base_model) for part, _ in whole.named_children()}
    left_out = sorted(
        name for name in report["unexpected_keys"]
        if name not in buffers and not re.search(HARMLESS, name)
        and not (may_have_heads and (name.split(".")[0] not in parts
                                     or re.search(r"pooler\.|^normalizer\.", name))))
    known, remedy = model.state_dict(), "correct config.json, or take them out of the file"
    if any(re.sub(r"\.\d+\.", ".0.", name, count=1) in known for name in left_out):
        remedy = "correct num_hidden_layers there"
    require(not left_out, f"{source}: has {', '.join(left_out[:3])}, of which its config.json "
                          f"knows nothing; {remedy}")


def check_weights(model, tokenizer, embeddings, source: str) -> None:
    """Raises UserError for fewer embeddings than tokens, and for weights that are not finite."""
    tokens = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    require(tokens <= embeddings.num_embeddings,
            f"{source}: its tokenizer has {tokens} tokens, "
            f"the model only {embeddings.num_embeddings} embeddings")
    for name, weight in model.named_parameters():
        require(weight.is_meta or torch.stack(weight.detach().aminmax()).isfinite().all(),
                f"{source}: {name} holds numbers that are NaN or infinite")


def check_policy(policy, tokenizer, source: str) -> None:
    """Raises UserError unless a policy is a causal language model with finite weights."""
    check_weights(policy, tokenizer, policy.get_input_embeddings(), source)
    if policy.device.type == "meta":
        return
    with blame(f"{source}: cannot read tokens"):
        causal = is_causal(policy)
    require(causal, f"{source}: its tokens see the tokens after them, as in an encoder; "
                    "a policy must be a causal language model")


@torch.no_grad()
def is_causal(policy) -> bool:
    """Whether the logits at a token are the same whatever follows it."""
    pair = torch.tensor([[0, 1], [0, 2]], device=policy.device)
    one, other = policy(pair).logits[:, 0].float()                             # [V] each
    # Exactly equal in every decoder tried, 0.008 apart in an untrained encoder.
    return bool((one - other).abs().max() <= 1e-3 * one.abs().max())


class Head(NamedTuple):
    """An LM head that the kernels can fuse: logits = scale (hidden @ weight.T), or, with a soft
    cap, cap tanh(hidden @ weight.T / cap)."""

    scale: float = 1.0
    soft_cap: float = 0.0

    def logits(self, products: torch.Tensor) -> torch.Tensor:
        """hidden @ weight.T -> logits, any shape."""
        logits = self.scale * products if self.scale != 1 else products
        return self.soft_cap * (logits / self.soft_cap).tanh() if self.soft_cap else logits


@torch.no_grad()
def find_head(policy) -> Head | None:
    """The Head that makes a policy's logits, or None if they are more than a Head can do (a bias,
    for example). The config says what the head should be. Hidden states of known size, put in the
    body's place, show whether it is: small ones show a scale, large ones a cap."""
    output, config = policy.get_output_embeddings(), policy.config.get_text_config()
    scale, divisor, soft_cap = (  # None, or no number, where a config has the name for other things
        value if isinstance(value, (int, float)) and value > 0 else default
        for value, default in (
            (getattr(config, "logit_scale", None), 1.0),
            (getattr(config, "logits_scaling", None), 1.0),
            (getattr(config, "final_logit_softcapping", None), 0.0),
        )
    )
    head = Head(scale / divisor, soft_cap)
    if getattr(output, "bias", None) is not None or (head.soft_cap and head.scale != 1):
        return None
    if has_gaps(policy):
        return None
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, output.weight.shape[1], generator=generator)
    hidden = (torch.tensor([1.0, 1e4])[:, None] * hidden).to(output.weight)    # [1, 2, H]

    def replace(body, inputs, outputs):
        outputs.last_hidden_state = hidden
        return outputs

    hook = policy.base_model.register_forward_hook(replace)
    ids = torch.zeros(1, 2, dtype=torch.long, device=policy.device)
    logits = policy(ids).logits.float()                                        # [1, 2, V]
    hook.remove()
    expected = head.logits((hidden @ output.weight.T).float())                 # [1, 2, V]
    errors = (logits - expected).norm(dim=-1)                                  # [1, 2]
    is_head = bool((errors < 0.02 * expected.norm(dim=-1)).all())              # bf16 is 0.4 % off
    return head if is_head else None


# ---- Forward

def head_weight(policy) -> Tensor:
    """The LM head's rows without those at its end that have no token: [V, H]. The kernels take them
    with policy.fused_head."""
    weight = policy.get_output_embeddings().weight
    return weight[:-len(policy.tokenless)] if policy.tokenless else weight


def model_inputs(input_ids: Tensor, attention_mask: Tensor,
                 pixel_values: Tensor | None = None) -> dict:
    """A model's arguments. Positions count from each row's first real token, so that left padding
    changes nothing."""
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)                       # [B, L]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "use_cache": False,
        **in_call(pixel_values, input_ids.device),
    }


def hidden_states(body, input_ids: Tensor, attention_mask: Tensor,
                  pixel_values: Tensor | None = None) -> Tensor:
    """A body's last hidden states: [B, L], [B, L] -> [B, L, H]; at padding they mean nothing. A
    prompt that several rows begin with is read once, unless rows have pictures [3, S, S]."""
    inputs = model_inputs(input_ids, attention_mask, pixel_values)
    if pixel_values is not None:
        return body(**inputs).last_hidden_state                                      # [B, L, H]
    prompts, cache = cached_prompts(body, input_ids, attention_mask)                 # [B, c, H]
    if cache is None:
        return read(body, input_ids, attention_mask)[0]                              # [B, L, H]
    for name in ("input_ids", "position_ids"):
        inputs[name] = inputs[name][:, prompts.shape[1]:]
    rest = body(**inputs, past_key_values=cache).last_hidden_state                   # [B, L-c, H]
    return torch.cat([prompts, rest], 1)


def response_logits(policy, batch) -> Tensor:
    """The logits at the states before the N response tokens, made whole: [N, V]."""
    row, column, _ = batch.response_tokens()                                         # [N], [N]
    kept = batch.response_mask.shape[1] + 1                                          # T+1
    inputs = model_inputs(batch.input_ids, batch.attention_mask, batch.pixel_values)
    logits = policy(**inputs, logits_to_keep=kept).logits                            # [b, T+1, V]
    first_kept = batch.input_ids.shape[1] - kept                                     # P-1
    logits = logits[row, column - first_kept]                                        # [N, V]
    if policy.tokenless:  # never sampled; a finite number, because entropies multiply by it
        tokenless = torch.tensor(policy.tokenless, device=logits.device)
        logits = logits.index_fill(-1, tokenless, -1e30)
    return logits


# ---- Tokens that several rows begin with, read once

def can_share(body, rows: Tensor | tuple[Tensor]) -> bool:
    """Not with one row, with several ranks (which must call a body equally often), where layers
    recompute in updates (gradient checkpointing), or with a cache of more than keys and values."""
    recomputes = any(getattr(layer, "gradient_checkpointing", False) for layer in body.modules())
    return len(rows) > 1 and RANKS == 1 and not recomputes and has_plain_cache(body)


@torch.no_grad()
def has_plain_cache(body) -> bool:
    """Found out once, by reading a token."""
    if not hasattr(body, "has_plain_cache"):
        outputs = body(torch.zeros(1, 1, dtype=torch.long, device=body.device), use_cache=True)
        cache = outputs.get("past_key_values")
        body.has_plain_cache = type(cache) is DynamicCache and all(
            type(layer) is DynamicLayer for layer in cache.layers)
    return body.has_plain_cache


def columns_to_share(input_ids: Tensor, attention_mask: Tensor) -> int:
    """The number c of columns [B, L] that saves most if each distinct beginning of c columns is
    read once; 0 if that does not pay. All rows have a token in them; the last column is apart."""
    rows = torch.unique(input_ids.where(attention_mask.bool(), -1), dim=0)           # [D, L] sorted
    differ = (rows[1:] != rows[:-1]).cumsum(1) > 0                                   # [D-1, L]
    distinct = 1 + differ.sum(0)  # beginnings of 1 .. L columns                     # [L]
    columns = 1 + torch.arange(len(distinct), device=rows.device)                    # [L]
    has_begun = attention_mask.cumsum(1).bool().all(0)                               # [L]
    saved, best = (has_begun * (len(input_ids) - distinct) * columns)[:-1].max(0)
    pays = saved >= len(input_ids) * max(MIN_SHARED, len(distinct) / 8)
    return int(best) + 1 if pays else 0


def cached_prompts(body, input_ids: Tensor, attention_mask: Tensor):
    """(states [B, c, H], cache) of the first c columns of rows [B, L]; each distinct prompt is read
    once. (None, None) if that does not pay or is impossible."""
    shared = 0
    if input_ids.shape[1] > MIN_SHARED and can_share(body, input_ids):
        shared = columns_to_share(input_ids, attention_mask)
    if not shared:
        return None, None
    input_ids, attention_mask = input_ids[:, :shared], attention_mask[:, :shared]
    keys = input_ids.where(attention_mask.bool(), -1)                                # [B, c]
    _, which = torch.unique(keys, dim=0, return_inverse=True)                        # [B] of U
    places = torch.arange(len(which), device=which.device)
    chosen = which.new_zeros(int(which.max()) + 1).scatter(0, which, places)         # [U]
    hidden, cache = read(body, input_ids[chosen], attention_mask[chosen], use_cache=True)
    cache.reorder_cache(which)
    return hidden.index_select(0, which), cache


def read(body, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False):
    """(states [B, L, H], with use_cache their cache of L columns). Tokens that all rows begin with,
    such as a system prompt, are read once."""
    is_token = attention_mask.bool()                                                 # [B, L]
    lengths = is_token.sum(1)                                                        # [B]
    rows = input_ids[is_token].split(lengths.tolist())                               # B of [T_i]
    first, cache = shared_beginning(body, rows)                                      # [1, s, H]
    if cache is None:
        inputs = model_inputs(input_ids, attention_mask) | {"use_cache": use_cache}
        outputs = body(**inputs)
        return outputs.last_hidden_state, outputs.get("past_key_values")             # [B, L, H]

    # The padding is on the right, so no real token attends to it.
    rest = pad_sequence([row[first.shape[1]:] for row in rows], batch_first=True)    # [B, M]
    states = body(rest, past_key_values=cache).last_hidden_state                     # [B, M, H]
    states = torch.cat([first.expand(len(rows), -1, -1), states], 1)                 # [B, s+M, H]
    is_state = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
    hidden = states.new_zeros(*input_ids.shape, states.shape[-1])                    # [B, L, H]
    hidden[is_token] = states[is_state]  # both go row by row
    if use_cache:  # its columns are positions
        positions = model_inputs(input_ids, attention_mask)["position_ids"][:, None, :, None]
        for layer in cache.layers:
            layer.keys, layer.values = (
                kept.take_along_dim(positions, 2) for kept in (layer.keys, layer.values))
    return hidden, cache


def shared_beginning(body, rows: tuple[Tensor]):
    """(hidden states [1, s, H] of the s tokens that B rows begin with, their cache for B rows).
    (None, None) if they are few, or if that is impossible."""
    shared = count_shared(rows) if can_share(body, rows) else 0
    if shared < MIN_SHARED:
        return None, None
    beginning = body(rows[0][None, :shared], use_cache=True)
    beginning.past_key_values.batch_repeat_interleave(len(rows))
    return beginning.last_hidden_state, beginning.past_key_values


def count_shared(rows: tuple[Tensor]) -> int:
    """How many tokens all rows have in common at their beginning, at least one token less than the
    shortest row. Rounded down to eights, so that chance does not change it from batch to batch."""
    shortest = min(map(len, rows)) - 1
    beginnings = torch.stack([row[:shortest] for row in rows])                       # [B, shortest]
    are_equal = (beginnings == beginnings[0]).all(0)                                 # [shortest]
    return int(are_equal.cumprod(0).sum()) // 8 * 8


# ---- Sampling

def generate(policy, tokenizer, prompts: list[list[int]], draw, max_tokens: int, config,
             pixel_values: Tensor | None = None, stops=(), may_compile=True) -> list[list[int]]:
    """The library's generate for b prompts, perhaps with pictures [b, 3, S, S]. `draw` chooses each
    token, and `stops` are the library's stopping criteria. Returns token ids, also those after an
    end."""
    input_ids, mask = (part.to(config.device) for part in pad_rows(  # [b, P] each
        prompts, [[]] * len(prompts), tokenizer.pad_token_id))
    compiles = may_compile and can_compile(policy, config)
    settings = GenerationConfig(
        do_sample=False,  # the library takes the largest score, which `draw` has set
        max_new_tokens=max_tokens,
        eos_token_id=sorted(policy.stop_token_ids),
        pad_token_id=tokenizer.pad_token_id,
        cache_implementation="static" if compiles else None,
    )
    processors, never = [draw], list(policy.tokenless)
    if getattr(tokenizer, "sight", None):  # no answer shows a picture
        never.append(tokenizer.convert_tokens_to_ids(tokenizer.sight.place_holder))
    if never:
        processors.insert(0, SuppressTokensLogitsProcessor(never, config.device))
    # Without this the library's product copies the head once for each row of a slice.
    whole = policy.get_output_embeddings().register_forward_pre_hook(
        lambda head, inputs: inputs[0].contiguous())
    with whole, torch.inference_mode(), config.autocast():
        cache = None
        # Only with a Head is it known that the body is apart.
        if pixel_values is None and not compiles and getattr(policy, "fused_head", None):
            cache = cached_prompts(policy.base_model, input_ids, mask)[1]
        token_ids = policy.generate(
            input_ids=input_ids,                                                 # [b, P]
            attention_mask=mask,                                                 # [b, P]
            past_key_values=cache,
            **in_call(pixel_values, config.device),                              # [b, 3, S, S]
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(stops),
            synced_gpus=False,
        )                                                                        # [b, P+T]
    return token_ids[:, input_ids.shape[1]:].tolist()


def can_compile(policy, config) -> bool:
    """Whether the library may compile its decoding steps, with a cache of fixed shape: on a GPU,
    without FSDP's hooks, and without autocast to another dtype than the weights'."""
    is_in_compute_dtype = policy.dtype == getattr(torch, config.dtype)
    return config.device == "cuda" and RANKS == 1 and is_in_compute_dtype


# ---- Saving what was trained

def save_policy(folder: Path, policy, weights: dict[str, Tensor], config) -> None:
    """Writes a plain model in the compute dtype. The library's Auto classes can load it."""
    saved_config = published_config(policy.base_model)

    def new_model():
        with torch.device("meta"):
            return model_class(sees(policy.config)).from_config(
                saved_config, dtype=getattr(torch, config.dtype),
                trust_remote_code=config.trust_remote_code)

    plain = new_model()
    live = dict(policy.named_parameters(remove_duplicate=False))
    tied = plain.all_tied_weights_keys  # saved once, under the other name
    if any(live[name] is not live[other] for name, other in tied.items()):
        saved_config.tie_word_embeddings = False  # its file had both, whatever its config says
        plain = new_model()
        tied = plain.all_tied_weights_keys
    weights = {name: weight for name, weight in weights.items() if name not in tied}
    plain.generation_config = policy.published_generation_config
    plain.save_pretrained(folder, state_dict=typed_as_in(plain, weights))


def typed_as_in(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the types of a model's parameters. Buffers keep theirs."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: weight.to(parameters[name].dtype) if name in parameters else weight
            for name, weight in weights.items()}
