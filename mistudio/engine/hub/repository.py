"""A repository on the Hub: its record, and the files of one revision with sizes and hashes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from mistudio.engine.hub.session import Session
from mistudio.errors import CorruptFile, InvalidInput

_ID = re.compile(r"(?:[A-Za-z0-9_.-]+/)?[A-Za-z0-9_.-]+")
MAX_NAME = 255  # bytes of one part of a path
MAX_PATH = 2048


@dataclass(frozen=True)
class RemoteFile:
    """One file as the repository lists it. Large ones (LFS) carry a SHA-256, the others the id of
    their git blob."""

    name: str
    size: int | None = None
    sha256: str = ""
    git_blob: str = ""


def is_repository_id(text: str) -> bool:
    """Whether the text has the form owner/name."""
    return "/" in text and _is_id(text)


def _is_id(text: str) -> bool:
    return bool(_ID.fullmatch(text)) and not any(
        part.strip(".") == "" or ".." in part or "--" in part for part in text.split("/")
    )


def check_repository(text: str) -> str:
    """The id in what a user typed: an id, or the address of its page. A few old datasets have no
    owner."""
    name = text.strip().removesuffix("/")
    name = re.sub(r"^https?://[^/]+/", "", name)
    name = re.sub(r"^(datasets|models)/", "", name).partition("/tree/")[0].partition("/blob/")[0]
    if not _is_id(name):
        raise InvalidInput(
            "This is no repository id",
            f"{text!r} does not have the form owner/name.",
            "Copy it from the top of the dataset's page, such as roneneldan/TinyStories.",
            field="repository",
        )
    return name


def fetch_record(session: Session, revision: str | None = None) -> dict[str, Any]:
    """What the Hub knows of the session's repository; `sha` pins the revision."""
    kind, name = session.subject.kind, session.subject.name
    path = f"/api/{kind}s/{name}"
    if revision:
        path += f"/revision/{quote(revision, safe='')}"
    record = session.json(path)
    sha = record.get("sha") if isinstance(record, dict) else None
    if not isinstance(sha, str) or not re.fullmatch(r"[0-9a-fA-F]{5,64}", sha):
        raise session.nonsense("the record of the repository names no revision")
    return dict(record)


def list_files(session: Session, revision: str) -> list[RemoteFile]:
    """Every file of a revision (a commit's hash), by name."""
    kind, name = session.subject.kind, session.subject.name
    entries = session.pages(
        f"/api/{kind}s/{name}/tree/{quote(revision, safe='')}", {"recursive": "true"}
    )
    try:
        files = [_file(entry) for entry in entries if entry.get("type") == "file"]
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise session.nonsense("the list of files cannot be read") from exc
    return sorted(files, key=lambda file: file.name)


def _file(entry: dict[str, Any]) -> RemoteFile:
    lfs = entry.get("lfs") or {}
    size = int(lfs.get("size", entry["size"]))
    if size < 0:
        raise ValueError("a negative size")
    sha256 = str(lfs.get("oid") or lfs.get("sha256") or "").removeprefix("sha256:")
    return RemoteFile(str(entry["path"]), size, sha256, "" if lfs else str(entry.get("oid", "")))


def file_url(session: Session, revision: str, name: str) -> str:
    """Where a file is fetched."""
    prefix = "datasets/" if session.subject.kind == "dataset" else ""
    return (
        f"{session.access.endpoint}/{prefix}{session.subject.name}/resolve/"
        f"{quote(revision, safe='')}/{quote(name)}"
    )


def check_names(files: Iterable[RemoteFile], subject: object) -> None:
    """Refuse names that would lead out of a folder or cannot be written everywhere."""
    seen: dict[str, str] = {}
    for file in files:
        fault = _fault(file.name)
        if not fault and file.name.lower() in seen:
            fault = f"it cannot lie beside {seen[file.name.lower()]!r}"
        if fault:
            raise CorruptFile(
                "A file name of the repository is not safe",
                f"{subject} has a file called {file.name[:120]!r}: {fault}.",
                "Nothing was downloaded. Tell the owner of the repository, or choose another one.",
            )
        seen[file.name.lower()] = file.name
    for name in seen:
        for parent in PurePosixPath(name).parents:
            if str(parent) in seen:
                raise CorruptFile(
                    "A file name of the repository is not safe",
                    f"{subject} lists {seen[str(parent)]!r} both as a file and as a folder.",
                    "Nothing was downloaded. Choose another repository.",
                )


def _fault(name: str) -> str:
    """Why a file name is not safe; empty where it is."""
    parts = name.split("/")
    if name.startswith("/"):
        return "it begins at the root of the disk"
    if any(part in ("", ".", "..") for part in parts):
        return "it leads out of its folder"
    if any(sign in name for sign in '\\:*?"<>|') or not name.isprintable():
        return "it has signs that not every system can have in a name"
    if any(len(part.encode()) > MAX_NAME for part in parts) or len(name.encode()) > MAX_PATH:
        return "it is too long"
    return ""
