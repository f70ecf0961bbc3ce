"""Rows of the files and hub data sets that users bring. Files are read as they are on disk: no
library's cache, which might hold an older file, stands between.
"""
import csv
import gzip
import io
import json
import os
import re
from pathlib import Path

import datasets
import pyarrow.parquet

from plumbing.errors import blame, require
from plumbing.hub import check_hub
from plumbing.pictures import undecoded

LISTS = {"instructions", "inputs", "tags"}  # columns of a file that is one json object of lists
POINTER = b"version https://git-lfs"
SPACE = re.compile(r"\s*")
BOOLS = {"True": True, "true": True, "TRUE": True, "False": False, "false": False, "FALSE": False}


class Rows(list):
    """Rows as dicts that all have the same `columns`. An empty cell is None."""

    def __init__(self, rows: list[dict]):
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        super().__init__({name: row.get(name) for name in self.columns} for row in rows)


def read_rows(source: str, flag: str) -> Rows:
    """A local file or a hub data set, with an optional :SPLIT. Raises UserError."""
    name, _, split = source.partition(":")
    if Path(source).exists():
        name, split = source, ""
    path = Path(name).expanduser()
    reader = READERS.get(Path(path.name.removesuffix(".gz")).suffix)

    if path.exists() or reader:
        require(path.exists(), f"{flag} {source}: no such file")
        require(path.is_file(), f"{flag} {source}: is a folder, not a file")
        require(reader, f"{flag} {source}: cannot tell its format, "
                        f"its ending is none of {', '.join(READERS)} (.gz)")
        require(path.stat().st_size, f"{flag} {source}: the file is empty")
        check_pointer(path, f"{flag} {source}")
        with (
            blame(f"{flag} {source}: cannot be read"),
            (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file,
        ):
            rows = Rows(reader(file))
    else:
        rows = Rows(read_hub(name, split, f"{flag} {source}"))

    require(rows, f"{flag} {source}: has no rows")
    if LISTS >= set(rows.columns) and isinstance(rows[0].get("instructions"), list):
        with blame(f"{flag} {source}: cannot be read"):
            return Rows([each for row in rows for each in unfolded(row)])
    return rows


def read_hub(name: str, split: str, source: str) -> list[dict]:
    check_hub()
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    is_usable = there.is_dir() and os.access(there, os.W_OK)
    problem = f"{source}: cannot be read"
    if not is_usable:
        problem = (f"the cache of data sets, {cache}, cannot be written; "
                   "set HF_DATASETS_CACHE to another folder")
    with blame(problem):
        return undecoded(datasets.load_dataset(path=name, split=split or "train")).to_list()


def check_pointer(path: Path, source: str) -> None:
    """Raises UserError for a Git LFS pointer, which stands where a file was not fetched; in a
    folder for the first."""
    for file in filter(Path.is_file, sorted(path.iterdir()) if path.is_dir() else [path]):
        with file.open("rb") as opened:
            require(opened.read(len(POINTER)) != POINTER,
                    f"{source}: {file.name} is a Git LFS pointer, not the file itself; "
                    "fetch the file (git lfs pull)")


def unfolded(lists: dict) -> list[dict]:
    """safety-tuned-llamas: {"instructions": [...], "inputs": [...], "tags": [...]}, as a row per
    instruction. The other lists may be empty, or tell something else."""
    instructions = lists["instructions"]
    columns = {"instruction": instructions}
    for name, column in (("inputs", "input"), ("tags", "tags")):
        values = lists.get(name) or []
        matches = len(values) == len(instructions)
        columns[column] = values if matches else [None] * len(instructions)
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


# ---- Formats: an open file of bytes -> its rows

def text_of(file, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, "utf-8-sig", newline=newline)


def read_json(file) -> list[dict]:
    """Rows one after the other, or one array of them. A string is a row with the column text."""
    text = text_of(file).read()
    decode, at, values = json.JSONDecoder().raw_decode, SPACE.match(text).end(), []
    while at < len(text):
        value, at = decode(text, at)
        values.append(value)
        at = SPACE.match(text, at).end()
    rows = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("its rows are not objects")
    return rows


def read_csv(file) -> list[dict]:
    """Cells are text, except empty ones and columns of True and False."""
    csv.field_size_limit(2**31 - 1)
    rows = list(csv.DictReader(text_of(file, ""), strict=True))
    if any(None in row for row in rows):
        raise ValueError("a row has more cells than there are columns")
    of_bools = {name for row in rows[:1] for name in row
                if BOOLS.keys() >= {each[name] for each in rows}}
    return [{name: BOOLS[cell] if name in of_bools else cell or None for name, cell in row.items()}
            for row in rows]


def read_parquet(file) -> list[dict]:
    return pyarrow.parquet.read_table(io.BytesIO(file.read())).to_pylist()


def read_txt(file) -> list[dict]:
    return [{"text": line.removesuffix("\n")} for line in text_of(file)]


READERS = {".json": read_json, ".jsonl": read_json, ".csv": read_csv, ".parquet": read_parquet,
           ".txt": read_txt}
