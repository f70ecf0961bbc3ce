"""How the project speaks to its user: one sentence for what is wrong, plain lines for the rest."""
import difflib
import os
import re
import signal
import sys
import traceback
from contextlib import contextmanager, suppress

from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from plumbing.ranks import RANK, RANKS, from_all_ranks, has_lost_a_rank


class UserError(Exception):
    """Something in the user's input that one sentence can mend: main() prints the sentence and
    returns the code."""

    def __init__(self, sentence: str, code: int = 2, on_all_ranks: bool = False):
        super().__init__(sentence)
        self.code = code
        self.on_all_ranks = on_all_ranks  # raised by all in the same place


class TimeUp(BaseException):
    """No Exception, so that a function which catches those cannot go on hanging."""


def require(condition, sentence: str) -> None:
    """Raises UserError unless the condition holds."""
    if not condition:
        raise UserError(sentence)


@contextmanager
def blame(what: str, file: str = ""):
    """Turns whatever a library or a user's code raises inside into one sentence, with the line of
    the user's file where there is one. That another rank is lost stays what it is."""
    try:
        yield
    except (UserError, KeyboardInterrupt, TimeUp):
        raise
    except BaseException as error:  # a user's sys.exit() too, and a panic in Rust
        first = first_failure(error)
        if has_lost_a_rank(first):
            raise first from None
        raise UserError(f"{what} ({reason(first, file)})") from None


@contextmanager
def failing_together():
    """Where all ranks come: a UserError that some raise inside is raised by all, who can then still
    save together."""
    failed = {}
    try:
        yield
    except UserError as error:
        if RANKS == 1:
            raise
        failed = {RANK: str(error)}
    failed = from_all_ranks(failed)
    if failed:
        rank, sentence = min(failed.items())
        raise UserError(f"{sentence}, on rank {rank}", on_all_ranks=True)


def first_failure(error: BaseException) -> BaseException:
    """What is behind an exception that says no more than on which rank."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return error


def reason(error: BaseException, file: str) -> str:
    """An exception's type and first line, and the line of the file where it was raised."""
    first_line = str(error.__cause__ or error).strip().partition("\n")[0]
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == file:
            place = f", line {frame.lineno}"  # the last such frame is the closest
    return f"{type(error).__name__}: {first_line}{place}"


def say(text: str) -> None:
    """Prints on rank 0, above a progress bar if there is one."""
    if RANK == 0:
        tqdm.write(printable(text), file=sys.stdout)


class LastingStream:
    """Standard output or error that outlives its reader: what comes after `| head` has seen enough
    goes nowhere, for a run is there for its files."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.go_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.go_nowhere()

    def go_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())  # what is still in a buffer, too
        os.close(nowhere)


def outlive_readers() -> None:
    """For a script's first line: a closed pipe ends nothing and says nothing."""
    sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)


def printable(text: str) -> str:
    """Text for a terminal: what would steer it, escape codes or a reversed reading order, is
    spelled out. Lines stay lines, and joined emoji whole."""
    return "".join(
        character if character.isprintable() or character in "\n\u200d" else ascii(character)[1:-1]
        for character in text
    )


def did_you_mean(words, known) -> str:
    """" (did you mean --steps?)" for words that resemble known settings, else ""."""
    names = [re.match("[^=/:]*", word.lstrip("-"))[0] for word in words]
    near = []
    for name in names:
        match = difflib.get_close_matches(name, known, 1)
        if name not in known and match and match[0] not in near:
            near += match
    return f" (did you mean {', '.join(f'--{name}' for name in near)}?)" if near else ""


@contextmanager
def ctrl_c_waits():
    """Inside it a first Ctrl-C is noted in the list that it gives, for whoever looks there after a
    whole step; a second one ends the process at once."""
    pressed = []

    def note(*_):
        pressed.append(True)
        with suppress(OSError):  # whoever read it may be gone
            if RANK == 0:
                os.write(2, b"\nCtrl-C: this step will be finished and saved; a second Ctrl-C ends "
                            b"at once, with nothing saved\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, note)
    yield pressed
    # After an error it stays as it is, so that nobody breaks off the checkpoint that follows.
    signal.signal(signal.SIGINT, signal.default_int_handler)
