"""The Hugging Face Hub's routes on the loopback interface, with the faults that networks have.

with HubServer() as hub:
    hub.add("owner/texts", {"train.jsonl": b"..."}, card={"license": "mit"})
    hub.cut["train.jsonl"] = 0.4          # the first answer breaks off there
    ...
    assert hub.ranges("train.jsonl") == ["", "bytes=400-"]
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS_FROM = 1000  # bytes: larger files are listed with a SHA-256, smaller ones with a git blob
PAGE = 3  # files on a page of the tree: small, so that every test turns pages


@dataclass
class Repo:
    kind: str
    name: str
    files: dict[str, bytes]
    card: dict[str, Any] = field(default_factory=dict)
    gated: str | bool = False
    private: bool = False
    downloads: int = 0
    likes: int = 0
    description: str = ""

    @property
    def sha(self) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """Faults are by file name (the whole path in the repository) and hold until they are taken
    away, except where a number of times is given."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.accounts: dict[str, str] = {}  # token -> user
        self.accepted: set[tuple[str, str]] = set()  # (user, repository)
        self.requests: list[Request] = []
        self.cut: dict[str, float] = {}  # share of the file after which the answer breaks off, once
        self.listed_size: dict[str, int] = {}  # another size than the file's in the tree
        self.sent: dict[str, bytes] = {}  # other content than the listed one
        self.no_length: set[str] = set()  # answers without Content-Length
        self.no_ranges = False
        self.throttled: list[
            tuple[str, dict[str, str]]
        ] = []  # (part of a path, headers): once each
        self.broken: list[tuple[str, int]] = []  # (part of a path, status): once each
        self.moved_to: dict[str, str] = {}  # file -> where it is said to be
        self.bytes_per_second: float | None = None
        self.silent: set[str] = set()  # files after whose first bytes nothing more comes
        self.echo_token = False  # error texts repeat the token, as careless servers do
        self._closing = threading.Event()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add(self, name: str, files: dict[str, bytes], kind: str = "dataset", **about: Any) -> Repo:
        repo = Repo(kind, name, files, **about)
        self.repos[(kind, name)] = repo
        return repo

    def ranges(self, file: str) -> list[str]:
        """The Range header of each request for a file, in order; "" where it had none."""
        return [
            request.headers.get("range", "")
            for request in self.requests
            if "/resolve/" in request.path and unquote(request.path).endswith("/" + file)
        ]

    def asked(self, part: str) -> list[Request]:
        return [request for request in self.requests if part in unquote(request.path)]


@contextmanager
def offline_port() -> Iterator[str]:
    """An endpoint where nobody answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away in the middle is what many tests are about


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(True)

    def do_HEAD(self) -> None:
        self._answer(False)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        hub = self.server_hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append(Request(self.command, self.path, headers))
        for index, (part, extra) in enumerate(hub.throttled):
            if part in self.path:
                del hub.throttled[index]
                return self._send(429, b"{}", {"X-Error-Message": "Too many requests", **extra})
        for index, (part, status) in enumerate(hub.broken):
            if part in self.path:
                del hub.broken[index]
                return self._send(status, b"<html>", {})
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        token = headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in hub.accounts:
            said = f"Invalid credentials {token if hub.echo_token else ''}"
            return self._send(401, b"", {"X-Error-Message": said})
        user = hub.accounts.get(token, "")
        if path == "/api/whoami-v2":
            if not user:
                return self._send(401, b"", {"X-Error-Message": "Not signed in"})
            return self._json({"type": "user", "name": user})
        if path in ("/api/datasets", "/api/models"):
            return self._search(path.removeprefix("/api/").rstrip("s"), query)
        return self._repository(path, query, user, token, body)

    def _repository(
        self, path: str, query: dict[str, list[str]], user: str, token: str, body: bool
    ) -> None:
        hub = self.server_hub
        found = re.fullmatch(
            r"/(?P<api>api/)?(?P<kind>datasets/|models/)?(?P<name>[^/]+(?:/[^/]+)?)"
            r"(?:/(?P<route>revision|tree|resolve)/(?P<rev>[^/]+(?:/convert/parquet)?)"
            r"(?:/(?P<file>.+))?)?",
            path,
        )
        kind = (found["kind"] or "models/").rstrip("s/") if found else ""
        repo = hub.repos.get((kind, found["name"])) if found else None
        if repo is None or (repo.private and user != repo.name.split("/")[0]):
            # The Hub does not tell strangers whether it exists.
            return self._refuse(404 if user else 401, "RepoNotFound", "Repository not found")
        assert found is not None
        if found["rev"] not in (None, "main", repo.sha):
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        if found["api"] and found["route"] in (None, "revision"):
            return self._json(self._record(repo))
        closed = repo.gated and (user, repo.name) not in hub.accepted
        if closed:
            said = f"Access to {repo.name} is restricted {token if hub.echo_token else ''}"
            return self._refuse(403 if user else 401, "GatedRepo", said)
        if found["api"]:
            return self._tree(repo, path, query)
        if found["file"] not in repo.files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        return self._file(repo, found["file"], body)

    def _search(self, kind: str, query: dict[str, list[str]]) -> None:
        text = query.get("search", [""])[0].lower()
        rows = [
            self._record(repo)
            for repo in self.server_hub.repos.values()
            if repo.kind == kind and text in repo.name.lower() and not repo.private
        ]
        rows.sort(key=lambda row: -int(row["downloads"]))
        self._json(rows[: int(query.get("limit", ["100"])[0])])

    @staticmethod
    def _record(repo: Repo) -> dict[str, Any]:
        tags = [f"license:{repo.card['license']}"] if "license" in repo.card else []
        return {
            "id": repo.name,
            "sha": repo.sha,
            "gated": repo.gated,
            "private": repo.private,
            "downloads": repo.downloads,
            "likes": repo.likes,
            "tags": tags,
            "description": repo.description,
            "mainSize": sum(len(content) for content in repo.files.values()),
            "cardData": repo.card,
        }

    def _tree(self, repo: Repo, path: str, query: dict[str, list[str]]) -> None:
        names = list(repo.files)
        start = int(query.get("cursor", ["0"])[0])
        entries: list[dict[str, Any]] = []
        if start == 0:
            folders = {name.rpartition("/")[0] for name in names if "/" in name}
            entries = [
                {"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders
            ]
        for name in names[start : start + PAGE]:
            content = repo.files[name]
            size = self.server_hub.listed_size.get(name, len(content))
            entry: dict[str, Any] = {"type": "file", "path": name, "size": size}
            if len(content) >= LFS_FROM:
                oid = hashlib.sha256(content).hexdigest()
                entry |= {"oid": "1" * 40, "lfs": {"oid": oid, "size": size, "pointerSize": 130}}
            else:
                entry["oid"] = git_blob(content)
            entries.append(entry)
        extra = {}
        if start + PAGE < len(names):
            following = (
                f"{self.server_hub.endpoint}{quote(path)}?recursive=true&cursor={start + PAGE}"
            )
            extra["Link"] = f'<{following}>; rel="next"'
        self._json(entries, extra)

    def _file(self, repo: Repo, name: str, body: bool) -> None:
        hub = self.server_hub
        content = hub.sent.get(name, repo.files[name])
        if name in hub.moved_to:
            length = str(len(repo.files[name]))
            return self._send(302, b"", {"Location": hub.moved_to[name], "X-Linked-Size": length})
        start, status, extra = 0, 200, {}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        total = len(content)
        if wanted and not hub.no_ranges:
            start = int(wanted[1])
            end = min(total, int(wanted[2]) + 1) if wanted[2] else total
            if start >= total:
                return self._send(416, b"", {"Content-Range": f"bytes */{total}"})
            status, extra = 206, {"Content-Range": f"bytes {start}-{end - 1}/{total}"}
            content = content[start:end]
        self.send_response(status)
        for header, value in extra.items():
            self.send_header(header, value)
        if name in hub.no_length:
            self.close_connection = True
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self._stream(name, content, start, total)

    def _stream(self, name: str, content: bytes, start: int, total: int) -> None:
        hub = self.server_hub
        share = hub.cut.pop(name, None)
        stop = len(content) if share is None else max(0, int(total * share) - start)
        if name in hub.silent:
            self.wfile.write(content[: len(content) // 3])
            hub._closing.wait(20)
            self.close_connection = True
            return
        step = 64 * 1024
        if hub.bytes_per_second:
            step = max(1, int(hub.bytes_per_second / 50))
        for at in range(0, stop, step):
            try:
                self.wfile.write(content[at : min(at + step, stop)])
            except OSError:  # the client has gone
                self.close_connection = True
                return
            if hub.bytes_per_second and hub._closing.wait(step / hub.bytes_per_second):
                break
        if stop < len(content):
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _json(self, value: Any, extra: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._send(200, body, {"Content-Type": "application/json", **(extra or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def wait_until(condition: Any, seconds: float = 5.0) -> None:
    """Poll until it holds; AssertionError where it does not in time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)
