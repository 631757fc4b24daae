"""Rows of JSON lines and of JSON files; large JSON is read item by item (ijson)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

from mistudio.engine.datasets.chat import CHAT_COLUMNS, messages_of
from mistudio.engine.datasets.files.encodings import Encoding, detect
from mistudio.engine.datasets.files.lines import (
    TOO_LARGE,
    open_text,
    rows_of_lines,
    without_marks,
)
from mistudio.engine.datasets.files.opening import Reading
from mistudio.engine.datasets.files.options import MAX_ROW
from mistudio.engine.datasets.files.rows import TEXT_COLUMNS, Row
from mistudio.errors import CorruptFile, InvalidInput

TOO_DEEP = "it is nested too deeply"
# Brackets left open. The parser's work grows with their square, so that a million would take hours.
MAX_DEPTH = 10_000
# A string that is longer than a piece is looked through from its start with every further piece.
PIECE = 1 << 20


def jsonl_rows(reading: Reading) -> Iterator[Row]:
    """One JSON value a line; blank lines mean nothing."""
    for number, line in rows_of_lines(reading):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as exc:
            reading.reject(number, _fault(exc), "A line is not valid JSON")
            continue
        yield number, row


def json_rows(reading: Reading) -> Iterator[Row]:
    """The items of a JSON file: of a list, or of the list that an object holds; else the object.

    Files named .json that hold JSON lines are read as those. What is larger than a row may be is
    read item by item, the rest at once.
    """
    encoding = detect(reading)
    with open_text(reading, encoding) as text:
        start = text.read(MAX_ROW)
        whole = not text.read(1)
    if _is_json_lines(start):
        yield from jsonl_rows(reading)
    elif whole:
        yield from enumerate(_parsed(reading, start, encoding), start=1)
    else:
        yield from _streamed(reading, start.lstrip(), encoding)


def _fault(exc: Exception) -> str:
    if isinstance(exc, json.JSONDecodeError):
        return f"column {exc.colno}: {exc.msg}."
    return f"{TOO_DEEP}." if isinstance(exc, RecursionError) else f"{exc}."


def _is_json_lines(start: str) -> bool:
    """Whether the first line is a whole value and something follows on it."""
    line, _, rest = start.lstrip().partition("\n")
    if not rest.strip() or not line.rstrip().endswith(("}", "]")):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


# --- at once --------------------------------------------------------------------------------------


def _parsed(reading: Reading, text: str, encoding: Encoding) -> list[Any]:
    text = without_marks(reading, 1, text, encoding)
    reading.rejected.encodings[str(encoding)] += 1
    try:
        return _items(reading, json.loads(text))
    except (ValueError, RecursionError) as exc:
        line = f", line {exc.lineno}, " if isinstance(exc, json.JSONDecodeError) else ": "
        raise _invalid(reading, f"{line}{_fault(exc).rstrip('.')}") from exc


def _items(reading: Reading, value: Any) -> list[Any]:
    """The rows that a JSON value stands for."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    if _is_one_document(reading, value):
        return [value]
    lists = [entry for entry in value.values() if isinstance(entry, list) and entry]
    for entries in lists:
        if isinstance(entries[0], dict):
            return entries
    of_texts = [entries for entries in lists if isinstance(entries[0], str)]
    return of_texts[0] if len(of_texts) == 1 else [value]


def _is_one_document(reading: Reading, value: dict[str, Any]) -> bool:
    wanted = reading.options.text_column
    return (
        (wanted is not None and wanted in value)
        or any(isinstance(value.get(name), str) for name in TEXT_COLUMNS)
        or any(messages_of(value.get(name)) for name in CHAT_COLUMNS)
    )


def _invalid(reading: Reading, fault: str) -> CorruptFile:
    return CorruptFile(
        "The file is not valid JSON",
        f"{reading.file.name}{fault}.",
        "Mend the file, or rename it to .jsonl if it holds one object a line.",
    )


# --- item by item ---------------------------------------------------------------------------------


def _streamed(reading: Reading, start: str, encoding: Encoding) -> Iterator[Row]:
    import ijson

    prefix = "item" if start.startswith("[") else _list_in_object(reading, encoding)
    reading.rejected.encodings[str(encoding)] += 1
    number = 0
    with open_text(reading, encoding) as text:
        feed = _Feed(reading, text, encoding)
        try:
            for number, item in enumerate(
                ijson.items(feed, prefix, buf_size=PIECE, use_float=True), start=1
            ):
                feed.item_ended()
                yield number, item
        except (ijson.JSONError, ValueError, OverflowError) as exc:
            raise _invalid(reading, f", after item {number}: {_first_line(exc)}") from exc


def _list_in_object(reading: Reading, encoding: Encoding) -> str:
    """ijson's name for the items of the first list of objects in a large object, else of its first
    list of texts. It must begin within the first MAX_ROW characters."""
    import ijson

    texts = ""
    with open_text(reading, encoding) as text:
        feed = _Feed(reading, text, encoding)
        try:
            for prefix, kind in _lists(ijson.parse(feed, buf_size=PIECE, use_float=True)):
                if kind == "start_map":
                    return prefix
                texts = texts or (prefix if kind == "string" else "")
        except _TooLarge:
            pass
        except (ijson.JSONError, ValueError, OverflowError) as exc:
            raise _invalid(reading, f": {_first_line(exc)}") from exc
    if not texts:
        raise InvalidInput(
            "This JSON file has no list of rows",
            f"{reading.file.name} is one large object; a document may have up to "
            f"{MAX_ROW:,} characters.",
            "Save it as JSON lines (.jsonl), one object with a text a line.",
        )
    return texts


def _lists(events: Iterator[tuple[str, str, Any]]) -> Iterator[tuple[str, str]]:
    """(prefix of its items, kind of the first) for each list that stands directly in the object."""
    depth = 0
    begun = ""
    for prefix, event, _ in events:
        if begun:
            yield f"{begun}.item", event
            begun = ""
        if event in ("end_map", "end_array"):
            depth -= 1
        elif event in ("start_map", "start_array"):
            begun = prefix if event == "start_array" and depth == 1 else ""
            depth += 1


class _TooLarge(InvalidInput):
    pass


class _Feed:
    """The file as UTF-8 bytes for ijson; refuses an item that would not fit in memory."""

    def __init__(self, reading: Reading, text: TextIO, encoding: Encoding) -> None:
        self._reading, self._text, self._encoding = reading, text, encoding
        self._since_item = 0
        self._open = 0

    def item_ended(self) -> None:
        self._since_item = 0
        self._open = 0

    def read(self, size: int) -> bytes:
        piece = self._text.read(size)
        piece = without_marks(self._reading, 1, piece, self._encoding)
        self._since_item += len(piece)
        self._open += piece.count("[") + piece.count("{") - piece.count("]") - piece.count("}")
        if self._since_item > MAX_ROW or self._open > MAX_DEPTH:
            fault = TOO_LARGE if self._since_item > MAX_ROW else f"{TOO_DEEP}."
            raise _TooLarge(
                "A row is too large",
                f"{self._reading.file.name}, an item of the list: {fault}",
                "Split it into several, or save the file as JSON lines (.jsonl).",
            )
        return piece.encode("utf-8", "surrogatepass")


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or ["it cannot be read"])[0].strip()[:200]
