"""Lines of text files, numbered, with `\\n`, `\\r\\n` or `\\r` at their ends; and plain text."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from mistudio.engine.datasets.documents import Document
from mistudio.engine.datasets.files.encodings import (
    MARKING,
    MARKS,
    Encoding,
    detect,
    marks_made,
)
from mistudio.engine.datasets.files.listing import stem
from mistudio.engine.datasets.files.opening import Reading, open_bytes
from mistudio.engine.datasets.files.options import MAX_ROW, megabytes
from mistudio.errors import InvalidInput

# Plain text becomes documents of whole paragraphs, at least this many characters each, so that
# the held-out split can be by document.
PARAGRAPHS_PER_DOCUMENT = 1500
LINE_PIECE = 100_000  # longer "lines" of plain text are read in pieces, so that memory stays flat

TOO_LARGE = f"it is larger than {megabytes(MAX_ROW)}, the most that one row may hold."


@contextmanager
def open_text(reading: Reading, encoding: Encoding) -> Iterator[TextIO]:
    """The file's characters, line ends as they are; bytes that are none come as marks."""
    with open_bytes(reading) as stream:
        yield io.TextIOWrapper(stream, encoding.codec, errors=MARKING, newline="")


def lines(reading: Reading, piece: int) -> Iterator[tuple[int, str]]:
    """(number, line); of lines with more than `piece` characters, pieces with the same number.

    What is not valid in the file's encoding refuses the file with its line, or is replaced and
    counted, as bad rows are.
    """
    encoding = detect(reading)
    reading.rejected.encodings[str(encoding)] += 1
    marks_before = marks_made()
    number = 1
    with open_text(reading, encoding) as text:
        while line := text.readline(piece):
            if marks_made() != marks_before:
                line = without_marks(reading, number, line, encoding)
            yield number, line
            number += line.endswith(("\n", "\r"))


def rows_of_lines(reading: Reading) -> Iterator[tuple[int, str]]:
    """Lines that are rows: one that is too long is rejected without being held in memory."""
    too_long = 0
    for number, line in lines(reading, MAX_ROW):
        complete = line.endswith(("\n", "\r"))
        if number == too_long:
            continue
        if not complete and len(line) >= MAX_ROW:
            too_long = number
            reading.reject(number, TOO_LARGE, "A row is too large")
            continue
        yield number, line


def text_documents(reading: Reading) -> Iterator[Document]:
    """Plain text, cut between paragraphs."""
    title = stem(reading.file.path)
    paragraphs: list[str] = []
    length = 0
    for _, piece in lines(reading, LINE_PIECE):
        paragraphs.append(piece)
        length += len(piece)
        at_break = not piece.strip() or length >= 4 * PARAGRAPHS_PER_DOCUMENT
        if length >= PARAGRAPHS_PER_DOCUMENT and at_break:
            yield Document("".join(paragraphs).strip(), title)
            paragraphs, length = [], 0
    if paragraphs:
        yield Document("".join(paragraphs).strip(), title)


def without_marks(reading: Reading, number: int, line: str, encoding: Encoding) -> str:
    found = MARKS.search(line)
    if found is None:
        return line
    if not reading.options.skips:
        raise InvalidInput(
            f"The file is not valid {encoding}",
            f"{reading.file.name}, line {number}: byte 0x{ord(found.group()) - 0xDC00:02x} is no "
            "character there.",
            "Choose the right encoding (--encoding), save the file as UTF-8, or let what cannot "
            "be read be replaced (--skip-bad-rows).",
            field="encoding",
        )
    line, replaced = MARKS.subn("\N{REPLACEMENT CHARACTER}", line)
    reading.rejected.replaced += replaced
    return line
