"""Documents on disk: what goes in comes out, by number, in flat memory."""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mistudio.engine.datasets import documents as documents_module
from mistudio.engine.datasets.documents import (
    Document,
    Documents,
    Limit,
    limited,
    write_documents,
)
from mistudio.engine.datasets.sources import read_documents
from mistudio.engine.progress import Cancelled
from mistudio.errors import DiskFull, InvalidInput

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


# --- splits, pages, limits ------------------------------------------------------------------------


def test_splits_are_ranges_of_positions(tmp_path: Path) -> None:
    rows = [Document(f"{split} {i}", split=split) for split in ("train", "test") for i in range(3)]
    write_documents([*rows, Document("of none")], tmp_path)
    documents = Documents(tmp_path)
    assert documents.splits == {"train": range(0, 3), "test": range(3, 6)}
    assert documents[4] == rows[4]


def test_without_splits_there_are_no_ranges(tmp_path: Path) -> None:
    write_documents(SOME, tmp_path)
    assert Documents(tmp_path).splits == {}


def test_a_split_in_pieces_is_refused(tmp_path: Path) -> None:
    rows = [Document("a", split="train"), Document("b", split="test"), Document("c", split="train")]
    with pytest.raises(ValueError, match="'train' come in several pieces"):
        write_documents(rows, tmp_path)


def test_a_page_is_a_slice(tmp_path: Path) -> None:
    rows = [Document(f"text {i} " + "ü" * i) for i in range(50)]
    write_documents(rows, tmp_path)
    documents = Documents(tmp_path)
    for part in (slice(10, 20), slice(45, 99), slice(0, 0), slice(None), slice(1, 40, 7)):
        assert documents[part] == rows[part]
    assert documents[-3:] == rows[-3:]


def test_conversations_come_back_with_their_messages(tmp_path: Path) -> None:
    chat = Document("User: a\n\nAssistant: b", messages=(("user", "a"), ("assistant", "b")))
    write_documents([chat], tmp_path)
    assert Documents(tmp_path)[0] == chat


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (Limit(), 5),
        (Limit(max_documents=2), 2),
        (Limit(max_documents=99), 5),
        (Limit(max_bytes=20), 2),  # ten bytes each: ü has two
        (Limit(max_bytes=29), 2),
        (Limit(max_documents=1, max_bytes=29), 1),
    ],
)
def test_a_limit_counts_documents_and_bytes_of_text(
    tmp_path: Path, limit: Limit, expected: int
) -> None:
    rows = [Document(" "), *[Document("ü" * 5)] * 5]
    assert write_documents(rows, tmp_path, limit=limit).documents == expected


def test_a_limit_below_the_first_document_is_refused_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"has 10 bytes of text; the limit is 9\."):
        write_documents([Document("x" * 10)], tmp_path, limit=Limit(max_bytes=9))
    with pytest.raises(InvalidInput, match="below 1"):
        write_documents([Document("x" * 10)], tmp_path, limit=Limit(max_documents=0))


def test_nothing_is_read_beyond_the_limit() -> None:
    def two() -> Iterator[Document]:
        yield Document("one")
        yield Document("two")
        raise AssertionError("read on")

    assert len(list(limited(two(), Limit(max_documents=2)))) == 2


def test_writing_stops_before_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(documents_module, "ROOM_TO_KEEP", 2 * free)
    with pytest.raises(DiskFull, match="nearly full"):
        write_documents([Document("text")], tmp_path)


def test_opening_reads_no_offsets(tmp_path: Path) -> None:
    """Five million offsets take 40 MB; opening maps them."""
    write_documents([Document("text")], tmp_path)
    np.save(tmp_path / "documents.offsets.npy", np.arange(5_000_001, dtype=np.int64))
    tracemalloc.start()
    assert len(Documents(tmp_path)) == 5_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1024**2
