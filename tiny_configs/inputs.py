"""What users bring, prompts, pairs and functions of their own, and the one sentence they get when something is wrong with it."""
import ast
import difflib
import glob
import re
import runpy
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import datasets
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from tiny_configs.compare import printable
from tiny_configs.ranks import RANK


class UserError(Exception):
    """Something in the user's input that one sentence can mend: main() prints the sentence and returns the code."""

    def __init__(self, sentence: str, code: int = 2):
        super().__init__(sentence)
        self.code = code


def require(condition, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


class TimeUp(BaseException):
    """No Exception, so that a function which catches those cannot go on hanging."""


@contextmanager
def blame(what: str, file: str = ""):
    """Turns whatever a library or a user's code raises inside into one sentence, with the line of the user's file where there is one."""
    try:
        yield
    except BaseException as error:  # a user's sys.exit() too, and a panic in Rust
        if isinstance(error, (UserError, KeyboardInterrupt, TimeUp)):
            raise
        if isinstance(error, CheckpointException):  # which says no more than on which rank
            error, _ = next(iter(error.failures.values()))
        line = next((f", line {frame.lineno}" for frame in reversed(traceback.extract_tb(error.__traceback__)) if frame.filename == file), "")
        raise UserError(f"{what} ({type(error).__name__}: {str(error.__cause__ or error).strip().partition(chr(10))[0]}{line})") from None


def say(text: str) -> None:
    if RANK == 0:
        tqdm.write(printable(text), file=sys.stdout)


def did_you_mean(words, known) -> str:
    """" (did you mean --steps?)" for a word that resembles a known setting."""
    names = [re.match("[^=/:]*", word.lstrip("-"))[0] for word in words]
    near = {match: None for name in names for match in difflib.get_close_matches(name, known, 1) if name not in known}
    return f" (did you mean {', '.join(f'--{name}' for name in near)}?)" if near else ""


# A prompt is a string: what the user says, or, if there were turns before, a transcript "\n\nHuman: ...\n\nAssistant: ...\n\nHuman: ...".
TURN = re.compile(r"\n\n(Human|Assistant|System):[ ]?")
ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}


def to_messages(prompt: str) -> list[dict]:
    """A prompt as a list of {"role": ..., "content": ...}."""
    before, *turns = TURN.split(prompt)
    if before.strip() or not turns:
        return [{"role": "user", "content": prompt}]
    return [{"role": ROLES[name], "content": content.strip()} for name, content in zip(turns[::2], turns[1::2])]


def to_pair(chat: str | list[dict], answer: str | None = None) -> tuple[str, str | None]:
    """Plain text, a transcript or a list of messages as (prompt, answer); a last turn of the assistant's is the answer."""
    messages = list(chat) if isinstance(chat, list) else to_messages(chat)
    answer = messages.pop()["content"] or answer if messages[-1]["role"] == "assistant" else answer
    if [message["role"] for message in messages] == ["user"]:
        return messages[0]["content"], answer
    return "".join(f"\n\n{name}: {message['content']}" for message in messages for name, role in ROLES.items() if role == message["role"]), answer


FORMATS = {  # columns -> (prompt, answer) of a row; the first whose columns a data set has reads it
    ("prompt", "response_0", "response_1", "better_response_id"): lambda row: to_pair(row["prompt"], row[f"response_{int(row['better_response_id'])}"]),
    ("prompt", "response"): lambda row: to_pair(row["prompt"], row["response"]),
    ("prompt", "completion"): lambda row: to_pair(row["prompt"], row["completion"]),
    ("instruction", "output"): lambda row: to_pair("\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]),
    ("chosen", "rejected"): lambda row: to_pair(row.get("prompt") or row["chosen"]),
} | {(column,): lambda row, column=column: to_pair(row[column]) for column in ("prompt", "messages", "instruction", "text")}
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def read_rows(source: str, flag: str) -> datasets.Dataset:
    """A local file or a hub data set, with an optional :SPLIT. Raises UserError."""
    name, _, split = (source, "", "") if Path(source).exists() else source.partition(":")
    path = Path(name).expanduser()
    reader = READERS.get(Path(path.name.removesuffix(".gz")).suffix)
    where = {"path": name, "split": split or "train"}
    if path.exists() or reader:
        require(path.exists(), f"{flag} {source}: no such file")
        require(path.is_file(), f"{flag} {source}: is a folder, not a file")
        require(reader, f"{flag} {source}: cannot tell its format, its ending is none of {', '.join(READERS)} (.gz)")
        require(path.stat().st_size, f"{flag} {source}: the file is empty")
        where = {"path": reader, "data_files": glob.escape(str(path)), "split": "train"}
    with blame(f"{flag} {source}: cannot be read"):
        rows = datasets.load_dataset(**where)
        if rows.column_names == ["instructions"]:  # {"instructions": [...]}: one row that holds them all
            return datasets.Dataset.from_dict({"prompt": [text for row in rows["instructions"] for text in row]})
    return rows


def load_pairs(source: str, prompt_column: str | None = None, flag: str = "--dataset") -> list[tuple[str, str | None]]:
    """(prompt, answer or None) of every row that has a prompt. Raises UserError for a missing column, an unknown format, or no prompt."""
    rows, pairs = read_rows(source, flag), []
    formats = {(prompt_column,): lambda row: to_pair(row[prompt_column])} if prompt_column else FORMATS
    read = next((reader for columns, reader in formats.items() if set(columns) <= set(rows.column_names)), None)
    require(read, f"{flag} {source}: has the columns {', '.join(rows.column_names)}, but not {prompt_column or 'those of any known format'}; "
                  "--prompt_column names the one that holds the prompt")
    with blame(f"{flag} {source}: cannot be read"):  # text is decoded here
        rows = rows.to_list()
    for number, row in enumerate(rows):
        try:
            prompt, answer = read(row)
            pairs += [(prompt, answer and answer + "")] if prompt.strip() else []
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # a row with a hole is left out; else it is another format
            require(None in row.values(), f"{flag} {source}: row {number} does not hold what its columns promise ({', '.join(row)})")
    require(pairs, f"{flag} {source}: none of its {len(rows)} rows has a prompt")
    say(f"{flag} {source}: {len(rows):,} rows read, {len(rows) - len(pairs):,} without a prompt dropped")
    return pairs


@contextmanager
def time_limit(seconds: float, sentence: str):
    """Raises UserError if what is inside takes longer. Once a second, should a library's code in between have swallowed it."""
    def stop(*_):
        raise TimeUp
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, 1e9), 1.0)
    try:
        yield
    except TimeUp:
        raise UserError(sentence) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def check_function(source: str, flag: str) -> None:
    """Raises UserError if it is not FILE.py:function, or FILE.py is not there or no Python. Nothing of it is run."""
    path, _, name = source.rpartition(":")
    require(path and name, f"{flag} {source}: should be FILE.py:function")
    with blame(f"{flag} {source}: cannot be loaded"):
        ast.parse(Path(path).read_bytes(), path)


def load_function(source: str, flag: str, seconds: float):
    """FILE.py:name as a function (prompts, responses) -> one result per response. It, and this, raise UserError."""
    path, _, name = source.rpartition(":")
    sys.path.append(str(Path(path).resolve().parent))  # for modules beside it
    with blame(f"{flag} {source}: cannot be loaded", path):
        module = runpy.run_path(path)
    require(name in module, f"{flag} {source}: {path} has no function {name}")

    def checked(prompts: list[str], responses: list[str]) -> list:
        with time_limit(seconds, f"{flag} {source}: no answer within --scorer_timeout {seconds:g} seconds"), blame(f"{flag} {source}: failed", path):
            results = list(module[name](prompts, responses))
        require(len(results) == len(responses), f"{flag} {source}: returned {len(results)} results for {len(responses)} responses")
        return results

    return checked
