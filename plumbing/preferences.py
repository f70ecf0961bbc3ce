"""Preference pairs: two answers to one prompt, with a label for the better or the safer one."""
from pathlib import Path
from typing import NamedTuple

from plumbing.chats import is_whole, require_turns, to_pair
from plumbing.data import (
    check_columns,
    check_turns,
    conversation_ids,
    has_pictures,
    require_sight,
    truth_of,
)
from plumbing.errors import blame, require, say
from plumbing.files import read_rows
from plumbing.pictures import with_picture


class Pair(NamedTuple):
    """Two answers to a prompt, as token ids of the whole conversations."""

    prompt: str
    better: list[int]         # the safer one, for a cost model
    worse: list[int]
    is_unsafe: tuple | None   # (whether better, whether worse is unsafe); None without labels


def load_preferences(source: str, flag: str, role: str, tokenizer,
                     max_tokens: int) -> tuple[list[str], list[Pair]]:
    """(prompts, pairs) of a file or hub data set in the columns of PKU-SafeRLHF, BeaverTails-V or
    HH-RLHF, with pictures if there is a column image. Raises UserError for other columns, and for a
    cost model's data without labels of safety."""
    rows = read_rows(source, flag)
    check_columns(rows, f"{flag} {source}")
    columns = set(rows.columns)
    better_id = "better_response_id" if role == "reward" else "safer_response_id"
    counted_id = "more_helpful_response_id" if role == "reward" else "safer_response_id"
    if {"prompt", "response_0", "response_1", better_id} <= columns:
        read = read_two_responses(better_id)
    elif {"question", "response_1", "response_2", counted_id} <= columns:
        read = read_counted_responses(counted_id)
    elif {"chosen", "rejected"} <= columns:
        read = read_chosen
    else:
        require(False, f"{flag} {source}: has the columns {', '.join(rows.columns)}, but "
                       f"neither prompt, response_0, response_1, {better_id} nor chosen, rejected")
    with blame(f"{flag} {source}: a row does not hold what its columns promise"):
        of_rows = [(number, row, read(row)) for number, row in enumerate(rows)]
    of_rows = [of_row for of_row in of_rows if of_row[2]]
    require(of_rows, f"{flag} {source}: in every row the two conversations differ before their "
                     "last answers, or have none")
    numbers, kept_rows, texts = zip(*of_rows)
    if has_pictures(rows, f"{flag} {source}"):
        folder = Path(source).expanduser().parent
        texts = [(with_picture(prompt, row["image"], folder), *rest)
                 for row, (prompt, *rest) in zip(kept_rows, texts)]
        require_sight(texts[0], tokenizer, f"{flag} {source}")
    require(role == "reward" or all(unsafe for *_, unsafe in texts),
            f"{flag} {source}: has no labels of safety (is_response_0_safe), or not in all rows; "
            "a cost model needs them")

    check_turns(((f"{flag} {source}: row {number}", prompt)
                 for number, (prompt, *_) in zip(numbers, texts)), tokenizer)
    prompts, answers = zip(*((prompt, answer) for prompt, *two, _ in texts for answer in two))
    ids = iter(conversation_ids(tokenizer, prompts, answers, [True] * len(answers)))
    pairs = [Pair(prompt, next(ids), next(ids), unsafe) for prompt, _, _, unsafe in texts]
    kept = [pair for pair in pairs if max(len(pair.better), len(pair.worse)) <= max_tokens]
    require(kept, f"{flag} {source}: every pair is longer than --max_tokens {max_tokens}")
    say(f"{flag} {source}: {len(kept):,} pairs; {len(pairs) - len(kept):,} longer than "
        f"--max_tokens and {len(rows) - len(pairs):,} of different conversations left out")
    return [pair.prompt for pair in kept], kept


def unsafe_of(row: dict, ids: tuple[int, int]) -> tuple[bool, bool] | None:
    """Whether each response is labelled unsafe; None where a label is missing."""
    labels = [row.get(f"is_response_{i}_safe") for i in ids]
    return None if None in labels else tuple(not truth_of(label) for label in labels)


def read_two_responses(better_id: str):
    """PKU-SafeRLHF: row -> (prompt, better, worse, whether each is unsafe)."""
    def read(row: dict) -> tuple:
        better = int(row[better_id])
        ids = better, 1 - better
        prompt, _ = to_pair(row["prompt"])
        return prompt, *(row[f"response_{i}"] for i in ids), unsafe_of(row, ids)

    return read


def read_counted_responses(better_id: str):
    """BeaverTails-V, which counts from 1 and writes yes or no; as above."""
    def read(row: dict) -> tuple:
        better = int(row[better_id])
        ids = better, 3 - better
        return row["question"], *(row[f"response_{i}"] for i in ids), unsafe_of(row, ids)

    return read


def read_chosen(row: dict) -> tuple | None:
    """HH-RLHF: two conversations with different last answers. TRL: the prompt may stand apart. None
    if more than the answers differs, or an answer is missing."""
    pairs = []
    for chat in (row["chosen"], row["rejected"]):
        if is_whole(chat):
            pairs.append(to_pair(chat))
        elif row.get("prompt"):
            pairs.append(to_pair(row["prompt"], chat))
        else:
            require_turns(chat)
            return None
    (prompt, better), (other, worse) = pairs
    return (prompt, better, worse, None) if prompt == other else None
