"""Rows: all or nothing, told once, and moved only by who saw them last."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import psutil
import pytest

from library.rows import add_dataset
from mistudio.errors import NotFound
from mistudio.library.jobs import ACTIVE, lives, this_process
from mistudio.library.library import Change, Library


def submitted(library: Library) -> int:
    return library.jobs.submit("demo", "A job", "compute", {"seed": 3})


def test_a_transaction_that_fails_leaves_no_row_and_tells_nobody(library: Library) -> None:
    heard: list[Change] = []
    library.observe(heard.append)
    with pytest.raises(ZeroDivisionError), library.transaction():
        submitted(library)
        add_dataset(library)
        raise ZeroDivisionError
    assert (library.jobs.count(), library.datasets.count()) == (0, 0)
    assert heard == []


def test_observers_hear_one_change_a_table_and_only_after_the_commit(library: Library) -> None:
    heard: list[tuple[Change, int]] = []
    other = Library(library.root)  # another connection sees committed rows only
    library.observe(lambda change: heard.append((change, other.jobs.count())))
    with library.transaction():
        ids = {submitted(library), submitted(library)}
        with library.transaction():
            dataset = add_dataset(library)
        assert heard == []
    changes = {change.table: change.ids for change, _ in heard}
    assert changes == {"jobs": frozenset(ids), "datasets": frozenset({dataset})}
    assert len(heard) == 2
    assert {seen for _, seen in heard} == {2}
    other.close()


def test_a_row_outside_a_transaction_is_told_at_once(library: Library) -> None:
    heard: list[Change] = []
    library.observe(heard.append)
    job = submitted(library)
    library.unobserve(heard.append)
    submitted(library)
    assert heard == [Change("jobs", frozenset({job}))]


def test_an_observer_that_fails_does_not_undo_what_was_committed(library: Library) -> None:
    def broken(change: Change) -> None:
        raise RuntimeError("a view is broken")

    library.observe(broken)
    dataset = library.datasets.get(add_dataset(library))
    assert library.path(dataset.folder).is_dir()


def test_records_come_back_as_they_went_in(library: Library) -> None:
    record = library.datasets.get(add_dataset(library, "Übersicht"))
    assert (record.name, record.provenance) == ("Übersicht", {"sha256": "00"})
    assert record.created_at.endswith("+00:00")
    library.datasets.update(record.id, provenance={"licence": "none"})
    assert library.datasets.get(record.id).provenance == {"licence": "none"}


def test_a_record_that_is_not_there_is_named_in_a_sentence(library: Library) -> None:
    with pytest.raises(NotFound, match="No dataset with number 7"):
        library.datasets.get(7)
    assert library.datasets.find(7) is None


def test_notes_keep_what_is_not_given(library: Library) -> None:
    import sqlite3

    with pytest.raises(sqlite3.IntegrityError):
        library.feature_notes.write(1, 5, label="ships")  # of no SAE
    assert library.feature_notes.of_sae(1) == {}


# --- jobs -----------------------------------------------------------------------------------------


def test_of_two_who_move_a_job_one_wins(library: Library) -> None:
    job = submitted(library)
    won: list[bool] = []
    barrier = threading.Barrier(4)

    def take() -> None:
        barrier.wait()
        won.append(library.jobs.move(job, ("queued",), "running"))
        library.close()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False, False, False, True]


def test_a_job_that_ended_does_not_begin_again(library: Library) -> None:
    job = submitted(library)
    assert library.jobs.move(job, ("queued",), "running")
    assert library.jobs.move(job, ACTIVE, "cancelled")
    assert not library.jobs.move(job, ("queued", "running", "paused"), "finished", result={"a": 1})
    row = library.jobs.get(job)
    assert (row.status, row.result) == ("cancelled", {})
    assert row.started_at and row.ended_at


def test_late_progress_does_not_touch_the_status(library: Library) -> None:
    job = submitted(library)
    library.jobs.move(job, ("queued",), "running")
    library.jobs.move(job, ACTIVE, "failed", error={"title": "No"})
    library.jobs.show_progress(job, "train", 0.5)
    row = library.jobs.get(job)
    assert (row.status, row.error) == ("failed", {"title": "No"})


def test_a_living_process_keeps_its_job_when_another_opens_the_library(library: Library) -> None:
    job = submitted(library)
    library.jobs.move(job, ("queued",), "running")
    Library(library.root).close()
    assert library.jobs.get(job).status == "running"


@pytest.mark.parametrize("status", ACTIVE)
def test_a_job_of_a_dead_process_is_interrupted_at_the_next_start(
    library: Library, status: str
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    owner = f"{child.pid}:{psutil.Process(child.pid).create_time():.2f}"
    child.wait()
    job = submitted(library)
    library.jobs.update(job, status=status, owner=owner)
    Library(library.root).close()
    row = library.jobs.get(job)
    assert row.status == "interrupted"
    assert row.ended_at


def test_a_reused_process_number_does_not_keep_a_job_alive(library: Library) -> None:
    assert lives(this_process())
    started = psutil.Process().create_time()
    assert not lives(f"{os.getpid()}:{started - 3600:.2f}")
    job = submitted(library)
    library.jobs.update(job, status="running", owner=f"{os.getpid()}:{started - 3600:.2f}")
    Library(library.root).close()
    assert library.jobs.get(job).status == "interrupted"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no zombies")
def test_a_zombie_does_not_keep_a_job_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    owner = f"{child.pid}:{psutil.Process(child.pid).create_time():.2f}"
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet asked about
    try:
        assert psutil.pid_exists(child.pid)
        assert not lives(owner)
    finally:
        child.wait()


@pytest.mark.parametrize("owner", ["", "nonsense", "1:2:3", "x:y"])
def test_an_owner_that_cannot_be_read_is_dead(owner: str) -> None:
    assert not lives(owner)
