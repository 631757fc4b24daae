"""Jobs in threads, and how what they do reaches the window."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from PySide6.QtCore import QCoreApplication, QEvent, QObject, QThread
from shiboken6 import isValid

from mistudio.errors import Busy, InvalidInput
from mistudio.jobs.kinds import KINDS
from mistudio.library.library import Library
from mistudio.ui.background import put_away
from mistudio.ui.bridge import ChangeNotifier, JobManager, Place

from .small_jobs import Count, CountOn, CountOnDisk, Stubborn

Wait = Callable[[int, str], None]


class Receiver(QObject):
    """Remembers what it was told and in which thread."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[Any, ...]] = []
        self.threads: set[QThread] = set()

    def hear(self, *values: object) -> None:
        self.heard.append(values)
        self.threads.add(QThread.currentThread())


def test_job_runs_to_its_end_and_says_so(qtbot: Any, library: Library, jobs: JobManager) -> None:
    receiver = Receiver()
    jobs.job_changed.connect(receiver.hear)
    with qtbot.waitSignal(jobs.job_finished) as ended:
        job_id = jobs.submit(Count(5))
    assert ended.args == [job_id, "finished"]
    record = library.jobs.get(job_id)
    assert (record.status, record.result, record.fraction) == ("finished", {"counted": 5}, 1.0)
    qtbot.waitUntil(lambda: len(receiver.heard) >= 1)
    assert receiver.threads == {QThread.currentThread()}


def test_paused_job_stands_still_and_resumes(
    qtbot: Any, library: Library, jobs: JobManager, wait_for: Wait
) -> None:
    job_id = jobs.submit(Count(2000, pause=0.002))
    qtbot.waitUntil(lambda: bool(jobs.snapshot(job_id) and jobs.snapshot(job_id).done >= 2))
    jobs.pause(job_id)
    wait_for(job_id, "paused")
    stood = jobs.snapshot(job_id).done
    qtbot.wait(100)
    assert jobs.snapshot(job_id).done == stood
    jobs.resume(job_id)
    wait_for(job_id, "running")
    qtbot.waitUntil(lambda: jobs.snapshot(job_id).done > stood)
    jobs.cancel(job_id)
    wait_for(job_id, "cancelled")


def test_cancelled_job_is_cancelled_within_two_seconds(
    qtbot: Any, jobs: JobManager, wait_for: Wait
) -> None:
    job_id = jobs.submit(Count(10_000, pause=0.005))
    qtbot.waitUntil(lambda: jobs.snapshot(job_id) is not None)
    began = time.monotonic()
    jobs.cancel(job_id)
    wait_for(job_id, "cancelled")
    assert time.monotonic() - began < 2


def test_paused_job_can_be_cancelled(qtbot: Any, jobs: JobManager, wait_for: Wait) -> None:
    job_id = jobs.submit(Count(10_000))
    qtbot.waitUntil(lambda: jobs.snapshot(job_id) is not None)
    jobs.pause(job_id)
    wait_for(job_id, "paused")
    jobs.cancel(job_id)
    wait_for(job_id, "cancelled")


def test_finish_early_keeps_what_there_is(
    qtbot: Any, library: Library, jobs: JobManager, wait_for: Wait
) -> None:
    job_id = jobs.submit(Count(10_000))
    qtbot.waitUntil(lambda: bool(jobs.snapshot(job_id) and jobs.snapshot(job_id).done > 3))
    jobs.finish_early(job_id)
    wait_for(job_id, "finished")
    assert 3 < library.jobs.get(job_id).result["counted"] < 10_000


def test_failure_keeps_its_words_and_a_bug_its_traceback(
    jobs: JobManager, library: Library, wait_for: Wait
) -> None:
    known = jobs.submit(Count(5, fail_at=2))
    bug = jobs.submit(Count(5, fail_at=2, bug=True))
    wait_for(bug, "failed")
    assert library.jobs.get(known).error["title"] == "Bad number"
    assert "ZeroDivisionError" in library.jobs.get(bug).error["traceback"]


def test_one_lane_takes_turns_and_two_lanes_run_side_by_side(
    qtbot: Any, jobs: JobManager, library: Library, wait_for: Wait
) -> None:
    first = jobs.submit(Count(10_000))
    second = jobs.submit(Count(3))
    other = jobs.submit(CountOnDisk(3))
    wait_for(other, "finished")
    qtbot.waitUntil(lambda: jobs.running() == [first])
    wait_for(first, "running")
    assert library.jobs.get(second).status == "queued"
    assert [record.id for record in jobs.active()] == [second, first]
    jobs.cancel(first)
    wait_for(second, "finished")


def test_queued_job_that_is_cancelled_never_starts(
    qtbot: Any, jobs: JobManager, library: Library, wait_for: Wait
) -> None:
    first = jobs.submit(Count(10_000))
    second = jobs.submit(Count(3))
    with qtbot.waitSignal(jobs.job_finished) as ended:
        jobs.cancel(second)
    assert ended.args == [second, "cancelled"]
    jobs.cancel(first)
    wait_for(first, "cancelled")
    assert library.jobs.get(second).started_at is None


def test_waiting_jobs_have_a_place_can_change_it_and_start_by_themselves(
    qtbot: Any, jobs: JobManager, library: Library, wait_for: Wait
) -> None:
    heard = Receiver()
    jobs.queue_changed.connect(heard.hear)
    running, first, second, third = (jobs.submit(Count(n)) for n in (10_000, 1, 2, 3))
    assert jobs.place(running) is None
    assert jobs.place(first) == Place(1, 3, running)
    assert jobs.place(third) == Place(3, 3, second)
    jobs.move_in_queue(third, -1)
    assert [jobs.place(job_id) for job_id in (first, third, second)] == [
        Place(1, 3, running),
        Place(2, 3, first),
        Place(3, 3, third),
    ]
    jobs.move_in_queue(second, 1)  # it is the last one already
    jobs.move_in_queue(running, 1)  # it does not wait
    jobs.move_in_queue(first, 1)
    jobs.cancel(second)
    assert len(heard.heard) == 4 + 2 + 1
    assert [jobs.place(job_id) for job_id in (third, first, second)] == [
        Place(1, 2, running),
        Place(2, 2, third),
        None,
    ]
    ended: list[int] = []
    jobs.job_finished.connect(lambda job_id, status: ended.append(job_id))
    jobs.cancel(running)
    wait_for(first, "finished")
    qtbot.waitUntil(lambda: len(ended) == 3)
    assert ended == [running, third, first]


def test_metrics_are_whole_while_running_and_stay_after_the_end(
    qtbot: Any, jobs: JobManager, wait_for: Wait
) -> None:
    job_id = jobs.submit(Count(20))
    rows: list[dict[str, Any]] = []
    while len(rows) < 20:
        rows += jobs.metrics(job_id, len(rows))
        qtbot.wait(5)
    wait_for(job_id, "finished")
    assert [row["step"] for row in rows] == list(range(1, 21))
    qtbot.waitUntil(lambda: not jobs.running())
    assert jobs.metrics(job_id) == rows


def test_ticks_come_only_while_a_job_runs(qtbot: Any, jobs: JobManager, wait_for: Wait) -> None:
    receiver = Receiver()
    jobs.tick.connect(receiver.hear)
    qtbot.wait(100)
    assert receiver.heard == []
    with qtbot.waitSignal(jobs.idle):
        jobs.submit(Count(40))
    ticks = len(receiver.heard)
    assert ticks >= 3
    qtbot.wait(100)
    assert len(receiver.heard) == ticks


def test_late_progress_cannot_overwrite_a_status(
    library: Library, jobs: JobManager, wait_for: Wait
) -> None:
    job_id = jobs.submit(Count(3))
    wait_for(job_id, "finished")
    library.jobs.show_progress(job_id, "Counting", 0.4)
    assert not library.jobs.move(job_id, ("running",), "paused")
    assert library.jobs.get(job_id).status == "finished"


def test_changes_from_any_thread_arrive_in_the_gui_thread(
    qtbot: Any, library: Library, changes: ChangeNotifier
) -> None:
    receiver = Receiver()
    changes.changed.connect(receiver.hear)

    def write() -> None:
        for number in range(50):
            library.jobs.submit("count", f"{number}", "disk", {})
        library.close()

    with qtbot.waitSignal(changes.changed):
        thread = threading.Thread(target=write)
        thread.start()
    thread.join()
    qtbot.waitUntil(lambda: sum(len(ids) for _, ids in receiver.heard) == 50)
    assert receiver.threads == {QThread.currentThread()}
    assert {table for table, _ in receiver.heard} == {"jobs"}
    assert len(receiver.heard) < 50  # several changes travel as one


def test_closing_cancels_running_and_queued_jobs_and_takes_no_more(
    qtbot: Any, library: Library, changes: ChangeNotifier
) -> None:
    manager = JobManager(library, changes)
    ids = [manager.submit(Count(10_000)) for _ in range(2)] + [manager.submit(CountOnDisk(10_000))]
    qtbot.waitUntil(lambda: len(manager.running()) == 2)
    assert manager.shutdown()
    assert {library.jobs.get(job_id).status for job_id in ids} == {"cancelled"}
    with pytest.raises(Busy):
        manager.submit(Count(1))


def test_closing_keeps_what_a_job_needs_to_go_on(
    qtbot: Any, library: Library, changes: ChangeNotifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, CountOn.kind, CountOn)
    manager = JobManager(library, changes)
    job_id = manager.submit(CountOn(100))
    qtbot.waitUntil(lambda: bool(manager.snapshot(job_id) and manager.snapshot(job_id).done >= 3))
    assert manager.shutdown()
    record = library.jobs.get(job_id)
    assert record.status == "interrupted"
    with pytest.raises(Busy):
        manager.go_on(record)  # it is closing

    manager = JobManager(library, changes)
    with qtbot.waitSignal(manager.job_finished) as ended:
        assert manager.go_on(record) == job_id
    assert ended.args == [job_id, "finished"]
    result = library.jobs.get(job_id).result
    assert (result["counted"], result["begun"] >= 3) == (100, True)
    with pytest.raises(InvalidInput, match="kept no checkpoint"):
        manager.go_on(library.jobs.get(job_id))
    assert manager.shutdown()


def test_closing_waits_for_running_jobs_where_the_user_wants_that(
    qtbot: Any, library: Library, changes: ChangeNotifier
) -> None:
    manager = JobManager(library, changes)
    job_id = manager.submit(Count(30))
    with qtbot.waitSignal(manager.idle):
        assert not manager.shutdown(keep_running=True)
    assert library.jobs.get(job_id).status == "finished"
    assert manager.shutdown()


def test_job_that_does_not_stop_is_marked_interrupted_and_never_terminated(
    qtbot: Any, library: Library, changes: ChangeNotifier
) -> None:
    Stubborn.release.clear()
    manager = JobManager(library, changes)
    job_id = manager.submit(Stubborn())
    qtbot.waitUntil(lambda: library.jobs.get(job_id).status == "running")
    assert manager.shutdown(seconds=0.2) is False
    assert library.jobs.get(job_id).status == "interrupted"
    Stubborn.release.set()
    with qtbot.waitSignal(manager.idle):
        pass
    assert library.jobs.get(job_id).status == "interrupted"


def test_a_row_that_is_put_away_before_its_end_is_told_does_not_stop_the_lane(
    qtbot: Any, library: Library, jobs: JobManager
) -> None:
    first = jobs.submit(Count(to=3))
    second = jobs.submit(Count(to=3))
    thread = jobs._thread(first)
    assert thread is not None
    thread.wait()  # it has ended; nobody in this thread has heard of it yet
    library.jobs.remove(first)
    qtbot.waitUntil(lambda: library.jobs.get(second).status == "finished")


def test_the_python_side_of_an_ended_thread_outlives_its_other_side(qtbot: Any) -> None:
    first, second = QThread(), QThread()
    kept = weakref.ref(first)
    put_away(first)
    del first
    QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete.value)
    assert kept() is not None and not isValid(kept())
    put_away(second)  # what is gone is let go of
    assert kept() is None
