"""`python repo.py --dry_run`: what a run would do and the memory that it would need, before any
weight is loaded.

The models are built on the meta device, whose tensors have shapes but no content. So weights,
gradients and optimiser state are counted. Activations and caches come from formulas.
"""
import math
import os
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels import reference
from plumbing.data import encode_prompts, load_ptx_pairs, render_prompt, split_prompts
from plumbing.errors import UserError, require, say
from plumbing.functions import load_function
from plumbing.models import check_sources, load_policy
from plumbing.ranks import RANKS
from plumbing.training import Models, recomputes

GIB, MIB = 2**30, 2**20
RESERVE = 1.5 * GIB  # for the CUDA context, the libraries' workspaces and gaps between tensors


def dry_run(config) -> None:
    """Raises UserError for the first thing that would fail, which may be the memory."""
    say("\n".join(f"--{name} {value}" for name, value in vars(config).items()
                  if value is not None and name != "dry_run") + "\n")
    memory, owner = memory_available(config)
    check_sources(config)
    models, prompts, pairs = load_shapes(config)
    show_prompts(models, prompts, pairs, config)
    show_models(models)

    longest = longest_rows(prompts, pairs, models.tokenizer, config)
    say(f"the longest prompt has {longest.prompt} tokens; a padded row has up to {longest.row}")
    chosen = Mode(config.lora_rank, recomputes(models.policy, config))
    plans = plans_of(models, config, longest)
    say(plans_table(plans, chosen) + "\n")
    show_disk(models, config)
    verdict(plans, chosen, memory, owner)


class Mode(NamedTuple):
    """A way to train the same models."""

    lora_rank: int
    checkpointing: bool

    @property
    def title(self) -> str:
        trained = f"rank {self.lora_rank}" if self.lora_rank else "full fine-tuning"
        return f"{trained}, checkpointing" if self.checkpointing else trained

    @property
    def flags(self) -> str:
        checkpointing = "true" if self.checkpointing else "false"
        return f"--lora_rank {self.lora_rank} --gradient_checkpointing {checkpointing}"


# ---- What would be run

def load_shapes(config) -> tuple[Models, list[str], list]:
    """(models without content, training prompts, PTX pairs) of the run. Raises UserError for what a
    run would refuse before it loads weights."""
    on_meta = replace(config, device="meta")
    policy, tokenizer = load_policy(on_meta)
    prompts, _ = split_prompts(config, tokenizer)
    pairs = load_ptx_pairs(config, tokenizer) if config.ptx_coeff else []
    if config.judge:
        load_function(config.judge, "--judge")
    return Models(policy, tokenizer, on_meta), prompts, pairs


def show_prompts(models, prompts, pairs, config) -> None:
    """A few prompts as the policy reads them, one as the scorers do, and how many there are."""
    for prompt, ids in zip(prompts[:3], encode_prompts(prompts[:3], models.tokenizer)):
        say(f"a prompt of {len(ids)} tokens: {render_prompt(prompt, models.tokenizer)!r}")
    for scorer in (models.reward_model, models.cost_model):
        if scorer.function:
            reads = "prompts and responses as text"
        else:
            whose = "the tokens of the policy" if scorer.same_tokens else "its own tokens"
            tokenizer = models.tokenizer if scorer.same_tokens else scorer.tokenizer
            text = render_prompt(prompts[0], tokenizer)
            reads = f"{whose}: {text!r} + response + {scorer.tokenizer.eos_token!r}"
        say(f"{scorer.flag} {scorer.source} reads {reads}")
    steps = config.steps or math.ceil(len(prompts) / config.batch_size)
    responses = config.batch_size * config.samples_per_prompt
    say(f"{steps:,} steps of {responses} responses; {len(pairs):,} PTX pairs\n")


def models_of(models) -> dict:
    """The models by name, without score functions."""
    named = {"reference": models.reference, "policy": models.policy}
    for role, scorer in (("reward", models.reward_model), ("cost", models.cost_model)):
        if not scorer.function:
            named[f"{role} model"] = scorer.model
    _, *critics = models.trained_models()
    return named | {name.replace("_", " "): critic for name, critic in critics}


def show_models(models) -> None:
    """Parameters of each model, how many bytes are its own, and whose weights it shares."""
    say("model             parameters   its own MiB       trained")
    owners = {}  # the first model that has a weight, by the weight's id
    for name, model in models_of(models).items():
        weights = list(model.parameters())
        # Shards are not shared.
        borrowed = [weight for weight in weights if id(weight) in owners] if RANKS == 1 else []
        lenders = ", ".join(dict.fromkeys(owners[id(weight)] for weight in borrowed))
        for weight in weights:
            owners.setdefault(id(weight), name)
        own_mib = (nbytes(weights) - nbytes(borrowed)) / MIB
        note = f"shares the weights of: {lenders}" if lenders else ""
        say(f"{name:14s} {numel(weights):>13,} {own_mib:13,.1f} "
            f"{numel(trained_weights(model)):>13,}  {note}")
    say(f"each of the {RANKS} ranks holds 1/{RANKS} of every weight\n" if RANKS > 1 else "")


class Longest(NamedTuple):
    """Lengths in tokens."""

    prompt: int
    row: int     # a padded row of a batch, at most


def longest_rows(prompts, pairs, tokenizer, config) -> Longest:
    """Prompts are padded to the longest of their batch, and a short prompt leaves more of
    --max_length to its response."""
    lengths = [len(ids) for ids in encode_prompts(prompts, tokenizer)]
    room = config.max_length - min(lengths)
    row = max(lengths) + min(config.max_response_length or config.max_length, room)
    if pairs:
        row = max(row, max(len(question) for question, _, _ in pairs)
                  + max(len(answer) for _, answer, _ in pairs))
    return Longest(max(lengths), row)


# ---- The memory that it needs

def plans_of(models, config, longest: Longest) -> dict[Mode, dict]:
    """{mode: its memory_terms}: adapters and full fine-tuning, with and without checkpointing."""
    shapes = {config.lora_rank: models}
    other_rank = 0 if config.lora_rank else 64
    with suppress(UserError):  # a policy may have no layers for adapters
        changed = replace(config, lora_rank=other_rank, device="meta")
        policy, _ = load_policy(changed)
        shapes[other_rank] = Models(policy, models.tokenizer, changed)
    return {Mode(rank, checkpointing): memory_terms(
                models_of_rank, replace(config, lora_rank=rank), longest, checkpointing)
            for rank, models_of_rank in shapes.items() for checkpointing in (True, False)}


def memory_terms(models, config, longest: Longest, checkpointing: bool) -> dict:
    """{term: bytes} on each rank. `models` are shapes that were made with this config's rank."""
    policy, size = models.policy.config.get_text_config(), bytes_per_number(config)
    responses = math.ceil(config.batch_size * config.samples_per_prompt / RANKS)
    rows = min(config.micro_batch_size, responses)
    trained = [trained_weights(model) for _, model in models.trained_models()]
    held = {id(weight): weight for model in models_of(models).values()
            for weight in model.parameters()}
    if RANKS > 1:
        whole = nbytes(weight for model in models_of(models).values()
                       for weight in model.parameters())
        learning = max(gathered(model, size) for _, model in models.trained_models())
        sampling = numel(models.policy.parameters()) * size  # each rank holds the whole policy
    else:
        whole, sampling = nbytes(held.values()), 0
        # Autocast keeps a bf16 copy of each fp32 weight until the backward is over.
        copies = size == 2 and not config.lora_rank
        learning = 2 * max(map(numel, trained)) if copies else 0
    parameters = sum(map(numel, trained))
    kept, one_layer = max(
        activations(model.config.get_text_config(), rows * longest.row, checkpointing, config)
        for _, model in models.trained_models())
    return {
        "weights": whole / RANKS,
        "optimiser": 2 * 4 * parameters / RANKS,  # AdamW's two moments, in fp32
        "gradients": 4 * parameters / RANKS,
        "weights in use, learning": learning,
        "weights in use, sampling": sampling,
        "activations kept": kept,
        "of one layer, or the loss": max(
            one_layer, loss_chunk(policy, rows * (longest.row - longest.prompt), config)),
        "KV cache": 2 * policy.num_hidden_layers * kv_width(policy) * responses * longest.row
        * size,
        "logits of sampling": 4 * 4 * responses * policy.vocab_size,  # four copies, in fp32
        "reserve": RESERVE if config.device == "cuda" else 0,
    }


def total(terms: dict) -> float:
    """Weights and optimiser are always there. Rollout and learning come one after the other."""
    learning = sum(terms[name] for name in (
        "gradients", "weights in use, learning", "activations kept", "of one layer, or the loss"))
    rollout = sum(terms[name] for name in (
        "weights in use, sampling", "KV cache", "logits of sampling"))
    return terms["weights"] + terms["optimiser"] + terms["reserve"] + max(learning, rollout)


def activations(model_config, tokens: int, checkpointing: bool, config) -> tuple[float, float]:
    """Bytes of a micro-batch's activations in one model: (kept from forward to backward, of the
    layer that is in its backward). In numbers per token, for hidden size H, width K of the keys,
    MLP width I and L layers:

        kept   L (10 H + 2 K + 4 I)    the inputs of products and norms
               L H                     with checkpointing: each layer's input
        layer  8 H                     the gradients on their way
               12 H + 2 K + 6 I        with checkpointing: what is made again, and its gradients

    Attention keeps its inputs and its output, as flash attention does. The factors were fitted to
    traced forwards of Llamas: the sum is within 7 % in bf16, and up to 20 % above it in fp32.
    """
    h, k, layers = model_config.hidden_size, kv_width(model_config), model_config.num_hidden_layers
    i = getattr(model_config, "intermediate_size", None) or 4 * h
    kept, one_layer = layers * (10 * h + 2 * k + 4 * i), 8 * h
    if checkpointing:
        kept, one_layer = layers * h, 12 * h + 2 * k + 6 * i
    size = bytes_per_number(config)
    gradient = 0 if config.lora_rank else h * i  # of the largest weight, before it is summed
    return kept * tokens * size, (one_layer * tokens + gradient) * size


def loss_chunk(policy, tokens: int, config) -> float:
    """Bytes that the fused loss holds at one time: kernels/linear.py on a GPU,
    kernels/reference.py on a CPU. `policy` is the model's config."""
    vocab, hidden, size = policy.vocab_size, policy.hidden_size, bytes_per_number(config)
    head_gradient = 0 if config.lora_rank else 4 * vocab * hidden  # summed in fp32
    if config.device == "cuda":
        rows = reference.rows_per_chunk(hidden, not config.lora_rank)
        logits = min(rows, tokens) * math.ceil(vocab / 64) * 64 * size
    else:
        size = 4  # the reference computes in fp32, and has four copies of a chunk's logits
        rows = reference.rows_per_chunk_on_cpu(vocab, hidden)
        logits = 4 * size * min(rows, tokens) * vocab
    return logits + 2 * tokens * hidden * size + head_gradient  # with states and their gradient


def gathered(model, size: int) -> int:
    """Bytes of a sharded model that are whole at one time while it learns: two layers and all that
    lies outside the layers, each with its gradient, and that gradient in fp32 on its way."""
    layers = [numel(layer.parameters()) for layer in model.modules()
              if isinstance(layer, GradientCheckpointingLayer)]
    outside = numel(model.parameters()) - sum(layers)
    return (2 * max(layers, default=0) + outside) * (size + size + 4)


def kv_width(model_config) -> int:
    """Of a token's keys in one layer."""
    heads = model_config.num_attention_heads
    kv_heads = getattr(model_config, "num_key_value_heads", None) or heads
    return kv_heads * (getattr(model_config, "head_dim", None) or model_config.hidden_size // heads)


def bytes_per_number(config) -> int:
    return 2 if config.dtype == "bfloat16" else 4


def numel(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors)


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def trained_weights(model) -> list:
    return [weight for weight in model.parameters() if weight.requires_grad]


# ---- What there is, and the verdict

def memory_available(config) -> tuple[float, str]:
    """(bytes that each rank may use, whose they are). Raises UserError for a --gpu_memory that is
    not a size."""
    if config.device == "cpu":
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return size / RANKS, "this computer"
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB)", config.gpu_memory)
    require(match and float(match[1]) > 0,
            f"--gpu_memory {config.gpu_memory}: not a size such as 80GiB or 24GB")
    unit = GIB if match[2] == "GiB" else 1e9
    return float(match[1]) * unit, f"a GPU of {config.gpu_memory}"


def show_disk(models, config) -> None:
    trained = sum(numel(trained_weights(model)) for _, model in models.trained_models())
    size = 3 * 4 * trained  # each weight and AdamW's two moments, in fp32
    output_dir = Path(config.output_dir).absolute()
    nearest = next(folder for folder in output_dir.parents if folder.exists())
    free = shutil.disk_usage(nearest).free
    say(f"a checkpoint takes {size / GIB:.1f} GiB of disk; with --save_every there are up to "
        f"{config.keep_checkpoints + 1} at a time, and {free / GIB:.1f} GiB are free")


def plans_table(plans: dict[Mode, dict], chosen: Mode) -> str:
    """A column per mode, with a star at the run's own."""
    unit, divisor = ("GiB", GIB) if max(map(total, plans.values())) > GIB else ("MiB", MIB)

    def line(name: str, cells) -> str:
        return f"{name:26s}" + "".join(f"{cell:>32s}" for cell in cells)

    lines = [line(unit, (mode.title + "*" * (mode == chosen) for mode in plans))]
    for term in plans[chosen]:
        lines.append(line(term, (f"{terms[term] / divisor:.2f}" for terms in plans.values())))
    lines.append(line("at the worst moment",
                      (f"{total(terms) / divisor:.2f}" for terms in plans.values())))
    return "\n".join(lines)


def verdict(plans: dict[Mode, dict], chosen: Mode, memory: float, owner: str) -> None:
    """Says which modes fit. Raises UserError, with the largest term and a mode that fits, if the
    chosen mode does not."""
    per_rank = " per rank" if RANKS > 1 else ""
    for mode, terms in plans.items():
        fits = "fits" if total(terms) <= memory else "does not fit"
        say(f"{mode.title}: {total(terms) / GIB:.1f} GiB{per_rank}, {fits} on {owner}")
    terms = plans[chosen]
    largest = max(terms, key=terms.get)
    fitting = [mode for mode in plans if total(plans[mode]) <= memory]
    advice = f"use {fitting[0].flags}" if fitting else "take a larger GPU or a smaller model"
    require(chosen in fitting,
            f"{chosen.title} needs {total(terms) / GIB:.1f} GiB, {owner} has {memory / GIB:.1f}; "
            f"the largest term is {largest}, {terms[largest] / GIB:.1f} GiB; {advice}, or lower "
            "--micro_batch_size, --batch_size or --max_length if these are the large terms")
