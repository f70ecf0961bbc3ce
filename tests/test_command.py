# pytest tests/test_command.py
"""What every command of companions/ has: --help, --json, refusals in one sentence."""
import json
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT, exhaustive

from companions import monitor, page, supervised, xstest
from companions.shared import command
from plumbing.errors import UserError
from plumbing.settings import option

NAMES = sorted(path.stem for path in (ROOT / "companions").glob("*.py") if path.stem != "__init__")


@dataclass
class Few(command.ModelSettings):
    """A few
    settings."""

    words: list[str] = option(None, "words before the flags")
    prompt: str | None = option(None, "text")
    share: float = option(0.5, "of 1")
    rounds: int = option(1, "may be 0")
    theta: float = option(0.0, "any number")

    LEADING, USAGE, NEEDED = "words", "[WORD ...]", ("prompt",)


def ran(settings: Few) -> dict:
    if settings.prompt == "stop":
        raise KeyboardInterrupt
    if settings.prompt == "fail":
        raise UserError("a run has failed", code=1)
    return {"words": settings.words, "rounds": settings.rounds, "theta": settings.theta}


def call(*words) -> int:
    return command.main(Few, ran, [*map(str, words)])


def test_figures_go_to_a_file(tmp_path):
    file = tmp_path / "figures.json"
    assert call("a", "b", "--prompt", "p", "--rounds", 0, "--theta", -1, "--json", file) == 0
    assert json.loads(file.read_text()) == {"words": ["a", "b"], "rounds": 0, "theta": -1.0}


@pytest.mark.parametrize("words, says, code", [
    ([], "--prompt is missing", 2),
    (["--prompt", "p", "--rounds", "-1"], "--rounds -1: must be a finite number, 0 or more", 2),
    (["--prompt", "p", "--share", "0"], "--share 0.0: must be a finite number above 0", 2),
    (["--prompt", "p", "--share", "nan"], "--share nan: must be a finite number above 0", 2),
    (["--prompt", "p", "--promt", "q"], "there is no --promt q; see python -m ", 2),
    (["--prompt", "p", "--device", "tpu"], "invalid choice: 'tpu'", 2),
    (["--prompt", "p", "--json", "/no/folder/f.json"], "/no/folder/", 2),
    (["--prompt", "fail"], "a run has failed", 1),
])
def test_a_mistake_ends_in_one_sentence(words, says, code, capsys):
    assert call(*words) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1


def test_ctrl_c_ends_it():
    assert call("--prompt", "stop") == 130


def test_help_shows_own_settings_before_common_ones(capsys):
    with pytest.raises(SystemExit):
        call("--help")
    printed = capsys.readouterr().out
    assert re.match(r"usage: python -m \S+ \[WORD ...\] \[--flag", printed)
    assert "\n\nA few settings.\n" in printed
    assert re.findall(r"^  --(\w+)", printed, re.M) == [
        "words", "prompt", "share", "rounds", "theta",
        "json", "device", "seed", "trust_remote_code"]


@pytest.mark.parametrize("module, settings, usage", [
    (page, page.PageSettings, "python -m companions.page RUN [RUN ...]"),
    (xstest, xstest.XSTestSettings, "python -m companions.xstest FILE [FILE ...] --out DIR"),
])
def test_a_command_that_needs_words_says_which(module, settings, usage, capsys):
    assert command.main(settings, module.run, []) == 2
    assert usage in capsys.readouterr().err


def test_a_command_knows_its_name(capsys):
    assert monitor.main(["score", "--k", "x"]) == 2
    assert "see python -m companions.monitor score --help" in capsys.readouterr().err
    assert command.main(supervised.SupervisedSettings, supervised.run, ["--model", "x"]) == 2
    assert capsys.readouterr().err == "error: --data is missing\n"


@pytest.mark.parametrize("name", [name if name == "compare" else exhaustive(name)
                                  for name in NAMES])
def test_it_runs_as_a_module(name):
    done = subprocess.run([sys.executable, "-m", f"companions.{name}", "--help"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m companions.{name} ")
