"""`python repo.py --dry_run`: what a run would do and the memory that it would need, before any
weight is loaded.

The models are built on the meta device, whose tensors have shapes but no content. There the plan
counts weights, gradients and optimiser state. Activations and caches come from formulas.
"""
import math
import os
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels import reference
from plumbing.data import (
    closing,
    conversation_texts,
    encode_prompts,
    load_ptx_pairs,
    render_prompt,
    split_prompts,
)
from plumbing.errors import UserError, blame, require, say
from plumbing.functions import load_function
from plumbing.models import check_sources, load_policy
from plumbing.ranks import RANKS
from plumbing.scorers import SequenceClassifier
from plumbing.training import Models, recomputes

GIB, MIB = 2**30, 2**20
RESERVE = 1.5 * GIB  # for the CUDA context, the libraries' workspaces and gaps between tensors


def dry_run(config) -> None:
    """Raises UserError for the first thing that would fail, which may be the memory."""
    say("\n".join(f"--{name} {value}" for name, value in vars(config).items()
                  if value is not None and name != "dry_run") + "\n")
    memory, owner = memory_available(config)
    check_sources(config)
    models = load_shapes(config)
    prompts, _ = split_prompts(config, models.tokenizer)
    pairs = load_ptx_pairs(config, models.tokenizer) if config.needs_pairs() else []
    if config.judge:
        load_function(config.judge, "--judge")

    show_prompts(models, prompts, pairs, config)
    show_models(models)
    show_disk(models, config)
    lengths = longest_rows(prompts, pairs, models.tokenizer, config)
    say("The longest prompt has {} tokens. A padded row has up to {} tokens.\n".format(*lengths))
    with blame("--dry_run: the memory of these models cannot be planned"):
        plans = plans_of(models, config, lengths)
    show_memory(plans, memory, owner)


def load_shapes(config) -> Models:
    on_meta = replace(config, device="meta")
    return Models(*load_policy(on_meta), on_meta)


# ---- Prompts, models and disk

def show_prompts(models, prompts, pairs, config) -> None:
    """Three prompts as the policy reads them, what each scorer reads, and how many there are."""
    for prompt, ids in zip(prompts[:3], encode_prompts(prompts[:3], models.tokenizer)):
        say(f"a prompt of {len(ids)} tokens: {render_prompt(prompt, models.tokenizer)!r}")
    for scorer in (models.reward_model, models.cost_model):
        scorer.check_prompts(prompts)
        if scorer.function:
            reads = "prompts and responses as text, without a template and an end token"
        else:
            whose = "the tokens of the policy" if scorer.same_tokens else "its own tokens"
            [text] = conversation_texts(scorer.tokenizer, prompts[:1], ["RESPONSE"], [True])
            end = closing(scorer.tokenizer)
            reads = f"{whose}: {text!r}, and without {end!r} where the response was cut off"
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
        note = f"  shares the weights of: {lenders}" if lenders else ""
        say(f"{name:14s} {numel(weights):>13,} {own_mib:13,.1f} "
            f"{numel(trained_weights(model)):>13,}{note}")
    say(f"each of the {RANKS} ranks holds 1/{RANKS} of every weight\n" if RANKS > 1 else "")


def show_disk(models, config) -> None:
    trained = sum(numel(trained_weights(model)) for _, model in models.trained_models())
    checkpoint = 3 * 4 * trained  # each weight and AdamW's two moments, in fp32
    output_dir = Path(config.output_dir).absolute()
    nearest = next(folder for folder in output_dir.parents if folder.exists())
    free = shutil.disk_usage(nearest).free
    say(f"A checkpoint takes {as_size(checkpoint)} of disk, and {as_size(free)} are free. With "
        f"--save_every there are up to {config.keep_checkpoints + 1} checkpoints at a time.\n")


# ---- Memory

def longest_rows(prompts, pairs, tokenizer, config) -> tuple[int, int]:
    """In tokens, (the longest prompt, a padded row of a batch at most). Prompts are padded to the
    longest of their batch, and a short prompt leaves more of --max_length to its response."""
    lengths = [len(ids) for ids in encode_prompts(prompts, tokenizer)]
    room = config.max_length - min(lengths)
    row = max(lengths) + min(config.max_response_length or config.max_length, room)
    if pairs:
        row = max(row, max(len(question) for question, _, _ in pairs)
                  + max(len(answer) for _, answer, _ in pairs))
    return max(lengths), row


def plans_of(models, config, lengths) -> dict[str, dict]:
    """{flags: memory_terms} of the run's own way to train, then of its alternatives: adapters or
    all weights, with or without gradient checkpointing."""
    own = recomputes(models.policy, config)
    plans = {}
    for rank in (config.lora_rank, 0 if config.lora_rank else 64):
        changed = replace(config, lora_rank=rank)
        with suppress(UserError):  # a policy may have no layers for adapters
            shapes = models if rank == config.lora_rank else load_shapes(changed)
            for checkpointing in (own, not own):
                flags = f"--lora_rank {rank} --gradient_checkpointing {checkpointing}".lower()
                plans[flags] = memory_terms(shapes, changed, lengths, checkpointing)
    return plans


def memory_terms(models, config, lengths, checkpointing: bool) -> dict:
    """{term: bytes} of each rank. `models` are the shapes for this config, and `lengths` come from
    longest_rows."""
    longest_prompt, row = lengths
    policy, size = models.policy.config.get_text_config(), bytes_per_number(config)
    responses = math.ceil(config.batch_size * config.samples_per_prompt / RANKS)
    rows = min(config.micro_batch_size, responses)
    weights = [weight for model in models_of(models).values() for weight in model.parameters()]
    learners = [model for _, model in models.trained_models()]
    trained = [numel(trained_weights(model)) for model in learners]
    while_learning = while_sampling = 0
    if RANKS > 1:
        while_learning = max(gathered(model, size) for model in learners)
        while_sampling = numel(models.policy.parameters()) * size  # whole, on each rank
    else:
        weights = {id(weight): weight for weight in weights}.values()  # a shared one counts once
        if size == 2:  # the forward keeps bf16 copies of trained fp32 weights for the backward
            while_learning = size * max(trained)
    kept, of_a_layer = max(
        activations(model.config.get_text_config(), rows * row, checkpointing, config)
        for model in learners)
    loss = loss_chunk(policy, rows * (row - longest_prompt), config)

    # On one GPU these read what rows begin with once, and keep a micro-batch's cache.
    sharing = [model for model in models_of(models).values()
               if not isinstance(model, SequenceClassifier)]

    def cache(model, count: int) -> int:  # keys and values
        widths = map(kv_width, layers_of(model.config.get_text_config()))
        return 2 * sum(widths) * count * row * size

    return {
        "weights": nbytes(weights) / RANKS,
        "optimiser": 2 * 4 * sum(trained) / RANKS,  # AdamW's two moments, in fp32
        "reserve": RESERVE if config.device == "cuda" else 0,
        "learning: gradients": 4 * sum(trained) / RANKS,
        "learning: copies of weights": while_learning,
        "learning: activations": kept,
        "learning: one layer, or loss": max(of_a_layer, loss),  # one comes after the other
        "sampling: copies of weights": while_sampling,
        "sampling: KV cache": cache(models.policy, responses),
        "sampling: logits": 4 * 4 * responses * policy.vocab_size,  # four copies, in fp32
        "scoring: KV cache": max(cache(model, rows) for model in sharing) if RANKS == 1 else 0,
    }


def total(terms: dict) -> float:
    """Sampling, scoring and learning come one after the other. All else is always there."""
    phases = [sum(terms[name] for name in terms if name.startswith(phase))
              for phase in ("sampling", "scoring", "learning")]
    return sum(terms.values()) - sum(phases) + max(phases)


def activations(model_config, tokens: int, checkpointing: bool, config) -> tuple[float, float]:
    """Bytes of a micro-batch's activations in one model: (kept from forward to backward, of the
    layer whose backward runs). For hidden size H, width K of the keys, MLP width I, L layers and s
    bytes per number, a token takes:

        layer    8 H + s (4 H + 2 K + 4 I)    for both norms their fp32 inputs and their outputs;
                                              queries, keys, values, attention's output;
                                              in the MLP gate, its SiLU, up and their product
                 + s 2 H                      if the norms are trained: the normalised inputs
        moving   8 H + s 2 I                  gradients on their way through a layer

    Without checkpointing all L layers are kept. With it only each layer's input is kept, s H, and
    one layer is made again at a time. Attention keeps no scores, as in flash attention. Frozen
    parts, such as a vision tower, keep nothing. For seven Llama shapes the sum was 8 % below to
    12 % above what a traced forward and backward held.
    """
    h, size, layers = model_config.hidden_size, bytes_per_number(config), layers_of(model_config)
    of_layers = [8 * h + size * (4 * h + 2 * kv_width(layer) + 4 * mlp_width(layer))
                 for layer in layers]
    widest = max(map(mlp_width, layers))
    gradient = 0  # of the largest weight, before it is summed
    if not config.lora_rank:
        of_layers = [of_layer + size * 2 * h for of_layer in of_layers]
        gradient = size * h * widest
    moving = (8 * h + size * 2 * widest) * tokens + gradient
    if checkpointing:
        return len(layers) * size * h * tokens, max(of_layers) * tokens + moving
    return sum(of_layers) * tokens, moving


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


def layers_of(model_config) -> list:
    """Each layer's config. In a few families layers differ in size."""
    return list(model_config.per_layer_config)


def kv_width(layer) -> int:
    """Numbers in a token's keys; 0 in a model without attention, such as Mamba. `layer` is a
    layer's config."""
    heads = getattr(layer, "num_attention_heads", 0)
    if not heads:
        return 0
    kv_heads = getattr(layer, "num_key_value_heads", None) or heads
    return kv_heads * (getattr(layer, "head_dim", None) or layer.hidden_size // heads)


def mlp_width(layer) -> int:
    width = getattr(layer, "intermediate_size", None) or 4 * layer.hidden_size
    return max(width) if isinstance(width, list) else width


def bytes_per_number(config) -> int:
    return 2 if config.dtype == "bfloat16" else 4


def numel(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors)


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def trained_weights(model) -> list:
    return [weight for weight in model.parameters() if weight.requires_grad]


# ---- The verdict

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


def show_memory(plans: dict[str, dict], memory: float, owner: str) -> None:
    """The first plan's terms, then which plans fit. Raises UserError, with the largest term and a
    plan that fits, if the first does not."""
    flags, terms = next(iter(plans.items()))
    needed = {each: total(plan) for each, plan in plans.items()}
    unit, divisor = ("GiB", GIB) if needed[flags] > GIB else ("MiB", MIB)
    say(f"memory{' of each rank' if RANKS > 1 else ''}, in {unit}")
    for name, value in [*terms.items(), ("at most", needed[flags])]:
        say(f"{name:30s}{value / divisor:10.2f}")
    say("")
    for each, value in needed.items():
        fits = "fits" if value <= memory else "does not fit"
        say(f"{each}: {as_size(value)}{' per rank' if RANKS > 1 else ''}, {fits} on {owner}")

    largest = max(terms, key=terms.get)
    fitting = [each for each, value in needed.items() if value <= memory]
    advice = f"use {fitting[0]}" if fitting else "take a larger GPU or a smaller model"
    require(flags in fitting,
            f"{flags}: needs {as_size(needed[flags])}, but {owner} has {as_size(memory)}; the "
            f"largest part is {largest}, {as_size(terms[largest])}; {advice}, or lower "
            "--micro_batch_size, --batch_size or --max_length")


def as_size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count > GIB else f"{count / MIB:.1f} MiB"
