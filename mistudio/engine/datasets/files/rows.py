"""Rows -> documents: which column holds the text, and what a row's cell says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice

from mistudio.engine.datasets.chat import CHAT_COLUMNS, messages_of, plain_reading
from mistudio.engine.datasets.documents import Document
from mistudio.engine.datasets.files.lines import TOO_LARGE
from mistudio.engine.datasets.files.opening import Reading
from mistudio.engine.datasets.files.options import MAX_ROW
from mistudio.errors import InvalidInput

# Column names that usually hold the text, best first.
TEXT_COLUMNS = ("text", "content", "body", "document", "story", "article", "passage", "sentence")
GUESS_ROWS = 50  # the text column is guessed once for a file, from this many rows

Row = tuple[int, object]  # line number, what stands there


def row_documents(reading: Reading, rows: Iterable[Row]) -> Iterator[Document]:
    """The documents of a table or a list of objects; all take their text from one column.

    Memory: GUESS_ROWS rows while the column is guessed, but never more than about MAX_ROW.
    """
    rows = iter(rows)
    first = _first_rows(rows)
    column = choose_column(reading, [row for _, row in first if isinstance(row, dict)])
    reading.column = column
    for number, row in chain(first, rows):
        if document := row_document(reading, number, row, column):
            yield document


def _first_rows(rows: Iterator[Row]) -> list[Row]:
    first: list[Row] = []
    size = 0
    for number, row in islice(rows, GUESS_ROWS):
        first.append((number, row))
        size += _weight(row)
        if size > MAX_ROW:
            break
    return first


def _weight(row: object) -> int:
    if isinstance(row, dict):
        return sum(len(value) for value in row.values() if isinstance(value, str))
    return len(row) if isinstance(row, str) else 0


def row_document(reading: Reading, number: int, row: object, column: str | None) -> Document | None:
    """A row's document; None where the row is bad and was counted."""
    if isinstance(row, str) and column is None:
        return _document(reading, number, row, {})
    if isinstance(row, dict) and column is not None:
        return _of_cell(reading, number, row, column)
    if messages := messages_of(row):
        return Document(plain_reading(messages), messages=messages)
    reading.reject(number, f"it is {kind_of_value(row)}, not an object with columns.")
    return None


def _of_cell(reading: Reading, number: int, row: dict[str, object], column: str) -> Document | None:
    value = row.get(column)
    if isinstance(value, str):
        return _document(reading, number, value, row)
    if value is None:
        reading.reject(number, f"it has nothing in the column {column!r}.")
    elif messages := messages_of(value):
        return Document(plain_reading(messages), *_labels(row), messages=messages)
    else:
        reading.reject(number, f"column {column!r} holds {kind_of_value(value)}, not text.")
    return None


def _document(reading: Reading, number: int, text: str, row: dict[str, object]) -> Document | None:
    if len(text) > MAX_ROW:
        reading.reject(number, TOO_LARGE, "A row is too large")
        return None
    return Document(text, *_labels(row))


def _labels(row: dict[str, object]) -> tuple[str, str]:
    title, topic = row.get("title"), row.get("topic")
    return title if isinstance(title, str) else "", topic if isinstance(topic, str) else ""


def choose_column(reading: Reading, rows: list[dict[str, object]]) -> str | None:
    """The column to read, chosen once for the whole file; None where the rows are bare texts.

    In this order: the user's, one with a usual name, one with conversations, the one with the
    longest texts.
    """
    wanted = reading.options.text_column
    if not rows:
        return wanted
    names = list(dict.fromkeys(name for row in rows for name in row))
    if wanted is not None:
        if wanted not in names:
            raise no_such_column(reading.file.name, wanted, names)
        return wanted
    lengths = {name: _text_length(rows, name) for name in names if isinstance(name, str)}
    lengths = {name: length for name, length in lengths.items() if length}
    for name in TEXT_COLUMNS:
        if name in lengths:
            return name
    for name in CHAT_COLUMNS:
        if any(messages_of(row.get(name)) for row in rows):
            return name
    if lengths:
        return max(lengths, key=lambda name: lengths[name])
    raise InvalidInput(
        "No text column",
        f"{reading.file.name} has the columns {listed(names)}; none holds text.",
        "Name the text column (--text-column).",
        field="text_column",
    )


def _text_length(rows: list[dict[str, object]], name: str) -> int:
    return sum(len(value) for row in rows if isinstance(value := row.get(name), str))


def no_such_column(file: str, wanted: str, names: list[str]) -> InvalidInput:
    return InvalidInput(
        "No such column",
        f"{file} has the columns {listed(names)}; {wanted!r} is not among them.",
        "Choose one of these as the text column.",
        field="text_column",
    )


def listed(names: Iterable[object], most: int = 20) -> str:
    """Names in a sentence; of many the first ones."""
    known = [str(name)[:80] for name in names if name is not None]
    more = f" and {len(known) - most:,} more" if len(known) > most else ""
    return (", ".join(known[:most]) or "(none)") + more


def kind_of_value(value: object) -> str:
    """What a value is, in words."""
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "a text", bytes: "bytes", type(None): "null"}
    return names.get(type(value), "a number")
