"""Documents on disk: one JSON object a line with a `text`, and the byte offset of every line.

Reading one document is one seek, however many there are; the offsets are memory-mapped. Tokens live
in `tokens.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import DiskFull, InvalidInput

DOCUMENTS = "documents.jsonl"
OFFSETS = "documents.offsets.npy"
SPLITS = "documents.splits.json"
# What writing leaves free on the disk: a source may unpack to more than anybody could foresee.
ROOM_TO_KEEP = 256 * 1024**2
ROOM_CHECKED_EVERY = 32 * 1024**2


@dataclass(frozen=True)
class Document:
    """One text. `title`, `topic` and `split` are empty where the source has none.

    A conversation has `messages`, (role, content) each; `text` is then the plain reading of it.
    """

    text: str
    title: str = ""
    topic: str = ""
    split: str = ""
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Limit:
    """At most so many documents, and so many bytes of text in UTF-8; None: all."""

    max_documents: int | None = None
    max_bytes: int | None = None


@dataclass
class WrittenDocuments:
    """Totals of a written collection; `sha256` is over the stored lines, in order."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    sha256: str = ""


def limited(documents: Iterable[Document], limit: Limit) -> Iterator[Document]:
    """Documents without the blank ones, until the next one would go over the limit."""
    if limit.max_documents is not None and limit.max_documents < 1:
        raise InvalidInput("No documents are asked for", "The limit is below 1 document.")
    count = size = 0
    for document in documents:
        if not document.text.strip():
            continue
        if limit.max_bytes is not None:
            size += len(document.text.encode("utf-8", "surrogatepass"))
            if size > limit.max_bytes:
                _require_something(count, size, limit.max_bytes)
                return
        yield document
        count += 1
        if count == limit.max_documents:
            return


def _require_something(count: int, size: int, limit: int) -> None:
    if count == 0:
        raise InvalidInput(
            "The limit is smaller than the first document",
            f"The first document has {size:,} bytes of text; the limit is {limit:,}.",
            "Choose a higher limit.",
        )


def write_documents(
    documents: Iterable[Document],
    folder: Path,
    progress: Progress = SILENT,
    expected_bytes: int | None = None,
    limit: Limit | None = None,
) -> WrittenDocuments:
    """Store documents in `folder`. Empty texts are left out; memory does not grow with the size.

    `expected_bytes`, about what the sources hold, gives the progress its total. DiskFull before
    the disk is; ValueError where the documents of one split do not come one after the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    totals = WrittenDocuments()
    splits = _SplitRanges()
    digest = hashlib.sha256()
    room = _Room(folder)
    with (folder / DOCUMENTS).open("wb", 1 << 20) as file, _Offsets(folder) as offsets:
        for document in limited(documents, limit or Limit()):
            progress.check()
            row = _row(document)
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            digest.update(line)
            splits.add(document.split, totals.documents)
            totals.documents += 1
            totals.characters += len(row["text"])
            totals.bytes += len(line)
            offsets.add(totals.bytes)
            room.check(totals.bytes)
            if totals.documents % 64 == 0:
                progress.report(totals.bytes, expected_bytes)
    if totals.documents == 0:
        raise InvalidInput(
            "No text found",
            "Every row or paragraph is empty.",
            "Choose another file, or another text column.",
        )
    splits.save(folder, totals.documents)
    totals.sha256 = digest.hexdigest()
    return totals


class Documents(Sequence[Document]):
    """A stored collection, read by position. `splits` are ranges of positions; {} without any.

    Opening maps the offsets and reads nothing else: milliseconds for millions of documents.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / DOCUMENTS
        self._offsets = np.load(folder / OFFSETS, mmap_mode="r")
        self.splits = _load_splits(folder)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...

    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        """One document, or a page of them (read at once where they lie side by side)."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._read(start, max(start, stop))
            return [self[place] for place in range(start, stop, step)]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._read(index, index + 1)[0]

    def __iter__(self) -> Iterator[Document]:
        with self._path.open("rb") as file:
            for line in file:
                yield _parse(line)

    @property
    def bytes(self) -> int:
        return int(self._offsets[-1])

    def _read(self, start: int, stop: int) -> list[Document]:
        if start == stop:
            return []
        places = [int(offset) for offset in self._offsets[start : stop + 1]]
        with self._path.open("rb", 0) as file:
            file.seek(places[0])
            block = _read_exactly(file, places[-1] - places[0])
        bounds = [place - places[0] for place in places]
        return [_parse(block[a:b]) for a, b in pairwise(bounds)]


def _read_exactly(file: Any, size: int) -> bytes:
    """A raw file may give less than asked for in one call."""
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class _Offsets:
    """Byte offsets, written as they come and made a .npy file at the end: no list in memory."""

    def __init__(self, folder: Path) -> None:
        self._target = folder / OFFSETS
        self._part = folder / f"{OFFSETS}.part"
        self._count = 0

    def __enter__(self) -> _Offsets:
        self._file: BinaryIO = self._part.open("wb", 1 << 20)
        self.add(0)
        return self

    def add(self, offset: int) -> None:
        self._file.write(offset.to_bytes(8, "little"))
        self._count += 1

    def __exit__(self, kind: object, *_: object) -> None:
        self._file.close()
        if kind is None:
            self._finish()
        self._part.unlink(missing_ok=True)

    def _finish(self) -> None:
        header = {"descr": "<i8", "fortran_order": False, "shape": (self._count,)}
        with self._target.open("wb") as target, self._part.open("rb") as part:
            np.lib.format.write_array_header_1_0(target, header)
            shutil.copyfileobj(part, target, 1 << 20)


class _SplitRanges:
    """Where each split begins."""

    def __init__(self) -> None:
        self._begins: dict[str, int] = {}
        self._last: str | None = None

    def add(self, split: str, index: int) -> None:
        if split == self._last:
            return
        if split in self._begins:
            raise ValueError(f"documents of the split {split!r} come in several pieces")
        self._begins[split] = index
        self._last = split

    def save(self, folder: Path, total: int) -> None:
        if not any(self._begins):
            return
        ends = [*list(self._begins.values())[1:], total]
        found = {
            split: [begin, end]
            for (split, begin), end in zip(self._begins.items(), ends, strict=True)
            if split
        }
        (folder / SPLITS).write_text(json.dumps(found), encoding="utf-8")


def _load_splits(folder: Path) -> dict[str, range]:
    if not (folder / SPLITS).exists():
        return {}
    found = json.loads((folder / SPLITS).read_text(encoding="utf-8"))
    return {split: range(begin, end) for split, (begin, end) in found.items()}


class _Room:
    """Stops writing before the disk is full: other programs need what is left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._next = 0

    def check(self, written: int) -> None:
        if written < self._next:
            return
        self._next = written + ROOM_CHECKED_EVERY
        free = shutil.disk_usage(self._folder).free
        if free < ROOM_TO_KEEP:
            raise DiskFull(
                "The disk is nearly full",
                f"{written / 1e6:,.0f} MB of text were written and {free / 1e6:,.0f} MB are left "
                f"on the disk; {ROOM_TO_KEEP / 1e6:,.0f} MB are kept free.",
                "Free some space, move the library, or set a limit on the text to take.",
            )


def _row(document: Document) -> dict[str, Any]:
    row: dict[str, Any] = {"text": encodable(document.text)}
    for name in ("title", "topic", "split"):
        if value := getattr(document, name):
            row[name] = encodable(value)
    if document.messages:
        row["messages"] = [[encodable(part) for part in message] for message in document.messages]
    return row


def encodable(text: str) -> str:
    """JSON may hold halves of surrogate pairs, which UTF-8 cannot: pairs are joined, single
    halves become the replacement character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _parse(line: bytes) -> Document:
    row = json.loads(line)
    return Document(
        row["text"],
        row.get("title", ""),
        row.get("topic", ""),
        row.get("split", ""),
        tuple((role, content) for role, content in row.get("messages", ())),
    )
