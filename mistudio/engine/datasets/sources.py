"""Local files -> documents: plain text, JSON lines, JSON, CSV and TSV, and folders of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

from mistudio.engine.datasets.documents import Document
from mistudio.errors import CorruptFile, InvalidInput, NotFound

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv")
# Column names that usually hold the text, best first.
TEXT_COLUMNS = ("text", "content", "body", "document", "story", "article", "passage", "sentence")
# Plain text becomes documents of whole paragraphs, at least this many characters each, so that
# the held-out split can be by document.
PARAGRAPHS_PER_DOCUMENT = 1500
MAX_JSON_BYTES = 512 * 1024**2
GUESS_ROWS = 50  # the text column is guessed once for a file, from this many rows
LINE_PIECE = 100_000  # longer "lines" of plain text are read in pieces, so that memory stays flat

Row = tuple[int, object]  # line number, what stands there


def local_files(path: Path) -> list[Path]:
    """The readable files that a path stands for, refused with a sentence where there are none."""
    if not path.exists():
        raise NotFound("File not found", f"There is nothing at {path}.", "Check the path.")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES)
        if not files:
            raise InvalidInput(
                "No text files in this folder",
                f"{path} holds none of {', '.join(SUFFIXES)}.",
                "Choose a folder with text files, or a single file.",
            )
    elif path.suffix.lower() in SUFFIXES:
        files = [path]
    else:
        raise InvalidInput(
            "This kind of file cannot be read",
            f"{path.name} is not one of {', '.join(SUFFIXES)}.",
            "Convert it to one of these (JSON lines keeps titles and topics).",
        )
    for file in files:
        check_is_text(file)
    return files


def check_is_text(file: Path) -> None:
    """Refuse empty and binary files before anything is written."""
    if file.stat().st_size == 0:
        raise InvalidInput(
            "The file is empty", f"{file} has 0 bytes.", "Choose a file with text in it."
        )
    with file.open("rb") as handle:
        head = handle.read(65536)
    if b"\0" in head:
        raise InvalidInput(
            "This is not a text file",
            f"{file.name} contains zero bytes, as binary files (and UTF-16 text) do.",
            "Choose a text file; save UTF-16 text as UTF-8 first.",
        )


def read_documents(
    path: Path, text_column: str | None = None, skipped: list[str] | None = None
) -> Iterator[Document]:
    """Documents of a file or folder, one at a time.

    A row that cannot be read refuses the whole file with its line number; where a list is given
    as `skipped`, the row is left out instead and named there (`file.jsonl:12`).
    """
    for file in local_files(path):
        suffix = file.suffix.lower()
        if suffix in _ROWS:
            yield from _from_rows(file, _ROWS[suffix](file, skipped), text_column, skipped)
        else:
            yield from _read_text(file)


def columns(path: Path) -> list[str]:
    """The columns to choose the text from; empty for plain text."""
    file = local_files(path)[0]
    match file.suffix.lower():
        case ".csv" | ".tsv":
            with _open(file) as handle:
                return next(csv.reader(handle, delimiter=_delimiter(file)), [])
        case ".jsonl":
            with _open(file) as handle:
                first = next((line for line in handle if line.strip()), "{}")
            try:
                row = json.loads(first)
            except json.JSONDecodeError:
                return []
            return list(row) if isinstance(row, dict) else []
        case ".json":
            rows = _json_rows(file)
            return list(rows[0]) if rows and isinstance(rows[0], dict) else []
        case _:
            return []


def _open(file: Path) -> TextIO:
    return file.open("r", encoding="utf-8-sig", newline="")


def _lines(file: Path, piece: int = -1) -> Iterator[tuple[int, str]]:
    """(line number, line), with a clear refusal where the bytes are not UTF-8. Lines of more than
    `piece` characters come in pieces."""
    number = 1
    try:
        with _open(file) as handle:
            while line := handle.readline(piece):
                yield number, line
                number += line.endswith(("\n", "\r"))
    except UnicodeDecodeError as exc:
        raise InvalidInput(
            "The file is not UTF-8 text",
            f"{file.name}, at or after line {number}: byte 0x{exc.object[exc.start]:02x} is not "
            "valid there.",
            "Save the file as UTF-8 (most editors can), then add it again.",
        ) from exc


def _read_text(file: Path) -> Iterator[Document]:
    paragraphs: list[str] = []
    length = 0
    for _, piece in _lines(file, LINE_PIECE):
        paragraphs.append(piece)
        length += len(piece)
        at_break = not piece.strip() or length >= 4 * PARAGRAPHS_PER_DOCUMENT
        if length >= PARAGRAPHS_PER_DOCUMENT and at_break:
            yield Document("".join(paragraphs).strip(), title=file.stem)
            paragraphs, length = [], 0
    if paragraphs:
        yield Document("".join(paragraphs).strip(), title=file.stem)


def _jsonl_rows(file: Path, skipped: list[str] | None) -> Iterator[Row]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as exc:
            if skipped is not None:
                skipped.append(f"{file.name}:{number}")
                continue
            raise CorruptFile(
                "A line is not valid JSON",
                f"{file.name}, line {number}{_json_fault(exc)}.",
                "Mend that line, or add the file again and let bad rows be skipped "
                "(--skip-bad-rows).",
            ) from exc
        yield number, row


def _json_file_rows(file: Path, skipped: list[str] | None) -> Iterator[Row]:
    return iter(enumerate(_json_rows(file), start=1))


def _json_fault(exc: Exception) -> str:
    if isinstance(exc, json.JSONDecodeError):
        return f", column {exc.colno}: {exc.msg}"
    return ": it is nested too deeply" if isinstance(exc, RecursionError) else f": {exc}"


def _json_rows(file: Path) -> list[object]:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise InvalidInput(
            "This JSON file is too large to read at once",
            f"{file.name} has {file.stat().st_size / 1e6:.0f} MB; the limit is "
            f"{MAX_JSON_BYTES / 1e6:.0f} MB.",
            "Save it as JSON lines (.jsonl), which is read line by line.",
        )
    text = "".join(line for _, line in _lines(file))
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as exc:
        line = f", line {exc.lineno}" if isinstance(exc, json.JSONDecodeError) else ""
        raise CorruptFile(
            "The file is not valid JSON",
            f"{file.name}{line}{_json_fault(exc)}.",
            "Mend the file, or rename it to .jsonl if it holds one object a line.",
        ) from exc
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else [rows]
    return rows if isinstance(rows, list) else [rows]


def _csv_rows(file: Path, skipped: list[str] | None) -> Iterator[Row]:
    csv.field_size_limit(10_000_000)
    rows = csv.DictReader(
        (line for _, line in _lines(file)), delimiter=_delimiter(file), strict=True
    )
    ended = 0
    try:
        _ = rows.fieldnames  # reads the heading
        ended = rows.line_num
        for row in rows:
            yield ended + 1, row
            ended = rows.line_num
    except csv.Error as exc:
        raise CorruptFile(
            "The table cannot be read",
            f"{file.name}, the row that begins at line {ended + 1}: {exc}.",
            "Mend that row (often an open quotation mark), then add the file again.",
        ) from exc


def _from_rows(
    file: Path, rows: Iterator[Row], text_column: str | None, skipped: list[str] | None
) -> Iterator[Document]:
    """The documents of a table or a list of objects; all take their text from one column."""
    first = list(islice(rows, GUESS_ROWS))
    column = _text_column(file, [row for _, row in first if isinstance(row, dict)], text_column)
    for number, row in chain(first, rows):
        document = _document(file, number, row, column, skipped)
        if document:
            yield document


def _document(
    file: Path, number: int, row: object, column: str | None, skipped: list[str] | None
) -> Document | None:
    if isinstance(row, str) and column is None:
        return Document(row)
    value = row.get(column) if isinstance(row, dict) and column else None
    if isinstance(row, dict) and isinstance(value, str):
        return Document(value, _string(row.get("title")), _string(row.get("topic")))
    if skipped is not None:
        skipped.append(f"{file.name}:{number}")
        return None
    if not isinstance(row, dict):
        fault = f"it is {_kind(row)}, not an object with columns."
    elif column not in row or value is None:
        fault = f"it has nothing in the column {column!r}."
    else:
        fault = f"column {column!r} holds {_kind(value)}, not text."
    raise InvalidInput(
        "A row has no text",
        f"{file.name}, row at line {number}: {fault}",
        "Choose the text column (--text-column), or let bad rows be skipped (--skip-bad-rows).",
        field="text_column",
    )


def _text_column(file: Path, rows: list[dict[str, object]], wanted: str | None) -> str | None:
    """The column to read, chosen once for the whole file; None where the rows are bare texts."""
    if not rows:
        return wanted
    names = list(dict.fromkeys(name for row in rows for name in row))
    if wanted is not None:
        if wanted not in names:
            raise InvalidInput(
                "No such column",
                f"{file.name} has the columns {_listed(names)}; {wanted!r} is not among them.",
                "Choose one of these as the text column.",
                field="text_column",
            )
        return wanted
    lengths = {
        name: sum(len(value) for row in rows if isinstance(value := row.get(name), str))
        for name in names
        if isinstance(name, str)
    }
    lengths = {name: length for name, length in lengths.items() if length}
    for name in TEXT_COLUMNS:
        if name in lengths:
            return name
    if lengths:
        return max(lengths, key=lambda name: lengths[name])
    raise InvalidInput(
        "No text column",
        f"{file.name} has the columns {_listed(names)}; none holds text.",
        "Name the text column (--text-column).",
        field="text_column",
    )


def _listed(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in names if name is not None) or "(none)"


def _kind(value: object) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return names.get(type(value), "a number")


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _delimiter(file: Path) -> str:
    return "\t" if file.suffix.lower() == ".tsv" else ","


_ROWS = {
    ".jsonl": _jsonl_rows,
    ".json": _json_file_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
}
