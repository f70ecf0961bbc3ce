"""`python repo.py --dry_run`: what a run would do and the memory it would need, before any weight
is loaded.

The models are built on the meta device, whose tensors have shapes and no content: weights,
gradients and optimiser state are counted, not estimated. Activations are those of one micro-batch
that is really sent through a model there, forward and backward, with every tensor's birth and
death noted; attention is taken to keep its inputs and its output, as flash attention does.
"""
import copy
import math
import os
import re
import resource
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels import reference
from plumbing.alive import Alive
from plumbing.errors import UserError, require, say
from plumbing.functions import load_function
from plumbing.models import check_sources, load_policy
from plumbing.training import Models, recomputes, recomputing, set_checkpointing
from plumbing.pictures import sees
from plumbing.data import encode_prompts, load_ptx_pairs, render_prompt, split_prompts
from plumbing.ranks import RANKS

GIB = 2**30
MIB = 2**20
# What the CUDA context, the libraries' workspaces and gaps between tensors take.
RESERVE = 1.5 * GIB


def dry_run(config) -> None:
    """Everything that repo.run does before it loads weights, then the plan of its memory.

    Raises UserError for the first thing that would fail, which may be the memory.
    """
    show_settings(config)
    memory = memory_available(config)
    check_sources(config)
    models, prompts, pairs = load_shapes(config)
    show_prompts(models, prompts, pairs, config)
    show_models(models)

    longest = longest_rows(prompts, pairs, models.tokenizer, config)
    say(f"the longest prompt has {longest.prompt} tokens; a batch's rows, padded to the longest "
        f"prompt and response, up to {longest.row}")
    chosen = Mode(config.lora_rank, recomputes(models.policy, config))
    plans = plans_of(models, config, longest)
    say(plans_table(plans, chosen) + "\n")
    show_what_fits(plans, memory)
    show_disk(models, config)
    require_memory(plans, chosen, memory)


class Mode(NamedTuple):
    """A way to train the same models: what decides most about the memory that it takes."""

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

def show_settings(config) -> None:
    lines = [f"--{name} {value}" for name, value in vars(config).items()
             if value is not None and name != "dry_run"]
    say("\n".join(lines) + "\n")


def load_shapes(config) -> tuple[Models, list[str], list]:
    """(models without content, training prompts, PTX pairs) of the run.

    Raises UserError for what a run would refuse before it loads weights.
    """
    on_meta = replace(config, device="meta")
    policy, tokenizer = load_policy(on_meta)
    prompts, _ = split_prompts(config, tokenizer)
    pairs = load_ptx_pairs(config, tokenizer) if config.ptx_coeff else []
    if config.judge:
        load_function(config.judge, "--judge")
    return Models(policy, tokenizer, on_meta), prompts, pairs


def show_prompts(models, prompts, pairs, config) -> None:
    """A few prompts as the policy reads them and one as the scorers do, and how many there are."""
    first_three = prompts[:3]
    for prompt, ids in zip(first_three, encode_prompts(first_three, models.tokenizer)):
        say(f"a prompt of {len(ids)} tokens: {render_prompt(prompt, models.tokenizer)!r}")
    for scorer in (models.reward_model, models.cost_model):
        what = what_it_reads(scorer, prompts[0], models.tokenizer)
        say(f"{scorer.flag} {scorer.source} reads {what}")
    steps = config.steps or math.ceil(len(prompts) / config.batch_size)
    responses = config.batch_size * config.samples_per_prompt
    say(f"{steps:,} steps of {responses} responses; {len(pairs):,} PTX pairs\n")


def what_it_reads(scorer, prompt: str, policy_tokenizer) -> str:
    if scorer.function:
        return "prompts and responses as text"
    if scorer.same_tokens:
        tokens, tokenizer = "the tokens of the policy", policy_tokenizer
    else:
        tokens, tokenizer = "its own tokens", scorer.tokenizer
    text = render_prompt(prompt, tokenizer)
    return f"{tokens}: {text!r} + response + {scorer.tokenizer.eos_token!r}"


class Longest(NamedTuple):
    """Lengths in tokens."""

    prompt: int  # the longest
    row: int     # a batch's rows at the worst


def longest_rows(prompts, pairs, tokenizer, config) -> Longest:
    """The longest prompt and row. Prompts are padded to the longest of their batch, and a short
    prompt leaves more of --max_length to its response."""
    lengths = [len(ids) for ids in encode_prompts(prompts, tokenizer)]
    room = config.max_length - min(lengths)
    row = max(lengths) + min(config.max_response_length or config.max_length, room)
    if pairs:
        longest_question = max(len(question) for question, _, _ in pairs)
        longest_answer = max(len(answer) for _, answer, _ in pairs)
        row = max(row, longest_question + longest_answer)
    return Longest(max(lengths), row)


# ---- Its models, and whose weights they are

def models_of(models) -> dict:
    """The models by name; a score function is none."""
    named = {"reference": models.reference, "policy": models.policy}
    if not models.reward_model.function:
        named["reward model"] = models.reward_model.model
    if not models.cost_model.function:
        named["cost model"] = models.cost_model.model
    _, *critics = models.trained
    return named | {name.replace("_", " "): getattr(models, name) for name in critics}


def trained_models(models) -> list:
    return [getattr(models, name) for name in models.trained]


def numel(tensors) -> int:
    return sum(tensor.numel() for tensor in tensors)


def nbytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def trained_weights(model) -> list:
    return [weight for weight in model.parameters() if weight.requires_grad]


def count_trained(models) -> int:
    return sum(numel(trained_weights(model)) for model in trained_models(models))


def show_models(models) -> None:
    say(models_table(models_of(models)))
    say(f"of every weight each of the {RANKS} ranks holds 1/{RANKS}\n" if RANKS > 1 else "")


def models_table(named_models: dict) -> str:
    """Parameters of each model, how many bytes are its own and on whose backbone it sits."""
    lines = ["model             parameters   its own MiB       trained"]
    owners = {}  # the first model that has a weight, by the weight's id
    for name, model in named_models.items():
        parameters = list(model.parameters())
        borrowed = [weight for weight in parameters if id(weight) in owners]
        if RANKS > 1:  # shards are not shared
            borrowed = []
        lenders = dict.fromkeys(owners[id(weight)] for weight in borrowed)
        own_mib = (nbytes(parameters) - nbytes(borrowed)) / MIB
        for weight in parameters:
            owners.setdefault(id(weight), name)

        note = f"shares the weights of: {', '.join(lenders)}" if lenders else ""
        lines.append(f"{name:14s} {numel(parameters):>13,} {own_mib:13,.1f} "
                     f"{numel(trained_weights(model)):>13,}  {note}")
    return "\n".join(lines)


# ---- The memory and disk that there are

class Memory(NamedTuple):
    """What each rank may use."""

    size: float  # bytes
    owner: str


def memory_available(config) -> Memory:
    """Raises UserError for a --gpu_memory that is no size."""
    if config.device == "cpu":
        return Memory(memory_of_this_computer() / RANKS, "this computer")
    if torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
        return Memory(size, torch.cuda.get_device_name())
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB)", config.gpu_memory)
    require(match and float(match[1]) > 0,
            f"--gpu_memory {config.gpu_memory}: not a size such as 80GiB or 24GB")
    unit = GIB if match[2] == "GiB" else 1e9
    return Memory(float(match[1]) * unit, f"a GPU of {config.gpu_memory}")


def memory_of_this_computer() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_mib() -> float:
    """Of the GPU's allocator since the last call; where there is no GPU, of the process so far."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / MIB
    if sys.platform == "linux":  # whose ru_maxrss begins with what the parent process had
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10  # which is in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def show_disk(models, config) -> None:
    """What checkpoints will take, and what there is."""
    size = 3 * 4 * count_trained(models)  # each weight and AdamW's two moments, in fp32
    output_dir = Path(config.output_dir).absolute()
    nearest = next(folder for folder in output_dir.parents if folder.exists())
    free = shutil.disk_usage(nearest).free
    say(f"a checkpoint takes {size / GIB:.1f} GiB of disk; with --save_every there are up to "
        f"{config.keep_checkpoints + 1} at a time, and {free / GIB:.1f} GiB are free")


# ---- The plan

LEARNING = ("gradients", "weights in use, learning", "activations", "loss chunk")
ROLLOUT = ("weights in use, sampling", "KV cache", "logits of sampling")


def total(terms: dict) -> float:
    """Weights and optimiser are always there; rollout and learning come one after the other."""
    learning = sum(terms[name] for name in LEARNING)
    rollout = sum(terms[name] for name in ROLLOUT)
    return terms["weights"] + terms["optimiser"] + terms["reserve"] + max(learning, rollout)


def plans_of(models, config, longest: Longest) -> dict[Mode, dict]:
    """{mode: its memory_terms}: the run's own way to train and its alternative, adapters or full
    fine-tuning, each with and without checkpointing."""
    shapes = {config.lora_rank: models}
    other_rank = 0 if config.lora_rank else 64
    with suppress(UserError):  # a policy may have no layers for adapters
        changed = replace(config, lora_rank=other_rank, device="meta")
        policy, _ = load_policy(changed)
        shapes[other_rank] = Models(policy, models.tokenizer, changed)

    plans = {}
    for rank, models_of_rank in shapes.items():
        changed = replace(config, lora_rank=rank)
        for checkpointing in (True, False):
            plans[Mode(rank, checkpointing)] = memory_terms(
                models_of_rank, changed, config.device, longest, checkpointing)
    return plans


def memory_terms(models, config, device: str, longest: Longest, checkpointing: bool) -> dict:
    """{term: bytes} of a run on the device, or on each rank's.

    `models` are shapes on the meta device, made with this config; `longest` is from longest_rows.
    """
    policy = models.policy.config.get_text_config()
    responses = responses_per_rank(config)
    trained = count_trained(models)
    peak, loss = forward_and_loss(models, config, device, longest, checkpointing)
    return {
        "weights": weights_held(models),
        "optimiser": 2 * 4 * trained / RANKS,  # AdamW's two moments, in fp32
        "gradients": 4 * trained / RANKS,
        "weights in use, learning": weights_in_learning(models, config),
        "weights in use, sampling": weights_in_sampling(models, config),
        "activations": peak,
        "loss chunk": loss,
        "KV cache": kv_cache(policy, responses * longest.row, bytes_per_number(config)),
        # In fp32, with what the sampler makes of them.
        "logits of sampling": 4 * 4 * responses * policy.vocab_size,
        "reserve": RESERVE if device == "cuda" else 0,
    }


def responses_per_rank(config) -> int:
    """In a step."""
    return math.ceil(config.batch_size * config.samples_per_prompt / RANKS)


def bytes_per_number(config) -> int:
    """Of --dtype."""
    return 2 if config.dtype == "bfloat16" else 4


def has_bf16_copies(config) -> bool:
    """Whether autocast keeps a bf16 copy of each fp32 weight until the backward is over."""
    return config.dtype == "bfloat16" and not config.lora_rank


def weights_held(models) -> float:
    weights = [weight for model in models_of(models).values() for weight in model.parameters()]
    if RANKS > 1:  # shards are not shared
        return nbytes(weights) / RANKS
    return nbytes({id(weight): weight for weight in weights}.values())


def weights_in_learning(models, config) -> int:
    """Beyond those held; models learn one after the other."""
    if RANKS > 1:
        size = bytes_per_number(config)
        return max(gathered_while_learning(model, size) for model in trained_models(models))
    if has_bf16_copies(config):
        return 2 * max(numel(trained_weights(model)) for model in trained_models(models))
    return 0


def gathered_while_learning(model, size: int) -> int:
    """Bytes of a sharded model that are whole at one time: a layer, the next one on its way, and
    all that lies outside the layers, each with its gradient as it is computed and, in fp32, as it
    is sent to the other ranks."""
    layers = [numel(layer.parameters()) for layer in model.modules()
              if isinstance(layer, GradientCheckpointingLayer)]
    outside = numel(model.parameters()) - sum(layers)
    return (2 * max(layers, default=0) + outside) * (size + size + 4)


def weights_in_sampling(models, config) -> int:
    """Beyond those held: each rank samples with the whole policy."""
    return numel(models.policy.parameters()) * bytes_per_number(config) if RANKS > 1 else 0


def kv_cache(policy, tokens: int, size: int) -> int:
    """Bytes of the keys and values that sampling keeps; `policy` is the model's config."""
    heads = getattr(policy, "num_key_value_heads", None) or policy.num_attention_heads
    head_dim = getattr(policy, "head_dim", None) or policy.hidden_size // policy.num_attention_heads
    return 2 * policy.num_hidden_layers * heads * head_dim * tokens * size


def forward_and_loss(models, config, device, longest, checkpointing) -> tuple[int, int]:
    """Of a micro-batch through the model that takes most, in bytes: (the worst moment of forward
    and backward, what the loss takes beyond that)."""
    rows = min(config.micro_batch_size, responses_per_rank(config))
    different = {build_of(model): model for model in trained_models(models)}
    peak, kept = max(
        activations(model, rows, longest.row, has_bf16_copies(config), checkpointing)
        for model in different.values()
    )
    policy = models.policy.config.get_text_config()
    loss = loss_chunk(policy, rows * (longest.row - longest.prompt), device, config)
    # The loss comes when the forward is over and the backward has not begun.
    return peak, max(kept + loss - peak, 0)


def build_of(model) -> tuple:
    """Its backbone's class, and its weights by name: models of the same build take the same."""
    body = model.base_model
    weights = [(name, weight.shape, weight.requires_grad)
               for name, weight in body.named_parameters()]
    return type(body), tuple(weights)


def loss_chunk(policy, tokens: int, device: str, config) -> int:
    """Bytes that kernels/linear.py holds at one time on a GPU, kernels/reference.py on a CPU.

    `policy` is the model's config.
    """
    vocab, hidden = policy.vocab_size, policy.hidden_size
    head_gradient = 0 if config.lora_rank else 4 * vocab * hidden  # summed in fp32
    if device == "cuda":
        size = bytes_per_number(config)
        padded_vocab = math.ceil(vocab / 64) * 64
        rows = reference.rows_per_chunk(hidden, not config.lora_rank)
        logits = min(rows, tokens) * padded_vocab * size
    else:
        size = 4  # the reference computes in fp32, and has four of a chunk's logits at a time
        logits = 4 * size * min(reference.rows_per_chunk_on_cpu(vocab, hidden), tokens) * vocab
    states = 2 * tokens * hidden * size  # the hidden states and their gradient
    return logits + states + head_gradient


def activations(model, rows: int, length: int, in_bf16: bool, checkpointing: bool):
    """One micro-batch through a model's backbone: (bytes alive at the worst moment of forward and
    backward, bytes kept between the two), beyond weights and gradients."""
    body = copy.deepcopy(model.base_model)
    if in_bf16:
        body = body.to(torch.bfloat16)
    body.set_attn_implementation("plan")
    set_checkpointing(body, checkpointing)
    trained = trained_weights(body)
    for weight in trained:  # all gradients together have a term of their own
        weight.register_post_accumulate_grad_hook(drop_gradient)

    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    with Alive(body.parameters()) as alive, recomputing([body]):
        states = states_of_pictures(body, rows)
        output = body(input_ids=ids, attention_mask=ids, position_ids=ids, use_cache=False)
        states.append(output.last_hidden_state)
        kept = alive.now
        made = [each for each in states if each.requires_grad]
        torch.autograd.backward(made, [torch.empty_like(each) for each in made], inputs=trained)
    return alive.peak, kept


def states_of_pictures(body, rows: int) -> list:
    """What a body that sees makes of as many pictures; they would stand among the embeddings, where
    tensors without content can not be put."""
    if not sees(body.config):
        return []
    size = body.config.vision_config.image_size
    pictures = torch.empty(rows, 3, size, size, dtype=body.dtype, device="meta")
    return body.get_image_features(pictures).pooler_output


def drop_gradient(weight) -> None:
    weight.grad = None


class Attention(torch.autograd.Function):
    """The memory of flash attention without its arithmetic: it keeps queries, keys, values, its
    output and a number per row."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        number_per_row = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, number_per_row)
        return output

    @staticmethod
    def backward(ctx, upstream):
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def attention(module, query, key, value, *_, **__):
    """As transformers calls it: [B, heads, L, D] each -> ([B, L, heads, D], no weights)."""
    output = Attention.apply(query, key, value)
    return output.transpose(1, 2).contiguous(), None


def no_mask(*_, **__) -> None:
    """Flash attention needs none in memory."""


AttentionInterface.register("plan", attention)
AttentionMaskInterface.register("plan", no_mask)


# ---- The plan as text, and the verdict

def plans_table(plans: dict[Mode, dict], chosen: Mode) -> str:
    """A column per mode, the run's own marked with a star."""
    unit, divisor = "MiB", MIB
    if max(map(total, plans.values())) > GIB:
        unit, divisor = "GiB", GIB

    def line(name: str, cells: list[str]) -> str:
        return f"{name:37s}" + "".join(f"{cell:>32s}" for cell in cells)

    def numbers(sizes: list[float]) -> list[str]:
        return [f"{size / divisor:.2f}" for size in sizes]

    titles = [f"{mode.title}*" if mode == chosen else mode.title for mode in plans]
    lines = [line(unit, titles)]
    for term in plans[chosen]:
        lines.append(line(term, numbers([terms[term] for terms in plans.values()])))
    lines.append(line("at the worst moment", numbers(map(total, plans.values()))))
    return "\n".join(lines)


def show_what_fits(plans: dict[Mode, dict], memory: Memory) -> None:
    per_rank = " per rank" if RANKS > 1 else ""
    for mode, terms in plans.items():
        needed = total(terms)
        verdict = "fits" if needed <= memory.size else "does not fit"
        say(f"{mode.title}: {needed / GIB:.1f} GiB{per_rank}, {verdict} on {memory.owner}")


def require_memory(plans: dict[Mode, dict], chosen: Mode, memory: Memory) -> None:
    """Raises UserError, with the largest term and a mode that fits, unless the chosen one does."""
    terms = plans[chosen]
    needed = total(terms)
    largest = max(terms, key=terms.get)
    fitting = [mode for mode in plans if mode != chosen and total(plans[mode]) <= memory.size]
    advice = f"use {fitting[0].flags}" if fitting else "take a larger GPU or a smaller model"
    require(needed <= memory.size,
            f"{chosen.title} needs {needed / GIB:.1f} GiB, {memory.owner} has "
            f"{memory.size / GIB:.1f}; the largest term is {largest}, "
            f"{terms[largest] / GIB:.1f} GiB; {advice}, or a smaller --micro_batch_size, "
            "--batch_size or --max_length where these are the large terms")
