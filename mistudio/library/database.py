"""Opening the library's SQLite database and bringing it to this version's schema."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from mistudio.errors import CorruptFile, Incompatible
from mistudio.library import sqlite

PATIENCE_SECONDS = 5.0


def migrations() -> list[tuple[int, str]]:
    """Every numbered migration, in order: (number, SQL)."""
    found = []
    for entry in resources.files("mistudio.library.migrations").iterdir():
        match = re.fullmatch(r"(\d{4})_\w+\.sql", entry.name)
        if match:
            found.append((int(match.group(1)), entry.read_text(encoding="utf-8")))
    return sorted(found)


def connect(path: Path) -> sqlite.Database:
    """A connection for one thread: WAL, foreign keys on, five seconds of patience for a writer.

    WAL with synchronous=FULL: a committed row survives a power cut, which the rule "rename the
    files, then commit the row" needs.
    """
    with readable(path):
        connection = sqlite3.connect(path, timeout=PATIENCE_SECONDS, isolation_level=None)
        try:
            _use_wal(connection)
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")
        except BaseException:
            connection.close()
            raise
    return sqlite.Database(connection)


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to WAL once. SQLite does not wait for its turn here: of two processes that open a
    new library at once, one would be told "database is locked"."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as exc:
            if "locked" not in str(exc) or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """CorruptFile where what is done inside finds that the database is damaged."""
    try:
        yield
    except sqlite3.DatabaseError as exc:
        if "not a database" in str(exc) or "malformed" in str(exc):
            raise CorruptFile(
                "The library's database cannot be read",
                f"{path} is not a SQLite database, or it is damaged ({exc}).",
                "Move the file away and start again (your models and runs stay on disk), "
                "or open another library with --library DIR.",
            ) from exc
        raise


def migrate(db: sqlite.Database) -> int:
    """Apply what is missing, each migration in one transaction; returns the schema's number."""
    steps = migrations()
    newest = steps[-1][0]
    current = _version(db)
    if current > newest:
        raise Incompatible(
            "This library was made by a newer miStudio",
            f"Its schema has number {current}; this version knows up to {newest}.",
            "Update miStudio, or open another library with --library DIR.",
        )
    for number, sql in steps:
        if number > current:
            _apply(db, number, sql)
    return newest


def _apply(db: sqlite.Database, number: int, sql: str) -> None:
    connection = db.conn
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have migrated between our look and our lock.
        if _version(db) < number:
            for statement in _statements(sql):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _version(db: sqlite.Database) -> int:
    return int(db.conn.execute("PRAGMA user_version").fetchone()[0])


def _statements(sql: str) -> list[str]:
    """Split a script at complete statements (executescript would commit the transaction)."""
    statements, buffer = [], ""
    for line in sql.splitlines(keepends=True):
        buffer += line
        if sqlite3.complete_statement(buffer):
            statements.append(buffer)
            buffer = ""
    return statements
