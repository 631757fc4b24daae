"""A library of its own for each test, the job manager over it, and the theme on the application."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PySide6.QtWidgets import QApplication

from mistudio.library.library import Library
from mistudio.ui import theme
from mistudio.ui.bridge import ChangeNotifier, JobManager


@pytest.fixture(scope="session")
def themed(qapp: QApplication) -> QApplication:
    theme.apply(qapp)
    return qapp


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    opened = Library(tmp_path / "library")
    yield opened
    opened.close()


@pytest.fixture
def changes(qapp: QApplication, library: Library) -> Iterator[ChangeNotifier]:
    notifier = ChangeNotifier(library)
    yield notifier
    notifier.close()


@pytest.fixture
def jobs(qtbot: Any, library: Library, changes: ChangeNotifier) -> Iterator[JobManager]:
    manager = JobManager(library, changes)
    yield manager
    assert manager.shutdown(seconds=5)


@pytest.fixture
def wait_for(qtbot: Any, library: Library) -> Callable[[int, str], None]:
    """`wait_for(job_id, "finished")` handles events until the row says so."""

    def wait(job_id: int, status: str) -> None:
        qtbot.waitUntil(lambda: library.jobs.get(job_id).status == status, timeout=5000)

    return wait
