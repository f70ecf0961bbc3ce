"""A user's own score functions and judges: FILE.py:function, checked, timed and blamed by line."""
import ast
import runpy
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from plumbing.errors import TimeUp, UserError, blame, require


def is_function(source: str) -> bool:
    """Whether a score model's name means FILE.py:function."""
    return ".py:" in source


def check_function(source: str, flag: str) -> None:
    """Raises UserError if it is not FILE.py:function, or FILE.py is not there or no Python.
    Nothing of it is run."""
    path, _, name = source.rpartition(":")
    require(path and name, f"{flag} {source}: should be FILE.py:function")
    with blame(f"{flag} {source}: cannot be loaded"):
        ast.parse(Path(path).read_bytes(), path)


def load_function(source: str, flag: str, seconds: float = 600.0):
    """FILE.py:name as a function (prompts, responses) -> one result per response.

    Raises UserError, and so does the function: for whatever the user's code raises, for another
    number of results than there are responses, and after so many seconds.
    """
    path, _, name = source.rpartition(":")
    sys.path.append(str(Path(path).resolve().parent))  # for modules beside it
    with blame(f"{flag} {source}: cannot be loaded", path):
        module = runpy.run_path(path)
    require(name in module, f"{flag} {source}: {path} has no function {name}")
    too_late = f"{flag} {source}: no answer within --scorer_timeout {seconds:g} seconds"

    def checked(prompts: list[str], responses: list[str]) -> list:
        with time_limit(seconds, too_late), blame(f"{flag} {source}: failed", path):
            results = list(module[name](prompts, responses))
        require(len(results) == len(responses),
                f"{flag} {source}: returned {len(results)} results "
                f"for {len(responses)} responses")
        return results

    return checked


def verdicts_of(prompts: list[str], responses: list[str], judge, config) -> list[dict | None]:
    """A verdict per response, None without a judge. Raises UserError for something else than
    verdicts."""
    if not judge:
        return [None] * len(prompts)
    judged = judge(prompts, responses)
    names = ("safe", "refused", "harmful_prompt")
    with blame(f"--judge {config.judge}: must return dicts with the bools safe, refused and "
               "harmful_prompt"):
        return [{name: bool(verdict[name]) for name in names} for verdict in judged]


@contextmanager
def time_limit(seconds: float, sentence: str):
    """Raises UserError if what is inside takes longer."""
    def stop(*_):
        raise TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    # Once a second from then on, should a library's code in between have swallowed the first.
    signal.setitimer(signal.ITIMER_REAL, min(seconds, 1e9), 1.0)
    try:
        yield
    except TimeUp:
        raise UserError(sentence) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
