"""The command line: settings from defaults, presets, files and flags, checked before a run starts.

repo.Config adds the settings of the method to those of RunSettings. A field's help is its
documentation, and its default is written nowhere else.
"""
import difflib
import json
import re
import shutil
import textwrap
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import distributed
from transformers import HfArgumentParser

from plumbing import hub
from plumbing.errors import UserError, blame, require
from plumbing.folder import has_metrics, holds_run
from plumbing.ranks import RANKS, rank_0_first
from plumbing.reports import check_log_to


def option(default, help: str, **argument):
    """A field with its help. argparse gets the other arguments."""
    return field(default=default, metadata={"help": help, **argument})


@dataclass
class RunSettings:
    """What a run reads, how it computes, what it writes."""

    # ---- models and data
    model: str = option("tiny", "a preset (tiny, tiny-pictures, alpaca-7b, llama-3.2-3b), or a "
                                "policy: folder, .gguf file or hub name of a causal LM, or of a "
                                "model with LLaVA's layout")
    policy: str | None = option(None, "the starting policy, if it is not the one of --model")
    reward_model: str | None = option(
        None, "helpfulness: folder or hub name of a Beaver-layout model or a sequence classifier, "
              "or FILE.py:function")
    cost_model: str | None = option(None, "harm: like --reward_model; above --threshold is unsafe")
    dataset: str | None = option(
        None, "training prompts: json, jsonl, csv, parquet or txt file, or hub name or folder of a "
              "data set, with [:CONFIG][:SPLIT]; a preset's judge is not used with them")
    eval_dataset: str | None = option(
        None, "held-out prompts; default: a random 5 %% of --dataset, at least 16")
    prompt_column: str | None = option(
        None, "the prompts' column in --dataset and --eval_dataset, if it is not recognised")
    ptx_dataset: str | None = option(None, "prompt-answer pairs for the supervised (PTX) loss")
    date: str | None = option(
        None, "the day that chat templates print, as 2026-11-30; default: the resumed or evaluated "
              "run's, or today")
    commits: str | None = option(
        None, "what hub names stand for, as NAME=COMMIT NAME=COMMIT; default: the resumed or "
              "evaluated run's, or the newest; NAME@REVISION chooses one")
    judge: str | None = option(
        None, "FILE.py:function(prompts, responses) that returns dicts of bools: safe, refused, "
              "harmful_prompt")
    trust_remote_code: bool = option(
        False, "run Python code that checkpoints bring; a --config cannot turn it on")
    max_prompt_length: int = option(384, "tokens; longer prompts are dropped and counted")
    max_length: int = option(512, "tokens of prompt and response together")
    max_response_length: int | None = option(None, "tokens; default: what --max_length leaves")

    # ---- computing
    seed: int = option(42, "seed of sampling, data order and split")
    device: Literal["cpu", "cuda"] | None = option(None, "default: cuda if there is one")
    dtype: Literal["float32", "bfloat16"] | None = option(
        None, "of computing and of the saved policy; default: bfloat16 on a GPU that supports it, "
              "else float32; a CPU needs instructions for bfloat16 (avx512_bf16, amx_bf16) to be "
              "fast in it")
    tf32: bool = option(False, "let CUDA round the factors of fp32 products to TF32")
    micro_batch_size: int = option(8, "responses per forward pass: for memory and speed; "
                                      "it changes results by rounding only")
    gradient_checkpointing: bool | None = option(
        None, "recompute activations in the backward pass: less memory, more time; default: above "
              "1B parameters")
    lora_rank: int | None = option(
        None, "train low-rank adapters of this rank, not the weights; default: 64 in the 3B and "
              "7B presets on one GPU, else 0 = none")

    # ---- evaluation and planning
    eval_samples: int = option(4, "responses per held-out prompt")
    max_eval_prompts: int = option(256, "use at most this many held-out prompts")
    confidence: float = option(0.95, "confidence level of the scores' intervals and bounds")
    eval_only: str | None = option(
        None, "evaluate this policy and stop: folder of a run, or folder or hub name of a model; "
              "without a value, the starting policy", nargs="?", const="policy")
    dry_run: bool = option(
        False, "load no weights; show settings, prompts and models, and whether they fit")
    gpu_memory: str = option("80GiB", "what --dry_run assumes where there is no GPU")

    # ---- the run's folder
    output_dir: str | None = option(
        None, "an earlier run there is moved aside; default: runs/<model>-<algo>-<seed>")
    save_every: int = option(0, "steps between checkpoints; 0 = only on Ctrl-C")
    keep_checkpoints: int = option(2, "how many checkpoints to keep, the newest")
    resume: str | None = option(
        None, "continue from this checkpoint; without a value, from the newest", nargs="?",
        const="newest")
    max_bad_steps: int = option(3, "stop after this many steps in a row with NaN or infinity")
    log_to: Literal["tensorboard", "trackio", "wandb"] | None = option(
        None, "also show metrics and summary as curves, with this package")
    sample_every: int = option(50, "steps between samples, printed and saved; 0 = never")

    def policy_flag(self) -> str:
        """The flag that named the policy, for messages about it."""
        if self.policy == self.model:
            return "--model"
        return "--eval_only" if self.policy == self.eval_only else "--policy"

    def needs_pairs(self) -> bool:
        return bool(self.ptx_coeff) and not self.eval_only

    def autocast(self):
        """A context in which models with fp32 weights compute in --dtype."""
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16")


SAFE_RLHF = {  # from Safe RLHF's published PPO-Lag run, except the last two
    "reward_model": "PKU-Alignment/beaver-7b-v1.0-reward",
    "cost_model": "PKU-Alignment/beaver-7b-v1.0-cost",
    "dataset": "PKU-Alignment/PKU-SafeRLHF:train",
    "eval_dataset": "PKU-Alignment/PKU-SafeRLHF:test",
    "ptx_dataset": "tatsu-lab/alpaca",
    "ptx_coeff": 16.0,
    "batch_size": 16 * RANKS,
    "lora_rank": 64 if RANKS == 1 else 0,  # six 7B models, fully fine-tuned, need several GPUs
    "save_every": 200,
}
PRESETS = {
    "tiny": {},  # tiny_configs/ holds their settings, and builds their models and data
    "tiny-pictures": {},
    "alpaca-7b": SAFE_RLHF | {"policy": "PKU-Alignment/alpaca-7b-reproduced"},
    "llama-3.2-3b": SAFE_RLHF | {"policy": "meta-llama/Llama-3.2-3B-Instruct"},
}
USED = ("policy", "reward_model", "cost_model", "judge", "dataset", "eval_dataset", "ptx_dataset",
        "eval_only")  # settings that may name a file or folder
NOT_FROM_A_FILE = ("config", "environment", "trust_remote_code", "output_dir", "eval_only")
MAY_BE_ZERO = ("lora_rank", "lambda_init", "lambda_lr", "lambda_max", "kl_coeff", "gae_lambda",
               "ptx_coeff", "seed", "save_every", "sample_every")


def resolve(config_class, argv: list[str], worlds: dict):
    """A config_class: defaults, overridden by the preset of --model, by --config, by the command
    line.

    worlds[preset]() builds a tiny world and returns its settings. Raises UserError for a setting
    that is unknown, missing or out of range.
    """
    parser = make_parser(config_class)
    flags = given_in(parser, argv)
    file, evaluated = flags.pop("config", None), flags.get("eval_only")
    files = [file] if file else []

    if has_metrics(evaluated):  # a run: its settings and data; its starting policy is the reference
        require(Path(evaluated, "final", "actor").is_dir(),
                f"--eval_only {evaluated}: has no final/actor, so the run has not finished; "
                "finish it with --resume")
        files.insert(0, str(Path(evaluated, "config.json")))
    elif evaluated not in (None, "policy"):
        flags["policy"] = evaluated

    model, layers = RunSettings.model, []
    for layer in (*(given_in_file(parser, file) for file in files), flags):
        if "model" in layer:  # a policy before it belongs to another model
            model, layers = layer["model"], [without(earlier, "policy") for earlier in layers]
        layers.append(layer)
    is_path = model.startswith((".", "/", "~"))
    require(not is_path or Path(model).expanduser().exists(),
            f"--model {model}: no such folder or file; correct the path")
    with rank_0_first():  # for every model: check_machines() reports later if ranks differ in it
        preset = worlds[model]() if model in worlds else PRESETS.get(model, {})
    preset = given_in(parser, as_words(preset))
    config = config_class(**layered(preset, *layers))
    fill_in(config)
    with blame(f"--commits {config.commits}: must be NAME=COMMIT NAME=COMMIT"):
        hub.fix(config.commits)
    check_numbers(config)
    check_together(config)
    check_folder(config)
    check_machine(config)
    return config


# ---- Flags and files

GROUPS = {  # of --help: the first setting of each -> its title
    "model": "models and data",
    "algo": "method",
    "seed": "computing",
    "eval_samples": "evaluation and planning",
    "output_dir": "run folder",
    "config": "run folder",
}


class Parser(HfArgumentParser):
    """Settings as flags, with a --help in groups. A mistake raises UserError."""

    def __init__(self, config_class, command: str, description: str, groups: dict):
        super().__init__(config_class, allow_abbrev=False, description=description)
        self.command, self.groups = command, groups

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument |/--[a-z-]+", "", message)  # HfArgumentParser's second names
        unknown = re.search(r"unrecognized arguments: --([^ =]+)", message)
        names = [action.dest for action in self._actions]
        near = difflib.get_close_matches(unknown[1], names, 1) if unknown else []
        remedy = f"did you mean --{near[0]}?" if near else f"see {self.command} --help"
        raise UserError(f"{message}; {remedy}")

    def format_help(self) -> str:
        width = min(shutil.get_terminal_size((100, 24)).columns, 100)
        flags = "[--model NAME] [--flag value ...]" if self.groups else "[--flag value ...]"
        lines = [f"usage: {self.command} {flags}", "", *textwrap.wrap(self.description, width)]
        title, sections = "settings", {title: [] for title in self.groups.values()}
        for action in self._actions[1:]:  # the first is --help
            title = self.groups.get(action.dest, title)
            sections.setdefault(title, []).extend(described(action, width))
        for title, settings in sections.items():
            lines += ["", f"{title}:", *settings]
        return "\n".join(lines) + "\n"


def described(action, width: int) -> list[str]:
    """The lines of a setting in --help."""
    text = action.help.replace("%%", "%")
    if type(action.default) in (int, float, str) and "default: " not in text:
        text += f"; default: {action.default}"
    flag = f"  --{action.dest} {value_of(action)}".rstrip()
    lines = textwrap.wrap(text, width - 28)
    if len(flag) > 26:
        lines.insert(0, "")
    return [f"{flag:28}{lines[0]}".rstrip(), *(" " * 28 + line for line in lines[1:])]


def value_of(action) -> str:
    """What follows a flag in --help."""
    if action.choices:
        return "|".join(action.choices)
    if action.const is True:
        return ""
    names = {int: "N", float: "X", str: "NAME", None: "NAME"}
    name = names.get(action.type, "true|false")
    return f"[{name}]" if action.const else name


def make_parser(config_class) -> Parser:
    parser = Parser(
        config_class, "python repo.py",
        "Most defaults are those of Safe RLHF's published run. A preset overrides them: "
        "tiny_configs/tiny.json does so for --model tiny.", GROUPS)
    parser.add_argument("--config", help="a json file of settings, such as a run's config.json")
    return parser


def given_in(parser: Parser, words: list[str]) -> dict:
    """The settings that some words of a command line name, without defaults."""
    nothing = Namespace(**dict.fromkeys(action.dest for action in parser._actions))
    given = vars(parser.parse_args(words, nothing))
    return {name: value for name, value in given.items() if value is not None}


def given_in_file(parser: Parser, path: str) -> dict:
    """The settings of a json file, checked as flags are."""
    with blame(f"--config {path}: not a file with a json object of settings"):
        settings = {**json.loads(Path(path).read_text())}
    try:
        return given_in(parser, as_words(without(settings, *NOT_FROM_A_FILE)))
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None


def as_words(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def without(settings: dict, *names: str) -> dict:
    return {name: value for name, value in settings.items() if name not in names}


def layered(*layers: dict) -> dict:
    """The settings of all layers; a later layer wins. A layer with data of its own drops the
    settings that belong to the data before it."""
    settings = {}
    for layer in layers:
        if "dataset" in layer:
            settings = without(settings, "eval_dataset", "prompt_column", "judge")
        elif "eval_dataset" in layer:
            settings = without(settings, "prompt_column", "judge")
        settings |= layer
    return settings


def fill_in(config) -> None:
    """Fills in the defaults that depend on other settings or on the machine."""
    has_gpu = torch.cuda.is_available()
    config.policy = config.policy or config.model
    config.device = config.device or ("cuda" if has_gpu or config.dry_run else "cpu")
    if not config.dtype:
        # Without a GPU here, --dry_run plans for one elsewhere that supports bf16.
        gpu_has_bf16 = not has_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
        uses_bf16 = config.device == "cuda" and gpu_has_bf16
        config.dtype = "bfloat16" if uses_bf16 else "float32"
    config.lora_rank = config.lora_rank or 0
    config.output_dir = config.output_dir or default_folder(config)
    resumed = settings_of_resumed(config)
    config.date = config.date or resumed.get("date")
    config.commits = config.commits or resumed.get("commits")


def default_folder(config) -> str:
    if config.eval_only:
        evaluated = config.policy if config.eval_only == "policy" else config.eval_only
        return f"runs/eval-{Path(evaluated).resolve().name}"
    return f"runs/{Path(config.model).name}-{config.algo}-{config.seed}"


def settings_of_resumed(config) -> dict:
    """The settings of the run to resume, perhaps one without the newest settings; for a new run
    what is fixed when it begins."""
    with suppress(OSError, ValueError, TypeError, KeyError):  # find_checkpoint says what is missing
        if config.resume == "newest":
            return {**json.loads(Path(config.output_dir, "config.json").read_text())}
        if config.resume:
            return {**json.loads(Path(config.resume, "state.json").read_text())["config"]}
    return {"date": date.today().isoformat()}


def check_numbers(config) -> None:
    for name, value in vars(config).items():
        if type(value) not in (int, float):  # a bool is none
            continue
        if name == "threshold":
            fits, wanted = True, "a finite number"
        elif name in MAY_BE_ZERO:
            fits, wanted = value >= 0, "a finite number, 0 or more"
        else:
            fits, wanted = value > 0, "a finite number above 0"
        require(fits and abs(value) < 2**63, f"--{name} {value}: must be {wanted}")


def check_together(config) -> None:
    """Raises UserError if a setting is missing, or does not fit another one."""
    require(0.5 < config.confidence <= 0.9999,
            f"--confidence {config.confidence}: must be above 0.5, and at most 0.9999")
    require(config.algo != "gate" or config.gate_penalty <= 50,
            f"--gate_penalty {config.gate_penalty}: must be at most 50, where token rewards are "
            "clamped")
    with blame(f"--date {config.date}: must be a day, as 2026-11-30"):
        date.fromisoformat(config.date or "2026-11-30")
    for name in ("reward_model", "cost_model", "dataset"):
        require(getattr(config, name),
                f"--{name} is missing: --model {config.model} is none of the presets "
                f"{', '.join(PRESETS)}; set --{name}, or use a preset")
    require(config.ptx_dataset or not config.ptx_coeff,
            f"--ptx_coeff {config.ptx_coeff}: needs --ptx_dataset; set it, or --ptx_coeff 0")
    require(config.baseline == "critic" or config.samples_per_prompt > 1,
            "--baseline group: compares responses to the same prompt; set --samples_per_prompt to "
            "2 or more")
    responses = config.batch_size * config.samples_per_prompt
    minibatch = min(config.minibatch_size or responses, responses)
    require(responses % minibatch == 0,
            f"--minibatch_size {config.minibatch_size}: does not divide the {responses} responses "
            "of a step; use a divisor of --batch_size times --samples_per_prompt")
    require(config.max_length > config.max_prompt_length,
            f"--max_length {config.max_length}: must be above "
            f"--max_prompt_length {config.max_prompt_length}")
    for name in ("resume", "dry_run"):
        require(not (config.eval_only and getattr(config, name)),
                f"--{name}: is for a run that trains, --eval_only trains nothing; use one of them")


def check_folder(config) -> None:
    """Raises UserError if --output_dir holds no run to resume, or holds something else."""
    out = Path(config.output_dir)
    require(config.resume != "newest" or out.is_dir(),
            f"--resume: there is no run in {out}; check --output_dir, or start without --resume")
    require(not out.exists() or is_empty(out) or holds_run(out),
            f"--output_dir {out}: exists and is not a run of this script; choose another")
    if holds_run(out) and not (config.resume or config.dry_run):  # it will be moved aside
        require(not is_inside(Path.cwd(), out),
                f"--output_dir {out}: holds a run, which a new one moves aside, and you are inside "
                "it; start from another folder, or choose another")
        for name in USED:
            source = str(getattr(config, name))
            flag = config.policy_flag() if name == "policy" else f"--{name}"
            paths = [Path(source.rsplit(":", n)[0]) for n in range(3)]  # FILE:function, DIR:A:B
            require(not any(is_inside(path, out) for path in paths),
                    f"{flag} {source}: is inside --output_dir {out}, which holds a run that a "
                    "new one moves aside; choose another --output_dir")


def is_inside(path: Path, folder: Path) -> bool:
    path = path.expanduser()
    return path.exists() and path.resolve().is_relative_to(folder.resolve())


def is_empty(folder: Path) -> bool:
    """Whether nothing is there, except what a killed run leaves before it has written a file."""
    return folder.is_dir() and all(path.match(".*.json.tmp") for path in folder.iterdir())


def check_machine(config) -> None:
    check_log_to(config)
    require(RANKS == 1 or config.dry_run or distributed.is_initialized(),
            "WORLD_SIZE is set, but there is only this process; start several ranks with torchrun")
    require(config.device == "cpu" or config.dry_run or torch.cuda.is_available(),
            "--device cuda: torch finds no CUDA device; leave it out to run on the CPU")
