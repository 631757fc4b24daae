"""Local files -> documents: plain text, JSON lines, JSON, CSV and TSV, and folders of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from mistudio.engine.datasets.documents import Document
from mistudio.errors import CorruptFile, InvalidInput, NotFound

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv")
# Column names that usually hold the text, best first.
TEXT_COLUMNS = ("text", "content", "body", "document", "story", "article", "passage", "sentence")
# Plain text becomes documents of whole paragraphs, at least this many characters each, so that
# the held-out split can be by document.
PARAGRAPHS_PER_DOCUMENT = 1500
MAX_JSON_BYTES = 512 * 1024**2


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
        yield from _READERS[file.suffix.lower()](file, text_column, skipped)


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


def _open(file: Path):  # type: ignore[no-untyped-def]
    return file.open("r", encoding="utf-8-sig", newline="")


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number, line), with a clear refusal where the bytes are not UTF-8."""
    number = 0
    try:
        with _open(file) as handle:
            for number, line in enumerate(handle, start=1):
                yield number, line
    except UnicodeDecodeError as exc:
        raise InvalidInput(
            "The file is not UTF-8 text",
            f"{file.name}, after line {number}: byte 0x{exc.object[exc.start]:02x} is not valid "
            "there.",
            "Save the file as UTF-8 (most editors can), then add it again.",
        ) from exc


def _read_text(
    file: Path, text_column: str | None, skipped: list[str] | None
) -> Iterator[Document]:
    paragraphs: list[str] = []
    length = 0
    for _, line in _lines(file):
        # A "line" of many megabytes is cut so that memory stays flat.
        for start in range(0, max(len(line), 1), 100_000):
            piece = line[start : start + 100_000]
            paragraphs.append(piece)
            length += len(piece)
            at_break = not piece.strip() or length >= 4 * PARAGRAPHS_PER_DOCUMENT
            if length >= PARAGRAPHS_PER_DOCUMENT and at_break:
                yield Document("".join(paragraphs).strip(), title=file.stem)
                paragraphs, length = [], 0
    if paragraphs:
        yield Document("".join(paragraphs).strip(), title=file.stem)


def _read_jsonl(
    file: Path, text_column: str | None, skipped: list[str] | None
) -> Iterator[Document]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as exc:
            if skipped is not None:
                skipped.append(f"{file.name}:{number}")
                continue
            raise CorruptFile(
                "A line is not valid JSON",
                f"{file.name}, line {number}, column {exc.colno}: {exc.msg}.",
                "Mend that line, or add the file again and let bad rows be skipped "
                "(--skip-bad-rows).",
            ) from exc
        document = _document(file, number, row, text_column, skipped)
        if document:
            yield document


def _read_json(
    file: Path, text_column: str | None, skipped: list[str] | None
) -> Iterator[Document]:
    for number, row in enumerate(_json_rows(file), start=1):
        document = _document(file, number, row, text_column, skipped)
        if document:
            yield document


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
    except json.JSONDecodeError as exc:
        raise CorruptFile(
            "The file is not valid JSON",
            f"{file.name}, line {exc.lineno}, column {exc.colno}: {exc.msg}.",
            "Mend the file, or rename it to .jsonl if it holds one object a line.",
        ) from exc
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else [rows]
    return rows if isinstance(rows, list) else [rows]


def _read_csv(file: Path, text_column: str | None, skipped: list[str] | None) -> Iterator[Document]:
    csv.field_size_limit(10_000_000)
    rows = csv.DictReader(
        (line for _, line in _lines(file)), delimiter=_delimiter(file), strict=True
    )
    try:
        for row in rows:
            document = _document(file, rows.line_num, row, text_column, skipped)
            if document:
                yield document
    except csv.Error as exc:
        raise CorruptFile(
            "The table cannot be read",
            f"{file.name}, line {rows.line_num}: {exc}.",
            "Mend that line (often an open quotation mark), then add the file again.",
        ) from exc


def _document(
    file: Path, number: int, row: object, text_column: str | None, skipped: list[str] | None
) -> Document | None:
    if isinstance(row, str) and text_column is None:
        return Document(row)
    column = _text_column(file, row, text_column) if isinstance(row, dict) else None
    value = row.get(column) if isinstance(row, dict) and column else None
    if not isinstance(value, str):
        if skipped is not None:
            skipped.append(f"{file.name}:{number}")
            return None
        raise InvalidInput(
            "A row has no text",
            f"{file.name}, row at line {number}: "
            + (
                f"column {column!r} holds {type(value).__name__}, not text."
                if column
                else f"it is {type(row).__name__}, not an object with columns."
            ),
            "Choose the text column (--text-column), or let bad rows be skipped (--skip-bad-rows).",
            field="text_column",
        )
    assert isinstance(row, dict)
    return Document(value, _string(row.get("title")), _string(row.get("topic")))


def _text_column(file: Path, row: dict[str, object], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in row:
            raise InvalidInput(
                "No such column",
                f"{file.name} has the columns {', '.join(map(str, row)) or '(none)'}; "
                f"{wanted!r} is not among them.",
                "Choose one of these as the text column.",
                field="text_column",
            )
        return wanted
    for name in TEXT_COLUMNS:
        if isinstance(row.get(name), str):
            return name
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    if not texts:
        raise InvalidInput(
            "No text column",
            f"{file.name} has the columns {', '.join(map(str, row)) or '(none)'}; none holds text.",
            "Name the text column (--text-column).",
            field="text_column",
        )
    return max(texts, key=lambda name: len(texts[name]))


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _delimiter(file: Path) -> str:
    return "\t" if file.suffix.lower() == ".tsv" else ","


_READERS = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
