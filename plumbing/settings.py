"""The command line: settings from defaults, presets, files and flags, checked before anything runs.

repo.Config adds the settings of the method to the settings of running, which are here. A field's
help is its documentation. Its default stands nowhere else.
"""
import json
import re
import shutil
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import distributed
from transformers import HfArgumentParser

from plumbing.reports import check_log_to
from plumbing.errors import UserError, blame, did_you_mean, require
from plumbing.ranks import RANKS, rank_0_first
from plumbing.folder import has_metrics, holds_run


def option(default, help: str, **argument):
    """A field with its help, and further arguments for argparse."""
    return field(default=default, metadata={"help": help, **argument})


@dataclass
class RunSettings:
    """Settings of what a run reads, how it computes and what it writes."""

    # ---- models and data
    model: str = option("tiny", "a preset (tiny, tiny-pictures, alpaca-7b, llama-3.2-3b), or the "
                                "policy itself: folder, .gguf file or hub name of a causal LM, or "
                                "of a model of LLaVA's layout")
    policy: str | None = option(None, "the starting policy, if another than --model names")
    reward_model: str | None = option(None, "helpfulness: a Beaver-layout or sequence-classifier "
                                            "folder or hub name, or FILE.py:function")
    cost_model: str | None = option(None, "harm (above --threshold is unsafe): the same kinds as "
                                          "--reward_model")
    dataset: str | None = option(None, "training prompts: a json, jsonl, csv, parquet or txt file, "
                                       "or a hub name[:SPLIT]; it replaces a preset's judge too")
    eval_dataset: str | None = option(None, "held-out prompts; default: a seeded 5 %% of "
                                            "--dataset, at least 16")
    prompt_column: str | None = option(None, "where --dataset and --eval_dataset hold the prompt, "
                                             "if that is not recognised")
    ptx_dataset: str | None = option(None, "supervised prompt-answer pairs for the PTX loss")
    judge: str | None = option(None, "FILE.py:function(prompts, responses) -> dicts of bools: "
                                     "safe, refused, harmful_prompt")
    trust_remote_code: bool = option(False, "let checkpoints bring their own Python code; for the "
                                            "command line only, no --config turns it on")
    max_prompt_length: int = option(384, "tokens; longer prompts are left out, and counted aloud")
    max_length: int = option(512, "tokens of prompt plus response")
    max_response_length: int | None = option(None, "tokens; default: what --max_length leaves")

    # ---- computing
    seed: int = option(42, "of sampling, data order and split")
    device: Literal["cpu", "cuda"] | None = option(None, "default: cuda if there is one")
    dtype: Literal["float32", "bfloat16"] | None = option(
        None, "of computing and of the saved policy; default: bfloat16 on a GPU that has it, "
              "else float32")
    tf32: bool = option(False, "let CUDA round the factors of fp32 products to TF32")
    micro_batch_size: int = option(8, "responses per forward and backward: changes memory, not "
                                      "results")
    gradient_checkpointing: bool | None = option(
        None, "make activations again in the backward: less memory, more time; default: above 1B "
              "parameters")
    lora_rank: int | None = option(
        None, "rank of the low-rank adapters that are trained instead of the weights; default: 64 "
              "in the 3B and 7B presets on one GPU, else 0 = none")

    # ---- evaluation and planning
    eval_samples: int = option(4, "responses per held-out prompt")
    max_eval_prompts: int = option(256, "evaluate on at most so many held-out prompts")
    confidence: float = option(0.95, "of the intervals and bounds of an evaluation's scores")
    eval_only: str | None = option(
        None, "evaluate this policy and stop: a run's folder, or a model's folder or hub name; "
              "without a value, the starting one", nargs="?", const="policy")
    dry_run: bool = option(False, "load no weights: show settings, prompts, models and whether the "
                                  "memory suffices, and stop")
    gpu_memory: str = option("80GiB", "what --dry_run compares with where there is no GPU")

    # ---- the run's folder
    output_dir: str | None = option(None, "default: runs/<model>-<algo>-<seed>; an earlier run "
                                          "there is moved aside")
    save_every: int = option(0, "steps between checkpoints; 0 = only on Ctrl-C")
    keep_checkpoints: int = option(2, "keep so many of the newest checkpoints")
    resume: str | None = option(None, "continue from this checkpoint; without a value, from the "
                                      "newest in --output_dir", nargs="?", const="newest")
    max_bad_steps: int = option(3, "stop after so many steps in a row with scores, log-probs, "
                                   "losses or gradients that are not finite")
    log_to: Literal["tensorboard", "trackio", "wandb"] | None = option(
        None, "each step's metrics and the summary as curves too, by this package")
    sample_every: int = option(50, "steps between samples in terminal and samples.jsonl; "
                                   "0 = never")

    def policy_flag(self) -> str:
        """The flag that named the policy."""
        if self.policy == self.model:
            return "--model"
        return "--eval_only" if self.policy == self.eval_only else "--policy"

    def autocast(self):
        """Trained models keep fp32 weights and compute in --dtype."""
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16")


SAFE_RLHF = {  # as in Safe RLHF's published PPO-Lag run, except for the last two
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
    "tiny": {},  # their settings are in tiny_configs/, where their models and data are built
    "tiny-pictures": {},
    "alpaca-7b": SAFE_RLHF | {"policy": "PKU-Alignment/alpaca-7b-reproduced"},
    "llama-3.2-3b": SAFE_RLHF | {"policy": "meta-llama/Llama-3.2-3B-Instruct"},
}
NOT_FROM_A_FILE = ("config", "environment", "trust_remote_code", "output_dir", "eval_only")
MAY_BE_ZERO = ("lora_rank", "lambda_init", "lambda_lr", "lambda_max", "kl_coeff", "gae_lambda",
               "ptx_coeff", "seed", "save_every", "sample_every")


def resolve(config_class, argv: list[str], worlds: dict):
    """A config_class from defaults, the preset of --model, --config and the command line; later
    sources override earlier ones. worlds[preset]() builds a tiny world and returns its settings.
    Raises UserError for a setting that is unknown, missing or out of range."""
    parser = make_parser(config_class)
    flags = given_in(parser, argv)
    file, evaluated = flags.pop("config", None), flags.get("eval_only")

    if has_metrics(evaluated):  # its settings and data, and its starting policy as the reference
        require(Path(evaluated, "final", "actor").is_dir(),
                f"--eval_only {evaluated}: has no final/actor, so the run has not finished")
        file = file or str(Path(evaluated, "config.json"))
    elif evaluated not in (None, "policy"):
        flags["policy"] = evaluated

    saved = given_in_file(parser, file) if file else {}
    if "model" in flags:  # and not what was trained for the file's own
        saved = without(saved, "policy")
    model = flags.get("model", saved.get("model", RunSettings.model))
    is_path = model.startswith((".", "/", "~"))
    require(not is_path or Path(model).expanduser().is_dir(), f"--model {model}: no such folder")

    with rank_0_first():  # for every model, because ranks may differ in it until they are compared
        preset = worlds[model]() if model in worlds else PRESETS.get(model, {})
    preset = given_in(parser, as_words(preset))
    config = config_class(**layered(preset, saved, flags))
    fill_in(config)
    check_numbers(config)
    check_together(config)
    check_folder(config)
    check_machine(config)
    return config


GROUPS = {  # of --help: title -> its first setting; the others follow in the order of the fields
    "models and data": "model",
    "method": "algo",
    "computing": "seed",
    "evaluation and planning": "eval_samples",
    "run folder": "output_dir",
}


class Parser(HfArgumentParser):
    """Settings as flags, with a --help in groups. A mistake raises UserError."""

    def __init__(self, config_class, command: str, description: str, groups: dict):
        super().__init__(config_class, allow_abbrev=False, description=description)
        self.command, self.groups = command, groups
        self.names = list(config_class.__dataclass_fields__)

    def error(self, message: str) -> NoReturn:
        _, is_unknown, word = message.partition("unrecognized arguments: --")
        near = did_you_mean(re.split("[ =]", word)[0], self.names) if is_unknown else ""
        raise UserError(f"{message}{near}; {self.command} --help lists the settings")

    def format_help(self) -> str:
        width = min(shutil.get_terminal_size((100, 24)).columns, 100)
        usage = f"usage: {self.command} [--FLAG VALUE ...]"
        lines = [usage, "", *textwrap.wrap(self.description, width)]
        help_of = {action.dest: action for action in self._actions}
        starts = {first: title for title, first in self.groups.items()}
        sections, title = {title: [] for title in self.groups}, ""
        for name in self.names:
            title = starts.get(name, title)
            sections.setdefault(title, []).extend(described(help_of[name], width))
        for title, described_settings in sections.items():
            lines += ["", *([f"{title}:"] if title else []), *described_settings]
        return "\n".join(lines) + "\n"


def described(action, width: int) -> list[str]:
    """The lines of a setting in --help."""
    text = (action.help or "") % {"default": action.default}
    if action.default is not None and action.default is not False and "default" not in text:
        text += f" [{action.default}]"
    lines = textwrap.wrap(text, width - 30)
    flag = f"  --{action.dest} {value_of(action)}"
    if len(flag) > 29:
        lines.insert(0, "")
    return [f"{flag:30}{lines[0]}".rstrip(), *(" " * 30 + line for line in lines[1:])]


def value_of(action) -> str:
    """What stands behind a flag in --help."""
    if action.choices:
        return "|".join(map(str, action.choices))
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
    parser.names.insert(parser.names.index("model"), "config")
    parser.groups = GROUPS | {"models and data": "config"}
    return parser


def given_in(parser, words: list[str]) -> dict:
    """Only the settings that some words of a command line name."""
    parser.parse_args(words)  # --help shows the defaults, so it comes before they are taken away
    [config_class] = parser.dataclass_types
    parser.set_defaults(**dict.fromkeys(config_class.__dataclass_fields__))
    given = vars(parser.parse_args(words))
    return {name: value for name, value in given.items() if value is not None}


def given_in_file(parser, path: str) -> dict:
    """The settings of a json file, checked like flags."""
    with blame(f"--config {path}: not a file with a json object of settings"):
        settings = {**json.loads(Path(path).read_text())}
    for name in settings.keys() - {*parser.names, "environment"}:
        raise UserError(f"--config {path}: there is no setting {name}"
                        f"{did_you_mean(name, parser.names)}; python repo.py --help lists them")
    return given_in(parser, as_words(without(settings, *NOT_FROM_A_FILE)))


def as_words(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def without(settings: dict, *names: str) -> dict:
    return {name: value for name, value in settings.items() if name not in names}


def layered(*layers: dict) -> dict:
    """All layers' settings. A later layer wins, and its data remove settings for other data."""
    settings = {}
    for layer in layers:
        if "dataset" in layer:
            settings = without(settings, "eval_dataset", "prompt_column", "judge")
        elif "eval_dataset" in layer:
            settings = without(settings, "prompt_column", "judge")
        settings |= layer
    return settings


def fill_in(config) -> None:
    """Defaults that depend on other settings or on the machine."""
    has_gpu = torch.cuda.is_available()
    config.policy = config.policy or config.model
    config.device = config.device or ("cuda" if has_gpu or config.dry_run else "cpu")
    if not config.dtype:
        # --dry_run may plan for a GPU elsewhere, and assumes that it has bf16.
        gpu_has_bf16 = not has_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
        uses_bf16 = config.device == "cuda" and gpu_has_bf16
        config.dtype = "bfloat16" if uses_bf16 else "float32"
    config.lora_rank = config.lora_rank or 0
    if config.output_dir:
        return
    if config.eval_only:
        evaluated = config.policy if config.eval_only == "policy" else config.eval_only
        config.output_dir = f"runs/eval-{Path(evaluated).resolve().name}"
    else:
        config.output_dir = f"runs/{Path(config.model).name}-{config.algo}-{config.seed}"


def check_numbers(config) -> None:
    for name, value in vars(config).items():
        if type(value) not in (int, float):  # a bool is not a number here
            continue
        if name == "threshold":
            fits, wanted = True, "a finite number"
        elif name in MAY_BE_ZERO:
            fits, wanted = value >= 0, "a finite number, 0 or more"
        else:
            fits, wanted = value > 0, "a finite number above 0"
        require(fits and abs(value) < 2**63, f"--{name} {value}: must be {wanted}")


def check_together(config) -> None:
    """Checks settings that depend on each other."""
    require(0.5 < config.confidence <= 0.9999,
            f"--confidence {config.confidence}: must be above 0.5, and at most 0.9999")
    require(config.algo != "gate" or config.gate_penalty <= 50,
            f"--gate_penalty {config.gate_penalty}: token rewards are clamped to 50")
    for name in ("reward_model", "cost_model", "dataset"):
        require(getattr(config, name) is not None,
                f"--{name} is missing; only the presets ({', '.join(PRESETS)}) bring one, "
                f"and --model {config.model} is none of them")
    require(config.ptx_dataset or not config.ptx_coeff,
            f"--ptx_coeff {config.ptx_coeff} needs --ptx_dataset; "
            "--ptx_coeff 0 turns the PTX loss off")

    require(config.baseline == "critic" or config.samples_per_prompt > 1,
            "--baseline group compares a response with the others to its prompt, so "
            "--samples_per_prompt must be 2 or more")
    responses = config.batch_size * config.samples_per_prompt
    minibatch = min(config.minibatch_size or responses, responses)
    require(responses % minibatch == 0,
            f"--minibatch_size {config.minibatch_size}: does not divide the {responses} responses "
            "of a step (--batch_size times --samples_per_prompt)")
    require(config.max_length > config.max_prompt_length,
            f"--max_length {config.max_length}: must be above "
            f"--max_prompt_length {config.max_prompt_length}")
    require(not (config.eval_only and config.resume),
            "--eval_only evaluates a policy, --resume goes on training; use one of them")
    require(not (config.eval_only and config.dry_run),
            "--dry_run plans a run that trains; leave one of --eval_only and --dry_run out")


def check_folder(config) -> None:
    """Raises UserError if --output_dir holds no run to resume, or holds something else."""
    out = Path(config.output_dir)
    require(config.resume != "newest" or out.is_dir(),
            f"--resume: there is no run in {out}; check --output_dir, or start without --resume")
    require(not out.exists() or is_empty(out) or holds_run(out),
            f"--output_dir {out}: exists and is not a run of this script; choose another")


def is_empty(folder: Path) -> bool:
    """Whether a folder is empty, apart from temporary files of a killed process."""
    return folder.is_dir() and all(path.match(".*.json.tmp") for path in folder.iterdir())


def check_machine(config) -> None:
    check_log_to(config)
    require(RANKS == 1 or config.dry_run or distributed.is_initialized(),
            "WORLD_SIZE is set, so there should be several ranks; start them with torchrun")
    require(config.device == "cpu" or config.dry_run or torch.cuda.is_available(),
            "--device cuda: torch finds no CUDA device here; leave it out to run on the CPU")
