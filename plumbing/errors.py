"""What a user reads in the terminal: one sentence for an error, plain lines for the rest."""
import os
import signal
import sys
import traceback
from contextlib import contextmanager, suppress

import torch
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from plumbing.ranks import RANK, RANKS, from_all_ranks, has_lost_a_rank


class UserError(Exception):
    """A mistake in the user's input. main() prints the sentence and returns the exit code."""

    def __init__(self, sentence: str, code: int = 2, on_all_ranks: bool = False):
        super().__init__(sentence)
        self.code = code
        self.on_all_ranks = on_all_ranks  # all ranks raised it in the same place


def require(condition, sentence: str) -> None:
    """Raises UserError unless the condition holds."""
    if not condition:
        raise UserError(sentence)


@contextmanager
def blame(what: str, file: str = ""):
    """Turns an error of a library or of a user's code into a UserError that begins with `what`. It
    names the line if the error came from `file`. An error about a lost rank passes unchanged."""
    try:
        yield
    except (UserError, KeyboardInterrupt, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # a user's sys.exit() and a panic in Rust too
        first = first_failure(error)
        if has_lost_a_rank(first):
            raise first from None
        raise UserError(f"{what} ({reason(first, file)})") from None


@contextmanager
def failing_together():
    """All ranks run the body. If one raises a UserError, all raise it, so that they can still save
    a checkpoint together."""
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
    """The error inside an exception that only says which rank failed."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return error


def reason(error: BaseException, file: str) -> str:
    """An exception's type and first line, and the line of the file where it was raised."""
    first_line = str(error.__cause__ or error).strip().partition("\n")[0]
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == file:
            place = f", line {frame.lineno}"  # the last such frame raised it
    return f"{type(error).__name__}: {first_line}{place}"


def say(text: str) -> None:
    """Prints on rank 0, above a progress bar if there is one. Neither a closed pipe nor a terminal
    without a character ends the run."""
    if RANK == 0:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        shown = printable(text).encode(encoding, "backslashreplace").decode(encoding)
        with suppress(BrokenPipeError):
            tqdm.write(shown, file=sys.stdout)


def printable(text: str) -> str:
    """Text that is safe to print: characters that would control the terminal, such as escape codes
    or a reversed reading order, are spelled out. Line breaks and joined emoji stay."""
    return "".join(
        character if character.isprintable() or character in "\n\u200d" else ascii(character)[1:-1]
        for character in text
    )


@contextmanager
def ctrl_c_waits():
    """Yields a list that the first Ctrl-C adds to, so that the step can finish. A second Ctrl-C
    ends the process at once."""
    pressed = []

    def note(*_):
        pressed.append(True)
        with suppress(OSError):  # a closed pipe
            if RANK == 0:
                os.write(2, b"\nCtrl-C: the run finishes this step and saves it; a second Ctrl-C "
                            b"ends it at once and saves nothing\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGINT, note)
    yield pressed
    # After an error the handler stays, so that Ctrl-C cannot interrupt the checkpoint that follows.
    signal.signal(signal.SIGINT, signal.default_int_handler)
