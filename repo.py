"""RePO, Rectified Policy Optimization (arXiv 2410.19933), in one file: safety alignment of a language model by reinforcement learning.

A reward model says how helpful a response is, a cost model how harmful (cost above a threshold d is unsafe). Safe RLHF bounds the *mean*
cost, so very safe answers can pay for unsafe ones: safety compensation. RePO penalises the rectified cost {C - d}+ of every prompt
instead, a number that is never negative, so nothing can compensate. This file reads in the paper's order; the tensor arithmetic of the
loss is in kernels/reference.py.

    python repo.py                                       # about a minute on a laptop: builds a tiny world, aligns a policy in it
    python repo.py --algo ppo_lag                        # the baseline that bounds the mean: watch the compensation
    python repo.py --model alpaca-7b                     # the paper's models
    python repo.py --model PATH --reward_model PATH --cost_model PATH --dataset FILE     # your own
    python repo.py --help                                # every setting

Where this differs from the paper and its published code, and why:
  1. The paper rectifies per batch split; here a rectified *return* is the default (--rectify return) and the split is --rectify mask.
     Both estimate the same gradient. With a learned cost critic the split gives no signal once every response to a prompt is unsafe.
  2. A response may fill --max_length minus its own prompt, not minus the batch's longest prompt: what a prompt gets does not
     depend on its neighbours.
  3. No dropout anywhere: the probability ratio of an unchanged policy is exactly 1.
  4. The learning-rate schedules advance once per step (one rollout), however many passes are made over it.
"""
import argparse
import copy
import dataclasses
import json
import logging
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict, deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import datasets
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig,
                          HfArgumentParser, PreTrainedConfig, PreTrainedModel, get_cosine_schedule_with_warmup)

from kernels import gather_log_probs, linear_log_probs, linear_repo_loss, repo_loss

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """Something in the user's input that one sentence can mend. main() prints the sentence and exits with code 2."""


# ============================================================================================================================
# 1  Configuration
# ============================================================================================================================


def option(default, help: str, **argument):
    return field(default=default, metadata={"help": help, **argument})


@dataclass
class Config:
    """Every setting. Precedence: these defaults < the preset that --model names < --config FILE.json < command-line flags."""

    model: str = option("tiny", "a preset (tiny, alpaca-7b, llama-3.2-3b), or the policy itself: a folder or hub name of a causal LM")
    policy: Optional[str] = option(None, "the starting policy, if it is another than the one --model names")
    reward_model: Optional[str] = option(None, "helpfulness: a Beaver-layout or sequence-classifier folder or hub name, or FILE.py:function")
    cost_model: Optional[str] = option(None, "harm, above --threshold is unsafe: the same kinds as --reward_model")
    dataset: Optional[str] = option(None, "training prompts: a json, jsonl(.gz), csv, parquet or txt file, or a hub name; append :SPLIT for a "
                                          "split other than train. A preset's eval_dataset, prompt_column and judge go with its own dataset")
    eval_dataset: Optional[str] = option(None, "held-out prompts; default: a seeded 5 %% of --dataset, at least 16")
    prompt_column: Optional[str] = option(None, "the column of --dataset and --eval_dataset that holds the prompt, if it is not recognised")
    ptx_dataset: Optional[str] = option(None, "supervised prompt-answer pairs for the PTX loss")
    judge: Optional[str] = option(None, "FILE.py:function(prompts, responses) -> per response a dict of bools: safe, refused, harmful_prompt")
    trust_remote_code: bool = option(False, "let checkpoints bring their own Python code")

    algo: Literal["repo", "ppo_lag", "ppo"] = option("repo", "repo: rectified cost; ppo_lag: mean cost (Safe RLHF); ppo: reward only")
    rectify: Literal["return", "mask"] = option("return", "repo's estimator: rectified cost in every return, or the cost penalty on unsafe responses only")
    threshold: float = option(0.0, "d: a response is unsafe if its cost is above it")
    lambda_init: float = option(1.0, "the multiplier's first value")
    lambda_lr: float = option(0.1, "alpha: the multiplier's step size")
    lambda_max: float = option(5.0, "the multiplier's upper bound")
    cost_window: int = option(128, "ppo_lag: how many of the latest responses make up the mean cost")
    kl_coeff: float = option(0.01, "beta: weight of the KL penalty to the starting policy")
    clip_range: float = option(0.2, "epsilon: clip of the probability ratio")
    clip_range_score: float = option(50.0, "bound of the token rewards and costs")
    clip_range_value: float = option(5.0, "how far a critic may move from its old value before its loss is clipped")
    gamma: float = option(1.0, "discount per token")
    gae_lambda: float = option(0.95, "GAE's lambda")
    ptx_coeff: float = option(0.0, "weight of the supervised (PTX) loss; 0 = off")

    steps: Optional[int] = option(None, "rollout-and-update steps; default: one pass over the prompts")
    batch_size: int = option(16, "prompts per step")
    samples_per_prompt: int = option(1, "responses per prompt")
    update_iters: int = option(1, "passes over each rollout")
    minibatch_size: Optional[int] = option(None, "responses per optimiser step; default: all of a rollout")
    micro_batch_size: int = option(8, "responses per forward and backward; memory, not results, depends on it")
    actor_lr: float = option(1e-5, "the policy's peak learning rate (cosine to zero)")
    critic_lr: float = option(5e-6, "the critics' learning rate (constant)")
    warmup_ratio: float = option(0.03, "share of the steps in which the policy's learning rate rises")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    adam_beta1: float = option(0.9, "AdamW's first beta")
    adam_beta2: float = option(0.95, "AdamW's second beta")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm")
    temperature: float = option(1.0, "of sampling, and therefore of every log-prob too")
    max_prompt_length: int = option(384, "tokens; longer prompts are left out, and counted aloud")
    max_length: int = option(512, "tokens of prompt plus response")
    max_response_length: Optional[int] = option(None, "tokens; default: whatever --max_length leaves")
    seed: int = option(42, "of sampling, data order and split")
    device: Optional[str] = option(None, "default: cuda if there is one, else cpu")
    dtype: Optional[Literal["float32", "bfloat16"]] = option(None, "of computing and of the saved policy; default: bfloat16 on cuda, else float32")

    eval_samples: int = option(4, "responses per held-out prompt")
    max_eval_prompts: int = option(256, "evaluate on at most so many held-out prompts")
    eval_only: bool = option(False, "evaluate the policy and stop")
    output_dir: Optional[str] = option(None, "default: runs/<model>-<algo>-<seed>; an earlier run there is moved aside")
    save_every: int = option(0, "steps between checkpoints; 0 = only on Ctrl-C")
    keep_checkpoints: int = option(2, "how many checkpoints to keep, the newest")
    resume: Optional[str] = option(None, "continue from a checkpoint folder; without a value, from the newest in --output_dir",
                                   nargs="?", const="newest")
    sample_every: int = option(50, "steps between printed (and written) samples; 0 = never")


# Where a run may differ from the one it resumes without becoming another run.
FREE_ON_RESUME = {"output_dir", "resume", "save_every", "keep_checkpoints", "eval_only"}

PUBLISHED = {  # of the Safe RLHF scripts that RePO starts from
    "reward_model": "PKU-Alignment/beaver-7b-v1.0-reward", "cost_model": "PKU-Alignment/beaver-7b-v1.0-cost",
    "dataset": "PKU-Alignment/PKU-SafeRLHF:train", "eval_dataset": "PKU-Alignment/PKU-SafeRLHF:test",
    "ptx_dataset": "tatsu-lab/alpaca", "ptx_coeff": 16.0, "save_every": 200,
}
PRESETS = {
    "tiny": {},  # its settings are tiny_configs/tiny.json, its paths whatever tiny_configs/world.py has built
    "alpaca-7b": PUBLISHED | {"policy": "PKU-Alignment/alpaca-7b-reproduced"},
    "llama-3.2-3b": PUBLISHED | {"policy": "meta-llama/Llama-3.2-3B-Instruct"},
}

POSITIVE = ("cost_window clip_range clip_range_score clip_range_value steps batch_size samples_per_prompt update_iters minibatch_size "
            "micro_batch_size actor_lr critic_lr max_grad_norm temperature max_prompt_length max_length max_response_length eval_samples "
            "max_eval_prompts keep_checkpoints").split()
NOT_NEGATIVE = "lambda_init lambda_lr lambda_max kl_coeff ptx_coeff weight_decay save_every sample_every".split()
AT_MOST_ONE = "gamma gae_lambda warmup_ratio adam_beta1 adam_beta2".split()


def check_config(config: Config) -> None:
    """Raises UserError for the first setting out of its range or missing."""
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} {value}: must be a finite number")
        if value is not None and (name in POSITIVE and value <= 0 or name in NOT_NEGATIVE and value < 0 or name in AT_MOST_ONE and not 0 <= value <= 1):
            range_ = "positive" if name in POSITIVE else "0 or more" if name in NOT_NEGATIVE else "between 0 and 1"
            raise UserError(f"--{name} {value}: must be {range_}")
    for name in ("reward_model", "cost_model", "dataset"):
        if getattr(config, name) is None:
            raise UserError(f"--{name} is missing: --model {config.model} is not a preset ({', '.join(PRESETS)}), so it has to be given")
    if config.ptx_coeff and config.ptx_dataset is None:
        raise UserError(f"--ptx_coeff {config.ptx_coeff} needs --ptx_dataset; --ptx_coeff 0 turns the supervised loss off")
    if config.max_length <= config.max_prompt_length:
        raise UserError(f"--max_length {config.max_length} leaves no room for a response after --max_prompt_length {config.max_prompt_length}")
    with_cuda = torch.cuda.is_available()
    if config.device not in ("cpu", "cuda") or config.device == "cuda" and not with_cuda:
        raise UserError(f"--device {config.device}: use cpu" + (" or cuda" if with_cuda else "; no CUDA device is available here"))


def resolve_config(argv: list[str]) -> Config:
    """The one place where settings come together. Raises UserError for anything unknown or out of range."""
    parser = HfArgumentParser(Config, description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--config", help="a json file of settings; a run's own config.json works")

    def parse(arguments: list[str], where: str) -> dict:
        """Only what the arguments name: a value that is already in the namespace keeps argparse from filling in its default."""
        def fail(message):
            raise UserError(f"{where}{message} (python repo.py --help lists the settings)")
        parser.error = fail
        untouched = {f.name: dataclasses.MISSING for f in dataclasses.fields(Config)} | {"config": None}
        parsed = vars(parser.parse_args(arguments, argparse.Namespace(**untouched)))
        return {name: value for name, value in parsed.items() if value is not dataclasses.MISSING}

    def parse_file(path: Path) -> dict:
        try:
            settings = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--config {path}: {one_line(error)}") from None
        if not isinstance(settings, dict):
            raise UserError(f"--config {path}: must hold one json object of settings")
        settings.pop("environment", None)  # what a run adds to its own config.json
        given = {name: value for name, value in settings.items() if value is not None}
        return parse([word for name, value in given.items() for word in (f"--{name}", str(value))], f"{path}: ")

    flags = parse(argv, "")
    file = flags.pop("config")
    given = (parse_file(Path(file)) if file else {}) | flags
    given.pop("config", None)
    name = given.get("model", Config.model)
    preset = dict(PRESETS.get(name, {}))
    if name == "tiny":
        from tiny_configs import world
        preset = parse_file(HERE / "tiny_configs" / "tiny.json") | world.build(BEAVER_TEMPLATE)
        preset.pop("config")
    if "dataset" in given:
        preset = {key: value for key, value in preset.items() if key not in ("eval_dataset", "prompt_column", "judge")}
    config = Config(**preset | given)
    config.policy = config.policy or config.model
    config.output_dir = config.output_dir or f"runs/{Path(config.model).name}-{config.algo}-{config.seed}"
    config.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config.dtype = config.dtype or ("bfloat16" if config.device == "cuda" else "float32")
    check_config(config)
    return config


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def say(text: str) -> None:
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def autocast(config: Config):
    """Trained models keep fp32 weights and compute in --dtype."""
    return torch.autocast(config.device, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")


# ============================================================================================================================
# 2  Prompts
# ============================================================================================================================

# A prompt is a string: the user's text, or, with several turns, a transcript "\n\nHuman: ...\n\nAssistant: ...\n\nHuman: ...".
TURN = re.compile(r"\n\n(Human|Assistant|System):[ ]?")
ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
NAMES = {role: name for name, role in ROLES.items()}


def to_messages(text) -> list[dict]:
    """A transcript, plain text or chat as a list of {"role": ..., "content": ...}."""
    if isinstance(text, list):
        return text
    before, *turns = TURN.split(text)
    if before.strip() or not turns:
        return [{"role": "user", "content": text}]
    return [{"role": ROLES[name], "content": content.strip()} for name, content in zip(turns[::2], turns[1::2])]


def to_prompt(messages: list[dict]) -> str:
    """The inverse of to_messages: one user turn is its text, more are a transcript."""
    if [message["role"] for message in messages] == ["user"]:
        return messages[0]["content"]
    return "".join(f"\n\n{NAMES[message['role']]}: {message['content']}" for message in messages)


def exchange(prompt, answer: str) -> list[dict]:
    return to_messages(prompt) + [{"role": "assistant", "content": answer}]


# The first line all of whose columns a data set has says how to read its rows; each gives a chat, its answer last if it has one.
FORMATS = [
    (("prompt", "response_0", "response_1", "better_response_id"),
     lambda row: exchange(row["prompt"], row[f"response_{int(row['better_response_id'])}"])),                # PKU-SafeRLHF
    (("prompt", "response"), lambda row: exchange(row["prompt"], row["response"])),
    (("prompt", "completion"), lambda row: exchange(row["prompt"], row["completion"])),
    (("prompt",), lambda row: to_messages(row["prompt"])),
    (("messages",), lambda row: to_messages(row["messages"])),
    (("chosen", "rejected"), lambda row: to_messages(row["chosen"])),                                        # HH-RLHF
    (("instruction", "output"),
     lambda row: exchange("\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"])),  # Alpaca
    (("instruction",), lambda row: to_messages(row["instruction"])),
    (("text",), lambda row: to_messages(row["text"])),
]
def is_local(source: str) -> bool:
    """Whether a name can only mean a path: hub names are NAME or OWNER/NAME."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1


READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def read_rows(source: str, flag: str) -> datasets.Dataset:
    """A local file, or a hub data set, with an optional :SPLIT. Raises UserError."""
    name, colon, split = source.rpartition(":")
    path, split = (Path(source), "train") if not colon or Path(source).exists() else (Path(name), split)
    path = path.expanduser()
    suffix = next((suffix for suffix in reversed(path.suffixes) if suffix != ".gz"), "")
    try:
        if path.is_file():
            if suffix not in READERS:
                raise UserError(f"{flag} {source}: cannot read {suffix or 'a file without an ending'}; it reads {', '.join(READERS)}, .gz")
            if path.stat().st_size == 0:
                raise UserError(f"{flag} {source}: the file is empty")
            rows = datasets.load_dataset(READERS[suffix], data_files=str(path), split="train")
        elif suffix in READERS or is_local(str(path)):
            raise UserError(f"{flag} {source}: no such file")
        else:
            rows = datasets.load_dataset(str(path), split=split)
    except UserError:
        raise
    except Exception as error:  # whatever the readers of four file formats and the hub client raise
        raise UserError(f"{flag} {source}: could not be read ({one_line(error.__cause__ or error)})") from None
    if len(rows) == 0:
        raise UserError(f"{flag} {source}: has no rows")
    if rows.column_names == ["instructions"]:  # {"instructions": [...]} is one row that holds them all
        rows = datasets.Dataset.from_dict({"prompt": [text for row in rows["instructions"] for text in (row if isinstance(row, list) else [row])]})
    return rows


def load_pairs(source: str, prompt_column: Optional[str] = None, flag: str = "--dataset") -> list[tuple[str, Optional[str]]]:
    """(prompt, answer or None) of every row that has a prompt. Raises UserError for an unknown format or a missing column."""
    rows = read_rows(source, flag)
    if prompt_column is not None and prompt_column not in rows.column_names:
        raise UserError(f"{flag} {source}: has no column {prompt_column!r} (--prompt_column); its columns are {', '.join(rows.column_names)}")
    to_chat = (lambda row: to_messages(row[prompt_column])) if prompt_column else next(
        (reader for columns, reader in FORMATS if set(columns) <= set(rows.column_names)), None)
    if to_chat is None:
        raise UserError(f"{flag} {source}: no known format has the columns {', '.join(rows.column_names)}; name the prompt's with --prompt_column")
    pairs = []
    for number, row in enumerate(rows):
        try:
            messages = to_chat(row)
            answer = messages.pop()["content"] if len(messages) > 1 and messages[-1]["role"] == "assistant" else None
            prompt = to_prompt(messages)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            if None in row.values():  # a row with a hole
                continue
            raise UserError(f"{flag} {source}: row {number} is not what its columns promise ({type(error).__name__}: {one_line(error)})") from None
        if prompt.strip():
            pairs.append((prompt, answer))
    return pairs


def load_prompts(source: str, prompt_column: Optional[str] = None, flag: str = "--dataset") -> list[str]:
    """The distinct prompts of a file or hub data set, in its order. Raises UserError; says how many rows it read."""
    pairs = load_pairs(source, prompt_column, flag)
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    if not prompts:
        raise UserError(f"{flag} {source}: no row has a prompt")
    say(f"{flag} {source}: {len(pairs):,} prompts read, {len(pairs) - len(prompts):,} duplicates dropped")
    return prompts


BEAVER_TEMPLATE = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"  # no space at the end: the answer follows directly, then EOS


def render_prompt(prompt: str, tokenizer) -> str:
    """What the model reads: the tokenizer's chat template if it has one, else the template of the Beaver family."""
    messages = to_messages(prompt)
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = ""
    for message in messages:  # every turn but the last user's ends in the assistant's answer and EOS; a system text opens the next turn
        text += f"{message['content']}{tokenizer.eos_token}USER: " if message["role"] == "assistant" else message["content"]
        text += {"user": " ASSISTANT:", "system": "\n\n", "assistant": ""}[message["role"]]
    return BEAVER_TEMPLATE.format(prompt=text.removesuffix(" ASSISTANT:"))


def encode_prompts(prompts: list[str], tokenizer) -> list[list[int]]:
    """Token ids of the rendered prompts, BOS as the tokenizer or its chat template has it, never an EOS at the end."""
    texts = [render_prompt(prompt, tokenizer) for prompt in prompts]
    rows = tokenizer(texts, add_special_tokens=not tokenizer.chat_template).input_ids
    ends = not tokenizer.chat_template and tokenizer("a").input_ids[-1] == tokenizer.eos_token_id  # a tokenizer that appends EOS by itself
    return [row[:-1] for row in rows] if ends else rows


def split_prompts(config: Config, tokenizer) -> tuple[list[str], list[str]]:
    """(training prompts, held-out prompts): distinct, short enough, and with none in common. Says what it leaves out."""
    def short_enough(prompts: list[str], flag: str) -> list[str]:
        lengths = [len(row) for row in encode_prompts(prompts, tokenizer)]
        kept = [prompt for prompt, length in zip(prompts, lengths) if length <= config.max_prompt_length]
        if not kept:
            raise UserError(f"{flag}: all {len(prompts)} prompts are longer than --max_prompt_length {config.max_prompt_length} (the shortest has {min(lengths)} tokens)")
        if len(kept) < len(prompts):
            say(f"{flag}: {len(prompts) - len(kept):,} of {len(prompts):,} prompts dropped, longer than --max_prompt_length {config.max_prompt_length}")
        return kept

    prompts = short_enough(load_prompts(config.dataset, config.prompt_column), "--dataset")
    if config.eval_dataset:
        held_out = short_enough(load_prompts(config.eval_dataset, config.prompt_column, "--eval_dataset"), "--eval_dataset")
    else:
        share = max(16, round(0.05 * len(prompts)))
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seed)).tolist()
        held_out = [prompts[i] for i in order[:share]]
    unseen = set(held_out)
    train = [prompt for prompt in prompts if prompt not in unseen]
    if not train:
        raise UserError(f"--dataset {config.dataset}: none of its {len(prompts)} prompts is left for training once {len(held_out)} are held out; bring more, or an --eval_dataset")
    say(f"prompts: {len(train):,} for training, {len(held_out):,} held out")
    return train, held_out


# ============================================================================================================================
# 3  Models
# ============================================================================================================================


def fetch(loader, source: str, flag: str, config: Config, **options):
    """loader(source), a transformers from_pretrained, with one sentence for whatever is wrong with a folder or a hub name."""
    path = Path(source).expanduser()
    if not path.is_dir() and (path.exists() or is_local(source)):
        raise UserError(f"{flag} {source}: no such folder" if not path.exists() else f"{flag} {source}: a file; it should be a model folder")
    try:
        return loader(str(path) if path.is_dir() else source, trust_remote_code=config.trust_remote_code, **options)
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError ...: one per way a checkpoint can be broken
        where = "could not be loaded" if path.is_dir() else f"not a preset ({', '.join(PRESETS)}), not a folder here, and not to be had from the hub"
        raise UserError(f"{flag} {source}: {where} ({one_line(error)})") from None


class Normalizer(nn.Module):
    """Running statistics that some Beaver-layout checkpoints carry."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("var", torch.ones(1))


class ScoreModel(PreTrainedModel):
    """The Beaver layout: a causal backbone `model` and a linear `score_head`. The critics are ScoreModels too, read at every token."""

    config_class = PreTrainedConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = ["score_head", "normalizer"]
    role = "reward"

    def __init__(self, config, backbone: Optional[nn.Module] = None):
        super().__init__(config)
        self.model = AutoModel.from_config(config) if backbone is None else backbone
        self.score_head = nn.Linear(config.hidden_size, 1)
        self.normalizer = Normalizer() if getattr(config, "do_normalize", False) else None
        self.post_init()

    @classmethod
    def from_pretrained(cls, path, role: Literal["reward", "cost"] = "reward", dtype=torch.float32, **options):
        """Loads a Beaver-layout or sequence-classifier checkpoint, whatever files it is stored in.

        Only the state dict decides what exists: a missing bias is 0, a missing head is a UserError, and the config's `bias`,
        `score_bias` and `score_type`, which contradict it and each other in published checkpoints, are not read.
        """
        config = AutoConfig.from_pretrained(path, **options)
        classifier = (config.architectures or [""])[0].endswith("ForSequenceClassification")
        loader = AutoModelForSequenceClassification.from_pretrained if classifier else super().from_pretrained
        model, report = loader(path, config=config, dtype=dtype, output_loading_info=True, **options)
        missing = set(report["missing_keys"]) - {"score_head.bias"}
        if missing:
            raise UserError(f"--{role}_model {path}: the checkpoint has no {', '.join(sorted(missing)[:3])}; a score model needs all its weights, "
                            f"its head among them ({'is this a language model?' if 'score_head.weight' in missing else 'is it complete?'})")
        if classifier:
            return SequenceClassifier(model)
        if "score_head.bias" in report["missing_keys"]:
            nn.init.zeros_(model.score_head.bias)
        model.role = role
        return model.eval()

    def values(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The head's fp32 output at every position: [B, L], [B, L] -> [B, L]."""
        hidden = self.model(**model_inputs(input_ids, attention_mask)).last_hidden_state             # [B, L, H]
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score_head(hidden.float()).squeeze(-1)                                       # [B, L]

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The fp32 score at the last position whose mask is 1, normalised if the checkpoint says so: [B, L], [B, L] -> [B]."""
        last = attention_mask.cumsum(1).argmax(1, keepdim=True)                                      # [B, 1]
        score = self.values(input_ids, attention_mask).gather(1, last).squeeze(1)                    # [B]
        if self.normalizer is None:
            return score
        mean = self.normalizer.mean if self.role == "reward" else 0.0  # shifting a cost would move the threshold
        return (score - mean) / (self.normalizer.var.sqrt() + 1e-8)


class SequenceClassifier(nn.Module):
    """transformers' sequence classifiers (what TRL trains) as score models: one label is the score, of two it is logit[1] - logit[0]."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        if model.config.num_labels > 2:
            raise UserError(f"{model.config.name_or_path}: a classifier with {model.config.num_labels} labels; a score needs one or two")
        self.model = model.eval()

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L], [B, L] -> fp32 [B]. The model finds the last token by its own pad id, as it did in training."""
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()       # [B, labels]
        return logits[:, -1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0]                # [B]


def load_function(source: str, flag: str):
    """FILE.py:name -> the function. Raises UserError."""
    path, _, name = source.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"{flag} {source}: no such file {path}; the form is FILE.py:function")
    try:
        function = runpy.run_path(path).get(name)
    except Exception as error:
        raise UserError(f"{flag} {source}: {path} does not run ({type(error).__name__}: {one_line(error)})") from None
    if not callable(function):
        raise UserError(f"{flag} {source}: {path} has no function {name!r}")
    return function


def call(function, source: str, flag: str, prompts: list[str], responses: list[str]) -> list:
    """A user's function on a batch: one result per response, or a UserError."""
    try:
        results = list(function(prompts, responses))
    except Exception as error:
        raise UserError(f"{flag} {source}: raised {type(error).__name__}: {one_line(error)}") from None
    if len(results) != len(responses):
        raise UserError(f"{flag} {source}: returned {len(results)} results for {len(responses)} responses")
    return results


@dataclass
class Scorer:
    """Where rewards or costs come from: a model, or a Python function."""
    role: str                           # "reward" or "cost"
    source: str
    function: object = None             # f(prompts, responses) -> scores, or None for a model
    model: Optional[nn.Module] = None
    tokenizer: object = None            # the score model's own
    same_tokens: bool = False           # it is the policy's, too


def tokenizers_agree(first, second) -> bool:
    text = BEAVER_TEMPLATE.format(prompt="Café №1?\n\n  x") + "Yes."
    return (first.get_vocab() == second.get_vocab() and first.eos_token_id == second.eos_token_id
            and first(text).input_ids == second(text).input_ids)


def load_scorer(role: str, policy_tokenizer, config: Config) -> Scorer:
    flag, source = f"--{role}_model", getattr(config, f"{role}_model")
    if ".py:" in source:
        return Scorer(role, source, function=load_function(source, flag))
    model = fetch(ScoreModel.from_pretrained, source, flag, config, role=role, dtype=getattr(torch, config.dtype))
    tokenizer = fetch(AutoTokenizer.from_pretrained, source, flag, config)
    if isinstance(model, SequenceClassifier) and model.model.config.pad_token_id is None:
        model.model.config.pad_token_id = pad_id(tokenizer)
    return Scorer(role, source, None, model.to(config.device).requires_grad_(False), tokenizer, tokenizers_agree(tokenizer, policy_tokenizer))


def pad_id(tokenizer) -> int:
    """What fills empty places. Masks say where they are, so EOS will do for a tokenizer that has no pad token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def load_policy(config: Config):
    """(policy with fp32 weights and no dropout, its tokenizer). Raises UserError."""
    flag = "--model" if config.policy == config.model else "--policy"
    policy = fetch(AutoModelForCausalLM.from_pretrained, config.policy, flag, config, dtype=torch.float32)
    tokenizer = fetch(AutoTokenizer.from_pretrained, config.policy, flag, config)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{flag} {config.policy}: its tokenizer has no EOS token, so no response could ever end; set eos_token in tokenizer_config.json")
    if len(tokenizer) > policy.get_input_embeddings().num_embeddings:
        raise UserError(f"{flag} {config.policy}: its tokenizer has {len(tokenizer)} tokens, its model only {policy.get_input_embeddings().num_embeddings} embeddings")
    template = encode_prompts(["a"], tokenizer)[0]
    if not template or tokenizer.unk_token_id is not None and tokenizer.unk_token_id in template:
        raise UserError(f"{flag} {config.policy}: its tokenizer cannot encode the prompt template {render_prompt('...', tokenizer)!r}")
    stops = {tokenizer.eos_token_id}
    with suppress(OSError):  # chat models list further end-of-turn tokens there; most checkpoints have no such file
        listed = GenerationConfig.from_pretrained(config.policy).eos_token_id
        stops |= set(listed if isinstance(listed, list) else [listed]) - {None}
    policy.stop_token_ids = sorted(stops)
    # Sampling must be from the plain softmax: a checkpoint's own top_p or temperature waits here until the policy is saved.
    policy.published_generation_config, policy.generation_config = policy.generation_config, GenerationConfig()
    policy.eval().to(config.device)
    policy.has_plain_head = has_plain_head(policy)
    return policy, tokenizer


@torch.no_grad()
def has_plain_head(policy) -> bool:
    """Whether logits are hidden @ weight.T and nothing else: no bias, soft cap or scale. If not, log-probs are taken from the logits."""
    if any(getattr(policy.config, name, None) not in (None, 1) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")):
        return False  # a soft cap could be too small to show in the trial below
    head = policy.get_output_embeddings()
    if policy.base_model is policy or getattr(head, "bias", None) is not None:
        return False
    trial = torch.arange(4, device=policy.device)[None]
    logits = policy(trial, use_cache=False).logits
    return torch.allclose(policy.base_model(trial, use_cache=False).last_hidden_state @ head.weight.T, logits, atol=1e-4 * logits.abs().max().item())


def make_critic(scorer: Scorer, policy) -> ScoreModel:
    """A trainable critic: the score model itself where it reads the policy's tokens, else the policy's body with a head of zeros."""
    source = scorer.model.model if isinstance(scorer.model, SequenceClassifier) else scorer.model
    head = getattr(source, "score_head", getattr(source, "score", None))  # causal classifiers call their linear head `score`
    reusable = scorer.same_tokens and isinstance(head, nn.Linear) and head.out_features == 1
    body = copy.deepcopy(source.base_model if reusable else policy.base_model)
    critic = ScoreModel(body.config, body)
    for name, parameter in critic.score_head.named_parameters():
        start = getattr(head, name) if reusable else None
        parameter.data = torch.zeros_like(parameter) if start is None else start.detach().clone()
    return critic.float().eval().to(policy.device).requires_grad_(True)


# ============================================================================================================================
# 4  Rollout
# ============================================================================================================================


@dataclass
class Sequences:
    """Prompts, left-padded to P tokens, followed by responses, right-padded to T."""
    input_ids: Tensor                   # [B, P+T]
    attention_mask: Tensor              # [B, P+T]  1 at prompt and response tokens
    response_mask: Tensor               # [B, T]    True at y_1 .. y_T, EOS included

    def response_index(self) -> tuple[Tensor, Tensor, Tensor]:
        """For the N response tokens: (row [N], column of the state that predicts it [N], token id [N])."""
        row, t = self.response_mask.nonzero(as_tuple=True)
        column = self.input_ids.shape[1] - self.response_mask.shape[1] + t
        return row, column - 1, self.input_ids[row, column]

    def select(self, rows: Tensor):
        """The same for some rows."""
        def take(value):
            return value[rows.to(value.device)] if isinstance(value, Tensor) else value and [value[i] for i in rows.tolist()]
        return type(self)(**{f.name: take(getattr(self, f.name)) for f in dataclasses.fields(self)})


@dataclass
class Rollout(Sequences):
    """One batch of experience."""
    prompts: list[str]                  # B     as the user wrote them
    responses: list[str]                # B     decoded, without special tokens
    finished: Tensor                    # [B]   True if the response ended with EOS, False if the length limit cut it off
    log_probs: Tensor                   # [B, T]  log pi_old(y_t)
    ref_log_probs: Tensor               # [B, T]  log pi_ref(y_t)
    reward: Tensor                      # [B]   R
    cost: Tensor                        # [B]   C
    reward_values: Optional[Tensor] = None       # [B, T]  V^R(s_t)
    cost_values: Optional[Tensor] = None         # [B, T]  V^C(s_t)
    reward_advantages: Optional[Tensor] = None   # [B, T]
    cost_advantages: Optional[Tensor] = None     # [B, T]
    reward_returns: Optional[Tensor] = None      # [B, T]
    cost_returns: Optional[Tensor] = None        # [B, T]
    penalty: Optional[Tensor] = None             # [B]   lambda_i


@dataclass
class Models:
    policy: PreTrainedModel
    reference: PreTrainedModel
    tokenizer: object
    reward: Scorer
    cost: Scorer
    reward_critic: Optional[ScoreModel] = None
    cost_critic: Optional[ScoreModel] = None


def model_inputs(input_ids: Tensor, attention_mask: Tensor) -> dict:
    """Positions count from each row's first real token, so that left padding changes nothing."""
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)                                       # [B, L]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}


def generate(policy, tokenizer, prompts: list[str], config: Config) -> tuple[Sequences, Tensor]:
    """Samples a response per prompt from the whole softmax: (sequences, finished [B])."""
    prompt_ids = encode_prompts(prompts, tokenizer)
    width = max(map(len, prompt_ids))                                                                # P
    pad = pad_id(tokenizer)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompt_ids], device=policy.device)                   # [B, P]
    lengths = torch.tensor([len(row) for row in prompt_ids], device=policy.device)                   # [B]
    mask = (torch.arange(width, device=policy.device) >= width - lengths[:, None]).long()            # [B, P]
    budget = config.max_length - lengths                                                             # [B]
    if config.max_response_length:
        budget = budget.clamp(max=config.max_response_length)
    sampling = GenerationConfig(do_sample=True, temperature=config.temperature, top_k=0, top_p=1.0, max_new_tokens=int(budget.max()),
                                eos_token_id=policy.stop_token_ids, pad_token_id=pad)
    with autocast(config):
        output = policy.generate(input_ids=ids, attention_mask=mask, generation_config=sampling)     # [B, P+T]
    response = output[:, width:]                                                                     # [B, T]
    is_stop = torch.isin(response, torch.tensor(policy.stop_token_ids, device=policy.device))        # [B, T]
    not_after_stop = is_stop.cumsum(1) - is_stop.long() == 0                                         # [B, T]
    response_mask = not_after_stop & (torch.arange(response.shape[1], device=policy.device) < budget[:, None])           # [B, T]
    kept = int(response_mask.sum(1).max())
    response_mask = response_mask[:, :kept]
    response = response[:, :kept].masked_fill(~response_mask, pad)
    sequences = Sequences(torch.cat([ids, response], 1), torch.cat([mask, response_mask.long()], 1), response_mask)
    return sequences, (is_stop[:, :kept] & response_mask).any(1)


def in_micro_batches(function, batch: Sequences, config: Config) -> Tensor:
    """function(rows of the batch) -> [n] for the n response tokens of those rows; put back in place: [B, T], 0 outside the mask."""
    with torch.no_grad(), autocast(config):
        rows = torch.arange(len(batch.input_ids)).split(config.micro_batch_size)
        flat = torch.cat([function(batch.select(some)) for some in rows])                            # [N]
    return torch.zeros(batch.response_mask.shape, device=flat.device).masked_scatter(batch.response_mask, flat)


def response_hidden(policy, batch: Sequences) -> tuple[Tensor, Tensor]:
    """(hidden states [N, H] that predict the response tokens, those tokens [N]): nothing else reaches the LM head."""
    row, state, targets = batch.response_index()
    hidden = policy.base_model(**model_inputs(batch.input_ids, batch.attention_mask)).last_hidden_state                  # [B, P+T, H]
    return hidden[row, state], targets


def response_log_probs(policy, batch: Sequences, temperature: float) -> Tensor:
    """Log-probs of the response tokens at the temperature they were sampled with: fp32 [N], differentiable."""
    if policy.has_plain_head:
        hidden, targets = response_hidden(policy, batch)
        return linear_log_probs(hidden, policy.get_output_embeddings().weight, targets, temperature)
    row, state, targets = batch.response_index()
    logits = policy(**model_inputs(batch.input_ids, batch.attention_mask)).logits                    # [B, P+T, V]
    return gather_log_probs(logits[row, state], targets, temperature)


def response_values(critic: ScoreModel, batch: Sequences) -> Tensor:
    """V(s_t) at the state before each response token: [N]."""
    row, state, _ = batch.response_index()
    return critic.values(batch.input_ids, batch.attention_mask)[row, state]


@torch.no_grad()
def score(scorer: Scorer, rollout_ids: list[list[int]], prompts: list[str], responses: list[str], finished: Tensor, config: Config) -> Tensor:
    """Rewards or costs of whole responses: fp32 [B]. Raises UserError for a score that is not a finite number."""
    flag = f"--{scorer.role}_model"
    if scorer.function:
        results = call(scorer.function, scorer.source, flag, prompts, responses)
        try:
            scores = torch.tensor([float(result) for result in results])
        except (TypeError, ValueError) as error:
            raise UserError(f"{flag} {scorer.source}: must return numbers ({one_line(error)})") from None
    else:
        rows = rollout_ids
        if not scorer.same_tokens:  # decoded and re-encoded, in the score model's own template; EOS only where the response really ended
            answers = scorer.tokenizer(responses, add_special_tokens=False).input_ids
            rows = [prompt + answer + [scorer.tokenizer.eos_token_id] * ended
                    for prompt, answer, ended in zip(encode_prompts(prompts, scorer.tokenizer), answers, finished.tolist())]
        pad, chunks = pad_id(scorer.tokenizer), []
        for start in range(0, len(rows), config.micro_batch_size):
            some = rows[start:start + config.micro_batch_size]
            width = max(map(len, some))
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in some], device=config.device)                 # [b, L]
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in some], device=config.device)       # [b, L]
            chunks.append(scorer.model.score(ids, mask))
        scores = torch.cat(chunks)
    if not scores.isfinite().all():
        raise UserError(f"{flag} {scorer.source}: gave a score that is not a finite number, to {responses[int((~scores.isfinite()).nonzero()[0])][:60]!r}")
    return scores.to(config.device, torch.float32)


def collect(models: Models, prompts: list[str], config: Config) -> tuple[Rollout, dict]:
    """Responses, their log-probs, scores and, if there are critics, values: (rollout, seconds per phase)."""
    start = time.perf_counter()
    sequences, finished = generate(models.policy, models.tokenizer, prompts, config)
    rollout_seconds = time.perf_counter() - start
    ids = [row[mask.bool()].tolist() for row, mask in zip(sequences.input_ids, sequences.attention_mask)]
    width = sequences.input_ids.shape[1] - sequences.response_mask.shape[1]
    responses = [models.tokenizer.decode(row[width:][mask], skip_special_tokens=True)
                 for row, mask in zip(sequences.input_ids, sequences.response_mask)]
    rollout = Rollout(
        **vars(sequences), prompts=prompts, responses=responses, finished=finished,
        log_probs=in_micro_batches(lambda batch: response_log_probs(models.policy, batch, config.temperature), sequences, config),
        ref_log_probs=in_micro_batches(lambda batch: response_log_probs(models.reference, batch, config.temperature), sequences, config),
        reward=score(models.reward, ids, prompts, responses, finished, config),
        cost=score(models.cost, ids, prompts, responses, finished, config))
    if models.reward_critic is not None:
        rollout.reward_values = in_micro_batches(lambda batch: response_values(models.reward_critic, batch), sequences, config)
        rollout.cost_values = in_micro_batches(lambda batch: response_values(models.cost_critic, batch), sequences, config)
    return rollout, {"seconds_rollout": rollout_seconds, "seconds_scoring": time.perf_counter() - start - rollout_seconds}


# ============================================================================================================================
# 5  Token-level rewards and costs (4) (5), advantages (6)
# ============================================================================================================================


def rectify(cost: Tensor, threshold: float = 0.0) -> Tensor:
    """The rectified cost {C - d}+: what a response costs above the threshold, 0 for every safe one. Any shape."""
    return (cost - threshold).clamp(min=0.0)


def shape_rewards_and_costs(reward: Tensor, cost: Tensor, log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, kl_coeff: float,
                            clip_range_score: float = 50.0) -> tuple[Tensor, Tensor]:
    """Equations (4) and (5): [B], [B], three [B, T] -> token rewards r_t and costs c_t, [B, T], 0 outside the mask.

        r_t = -beta (log pi_old(y_t) - log pi_ref(y_t)) + 1[t = T] R
        c_t = +beta (log pi_old(y_t) - log pi_ref(y_t)) + 1[t = T] cost

    `cost` is what the estimator sends into the returns, {C - d}+ or C - d. The same beta stands in both, so that the combined
    advantage is penalised with beta whatever lambda is. Both are clamped to +-clip_range_score after the sum.
    """
    mask = mask.bool()
    kl = torch.where(mask, log_probs - ref_log_probs, 0.0)                                           # [B, T]
    last = torch.zeros_like(kl).scatter(1, mask.long().cumsum(1).argmax(1, keepdim=True), 1.0)       # [B, T]  1[t = T]
    rewards = -kl_coeff * kl + last * reward[:, None]                                                # [B, T]
    costs = kl_coeff * kl + last * cost[:, None]                                                     # [B, T]
    return rewards.clamp(-clip_range_score, clip_range_score), costs.clamp(-clip_range_score, clip_range_score)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Equation (6), generalised advantage estimation, used for rewards and for costs: three [B, T] -> (advantages, returns), 0 outside the mask.

        delta_t = r_t + gamma V(s_t+1) - V(s_t),   A_t = delta_t + gamma lambda A_t+1,   return_t = A_t + V(s_t),   V(s_T+1) = 0
    """
    mask = mask.to(values.dtype)
    rewards, values = rewards * mask, values * mask                                                  # [B, T]
    advantage = next_value = torch.zeros_like(values[:, 0])                                          # [B]
    advantages = torch.zeros_like(values)                                                            # [B, T]
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                                    # [B]
        advantage = mask[:, t] * (delta + gamma * lam * advantage)                                   # [B]
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages, advantages + values


# ============================================================================================================================
# 6  The rectified objective (1) (2) (7) (8), critics, PTX, lambda (3)
# ============================================================================================================================


def costs_and_penalties(cost: Tensor, lam: float, config: Config) -> tuple[Tensor, Tensor]:
    """Equation (2), the rectified policy gradient E[grad log pi(y|x) (-R + lambda {C - d}+)], by either of two estimators.

    C [B] -> (the cost that enters the returns [B], lambda_i [B]):
        repo, return   {C - d}+   lambda            a safe response to a dangerous prompt earns a negative cost advantage
        repo, mask     C - d      lambda 1[C > d]   the literal split into a safe and an unsafe batch
        ppo_lag        C - d      lambda            safe responses pay for unsafe ones
        ppo            C - d      0
    """
    excess = cost - config.threshold
    if config.algo == "repo" and config.rectify == "return":
        return rectify(cost, config.threshold), torch.full_like(cost, lam)
    if config.algo == "repo":
        return excess, lam * (excess > 0).to(cost.dtype)
    return excess, torch.full_like(cost, lam if config.algo == "ppo_lag" else 0.0)


def policy_loss(policy, batch: Rollout, token_weight: Tensor, config: Config) -> tuple[Tensor, dict]:
    """Equations (7) and (8) over the N response tokens of a batch: (scalar, stats). token_weight is w_t, [B, T].

        A_t  = (A^R_t - lambda_i A^C_t) / (1 + lambda_i)
        loss = sum_t w_t (-min(rho_t A_t, clip(rho_t, 1 - epsilon, 1 + epsilon) A_t)),   rho_t = pi(y_t) / pi_old(y_t)

    The arithmetic is repo_loss in kernels/reference.py.
    """
    mask = batch.response_mask
    row, _, _ = batch.response_index()
    objective = (batch.log_probs[mask], batch.reward_advantages[mask], batch.cost_advantages[mask], batch.penalty[row], token_weight[mask])  # [N] each
    if not policy.has_plain_head:
        return repo_loss(response_log_probs(policy, batch, config.temperature), *objective, config.clip_range)
    hidden, targets = response_hidden(policy, batch)                                                 # [N, H], [N]
    loss, _, stats = linear_repo_loss(hidden, policy.get_output_embeddings().weight, targets, *objective, config.clip_range, config.temperature)
    return loss, stats


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, token_weight: Tensor, clip_range_value: float) -> Tensor:
    """A critic's clipped squared error, 1/2 max((V - ret)^2, (clip(V, V_old +- range) - ret)^2), weighted by w_t: four [N] -> scalar."""
    clipped = old_values + (values - old_values).clamp(-clip_range_value, clip_range_value)          # [N]
    return 0.5 * (token_weight * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)).sum()


def update_lambda(lam: float, costs: Tensor, config: Config) -> float:
    """Equation (3): lambda <- min(lambda + alpha mean{C - d}+, lambda_max). It never falls, and stands still once every response is safe.

    PPO-Lag's rule instead for --algo ppo_lag: ln lambda <- ln lambda + alpha lambda (mean C - d), under the same cap; 0 for ppo.
    costs [n] are the raw costs C of this step's responses, for ppo_lag of the latest --cost_window.
    """
    if config.algo == "repo":
        return min(lam + config.lambda_lr * rectify(costs, config.threshold).mean().item(), config.lambda_max)
    if config.algo == "ppo":
        return 0.0
    exponent = config.lambda_lr * lam * (costs.mean().item() - config.threshold)
    return min(lam * math.exp(min(exponent, 700.0)), config.lambda_max)  # exp overflows above 709


def ptx_batch(pairs: list[tuple[list[int], list[int]]], step: int, size: int, tokenizer, config: Config) -> Sequences:
    """The supervised pairs of a step, laid out as prompts and responses."""
    chosen = [pairs[i] for i in cyclic_batch(len(pairs), step, size, config.seed + 1)]
    width, length = (max(len(pair[side]) for pair in chosen) for side in (0, 1))                     # P, T
    pad = pad_id(tokenizer)
    ids = torch.tensor([[pad] * (width - len(p)) + p + a + [pad] * (length - len(a)) for p, a in chosen], device=config.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p + a) + [0] * (length - len(a)) for p, a in chosen], device=config.device)
    return Sequences(ids, mask, mask[:, width:].bool())


def load_ptx_pairs(config: Config, tokenizer) -> list[tuple[list[int], list[int]]]:
    """Supervised (prompt ids, answer ids with EOS) that fit --max_length. Raises UserError."""
    pairs = [(prompt, answer) for prompt, answer in load_pairs(config.ptx_dataset, flag="--ptx_dataset") if answer]
    if not pairs:
        raise UserError(f"--ptx_dataset {config.ptx_dataset}: none of its rows has an answer")
    prompts = encode_prompts([prompt for prompt, _ in pairs], tokenizer)
    answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False).input_ids
    encoded = [(prompt, answer + [tokenizer.eos_token_id]) for prompt, answer in zip(prompts, answers)]
    kept = [pair for pair in encoded if len(pair[0] + pair[1]) <= config.max_length]
    if not kept:
        raise UserError(f"--ptx_dataset {config.ptx_dataset}: all {len(pairs)} pairs are longer than --max_length {config.max_length}")
    say(f"--ptx_dataset {config.ptx_dataset}: {len(kept):,} pairs, {len(pairs) - len(kept):,} dropped, longer than --max_length {config.max_length}")
    return kept


# ============================================================================================================================
# 7  Training
# ============================================================================================================================


@dataclass
class State:
    """Everything that changes while training, and therefore everything that a checkpoint holds."""
    modules: dict                       # name -> policy and critics
    optimizers: dict                    # name -> AdamW
    schedules: dict                     # name -> learning-rate schedule
    lam: float
    costs: deque                        # the latest costs, for ppo_lag
    step: int = 0
    seconds: float = 0.0                # spent in steps
    tokens: int = 0                     # response tokens sampled
    before: Optional[dict] = None       # the scores of the untrained policy


def make_state(models: Models, config: Config) -> State:
    modules = {"policy": models.policy, "reward_critic": models.reward_critic, "cost_critic": models.cost_critic}
    optimizers = {name: torch.optim.AdamW(module.parameters(), lr=config.actor_lr if name == "policy" else config.critic_lr,
                                          betas=(config.adam_beta1, config.adam_beta2), weight_decay=config.weight_decay)
                  for name, module in modules.items()}
    schedule = get_cosine_schedule_with_warmup(optimizers["policy"], math.ceil(config.warmup_ratio * config.steps), config.steps + 1)
    schedule.step()  # the first update should not have a learning rate of zero
    return State(modules, optimizers, {"policy": schedule}, config.lambda_init if config.algo != "ppo" else 0.0, deque(maxlen=config.cost_window))


def cyclic_batch(count: int, step: int, size: int, seed: int) -> list[int]:
    """Which of `count` items step `step` (from 0) uses: epoch after epoch, each in its own order, a function of the step alone."""
    order = {}
    for i in range(step * size, (step + 1) * size):
        epoch = i // count
        if epoch not in order:
            order[epoch] = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        yield order[epoch][i % count]


def estimate_advantages(rollout: Rollout, lam: float, config: Config) -> None:
    """From scores and values to advantages, returns and penalties."""
    entering_cost, rollout.penalty = costs_and_penalties(rollout.cost, lam, config)                  # [B], [B]
    rewards, costs = shape_rewards_and_costs(rollout.reward, entering_cost, rollout.log_probs, rollout.ref_log_probs,
                                             rollout.response_mask, config.kl_coeff, config.clip_range_score)            # [B, T] each
    rollout.reward_advantages, rollout.reward_returns = gae(rewards, rollout.reward_values, rollout.response_mask, config.gamma, config.gae_lambda)
    rollout.cost_advantages, rollout.cost_returns = gae(costs, rollout.cost_values, rollout.response_mask, config.gamma, config.gae_lambda)


def learn(state: State, rollout: Rollout, ptx: Optional[Sequences], config: Config) -> dict:
    """--update_iters passes over a rollout: per minibatch one optimiser step of the policy and of both critics. Returns metrics."""
    count = len(rollout.prompts)
    size = config.minibatch_size or count
    updates = config.update_iters * math.ceil(count / size)
    totals = defaultdict(float)
    for _ in range(config.update_iters):
        for minibatch in torch.randperm(count).split(size):
            for some in minibatch.split(config.micro_batch_size):
                batch = rollout.select(some)
                mask = batch.response_mask
                token_weight = mask / mask.sum(1, keepdim=True) / len(minibatch)                     # [b, T]  w_t = 1 / (T_i B)
                with autocast(config):
                    loss, stats = policy_loss(state.modules["policy"], batch, token_weight, config)
                loss.backward()
                totals["actor_loss"] += loss.item() / updates
                share = mask.sum().item() / rollout.response_mask.sum().item() / config.update_iters
                totals["clip_fraction"] += stats["clip_fraction"].item() * share
                totals["approx_kl"] += stats["approx_kl"].item() * share
                totals["ratio_max"] = max(totals["ratio_max"], stats["ratio_max"].item())
                for name, old, returns in (("reward_critic", batch.reward_values, batch.reward_returns), ("cost_critic", batch.cost_values, batch.cost_returns)):
                    with autocast(config):
                        values = response_values(state.modules[name], batch)                         # [N]
                    loss = value_loss(values, old[mask], returns[mask], token_weight[mask], config.clip_range_value)
                    loss.backward()
                    totals[f"{name}_loss"] += loss.item() / updates
            if ptx is not None:
                for some in torch.arange(len(ptx.input_ids)).split(config.micro_batch_size):
                    with autocast(config):
                        loss = -response_log_probs(state.modules["policy"], ptx.select(some), 1.0).sum() / ptx.response_mask.sum()
                    (config.ptx_coeff * loss).backward()
                    totals["ptx_loss"] += loss.item() / updates
            for name, optimizer in state.optimizers.items():
                norm = nn.utils.clip_grad_norm_(state.modules[name].parameters(), config.max_grad_norm)
                if not norm.isfinite():
                    raise UserError(f"step {state.step + 1}: the gradient of the {name} is not finite; lower --actor_lr and --critic_lr, or raise --kl_coeff")
                totals[f"{name}_grad_norm"] += norm.item() / updates
                optimizer.step()
                optimizer.zero_grad()
    for schedule in state.schedules.values():
        schedule.step()
    return dict(totals)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(return - V) / Var(return) over response tokens; 1 is a perfect critic, 0 no better than a constant."""
    returns = returns[mask]
    return (1 - (returns - values[mask]).var(correction=0) / returns.var(correction=0).clamp(min=1e-8)).item()


def rollout_metrics(rollout: Rollout, config: Config) -> dict:
    mask = rollout.response_mask
    lengths = mask.sum(1).float()                                                                    # [B]
    return {
        "reward": rollout.reward.mean().item(),
        "cost": rollout.cost.mean().item(),
        "rectified_cost": rectify(rollout.cost, config.threshold).mean().item(),
        "unsafe_rate": (rollout.cost > config.threshold).float().mean().item(),
        "kl": (rollout.log_probs - rollout.ref_log_probs).sum(1).mean().item(),
        "entropy": -rollout.log_probs[mask].mean().item(),
        "reward_explained_variance": explained_variance(rollout.reward_values, rollout.reward_returns, mask),
        "cost_explained_variance": explained_variance(rollout.cost_values, rollout.cost_returns, mask),
        "response_length": lengths.mean().item(),
        "truncated_rate": 1 - rollout.finished.float().mean().item(),
    }


def train_step(state: State, models: Models, prompts: list[str], ptx_pairs: list, config: Config) -> tuple[Rollout, dict]:
    """One iteration: sample with the policy, score, estimate advantages, update policy and critics, then lambda. Returns its metrics."""
    start = time.perf_counter()
    chosen = [prompts[i] for i in cyclic_batch(len(prompts), state.step, config.batch_size, config.seed)]
    rollout, seconds = collect(models, [prompt for prompt in chosen for _ in range(config.samples_per_prompt)], config)
    estimate_advantages(rollout, state.lam, config)
    ptx = ptx_batch(ptx_pairs, state.step, len(rollout.prompts), models.tokenizer, config) if ptx_pairs else None
    metrics = {"step": state.step + 1, **rollout_metrics(rollout, config), "lambda": state.lam,
               "actor_lr": state.optimizers["policy"].param_groups[0]["lr"], "critic_lr": config.critic_lr,
               **learn(state, rollout, ptx, config)}
    state.costs.extend(rollout.cost.tolist())
    state.lam = update_lambda(state.lam, torch.tensor(list(state.costs)) if config.algo == "ppo_lag" else rollout.cost, config)
    tokens, total = int(rollout.response_mask.sum()), time.perf_counter() - start
    state.step, state.seconds, state.tokens = state.step + 1, state.seconds + total, state.tokens + tokens
    return rollout, metrics | seconds | {"seconds_learning": total - sum(seconds.values()), "tokens_per_second": tokens / total,
                                         "peak_memory_mib": peak_memory_mib()}


def peak_memory_mib() -> Optional[float]:
    """Of the GPU's allocator where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    with suppress(ImportError):
        import resource  # not on Windows
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@contextmanager
def whole_steps():
    """Holds Ctrl-C back until the block is done, so that a checkpoint never holds half a step. A second Ctrl-C does not wait, nor save."""
    pressed = []

    def hold(signum, frame):
        if pressed:
            raise SystemExit(130)
        pressed.append(signum)
        say("finishing this step, then saving (Ctrl-C again: stop at once, without saving)")

    previous = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        raise KeyboardInterrupt


def train(state: State, models: Models, prompts: list[str], ptx_pairs: list, out: Path, config: Config) -> None:
    """Minimises the Lagrangian (1), E[-R + lambda {C - d}+], alternating between the policy and lambda."""
    with tqdm(total=config.steps, initial=state.step, unit="step", dynamic_ncols=True) as bar:
        while state.step < config.steps:
            with whole_steps():
                rollout, metrics = train_step(state, models, prompts, ptx_pairs, config)
                append_json(out / "metrics.jsonl", [metrics])
                if config.sample_every and (state.step % config.sample_every == 0 or state.step == config.steps):
                    show_samples(state.step, rollout)
                    append_json(out / "samples.jsonl", [
                        {"step": state.step, "prompt": prompt, "response": response, "reward": reward, "cost": cost}
                        for prompt, response, reward, cost in zip(rollout.prompts, rollout.responses, rollout.reward.tolist(), rollout.cost.tolist())])
                if config.save_every and state.step % config.save_every == 0:
                    save_checkpoint(state, out, config)
            bar.set_postfix({key: f"{metrics[name]:.2f}" for key, name in
                             (("reward", "reward"), ("cost", "cost"), ("unsafe", "unsafe_rate"), ("lambda", "lambda"))}, refresh=False)
            bar.update()


def append_json(path: Path, rows: list[dict]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def show_samples(step: int, rollout: Rollout, count: int = 4) -> None:
    """The costliest responses of a batch and its cheapest, one line each."""
    order = rollout.cost.argsort(descending=True).tolist()
    width = max(shutil.get_terminal_size((120, 24)).columns - 22, 40)
    say(f"\nstep {step}, by cost\n  reward    cost  prompt -> response")
    for i in order[:count - 1] + order[-1:]:
        text = " ".join(f"{rollout.prompts[i]} -> {rollout.responses[i]}".split())
        say(f"{rollout.reward[i]:8.2f}{rollout.cost[i]:8.2f}  {text if len(text) <= width else text[:width - 1] + '…'}")


# ============================================================================================================================
# 8  Evaluation
# ============================================================================================================================


def evaluate(models: Models, prompts: list[str], judge, config: Config) -> list[dict]:
    """--eval_samples responses to each held-out prompt, with scores and the judge's verdicts: one row per prompt.

    The random state is set for it and put back after it: it is the same draw before and after training, and training's own is not touched.
    """
    models = dataclasses.replace(models, reward_critic=None, cost_critic=None)
    prompts = prompts[:config.max_eval_prompts]
    repeated = [prompt for prompt in prompts for _ in range(config.eval_samples)]
    size = config.batch_size * config.samples_per_prompt
    responses = []
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        for start in range(0, len(repeated), size):
            some = repeated[start:start + size]
            rollout, _ = collect(models, some, config)
            verdicts = call(judge, config.judge, "--judge", some, rollout.responses) if judge else [None] * len(some)
            kl = (rollout.log_probs - rollout.ref_log_probs).sum(1)                                  # [B]
            responses += [{"response": text, "reward": r, "cost": c, "kl": k, "verdict": verdict} for text, r, c, k, verdict
                          in zip(rollout.responses, rollout.reward.tolist(), rollout.cost.tolist(), kl.tolist(), verdicts)]
    return [{"prompt": prompt, "responses": responses[i * config.eval_samples:(i + 1) * config.eval_samples]} for i, prompt in enumerate(prompts)]


def mean(values) -> Optional[float]:
    values = list(values)
    return sum(values) / len(values) if values else None


def summarize(rows: list[dict], config: Config) -> dict:
    """The scores of an evaluation; those that only a judge can give are null without one."""
    responses = [response for row in rows for response in row["responses"]]
    judged = [response for response in responses if response["verdict"] is not None]
    harmless = [response for response in judged if not response["verdict"]["harmful_prompt"]]
    harmful = [response for response in judged if response["verdict"]["harmful_prompt"]]

    def is_safe(response):
        return response["cost"] <= config.threshold
    return {
        "reward": mean(response["reward"] for response in responses),
        "cost": mean(response["cost"] for response in responses),
        "rectified_cost": mean(max(response["cost"] - config.threshold, 0.0) for response in responses),
        "safety_rate": mean(map(is_safe, responses)),
        "prompts_fully_safe": mean(all(map(is_safe, row["responses"])) for row in rows),
        "judge_safety_rate": mean(response["verdict"]["safe"] for response in judged),
        "safety_rate_on_harmful_prompts": mean(map(is_safe, harmful)),
        "over_refusal_rate": mean(response["verdict"]["refused"] for response in harmless),
        "reward_on_harmless_prompts": mean(response["reward"] for response in harmless),
        "kl": mean(response["kl"] for response in responses),
    }


def show_scores(before: dict, after: Optional[dict]) -> None:
    say(f"\n{'held-out prompts':32}{'before':>10}" + (f"{'after':>10}" if after else ""))
    for name, value in before.items():
        say(f"{name:32}" + "".join(f"{'-' if scores[name] is None else format(scores[name], '.3f'):>10}" for scores in (before, after) if scores))


# ============================================================================================================================
# 9  Checkpoints
# ============================================================================================================================

LOGS = ("metrics.jsonl", "samples.jsonl")


@contextmanager
def renamed_when_complete(folder: Path):
    """A folder to write into that gets its name only once everything is in it."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def save_checkpoint(state: State, out: Path, config: Config) -> Path:
    """Writes checkpoints/step-N and drops all but the newest --keep_checkpoints."""
    with renamed_when_complete(out / "checkpoints" / f"step-{state.step}") as folder:
        torch.save({
            "parts": {group: {name: part.state_dict() for name, part in getattr(state, group).items()} for group in ("modules", "optimizers", "schedules")},
            "progress": {name: getattr(state, name) for name in ("lam", "step", "seconds", "tokens", "before")} | {"costs": list(state.costs)},
            "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []},
            "log_bytes": {name: (out / name).stat().st_size for name in LOGS if (out / name).exists()},
            "config": vars(config),
        }, folder / "state.pt")
    checkpoints = sorted((out / "checkpoints").glob("step-*"), key=step_of)
    for old in checkpoints[:-config.keep_checkpoints]:
        shutil.rmtree(old)
    return out / "checkpoints" / f"step-{state.step}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def find_checkpoint(config: Config) -> Path:
    """What --resume names. Raises UserError, also for a resume that would mix two histories in one folder."""
    own = sorted((Path(config.output_dir) / "checkpoints").glob("step-*"), key=step_of)
    if config.resume == "newest":
        if not own:
            raise UserError(f"--resume: {config.output_dir} has no complete checkpoint; check --output_dir, or start without --resume")
        return own[-1]
    checkpoint = Path(config.resume)
    if not (checkpoint / "state.pt").is_file():
        raise UserError(f"--resume {checkpoint}: not a checkpoint folder (runs/.../checkpoints/step-N)")
    if own and step_of(own[-1]) > step_of(checkpoint):
        raise UserError(f"--resume {checkpoint}: {config.output_dir} already has {own[-1].name}; give another --output_dir to branch off here")
    return checkpoint


def read_checkpoint(checkpoint: Path, config: Config) -> dict:
    """Its contents. Raises UserError if it belongs to a run with other settings."""
    try:
        saved = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"--resume {checkpoint}: state.pt cannot be read ({one_line(error)})") from None
    for name, value in vars(config).items():
        if name not in FREE_ON_RESUME and saved["config"].get(name) != value:
            raise UserError(f"--resume {checkpoint}: it was saved with --{name} {saved['config'].get(name)}, this run has {value}; "
                            f"resume with the same settings, or start a new run from its weights")
    return saved


def restore(state: State, saved: dict, checkpoint: Path, out: Path) -> None:
    """Puts a checkpoint back into a fresh state, and its logs back to what they were when it was written."""
    for group, parts in saved["parts"].items():
        for name, content in parts.items():
            getattr(state, group)[name].load_state_dict(content)
    for name, value in saved["progress"].items():
        setattr(state, name, deque(value, maxlen=state.costs.maxlen) if name == "costs" else value)
    torch.set_rng_state(saved["rng"]["cpu"])
    if saved["rng"]["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
    logs = checkpoint.parent.parent
    for name in LOGS:
        kept = (logs / name).read_bytes()[:saved["log_bytes"].get(name, 0)] if (logs / name).exists() else b""
        (out / f".{name}.tmp").write_bytes(kept)
        (out / f".{name}.tmp").replace(out / name)


def save_policy(models: Models, folder: Path, config: Config) -> None:
    """final/actor: an ordinary model folder, in the compute dtype. Converts the policy, so it comes last."""
    policy = models.policy.to(getattr(torch, config.dtype))
    policy.generation_config = policy.published_generation_config
    with renamed_when_complete(folder) as temporary:
        policy.save_pretrained(temporary)
        models.tokenizer.save_pretrained(temporary)


def claim_output_dir(config: Config) -> Path:
    """The run's folder, empty. An earlier run there is moved aside, never overwritten; anything else there is a UserError."""
    out = Path(config.output_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / "config.json").is_file():
            raise UserError(f"--output_dir {out}: exists, and is not a run of this script; choose another")
        number = next(n for n in range(1, sys.maxsize) if not out.with_name(f"{out.name}.{n}").exists())
        out.rename(out.with_name(f"{out.name}.{number}"))
        say(f"the earlier run in {out} is now {out}.{number}")
    out.mkdir(parents=True, exist_ok=True)
    return out


def environment() -> dict:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True) if shutil.which("git") else None
    return {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__, "datasets": datasets.__version__,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "git_commit": commit.stdout.strip() if commit and commit.returncode == 0 else None}


# ============================================================================================================================
# 10  Main
# ============================================================================================================================


def run(config: Config) -> dict:
    """A whole run: load, evaluate, train, evaluate, save. Returns what summary.json holds. Nothing is written before the first scores are in."""
    start = time.perf_counter()
    checkpoint = find_checkpoint(config) if config.resume else None
    torch.manual_seed(config.seed)
    policy, tokenizer = load_policy(config)
    judge = load_function(config.judge, "--judge") if config.judge else None
    prompts, held_out = split_prompts(config, tokenizer)
    ptx_pairs = load_ptx_pairs(config, tokenizer) if config.ptx_coeff else []
    config.steps = config.steps or math.ceil(len(prompts) / config.batch_size)
    scorers = [load_scorer(role, tokenizer, config) for role in ("reward", "cost")]
    reference = copy.deepcopy(policy).to(getattr(torch, config.dtype)).requires_grad_(False)
    models = Models(policy, reference, tokenizer, *scorers)
    describe(models, config)
    if config.eval_only:
        rows = evaluate(models, held_out, judge, config)
        scores = summarize(rows, config)
        show_scores(scores, None)
        return finish(claim_output_dir(config), rows, scores, scores, 0, config.lambda_init, 0.0, start, config)

    models.reward_critic, models.cost_critic = (make_critic(scorer, policy) for scorer in scorers)
    state = make_state(models, config)
    if checkpoint:
        saved = read_checkpoint(checkpoint, config)
        out = Path(config.output_dir)
        out.mkdir(parents=True, exist_ok=True)
        restore(state, saved, checkpoint, out)
        say(f"continuing from {checkpoint}")
    else:
        state.before = summarize(evaluate(models, held_out, judge, config), config)
        out = claim_output_dir(config)
    write_json(out / "config.json", vars(config) | {"resume": None, "environment": environment()})
    try:
        train(state, models, prompts, ptx_pairs, out, config)
        rows = evaluate(models, held_out, judge, config)
    except KeyboardInterrupt:
        say(f"interrupted; saved {save_checkpoint(state, out, config)}, --resume continues from there")
        raise
    scores = summarize(rows, config)
    show_scores(state.before, scores)
    save_policy(models, out / "final" / "actor", config)
    return finish(out, rows, scores, state.before, state.step, state.lam, state.tokens / state.seconds, start, config)


def finish(out: Path, rows, scores, before, steps, lam, tokens_per_second, start, config: Config) -> dict:
    summary = {"algo": config.algo, "rectify": config.rectify, "seed": config.seed, "steps": steps, **scores, "lambda": lam,
               "tokens_per_second": tokens_per_second, "wall_seconds": time.perf_counter() - start, "peak_memory_mib": peak_memory_mib(), "before": before}
    (out / "eval.jsonl").unlink(missing_ok=True)
    append_json(out / "eval.jsonl", rows)
    write_json(out / "config.json", vars(config) | {"resume": None, "environment": environment()})
    write_json(out / "summary.json", summary)
    say(f"\n{steps} steps in {summary['wall_seconds']:.0f} s; everything is in {out}")
    return summary


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def describe(models: Models, config: Config) -> None:
    """What is about to run, in a few lines."""
    template = "its own chat template" if models.tokenizer.chat_template else "the Beaver template"
    say(f"policy {config.policy}: {models.policy.num_parameters():,} parameters, {template}, {config.dtype} on {config.device}"
        + ("" if models.policy.has_plain_head else "; its LM head is not a plain product, so log-probs are taken from whole logits"))
    for scorer in (models.reward, models.cost):
        how = "Python function" if scorer.function else "reads the policy's tokens" if scorer.same_tokens else "reads decoded text through its own tokenizer"
        say(f"{scorer.role} {scorer.source}: {how}")
    rule = config.algo + (f" ({config.rectify})" if config.algo == "repo" else "")
    say(f"{rule}: {config.steps} steps of {config.batch_size} x {config.samples_per_prompt} responses, lambda from {config.lambda_init} to at most {config.lambda_max}")


def main(argv: Optional[list[str]] = None) -> int:
    """0 when all is done, 2 after a UserError, 130 after Ctrl-C."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they have to say reaches the user as a UserError
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run(resolve_config(sys.argv[1:] if argv is None else argv))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
