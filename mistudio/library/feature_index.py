"""Full-text search over the features of one discovery: what its rule says, the tokens it fires on,
the tokens it promotes, the text of its examples. A SQLite file with an FTS5 table in the
discovery's own folder; what the user writes is not in it, that changes and is searched in memory.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from mistudio.errors import CorruptFile

FILE = "search.sqlite"
FIELDS = ("description", "tokens", "logits", "context")
# Unicode's words, without accents; the index also holds the first letters of each, as people see
# results while they type. Which column a word is in is kept, where in it is not.
_SCHEMA = (
    f"CREATE VIRTUAL TABLE features USING fts5({', '.join(FIELDS)}, content='', "
    "tokenize=\"unicode61 remove_diacritics 2\", detail='column', prefix='1 2 3')"
)


@dataclass(frozen=True)
class IndexRow:
    """The texts of one feature."""

    description: str
    tokens: str
    logits: str
    context: str


def build(path: Path, rows: Iterable[IndexRow]) -> None:
    """Write the index of features 0, 1, ... into a new file."""
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=OFF")  # the whole folder appears or does not
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute(_SCHEMA)
        connection.execute("BEGIN")
        marks = ", ".join("?" for _ in range(len(FIELDS) + 1))
        connection.executemany(
            f"INSERT INTO features (rowid, {', '.join(FIELDS)}) VALUES ({marks})",
            ((number, *map(_clean, astuple(row))) for number, row in enumerate(rows)),
        )
        connection.execute("INSERT INTO features (features) VALUES ('optimize')")
        connection.execute("COMMIT")
    finally:
        connection.close()


class FeatureIndex:
    """An index, opened for reading; safe to use from any thread, one at a time."""

    def __init__(self, path: Path) -> None:
        """CorruptFile where there is no index, or something else."""
        self._path, self._lock = path, threading.Lock()
        try:
            self._connection = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
            )
            self._connection.execute("SELECT rowid FROM features LIMIT 1").fetchall()
        except sqlite3.DatabaseError as exc:
            raise self._damaged() from exc

    def search(self, text: str, fields: Sequence[str] = FIELDS) -> np.ndarray:
        """int32: the features in whose texts every word of `text` begins some word, ascending.
        None where the text has no words."""
        words = re.findall(r"[^\W_]+", text)
        if not words or not fields:
            return np.empty(0, np.int32)
        wanted = " AND ".join(f'"{word}"*' for word in words)
        chosen = " ".join(field for field in FIELDS if field in fields)
        try:
            with self._lock:
                # As one text: a row each would hold the interpreter for 35 ms per 100,000 hits,
                # in which the window stands still; so it is 10 ms, and hardly any of Python.
                found = self._connection.execute(
                    "SELECT group_concat(rowid) FROM features WHERE features MATCH ?",
                    (f"{{{chosen}}} : ({wanted})",),
                ).fetchone()[0]
        except sqlite3.DatabaseError as exc:
            raise self._damaged() from exc
        return np.sort(np.fromstring(found, np.int32, sep=",")) if found else np.empty(0, np.int32)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _damaged(self) -> CorruptFile:
        return CorruptFile(
            "The search index is damaged",
            f"{self._path} is missing or not what was written.",
            "Discover the features of this SAE again.",
        )


def _clean(text: str) -> str:
    """What SQLite can hold: halves of characters that a token was cut in are dropped."""
    return text.replace("\0", " ").encode("utf-8", "ignore").decode()
