"""Documents on disk: one JSON object a line with a `text`, and the byte offset of every line.

Reading one document is one seek, however many there are. Tokens live in `tokens.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import InvalidInput

DOCUMENTS = "documents.jsonl"
OFFSETS = "documents.offsets.npy"


@dataclass(frozen=True)
class Document:
    """One text. `title` and `topic` are empty where the source has none."""

    text: str
    title: str = ""
    topic: str = ""


@dataclass
class WrittenDocuments:
    """Totals of a written collection; `sha256` is over the stored lines, in order."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    sha256: str = ""


def write_documents(
    documents: Iterable[Document],
    folder: Path,
    progress: Progress = SILENT,
    expected_bytes: int | None = None,
) -> WrittenDocuments:
    """Store documents in `folder`. Empty texts are left out; memory does not grow with the size.

    `expected_bytes`, about what the sources hold, gives the progress its total.
    """
    folder.mkdir(parents=True, exist_ok=True)
    totals = WrittenDocuments()
    digest = hashlib.sha256()
    offsets = [0]
    with (folder / DOCUMENTS).open("wb") as file:
        for document in documents:
            progress.check()
            if not document.text.strip():
                continue
            row = {"text": _encodable(document.text)}
            if document.title:
                row["title"] = _encodable(document.title)
            if document.topic:
                row["topic"] = _encodable(document.topic)
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            digest.update(line)
            totals.documents += 1
            totals.characters += len(row["text"])
            totals.bytes += len(line)
            offsets.append(totals.bytes)
            if totals.documents % 64 == 0:
                progress.report(totals.bytes, expected_bytes)
    if totals.documents == 0:
        raise InvalidInput(
            "No text found",
            "Every row or paragraph is empty.",
            "Choose another file, or another text column.",
        )
    np.save(folder / OFFSETS, np.asarray(offsets, dtype=np.int64))
    totals.sha256 = digest.hexdigest()
    return totals


class Documents:
    """A stored collection, read by position."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / DOCUMENTS
        self._offsets = np.load(folder / OFFSETS, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self._path.open("rb") as file:
            file.seek(int(self._offsets[index]))
            return _parse(file.read(int(self._offsets[index + 1] - self._offsets[index])))

    def __iter__(self) -> Iterator[Document]:
        with self._path.open("rb") as file:
            for line in file:
                yield _parse(line)

    @property
    def bytes(self) -> int:
        return int(self._offsets[-1])


def _encodable(text: str) -> str:
    """JSON may hold halves of surrogate pairs, which UTF-8 cannot: pairs are joined, single
    halves become the replacement character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _parse(line: bytes) -> Document:
    row = json.loads(line)
    return Document(row["text"], row.get("title", ""), row.get("topic", ""))
