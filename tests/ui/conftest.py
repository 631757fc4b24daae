"""A library of its own for each test, the job manager over it, and the theme on the application."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PySide6.QtWidgets import QApplication, QWidget
from pytestqt.qtbot import QtBot

from mistudio.library.library import Library
from mistudio.settings import Settings
from mistudio.ui import theme
from mistudio.ui.bridge import Background, ChangeNotifier, JobManager
from mistudio.ui.services import Services
from mistudio.ui.widgets import ToastArea

# A wait ends as soon as it may, so it may be long: where the machine is busy, pytest-qt's own five
# seconds end tests that would pass.
PATIENCE_MS = 60_000
for _wait in (QtBot.waitUntil, QtBot.waitSignal, QtBot.waitSignals):
    _wait.__kwdefaults__["timeout"] = PATIENCE_MS


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
        qtbot.waitUntil(lambda: library.jobs.get(job_id).status == status)

    return wait


ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = ROOT / "tests" / "data" / "tiny-llama-0.9m"
SAMPLE_TEXT = ROOT / "resources" / "sample" / "wikipedia_vital_intros.jsonl"


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with a small dataset, a small model, a run on it and its features; made once.
    Never open it: `trained_library` gives a copy."""
    from mistudio.jobs.job import Job, run_job, submit
    from mistudio.jobs.kinds import AddDataset, AddModel, Discover, Train

    folder = tmp_path_factory.mktemp("trained")
    text = folder / "intros.jsonl"
    lines = SAMPLE_TEXT.read_text(encoding="utf-8").splitlines(keepends=True)
    text.write_text("".join(lines[:200]), encoding="utf-8")
    made = Library(folder / "library")

    def run(job: Job) -> dict[str, Any]:
        record = run_job(made, job, submit(made, job))
        assert record.status == "finished", record.error
        return record.result

    dataset_id = run(AddDataset(str(text)))["dataset_id"]
    model_id = run(AddModel(str(TINY_MODEL), "fp32"))["model_id"]
    config = {"tokens": 20_000, "expansion": 2, "k": 8, "context": 64}
    run(Train(model_id, dataset_id, ["blocks.2.hook_resid_post"], config, loss_tokens=1024))
    run(Discover(made.saes.all()[0].id, max_tokens=20_000))
    made.close()
    return folder / "library"


@pytest.fixture
def trained_library(trained_folder: Path, tmp_path: Path) -> Iterator[Library]:
    """A copy of that library for one test."""
    shutil.copytree(trained_folder, tmp_path / "trained")
    opened = Library(tmp_path / "trained")
    yield opened
    opened.close()


@pytest.fixture
def services_of(qtbot: Any, themed: QApplication) -> Iterator[Callable[[Library], Services]]:
    """`services_of(library)` gives what a page needs; jobs and background work are ended after."""
    made: list[Services] = []

    def make(opened: Library) -> Services:
        window = QWidget()
        qtbot.addWidget(window)
        changes = ChangeNotifier(opened)
        made.append(
            Services(
                library=opened,
                jobs=JobManager(opened, changes),
                changes=changes,
                background=Background(opened),
                settings=Settings(),
                toasts=ToastArea(window, seconds=0.2),
                navigate=lambda tab_name, **context: None,
            )
        )
        return made[-1]

    yield make
    for services in made:
        assert services.background.wait(20)
        assert services.jobs.shutdown(seconds=20)
        services.changes.close()
