"""`python repo.py --dry_run`: what a run would do and the memory it would need, before any weight is loaded.

The models are built on the meta device, whose tensors have shapes and no content: weights, gradients and optimiser state are counted, not estimated.
Activations are those of one micro-batch that is really sent through a model there, forward and backward, with every tensor's birth and death noted;
attention is taken to keep its inputs and its output, as flash attention does.
"""
import copy
import math
import os
import re
import resource
import shutil
import sys
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import datasets
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from kernels import reference
from tiny_configs.inputs import READERS, UserError, check_function, load_function, require, say
from tiny_configs.ranks import RANKS

GIB = 2 ** 30
RESERVE = 1.5 * GIB  # what the CUDA context, the libraries' workspaces and gaps between tensors take


def dry_run(config, repo) -> None:
    """Everything that repo.run does before it loads weights, then the plan. Raises UserError for the first thing that would fail."""
    settings = {name: value for name, value in vars(config).items() if value is not None and name != "dry_run"}
    say("\n".join(f"--{name} {value}" for name, value in settings.items()) + "\n")
    available, owner = memory_available(config, repo)
    check_sources(config, repo.fetch)
    device, config.device = config.device, "meta"
    policy, tokenizer = repo.load_policy(config)
    prompts, _ = repo.split_prompts(config, tokenizer)
    pairs = repo.load_ptx_pairs(config, tokenizer) if config.ptx_coeff else []
    if config.judge:
        load_function(config.judge, "--judge", config.scorer_timeout)
    config.steps = config.steps or math.ceil(len(prompts) / config.batch_size)
    state = repo.State(policy, tokenizer, config)
    for prompt, ids in zip(prompts, repo.encode_prompts(prompts[:3], tokenizer)):
        say(f"a prompt of {len(ids)} tokens: {repo.render_prompt(prompt, tokenizer)!r}")
    for scorer in (state.reward, state.cost):
        say(f"{scorer.flag} {scorer.source} reads {what_it_reads(scorer, prompts[0], tokenizer, repo)}")
    say(f"{config.steps:,} steps of {config.batch_size * config.samples_per_prompt} responses; {len(pairs):,} PTX pairs\n")
    say(models_table(models_of(state)) + "\n" + (f"of every weight each of the {RANKS} ranks holds 1/{RANKS}\n" if RANKS > 1 else ""))

    longest = longest_rows(prompts, pairs, tokenizer, config, repo)
    say(f"the longest prompt has {longest[0]} tokens; a batch's rows, padded to the longest prompt and response, up to {longest[1]}")
    plans, own = {}, (config.lora_rank, recomputes(policy, config))
    for rank in dict.fromkeys((config.lora_rank, 0 if config.lora_rank else 64)):
        changed = replace(config, lora_rank=rank)
        try:
            models = state if rank == config.lora_rank else repo.State(repo.load_policy(changed)[0], tokenizer, changed)
        except UserError:
            continue  # it has no layers for adapters
        for checkpointing in (True, False):
            plans[rank, checkpointing] = memory_terms(models, changed, device, repo, longest, checkpointing)
    say(plans_table(plans, own) + "\n")
    for mode, terms in plans.items():
        say(f"{name_of(mode)}: {total(terms) / GIB:.1f} GiB{' per rank' * (RANKS > 1)}, {'fits' if total(terms) <= available else 'does not fit'} on {owner}")
    size, out = 12 * sum(p.numel() for name in state.TRAINED for p in getattr(state, name).parameters() if p.requires_grad), Path(config.output_dir).absolute()
    free = shutil.disk_usage(next(folder for folder in out.parents if folder.exists())).free
    say(f"a checkpoint takes {size / GIB:.1f} GiB of disk; with --save_every there are up to {config.keep_checkpoints + 1} at a time, and {free / GIB:.1f} GiB are free")
    terms, others = plans[own], [options_of(mode) for mode, some in plans.items() if mode != own and total(some) <= available]
    largest = max(terms, key=terms.get)
    require(total(terms) <= available, f"{name_of(own)} needs {total(terms) / GIB:.1f} GiB, {owner} has {available / GIB:.1f}; the largest term is "
                 f"{largest}, {terms[largest] / GIB:.1f} GiB; {'use ' + others[0] if others else 'take a larger GPU or a smaller model'}"
                 ", or a smaller --micro_batch_size, --batch_size or --max_length where these are the large terms")


def longest_rows(prompts, pairs, tokenizer, config, repo):
    """(tokens of the longest prompt, and of a batch's rows at the worst): prompts are padded to the longest, and a short prompt leaves more to its response."""
    lengths = [len(ids) for ids in repo.encode_prompts(prompts, tokenizer)]
    width = max(lengths) + min(config.max_response_length or config.max_length, config.max_length - min(lengths))
    supervised = max(len(asked) for asked, _ in pairs) + max(len(answer) for _, answer in pairs) if pairs else 0
    return max(lengths), max(width, supervised)


def plans_table(plans, own):
    """A column per mode, the run's own marked; rollout's terms and learning's are not needed at the same time."""
    unit, divisor = ("GiB", GIB) if max(map(total, plans.values())) > GIB else ("MiB", 2 ** 20)
    lines = [f"{unit:37s}" + "".join(f"{name_of(mode) + ('*' if mode == own else ''):>32s}" for mode in plans)]
    for term in next(iter(plans.values())):
        lines.append(f"{term:37s}" + "".join(f"{terms[term] / divisor:32.2f}" for terms in plans.values()))
    lines.append(f"{'at the worst moment':37s}" + "".join(f"{total(terms) / divisor:32.2f}" for terms in plans.values()))
    return "\n".join(lines)


def name_of(mode):
    rank, checkpointing = mode
    return (f"rank {rank}" if rank else "full fine-tuning") + (", checkpointing" if checkpointing else "")


def options_of(mode):
    return f"--lora_rank {mode[0]} --gradient_checkpointing {str(mode[1]).lower()}"


def check_sources(config, fetch) -> None:
    """Raises one UserError that names all models and data sets that are neither here nor to be had from the hub, or one for the first model, judge or
    score function that is not one at first sight."""
    missing = []
    for flag in ("policy", "reward_model", "cost_model", "dataset"):
        name = getattr(config, flag).partition(":")[0]
        is_file = ".py" in name or Path(name.removesuffix(".gz")).suffix in READERS
        if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists() and not is_file:  # owner/name: on the hub
            try:
                datasets.load_dataset_builder(name) if flag == "dataset" else AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
            except Exception:
                missing.append(f"--{flag} {name}")
    require(not missing, f"cannot reach {', '.join(missing)}: no such folder here, and on the hub no such name, no network, or no access (hf auth login); fetch them where there is a "
                         "network (hf download NAME; with --repo-type dataset for data) and point these flags to the folders or files")
    sources = {config.policy_flag(): config.policy, "--reward_model": config.reward_model, "--cost_model": config.cost_model, "--judge": config.judge}
    for flag, source in sources.items():
        if source and (flag == "--judge" or ".py:" in source):
            check_function(source, flag)
        elif source:
            fetch(AutoConfig.from_pretrained, source, flag, config)
            fetch(AutoTokenizer.from_pretrained, source, flag, config)


def memory_available(config, repo):
    """(bytes, whose they are)."""
    if config.device == "cpu":
        return memory_of_this_computer() / RANKS, "this computer"
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name()
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB)", config.gpu_memory)
    require(size and float(size[1]) > 0, f"--gpu_memory {config.gpu_memory}: not a size such as 80GiB or 24GB")
    return float(size[1]) * (GIB if size[2] == "GiB" else 1e9), f"a GPU of {config.gpu_memory}"


def memory_of_this_computer():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_mib() -> float:
    """Of the GPU's allocator since the last call; where there is no GPU, of the process so far."""
    if not torch.cuda.is_available() and sys.platform == "linux":  # not ru_maxrss, which begins with what the parent process had
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10
    if not torch.cuda.is_available():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peak = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return peak


def what_it_reads(scorer, prompt, tokenizer, repo):
    if scorer.function:
        return "prompts and responses as text"
    text = repo.render_prompt(prompt, tokenizer if scorer.same_tokens else scorer.tokenizer)
    return f"{'the tokens of the policy' if scorer.same_tokens else 'its own tokens'}: {text!r} + response + {scorer.tokenizer.eos_token!r}"


def models_of(state):
    """The models by name; a score function is none."""
    scorers = {f"{role} model": scorer.model for role, scorer in (("reward", state.reward), ("cost", state.cost)) if not scorer.function}
    return {"reference": state.reference, "policy": state.policy, **scorers, "reward critic": state.reward_critic, "cost critic": state.cost_critic}


def models_table(models):
    """Parameters of each model, how many bytes are its own and on whose backbone it sits."""
    owner, rows = {}, []
    for name, model in models.items():
        parameters = list(model.parameters())
        lenders = dict.fromkeys(owner[id(p)] for p in parameters if id(p) in owner and RANKS == 1)  # shards are not shared
        own = [p for p in parameters if id(p) not in owner or RANKS > 1]
        owner |= {id(p): name for p in own}
        rows.append((name, sum(p.numel() for p in parameters), sum(p.nbytes for p in own) / 2 ** 20, sum(p.numel() for p in parameters if p.requires_grad),
                     f"shares the weights of: {', '.join(lenders)}" if lenders else ""))
    return "\n".join(["model             parameters   its own MiB       trained"] + [f"{n:14s} {p:>13,} {g:13,.1f} {t:>13,}  {s}" for n, p, g, t, s in rows])


def memory_terms(state, config, device, repo, longest, checkpointing):
    """{term: bytes} of a run on the device, or on each rank's; `longest` is that of longest_rows."""
    models, trained = models_of(state), [[p for p in getattr(state, name).parameters() if p.requires_grad] for name in state.TRAINED]
    prompt, length = longest
    policy, size, width = state.policy.config, 2 if config.dtype == "bfloat16" else 4, math.ceil(config.batch_size * config.samples_per_prompt / RANKS)
    heads = getattr(policy, "num_key_value_heads", None) or policy.num_attention_heads
    head_dim = getattr(policy, "head_dim", None) or policy.hidden_size // policy.num_attention_heads
    is_mixed = size == 2 and not config.lora_rank  # autocast keeps a bf16 copy of each fp32 weight until the backward is over
    counts = [sum(p.numel() for p in some) for some in trained]
    rows = min(config.micro_batch_size, width)
    peak, kept = max(activations(getattr(state, name), rows, length, is_mixed, checkpointing, repo) for name in state.TRAINED)
    chunk = loss_chunk(rows * (length - prompt), policy.vocab_size, policy.hidden_size, device, size, not config.lora_rank)
    weights = [p for model in models.values() for p in model.parameters()]
    return {
        "weights": sum((p.nbytes for p in weights) if RANKS > 1 else {id(p): p.nbytes for p in weights}.values()) / RANKS,
        "optimiser": 2 * 4 * sum(counts) / RANKS,
        "gradients": 4 * sum(counts) / RANKS,
        "weights in use, learning": max(gathered_while_learning(getattr(state, name), size) for name in state.TRAINED) if RANKS > 1 else is_mixed * 2 * max(counts),
        "weights in use, sampling": sum(p.numel() for p in state.policy.parameters()) * size if RANKS > 1 else 0,
        "activations": peak,
        "loss chunk": max(kept + chunk - peak, 0),  # beyond that peak: the loss comes when the forward is over and the backward has not begun
        "KV cache": 2 * policy.num_hidden_layers * heads * head_dim * width * length * size,
        "logits of sampling": 4 * 4 * width * policy.vocab_size,  # in fp32, with what the sampler makes of them
        "reserve": RESERVE if device == "cuda" else 0}


LEARNING = ("gradients", "weights in use, learning", "activations", "loss chunk")
ROLLOUT = ("weights in use, sampling", "KV cache", "logits of sampling")


def gathered_while_learning(model, size):
    """What of a sharded model is whole at one time: a layer, the next one on its way, and all that lies outside the layers, each with its gradient as it is
    computed and, in fp32, as it is sent to the other ranks."""
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)] or [0]
    return (2 * max(layers) + sum(p.numel() for p in model.parameters()) - sum(layers)) * (2 * size + 4)


def total(terms):
    """Weights and optimiser are always there; rollout and learning come one after the other."""
    return terms["weights"] + terms["optimiser"] + terms["reserve"] + max(sum(terms[name] for name in phase) for phase in (LEARNING, ROLLOUT))


def loss_chunk(tokens, vocab, hidden, device, size, head_is_trained):
    """What kernels/linear.py holds at one time on a GPU, kernels/reference.py on a CPU."""
    if device == "cuda":
        return min(reference.ROWS_PER_CHUNK, tokens) * -(-vocab // 64) * 64 * size + 2 * tokens * hidden * size + head_is_trained * vocab * hidden * 4
    return 4 * 4 * min(reference.LOGITS_PER_CHUNK, tokens * vocab) + 2 * tokens * hidden * 4 + head_is_trained * vocab * hidden * 4


def activations(model, rows, length, is_mixed, checkpointing, repo):
    """One micro-batch through a model's backbone: bytes alive at the worst moment of forward and backward, and those kept between the two, beyond
    weights and gradients."""
    body = copy.deepcopy(model.base_model)
    body = body.to(torch.bfloat16) if is_mixed else body
    body.set_attn_implementation("plan")
    set_checkpointing(body, checkpointing)
    ids, trained = torch.zeros(rows, length, dtype=torch.long, device="meta"), [p for p in body.parameters() if p.requires_grad]
    for parameter in trained:  # all gradients together have a term of their own
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with Alive(body.parameters()) as alive, recomputing([body]):
        hidden = body(input_ids=ids, attention_mask=ids, position_ids=ids, use_cache=False).last_hidden_state
        kept = alive.now
        hidden.backward(torch.empty_like(hidden), inputs=trained)
    return alive.peak, kept


def recomputes(policy, config) -> bool:
    return policy.num_parameters() > 1e9 if config.gradient_checkpointing is None else config.gradient_checkpointing


def set_checkpointing(body, on: bool) -> None:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # transformers is about to rename these
        body.gradient_checkpointing_enable({"use_reentrant": False}) if on else body.gradient_checkpointing_disable()


@contextmanager
def recomputing(models):
    """Gradient checkpointing works in layers that train, and everything here is in eval mode for want of dropout: a layer's own flag is enough."""
    layers = [layer for model in models for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


class Alive(TorchDispatchMode):
    """Notes the storages that tensors live in, from birth to death: bytes now and at the worst moment, and the largest storage."""

    def __init__(self, known=()):
        super().__init__()
        self.alive, self.now, self.peak, self.largest = {tensor.untyped_storage()._cdata: 0 for tensor in known}, 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.end, storage._cdata)
                self.now += storage.nbytes()
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, storage.nbytes())
        return result

    def end(self, key):
        self.now -= self.alive.pop(key)


class Attention(torch.autograd.Function):
    """The memory of flash attention without its arithmetic: it keeps queries, keys, values, its output and a number per row."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, upstream):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


AttentionInterface.register("plan", lambda module, query, key, value, *_, **__: (Attention.apply(query, key, value).transpose(1, 2).contiguous(), None))
AttentionMaskInterface.register("plan", lambda *_, **__: None)
