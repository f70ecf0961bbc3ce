"""Users' own score functions and judges, FILE.py:function. An error names the line in FILE.py."""
import ast
import hashlib
import runpy
import sys
from pathlib import Path

from plumbing.data import truth_of
from plumbing.errors import blame, require


def is_function(source: str) -> bool:
    """Whether the source of scores is FILE.py:function."""
    return ".py:" in source


def check_function(source: str, flag: str) -> None:
    """Raises UserError if FILE.py is missing or is not Python. It is parsed, not run."""
    path, _, name = source.rpartition(":")
    require(path and name, f"{flag} {source}: should be FILE.py:function")
    with blame(f"{flag} {source}: cannot be loaded"):
        ast.parse(Path(path).read_bytes(), path)


def hashes_of_functions(config) -> dict[str, str]:
    """{flag: a hash of FILE.py} of the score functions and the judge that a run uses."""
    given = {flag: getattr(config, flag) for flag in ("reward_model", "cost_model", "judge")}
    return {flag: hashlib.sha256(Path(source.rpartition(":")[0]).read_bytes()).hexdigest()
            for flag, source in given.items() if source and is_function(source)}


def load_function(source: str, flag: str):
    """FILE.py:name as a function (prompts, responses) -> one result per response. Loading and
    calling it raise UserError for every error of the user's code; calling it also for a wrong
    number of results."""
    path, _, name = source.rpartition(":")
    sys.path.append(str(Path(path).resolve().parent))  # it may import modules beside it
    with blame(f"{flag} {source}: cannot be loaded", path):
        module = runpy.run_path(path)
    require(name in module, f"{flag} {source}: {path} has no function {name}")

    def checked(prompts: list[str], responses: list[str]) -> list:
        with blame(f"{flag} {source}: failed", path):
            results = list(module[name](prompts, responses))
        require(len(results) == len(responses),
                f"{flag} {source}: returned {len(results)} results "
                f"for {len(responses)} responses")
        return results

    return checked


def verdicts_of(prompts: list[str], responses: list[str], judge, config) -> list[dict | None]:
    """A verdict per response, or None per response if there is no judge. Raises UserError if the
    judge returns anything else."""
    if not judge:
        return [None] * len(prompts)
    judged = judge(prompts, responses)
    names = ("safe", "refused", "harmful_prompt")
    with blame(f"--judge {config.judge}: must return dicts with the bools safe, refused and "
               "harmful_prompt"):
        return [{name: truth_of(verdict[name]) for name in names} for verdict in judged]
