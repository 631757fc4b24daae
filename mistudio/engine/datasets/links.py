"""Datasets whose documents stay where they are: read each time, and only while they are the same.

A link to files is plain data: `{"kind": "files", "path", "options", "files": [[name, bytes,
mtime_ns], …], "total": [files, bytes], "fingerprint"}`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistudio.engine.datasets.documents import Document
from mistudio.engine.datasets.files.listing import Found, SourceFile, find_files, shown
from mistudio.engine.datasets.files.options import ReadOptions, Rejected
from mistudio.engine.datasets.sources import read_documents
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import InvalidInput, NotFound, UserError

if TYPE_CHECKING:
    from mistudio.engine.hub.access import Access

NAMED_FILES = 1000  # of larger folders only the fingerprint says that something is different
FIRST_DOCUMENTS = 1000  # of a linked dataset are stored, for a look


def link_to(path: Path, options: ReadOptions) -> dict[str, Any]:
    """A link to a file or folder as it is now."""
    path = path.absolute()
    if str(path) != shown(path):
        raise InvalidInput(
            "This path cannot be kept as a link",
            f"{shown(path)} has bytes or line breaks in its name that cannot be written down.",
            "Rename it, or add it as a copy.",
        )
    found = find_files(path)
    return {
        "kind": "files",
        "path": str(path),
        "options": options.as_json(),
        "files": [list(_mark(file)) for file in found.files[:NAMED_FILES]],
        "total": [len(found.files), found.bytes],
        "fingerprint": _fingerprint(found),
    }


def open_link(
    link: dict[str, Any],
    progress: Progress = SILENT,
    rejected: Rejected | None = None,
    access: Access | None = None,
) -> Iterator[Document]:
    """The documents of a link, from the first on. UserError where what it leads to is gone or no
    longer what it was when it was added, before the first document or while they are read.
    `access` is for links to the Hub."""
    if link.get("kind") == "hub":
        from mistudio.engine.hub import stream_documents

        yield from stream_documents(link, None, progress, access=access, rejected=rejected)
        return
    check_link(link)
    options = ReadOptions.from_json(link.get("options") or {})
    yield from read_documents(Path(link["path"]), options, rejected, progress)


def check_link(link: dict[str, Any]) -> None:
    """Raise where the files of a link are not the ones that were added."""
    path = Path(link["path"])
    try:
        found = find_files(path)
    except NotFound as exc:
        raise NotFound(
            "The linked files are gone",
            f"This dataset reads {path}, and there is nothing any more.",
            "Put the files back or connect the disk; or add the dataset again from where they are.",
        ) from exc
    if _fingerprint(found) != link["fingerprint"]:
        raise UserError(
            "The linked files have changed",
            _difference(link, found),
            "Add the dataset again: what was tokenised before came from the files as they were.",
        )


def _mark(file: SourceFile) -> tuple[str, int, int]:
    return file.name, file.size, file.mtime_ns


def _fingerprint(found: Found) -> str:
    """SHA-256 over names, sizes and times of change."""
    digest = hashlib.sha256()
    for file in found.files:
        digest.update(f"{file.name}\0{file.size}\0{file.mtime_ns}\n".encode())
    return digest.hexdigest()


def _difference(link: dict[str, Any], found: Found) -> str:
    """What is different, in a sentence that names one file."""
    before = {name: (size, time) for name, size, time in link.get("files", ())}
    now = {file.name: (file.size, file.mtime_ns) for file in found.files}
    whole = link["total"][0] == len(before)
    gone = [name for name in before if name not in now]
    new = [name for name in now if name not in before] if whole else []
    changed = [name for name in before if name in now and before[name] != now[name]]
    if gone:
        return f"{_some(gone)} {'is' if len(gone) == 1 else 'are'} gone from {link['path']}."
    if changed:
        name = changed[0]
        sizes = f"{before[name][0]:,} bytes then, {now[name][0]:,} now"
        return f"{_some(changed)} changed since the dataset was added ({sizes})."
    if new:
        return f"{_some(new)} {'is' if len(new) == 1 else 'are'} new in {link['path']}."
    files, size = link["total"]
    return (
        f"{link['path']} had {files:,} files of {size:,} bytes when the dataset was added; now it "
        f"has {len(found.files):,} of {found.bytes:,}, or others in their place."
    )


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")
