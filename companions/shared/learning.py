"""What the commands share: settings, command lines, and learning from files."""
import itertools
import json
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import transformers

import repo
from plumbing.errors import UserError, blame, printable, require, say
from plumbing.fitting import fit
from plumbing.adapters import make_trainable, trainable
from plumbing.models import load_policy, save_tokenizer
from plumbing.folder import renamed_when_complete, write_whole
from plumbing.settings import Parser, fill_in, option
from tiny_configs import world


@dataclass
class Common:
    """Settings that most companions have."""

    device: str | None = option(None, "cpu or cuda; default: cuda if there is one")
    seed: int = option(0, "seed of every random draw")
    trust_remote_code: bool = option(False, "let checkpoints bring their own Python code")
    json: str | None = option(None, "also write the figures to this file")

    def check(self) -> None:
        """Raises UserError for settings that cannot work."""
        require(self.device in (None, "cpu", "cuda"), f"--device {self.device}: cpu or cuda")

    def require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name} {value}: must be above 0")

    def config_for(self, policy: str, **others) -> repo.Config:
        """The same for what loads models."""
        given = {"model": policy, "device": self.device, "output_dir": "unused"} | others
        config = repo.Config(policy=policy, seed=self.seed,
                             trust_remote_code=self.trust_remote_code, **given)
        fill_in(config)
        return config


@dataclass
class Settings(Common):
    """Settings of learning from a file."""

    model: str = option("tiny", "a causal LM: folder, .gguf file or hub name")
    data: str | None = option(None, "rows to learn from: json, jsonl, csv, parquet or a hub "
                                    "name[:SPLIT]")
    eval_data: str | None = option(None, "held-out rows; default: those of 10 %% of the prompts")
    out: str | None = option(None, "the new model's folder")
    lora_rank: int = option(0, "train low-rank adapters instead of all weights")
    lr: float = option(2e-5, "the peak learning rate, annealed to zero")
    batch_size: int = option(16, "rows per step")
    steps: int | None = option(None, "default: two passes over the rows")
    max_prompt_tokens: int = option(256, "drop rows with longer prompts")
    dtype: str | None = option(None, "float32 or bfloat16, for computing; default: bfloat16 on "
                                     "a GPU that has it")

    def check(self) -> None:
        super().check()
        needs = self.model != "tiny"
        for name in ("data", "out") if needs else ():
            require(getattr(self, name), f"--{name} is missing")
        self.require_positive("batch_size", "max_prompt_tokens", "steps")
        require(self.lora_rank >= 0, f"--lora_rank {self.lora_rank}: must be 0 or more")
        require(self.dtype in (None, "float32", "bfloat16"),
                f"--dtype {self.dtype}: float32 or bfloat16")

    def in_tiny_world(self, **of_the_world) -> "Settings":
        """--model tiny: its policy, its files and what learns them well, where nothing else is
        said."""
        policy = Path(world.build()["policy"])
        for name in ("data", "eval_data"):
            if name in of_the_world:
                of_the_world[name] = str(policy.with_name(of_the_world[name]))
        unsaid = {name: value for name, value in of_the_world.items()
                  if getattr(self, name) == getattr(type(self), name)}
        return replace(self, model=str(policy), **unsaid)

    def steps_of(self, rows: list) -> int:
        """How many steps to learn from these rows. Raises UserError for fewer than a step takes."""
        require(len(rows) >= self.batch_size,
                f"--data {self.data}: {len(rows)} rows to learn from are fewer than "
                f"--batch_size {self.batch_size}")
        return self.steps or max(2 * len(rows) // self.batch_size, 1)


def load_body(settings: Settings):
    """(a causal LM, made trainable; its tokenizer; the settings that save it)."""
    run = settings.config_for(settings.model, lora_rank=settings.lora_rank, dtype=settings.dtype,
                              output_dir=settings.out or "unused")
    policy, tokenizer = load_policy(run)
    return make_trainable(policy, run).to(run.device), tokenizer, run


def learn_and_held_out(load, settings: Settings) -> tuple[list, list]:
    """Rows to learn from, and others to be tried on; load(source, flag) -> (prompts, rows)."""
    prompts, rows = load(settings.data, "--data")
    if settings.eval_data:
        _, held_out = load(settings.eval_data, "--eval_data")
        return rows, held_out
    return split(rows, prompts, settings)


def split(rows: list, prompts: list[str], settings: Settings) -> tuple[list, list]:
    """(rows to learn from, held-out rows): no prompt is in both."""
    distinct = list(dict.fromkeys(prompts))
    random.Random(settings.seed).shuffle(distinct)
    held_out = set(distinct[:max(len(distinct) // 10, 1)])
    learn = [row for row, prompt in zip(rows, prompts) if prompt not in held_out]
    return learn, [row for row, prompt in zip(rows, prompts) if prompt in held_out]


def teach(model, loss_of, rows: list, settings: Settings, run: repo.Config) -> None:
    """fit() of what can be trained, in the compute dtype; loss_of(batch of rows) -> []."""
    def loss(batch):
        with run.autocast():
            return loss_of(batch)

    fit(list(trainable(model).values()), loss, rows, settings.batch_size,
        settings.steps_of(rows), settings.lr, random.Random(settings.seed), bar=True)


def save(out: str, model, tokenizer, write) -> None:
    """A folder that is there as a whole or not at all; write(folder) fills it with the weights."""
    with renamed_when_complete(Path(out)) as folder, blame(f"--out {out}: cannot be written"):
        write(folder)
        save_tokenizer(tokenizer, folder)
    say(f"saved in {out}")


def tiny_run(folder: str, seed: int) -> None:
    """A default run of the tiny world in a folder, where there is none. Raises UserError."""
    if not Path(folder, "final").is_dir():
        say(f"training a run of the tiny world, {folder}")
        flags = ["--device", "cpu", "--seed", str(seed), "--output_dir", folder]
        require(repo.main(flags) == 0, f"{folder}: the run has failed")


def main_of(settings_class, run, tiny: dict | None = None, argv: list[str] | None = None,
            first: str | None = None) -> int:
    """Reads settings from the command line, calls run(settings) -> figures and writes --json.

    `tiny` has the settings of --model tiny. `first` names the setting that the words before the
    first flag belong to. Returns 0, 2 after a mistake, 130 after Ctrl-C.
    """
    name = Path(sys.argv[0]).stem
    parser = Parser(settings_class, f"python -m companions.{name}", settings_class.__doc__, {})
    parser.names.sort(key=Common.__dataclass_fields__.__contains__)  # in --help the own ones first
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    def command() -> None:
        words, flags = words_and_flags(sys.argv[1:] if argv is None else argv)
        if words and first:
            flags = [f"--{first}", *words, *flags]
        else:
            flags = words + flags
        settings, unknown = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
        require(not unknown, f"there is no {' '.join(unknown)}; --help lists the settings")
        settings.check()
        if tiny and settings.model == "tiny":
            settings = settings.in_tiny_world(**tiny)
        write_json(settings.json, run(settings))

    return exit_code(command)


def is_harmful(request: str) -> bool:
    """Of a request of the tiny world."""
    action, _ = world.REQUESTS[request]
    return action in world.HARMFUL_ACTIONS


def words_and_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(the words before the first flag, the rest)."""
    words = [*itertools.takewhile(lambda word: not word.startswith("-"), arguments)]
    return words, arguments[len(words):]


def write_json(file: str | None, figures) -> None:
    if file:
        write_whole(Path(file), json.dumps(figures, indent=1) + "\n")


def exit_code(command) -> int:
    """Calls command(). A mistake becomes one sentence."""
    try:
        command()
    except (UserError, OSError) as error:  # of the second kind: a path that cannot be written
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return getattr(error, "code", 2)
    except KeyboardInterrupt:
        return 130
    return 0
