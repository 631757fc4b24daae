"""The job table: rows first, moved by compare-and-set, honest after a crash."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil

from mistudio.library.table import Table, now

ACTIVE = ("queued", "running", "paused")
ENDED = ("finished", "failed", "cancelled", "interrupted")


@dataclass(frozen=True)
class JobRecord:
    """One piece of long work, as the drawer and `mistudio list` show it."""

    id: int
    kind: str
    title: str
    lane: str
    params: dict[str, Any]
    status: str
    phase: str
    fraction: float
    result: dict[str, Any]
    error: dict[str, Any]
    owner: str
    created_at: str
    started_at: str | None
    ended_at: str | None

    @property
    def active(self) -> bool:
        return self.status in ACTIVE


def this_process() -> str:
    """Names this process so that a later one can tell whether it still lives."""
    return f"{os.getpid()}:{psutil.Process().create_time():.2f}"


def lives(owner: str) -> bool:
    """Whether the process that took a job is still running (a reused pid does not count)."""
    try:
        pid, started = owner.split(":")
        process = psutil.Process(int(pid))
        if process.status() == psutil.STATUS_ZOMBIE:
            return False  # it has ended; only its parent has not asked yet
        return abs(process.create_time() - float(started)) < 1.0
    except (ValueError, psutil.Error):
        return False


class Jobs(Table[JobRecord]):
    name, noun, record = "jobs", "job", JobRecord

    def submit(self, kind: str, title: str, lane: str, params: dict[str, Any]) -> int:
        return self.add(
            kind=kind, title=title, lane=lane, params=params, status="queued", owner=this_process()
        )

    def move(self, job_id: int, expected: tuple[str, ...], status: str, **values: object) -> bool:
        """Set the status only if it is one of `expected`; False where somebody was quicker."""
        if status == "running" and "queued" in expected:
            values = {"started_at": now(), "owner": this_process(), **values}
        if status in ENDED:
            values = {"ended_at": now(), **values}
        columns = ", ".join(f"{column} = ?" for column in values)
        marks = ", ".join("?" for _ in expected)
        cursor = self._library.execute(
            f"UPDATE jobs SET status = ?{', ' + columns if columns else ''} "
            f"WHERE id = ? AND status IN ({marks})",
            (status, *self._encode(values), job_id, *expected),
        )
        if cursor.rowcount:
            self._library.note_change(self.name, job_id)
        return bool(cursor.rowcount)

    def show_progress(self, job_id: int, phase: str, fraction: float) -> None:
        """Never touches the status: a late progress write must not undo a pause or a stop."""
        self._library.execute(
            "UPDATE jobs SET phase = ?, fraction = ? WHERE id = ?", (phase, fraction, job_id)
        )

    def remove(self, record_id: int) -> None:
        """Delete an ended job's row and what it kept to go on from; a run that it made stays and
        forgets which job it was."""
        with self._library.transaction():
            self._library.execute(
                "UPDATE trainings SET job_id = NULL WHERE job_id = ?", (record_id,)
            )
            super().remove(record_id)
        self._library.drop_checkpoints(record_id)

    def active(self) -> list[JobRecord]:
        return self.all("status IN ('queued', 'running', 'paused')")

    def resumable(self) -> list[JobRecord]:
        """Ended jobs that may go on where they were, newest first, if they kept anything."""
        return self.all("status IN ('interrupted', 'failed')")

    def requeue(self, job_id: int) -> bool:
        """Queue such a job again under its own number, owned by this process; False where
        somebody was quicker."""
        return self.move(
            job_id,
            ("interrupted", "failed"),
            "queued",
            owner=this_process(),
            ended_at=None,
            error={},
        )

    def mark_orphans_interrupted(self) -> list[int]:
        """Jobs whose process is gone: nobody will finish them, so they say so."""
        orphans = [job.id for job in self.active() if not lives(job.owner)]
        for job_id in orphans:
            self.move(job_id, ACTIVE, "interrupted")
        return orphans
