"""Local files and folders -> documents, and what one sees of them before they are read.

Text (txt, md), JSON lines, JSON, CSV, TSV, Parquet and Arrow, plain or packed with gzip or zstd.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from mistudio.engine.datasets.documents import Document, Limit, limited
from mistudio.engine.datasets.files.arrow_rows import arrow_columns, arrow_documents
from mistudio.engine.datasets.files.csv_rows import csv_heading, csv_rows
from mistudio.engine.datasets.files.json_rows import json_rows, jsonl_rows
from mistudio.engine.datasets.files.lines import text_documents
from mistudio.engine.datasets.files.listing import (
    COMPRESSIONS,
    SUFFIXES,
    SourceFile,
    find_files,
    kind_of,
    shown,
    stem,
)
from mistudio.engine.datasets.files.opening import Reading
from mistudio.engine.datasets.files.options import (
    DEFAULTS,
    MAX_ROW,
    BadRow,
    ReadOptions,
    Rejected,
)
from mistudio.engine.datasets.files.rows import GUESS_ROWS, row_documents
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import CorruptFile, InvalidInput, UserError

__all__ = [
    "COMPRESSIONS",
    "MAX_ROW",
    "SUFFIXES",
    "BadRow",
    "FilePreview",
    "ReadOptions",
    "Rejected",
    "columns",
    "describe",
    "documents_of_rows",
    "find_files",
    "is_readable",
    "local_files",
    "read_documents",
    "shown",
    "stem",
]

_ROWS = {".jsonl": jsonl_rows, ".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows}
PREVIEW_DOCUMENTS = 20
PREVIEW_CHARACTERS = 2000


@dataclass(frozen=True)
class FilePreview:
    """What a file or folder holds, told from its beginning. `encoding` is the codec (`utf-8`) and
    `encoding_name` what people read; both empty for formats that have none of their own. `first`
    are the first documents, long ones cut off."""

    files: int
    bytes: int
    formats: tuple[str, ...]
    encoding: str
    encoding_name: str
    columns: tuple[str, ...]
    text_column: str | None
    chat: bool
    splits: tuple[str, ...]
    first: tuple[Document, ...]
    rejected: Rejected
    problem: UserError | None = None


def read_documents(
    path: Path,
    options: ReadOptions = DEFAULTS,
    rejected: Rejected | None = None,
    progress: Progress = SILENT,
) -> Iterator[Document]:
    """Documents of a file or folder, one at a time, those of one split side by side.

    A row that cannot be read refuses the whole file with its line number, or is counted in
    `rejected` and left out, as `options.bad_rows` says; so is a file that cannot be read in a
    folder where others can. The progress counts bytes on disk.
    """
    rejected = Rejected() if rejected is None else rejected
    documents = _all_documents(path, options, rejected, progress)
    with closing(documents):
        yield from limited(documents, options.limit)


def documents_of_rows(
    rows: Iterable[object], name: str, options: ReadOptions, rejected: Rejected | None = None
) -> Iterator[Document]:
    """Documents of rows that come from elsewhere than a file (dictionaries, usually): the same
    choice of column, the same conversations, the same bad rows, counted from 1.

    The limits of `options` are the caller's matter.
    """
    file = SourceFile(Path(name), name, ".arrow", "", 0, 0)
    reading = Reading(file, options, Rejected() if rejected is None else rejected)
    return row_documents(reading, enumerate(rows, start=1))


def local_files(path: Path) -> list[Path]:
    """The readable files that a path stands for, refused with a sentence where there are none."""
    return [file.path for file in find_files(path).files]


def is_readable(path: Path) -> bool:
    """Whether the name is one of a file that we read; says nothing on what is inside."""
    return kind_of(path) is not None


def columns(path: Path) -> list[str]:
    """The columns to choose the text from; empty for plain text."""
    return list(_columns(Reading(find_files(path).files[0], ReadOptions(bad_rows="skip"))))


def describe(path: Path, options: ReadOptions = DEFAULTS) -> FilePreview:
    """What the Add dialog shows. Only the beginning of the first file is read.

    Where no text can be found in a column, `problem` says so and the columns are there to choose
    from; any other fault is raised.
    """
    found = find_files(path)
    rejected = Rejected(left_out=found.left_out())
    reading = Reading(found.files[0], replace(options, bad_rows="skip"), rejected)
    names = _columns(reading)
    first, problem = _beginning(reading)
    return FilePreview(
        files=len(found.files),
        bytes=found.bytes,
        formats=tuple(dict.fromkeys(file.format for file in found.files)),
        encoding=reading.codec,
        encoding_name=next(iter(rejected.encodings), ""),
        columns=names,
        text_column=reading.column,
        chat=any(document.messages for document in first),
        splits=tuple(dict.fromkeys(file.split for file in found.files if file.split)),
        first=first,
        rejected=rejected,
        problem=problem,
    )


def _beginning(reading: Reading) -> tuple[tuple[Document, ...], UserError | None]:
    documents = _documents_of(reading)
    try:
        with closing(documents):
            first = islice(limited(documents, Limit()), PREVIEW_DOCUMENTS)
            return tuple(_cut(document) for document in first), None
    except InvalidInput as exc:
        if exc.field != "text_column":
            raise
        return (), exc


def _all_documents(
    path: Path, options: ReadOptions, rejected: Rejected, progress: Progress
) -> Generator[Document, None, None]:
    found = find_files(path)
    rejected.left_out.extend(found.left_out())
    problem: UserError | None = None
    done, any_read = 0, False
    for file in found.files:
        reading = Reading(file, options, rejected, progress, done, found.bytes)
        try:
            for document in _documents_of(reading):
                any_read = True
                yield replace(document, split=file.split) if file.split else document
        except (CorruptFile, InvalidInput) as exc:
            if not options.skips or len(found.files) == 1:
                raise
            problem = problem or exc
            rejected.add(BadRow(file.name, 0, f"{exc.title}. {exc.what}"))
        done += file.size
    if problem and not any_read:
        raise problem


def _documents_of(reading: Reading) -> Generator[Document, None, None]:
    format = reading.file.format
    if format in _ROWS:
        yield from row_documents(reading, _ROWS[format](reading))
    elif format in (".parquet", ".arrow"):
        yield from arrow_documents(reading)
    else:
        yield from text_documents(reading)


def _columns(reading: Reading) -> tuple[str, ...]:
    quiet = replace(reading, rejected=Rejected())
    match reading.file.format:
        case ".parquet" | ".arrow":
            return tuple(arrow_columns(quiet))
        case ".csv" | ".tsv":
            return tuple(csv_heading(quiet))
        case ".jsonl" | ".json":
            rows = islice(_ROWS[reading.file.format](quiet), GUESS_ROWS)
            names = (name for _, row in rows if isinstance(row, dict) for name in row)
            return tuple(dict.fromkeys(names))
        case _:
            return ()


def _cut(document: Document) -> Document:
    return replace(
        document,
        text=document.text[:PREVIEW_CHARACTERS],
        messages=tuple((r, c[:PREVIEW_CHARACTERS]) for r, c in document.messages[:20]),
    )
