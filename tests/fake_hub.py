"""A Hugging Face hub on this machine: a real HTTP server, with every trouble that a real one makes.

    with FakeHub() as hub:
        hub.add("acme/tiny", {"config.json": "{}", "model.safetensors": a_safetensors()})
        ... HF_ENDPOINT=hub.url ...

It speaks what huggingface_hub 2.4 asks for a model: search, facts, tree, HEAD and GET of files
with ranges. No Xet: files come over plain HTTP. Containers reach it when it is bound to an
address of the bridge: `FakeHub(address="172.17.0.1")`.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 64 * 1024
LFS_FROM = 4096  # bytes; smaller files are kept by git, as on the real hub


def a_safetensors(parameters: int = 1000, dtype: str = "BF16", fill: int = 0) -> bytes:
    """A whole safetensors file with one tensor."""
    size = parameters * {"F32": 4, "BF16": 2, "F16": 2, "I8": 1}[dtype]
    tensor = {"dtype": dtype, "shape": [parameters], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "weight": tensor}).encode()
    block = hashlib.sha256(bytes([fill])).digest()
    return struct.pack("<Q", len(header)) + header + (block * (size // 32 + 1))[:size]


def an_index(*shards: str) -> str:
    """The index of weights that are cut into these files."""
    return json.dumps({"weight_map": {f"layer.{n}": name for n, name in enumerate(shards)}})


@dataclass
class Troubles:
    """What goes wrong, and how often; times count down as they are used up."""

    bytes_per_second: int | None = None
    break_after: int | None = None  # bytes of a file, then the connection is cut
    break_times: int = 1
    stall_after: int | None = None  # bytes of a file, then silence
    stall_times: int = 1
    token: str | None = None  # what a reader must show, else 401
    gated: bool = False  # facts are open, files are 403
    hidden: bool = False  # facts are 403 too
    absent: bool = False
    busy_times: int = 0  # 429
    retry_after: int | None = None
    failing_times: int = 0  # 500
    forbidden: bool = False  # 403 and no reason
    silent: bool = False  # never answers
    babbling: bool = False  # a page where JSON was asked for, as from a captive portal
    own_names: bool = False  # ETags of its own, as some mirrors have


@dataclass
class Repository:
    """One repository with its revisions; `commits` are files by path."""

    name: str
    facts: dict[str, Any]
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    troubles: Troubles = field(default_factory=Troubles)

    def commit(self, files: Mapping[str, str | bytes], revision: str = "main") -> str:
        """Add a commit, which the revision then means."""
        contents = {p: c.encode() if isinstance(c, str) else c for p, c in files.items()}
        seed = [self.name, *(f"{p}:{_sha256(c)}" for p, c in sorted(contents.items()))]
        sha = hashlib.sha1("\n".join(seed).encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = contents
        self.refs[revision] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_id(content: bytes) -> str:
    blob = b"blob %d\0" % len(content) + content
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest()


def blob_of(content: bytes) -> str:
    """The name of this content in a cache."""
    return _sha256(content) if len(content) >= LFS_FROM else _git_id(content)


class FakeHub:
    """The server; `requests` is what was asked, as "GET /path"."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.tokens: list[str | None] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self.closed = threading.Event()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer((address, port), Handler)
        self._server.daemon_threads = True
        host, bound = self._server.server_address[:2]
        self.url = f"http://{host!s}:{bound}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: Mapping[str, str | bytes] | Path, **facts: Any) -> Repository:
        """A repository from texts, bytes or a directory; facts are those of the real API."""
        if isinstance(files, Path):
            paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        repository = Repository(name, facts)
        repository.commit(files)
        self.repositories[name] = repository
        return repository

    def count(self, pattern: str) -> int:
        """How many requests so far match all of the pattern."""
        with self._lock:
            return sum(bool(re.fullmatch(pattern, request)) for request in self.requests)

    def note(self, request: str, token: str | None) -> None:
        with self._lock:
            self.requests.append(request)
            self.tokens.append(token)

    def use_up(self, troubles: Troubles, counter: str) -> bool:
        """Whether there is one left of a trouble that happens so many times; then one less."""
        with self._lock:
            left = getattr(troubles, counter)
            setattr(troubles, counter, max(left - 1, 0))
            return bool(left > 0)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    retry_after: int | None = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        try:
            self._answer()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.hub.note(f"{self.command} {path}", self._token())
        if path == "/api/models":
            return self._send_json(self._search(parse_qs(address.query)))
        pattern = r"/(?:api/models/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/(.+))?"
        found = re.fullmatch(pattern, path)
        repository = self.hub.repositories.get(found[1]) if found else None
        if found is None or repository is None or repository.troubles.absent:
            return self._refuse(404, "RepoNotFound")
        return self._of_repository(repository, found[2], found[3] or "main")

    def _of_repository(self, repository: Repository, verb: str | None, rest: str) -> None:
        refusal = self._refusal(repository.troubles, verb)
        if refusal is not None:
            return self._refuse(*refusal)
        revision, _, path = rest.partition("/") if verb == "resolve" else (rest, "", "")
        sha = repository.sha(revision)
        if sha is None:
            return self._refuse(404, "RevisionNotFound")
        files = repository.commits[sha]
        if repository.troubles.babbling:
            return self._send(b"<html>Please log in</html>", "text/html")
        if verb != "resolve":
            tree = [_tree_entry(p, c) for p, c in sorted(files.items())]
            return self._send_json(tree if verb == "tree" else _facts(repository, sha, files))
        if path in files:
            return self._send_file(repository.troubles, sha, files[path])
        return self._refuse(404, "EntryNotFound")

    def _refusal(self, troubles: Troubles, verb: str | None) -> tuple[int, str] | None:
        if troubles.silent:
            self.hub.closed.wait()
        if self.hub.use_up(troubles, "failing_times"):
            return 500, ""
        if self.hub.use_up(troubles, "busy_times"):
            self.retry_after = troubles.retry_after
            return 429, ""
        if troubles.token not in {None, self._token()}:
            return 401, ""
        if troubles.hidden or (troubles.gated and verb in {"resolve", "tree"}):
            return 403, "GatedRepo"
        return (403, "") if troubles.forbidden else None

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _search(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        text = query.get("search", [""])[0].lower()
        tag = query.get("pipeline_tag", [None])[0]
        found = [
            {"id": r.name, "gated": False, **r.facts}
            for r in self.hub.repositories.values()
            if text in r.name.lower() and tag in {None, r.facts.get("pipeline_tag")}
        ]
        found.sort(key=lambda entry: -int(str(entry.get("downloads", 0))))
        return found[: int(query.get("limit", ["1000"])[0])]

    def _send_json(self, content: object) -> None:
        self._send(json.dumps(content).encode(), "application/json")

    def _send(self, body: bytes, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if status == 429 and self.retry_after is not None:
            self.send_header("Retry-After", str(self.retry_after))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_file(self, troubles: Troubles, sha: str, content: bytes) -> None:
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked:
            start = int(asked[1])
            self.send_response(206)
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("X-Repo-Commit", sha)
        name = blob_of(content)[::-1] if troubles.own_names else blob_of(content)
        self.send_header("ETag", f'"{name}"')
        if len(content) >= LFS_FROM:
            self.send_header("X-Linked-ETag", f'"{name}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            self._send_bytes(troubles, content, start)

    def _send_bytes(self, troubles: Troubles, content: bytes, start: int) -> None:
        limit, ending = len(content), ""
        for kind in ("break", "stall"):
            after = getattr(troubles, f"{kind}_after")
            reached = after is not None and len(content) > after
            if reached and self.hub.use_up(troubles, f"{kind}_times"):
                limit, ending = max(start, after), kind
        rate = troubles.bytes_per_second
        step = min(CHUNK, rate // 20 or 1) if rate else CHUNK
        for at in range(start, limit, step):
            self.wfile.write(content[at : min(at + step, limit)])
            if rate and self.hub.closed.wait(step / rate):
                return
        if ending == "stall":
            self.hub.closed.wait()
        if ending:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file", "path": path, "size": len(content), "oid": _git_id(content)
    }  # fmt: skip
    if len(content) >= LFS_FROM:
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def _facts(repository: Repository, sha: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    siblings = []
    for path, content in sorted(files.items()):
        entry = {"rfilename": path, "size": len(content), "blobId": _git_id(content)}
        if len(content) >= LFS_FROM:
            entry["lfs"] = {"sha256": _sha256(content), "size": len(content), "pointerSize": 134}
        siblings.append(entry)
    gated = "manual" if repository.troubles.gated else False
    return {
        "id": repository.name, "sha": sha, "private": False, "gated": gated,
        "siblings": siblings, **repository.facts,
    }  # fmt: skip


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    """Until it is true; it must become so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)
