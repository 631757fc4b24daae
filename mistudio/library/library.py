"""The library: one folder with a database and the files its rows name."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlite_utils

from mistudio.errors import DiskFull, InvalidInput, UserError
from mistudio.library import database
from mistudio.library.jobs import ACTIVE, Jobs
from mistudio.library.records import (
    Datasets,
    Extractions,
    FeatureNotes,
    FeatureRuns,
    Generations,
    Models,
    Saes,
    Tokenizations,
    Trainings,
)

FOLDERS = ("datasets", "models", "activations", "trainings", "features", "exports", "trash", "work")


@dataclass(frozen=True)
class Change:
    """What an operation changed; views re-query only what they show."""

    table: str
    ids: frozenset[int]


class Library:
    """Opens (or makes) the library in a folder. Safe to use from any thread: each has its own
    connection, and observers are called in the thread that made the change, after its commit."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self._local = threading.local()
        self._observers: list[Callable[[Change], None]] = []
        self._connections: list[sqlite_utils.Database] = []
        self._lock = threading.Lock()
        try:
            for folder in ("", *FOLDERS):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as exc:
            raise InvalidInput(
                "The library must be a folder",
                f"{self.root} is not one.",
                "Give a folder (it may be new) with --library DIR.",
            ) from exc
        database.migrate(self._db)
        self.datasets = Datasets(self)
        self.models = Models(self)
        self.tokenizations = Tokenizations(self)
        self.extractions = Extractions(self)
        self.trainings = Trainings(self)
        self.saes = Saes(self)
        self.feature_runs = FeatureRuns(self)
        self.feature_notes = FeatureNotes(self)
        self.generations = Generations(self)
        self.jobs = Jobs(self)
        self.recover()

    # --- rows -------------------------------------------------------------------------------

    @property
    def _db(self) -> sqlite_utils.Database:
        db = getattr(self._local, "db", None)
        if db is None:
            db = database.connect(self.root / "library.db")
            db.conn.row_factory = sqlite3.Row
            self._local.db = db
            with self._lock:
                self._connections.append(db)
        return db

    def rows(self, sql: str, params: tuple[object, ...] = ()) -> list[sqlite3.Row]:
        return list(self._db.conn.execute(sql, params))

    def execute(self, sql: str, params: tuple[object, ...] = ()) -> sqlite3.Cursor:
        return self._db.conn.execute(sql, params)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; observers hear of the changes once, after the commit."""
        if getattr(self._local, "pending", None) is not None:
            yield  # already inside one: the outermost commits
            return
        self._local.pending = {}
        try:
            self._db.conn.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.conn.execute("COMMIT")
            except BaseException:
                if self._db.conn.in_transaction:
                    self._db.conn.execute("ROLLBACK")
                self._local.pending = {}
                raise
        finally:
            changed, self._local.pending = self._local.pending, None
        for table, ids in changed.items():
            self._publish(Change(table, frozenset(ids)))

    def note_change(self, table: str, record_id: int) -> None:
        pending = getattr(self._local, "pending", None)
        if pending is None:
            self._publish(Change(table, frozenset({record_id})))
        else:
            pending.setdefault(table, set()).add(record_id)

    def observe(self, observer: Callable[[Change], None]) -> None:
        """Call `observer` after every change, in the thread that made it."""
        self._observers.append(observer)

    def unobserve(self, observer: Callable[[Change], None]) -> None:
        if observer in self._observers:
            self._observers.remove(observer)

    def _publish(self, change: Change) -> None:
        for observer in list(self._observers):
            observer(change)

    # --- files ------------------------------------------------------------------------------

    def path(self, folder: str) -> Path:
        """The absolute path of a record's folder, which must lie inside the library."""
        path = (self.root / folder).resolve()
        if not path.is_relative_to(self.root):
            raise UserError(
                "A record points outside the library",
                f"{folder!r} would lead to {path}.",
                "The library's database was changed from outside; restore it from a backup.",
            )
        return path

    def new_folder(self, kind: str, name: str) -> str:
        """A free relative folder name such as `models/smollm2-135m-1a2b3c4d`."""
        slug = "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")[:40] or kind
        return f"{kind}/{slug}-{uuid.uuid4().hex[:8]}"

    def work_folder(self, job_id: int) -> Path:
        """Where a job writes until it is done: same disk as the library, so a rename is enough."""
        folder = self.root / "work" / f"job-{job_id}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def commit(self, source: Path, folder: str) -> Iterator[None]:
        """Flush `source` to disk, rename it to `folder`, then commit the rows added inside.

        If the rows fail, the files go back to where they were: nothing half-made remains.
        """
        flush_tree(source)
        target = self.path(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        flush_folder(target.parent)
        try:
            with self.transaction():
                yield
        except BaseException:
            os.replace(target, source)
            raise

    def discard(self, table: str, record_id: int) -> None:
        """Remove a record and move its files to the trash (kept seven days)."""
        record: Any = getattr(self, table).get(record_id)
        with self.transaction():
            getattr(self, table).remove(record_id)
        self.move_to_trash(self.path(record.folder))

    def move_to_trash(self, path: Path) -> None:
        if path.exists():
            os.replace(path, self.root / "trash" / f"{path.name}-{uuid.uuid4().hex[:6]}")

    def require_space(self, needed: int, what: str) -> None:
        """Refuse before starting where the disk is too small; a tenth is kept as headroom."""
        free = shutil.disk_usage(self.root).free
        if free < needed * 1.1:
            raise DiskFull(
                "Not enough disk space",
                f"{what} needs {needed / 1e9:.2f} GB; {free / 1e9:.2f} GB are free "
                f"where the library lies ({self.root}).",
                "Free some space, choose fewer tokens or layers, or move the library.",
            )

    # --- after a crash ----------------------------------------------------------------------

    def recover(self) -> None:
        """Mark orphaned jobs, sweep what they left half-written and folders no row names."""
        with self.transaction():
            self.jobs.mark_orphans_interrupted()
        active = {
            f"job-{row['id']}"
            for row in self.rows(f"SELECT id FROM jobs WHERE status IN {ACTIVE!r}")
        }
        for folder in (self.root / "work").iterdir():
            if folder.name not in active:
                shutil.rmtree(folder, ignore_errors=True)
        self._sweep_orphan_folders()
        self._empty_old_trash()

    def _sweep_orphan_folders(self) -> None:
        """A kill between rename and commit leaves a folder without a row: to the trash."""
        if self.jobs.active():
            return  # another process may be between the two right now
        for kind, tables in _OWNERS.items():
            named = {
                row["folder"]
                for table in tables
                for row in self.rows(f"SELECT folder FROM {table}")
            }
            for folder in (self.root / kind).iterdir():
                if not any(name == f"{kind}/{folder.name}" for name in named):
                    self.move_to_trash(folder)

    def _empty_old_trash(self, days: float = 7.0) -> None:
        horizon = datetime.now(UTC).timestamp() - days * 86400
        for entry in (self.root / "trash").iterdir():
            if entry.stat().st_ctime < horizon:
                shutil.rmtree(entry, ignore_errors=True)

    def close(self) -> None:
        """Close this thread's connection and checkpoint the log."""
        db = getattr(self._local, "db", None)
        if db is not None:
            db.conn.close()
            self._local.db = None


_OWNERS = {
    "datasets": ("datasets", "tokenizations"),
    "models": ("models",),
    "activations": ("extractions",),
    "trainings": ("trainings",),
    "features": ("feature_runs",),
}


def flush_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, so that a rename never exposes empty files."""
    for base, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(base, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        flush_folder(Path(base))


def flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders for fsync
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
