"""The library: one folder with a database and the files its rows name."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mistudio.errors import DiskFull, InUse, InvalidInput, UserError
from mistudio.formatting import size
from mistudio.library import database, sqlite
from mistudio.library.features import (
    FeatureAnalyses,
    FeatureLabels,
    FeatureLists,
    FeatureNotes,
    FeatureScores,
    FeatureViews,
)
from mistudio.library.jobs import Jobs
from mistudio.library.records import (
    Datasets,
    Extractions,
    FeatureRuns,
    Generations,
    Models,
    Saes,
    Templates,
    Tokenizations,
    Tokenizers,
    Trainings,
)
from mistudio.library.steering import Calibrations, Experiments

FOLDERS = (
    "datasets",
    "models",
    "tokenizers",
    "activations",
    "trainings",
    "saes",
    "features",
    "exports",
    "trash",
    "checkpoints",
    "work",
)
# Lies in a folder that no row names yet (or no longer). Only such folders are ever swept up: a lost
# or restored database must not send everything it does not know to the trash.
UNNAMED = ".no-record-yet"
TRASH_DAYS = 7.0

log = logging.getLogger(__name__)


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
        try:
            for folder in ("", *FOLDERS):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as exc:
            raise InvalidInput(
                "The library must be a folder",
                f"{self.root} is not one.",
                "Give a folder (it may be new) with --library DIR.",
            ) from exc
        with database.readable(self.root / "library.db"):
            database.migrate(self._db)
        self.datasets = Datasets(self)
        self.models = Models(self)
        self.tokenizers = Tokenizers(self)
        self.tokenizations = Tokenizations(self)
        self.extractions = Extractions(self)
        self.trainings = Trainings(self)
        self.saes = Saes(self)
        self.feature_runs = FeatureRuns(self)
        self.feature_notes = FeatureNotes(self)
        self.feature_labels = FeatureLabels(self)
        self.feature_lists = FeatureLists(self)
        self.feature_views = FeatureViews(self)
        self.feature_scores = FeatureScores(self)
        self.feature_analyses = FeatureAnalyses(self)
        self.generations = Generations(self)
        self.calibrations = Calibrations(self)
        self.experiments = Experiments(self)
        self.templates = Templates(self)
        self.jobs = Jobs(self)
        with database.readable(self.root / "library.db"):
            self.recover()

    # --- rows -------------------------------------------------------------------------------

    @property
    def _db(self) -> sqlite.Database:
        db = getattr(self._local, "db", None)
        if db is None:
            db = database.connect(self.root / "library.db")
            db.conn.row_factory = sqlite3.Row
            self._local.db = db
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
            try:
                observer(change)
            except Exception:  # the change is committed: it must not look as if it had failed
                log.exception("An observer failed on %s", change)

    # --- files ------------------------------------------------------------------------------

    def path(self, folder: str) -> Path:
        """The absolute path of a record's folder, which must lie inside the library."""
        path = (self.root / folder).resolve()
        if not path.is_relative_to(self.root) or path == self.root:
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

    def checkpoint_folder(self, job_id: int) -> Path:
        """Where a training keeps what it needs to go on: unlike a work folder it outlives the
        process, until the job is finished, cancelled or put away. It need not exist."""
        return self.root / "checkpoints" / f"job-{job_id}"

    def has_checkpoints(self, job_id: int) -> bool:
        """Whether a job has something to go on from: a training its steps, an extraction shards."""
        folder = self.checkpoint_folder(job_id)
        return any(folder.glob("step-*")) or any(folder.glob("extraction/*/" + 5 * "[0-9]"))

    def drop_checkpoints(self, job_id: int) -> None:
        """Renamed first, so that nothing half-deleted is gone on from."""
        folder = self.checkpoint_folder(job_id)
        if folder.exists():
            gone = self.root / "work" / f"gone-{uuid.uuid4().hex}"
            os.replace(folder, gone)
            shutil.rmtree(gone, ignore_errors=True)

    @contextmanager
    def commit(self, source: Path, folder: str) -> Iterator[None]:
        """Flush `source` to disk, rename it to `folder`, then commit the rows added inside.

        If the rows fail, the files go back to where they were: nothing half-made remains.
        """
        with self.commit_all({folder: source}):
            yield

    @contextmanager
    def commit_all(self, sources: Mapping[str, Path]) -> Iterator[None]:
        """`commit` for several folders at once: their files and their rows, all or none."""
        for source in sources.values():
            (source / UNNAMED).touch()
            flush_tree(source)
        placed: list[tuple[Path, Path]] = []
        try:
            for folder, source in sources.items():
                target = self.path(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
                placed.append((source, target))
                flush_folder(target.parent)
            with self.transaction():
                yield
        except BaseException:
            for source, target in placed:
                os.replace(target, source)
            raise
        for _, target in placed:
            (target / UNNAMED).unlink(missing_ok=True)

    def discard(self, table: str, record_id: int) -> None:
        """Remove a record and move its files to the trash (kept seven days).

        What only it needs goes along: a dataset's tokenizations, a run's SAEs and their features.
        InUse, and nothing changed, where something else depends on it.
        """
        getattr(self, table).get(record_id)
        with self.transaction():
            going = self._going_along(table, record_id)
            users = self._users(table, going)
            if users:
                noun = getattr(self, table).noun
                raise InUse(
                    f"This {noun} is in use",
                    f"{_enumerate(users)} {'uses' if sum(users.values()) == 1 else 'use'} "
                    f"this {noun}.",
                    "Delete what uses it first, or wait for the job to end.",
                )
            folders = [self.path(getattr(self, t).get(i).folder) for t, i in going]
            for folder in folders:
                if folder.is_dir():
                    (folder / UNNAMED).touch()
            for name, number in reversed(going):
                getattr(self, name).remove(number)
        for folder in folders:
            self.move_to_trash(folder)

    def _going_along(self, table: str, record_id: int) -> list[tuple[str, int]]:
        """The record and what is made from it alone: (table, id), what depends comes later."""
        going = [(table, record_id)]
        for child, column in _OWNED.get(table, ()):
            for row in self.rows(f"SELECT id FROM {child} WHERE {column} = ?", (record_id,)):
                going += self._going_along(child, row["id"])
        return going

    def _users(self, table: str, going: list[tuple[str, int]]) -> dict[str, int]:
        """How many of what would be left without what goes: noun -> number."""
        users: dict[str, set[int]] = {}
        for name, number in going:
            for child, column in _USERS.get(name, ()):
                for row in self.rows(f"SELECT id FROM {child} WHERE {column} = ?", (number,)):
                    if (child, row["id"]) not in going:
                        users.setdefault(getattr(self, child).noun, set()).add(row["id"])
            for job in self.jobs.active():
                if name in _JOB_PARAMETERS and job.params.get(_JOB_PARAMETERS[name]) == number:
                    users.setdefault("unfinished job", set()).add(job.id)
        return {noun: len(ids) for noun, ids in users.items()}

    def move_to_trash(self, path: Path) -> None:
        if path.exists():
            target = self.root / "trash" / f"{path.name}-{uuid.uuid4().hex[:6]}"
            os.replace(path, target)
            os.utime(target)  # the seven days begin now

    def require_space(self, needed: int, what: str) -> None:
        """Refuse before starting where the disk is too small; a tenth is kept as headroom."""
        free = shutil.disk_usage(self.root).free
        if free < needed * 1.1:
            raise DiskFull(
                "Not enough disk space",
                f"{what} needs {size(needed * 1.1)} with some room to spare; {size(free)} are free "
                f"where the library lies ({self.root}).",
                "Free some space, choose fewer tokens or layers, or move the library.",
            )

    # --- after a crash ----------------------------------------------------------------------

    def recover(self) -> None:
        """Mark orphaned jobs, sweep what they left half-written and folders no row names."""
        with self.transaction():  # so that no other process can begin or commit a job meanwhile
            self.jobs.mark_orphans_interrupted()
            active = {f"job-{job.id}" for job in self.jobs.active()}
            gone = []
            for folder in list((self.root / "work").iterdir()):
                if folder.name not in active:
                    gone.append(folder.with_name(f"gone-{uuid.uuid4().hex}"))
                    os.replace(folder, gone[-1])
            if not active:
                self._sweep_unnamed_folders()
            kept = {f"job-{job.id}" for job in self.jobs.resumable()}
            for folder in list((self.root / "checkpoints").iterdir()):
                if folder.name not in active | kept:
                    gone.append(self.root / "work" / f"gone-{uuid.uuid4().hex}")
                    os.replace(folder, gone[-1])
        for folder in gone:
            shutil.rmtree(folder, ignore_errors=True)
        self._empty_old_trash()

    def _sweep_unnamed_folders(self) -> None:
        """A kill between rename and commit leaves a folder without a row: to the trash."""
        for kind, tables in _OWNERS.items():
            named = {
                row["folder"]
                for table in tables
                for row in self.rows(f"SELECT folder FROM {table}")
            }
            for mark in (self.root / kind).glob(f"*/{UNNAMED}"):
                if f"{kind}/{mark.parent.name}" in named:
                    mark.unlink()
                else:
                    self.move_to_trash(mark.parent)

    def _empty_old_trash(self) -> None:
        horizon = time.time() - TRASH_DAYS * 86400
        for entry in (self.root / "trash").iterdir():
            if entry.stat().st_mtime < horizon:
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)

    def close(self) -> None:
        """Close this thread's connection and checkpoint the log."""
        db = getattr(self._local, "db", None)
        if db is not None:
            db.conn.close()
            self._local.db = None


_OWNERS = {
    "datasets": ("datasets", "tokenizations"),
    "models": ("models",),
    "tokenizers": ("tokenizers",),
    "activations": ("extractions",),
    "trainings": ("trainings",),
    "saes": ("saes",),
    "features": ("feature_runs",),
}
# What is deleted together with a record, and what a record may not be deleted under.
_OWNED = {
    "datasets": (("tokenizations", "dataset_id"),),
    "trainings": (("saes", "training_id"),),
    "saes": (("feature_runs", "sae_id"),),
}
_USERS = {
    "datasets": (("trainings", "dataset_id"),),
    "models": (("trainings", "model_id"), ("extractions", "model_id"), ("saes", "model_id")),
    "tokenizations": (
        ("trainings", "tokenization_id"),
        ("extractions", "tokenization_id"),
        ("feature_runs", "tokenization_id"),
    ),
    "extractions": (("trainings", "extraction_id"),),
}
_JOB_PARAMETERS = {
    "datasets": "dataset_id",
    "models": "model_id",
    "tokenizers": "tokenizer_id",
    "tokenizations": "tokenization_id",
    "extractions": "extraction_id",
    "trainings": "training_id",
    "saes": "sae_id",
}


def _enumerate(counts: dict[str, int]) -> str:
    """`2 runs and 1 extraction`."""
    parts = [f"{n} {noun}{'' if n == 1 else 's'}" for noun, n in counts.items()]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


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
