"""Finding text in stored documents: a scan where that is quick, else an index beside the documents.

What a search means is one line: `query.casefold() in text.casefold()` (or in the title). Scan and
index only make it fast: both compare folded bytes of the stored lines and then ask the document.

The index holds, for every block of 1 KiB of folded text, a signature of 2,048 bits: which hashes of
three bytes stand in it (a Bloom filter with one hash). The bits lie by hash and not by block, so
that a query reads a few KiB per 32 MiB of text: the blocks that have all its triples are its
candidates. SQLite's FTS5 with trigrams was tried: it was built at 1 MB/s (this: some 20), was three
times as large, and cannot look for the two characters of a Chinese word.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from mistudio.engine.datasets.documents import DOCUMENTS, OFFSETS
from mistudio.engine.progress import SILENT, Progress

INDEX = "search.index"
# What a scan reads in under 200 ms where nothing is found.
SCAN_BYTES = 24 * 1024**2
# Lines that are folded at once. Folding holds Python's lock: more would be felt in the window.
CHUNK_BYTES = 256 * 1024
TRIPLES = 12  # of a query that the index is asked for; more cost time and hardly narrow it down
_LETTERS = 4_000  # characters of a query that are looked at

_BLOCK = 1024  # folded bytes that a signature stands for, beside the overlap
# The first triples of a match that begins in a block must all be in its signature, so it goes on
# for as many bytes.
_OVERLAP = 64
_BUCKETS_LOG2 = 11
_BUCKETS = 1 << _BUCKETS_LOG2
_SEGMENT = 32_768  # blocks whose bits lie together
_SEGMENT_BYTES = _BUCKETS * _SEGMENT // 8
_HEADER = 64  # bytes: magic, version, documents, bytes of documents, blocks, as int64
_MAGIC = int.from_bytes(b"miSearch", "little")
_VERSION = 1

# Letters that are not ASCII but fold to something that is ("ß" to "ss", the Kelvin sign to "k"),
# by the byte that begins them: only where one of them stands can an ASCII word hide from
# `bytes.lower`. A test compares the list with all of Unicode.
_FOLD_TO_ASCII = (
    (b"\xc3", (b"\xc3\x9f",)),
    (b"\xc4", (b"\xc4\xb0",)),
    (b"\xc5", (b"\xc5\x89", b"\xc5\xbf")),
    (b"\xc7", (b"\xc7\xb0",)),
    (b"\xe1", (b"\xe1\xba",)),
    (b"\xe2", (b"\xe2\x84\xaa",)),
    (b"\xef", (b"\xef\xac",)),
)
# ASCII, and scripts without case that nothing folds to (from Hebrew to Burmese, Chinese, Japanese,
# Korean): these stand in a text as they stand in a query.
_PLAIN = re.compile("[\\x00-\\x7f\u0590-\u109f\u3040-\ua4ff\uac00-\ud7a3]+")
_FOLDED_AT_ONCE = 16 * 1024

Bytes = bytes  # a class here has a property of that name


def never() -> bool:
    return False


@dataclass(frozen=True)
class Found:
    """Numbers of documents in order; `complete` where there are no more after them."""

    indices: tuple[int, ...]
    complete: bool
    stopped: bool = False  # by whoever asked; then nothing is known of what was not looked at


class DocumentSearch:
    """A search over the documents in `folder`. Cheap to open; use it in one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets = np.load(folder / OFFSETS, mmap_mode="r")
        self._file = (folder / DOCUMENTS).open("rb")
        self._lines = (
            mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if self.bytes else b""
        )

    def __enter__(self) -> DocumentSearch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if isinstance(self._lines, mmap.mmap):
            self._lines.close()
        self._file.close()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def bytes(self) -> int:
        return int(self._offsets[-1])

    @property
    def wants_index(self) -> bool:
        """Whether a scan would take too long and there is no index yet."""
        return self.bytes > SCAN_BYTES and not self.indexed

    @property
    def indexed(self) -> bool:
        """Whether there is an index of exactly these documents."""
        return self._index() is not None

    def find(
        self,
        query: str,
        start: int = 0,
        limit: int = 10,
        end: int | None = None,
        stop: Callable[[], bool] = never,
    ) -> Found:
        """The first `limit` documents from number `start` on (and before `end`) that hold `query`.

        Go on with `start` = the last one + 1. `stop()` is asked at least every 20 ms or so.
        """
        end = len(self) if end is None else min(end, len(self))
        needle = _Needle(query)
        if not needle.folded or start >= end:
            return Found((), True)
        found: list[int] = []
        try:
            for index in self._matches(needle, start, end, stop):
                if len(found) == limit:
                    return Found(tuple(found), False)
                found.append(index)
        except _Stopped:
            return Found(tuple(found), False, True)
        return Found(tuple(found), True)

    def _matches(
        self, needle: _Needle, start: int, end: int, stop: Callable[[], bool]
    ) -> Iterator[int]:
        if len(needle.bytes) >= 3 and self.bytes > SCAN_BYTES and (index := self._index()):
            return self._by_index(index, needle, start, end, stop)
        return self._by_scan(needle, start, end, stop)

    def _index(self) -> _Index | None:
        try:
            index = _Index(self._folder / INDEX)
        except (OSError, ValueError):
            return None
        return index if index.fits(len(self), self.bytes) else None

    def _by_index(
        self, index: _Index, needle: _Needle, start: int, end: int, stop: Callable[[], bool]
    ) -> Iterator[int]:
        for firsts, lasts in index.candidates(needle.buckets(), start, end):
            begins = self._offsets[firsts].tolist()
            ends = self._offsets[lasts].tolist()
            numbers = zip(firsts.tolist(), lasts.tolist(), strict=True)
            for (first, last), begin, behind in zip(numbers, begins, ends, strict=True):
                if stop():
                    raise _Stopped
                # Most candidates of common letters end here, so this is all that they cost.
                if needle.may_be_in(self._lines[begin:behind]):
                    yield from self._in_chunk(needle, max(first, start), min(last, end))
                    start = max(start, last)  # a long document has many blocks

    def _by_scan(
        self, needle: _Needle, start: int, end: int, stop: Callable[[], bool]
    ) -> Iterator[int]:
        for first, last in self._chunk_ranges(start, end):
            if stop():
                raise _Stopped
            yield from self._in_chunk(needle, first, last)

    def chunks(self) -> Iterator[tuple[int, Bytes]]:
        """(number of the first document, stored lines), about CHUNK_BYTES at a time."""
        for first, last in self._chunk_ranges(0, len(self)):
            yield first, self._line(first, last)

    def _chunk_ranges(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        while start < end:
            limit = int(self._offsets[start]) + CHUNK_BYTES
            last = int(np.searchsorted(self._offsets, limit, side="right")) - 1
            last = min(max(last, start + 1), end)
            yield start, last
            start = last

    def _in_chunk(self, needle: _Needle, first: int, last: int) -> Iterator[int]:
        """Which of the documents `first` to `last` - 1 hold it."""
        if first >= last:
            return
        chunk = self._line(first, last)
        begin = int(self._offsets[first])
        numbers = set()
        for finder in needle.finders(chunk):
            at = finder(0)
            while at >= 0:
                number = int(np.searchsorted(self._offsets, begin + at, side="right")) - 1
                numbers.add(number)
                at = finder(int(self._offsets[number + 1]) - begin)
        for number in sorted(numbers):
            if needle.is_in(self._line(number, number + 1)):
                yield number

    def _line(self, first: int, last: int) -> Bytes:
        """The stored lines of documents `first` to `last` - 1."""
        return self._lines[int(self._offsets[first]) : int(self._offsets[last])]


class _Stopped(Exception):
    """Whoever asked wants no answer any more."""


class _Needle:
    """A query in the forms that it is looked for."""

    def __init__(self, query: str) -> None:
        self.folded = _encodable(query[:_LETTERS]).casefold()
        # As it stands in a line of JSON. Escapes and folding do not disturb each other (no escaped
        # character folds), so a text that holds the query has it in its line; not the other way
        # round ("n" is in "\\n"), which `is_in` sorts out.
        escaped = json.dumps(self.folded, ensure_ascii=False)[1:-1]
        self.bytes = escaped.encode()
        # The longest part that stands in the line as it is, but for capital letters of ASCII.
        plain = max(_PLAIN.findall(escaped), key=len, default="")
        self.key = plain.encode()
        self._escaped = escaped

    def may_be_in(self, lines: Bytes) -> bool:
        """False only where no document in these lines holds the query."""
        if self.key and self.key in lines.lower():
            return True
        return not lines.isascii() and any(finder(0) >= 0 for finder in self.finders(lines))

    def finders(self, lines: Bytes) -> Iterator[Callable[[int], int]]:
        """Functions like `lines.find(..., start)`: together they come upon every line whose
        document holds the query, and upon some others."""
        if self.key:
            yield partial(lines.lower().find, self.key)
            for lead, letters in _FOLD_TO_ASCII if self.key.upper() != self.key else ():
                if lead in lines:
                    yield from (partial(lines.find, letter) for letter in letters)
        elif not lines.isascii():
            yield partial(self._next_line, lines)

    def _next_line(self, lines: Bytes, start: int) -> int:
        """The byte at which the next line with the query begins, -1 where there is none."""
        while start < len(lines):
            end = lines.find(b"\n", start + _FOLDED_AT_ONCE)
            piece = lines[start : end + 1] if end >= 0 else lines[start:]
            folded = piece.decode().casefold()
            at = folded.find(self._escaped)
            if at >= 0:
                for _ in range(folded.count("\n", 0, at)):
                    start = lines.index(b"\n", start) + 1
                return start
            start += len(piece)
        return -1

    def is_in(self, line: Bytes) -> bool:
        row = json.loads(line)
        return (
            self.folded in row["text"].casefold() or self.folded in row.get("title", "").casefold()
        )

    def buckets(self) -> NDArray[np.int64]:
        """Where in a signature the bits of every block lie in which the query begins."""
        triples = np.unique(_buckets(self.bytes[: _OVERLAP + 2]))
        # Some from all over it where there are many.
        chosen = np.linspace(0, len(triples) - 1, min(TRIPLES, len(triples))).astype(int)
        return triples[chosen]


def _encodable(text: str) -> str:
    """What is typed may hold half a surrogate pair; stored text has a replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _fold(lines: bytes) -> bytes:
    """Stored lines as they are looked for; line breaks stay where they are."""
    return lines.lower() if lines.isascii() else lines.decode().casefold().encode()


def _buckets(folded: bytes | NDArray[np.uint8]) -> NDArray[np.int64]:
    """The hash of each three bytes in a row: [n] -> [n - 2], each below _BUCKETS."""
    values = np.frombuffer(folded, np.uint8) if isinstance(folded, bytes) else folded
    wide = values.astype(np.uint32)
    joined = wide[:-2] | (wide[1:-1] << np.uint32(8)) | (wide[2:] << np.uint32(16))
    # Knuth's multiplicative hash: the upper bits depend on all the lower ones.
    hashed = (joined * np.uint32(2654435761)) >> np.uint32(32 - _BUCKETS_LOG2)
    return hashed.astype(np.int64)


class _Index:
    """An index as it lies on disk: header, bits of the segments, first document of each block."""

    def __init__(self, path: Path) -> None:
        self._data = np.memmap(path, np.uint8, "r")
        if len(self._data) < _HEADER:
            raise ValueError("too short")
        magic, version, self._documents, self._bytes, self._blocks = (
            int(number) for number in self._data[:40].view(np.int64)
        )
        self._segments = -(-self._blocks // _SEGMENT)
        begin = _HEADER + self._segments * _SEGMENT_BYTES
        whole = begin + 8 * (self._blocks + 1)
        if (magic, version) != (_MAGIC, _VERSION) or len(self._data) != whole:
            raise ValueError("of another kind, or cut off")
        self._first = self._data[begin:].view(np.int64)

    def fits(self, documents: int, size: int) -> bool:
        return (documents, size) == (self._documents, self._bytes)

    def candidates(
        self, buckets: NDArray[np.int64], start: int, end: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """(first, last + 1) of the documents of every block that may hold them, in order, a
        segment at a time."""
        low = max(int(np.searchsorted(self._first, start, side="left")) - 1, 0)
        for segment in range(low // _SEGMENT, self._segments):
            base = segment * _SEGMENT
            if self._first[base] >= end:
                return
            at = _HEADER + segment * _SEGMENT_BYTES
            bits = self._data[at : at + _SEGMENT_BYTES].reshape(_BUCKETS, _SEGMENT // 8)
            blocks = np.unpackbits(np.bitwise_and.reduce(bits[buckets], axis=0)).nonzero()[0] + base
            blocks = blocks[(blocks >= low) & (blocks < self._blocks)]
            # What begins in a block is of its first document, or of a later one up to the one with
            # which the next block begins.
            lasts = np.minimum(self._first[blocks + 1] + 1, self._documents)
            yield np.asarray(self._first[blocks]), lasts


def build_index(folder: Path, progress: Progress = SILENT) -> None:
    """Write the index of the documents in `folder`, unless it is there. Memory stays flat.

    It appears under its name only when it is whole: a stopped or failed one leaves nothing.
    """
    with DocumentSearch(folder) as search:
        if search.indexed:
            return
        part = folder / f"{INDEX}.part"
        try:
            with part.open("wb") as file:
                builder, done = _Builder(file), 0
                for first, lines in search.chunks():
                    progress.check()
                    builder.add(first, _fold(lines))
                    done += len(lines)
                    progress.report(done, search.bytes)
                builder.finish(len(search), search.bytes)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, folder / INDEX)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise


class _Builder:
    """Signatures of chunk after chunk, written segment by segment."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._file.write(bytes(_HEADER))
        self._bits = np.zeros((_BUCKETS, _SEGMENT // 8), np.uint8)
        self._filled = 0  # blocks of the current segment
        self._first: list[NDArray[np.int64]] = []
        self._blocks = 0

    def add(self, first: int, folded: bytes) -> None:
        """`folded` lines, of which the first is that of document `first`."""
        values = np.frombuffer(folded, np.uint8)
        ends = np.flatnonzero(values == 10)
        for begin in range(0, len(values), CHUNK_BYTES):
            size = min(CHUNK_BYTES, len(values) - begin)
            # Bits come in eights: what is missing of the last eight are blocks without a bit.
            blocks = -(-size // _BLOCK)
            padded = -(-blocks // 8) * 8
            if self._filled + padded > _SEGMENT:
                self._write()
            self._sign(values[begin : begin + size + _OVERLAP + 2], size, padded)
            starts = begin + np.minimum(np.arange(padded) * _BLOCK, size - 1)
            self._first.append(first + np.searchsorted(ends, starts))
            self._blocks += padded

    def _sign(self, values: NDArray[np.uint8], size: int, padded: int) -> None:
        """Bits of the blocks of the first `size` values; what follows is overlap."""
        signs = np.zeros((_BUCKETS, padded), bool)
        if len(values) >= 3:
            hashes = _buckets(values)
            places = np.arange(len(hashes))
            own = places < size
            signs[hashes[own], places[own] // _BLOCK] = True
            over = (places % _BLOCK < _OVERLAP) & (places >= _BLOCK)
            signs[hashes[over], places[over] // _BLOCK - 1] = True
        at = self._filled // 8
        self._bits[:, at : at + padded // 8] = np.packbits(signs, axis=1)
        self._filled += padded

    def _write(self) -> None:
        """The segment's bits; where it is not full, the blocks that are missing hold nothing."""
        missing = _SEGMENT - self._filled
        if missing:
            self._first.append(np.full(missing, self._first[-1][-1]))
            self._blocks += missing
        self._file.write(self._bits.tobytes())
        self._bits[:] = 0
        self._filled = 0

    def finish(self, documents: int, size: int) -> None:
        blocks = self._blocks
        if self._filled:
            self._file.write(self._bits.tobytes())
        for numbers in self._first:
            self._file.write(numbers.astype(np.int64).tobytes())
        self._file.write(np.int64(documents).tobytes())
        self._file.seek(0)
        header = [_MAGIC, _VERSION, documents, size, blocks]
        self._file.write(np.asarray(header, np.int64).tobytes())
