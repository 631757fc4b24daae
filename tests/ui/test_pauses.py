"""Garbage is collected in the GUI thread, whatever workers allocate."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mistudio.engine import garbage
from mistudio.ui import pauses
from mistudio.ui.pauses import Collector


class Cycle:
    """Garbage that only a collection finds; notes the thread in which it is freed."""

    freed: list[threading.Thread]

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        self.freed.append(threading.current_thread())


@pytest.fixture(autouse=True)
def freed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[threading.Thread]]:
    monkeypatch.setattr(garbage, "_collect", gc.collect)  # put back as all tests have it
    gc.collect()
    gc.enable()  # as Python begins
    Cycle.freed = found = []
    yield found
    gc.disable()  # as all tests run


def allocate() -> None:
    for _ in range(50):
        kept = [[{}] for _ in range(1000)]
        kept.clear()
        [Cycle() for _ in range(10)]


def in_worker() -> None:
    worker = threading.Thread(target=allocate)
    worker.start()
    worker.join()


def test_workers_leave_garbage_to_the_gui_thread(
    qtbot: Any, freed: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pauses, "INTERVAL_MS", 5)
    collector = Collector()
    in_worker()
    assert not freed
    qtbot.waitUntil(lambda: bool(freed))
    assert set(freed) == {threading.main_thread()}
    collector.stop()
    assert gc.isenabled()


def test_without_it_a_worker_frees_them(freed: list[threading.Thread]) -> None:
    in_worker()
    assert freed and threading.main_thread() not in freed


def test_a_worker_that_needs_the_memory_waits_for_the_gui_thread(
    qtbot: Any, freed: list[threading.Thread]
) -> None:
    collector = Collector()
    after = []

    def need_memory() -> None:
        Cycle()
        garbage.collect()
        after.append(list(freed))

    worker = threading.Thread(target=need_memory)
    worker.start()
    qtbot.waitUntil(lambda: bool(after))
    worker.join()
    assert after == [[threading.main_thread()]]
    Cycle()
    garbage.collect()  # in the GUI thread itself: at once
    assert len(freed) == 2
    collector.stop()


def test_nobody_waits_for_a_window_that_waits(
    qtbot: Any, freed: list[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pauses, "PATIENCE", 0.05)
    collector = Collector()
    worker = threading.Thread(target=lambda: (Cycle(), garbage.collect()))
    worker.start()
    worker.join()  # the GUI thread stands still meanwhile
    assert not freed
    collector.stop()
    garbage.collect()
    assert len(freed) == 1
