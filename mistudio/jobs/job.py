"""A job is a plain object with `run(context)`; this is what it gets and how it is run."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

from mistudio.engine.progress import Cancelled, Interrupted
from mistudio.engine.training import checkpoints
from mistudio.errors import InvalidInput, explain
from mistudio.jobs.control import Control, Meter, Phase, SaveReport, Snapshot
from mistudio.library.jobs import ACTIVE, JobRecord
from mistudio.library.library import Library
from mistudio.logs import redacted

log = logging.getLogger(__name__)


# Held by the compute job that runs, and for moments by what looks at typed text (`probing`): what
# one of them hooks into a model must not catch the other's tokens.
device_turn = threading.Lock()


class Job(Protocol):
    """One kind of long work. Instances are frozen dataclasses whose fields are JSON-able; the
    fields are the job's row `params`, so that an interrupted job can be run again from its row."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    kind: ClassVar[str]
    lane: ClassVar[str]

    @property
    def phases(self) -> tuple[Phase, ...]: ...

    def title(self, library: Library) -> str: ...

    def run(self, context: JobContext) -> dict[str, Any]: ...


class MetricLog:
    """The full history of a run's metrics: every row in memory for the charts and on disk."""

    _generations = itertools.count(1)

    def __init__(self, path: Path, rows: list[dict[str, Any]] | None = None) -> None:
        """`rows` are those of a run that goes on: the file then begins with them alone."""
        self.path = path
        self.generation = next(self._generations)
        """Another in every log: who watches sees that rows it has had may be gone."""
        self._rows: list[dict[str, Any]] = list(rows or [])
        self._lock = threading.Lock()
        if rows is not None:
            part = path.with_name(f"{path.name}.part")
            with part.open("w", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        with self._lock:
            self._rows.append(row)
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def since(self, index: int) -> list[dict[str, Any]]:
        """Rows from `index` on; cheap enough to call from the window at every tick."""
        with self._lock:
            return self._rows[index:]

    def flush(self) -> None:
        """Onto the disk, so that a power cut does not take what a checkpoint builds on."""
        with self._lock:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metric history; none where there is no file. A last line that was cut off is
    left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class JobContext:
    """What a job sees of the world: the library, a folder to work in, progress, the user's wishes.

    Implements the engine's `Progress`.
    """

    def __init__(
        self,
        library: Library,
        job_id: int,
        phases: tuple[Phase, ...],
        control: Control,
        listener: Callable[[Snapshot], None] | None = None,
    ) -> None:
        self.library = library
        self.job_id = job_id
        self.control = control
        self.work_folder = library.work_folder(job_id)
        self.metrics: MetricLog | None = None
        self.save_report: SaveReport | None = None
        self._waiting = threading.Lock()
        self._meter = Meter(job_id, phases, time.monotonic)
        self._listener = listener
        self._last_row_write = 0.0
        self._last_listener_call = 0.0

    def check(self) -> None:
        if not self.control.paused:
            self.control.check()
        elif self._waiting.acquire(blocking=False):
            # Of the threads that wait here, one says so and counts the time.
            try:
                self.library.jobs.move(self.job_id, ("running",), "paused")
                self._meter.add_idle(self.control.check())
                self.library.jobs.move(self.job_id, ("paused",), "running")
            finally:
                self._waiting.release()
        else:
            self.control.check()

    def wants_finish(self) -> bool:
        return self.control.wants_finish

    def wants_save(self) -> bool:
        return self.control.wants_save()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        new_phase = phase is not None and phase != self._meter.snapshot().phase
        self._meter.report(done, total, phase, metrics)
        now = time.monotonic()
        due = new_phase or "note" in metrics or now - self._last_listener_call > 0.1
        if self._listener and due:
            self._last_listener_call = now
            self._listener(self._meter.snapshot())
        if new_phase or now - self._last_row_write > 1.0:
            self._last_row_write = now
            snapshot = self._meter.snapshot()
            self.library.jobs.show_progress(self.job_id, snapshot.phase, snapshot.fraction)

    def tell(self, note: str) -> None:
        """A sentence for the user, where something goes otherwise than planned."""
        snapshot = self.snapshot()
        self.report(snapshot.done, snapshot.total, note=note)

    def record(self, row: dict[str, Any]) -> None:
        """Add a row to the run's metric history (`metrics.jsonl` in the work folder, where the
        job has given it no other place)."""
        if self.metrics is None:
            self.metrics = MetricLog(self.work_folder / "metrics.jsonl")
        self.metrics.append(row)

    def report_save(self, step: int, n_bytes: int, problem: str = "") -> None:
        """What became of a checkpoint that was asked for."""
        number = self.save_report.number + 1 if self.save_report else 1
        self.save_report = SaveReport(number, step, n_bytes, problem)

    def snapshot(self) -> Snapshot:
        """The latest state: the mailbox that the window reads."""
        return self._meter.snapshot()


def submit(library: Library, job: Job) -> int:
    """Make the job's row; nothing runs yet."""
    return library.jobs.submit(job.kind, job.title(library), job.lane, asdict(job))


def run_job(
    library: Library,
    job: Job,
    job_id: int,
    control: Control | None = None,
    listener: Callable[[Snapshot], None] | None = None,
    on_start: Callable[[JobContext], None] | None = None,
) -> JobRecord:
    """Run a queued job in this thread and see its row through to an end.

    Errors end in the row (`status` failed, `error` with title, what, next_step and, for a bug, the
    traceback); they are not raised. `on_start` is handed the context before the work begins.
    """
    control = control or Control()
    if not library.jobs.move(job_id, ("queued",), "running"):
        return library.jobs.get(job_id)
    context = JobContext(library, job_id, job.phases, control, listener)
    if on_start:
        on_start(context)
    context.report(0)  # the row shows the first phase from the start
    try:
        with _turn(job, context):
            result = job.run(context)
        library.jobs.show_progress(job_id, context.snapshot().phase, 1.0)
        library.jobs.move(job_id, ACTIVE, "finished", result=result)
    except Interrupted:
        kept = library.has_checkpoints(job_id)
        library.jobs.move(job_id, ACTIVE, "interrupted" if kept else "cancelled")
    except Cancelled:
        library.jobs.move(job_id, ACTIVE, "cancelled")
    except BaseException as exc:
        # A panic of a Rust library (tokenizers) is no Exception: it would end the lane's thread.
        if not isinstance(exc, Exception) and type(exc).__name__ != "PanicException":
            raise
        library.jobs.move(job_id, ACTIVE, "failed", error=error_row(exc))
    finally:
        if context.metrics:
            context.metrics.close()
        shutil.rmtree(context.work_folder, ignore_errors=True)
        status = library.jobs.get(job_id).status
        if status in ("finished", "cancelled") or not library.has_checkpoints(job_id):
            library.drop_checkpoints(job_id)
    return library.jobs.get(job_id)


@contextmanager
def _turn(job: Job, context: JobContext) -> Iterator[None]:
    """Alone with the device where the job computes."""
    if job.lane != "compute":
        yield
        return
    while not device_turn.acquire(timeout=0.05):
        context.check()
    try:
        yield
    finally:
        device_turn.release()


def can_go_on(library: Library, record: JobRecord) -> bool:
    """Whether an ended job kept what it needs to go on where it was."""
    return record.status in ("interrupted", "failed") and library.has_checkpoints(record.id)


def take_up(library: Library, job_id: int, step: int | None = None) -> JobRecord:
    """Queue an ended job under its own number, to go on from its newest checkpoint or, with
    `step`, from that one: later ones are then deleted. Its row.

    InvalidInput where it kept none or was taken up elsewhere meanwhile, NotFound and CorruptFile
    where that checkpoint is not there or is damaged; nothing is deleted then.
    """
    if step is not None:
        checkpoints.pick(library.checkpoint_folder(job_id), step)
    kept = can_go_on(library, library.jobs.get(job_id))
    if not kept or not library.jobs.requeue(job_id):
        raise InvalidInput(
            "This job cannot go on",
            "It kept no checkpoint, or it was taken up elsewhere meanwhile.",
            "Start it again from its beginning.",
        )
    if step is not None:
        checkpoints.rewind(library.checkpoint_folder(job_id), step)
    return library.jobs.get(job_id)


def keep_auto_save(library: Library, job_id: int, auto: checkpoints.AutoSave) -> None:
    """Remember in a training's row how often it saves, for when it goes on."""
    with library.transaction():
        params = library.jobs.get(job_id).params
        config = {
            **params.get("config", {}),
            "autosave_steps": auto.steps,
            "autosave_minutes": auto.minutes,
        }
        library.jobs.update(job_id, params={**params, "config": config})


def error_row(exc: BaseException) -> dict[str, Any]:
    """How a failure is kept: a known error in its own words, a bug with its traceback; never a
    token."""
    known = explain(exc)
    if known is not None:
        log.warning("%s: %s", type(exc).__name__, known)
        return {
            "title": redacted(known.title),
            "what": redacted(known.what),
            "next_step": redacted(known.next_step),
            "retryable": known.retryable,
            "field": getattr(known, "field", ""),
        }
    log.error("A job failed by a bug", exc_info=exc)
    return {
        "title": "Something went wrong inside miStudio",
        "what": redacted(f"{type(exc).__name__}: {exc}"),
        "next_step": "This is a bug: please copy the report and file it. Your library is unharmed.",
        "retryable": True,
        "traceback": redacted("".join(traceback.format_exception(exc))),
    }
