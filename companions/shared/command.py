"""What every command has: settings from the command line, checks, --json, one sentence for a
mistake, and progress bars."""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets
import transformers
from tqdm import tqdm

import repo
from plumbing.errors import UserError, printable, require
from plumbing.folder import write_whole
from plumbing.settings import Parser, check_machine, fill_in, option

MAY_BE_ZERO = ("seed", "lora_rank", "rounds", "alpha", "logic_weight")
ANY_NUMBER = ("theta", "threshold")


@dataclass
class Settings:
    """A command's settings. Its docstring is the first line of --help."""

    json: str | None = option(None, "write the figures to this file too")

    NEEDED = ()    # settings that cannot be left out
    LEADING = ""   # the setting that takes the words before the first flag
    USAGE = ""     # these words, for the usage line
    passed_on = None  # flags for repo.py, where a command takes any

    def check(self) -> None:
        """Raises UserError for what cannot work."""
        for name in self.NEEDED:
            require(getattr(self, name) is not None, f"--{name} is missing")
        for name, value in vars(self).items():
            if type(value) in (int, float) and name not in ANY_NUMBER:
                may_be_zero = name in MAY_BE_ZERO
                wanted = "a finite number, 0 or more" if may_be_zero else "a finite number above 0"
                fits = value >= 0 if may_be_zero else value > 0
                require(fits and value < 2**63, f"--{name} {value}: must be {wanted}")


@dataclass
class ModelSettings(Settings):
    """Settings of a command that loads models."""

    device: Literal["cpu", "cuda"] | None = option(None, "default: cuda if there is one")
    seed: int = option(0, "of everything that is drawn at random")
    trust_remote_code: bool = option(False, "let checkpoints bring their own Python code")

    def as_run(self, path: str, **more) -> repo.Config:
        """The settings that the loaders of a run need, for the model in `path`."""
        run = repo.Config(**{
            "model": path, "policy": path, "device": self.device, "seed": self.seed,
            "trust_remote_code": self.trust_remote_code, "output_dir": "unused", **more})
        fill_in(run)
        check_machine(run)
        return run


class CommandParser(Parser):
    """A parser of one command's settings. --help shows those of all commands last."""

    def __init__(self, settings_class, command: str):
        super().__init__(settings_class, command, " ".join(settings_class.__doc__.split()), {})
        self.words = settings_class.USAGE
        self._actions.sort(key=lambda action: action.dest in ModelSettings.__dataclass_fields__)

    def format_help(self) -> str:
        return super().format_help().replace("[--flag", f"{self.words} [--flag".lstrip(), 1)


def parse(settings_class, command: str, words: list[str]):
    """Checked settings from the words of a command line. Raises UserError."""
    parser = CommandParser(settings_class, command)
    if settings_class.LEADING and words and not words[0].startswith("-"):
        words = [f"--{settings_class.LEADING}", *words]
    settings, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if settings.passed_on is None:
        require(not unknown, f"there is no {' '.join(unknown)}; see {command} --help")
    settings.passed_on = unknown
    settings.check()
    return settings


def main(settings_class, run, words: list[str] | None = None, subcommand: str = "") -> int:
    """Runs a command: settings from the command line -> run(settings) -> figures. Returns 0, the
    code of a UserError, or 130 after Ctrl-C."""
    module = sys.modules[run.__module__].__spec__.name
    command = f"python -m {module} {subcommand}".rstrip()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        settings = parse(settings_class, command, sys.argv[1:] if words is None else words)
        figures = run(settings)
        if settings.json:
            write_whole(Path(settings.json), json.dumps(figures, indent=1) + "\n")
    except (UserError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return getattr(error, "code", 2)
    except KeyboardInterrupt:
        return 130
    return 0


def bar(items, what: str, **options):
    """The items, with a progress bar once they take longer than two seconds."""
    return tqdm(items, what, delay=2, leave=False, dynamic_ncols=True, **options)


def batches(items: list, size: int, what: str):
    """Lists of at most `size` items, with a progress bar."""
    for start in bar(range(0, len(items), size), what):
        yield items[start:start + size]
