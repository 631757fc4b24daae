"""Documents on disk: what goes in comes out, by number, in flat memory."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from mistudio.engine.datasets.documents import Document, Documents, write_documents
from mistudio.engine.datasets.sources import read_documents
from mistudio.engine.progress import Cancelled
from mistudio.errors import InvalidInput

SOME = [
    Document("plain", "Title", "Topic"),
    Document("  spaces kept  \n\n and lines\n"),
    Document('quotes " and \\ and \u2028 and 😀 and ümlaut', "Ü"),
    Document("x" * 100_000),
]


def test_every_document_comes_back_by_its_number_in_any_order(tmp_path: Path) -> None:
    write_documents(SOME, tmp_path)
    documents = Documents(tmp_path)
    assert len(documents) == 4
    for index in (3, 0, 2, 1, 0):
        assert documents[index] == SOME[index]
    assert list(documents) == SOME
    for index in (-1, 4):
        with pytest.raises(IndexError):
            documents[index]


def test_totals_are_those_of_what_was_written(tmp_path: Path) -> None:
    written = write_documents(SOME, tmp_path)
    content = (tmp_path / "documents.jsonl").read_bytes()
    assert written.documents == 4
    assert written.characters == sum(len(d.text) for d in SOME)
    assert written.bytes == len(content) == Documents(tmp_path).bytes
    assert written.sha256 == hashlib.sha256(content).hexdigest()


def test_empty_texts_are_left_out(tmp_path: Path) -> None:
    written = write_documents([Document(""), Document("kept"), Document(" \n\t ")], tmp_path)
    assert written.documents == 1
    assert [d.text for d in Documents(tmp_path)] == ["kept"]


def test_nothing_but_empty_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="No text found"):
        write_documents([Document(""), Document("  ")], tmp_path)


def test_halves_of_surrogate_pairs_are_replaced_and_pairs_joined(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "lone \\ud83d half", "title": "\\udc00"}\n{"text": "\\ud83d\\ude00"}\n'
    )
    write_documents(read_documents(path), tmp_path / "out")
    assert [d.text for d in Documents(tmp_path / "out")] == ["lone \ufffd half", "😀"]
    assert Documents(tmp_path / "out")[0].title == "\ufffd"


def test_reading_stops_at_the_next_document_when_cancelled(tmp_path: Path) -> None:
    given = []

    class StopAfter:
        def check(self) -> None:
            if len(given) == 3:
                raise Cancelled

        def report(self, *args: object, **metrics: object) -> None: ...

    def many() -> Iterator[Document]:
        for number in range(100):
            given.append(number)
            yield Document("text")

    with pytest.raises(Cancelled):
        write_documents(many(), tmp_path, StopAfter())
    assert len(given) == 3


def test_progress_knows_its_total(tmp_path: Path) -> None:
    reports: list[tuple[float, float | None]] = []

    class Watch:
        def check(self) -> None: ...

        def report(
            self, done: float, total: float | None = None, phase: str | None = None, **m: object
        ) -> None:
            reports.append((done, total))

    write_documents([Document("text")] * 200, tmp_path, Watch(), expected_bytes=4000)
    assert len(reports) == 3
    assert all(total == 4000 for _, total in reports)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)


MEGABYTES = 12


@pytest.mark.parametrize("shape", ["lines.jsonl", "table.csv", "book.txt", "one_line.txt"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, shape: str) -> None:
    path, size = tmp_path / shape, MEGABYTES * 1024**2
    line = "The quick brown fox jumps over the lazy dog. " * 20
    whole = {
        "lines.jsonl": json.dumps({"text": line}) + "\n",
        "table.csv": f"{line}\n",
        "book.txt": f"{line}\n\n",
        "one_line.txt": line,
    }[shape]
    with path.open("w") as file:
        if shape.endswith(".csv"):
            file.write("text\n")
        for _ in range(size // len(whole)):
            file.write(whole)
    tracemalloc.start()
    written = write_documents(read_documents(path), tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written.characters > 0.95 * size
    assert peak < 3 * 1024**2
