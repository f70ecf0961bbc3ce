"""RePO, Rectified Policy Optimization (arXiv 2410.19933), in one file: safety alignment of a language model by reinforcement learning.

A reward model says how helpful a response is, a cost model how harmful (a cost above the threshold d is unsafe). Safe RLHF bounds the
*mean* cost, so very safe answers can pay for unsafe ones: safety compensation. RePO penalises the rectified cost {C - d}+ of every
prompt instead, a number that is never negative, so nothing can compensate. The file reads in the paper's order.

    python repo.py                        # builds a tiny world and aligns a policy in it; --algo ppo_lag shows the compensation
    python repo.py --model alpaca-7b      # the paper's models; --help lists every setting

Where it differs from the paper and its published code, and why:
  1. The paper splits a batch into safe and unsafe responses (--rectify mask). The default, --rectify return, sends the rectified cost
     into every return: the same gradient, and it still rewards the rare safe response when the split has nothing left to compare.
  2. A response may fill what its own prompt leaves of --max_length, not what the batch's longest prompt leaves.
  3. There is no dropout anywhere, so the probability ratio of an unchanged policy is 1, up to rounding.
  4. On one GPU the 3B and 7B presets train low-rank adapters, so that six models fit; under torchrun they are fine-tuned in full, as in the paper.
"""
import copy
import hashlib
import json
import logging
import math
import os
import re
import signal
import sys
import time
import warnings
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, SupportsFloat

import datasets
import torch
import transformers
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from transformers import HfArgumentParser, LogitsProcessor, LogitsProcessorList, PreTrainedConfig, PreTrainedModel

from kernels import gather_log_probs, linear_log_probs, linear_repo_loss, repo_loss
from tiny_configs import plan
from tiny_configs.checks import BadNumbers, bad_batch, check_loaded, check_policy, check_scorer, collapse, has_plain_head, not_finite
from tiny_configs.compare import printable, samples_table, scores_table, summarize
from tiny_configs.folder import append, claim_output_dir, cut_back, find_checkpoint, held, holds_run, is_run, prune, renamed_when_complete, room_for
from tiny_configs.folder import to_jsonl, write_config, write_manifest, write_whole
from tiny_configs.inputs import UserError, blame, did_you_mean, load_function, load_pairs, require, say, to_messages
from tiny_configs.plan import peak_memory_mib, recomputes, recomputing, set_checkpointing
from tiny_configs.ranks import RANK, RANKS, barrier, from_all_ranks, gathered, join_ranks, over_ranks, sharded, shares, whole

def random_numbers(*key) -> torch.Generator:
    """A generator that is a function of its key alone, so that neither a resumed run nor another number of ranks draws anything else."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big", signed=True))

# ==== 1  Configuration ====================================================================================================================
def option(default, help: str, **argument):
    return field(default=default, metadata={"help": help, **argument})

@dataclass
class Config:
    """Every setting. Precedence: these defaults < the preset that --model names < --config FILE.json < command-line flags."""
    model: str = option("tiny", "a preset (tiny, alpaca-7b, llama-3.2-3b), or the policy itself: folder or hub name of a causal LM")
    policy: str | None = option(None, "the starting policy, if another than --model names")
    reward_model: str | None = option(None, "helpfulness: a Beaver-layout or sequence-classifier folder or hub name, or FILE.py:function")
    cost_model: str | None = option(None, "harm (above --threshold is unsafe): the same kinds as --reward_model")
    dataset: str | None = option(None, "training prompts: a json, jsonl, csv, parquet or txt file, or a hub name[:SPLIT]; it replaces a preset's judge too")
    eval_dataset: str | None = option(None, "held-out prompts; default: a seeded 5 %% of --dataset, at least 16")
    prompt_column: str | None = option(None, "where --dataset and --eval_dataset hold the prompt, if that is not recognised")
    ptx_dataset: str | None = option(None, "supervised prompt-answer pairs for the PTX loss")
    judge: str | None = option(None, "FILE.py:function(prompts, responses) -> dicts of bools: safe, refused, harmful_prompt")
    scorer_timeout: float = option(600.0, "seconds that a call of a score function or judge may take")
    trust_remote_code: bool = option(False, "let checkpoints bring their own Python code; for the command line only, no --config turns it on")
    algo: Literal["repo", "ppo_lag", "ppo"] = option("repo", "bound the rectified cost, the mean cost (Safe RLHF), or nothing")
    rectify: Literal["return", "mask"] = option("return", "repo's estimator: rectified cost in all returns, or a penalty on unsafe responses only")
    threshold: float = option(0.0, "d: a response is unsafe if its cost is above it")
    lambda_init: float = option(1.0, "the multiplier's first value")
    lambda_lr: float = option(0.1, "alpha: the multiplier's step size")
    lambda_max: float = option(5.0, "the multiplier's upper bound")
    cost_window: int = option(128, "ppo_lag: the mean cost is taken over so many of the latest responses")
    kl_coeff: float = option(0.01, "beta: weight of the KL penalty to the starting policy")
    clip_range: float = option(0.2, "epsilon: clip of the probability ratio")
    clip_range_value: float = option(5.0, "how far a critic may move from its old value before its loss is clipped")
    gae_lambda: float = option(0.95, "GAE's lambda")
    ptx_coeff: float = option(0.0, "weight of the supervised (PTX) loss; 0 = off")
    steps: int | None = option(None, "rollout-and-update steps; default: one pass over the prompts")
    batch_size: int = option(16, "prompts per step, of all ranks together")
    samples_per_prompt: int = option(1, "responses per prompt")
    update_iters: int = option(1, "passes over each rollout")
    minibatch_size: int | None = option(None, "responses per optimiser step; default: the whole rollout")
    gradient_checkpointing: bool | None = option(None, "make activations again in the backward: less memory, more time; default: above 1B parameters")
    micro_batch_size: int = option(8, "responses per forward and backward: changes memory, not results")
    lora_rank: int | None = option(None, "rank of the low-rank adapters that are trained instead of the weights; default: 64 in the 3B and 7B presets on one GPU, else 0 = none")
    actor_lr: float = option(1e-5, "the policy's peak learning rate (cosine to zero)")
    critic_lr: float = option(5e-6, "the critics' learning rate (constant)")
    temperature: float = option(1.0, "of sampling, and of every log-prob")
    max_prompt_length: int = option(384, "tokens; longer prompts are left out, and counted aloud")
    max_length: int = option(512, "tokens of prompt plus response")
    max_response_length: int | None = option(None, "tokens; default: what --max_length leaves")
    seed: int = option(42, "of sampling, data order and split")
    device: Literal["cpu", "cuda"] | None = option(None, "default: cuda if there is one")
    tf32: bool = option(False, "let CUDA round the factors of fp32 products to TF32")
    dtype: Literal["float32", "bfloat16"] | None = option(None, "of computing and of the saved policy; default: bfloat16 on a GPU that has it, else float32")
    eval_samples: int = option(4, "responses per held-out prompt")
    max_eval_prompts: int = option(256, "evaluate on at most so many held-out prompts")
    dry_run: bool = option(False, "load no weights: show settings, prompts, models and whether the memory suffices, and stop")
    gpu_memory: str = option("80GiB", "what --dry_run compares with where there is no GPU")
    eval_only: str | None = option(None, "evaluate this policy and stop: a run's folder, or a model's folder or hub name; without a value, the starting one", nargs="?", const="policy")
    output_dir: str | None = option(None, "default: runs/<model>-<algo>-<seed>; an earlier run there is moved aside")
    save_every: int = option(0, "steps between checkpoints; 0 = only on Ctrl-C")
    keep_checkpoints: int = option(2, "keep so many of the newest checkpoints")
    resume: str | None = option(None, "continue from this checkpoint; without a value, from the newest in --output_dir", nargs="?", const="newest")
    max_bad_steps: int = option(3, "stop after so many steps in a row with scores, log-probs, losses or gradients that are not finite")
    sample_every: int = option(50, "steps between samples in terminal and samples.jsonl; 0 = never")

    def policy_flag(self) -> str:
        return "--model" if self.policy == self.model else "--eval_only" if self.policy == self.eval_only else "--policy"
    def autocast(self):
        """Trained models keep fp32 weights and compute in --dtype."""
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16")

PUBLISHED = {"reward_model": "PKU-Alignment/beaver-7b-v1.0-reward", "cost_model": "PKU-Alignment/beaver-7b-v1.0-cost",
             "dataset": "PKU-Alignment/PKU-SafeRLHF:train", "eval_dataset": "PKU-Alignment/PKU-SafeRLHF:test",
             "ptx_dataset": "tatsu-lab/alpaca", "ptx_coeff": 16.0, "save_every": 200,
             "batch_size": 16 * RANKS, "lora_rank": 64 if RANKS == 1 else 0}
PRESETS = {"tiny": {},  # its settings are in tiny_configs/tiny.json, its models and data built by tiny_configs/world.py
           "alpaca-7b": PUBLISHED | {"policy": "PKU-Alignment/alpaca-7b-reproduced"},
           "llama-3.2-3b": PUBLISHED | {"policy": "meta-llama/Llama-3.2-3B-Instruct"}}
FREE_ON_RESUME = {"output_dir", "resume", "dry_run", "gpu_memory", "gradient_checkpointing", "tf32", "save_every", "keep_checkpoints", "sample_every",
                  "eval_only", "micro_batch_size", "scorer_timeout", "max_bad_steps"}  # may change
MAY_BE_ZERO = {"lora_rank", "lambda_init", "lambda_lr", "lambda_max", "kl_coeff", "gae_lambda", "ptx_coeff", "seed", "save_every", "sample_every"}

def resolve_config(argv: list[str]) -> Config:
    """Where all settings come together. Raises UserError for anything unknown, missing or out of range."""
    parser = HfArgumentParser(Config, description="Defaults are those of the published runs; presets override them (tiny: tiny_configs/tiny.json).", allow_abbrev=False)
    parser.add_argument("--config", help="a json file of settings; a run's own config.json will do")
    known = [*Config.__dataclass_fields__, "config"]
    parser.error = lambda message: require(False, f"{message}{did_you_mean(re.findall('--[^ ]+', message), known)}; python repo.py --help lists the settings")
    def as_words(settings: dict, *skipped: str) -> list[str]:
        return [f"--{name}={value}" for name, value in settings.items() if value is not None and name not in skipped]
    flags, words = parser.parse_args(argv), list(argv)  # presets and files go in front: argparse lets the last word win
    if is_run(flags.eval_only):  # its settings, its data, and its starting policy as the reference
        require(Path(flags.eval_only, "final", "actor").is_dir(), f"--eval_only {flags.eval_only}: has no final/actor, so the run has not finished")
        flags.config = flags.config or str(Path(flags.eval_only, "config.json"))
    elif flags.eval_only not in (None, "policy"):
        words.append(f"--policy={flags.eval_only}")
    of_the_data = ("eval_dataset", "prompt_column", "judge")  # these go with the data set they were written for
    if flags.config:
        with blame(f"--config {flags.config}: not a file with a json object of settings"):
            settings = {**json.loads(Path(flags.config).read_text())}
        unknown = sorted(settings.keys() - vars(flags).keys() - {"environment"})
        require(not unknown, f"--config {flags.config}: there is no setting {', '.join(unknown)}{did_you_mean(unknown, known)}; python repo.py --help lists them")
        words = as_words(settings, "environment", "trust_remote_code", "output_dir", "eval_only",
                         *of_the_data * bool(flags.dataset), *["prompt_column", "judge"] * bool(flags.eval_dataset), *["policy"] * (flags.model != Config.model)) + words
    given = parser.parse_args(words)
    require(not given.model.startswith((".", "/", "~")) or Path(given.model).expanduser().is_dir(), f"--model {given.model}: no such folder")
    preset, dropped = PRESETS.get(given.model, {}), of_the_data if given.dataset else ["judge"] if given.eval_dataset else []
    if given.model == "tiny":
        from tiny_configs import world
        if RANK:
            barrier()  # until rank 0 has built it
        preset = json.loads(Path(world.__file__).with_name("tiny.json").read_text()) | world.build(BEAVER_TEMPLATE)
        if not RANK:
            barrier()
    config = parser.parse_args_into_dataclasses(as_words(preset, *dropped) + words)[0]
    config.policy = config.policy or config.model
    evaluated = config.eval_only and f"runs/eval-{Path(config.policy if config.eval_only == 'policy' else config.eval_only).resolve().name}"
    config.output_dir = config.output_dir or evaluated or f"runs/{Path(config.model).name}-{config.algo}-{config.seed}"
    config.device = config.device or ("cuda" if torch.cuda.is_available() or config.dry_run else "cpu")
    has_bf16 = config.device == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False))
    config.dtype = config.dtype or ("bfloat16" if has_bf16 else "float32")
    config.lora_rank = config.lora_rank or 0
    for name, value in vars(config).items():
        require(type(value) not in (int, float) or abs(value) < 2**63 and (name == "threshold" or value > 0 or value == 0 and name in MAY_BE_ZERO),
                f"--{name} {value}: must be a finite number{'' if name == 'threshold' else ', 0 or more' if name in MAY_BE_ZERO else ' above 0'}")
        require(value is not None or name not in ("reward_model", "cost_model", "dataset"),
                f"--{name} is missing; only the presets ({', '.join(PRESETS)}) bring one, and --model {config.model} is none of them")
    require(config.ptx_dataset or not config.ptx_coeff, f"--ptx_coeff {config.ptx_coeff} needs --ptx_dataset; --ptx_coeff 0 turns the PTX loss off")
    responses = config.batch_size * config.samples_per_prompt
    require(responses % min(config.minibatch_size or responses, responses) == 0,
            f"--minibatch_size {config.minibatch_size}: does not divide the {responses} responses of a step (--batch_size times --samples_per_prompt)")
    require(config.max_length > config.max_prompt_length, f"--max_length {config.max_length}: must be above --max_prompt_length {config.max_prompt_length}")
    require(not (config.eval_only and config.resume), "--eval_only evaluates a policy, --resume goes on training; use one of them")
    out = Path(config.output_dir)
    require(config.resume != "newest" or out.is_dir(), f"--resume: there is no run in {out}; check --output_dir, or start without --resume")
    empty = not out.exists() or out.is_dir() and all(path.name == ".config.json.tmp" for path in out.iterdir())
    require(empty or holds_run(out), f"--output_dir {out}: exists and is not a run of this script; choose another")
    require(RANKS == 1 or config.dry_run or distributed.is_initialized(), "WORLD_SIZE is set, so there should be several ranks; start them with torchrun")
    require(config.device == "cpu" or config.dry_run or torch.cuda.is_available(), "--device cuda: torch finds no CUDA device here; leave it out to run on the CPU")
    return config

# ==== 2  Prompts ==========================================================================================================================
def load_prompts(source: str, prompt_column: str | None = None, flag: str = "--dataset", tokenizer=None, max_length: int = sys.maxsize) -> list[str]:
    """The distinct prompts of a file or hub data set, in order, of at most max_length tokens. Raises UserError; says what it drops."""
    pairs = load_pairs(source, prompt_column, flag)
    distinct = dict.fromkeys(prompt for prompt, _ in pairs)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content] if tokenizer else []
    spelled = re.compile("|".join(map(re.escape, special)) or "(?!)")  # in a prompt they would end its turn and write the next
    prompts = [prompt for prompt in distinct if not spelled.search(prompt)]
    require(prompts, f"{flag} {source}: every prompt contains one of the tokenizer's special tokens, {', '.join(special[:9])}")
    lengths = [len(row) for row in encode_prompts(prompts, tokenizer)] if tokenizer else [0] * len(prompts)
    kept = [prompt for prompt, length in zip(prompts, lengths) if length <= max_length]
    require(kept, f"{flag} {source}: every prompt is longer than --max_prompt_length {max_length}; the shortest has {min(lengths)} tokens")
    steering = f", {count:,} prompts that spell special tokens" if (count := len(distinct) - len(prompts)) else ""
    say(f"{flag}: {len(pairs) - len(distinct):,} duplicates{steering} and {len(prompts) - len(kept):,} prompts longer than --max_prompt_length dropped, {len(kept):,} left")
    return kept

BEAVER_TEMPLATE = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"  # no space at the end: the answer follows directly, then EOS

def render_prompt(prompt: str, tokenizer) -> str:
    """What a model reads: the tokenizer's chat template if it has one, else the template of the Beaver family."""
    messages = to_messages(prompt)
    if tokenizer.chat_template:
        with blame(f"the prompt {prompt[:60]!r}: refused by the chat template"):
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    joints = {"user": " ASSISTANT:", "assistant": f"{tokenizer.eos_token}USER: ", "system": "\n\n"}
    text = "".join(message["content"] + joints[message["role"]] for message in messages)
    return BEAVER_TEMPLATE.format(prompt=text.removesuffix(" ASSISTANT:"))

def encode_prompts(prompts: list[str], tokenizer, answers: list[str] | None = None) -> list[list[int]]:
    """Token ids of the rendered prompts, each with its answer in one text, with the BOS that tokenizer or template give, never with an EOS."""
    special, texts = not tokenizer.chat_template, [render_prompt(prompt, tokenizer) for prompt in prompts]
    rows = tokenizer([text + answer for text, answer in zip(texts, answers or [""] * len(texts))], add_special_tokens=special).input_ids
    appends_eos = special and tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    return [row[:-1] for row in rows] if appends_eos else rows

def split_prompts(config: Config, tokenizer) -> tuple[list[str], list[str]]:
    """(training prompts, held-out prompts), distinct, with none in common: --eval_dataset, or a seeded share of --dataset."""
    prompts = load_prompts(config.dataset, config.prompt_column, "--dataset", tokenizer, config.max_prompt_length)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seed)).tolist()
    held_out = [prompts[i] for i in order[:max(16, round(0.05 * len(prompts)))]]
    if config.eval_dataset:
        held_out = load_prompts(config.eval_dataset, config.prompt_column, "--eval_dataset", tokenizer, config.max_prompt_length)
    unseen = set(held_out)
    train = [prompt for prompt in prompts if prompt not in unseen]
    require(train, f"--dataset {config.dataset}: its {len(prompts)} prompts are all held out, by --eval_dataset or as the 16 at least; bring more, or other ones to hold out")
    say(f"prompts: {len(train):,} for training, {len(held_out):,} held out")
    return train, held_out

# ==== 3  Models ===========================================================================================================================
def fetch(from_pretrained, source: str, flag: str, config: Config, **options):
    """from_pretrained(source). Raises UserError for whatever is wrong with a folder or a hub name."""
    path = Path(source).expanduser()
    part = "its tokenizer " if from_pretrained == AutoTokenizer.from_pretrained else ""
    problem = f"{part}cannot be loaded" if path.exists() else f"is none of {', '.join(PRESETS)}, no folder here, and not to be had from the hub"
    with blame(f"{flag} {source}: {problem}"):
        return from_pretrained(str(path) if path.exists() else source, trust_remote_code=config.trust_remote_code, **options)

def shape_of(kind, path, dtype, **options) -> PreTrainedModel:
    """In the place of kind.from_pretrained: the model that the config alone describes, on the meta device, where tensors have no content."""
    with torch.device("meta"):
        return kind.from_config(AutoConfig.from_pretrained(path, **options), dtype=dtype, **options)

class ScoreModel(PreTrainedModel):
    """The Beaver layout: a causal backbone `model`, a linear `score_head`. The critics are ScoreModels too, read at every token."""
    config_class = PreTrainedConfig
    base_model_prefix = "model"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # as far as the backbone does, which checks for itself
    _keep_in_fp32_modules_strict = ["score_head", "normalizer"]
    role = "reward"
    def __init__(self, config, backbone: nn.Module | None = None):
        super().__init__(config)
        self.model = AutoModel.from_config(config) if backbone is None else backbone
        self.score_head = nn.Linear(config.hidden_size, 1)
        if getattr(config, "do_normalize", False):
            self.normalizer = nn.ParameterDict({"mean": torch.zeros(1), "var": torch.ones(1)})
        self.post_init()
    @classmethod
    def from_pretrained(cls, path, role: Literal["reward", "cost"] = "reward", dtype=torch.float32, dry_run=False, **options):
        """A Beaver-layout or sequence-classifier checkpoint, in whatever files. Raises UserError if any weight but the head's bias is missing.
        The state dict alone says what exists: the config's `bias`, `score_bias` and `score_type` contradict it in published checkpoints."""
        config = AutoConfig.from_pretrained(path, **options)
        is_classifier = (config.architectures or [""])[0].endswith("ForSequenceClassification")
        if dry_run and is_classifier:
            return SequenceClassifier(shape_of(AutoModelForSequenceClassification, path, dtype, **options))
        if dry_run:
            with torch.device("meta"):
                return cls(config).to(dtype)
        load = AutoModelForSequenceClassification.from_pretrained if is_classifier else super().from_pretrained
        model, report = load(path, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options)
        check_loaded(model, report, f"--{role}_model {path}", "a score model must bring its trained head, of one output, and all other weights", {"score_head.bias"})
        if is_classifier:
            require(model.config.num_labels <= 2, f"--{role}_model {path}: a classifier of {model.config.num_labels} labels; a score needs one or two")
            return SequenceClassifier(model.eval())
        if "score_head.bias" in report["missing_keys"]:
            nn.init.zeros_(model.score_head.bias)
        model.role = role
        return model.eval()
    def values(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The head's fp32 output at every position: [B, L], [B, L] -> [B, L]."""
        hidden = self.model(**model_inputs(input_ids, attention_mask)).last_hidden_state                          # [B, L, H]
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score_head(hidden.float()).squeeze(-1)                                                    # [B, L]
    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The fp32 score at the last position whose mask is 1, normalised if the checkpoint says so: [B, L], [B, L] -> [B]."""
        last = attention_mask.cumsum(1).argmax(1, keepdim=True)                                                   # [B, 1]
        score = self.values(input_ids, attention_mask).gather(1, last).squeeze(1)                                 # [B]
        if not hasattr(self, "normalizer"):
            return score
        mean = self.normalizer["mean"] if self.role == "reward" else 0.0  # shifting a cost would move the threshold
        return (score - mean) / (self.normalizer["var"].sqrt() + 1e-8)

class SequenceClassifier(nn.Sequential):
    """What TRL trains: one label is the score; of two the score is logit[1] - logit[0], so label 1 is a cost model's unsafe one."""
    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L], [B, L] -> fp32 [B]. The model finds the last token by its pad id, as it did when it was trained."""
        logits = self[0](input_ids=input_ids, attention_mask=attention_mask).logits.float()                       # [B, labels]
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0]                              # [B]

class Scorer:
    """Where rewards or costs come from: a model with its tokenizer, or a Python function."""
    def __init__(self, role: str, policy_tokenizer, config: Config):
        self.flag, self.source, self.config = f"--{role}_model", getattr(config, f"{role}_model"), config
        self.function = load_function(self.source, self.flag, config.scorer_timeout) if ".py:" in self.source else None
        self.same_tokens = False
        if self.function is None:
            self.model = fetch(ScoreModel.from_pretrained, self.source, self.flag, config, role=role, dtype=getattr(torch, config.dtype), dry_run=config.dry_run)
            self.model.requires_grad_(False)
            own = self.tokenizer = fetch(AutoTokenizer.from_pretrained, self.source, self.flag, config)
            check_scorer(self.model, own, role, f"{self.flag} {self.source}")
            own.pad_token = own.pad_token or own.eos_token  # masks tell where padding is
            trial = BEAVER_TEMPLATE.format(prompt="Café №1?\n\n  x") + f"Yes.{own.eos_token}"
            with blame(f"{self.flag} {self.source}: its tokenizer cannot be used"):
                self.same_tokens = own(trial).input_ids == policy_tokenizer(trial).input_ids and own.get_vocab() == policy_tokenizer.get_vocab()
            if isinstance(self.model, SequenceClassifier):  # which finds the last token by the pad id of its config
                own.pad_token_id = ids.pad_token_id = own.pad_token_id if (ids := self.model[0].config).pad_token_id is None else ids.pad_token_id
    def __call__(self, rows: list[list[int]], prompts: list[str], responses: list[str], finished: list[bool]) -> Tensor:
        """Scores of whole responses, given as token ids and as text: fp32 [B]. Raises UserError unless all are numbers."""
        scores = torch.zeros(len(prompts), device=self.config.device)                                                 # [B]
        if not self.function and not self.same_tokens:  # re-encoded, in its own template; EOS only where the response really ended
            rows = [row + [self.tokenizer.eos_token_id] * (ended and self.tokenizer.eos_token is not None)
                    for row, ended in zip(encode_prompts(prompts, self.tokenizer, responses), finished)]
        for some in shares(range(len(prompts)), len(prompts) if self.function else self.config.micro_batch_size):
            if self.function:
                values = self.function([prompts[i] for i in some], [responses[i] for i in some]) if some else []
            else:
                values = self.of_tokens([rows[i] for i in some or [0]])
            for i, value in zip(some, values):
                with blame(sentence := f"{self.flag} {self.source}: gave {value!r}, not a number, to the response {responses[i][:60]!r}"):
                    require(isinstance(value, SupportsFloat), sentence)
                    scores[i] = float(value)
        return over_ranks(scores)
    @torch.no_grad()
    def of_tokens(self, rows: list[list[int]]) -> list[float]:
        batch = lay_out([[]] * len(rows), rows, self.tokenizer.pad_token_id, self.config.device)                      # [b, L]
        return whole(self.model, type(self.model).score, batch.input_ids, batch.attention_mask).tolist()

def load_tokenizer(config: Config):
    """The policy's tokenizer. Raises UserError if it cannot end a response."""
    tokenizer = fetch(AutoTokenizer.from_pretrained, config.policy, flag := config.policy_flag(), config)
    require(tokenizer.eos_token, f"{flag} {config.policy}: its tokenizer has no EOS token, so no response would end; set eos_token in tokenizer_config.json")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # masks tell where padding is
    unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    with blame(f"{flag} {config.policy}: its tokenizer cannot be used"):
        require(not unknown & {*encode_prompts(["a"], tokenizer)[0]}, f"{flag} {config.policy}: its tokenizer cannot encode {render_prompt('a', tokenizer)!r}")
    return tokenizer

def load_policy(config: Config):
    """(policy, its tokenizer). Weights that are trained are fp32, others in the compute dtype. Raises UserError."""
    flag, tokenizer = config.policy_flag(), load_tokenizer(config)
    dtype = getattr(torch, config.dtype) if config.lora_rank or config.eval_only else torch.float32
    if config.dry_run:
        policy = fetch(partial(shape_of, AutoModelForCausalLM), config.policy, flag, config, dtype=dtype)
    else:
        policy, report = fetch(AutoModelForCausalLM.from_pretrained, config.policy, flag, config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
        check_loaded(policy, report, f"{flag} {config.policy}", "a policy must bring all its weights, in its config's shapes")
    policy.eval()
    check_policy(policy, tokenizer, f"{flag} {config.policy}")
    policy.stop_token_ids = {tokenizer.eos_token_id}
    file = Path(config.policy).expanduser() / "generation_config.json"  # chat models list more end-of-turn tokens there, most other models have none
    with blame(f"{flag} {file}: cannot be read") if file.is_file() else suppress(OSError):
        listed = GenerationConfig.from_pretrained(str(file.parent)).eos_token_id
        policy.stop_token_ids |= set(map(int, listed)) if isinstance(listed, list) else {listed and int(listed)} - {None}
    # Sampling must be from the plain softmax: a checkpoint's own top_p or temperature waits here until the policy is saved.
    policy.published_generation_config, policy.generation_config = policy.generation_config, GenerationConfig()
    policy.has_plain_head = config.dry_run or has_plain_head(policy)
    if not policy.has_plain_head:
        say(f"{flag} {config.policy}: its logits are more than hidden states times a matrix (bias, cap or scale), so they are made whole: more memory")
    return policy, tokenizer

class LowRankLinear(nn.Module):
    """LoRA: y = W x + b + B (A x) with A [r, in] random and B [out, r] zero, so that it begins as the layer it replaces. W and b are frozen."""
    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # shared with every other model on this backbone
        # A step of B moves y about twice as far as the same step of W would: learning rates carry over, though embeddings, norms and LM head stand still.
        scale = 2 * linear.in_features ** 0.5 / rank
        self.lora_a = nn.Parameter(scale * torch.randn(rank, linear.in_features, device=linear.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))                             # [..., in] -> [..., r] -> [..., out]
        return F.linear(x, self.weight, self.bias) + low

def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A policy's weights, with B A added to W where there are adapters."""
    for name in [name.removesuffix("lora_a") for name in weights if name.endswith(".lora_a")]:
        low_rank = weights.pop(f"{name}lora_b") @ weights.pop(f"{name}lora_a")
        weights[f"{name}weight"] = weights[f"{name}weight"].float() + low_rank
    return weights

def on_shared_weights(model: nn.Module, config: Config) -> nn.Module:
    """A second model like this one: a full copy, or, with adapters, another on the same backbone's weights."""
    body = model.base_model.parameters() if config.lora_rank else ()
    return copy.deepcopy(model, {id(weight): weight for weight in body})

def make_trainable(model: nn.Module, config: Config) -> nn.Module:
    """All weights, as fp32; with --lora_rank, only adapters on the backbone's linear layers, and a score head if there is one."""
    if not config.lora_rank:
        return model.float().requires_grad_(True)
    model.requires_grad_(False)
    found = [(parent, name, layer) for parent in model.base_model.modules() for name, layer in parent.named_children() if type(layer) is nn.Linear]
    for parent, name, layer in found:
        setattr(parent, name, LowRankLinear(layer, config.lora_rank))
    require(found, f"--lora_rank {config.lora_rank}: {type(model.base_model).__name__} has no linear layers to put adapters on; use --lora_rank 0")
    if isinstance(model, ScoreModel):
        model.score_head.requires_grad_(True)
    return model

def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, saved and resumed."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

def make_critic(scorer: Scorer, policy, config: Config) -> ScoreModel:
    """A trainable critic: the score model where it reads the policy's tokens, else the policy's body with a head of zeros."""
    if scorer.same_tokens and isinstance(scorer.model, ScoreModel):
        critic = on_shared_weights(scorer.model, config)
    else:
        body = scorer.model[0].base_model if scorer.same_tokens else policy.base_model
        critic = ScoreModel(body.config, on_shared_weights(body, config))
        critic.score_head.load_state_dict({name: torch.zeros_like(value) for name, value in critic.score_head.state_dict().items()})
    return make_trainable(critic.eval(), config)

# ==== 4  Rollout ==========================================================================================================================
@dataclass
class Rollout:
    """A batch of prompts, left-padded to P tokens, and responses, right-padded to T. PTX pairs fill the first three fields alone."""
    input_ids: Tensor                         # [B, P+T]
    attention_mask: Tensor                    # [B, P+T]  1 at prompt and response tokens
    response_mask: Tensor                     # [B, T]    True at y_1 .. y_T, EOS included
    prompts: list[str] | None = None          # B         as the user wrote them
    responses: list[str] | None = None        # B         decoded, without special tokens
    finished: Tensor | None = None            # [B]       True if EOS ended the response, False if the length limit did
    log_probs: Tensor | None = None           # [B, T]    log pi_old(y_t)
    ref_log_probs: Tensor | None = None       # [B, T]    log pi_ref(y_t)
    entropy: Tensor | None = None             # [B, T]    of pi_old(. | s_t), in nats
    reward: Tensor | None = None              # [B]       R
    cost: Tensor | None = None                # [B]       C
    penalty: Tensor | None = None             # [B]       lambda_i
    reward_values: Tensor | None = None       # [B, T]    V^R(s_t)
    cost_values: Tensor | None = None         # [B, T]    V^C(s_t)
    reward_advantages: Tensor | None = None   # [B, T]
    cost_advantages: Tensor | None = None     # [B, T]
    reward_returns: Tensor | None = None      # [B, T]
    cost_returns: Tensor | None = None        # [B, T]
    def response_index(self) -> tuple[Tensor, Tensor, Tensor]:
        """For the N response tokens: row [N], column of the state that predicts it [N], token id [N]."""
        row, t = self.response_mask.nonzero(as_tuple=True)
        column = self.input_ids.shape[1] - self.response_mask.shape[1] + t
        return row, column - 1, self.input_ids[row, column]
    def micro_batches(self, rows: Tensor, config: Config):
        """This rank's share of some rows, --micro_batch_size at a time; the tensors of them, for text has no part in learning."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        for some in shares(rows, config.micro_batch_size):
            batch = Rollout(**{name: value[some if len(some) else rows[:1]] for name, value in tensors.items()})
            batch.response_mask &= len(some) > 0  # a rank without rows goes along with one that has no response
            yield batch
    def records(self, threshold: float) -> list[dict]:
        """A row per response, for people and files."""
        columns = {"prompt": self.prompts, "response": self.responses, "reward": self.reward.tolist(), "cost": self.cost.tolist(),
                   "rectified_cost": rectify(self.cost, threshold).tolist(), "safe": (self.cost <= threshold).tolist(),
                   "kl": (self.log_probs - self.ref_log_probs).sum(1).tolist()}
        return [dict(zip(columns, row)) for row in zip(*columns.values())]

def lay_out(prompts: list[list[int]], responses: list[list[int]], pad: int, device) -> Rollout:
    """Rows of token ids as padded tensors."""
    widths = max(map(len, prompts)), max(map(len, responses))                                                     # P, T
    left, right = [widths[0] - len(row) for row in prompts], [widths[1] - len(row) for row in responses]
    ids = [[pad] * a + p + r + [pad] * b for a, p, r, b in zip(left, prompts, responses, right)]
    mask = torch.tensor([[0] * a + [1] * len(p + r) + [0] * b for a, p, r, b in zip(left, prompts, responses, right)], device=device)
    return Rollout(torch.tensor(ids, device=device), mask, mask[:, widths[0]:].bool())

def model_inputs(input_ids: Tensor, attention_mask: Tensor) -> dict:
    """Positions count from each row's first real token, so that left padding changes nothing."""
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)                                                    # [B, L]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}

class Draw(LogitsProcessor):
    """Draws each response's next token from the whole softmax: the one in which its uniform number for that position falls, counted along the cumulated
    probabilities. So a response depends on its own row of numbers [B, T] alone, neither on the rest of its batch nor on who samples it."""
    def __init__(self, uniform: Tensor, prompt_length: int, temperature: float):
        self.uniform, self.prompt_length, self.temperature = uniform, prompt_length, temperature
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        t = input_ids.shape[1] - self.prompt_length
        cumulated = (scores / self.temperature).double().softmax(-1).cumsum(-1)                                         # [B, V]
        token = torch.searchsorted(cumulated, self.uniform[:, t:t + 1] * cumulated[:, -1:])                           # [B, 1]
        return scores.scatter(1, token.clamp(max=scores.shape[1] - 1), torch.inf)  # which the library's argmax will take

def generate(policy, tokenizer, prompts: list[list[int]], config: Config, key=()) -> list[list[int]]:
    """Samples a response to each prompt up to EOS or its length limit: token ids. The same prompts and key give the same responses."""
    budgets = [min(config.max_length - len(prompt), config.max_response_length or config.max_length) for prompt in prompts]
    uniform = 1 - torch.rand(len(prompts), max(budgets), generator=random_numbers(config.seed, key), dtype=torch.float64)  # [B, T]  in (0, 1]
    mine, = shares(sorted(range(len(prompts)), key=lambda i: len(prompts[i])), len(prompts))  # similar lengths together need little padding
    # With a cache of fixed shape the library compiles its steps on a GPU. It cannot where FSDP has its hooks, or where autocast makes other dtypes than the weights'.
    cache = "static" if config.device == "cuda" and RANKS == 1 and policy.dtype == getattr(torch, config.dtype) else None
    responses = {}
    with gathered(policy):
        if mine:
            batch = lay_out([prompts[i] for i in mine], [[]] * len(mine), tokenizer.pad_token_id, config.device)      # [b, P]
            length = batch.input_ids.shape[1]
            greedy = GenerationConfig(do_sample=False, max_new_tokens=max(budgets[i] for i in mine), eos_token_id=sorted(policy.stop_token_ids),
                                      pad_token_id=tokenizer.pad_token_id, cache_implementation=cache)
            with torch.inference_mode(), config.autocast():
                output = policy.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=greedy, synced_gpus=False,
                                         logits_processor=LogitsProcessorList([Draw(uniform[mine].to(config.device), length, config.temperature)]))
            responses = {i: row[:budgets[i]] for i, row in zip(mine, output[:, length:].tolist())}                    # up to T each
    responses = from_all_ranks(responses)
    rows = [responses[i] for i in range(len(prompts))]
    return [row[:next((t + 1 for t, token in enumerate(row) if token in policy.stop_token_ids), len(row))] for row in rows]

def head_inputs(policy, batch: Rollout) -> tuple[Tensor, ...]:
    """What the log-probs of the N response tokens are made from: hidden states [N, H] and the LM head's weight [V, H], or logits [N, V] if the head
    is more than that weight. Prompts and padding do not reach the head."""
    row, state, _ = batch.response_index()                                                                        # [N] each
    inputs, kept = model_inputs(batch.input_ids, batch.attention_mask), batch.response_mask.shape[1] + 1
    if policy.has_plain_head:
        return policy.base_model(**inputs).last_hidden_state[row, state], policy.get_output_embeddings().weight   # [N, H], [V, H]
    return policy(**inputs, logits_to_keep=kept).logits[row, state + kept - batch.input_ids.shape[1]],            # [N, V]

def response_log_probs(policy, batch: Rollout, temperature: float, with_entropy: bool = False) -> Tensor:
    """Log-probs of the N response tokens at the temperature they were sampled with: fp32 [N], or [2, N] with the entropy of the distributions they
    were drawn from."""
    gather, targets = linear_log_probs if policy.has_plain_head else gather_log_probs, batch.response_index()[2]
    result = gather(*head_inputs(policy, batch), targets, temperature, return_entropy=with_entropy)               # [N], or two of them
    return torch.stack(result) if with_entropy else result

def response_values(critic: ScoreModel, batch: Rollout) -> Tensor:
    """V(s_t) at the state before each response token: fp32 [N]."""
    row, state, _ = batch.response_index()
    return critic.values(batch.input_ids, batch.attention_mask)[row, state]

def collect(state: "State", prompts: list[str], config: Config, key=(), with_values: bool = True) -> tuple[Rollout, dict]:
    """Responses with their log-probs, scores and values, of all ranks on every rank: (rollout, seconds per phase)."""
    def per_token(function, model, *arguments) -> Tensor:
        """function(model, rows, ...) -> [..., n] in micro-batches, put in place: [..., B, T], 0 outside the mask."""
        rows, mine = torch.arange(len(prompts)), torch.zeros_like(rollout.response_mask)
        mine[shares(rows, len(rows))[0]] = True                                                                       # [B, T]
        with torch.no_grad(), config.autocast():
            flat = torch.cat([whole(model, function, some, *arguments) for some in rollout.micro_batches(rows, config)], -1)  # [..., n]
        return over_ranks(torch.zeros(*flat.shape[:-1], *mine.shape, device=flat.device).masked_scatter(mine & rollout.response_mask, flat))
    start = time.perf_counter()
    prompt_ids = encode_prompts(prompts, state.tokenizer)
    response_ids = generate(state.policy, state.tokenizer, prompt_ids, config, key)
    sampled, sampling_mib = time.perf_counter(), peak_memory_mib()
    rollout = lay_out(prompt_ids, response_ids, state.tokenizer.pad_token_id, config.device)
    finished = [row[-1] in state.policy.stop_token_ids for row in response_ids]
    rollout.prompts, rollout.finished = prompts, torch.tensor(finished, device=config.device)
    rollout.responses = state.tokenizer.batch_decode(response_ids, skip_special_tokens=True)
    rollout.log_probs, rollout.entropy = per_token(response_log_probs, state.policy, config.temperature, True)
    rollout.ref_log_probs = per_token(response_log_probs, state.reference, config.temperature)
    scored = [p + r for p, r in zip(prompt_ids, response_ids)], prompts, rollout.responses, finished
    rollout.reward, rollout.cost = state.reward(*scored), state.cost(*scored)
    if with_values:
        rollout.reward_values, rollout.cost_values = (per_token(response_values, critic) for critic in (state.reward_critic, state.cost_critic))
    return rollout, {"seconds_rollout": sampled - start, "seconds_scoring": time.perf_counter() - sampled,
                     "peak_mib_rollout": sampling_mib, "peak_mib_scoring": peak_memory_mib()}

# ==== 5  Token-level rewards and costs (4) (5), advantages (6) ============================================================================
def rectify(cost: Tensor, threshold: float = 0.0) -> Tensor:
    """The rectified cost {C - d}+: how far a response is above the threshold, 0 for every safe one. Any shape."""
    return (cost - threshold).clamp(min=0.0)

def shape_rewards_and_costs(reward: Tensor, cost: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, kl_coeff: float,
                            clip_range_score: float = 50.0) -> tuple[Tensor, Tensor]:
    """Equations (4) and (5): [B], [B], three [B, T] -> token rewards r_t and token costs c_t, [B, T], 0 outside the mask.

        r_t = -beta (log pi_old(y_t) - log pi_ref(y_t)) + 1[t = T] R
        c_t = +beta (log pi_old(y_t) - log pi_ref(y_t)) + 1[t = T] cost         cost: {C - d}+ or C - d, as the estimator has it
    beta stands in both, so that the combined advantage is penalised with beta whatever lambda is. Clamped to +-clip_range_score.
    """
    mask = mask.bool()
    kl = torch.where(mask, log_probs - ref_log_probs, 0.0)                                                        # [B, T]
    last = torch.zeros_like(kl).scatter(1, mask.long().cumsum(1).argmax(1, keepdim=True), 1.0)                    # [B, T]  1[t = T]
    rewards = -kl_coeff * kl + last * reward[:, None]                                                             # [B, T]
    costs = kl_coeff * kl + last * cost[:, None]                                                                  # [B, T]
    return rewards.clamp(-clip_range_score, clip_range_score), costs.clamp(-clip_range_score, clip_range_score)

def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Equation (6), generalised advantage estimation: three [B, T] -> (advantages, returns), [B, T], 0 outside the mask.

        delta_t = r_t + gamma V(s_t+1) - V(s_t),   A_t = delta_t + gamma lambda A_t+1,   return_t = A_t + V(s_t),   V(s_T+1) = 0
    """
    rewards, values = rewards.masked_fill(mask == 0, 0.0), values.masked_fill(mask == 0, 0.0)                     # [B, T]
    advantages = torch.zeros_like(values)                                                                         # [B, T]
    advantage = next_value = torch.zeros_like(values[:, 0])                                                       # [B]
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                                                 # [B]
        advantage = delta + gamma * lam * advantage                                                               # [B]
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages, advantages + values

# ==== 6  The rectified objective (1) (2) (7) (8), lambda (3), critics, PTX ================================================================
def costs_and_penalties(cost: Tensor, lam: float, config: Config) -> tuple[Tensor, Tensor]:
    """Equation (2), the rectified policy gradient E[grad log pi(y|x) (-R + lambda {C - d}+)], by one of two estimators.

    C [B] -> (the cost that enters the returns [B], lambda_i [B]):
        repo, return   {C - d}+   lambda            also rewards the rare safe response to a dangerous prompt
        repo, mask     C - d      lambda 1[C > d]   the literal split into safe and unsafe responses
        ppo_lag        C - d      lambda            safe responses pay for unsafe ones
        ppo            C - d      0
    """
    excess, weight = cost - config.threshold, torch.full_like(cost, lam)
    if config.algo == "repo" and config.rectify == "return":
        return rectify(cost, config.threshold), weight
    if config.algo == "repo":
        return excess, weight * (excess > 0)
    return excess, weight if config.algo == "ppo_lag" else torch.zeros_like(cost)

def policy_loss(policy, batch: Rollout, token_weight: Tensor, config: Config) -> tuple[Tensor, dict]:
    """Equations (7) and (8) over the N response tokens of a batch; token_weight is w_t [B, T]. Done by kernels/.

        A_t  = (A^R_t - lambda_i A^C_t) / (1 + lambda_i)
        loss = sum_t w_t (-min(rho_t A_t, clip(rho_t, 1 - epsilon, 1 + epsilon) A_t)),   rho_t = pi(y_t) / pi_old(y_t)
    """
    mask, (row, _, targets) = batch.response_mask, batch.response_index()
    tokens = (batch.log_probs[mask], batch.reward_advantages[mask], batch.cost_advantages[mask], batch.penalty[row], token_weight[mask])  # [N] each
    if policy.has_plain_head:  # log-probs and loss in one
        loss, _, stats = linear_repo_loss(*head_inputs(policy, batch), targets, *tokens, config.clip_range, config.temperature)
        return loss, stats
    return repo_loss(response_log_probs(policy, batch, config.temperature), *tokens, config.clip_range)

def update_lambda(lam: float, costs: Tensor, config: Config) -> float:
    """Equation (3): lambda <- min(lambda + alpha mean{C - d}+, lambda_max), over the raw costs C [n] of a step; it never falls.
    For --algo ppo_lag: ln lambda <- ln lambda + alpha lambda (mean C - d), over the latest --cost_window costs, same cap; for ppo: 0.
    """
    if config.algo == "repo":
        return min(lam + config.lambda_lr * rectify(costs, config.threshold).mean().item(), config.lambda_max)
    exponent = config.lambda_lr * lam * (costs.mean().item() - config.threshold)
    return 0.0 if config.algo == "ppo" else min(lam * math.exp(min(exponent, 700.0)), config.lambda_max)  # exp overflows above 709

def value_loss(critic: ScoreModel, batch: Rollout, old_values: Tensor, returns: Tensor, token_weight: Tensor, config: Config) -> tuple[Tensor, dict]:
    """A critic's clipped squared error, sum_t w_t 1/2 max((V - ret)^2, (clip(V, V_old +- range) - ret)^2): three [B, T] -> (scalar, no stats)."""
    mask = batch.response_mask
    values, old_values, returns = response_values(critic, batch), old_values[mask], returns[mask]                 # [N] each
    clipped = old_values + (values - old_values).clamp(-config.clip_range_value, config.clip_range_value)         # [N]
    return 0.5 * (token_weight[mask] * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)).sum(), {}

def ptx_loss(policy, batch: Rollout, tokens: int) -> tuple[Tensor, dict]:
    """The next-token loss of supervised answers, a share of the mean over `tokens`: (scalar, no stats). Through the policy's own log-probs, which
    take no more time than the library's chunked cross-entropy, and do without torch 2.13."""
    return -response_log_probs(policy, batch, 1.0).sum() / tokens, {}

def load_ptx_pairs(config: Config, tokenizer) -> list[tuple[list[int], list[int]]]:
    """Supervised (prompt ids, answer ids with EOS) that fit --max_length. Raises UserError."""
    asked, answers = zip(*load_pairs(config.ptx_dataset, flag="--ptx_dataset"))
    prompts, wholes = encode_prompts(asked, tokenizer), encode_prompts(asked, tokenizer, [answer or "" for answer in answers])
    kept = [(p, whole[len(p):] + [tokenizer.eos_token_id]) for p, whole in zip(prompts, wholes) if len(p) < len(whole) < config.max_length]
    require(kept, f"--ptx_dataset {config.ptx_dataset}: no row has both a prompt and an answer within --max_length {config.max_length}")
    say(f"--ptx_dataset {config.ptx_dataset}: {len(kept):,} pairs; {len(asked) - len(kept):,} without an answer or too long (--max_length) dropped")
    return kept

# ==== 7  Training =========================================================================================================================
class State:
    """The models of a run, and everything else that changes while it trains. A checkpoint holds what is TRAINED, its optimiser, and NUMBERS."""
    TRAINED, NUMBERS = ("policy", "reward_critic", "cost_critic"), ("lam", "step", "seconds", "tokens", "costs", "before", "logs", "data")
    def __init__(self, policy, tokenizer, config: Config):
        reference, self.tokenizer = on_shared_weights(policy, config).requires_grad_(False), tokenizer  # pi_ref, computed exactly as the policy is
        self.policy = sharded(policy if config.eval_only else make_trainable(policy, config), config)
        for role in ("reward", "cost"):  # each model is sharded as soon as nothing is made from it any more: whole ones fill a computer's memory
            scorer = Scorer(role, tokenizer, config)
            if not config.eval_only:
                setattr(self, f"{role}_critic", sharded(make_critic(scorer, reference, config), config))
            if not scorer.function:
                sharded(scorer.model, config)
            setattr(self, role, scorer)
        self.reference = sharded(reference, config)
        self.lam = 0.0 if config.algo == "ppo" else min(config.lambda_init, config.lambda_max)
        self.step, self.seconds, self.tokens = 0, 0.0, 0  # steps done, seconds spent and tokens sampled in them
        self.saved = None  # the step of the newest checkpoint
        self.costs, self.before = [], None  # the latest --cost_window costs; scores of the untrained policy
        self.logs = {"metrics.jsonl": [], "samples.jsonl": []}  # lines, as the files hold them
        if config.eval_only:
            return
        groups = [{"params": trainable(getattr(self, name)).values(), "lr": config.actor_lr if name == "policy" else config.critic_lr} for name in self.TRAINED]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01, fused=config.device == "cuda")  # one pass, no temporaries
        for name in self.TRAINED * recomputes(policy, config):
            set_checkpointing(getattr(self, name).base_model, True)
        for parameter in (parameter for group in groups for parameter in group["params"]):  # so that there is something to load a checkpoint into
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device if config.device == "cuda" else None),
                                               "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        warmup = max(int(0.03 * config.steps), 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, [  # warm-up and cosine for the policy, constant for the critics
            lambda step: min((step + 1) / warmup, 1.0) * (1 + math.cos(math.pi * step / config.steps)) / 2, lambda _: 1.0, lambda _: 1.0])
    def log(self, out: Path, name: str, rows: list[dict]) -> None:
        self.logs[name] += to_jsonl(rows).splitlines(True)
        if RANK == 0:
            append(out / name, to_jsonl(rows))

def cyclic_batch(items: list, step: int, size: int, seed: int) -> list:
    """The items of a step (from 0): epoch after epoch, each in its own order. A function of the step alone, so a checkpoint need not hold it."""
    def item(n: int):
        epoch, i = divmod(n, len(items))
        return items[torch.randperm(len(items), generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))[i]]
    return [item(n) for n in range(step * size, (step + 1) * size)]

def learn(state: State, rollout: Rollout, ptx: Rollout | None, config: Config) -> dict:
    """--update_iters passes over a rollout; each minibatch is one optimiser step of the policy and of both critics. Returns metrics.
    Raises BadNumbers before an optimiser step for which a loss or a gradient is not finite."""
    def descend(name: str, scale: float, loss_of, model, *arguments) -> None:
        """Backward through a loss as soon as it is made, so that the activations of one model live at a time."""
        with config.autocast():
            loss, stats = whole(model, loss_of, *arguments)
        (scale * RANKS * loss).backward()  # FSDP takes the mean of the ranks' gradients, and their losses are parts of a sum
        totals[f"{name}_loss"] += loss.item() / updates
        for key, value in stats.items():
            if key == "ratio_max":
                maxima[key] = max(maxima[key], value.item())
            else:  # means over the batch's tokens
                totals[key] += value.item() * share
    def joined(values: dict, op) -> dict:
        return dict(zip(values, over_ranks(torch.tensor([*values.values()], dtype=torch.float64, device=config.device), op).tolist()))
    count, size = len(rollout.prompts), config.minibatch_size or len(rollout.prompts)
    updates, tokens = config.update_iters * math.ceil(count / size), config.update_iters * rollout.response_mask.sum()
    totals, maxima, norms = defaultdict(float), defaultdict(float), defaultdict(float)
    orders = (torch.randperm(count, generator=random_numbers(config.seed, "order", state.step, i)) for i in range(config.update_iters))
    for update, minibatch in enumerate((rows for order in orders for rows in order.split(size)), 1):
        for batch in rollout.micro_batches(minibatch, config):
            mask, lengths = batch.response_mask, batch.response_mask.sum(1, keepdim=True)                         # [b, T], [b, 1]
            weight, share = mask / lengths / len(minibatch), (mask.sum() / tokens).item()                         # [b, T]  w_t = 1 / (T_i B)
            descend("actor", 1.0, policy_loss, state.policy, batch, weight, config)
            descend("reward_critic", 1.0, value_loss, state.reward_critic, batch, batch.reward_values, batch.reward_returns, weight, config)
            descend("cost_critic", 1.0, value_loss, state.cost_critic, batch, batch.cost_values, batch.cost_returns, weight, config)
        for batch in ptx.micro_batches(torch.arange(count), config) if ptx else ():
            descend("ptx", config.ptx_coeff, ptx_loss, state.policy, batch, ptx.response_mask.sum())
        for name in State.TRAINED:
            norm = nn.utils.clip_grad_norm_(getattr(state, name).parameters(), 1.0)
            norms[f"{name}_grad_norm"] += (norm if RANKS == 1 else norm.full_tensor()).item() / updates
        metrics = joined(totals, distributed.ReduceOp.SUM) | norms
        bad = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
        if not bad:
            state.optimizer.step()
        state.optimizer.zero_grad()
        if bad:
            raise BadNumbers(f"{bad} is {metrics[bad]} in update {update} of {updates}, and those before it stand", rollout)
    state.schedule.step()
    return metrics | joined(maxima, distributed.ReduceOp.MAX)

def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(return - V) / Var(return) over response tokens: 1 for a perfect critic, 0 for one no better than a constant."""
    return (1 - (returns - values)[mask].var(correction=0) / returns[mask].var(correction=0).clamp(min=1e-8)).item()

def train_step(state: State, prompts: list[str], ptx_pairs: list, config: Config) -> tuple[Rollout, dict]:
    """Sample, score, estimate advantages, update policy and critics, then lambda. Returns the rollout and the step's metrics. Raises BadNumbers."""
    start, lam, actor_lr = time.perf_counter(), state.lam, state.optimizer.param_groups[0]["lr"]
    chosen = cyclic_batch(prompts, state.step, config.batch_size, config.seed)
    rollout, phases = collect(state, [prompt for prompt in chosen for _ in range(config.samples_per_prompt)], config, state.step)
    if bad := not_finite(rollout):
        raise BadNumbers(bad, rollout)
    mask = rollout.response_mask                                                                                  # [B, T]
    cost, rollout.penalty = costs_and_penalties(rollout.cost, lam, config)                                        # [B], [B]
    rewards, costs = shape_rewards_and_costs(rollout.reward, cost, rollout.log_probs, rollout.ref_log_probs, mask, config.kl_coeff)  # [B, T]
    rollout.reward_advantages, rollout.reward_returns = gae(rewards, rollout.reward_values, mask, lam=config.gae_lambda)
    rollout.cost_advantages, rollout.cost_returns = gae(costs, rollout.cost_values, mask, lam=config.gae_lambda)
    pairs = cyclic_batch(ptx_pairs, state.step, len(rollout.prompts), config.seed) if ptx_pairs else None
    with recomputing(getattr(state, name) for name in State.TRAINED):
        learned = learn(state, rollout, lay_out(*zip(*pairs), state.tokenizer.pad_token_id, config.device) if pairs else None, config)
    state.costs = (state.costs + rollout.cost.tolist())[-config.cost_window:]
    state.lam = update_lambda(lam, torch.tensor(state.costs) if config.algo == "ppo_lag" else rollout.cost, config)
    total, tokens = time.perf_counter() - start, int(mask.sum())
    state.step, state.seconds, state.tokens = state.step + 1, state.seconds + total, state.tokens + tokens
    return rollout, {
        "step": state.step, "reward": rollout.reward.mean().item(), "cost": rollout.cost.mean().item(),
        "rectified_cost": rectify(rollout.cost, config.threshold).mean().item(),
        "unsafe_rate": (rollout.cost > config.threshold).float().mean().item(), "lambda": lam,
        "kl": (rollout.log_probs - rollout.ref_log_probs).sum(1).mean().item(), "entropy": rollout.entropy[mask].mean().item(), **learned,
        "reward_explained_variance": explained_variance(rollout.reward_values, rollout.reward_returns, mask),
        "cost_explained_variance": explained_variance(rollout.cost_values, rollout.cost_returns, mask),
        "response_length": tokens / len(mask), "truncated_rate": 1 - rollout.finished.float().mean().item(),
        "actor_lr": actor_lr, "critic_lr": config.critic_lr, **phases,
        "seconds_learning": total - phases["seconds_rollout"] - phases["seconds_scoring"], "peak_mib_learning": peak_memory_mib(),
        "tokens_per_second": tokens / total}

def skip_step(state: State, out: Path, what: str, rollout: Rollout, config: Config) -> None:
    """After BadNumbers: the step ends there, lambda stays, the next prompts come, and the batch goes into a file."""
    state.step += 1
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # in the first step torch misses the optimiser's
        state.schedule.step()
    state.log(out, "metrics.jsonl", [{"step": state.step, "lambda": state.lam, "bad": what}])
    if RANK == 0:
        write_whole(out / f"bad-batch-{state.step}.jsonl", to_jsonl(bad_batch(rollout, config.threshold)))
    say(f"step {state.step}: {what}; this update is left out, prompts, responses and scores are in bad-batch-{state.step}.jsonl")

def train(state: State, prompts: list[str], ptx_pairs: list, out: Path, config: Config) -> bool:
    """Minimises the Lagrangian (1), E[-R + lambda {C - d}+], in the policy while lambda rises. True if Ctrl-C has stopped it, after a whole step; the second kills."""
    pressed, bad_steps, has_warned = [], 0, False
    told = b"\nCtrl-C: this step will be finished and saved; a second Ctrl-C ends at once, with nothing saved\n" * (RANK == 0)
    signal.signal(signal.SIGINT, lambda *_: (pressed.append(True), os.write(2, told), signal.signal(signal.SIGINT, signal.SIG_DFL)))
    with tqdm(total=config.steps, initial=state.step, unit="step", dynamic_ncols=True, disable=RANK > 0) as bar:
        while not (stopped := over_ranks(torch.tensor(len(pressed), device=config.device))) and state.step < config.steps:  # all ranks together
            try:
                rollout, metrics = train_step(state, prompts, ptx_pairs, config)
            except BadNumbers as error:
                skip_step(state, out, *error.args, config)
                if (bad_steps := bad_steps + 1) == config.max_bad_steps:
                    last = out / "checkpoints" / f"step-{state.saved}" if state.saved else save_checkpoint(state, out, config)
                    raise UserError(f"stopped after {bad_steps} such steps in a row (--max_bad_steps); mend the cause and --resume from {last}; a lower learning rate or a "
                                    "higher --kl_coeff needs a new run", 3) from None
                continue
            finally:
                bar.update()
            bad_steps, sign = 0, collapse(rollout.responses, metrics["entropy"])
            if sign and not has_warned:
                say(f"warning: step {state.step}: {sign}; the policy may have collapsed")
            has_warned = has_warned or bool(sign)
            state.log(out, "metrics.jsonl", [metrics])
            if config.sample_every and (state.step % config.sample_every == 0 or state.step == config.steps):
                samples = [{"step": state.step, **record} for record in rollout.records(config.threshold)]
                say(samples_table(samples))
                state.log(out, "samples.jsonl", samples)
            if config.save_every and state.step // config.save_every > (state.saved or 0) // config.save_every:  # a bad step on a multiple saves none
                save_checkpoint(state, out, config)
            bar.set_postfix_str(f"reward {metrics['reward']:.2f}, cost {metrics['cost']:.2f}, unsafe {metrics['unsafe_rate']:.0%}, lambda {metrics['lambda']:.2f}")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return bool(stopped)

# ==== 8  Evaluation =======================================================================================================================
def evaluate(state: State, prompts: list[str], judge, config: Config) -> list[dict]:
    """--eval_samples responses to each held-out prompt with scores and verdicts, a row per prompt. Raises UserError for bad numbers."""
    repeated = [prompt for prompt in prompts[:config.max_eval_prompts] for _ in range(config.eval_samples)]
    size, records = config.batch_size * config.samples_per_prompt, []
    for start in range(0, len(repeated), size):
        rollout, _ = collect(state, repeated[start:start + size], config, ("held out", start), with_values=False)
        bad = not_finite(rollout)
        require(not bad, bad)
        judged = judge(rollout.prompts, rollout.responses) if judge else [None] * size
        with blame(f"--judge {config.judge}: must return dicts with the bools safe, refused and harmful_prompt"):
            verdicts = [judge and {name: bool(verdict[name]) for name in ("safe", "refused", "harmful_prompt")} for verdict in judged]
        records += [{**record, "verdict": verdict} for record, verdict in zip(rollout.records(config.threshold), verdicts)]
    groups = (records[start:start + config.eval_samples] for start in range(0, len(records), config.eval_samples))
    return [{"prompt": group[0]["prompt"], "responses": group} for group in groups]

# ==== 9  Checkpoints ======================================================================================================================
def tensors_of(state: State) -> dict[str, Tensor]:
    """All tensors that training changes, by name: what is trained, and AdamW's state. On several ranks each tensor is its share of the whole one."""
    weights = {f"{name}.{key}": weight for name in State.TRAINED for key, weight in trainable(getattr(state, name)).items()}
    moments = {f"optimizer.{key}.{name}": value for key, weight in weights.items() for name, value in state.optimizer.state[weight].items()}
    return {key: tensor.detach() for key, tensor in (weights | moments).items()}

def save_checkpoint(state: State, out: Path, config: Config) -> Path:
    """Writes checkpoints/step-N, each rank its shares of the tensors as safetensors, and drops all but the newest --keep_checkpoints."""
    folder, tensors = out / "checkpoints" / f"step-{state.step}", tensors_of(state)
    if state.saved == state.step:
        return folder
    with renamed_when_complete(folder) as temporary:
        with room_for(tensors, temporary):
            dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(temporary, save_distributed=True), no_dist=RANKS == 1)
        if RANK == 0:
            numbers = {name: getattr(state, name) for name in State.NUMBERS} | {"schedule": state.schedule.state_dict()}
            write_whole(temporary / "state.json", json.dumps({"state": numbers, "config": vars(config)}))
        write_manifest(temporary)
    state.saved = state.step
    if RANK == 0:
        prune(out, state.step, config.keep_checkpoints, later=True)
    return folder

def save_actor(state: State, out: Path, config: Config) -> None:
    """Writes final/actor: the policy as a plain model in the compute dtype, adapters merged."""
    weights = get_model_state_dict(state.policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with renamed_when_complete(out / "final" / "actor") as folder, room_for(weights, folder):
        if RANK == 0:
            with torch.device("meta"):
                plain = AutoModelForCausalLM.from_config(state.policy.config, dtype=getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code)
            rounded, tied = dict(plain.named_parameters(remove_duplicate=False)), plain.all_tied_weights_keys
            weights = {name: weight.to(getattr(torch, config.dtype)) if name in rounded else weight for name, weight in merged(weights).items() if name not in tied}
            plain.generation_config = state.policy.published_generation_config
            plain.save_pretrained(folder, state_dict=weights)
            state.tokenizer.save_pretrained(folder)

def resume(state: State, checkpoint: Path, config: Config) -> Path:
    """Puts a checkpoint into a fresh state, its logs into --output_dir. After a UserError no file has changed."""
    out, tensors, reader = Path(config.output_dir), tensors_of(state), dcp.HuggingFaceStorageReader(checkpoint)
    with blame(f"--resume {checkpoint}: cannot be read"):
        saved, metadata = json.loads((checkpoint / "state.json").read_text())["state"], reader.read_metadata().state_dict_metadata
        there, here = {(name, entry.size) for name, entry in metadata.items()}, {(name, tensor.shape) for name, tensor in tensors.items()}
        require(there == here, f"--resume {checkpoint}: it holds other weights than this run trains: {min(there ^ here, default=None)}")
        require(saved["data"] == state.data, f"--resume {checkpoint}: the prompts or PTX pairs are others than it was saved with; bring those back, or start a new run")
        dcp.load(tensors, storage_reader=reader, no_dist=RANKS == 1)  # in place
    vars(state).update({name: saved[name] for name in State.NUMBERS})
    state.schedule.load_state_dict(saved["schedule"])
    for group, rate in zip(state.optimizer.param_groups, state.schedule.get_last_lr()):
        group["lr"] = rate
    if checkpoint.resolve().parent.parent == out.resolve():
        state.saved = state.step
        write_config(config)
    else:
        claim_output_dir(config)
    if RANK == 0:
        cut_back(out, state.step, state.logs)
        prune(out, state.step, config.keep_checkpoints, later=False)
    say(f"continuing from {checkpoint}")
    return out

# ==== 10  Main ============================================================================================================================
def run(config: Config) -> None:
    """Load, evaluate, train, evaluate, save. Nothing is written before the first scores are in."""
    start = time.perf_counter()
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    plan.check_sources(config, fetch)
    tokenizer = load_tokenizer(config)
    prompts, held_out = split_prompts(config, tokenizer)
    ptx_pairs = load_ptx_pairs(config, tokenizer) if config.ptx_coeff else []
    judge = load_function(config.judge, "--judge", config.scorer_timeout) if config.judge and RANK == 0 else None  # verdicts are for files, which rank 0 writes
    config.steps = config.steps or math.ceil(len(prompts) / config.batch_size)
    checkpoint = find_checkpoint(config, FREE_ON_RESUME) if config.resume else None
    policy, tokenizer = load_policy(config)
    state = State(policy, tokenizer, config)
    state.data = hashlib.sha256(repr((prompts, held_out, ptx_pairs)).encode()).hexdigest()
    if is_run(config.eval_only):
        state.policy = sharded(load_policy(replace(config, policy=str(Path(config.eval_only, "final", "actor"))))[0], config)
    count = 0 if config.eval_only else sum(parameter.numel() for parameter in trainable(state.policy).values())
    say(f"policy {config.policy}: {policy.num_parameters():,} parameters, {count:,} of them trained; {config.dtype} on {config.device}")
    for scorer in (state.reward, state.cost):
        say(f"{scorer.flag} {scorer.source}: {'a function' if scorer.function else 'tokens of the policy' if scorer.same_tokens else 'tokens of its own'}")
    if checkpoint:
        out = resume(state, checkpoint, config)
    else:
        rows = evaluate(state, held_out, judge, config)
        state.before = None if config.eval_only else summarize(rows)
        out = claim_output_dir(config)
        if RANK == 0 and not config.eval_only:
            write_whole(out / "eval_before.jsonl", to_jsonl(rows))
    stopped = False
    try:
        stopped = not config.eval_only and train(state, prompts, ptx_pairs, out, config)
        if stopped:
            raise KeyboardInterrupt
        if RANKS > 1 and not config.eval_only:  # what fails from here on need not fail on all ranks, which save only together
            save_checkpoint(state, out, config)
        if not config.eval_only:
            save_actor(state, out, config)
        rows = evaluate(state, held_out, judge, config) if state.step or checkpoint else rows
    except (KeyboardInterrupt, UserError, OSError) as error:
        if (RANKS == 1 or stopped) and not config.eval_only and getattr(error, "code", 0) != 3:
            say(f"interrupted; {save_checkpoint(state, out, config)} is saved, --resume continues from there")
        raise
    if RANK > 0:
        return
    write_whole(out / "eval.jsonl", to_jsonl(rows))
    metrics, scores, seconds = [*map(json.loads, state.logs["metrics.jsonl"])], summarize(rows), time.perf_counter() - start
    bad_steps = sum("bad" in row for row in metrics)
    write_whole(out / "summary.json", json.dumps({
        "algo": config.algo, "rectify": config.rectify, "seed": config.seed, "steps": state.step, "bad_steps": bad_steps, **scores, "lambda": state.lam,
        "tokens_per_second": state.tokens / state.seconds if state.seconds else None, "wall_seconds": seconds,
        "peak_memory_mib": max([peak_memory_mib(), *(row[key] for row in metrics for key in row if key.startswith("peak_mib"))]),
        "before": state.before}, indent=2))
    say(scores_table(before=state.before, after=scores) if state.step else scores_table(now=scores))
    say(f"\n{state.step} steps of {config.algo}{f' ({bad_steps} of them with bad numbers, left out)' if bad_steps else ''} in {seconds:.0f} s; everything is in {out}")

def main(argv: list[str] | None = None) -> int:
    """0 when all is done, 1 without memory or another rank, 2 after a UserError, 3 after too many steps with bad numbers, 130 after Ctrl-C."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.disable(logging.ERROR)  # what the libraries would say reaches the user as a UserError
    warnings.filterwarnings("ignore", module="torch.distributed")
    try:
        join_ranks()
        config = resolve_config(sys.argv[1:] if argv is None else argv)
        with held(config):
            plan.dry_run(config, sys.modules[__name__]) if config.dry_run else run(config)
    except (UserError, OSError) as error:  # of the second kind: a path that may not be read, or is none
        time.sleep(5 * (RANK > 0))  # what all ranks find, rank 0 tells, and torchrun ends the others
        print(printable(f"error: {error}"), file=sys.stderr, flush=True)
        return getattr(error, "code", 2)
    except KeyboardInterrupt:
        return 130
    except torch.OutOfMemoryError as error:
        print(f"error: {str(error).partition('.')[0]}; a smaller --micro_batch_size needs less, --dry_run plans it; --resume goes on from the newest checkpoint", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        if RANKS == 1 or "onnection" not in str(error):
            raise
        print(f"error: rank {RANK} has lost another rank; what that one printed, or its exit code below, says why", file=sys.stderr, flush=True)
        return 1
    return 0

if __name__ == "__main__":
    code = main()
    with suppress(OSError):  # whoever read it may be gone
        sys.stdout.flush()
    os._exit(code)  # sys.exit would wait for threads of a score function that hangs
