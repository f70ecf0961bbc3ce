"""A hub on the loopback: repositories in memory, with commits, gates, tokens and faults. Large
files come by a redirect, as from the real hub."""
import hashlib
import json
import re
import threading
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LARGE = (".safetensors", ".bin", ".parquet", ".gz", ".xz", ".model")
TOKEN = "hf_allowed"  # of the account that may read gated repositories


class SmallHub:
    """`log` holds all requests, as METHOD PATH. `faults` are (pattern, status or slice): requests
    that match a pattern are answered with a status, or with a slice of their bytes."""

    def __init__(self):
        self.files, self.refs = {}, {}  # {(repository, commit): {name: bytes}}, {..: {ref: commit}}
        self.gated, self.faults, self.log = set(), [], []

    def push(self, repository: str, files: dict[str, bytes] | Path, ref: str = "main") -> str:
        """Makes a commit. A data set's repository is named datasets/OWNER/NAME."""
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes()
                     for path in files.rglob("*") if path.is_file()}
        files = {name: content if isinstance(content, bytes) else content.encode()
                 for name, content in files.items()}
        listing = repr(sorted((name, oid(content)) for name, content in files.items()))
        commit = hashlib.sha1(listing.encode()).hexdigest()
        self.files[repository, commit] = files
        self.refs.setdefault(repository, {})[ref] = commit
        return commit

    @contextmanager
    def serving(self):
        """Gives the address."""
        handler = type("Handler", (Handler,), {"hub": self})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def described(name: str, content: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(content), "oid": oid(content)}
    if name.endswith(LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 9}
    return entry


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms
    hub: SmallHub

    def log_message(self, *_):
        pass

    def answer(self, status: int, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            kept = [kept for _, kept in self.matching() if isinstance(kept, slice)]
            self.wfile.write(body[kept[0]] if kept else body)
            self.close_connection = bool(kept)

    def refuse(self, status: int, code: str, message: str = ""):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def matching(self):
        line = f"{self.command} {self.path}"
        return [fault for fault in self.hub.faults if re.search(fault[0], line)]

    def do_GET(self):
        self.hub.log.append(f"{self.command} {self.path}")
        for _, status in self.matching():
            if isinstance(status, int):
                return self.answer(status)
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path == "/api/models":
            return self.answer(200, [])
        if match := re.fullmatch(r"/cdn/(.*)/([0-9a-f]{40})/(.*)", path):
            repository, commit, name = match.groups()
            return self.send_file(self.hub.files[repository, commit][name])
        repository = r"((?:datasets/)?[^/]+/[^/]+)"
        if match := re.fullmatch(rf"/{repository}/resolve/(refs/.*?/.*?|.*?)/(.*)", path):
            return self.with_commit(self.resolve, *match.groups())
        if match := re.fullmatch(
                r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)(?:/(revision|tree)/(.*))?", path):
            repository, verb, revision = match.groups()
            return self.with_commit(self.tree if verb == "tree" else self.info, repository,
                                    revision or "main")
        return self.refuse(404, "EntryNotFound")

    do_HEAD = do_GET

    def with_commit(self, method, repository: str, revision: str, *rest):
        """method(repository, commit, ...), if this user may read it."""
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token == "hf_bad":
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if repository not in self.hub.refs:
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if repository in self.hub.gated and token != TOKEN:
            return self.refuse(403 if token else 401, "GatedRepo", "Access is restricted")
        commit = self.hub.refs[repository].get(revision, revision)
        if (repository, commit) not in self.hub.files:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        return method(repository, commit, *rest)

    def info(self, repository: str, commit: str):
        files = [described(name, content) | {"rfilename": name}
                 for name, content in self.hub.files[repository, commit].items()]
        self.answer(200, {"id": repository, "sha": commit, "private": False, "siblings": files})

    def tree(self, repository: str, commit: str):
        self.answer(200, [described(*file) for file in
                          self.hub.files[repository, commit].items()])

    def resolve(self, repository: str, commit: str, name: str):
        if name not in self.hub.files[repository, commit]:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = self.hub.files[repository, commit][name]
        file = described(name, content)
        headers = {"X_Repo_Commit": commit, "X_Linked_Size": len(content),
                   "ETag": f'"{file.get("lfs", file)["oid"]}"'}
        if "lfs" in file:
            elsewhere = f"http://localhost:{self.server.server_port}/cdn"  # another host's name
            location = f"{elsewhere}/{repository}/{commit}/{name}"
            return self.answer(302, Location=location, **headers)
        return self.send_file(content, **headers)

    def send_file(self, content: bytes, **headers):
        start = int(re.search(r"\d+", self.headers["Range"] or "0")[0])
        self.answer(206 if start else 200, content[start:], **headers)
