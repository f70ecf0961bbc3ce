"""The Hugging Face hub: the commit that a name stands for, its files, one sentence per problem.

A source is NAME or NAME@REVISION, for data with :CONFIG:SPLIT behind it. A run fixes the commit of
each source when it begins. Libraries only ever see a folder of the cache.
"""
import errno
import fnmatch
import glob
import hashlib
import re
import sys
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import transformers
from huggingface_hub import (
    constants,
    get_cached_repo_tree,
    get_session,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from plumbing.errors import UserError, blame, say
from plumbing.ranks import RANK

SECONDS = 5  # for the first answer
NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?")
DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # of a file, and its name in the cache
PAGE = {".gif", ".jpeg", ".jpg", ".mp4", ".pdf", ".png", ".svg", ".webp"}
WEIGHTS = {".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".safetensors"}


class Repository(NamedTuple):
    """A repository at one commit."""

    name: str
    kind: str               # "model" or "dataset"
    folder: Path            # in the cache; its name is the commit
    sizes: dict[str, int]   # bytes of each file

    def missing(self, files: list[str]) -> list[str]:
        """Those that are not in the cache."""
        return [file for file in dict.fromkeys(files) if not (self.folder / file).exists()]


COMMITS: dict[str, str] = {}               # of this run, by key_of
REPOSITORIES: dict[str, Repository] = {}   # that it has looked at, by key_of
ANNOUNCED: set[Path] = set()               # their folders, of those whose size is said


def fix(commits: str | None) -> None:
    """Begins a run: sources that `commits` names, as fixed() does, stay at those commits."""
    for known in (COMMITS, REPOSITORIES, ANNOUNCED):
        known.clear()
    COMMITS.update(pair.rsplit("=", 1) for pair in (commits or "").split())


def fixed() -> str | None:
    """The commits of all sources so far, as KEY=COMMIT KEY=COMMIT."""
    return " ".join("=".join(pair) for pair in COMMITS.items()) or None


def is_name(source: str) -> bool:
    """Whether a source can be a name on the hub, and nothing here has that name."""
    name = source.partition(":")[0]
    return bool(NAME.fullmatch(name)) and not Path(source).exists() and not Path(name).exists()


def key_of(source: str, kind: str) -> str:
    return "datasets/" * (kind == "dataset") + source.partition(":")[0]


# ---- Whether it answers

@cache
def check_hub() -> str | None:
    """Asks once whether the hub answers, because its libraries would ask for minutes. If it does
    not, they use their cache alone from now on. Returns why, or None if it answers."""
    address, answers = f"{constants.ENDPOINT}/api/models?limit=1", []

    def ask():
        try:
            status = get_session().head(address, timeout=SECONDS).status_code
            answers.append(f"it answers {status}" if is_trouble(status) else None)
        except Exception as error:  # any error means no answer
            answers.append(type(error).__name__)

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    thread = Thread(target=ask, daemon=True)  # because name resolution ignores the timeout
    thread.start()
    thread.join(SECONDS)
    [reason] = answers or [f"no answer within {SECONDS} seconds"]
    if reason:
        constants.HF_HUB_OFFLINE = True
        say(f"the hub does not answer ({reason}); only the cache is used")
    return reason


def is_trouble(status: int) -> bool:
    """Whether a hub that answers so has no answer now, but may have one later."""
    return status == 429 or status >= 500


# ---- Its files

def look(source: str, kind: str, label: str) -> Repository:
    """What a source stands for. The first look at it fixes its commit. Raises UserError that begins
    with the label."""
    key = key_of(source, kind)
    if key in REPOSITORIES:
        return REPOSITORIES[key]
    name, _, revision = source.partition(":")[0].partition("@")
    revision = COMMITS.get(key) or revision or "main"
    check_hub()
    with explained(label, "the hub's library fails"):  # this finds the commit and lists its files
        folder = Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=[]))
        REPOSITORIES[key] = Repository(name, kind, folder, sizes_in(folder, name, kind))
    COMMITS[key] = folder.name
    return REPOSITORIES[key]


def sizes_in(folder: Path, name: str, kind: str) -> dict[str, int]:
    """{file of a repository: bytes}, of the files that are here if there is no list of all."""
    with suppress(CachedRepoTreeNotFoundError):
        tree = get_cached_repo_tree(name, repo_type=kind, revision=folder.name)
        return {file.path: file.size for file in tree}
    if not folder.is_dir():  # the library has failed to write the list, and says nothing
        raise PermissionError(errno.EACCES, "Permission denied or no space")
    return {str(file.relative_to(folder)): file.stat().st_size
            for file in folder.rglob("*") if file.is_file()}


def announce(repository: Repository, files: list[str]) -> None:
    """Says once how many bytes of a repository there are to download."""
    name, kind, folder, sizes = repository
    if folder not in ANNOUNCED:
        size = sum(sizes[file] for file in repository.missing(files))
        what = f"{tqdm.format_sizeof(size)}B to download" if size else "in the cache"
        say(f"{kind} {name}: {what}, commit {folder.name}")
    ANNOUNCED.add(folder)


def fetch(repository: Repository, files: list[str], label: str) -> Path:
    """The repository's folder in the cache, with these files. Raises UserError."""
    name, kind, folder, _ = repository
    missing = [glob.escape(file) for file in repository.missing(files)]
    if missing:
        with explained(label, "the hub's library fails"), bars_on_a_terminal():
            snapshot_download(name, repo_type=kind, revision=folder.name, allow_patterns=missing)
    return folder


@contextmanager
def bars_on_a_terminal():
    if sys.stderr.isatty() and RANK == 0:
        enable_progress_bars()
    try:
        yield
    finally:
        disable_progress_bars()


def model_folder(source: str, label: str, with_weights: bool, will_have_weights: bool) -> Path:
    """A model's folder in the cache; without weights where they are not needed. Raises
    UserError."""
    repository = look(source, "model", label)
    announce(repository, model_files(repository.sizes, will_have_weights))
    return fetch(repository, model_files(repository.sizes, with_weights), label)


def model_files(sizes: dict[str, int], with_weights: bool) -> list[str]:
    """The files that transformers reads: it looks into no folder, prefers safetensors, and needs
    nothing that a model's page shows."""
    names = [name for name in sizes if "/" not in name and Path(name).suffix not in PAGE]
    small = [name for name in names if Path(name).suffix not in WEIGHTS]
    layouts = (fnmatch.filter(names, pattern)
               for pattern in ("model*.safetensors", "pytorch_model*.bin"))
    return small + next(filter(None, layouts), []) * with_weights


# ---- What goes wrong

@contextmanager
def explained(label: str, problem: str, path: Path | None = None):
    """Turns an error of the hub, or with a path one about the model or data set there, into a
    UserError that says what to do. Another error's sentence begins with `problem`."""
    with blame(f"{label}: {problem}"):
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            sentence = folder_problem(error, path) if path else hub_problem(error)
            if sentence:
                raise UserError(f"{label}: {sentence}") from None
            raise


def hub_problem(error: Exception) -> str | None:
    """A sentence for an error of the hub or of the way to it."""
    cause = error.__cause__
    if isinstance(error, LocalEntryNotFoundError) and not isinstance(cause, HfHubHTTPError):
        return ("no such folder here, the hub does not answer "
                f"({check_hub() or type(cause).__name__}), and the cache has not all of it; run "
                "again later, or fetch it where there is a network (hf download NAME; with "
                "--repo-type dataset for data) and give the folder")
    error = cause if isinstance(error, LocalEntryNotFoundError) else error
    if isinstance(error, GatedRepoError):
        return GATED[bool(get_token())]
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        again = f"the hub answers {status}; run again later, what is complete stays"
        return MISSING.get(type(error)) or (again if is_trouble(status) else REFUSED.get(status))
    if isinstance(error, HTTPError) or "Consistency check failed" in str(error):
        return f"the download broke off ({type(error).__name__}); run again, what is complete stays"
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return (f"the cache of the hub, {constants.HF_HUB_CACHE}, cannot be written "
                f"({error.strerror}); set HF_HOME to another folder, or make room")
    return None


UNWRITABLE = {errno.EACCES, errno.EEXIST, errno.ENOSPC, errno.ENOTDIR, errno.EROFS}
GATED = {  # by whether the user is logged in
    False: "is gated; ask for access on its page on the hub, then log in (hf auth login)",
    True: "is gated, and your account has no access; ask for it on its page on the hub",
}
MISSING = {
    RepositoryNotFoundError: "no such folder here and no such name on the hub; correct it or, if "
                             "it is private, log in (hf auth login)",
    RevisionNotFoundError: "has no such revision on the hub; correct what follows the @ or is in "
                           "--commits",
}
REFUSED = {  # by status
    401: "the hub refuses your token; log in again (hf auth login), or unset HF_TOKEN",
    403: "the hub refuses access; ask for it on its page, or use a token that may read it",
}


def folder_problem(error: Exception, path: Path) -> str | None:
    """A sentence for an error of a library that reads a file or a folder."""
    text = str(error)
    if "trust_remote_code" in text:
        return ("cannot be loaded without its custom code; read that code and, if you trust it, "
                "add --trust_remote_code")
    if "does not recognize this architecture" in text:
        return (f"cannot be loaded: transformers {transformers.__version__} does not know its "
                "model_type; a newer version may, or take another model")
    if "Dataset scripts" in text:
        return ("is read by a Python script of its own, which never runs; try NAME@refs/convert/"
                "parquet, where the hub keeps many such data sets as plain files")
    can_read = is_sentencepiece_available() and is_protobuf_available()
    if "tiktoken" in text and (path / "tokenizer.model").exists() and not can_read:
        return ("its tokenizer is a tokenizer.model; reading that takes two more packages (pip "
                "install sentencepiece protobuf)")
    damaged = next(filter(is_damaged, sorted(path.glob("*")) if path.is_dir() else [path]), None)
    if damaged:
        in_cache = DIGEST.fullmatch(damaged.resolve().name)
        remedy = f"delete {damaged.resolve()} and run again" if in_cache else "fetch it again"
        return f"could not be loaded, because {damaged.name} is damaged; {remedy}"
    return None


def is_damaged(file: Path) -> bool:
    """Whether a file is not what it should be. In the cache its name is a hash: git's of a small
    file, SHA-256 of a large one."""
    name = file.resolve().name
    if DIGEST.fullmatch(name) and file.is_file():
        content = hashlib.sha256()
        if len(name) == 40:
            content = hashlib.sha1(b"blob %d\0" % file.stat().st_size)
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                content.update(block)
        if content.hexdigest() != name:
            return True
    try:
        if file.suffix == ".safetensors":
            safe_open(file, "pt").__enter__()
    except (SafetensorError, OSError):
        return True
    return False
