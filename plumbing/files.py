"""Rows of the files and hub data sets that users bring. Files are read as they are on disk: no
library's cache, which might hold an older file, stands between.
"""
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import tempfile
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow.parquet
from datasets.data_files import DataFilesPatternsDict
from datasets.load import dataset_module_factory

from plumbing import hub
from plumbing.errors import blame, require

LISTS = {"instructions", "inputs", "tags"}  # columns of a file that is one json object of lists
CARDS = (  # files that say what is in a data set
    datasets.config.REPOCARD_FILENAME,
    datasets.config.REPOYAML_FILENAME,
    datasets.config.DATASETDICT_INFOS_FILENAME,
)
POINTER = b"version https://git-lfs"
SPACE = re.compile(r"\s*")


class Rows(list):
    """Rows as dicts that all have the same `columns`. An empty cell is None. `folder` is where
    relative paths in them begin, and `part` says what of a data set they are."""

    def __init__(self, rows: list[dict], folder: Path, part: str = ""):
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        self.folder, self.part = folder, part
        super().__init__({name: row.get(name) for name in self.columns} for row in rows)


def read_rows(source: str, flag: str) -> Rows:
    """The rows of a file, of a downloaded data set's folder, or of a data set on the hub; a
    :CONFIG:SPLIT may follow the last two. Raises UserError."""
    label, part = f"{flag} {source}", ""
    files = [path_of(source)]
    if is_data_set(source):
        found = find_part(source, flag)
        part = f" ({found.what})"
        files = found.fetch(label)
    rows = Rows([row for file in files for row in read_file(file, label)], files[0].parent, part)
    require(rows, f"{label}: has no rows")
    if LISTS >= set(rows.columns) and isinstance(rows[0].get("instructions"), list):
        with blame(f"{label}: cannot be read"):
            return Rows([each for row in rows for each in unfolded(row)], rows.folder, part)
    return rows


def path_of(source: str) -> Path:
    """A source's path, without a :CONFIG:SPLIT, which a file does not have."""
    whole, before = Path(source).expanduser(), Path(source.partition(":")[0]).expanduser()
    return whole if whole.exists() or before.is_file() else before


def is_data_set(source: str) -> bool:
    """Whether a source is a folder or a name on the hub, not a file, which may be missing."""
    path = path_of(source)
    return path.is_dir() or (not reader_for(path) and hub.is_name(source))


def reader_for(path: Path):
    """The function that reads files of such a name; None if their format is unknown."""
    name = path.stem if path.suffix in OPENERS else path.name
    return READERS.get(Path(name).suffix)


def read_file(path: Path, source: str) -> list[dict]:
    name = "" if source.endswith(path.name) else f"{path.name}: "
    reader = reader_for(path)
    require(path.is_file(), f"{source}: no such file")
    require(reader, f"{source}: {name}cannot tell its format, its ending is none of "
                    f"{', '.join(READERS)} ({', '.join(OPENERS)})")
    require(path.stat().st_size, f"{source}: {name}the file is empty")
    check_pointer(path, source)
    with (
        hub.explained(source, f"{name}cannot be read", path),
        OPENERS.get(path.suffix, open)(path, "rb") as file,
    ):
        return reader(file)


# ---- Data sets of several files

class Part(NamedTuple):
    """One split of a data set: what it is, and its files, in a folder or a repository of the
    hub."""

    what: str
    files: list[str]
    place: Path | hub.Repository

    def fetch(self, label: str) -> list[Path]:
        folder = self.place
        if isinstance(folder, hub.Repository):
            hub.announce(folder, self.files)
            folder = hub.fetch(folder, self.files, label)
        return [folder / file for file in self.files]


def find_part(source: str, flag: str) -> Part:
    """What NAME, NAME:SPLIT, NAME:CONFIG or NAME:CONFIG:SPLIT stands for. Raises UserError unless
    it is one split of one configuration."""
    label, path = f"{flag} {source}", path_of(source)
    words = [] if Path(source).expanduser().exists() else source.split(":")[1:]
    if path.is_dir():
        return chosen_part(words, path, path, label)
    repository = hub.look(source, "dataset", label)
    cards = [name for name in CARDS if name in repository.sizes]
    folder = hub.fetch(repository, cards, label)
    with tempfile.TemporaryDirectory() as temporary:  # holds the repository, with empty files
        shell = Path(temporary, Path(repository.name).name)
        for name in repository.sizes:
            (shell / name).parent.mkdir(parents=True, exist_ok=True)
            (shell / name).touch()
        for name in cards:
            shutil.copyfile(folder / name, shell / name)
        return chosen_part(words, shell, repository, label)


def chosen_part(words: list[str], folder: Path, place, label: str) -> Part:
    """The part that some words, [CONFIG, SPLIT] or fewer, name of the data set in a folder."""
    folder = folder.resolve()
    with hub.explained(label, "cannot be read", folder):
        parameters = dataset_module_factory(str(folder)).builder_configs_parameters
    configs = {config.name: config for config in parameters.builder_configs}
    default = parameters.default_config_name or (next(iter(configs)) if len(configs) == 1 else None)

    def names_of(config: str, split: str) -> list[list[str]]:
        """The words that stand for a split of a configuration."""
        is_usual = split == "train" or len(configs[config].data_files) == 1
        names = [[config, split]] + [[config]] * is_usual
        return names + ([[split]] + [[]] * is_usual) * (config == default)

    parts = [(config, str(split)) for config in configs for split in configs[config].data_files]
    found = [part for part in parts if words in names_of(*part)]
    listed = ", ".join(map(":".join, parts[:12])) + ", ..." * (len(parts) > 12)
    require(len(found) == 1,
            f"{label}: name one of its parts, as NAME:CONFIG:SPLIT; it has {listed}")
    [(config, split)] = found

    files = configs[config].data_files
    with blame(f"{label}: cannot be read"):
        if isinstance(files, DataFilesPatternsDict):
            files = files.resolve(str(folder / (configs[config].data_dir or "")))
    names = [str(Path(file).relative_to(folder)) for key in files if key == split
             for file in files[key]]
    count = "1 file" if len(names) == 1 else f"{len(names)} files"
    return Part(f"configuration {config}, split {split}, {count}", names, place)


def check_pointer(path: Path, source: str) -> None:
    """Raises UserError for a Git LFS pointer, which stands where a file was not fetched; in a
    model's folder for the first of the files that are read."""
    files = [path]
    if path.is_dir():
        sizes = {file.name: file.stat().st_size for file in sorted(path.iterdir())
                 if file.is_file()}
        files = [path / name for name in hub.model_files(sizes, True)]
    for file in files:
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
    """Cells are text, except empty ones."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(text_of(file, ""), strict=True)  # refuses odd quotation marks
    try:
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    names = [name.strip() for row in rows[:1] for name in row]
    if any(len(row) > len(names) for row in rows):
        raise ValueError("a row has more cells than there are columns")
    return [{name: cell or None for name, cell in zip_longest(names, row)} for row in rows[1:]]


def read_parquet(file) -> list[dict]:
    return pyarrow.parquet.read_table(io.BytesIO(file.read())).to_pylist()


def read_txt(file) -> list[dict]:
    return [{"text": line.removesuffix("\n")} for line in text_of(file)]


OPENERS = {".gz": gzip.open, ".xz": lzma.open}
READERS = {".json": read_json, ".jsonl": read_json, ".csv": read_csv, ".parquet": read_parquet,
           ".txt": read_txt}
