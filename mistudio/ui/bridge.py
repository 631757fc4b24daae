"""Where jobs and the library's changes meet Qt; with `background.py` the only place of threads.

A job runs in a QThread of its own (`run` is overridden; no event loop in it). What it does reaches
the window by three roads: rows of the job table (`job_changed`), changes of the library
(`ChangeNotifier.changed`), and snapshots that views pull at every `tick`. Receivers must be bound
methods of QObjects that live in the GUI thread.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any

from PySide6.QtCore import QEventLoop, QObject, Qt, QThread, QTimer, Signal

from mistudio.engine.training.checkpoints import AutoSave
from mistudio.errors import Busy
from mistudio.jobs.control import Control, SaveReport, Snapshot
from mistudio.jobs.job import (
    Job,
    JobContext,
    MetricLog,
    can_go_on,
    keep_auto_save,
    run_job,
    submit,
    take_up,
)
from mistudio.library.jobs import ACTIVE, JobRecord
from mistudio.library.library import Change, Library
from mistudio.ui.background import Background, put_away

__all__ = ["Background", "ChangeNotifier", "JobManager", "JobThread"]

log = logging.getLogger(__name__)

LANES = ("compute", "disk")
TICK_MS = 33
_KEPT_METRICS = 8  # ended jobs whose metric history stays at hand for open charts


class ChangeNotifier(QObject):
    """Carries the library's changes to the GUI thread, several of one table as one signal."""

    changed = Signal(str, object)
    """table, frozenset of ids"""
    _arrived = Signal()

    def __init__(self, library: Library, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._library = library
        self._lock = threading.Lock()
        self._pending: dict[str, set[int]] = {}
        self._arrived.connect(self._on_arrived, Qt.ConnectionType.QueuedConnection)
        library.observe(self._on_library_change)

    def close(self) -> None:
        """Listen no more; to be called before the last event loop ends."""
        self._library.unobserve(self._on_library_change)

    def _on_library_change(self, change: Change) -> None:
        """Called in whatever thread made the change."""
        with self._lock:
            first = not self._pending
            self._pending.setdefault(change.table, set()).update(change.ids)
        if first:
            self._arrived.emit()

    def _on_arrived(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, {}
        for table, ids in pending.items():
            self.changed.emit(table, frozenset(ids))


class JobThread(QThread):
    """Runs one job to its end. The object lives in the GUI thread; only `run` is elsewhere."""

    def __init__(self, library: Library, job: Job, job_id: int) -> None:
        super().__init__()
        self.setObjectName(f"job-{job_id}")
        self.job_id = job_id
        self.job = job
        self.control = Control()
        self._library = library
        self._lock = threading.Lock()
        self._context: JobContext | None = None

    @property
    def snapshot(self) -> Snapshot | None:
        with self._lock:
            context = self._context
        return context.snapshot() if context else None

    @property
    def metrics(self) -> MetricLog | None:
        with self._lock:
            return self._context.metrics if self._context else None

    @property
    def save_report(self) -> SaveReport | None:
        with self._lock:
            return self._context.save_report if self._context else None

    def run(self) -> None:
        threading.current_thread().name = self.objectName()
        try:
            run_job(self._library, self.job, self.job_id, self.control, on_start=self._on_job_start)
        except BaseException:
            # run_job keeps errors in the row; what comes here could not even be written there.
            log.exception("Job %s could not be seen through to its end", self.job_id)
        finally:
            self._library.close()

    def _on_job_start(self, context: JobContext) -> None:
        with self._lock:
            self._context = context


@dataclass(frozen=True)
class Place:
    """Where a waiting job stands: `number` counts from 1, `after` is the job before it (running
    or waiting), `of` how many wait."""

    number: int
    of: int
    after: int | None


class JobManager(QObject):
    """Runs jobs: one at a time in each lane, first come first served."""

    job_changed = Signal(int)
    """A job's row changed: queued, running, paused, ended."""
    job_finished = Signal(int, str)
    """A job of this process ended with this status (finished, failed, cancelled, interrupted)."""
    tick = Signal()
    """About 30 times a second while a job runs: time to pull snapshots and metrics."""
    queue_changed = Signal()
    """A job was queued, started, taken out of its queue or moved in it."""
    idle = Signal()
    """The last running job of this process ended."""

    def __init__(
        self, library: Library, changes: ChangeNotifier, parent: QObject | None = None
    ) -> None:
        super().__init__(parent)
        self._library = library
        self._queues: dict[str, deque[tuple[int, Job]]] = {lane: deque() for lane in LANES}
        self._threads: dict[str, JobThread] = {}  # by lane; referenced until they have finished
        self._snapshots: OrderedDict[int, Snapshot] = OrderedDict()
        self._metrics: OrderedDict[int, MetricLog] = OrderedDict()
        self._refusing = False
        self._timer = QTimer(self)
        self._timer.setInterval(TICK_MS)
        self._timer.timeout.connect(self.tick)
        changes.changed.connect(self._on_changes_changed)

    # --- what the user wants --------------------------------------------------------------------

    def submit(self, job: Job) -> int:
        """Queue a job; returns the id of its row. Busy while the application closes."""
        self._refuse_at_the_end()
        job_id = submit(self._library, job)
        self._enqueue(job_id, job)
        return job_id

    def pause(self, job_id: int) -> None:
        if thread := self._thread(job_id):
            thread.control.pause()

    def resume(self, job_id: int) -> None:
        if thread := self._thread(job_id):
            thread.control.resume()

    def cancel(self, job_id: int) -> None:
        """Stop; what is unfinished is thrown away. A queued job never starts."""
        if thread := self._thread(job_id):
            thread.control.cancel()
        elif self._unqueue(job_id) and self._library.jobs.move(job_id, ("queued",), "cancelled"):
            self.queue_changed.emit()
            self.job_finished.emit(job_id, "cancelled")

    def finish_early(self, job_id: int) -> None:
        """Stop soon and keep what there is (training, generation)."""
        if thread := self._thread(job_id):
            thread.control.finish_early()

    def save_now(self, job_id: int) -> None:
        """Write a checkpoint soon (training)."""
        if thread := self._thread(job_id):
            thread.control.save_now()

    def save_every(self, job_id: int, auto: AutoSave) -> None:
        """Save by itself so often from now on, also when it goes on later (training)."""
        keep_auto_save(self._library, job_id, auto)
        if thread := self._thread(job_id):
            thread.control.save_every(auto)

    def roll_back(self, job_id: int, step: int) -> None:
        """Take a running training back to its checkpoint of this step, where it pauses. Whether
        the checkpoint is whole, `checkpoints.pick` has told before."""
        if thread := self._thread(job_id):
            thread.control.roll_back(step)

    def go_on(self, record: JobRecord) -> int:
        """Queue an interrupted job under its own number: it goes on from its newest checkpoint.
        InvalidInput where it kept none or was taken up elsewhere meanwhile."""
        self._refuse_at_the_end()
        return self.take_over(take_up(self._library, record.id))

    def take_over(self, record: JobRecord) -> int:
        """Queue a job that `take_up` has just taken up in this process."""
        from mistudio.jobs.kinds import job_from_row

        self._refuse_at_the_end()
        self._enqueue(record.id, job_from_row(record.kind, record.params))
        return record.id

    def move_in_queue(self, job_id: int, by: int) -> None:
        """Let a waiting job start earlier (`by` -1) or later (1) than its neighbour."""
        for queue in self._queues.values():
            waiting = [entry[0] for entry in queue]
            if job_id not in waiting:
                continue
            here = waiting.index(job_id)
            there = min(max(here + by, 0), len(queue) - 1)
            entry = queue[here]
            del queue[here]
            queue.insert(there, entry)
            if there != here:
                self.queue_changed.emit()

    def can_go_on(self, record: JobRecord) -> bool:
        """Whether an ended job kept a checkpoint to go on from."""
        return can_go_on(self._library, record)

    def retry(self, record: JobRecord) -> int:
        """Queue the same work again as a new job; returns its id."""
        from mistudio.jobs.kinds import job_from_row

        return self.submit(job_from_row(record.kind, record.params))

    # --- what views pull ------------------------------------------------------------------------

    def snapshot(self, job_id: int) -> Snapshot | None:
        """Where a job of this process stands (or stood); None before it runs."""
        thread = self._thread(job_id)
        return thread.snapshot if thread else self._snapshots.get(job_id)

    def metrics(self, job_id: int, since: int = 0) -> list[dict[str, Any]]:
        """Metric rows from index `since` on; also of the last few ended jobs."""
        thread = self._thread(job_id)
        rows = thread.metrics if thread else self._metrics.get(job_id)
        return rows.since(since) if rows else []

    def generation(self, job_id: int) -> int:
        """Changes where metric rows that were handed out before are gone: the job was taken back
        to a checkpoint."""
        thread = self._thread(job_id)
        rows = thread.metrics if thread else self._metrics.get(job_id)
        return rows.generation if rows else 0

    def going_back(self, job_id: int) -> bool:
        """Whether a training was told to go back to a checkpoint and does not stand there yet."""
        thread = self._thread(job_id)
        return bool(thread and thread.control.going_back)

    def save_report(self, job_id: int) -> SaveReport | None:
        """What became of the last checkpoint that was asked for; None before the first."""
        thread = self._thread(job_id)
        return thread.save_report if thread else None

    def place(self, job_id: int) -> Place | None:
        """Where a job waits in its queue; None where it does not."""
        for lane, queue in self._queues.items():
            waiting = [entry[0] for entry in queue]
            if job_id in waiting:
                number = waiting.index(job_id)
                thread = self._threads.get(lane)
                after = waiting[number - 1] if number else thread and thread.job_id
                return Place(number + 1, len(waiting), after)
        return None

    def running(self) -> list[int]:
        """Ids of the jobs that run (or pause) in this process."""
        return [thread.job_id for thread in self._threads.values()]

    def owns(self, job_id: int) -> bool:
        """Whether this process runs or queues the job, so that it can be paused and stopped."""
        queued = (queued_id for queue in self._queues.values() for queued_id, _ in queue)
        return job_id in self.running() or job_id in queued

    def active(self) -> list[JobRecord]:
        """Queued, running and paused jobs of the library, whichever process owns them."""
        return self._library.jobs.active()

    # --- the end --------------------------------------------------------------------------------

    def shutdown(self, keep_running: bool = False, seconds: float = 10.0) -> bool:
        """Take no new jobs and end those that run; True where nothing runs any more.

        `keep_running` lets them finish: `idle` tells when. Otherwise all are stopped and waited
        for, while events are still handled: a training keeps a checkpoint and is interrupted,
        other work is cancelled. After `seconds` what still runs is marked interrupted
        and False tells the caller to leave by os._exit: a thread is never terminated.
        """
        self._refusing = True
        if keep_running:
            return not self._threads
        for queue in self._queues.values():
            while queue:
                self._library.jobs.move(queue.popleft()[0], ("queued",), "cancelled")
        for thread in self._threads.values():
            thread.control.interrupt()
        if self._threads:
            loop = QEventLoop()
            self.idle.connect(loop.quit)
            limit = QTimer()
            limit.setSingleShot(True)
            limit.timeout.connect(loop.quit)
            limit.start(round(seconds * 1000))
            loop.exec()
            limit.stop()
            self.idle.disconnect(loop.quit)
        for job_id in self.running():
            self._library.jobs.move(job_id, ACTIVE, "interrupted")
        self._timer.stop()
        return not self._threads

    # --- lanes ----------------------------------------------------------------------------------

    def _refuse_at_the_end(self) -> None:
        if self._refusing:
            raise Busy(
                "miStudio is closing",
                "No new work is taken.",
                "Start it again after the window closed.",
            )

    def _enqueue(self, job_id: int, job: Job) -> None:
        self._queues[job.lane].append((job_id, job))
        self._start_next(job.lane)
        self.queue_changed.emit()

    def _thread(self, job_id: int) -> JobThread | None:
        return next((t for t in self._threads.values() if t.job_id == job_id), None)

    def _unqueue(self, job_id: int) -> bool:
        for queue in self._queues.values():
            for entry in queue:
                if entry[0] == job_id:
                    queue.remove(entry)
                    return True
        return False

    def _start_next(self, lane: str) -> None:
        if lane in self._threads or not self._queues[lane]:
            return
        job_id, job = self._queues[lane].popleft()
        thread = JobThread(self._library, job, job_id)
        thread.finished.connect(self._on_thread_finished)
        self._threads[lane] = thread
        if not self._timer.isActive():
            self._timer.start()
        thread.start()

    def _on_thread_finished(self) -> None:
        """`finished` does not say whose; any thread that has ended is put away."""
        for lane, thread in list(self._threads.items()):
            if not thread.isFinished():
                continue
            self._remember(thread)
            del self._threads[lane]
            put_away(thread)
            self._start_next(lane)
            self.queue_changed.emit()
            self.tick.emit()
            self._tell_the_end(thread.job_id)
        if not self._threads:
            self._timer.stop()
            self.idle.emit()

    def _tell_the_end(self, job_id: int) -> None:
        record = self._library.jobs.find(job_id)
        if record is None:  # put away already: whoever did that knows how it ended
            return
        if record.active:  # even its row could not be written
            self._library.jobs.move(job_id, ACTIVE, "interrupted")
            record = self._library.jobs.get(job_id)
        self.job_finished.emit(job_id, record.status)

    def _remember(self, thread: JobThread) -> None:
        if snapshot := thread.snapshot:
            self._snapshots[thread.job_id] = snapshot
        if metrics := thread.metrics:
            self._metrics[thread.job_id] = metrics
        for kept in (self._snapshots, self._metrics):
            while len(kept) > _KEPT_METRICS:
                kept.popitem(last=False)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table == "jobs":
            for job_id in sorted(ids):
                self.job_changed.emit(job_id)
