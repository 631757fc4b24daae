"""One table and its record type: read, add, change, remove. The SQL that is the same for all."""

from __future__ import annotations

import json
import sqlite3
import types
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar, get_origin, get_type_hints

from mistudio.errors import NotFound

if TYPE_CHECKING:
    from mistudio.library.library import Library

R = TypeVar("R")


def now() -> str:
    """The time of a record: ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Table(Generic[R]):
    """Rows of one table as frozen records. Fields typed dict or list are JSON text in SQLite."""

    name: ClassVar[str]
    noun: ClassVar[str]
    record: ClassVar[type]

    def __init__(self, library: Library) -> None:
        self._library = library
        hints = get_type_hints(self.record)
        self._fields = [field.name for field in fields(self.record)]
        self._json = {name for name in self._fields if _is_container(hints[name])}
        self._flags = {name for name in self._fields if hints[name] is bool}

    def all(self, where: str = "1", params: tuple[object, ...] = ()) -> list[R]:
        """Records newest first, limited by an SQL condition."""
        rows = self._library.rows(
            f"SELECT * FROM {self.name} WHERE {where} ORDER BY id DESC", params
        )
        return [self._decode(row) for row in rows]

    def get(self, record_id: int) -> R:
        """The record with this id; NotFound with a sentence otherwise."""
        rows = self._library.rows(f"SELECT * FROM {self.name} WHERE id = ?", (record_id,))
        if not rows:
            raise NotFound(
                f"No {self.noun} with number {record_id}",
                "It may have been deleted.",
                "Run `mistudio list` to see what the library holds.",
            )
        return self._decode(rows[0])

    def find(self, record_id: int) -> R | None:
        """The record, or None."""
        rows = self._library.rows(f"SELECT * FROM {self.name} WHERE id = ?", (record_id,))
        return self._decode(rows[0]) if rows else None

    def count(self) -> int:
        return int(self._library.rows(f"SELECT COUNT(*) AS n FROM {self.name}")[0]["n"])

    def add(self, **values: object) -> int:
        """Insert a row; `created_at` is filled in. Returns its id and tells the observers."""
        values.setdefault("created_at", now())
        columns = ", ".join(values)
        marks = ", ".join("?" for _ in values)
        cursor = self._library.execute(
            f"INSERT INTO {self.name} ({columns}) VALUES ({marks})", self._encode(values)
        )
        record_id = int(cursor.lastrowid or 0)
        self._library.note_change(self.name, record_id)
        return record_id

    def update(self, record_id: int, **values: object) -> None:
        sets = ", ".join(f"{column} = ?" for column in values)
        self._library.execute(
            f"UPDATE {self.name} SET {sets} WHERE id = ?", (*self._encode(values), record_id)
        )
        self._library.note_change(self.name, record_id)

    def remove(self, record_id: int) -> None:
        """Delete the row only; `Library.discard` also moves its files to the trash."""
        self._library.execute(f"DELETE FROM {self.name} WHERE id = ?", (record_id,))
        self._library.note_change(self.name, record_id)

    def _encode(self, values: Mapping[str, object]) -> tuple[object, ...]:
        return tuple(
            _json_text(value) if name in self._json else value for name, value in values.items()
        )

    def _decode(self, row: sqlite3.Row) -> R:
        values = {}
        for name in self._fields:
            value = row[name]
            if name in self._json:
                value = json.loads(value)
            elif name in self._flags:
                value = bool(value)
            values[name] = value
        return self.record(**values)


def _json_text(value: object) -> str:
    """JSON that SQLite can hold: halves of surrogate pairs, which stand for bytes in file names
    that are no UTF-8, are escaped."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, sort_keys=True)
    return text


def _is_container(hint: object) -> bool:
    origin = get_origin(hint)
    return (
        origin in (dict, list, tuple)
        or hint in (dict, list)
        or isinstance(hint, types.GenericAlias)
    )
