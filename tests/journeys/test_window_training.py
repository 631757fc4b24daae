"""A training in the window, with clicks and keys, over a restart of the application.

The suite walks it with the tests' tiny model. With MISTUDIO_SAMPLE_MODEL (a folder of the sample
model) it also trains that one, with the whole sample corpus and the classroom template as it is:
some minutes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PySide6.QtCore import QPoint, Qt
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QAbstractButton, QApplication, QComboBox, QLineEdit, QWidget

from mistudio import formatting
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import AddDataset, AddModel
from mistudio.library.library import Library
from mistudio.settings import Settings
from mistudio.ui import theme
from mistudio.ui.main_window import CloseDialog, MainWindow

from . import road

SAMPLE = os.environ.get("MISTUDIO_SAMPLE_MODEL", "")
SECONDS = 600  # the whole journey


def click(widget: QWidget) -> None:
    """With the mouse, in the middle of it; it must be there to be clicked."""
    page: Any = widget.parentWidget()
    while page is not None:
        if hasattr(page, "ensureWidgetVisible"):
            page.ensureWidgetVisible(widget)
        page = page.parentWidget()
    QApplication.processEvents()
    assert widget.isVisible() and widget.isEnabled(), widget.objectName() or widget
    QTest.mouseClick(widget, Qt.MouseButton.LeftButton, pos=_inside(widget))


def _inside(widget: QWidget) -> QPoint:
    return QPoint(min(12, widget.width() // 2), widget.height() // 2)


def choose(box: QComboBox, text: str) -> None:
    """With the keyboard: the arrows go down the list until it is there."""
    box.setFocus()
    QTest.keyClick(box, Qt.Key.Key_Home)
    for _ in range(box.count()):
        if text in box.currentText():
            return
        QTest.keyClick(box, Qt.Key.Key_Down)
    raise AssertionError(f"{text} is not in the list")


def write(field: QWidget, text: str) -> None:
    line = field if isinstance(field, QLineEdit) else field.findChild(QLineEdit)
    assert line is not None
    line.setFocus()
    QTest.keyClick(line, Qt.Key.Key_A, Qt.KeyboardModifier.ControlModifier)
    QTest.keyClicks(line, text)


class Person:
    """Someone at the window: opens it over a library, closes it, opens it again."""

    def __init__(self, qtbot: Any, answer_dialogs: Any, root: Path) -> None:
        self.qtbot, self.root = qtbot, root
        self._answer_dialogs = answer_dialogs
        self.library: Library
        self.window: MainWindow

    def open(self) -> Any:
        self.library = Library(self.root)
        self.window = MainWindow(self.library, Settings())
        self.window.resize(1280, 720)
        self.window.show()
        self.window.start()
        bar = self.window.tabs
        names = [bar.tabText(i) for i in range(bar.count())]
        place = bar.tabRect(names.index("Training")).center()
        QTest.mouseClick(bar, Qt.MouseButton.LeftButton, pos=place)
        self.until(lambda: self.window.findChild(QWidget, "training_page"))
        page = self.window.findChild(QWidget, "training_page")
        self.until(page.isVisible)
        return page

    def until(self, condition: Callable[[], Any], seconds: float = SECONDS) -> None:
        self.qtbot.waitUntil(lambda: bool(condition()), timeout=round(1000 * seconds))

    def close(self, answer: str = "") -> str:
        """Close the window; where it asks, click the button that says `answer`. What it asked."""
        asked: list[str] = []

        def reply(dialog: CloseDialog) -> int:
            dialog.show()
            asked.append(texts(dialog))
            buttons = dialog.findChildren(QAbstractButton)
            click(next(button for button in buttons if button.text() == answer))
            return dialog.result()

        if answer:
            self._answer_dialogs("CloseDialog.exec", reply)
        else:
            self.until(lambda: not self.window.services.jobs.running())
        self.window.close()
        self.until(lambda: not self.window.isVisible())
        self.library.close()
        self.window.deleteLater()
        return " ".join(asked)


def texts(widget: QWidget) -> str:
    """All that can be read on it."""
    labels = [label for label in widget.findChildren(QWidget) if hasattr(label, "text")]
    return " ".join(label.text() for label in labels if label.isVisible())


def make_library(root: Path, model: Path, text: Path) -> None:
    library = Library(root)
    for job in (AddDataset(str(text)), AddModel(str(model), "fp32")):
        record = run_job(library, job, submit(library, job))
        assert record.status == "finished", record.error
    library.close()


def walk(person: Person, layer: int, changes: dict[str, str]) -> dict[str, Any]:
    """The journey; the run's record at its end."""
    page = person.open()
    form = page.configuration
    person.until(lambda: form.dataset.count() and form.model.count())
    choose(form.model, person.library.models.all()[0].name)
    choose(form.dataset, person.library.datasets.all()[0].name)
    click(form.templates.button)
    rows = {line.template.name: line for line in form.templates.rows()}
    click(rows["5-minute classroom"].load)
    for name, text in changes.items():
        if not form.fields[name].isVisible():
            click(form.advanced.button)
        write(form.fields[name], text)
    click(form.layers.clear_all)
    layers = {button.text(): button for button in form.layers.findChildren(QAbstractButton)}
    click(layers[f"L{layer}"])
    person.until(lambda: form.start.isEnabled())
    click(form.start)
    person.until(lambda: page.job_cards() and page.job_cards()[0].job.status == "running")
    job_id = page.job_cards()[0].job.id

    def steps() -> int:
        rows = person.window.services.jobs.metrics(job_id)
        return rows[-1]["step"] if rows else 0

    person.until(lambda: steps() > 5)
    card = page.job_cards()[0]
    click(card.pause)
    person.until(lambda: person.library.jobs.get(job_id).status == "paused")
    person.until(lambda: card.resume.isVisible())
    stood = steps()
    QTest.qWait(400)
    assert steps() == stood
    click(card.resume)
    person.until(lambda: steps() > stood)

    asked = person.close("Stop and quit")
    assert "Train on" in asked and "go on" in asked

    page = person.open()
    person.until(lambda: page.job_cards() and page.job_cards()[0].go_on.isVisible())
    card = page.job_cards()[0]
    assert card.job.id == job_id and card.job.status == "interrupted"
    click(card.go_on)
    person.until(lambda: page.run_cards() and page.run_cards()[0].isVisible(), SECONDS)
    record = person.library.trainings.all()[0].record
    steps_written = [row["step"] for row in metric_rows(person)]
    assert steps_written[0] == 0 and steps_written == sorted(set(steps_written))
    sae = person.library.saes.all()[0]
    seen = texts(page.run_cards()[0])
    for text in (f"{sae.metrics['l0']:.1f}", formatting.count(sae.d_sae)):
        assert text in seen, (text, seen)
    person.close()
    return record


def metric_rows(person: Person) -> list[dict[str, Any]]:
    training = person.library.trainings.all()[0]
    path = person.library.path(training.folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def person(qtbot: Any, qapp: QApplication, answer_dialogs: Any, tmp_path: Path) -> Person:
    theme.apply(qapp)
    return Person(qtbot, answer_dialogs, tmp_path / "library")


@pytest.mark.timeout(300)
def test_a_training_is_begun_left_and_taken_up_again(person: Person, tmp_path: Path) -> None:
    text = road.write_texts(tmp_path / "small.jsonl", 400)
    make_library(person.root, road.MODEL, text)
    changes = {"k": "8", "expansion": "2", "batch_size": "256"}
    record = walk(person, 2, {**changes, "tokens": "80000"})
    wanted = {"k": 8, "expansion": 2, "batch_size": 256, "tokens": 80_000}
    assert wanted.items() <= record["job"]["config"].items()


@pytest.mark.timeout(1200)
@pytest.mark.skipif(not SAMPLE, reason="MISTUDIO_SAMPLE_MODEL names no folder")
def test_the_classroom_template_takes_less_than_ten_minutes(person: Person) -> None:
    torch.set_num_threads(os.cpu_count() or 1)  # as in the app; other journeys have one
    make_library(person.root, Path(SAMPLE), road.CORPUS)
    began = time.monotonic()
    record = walk(person, 10, {"k": "24", "seed": "7", "learning_rate": "0.0004"})
    took = time.monotonic() - began
    print(f"\nthe journey took {took:.0f} s; {json.dumps(record['sites'], indent=1)}")
    wanted = {"k": 24, "seed": 7, "learning_rate": 4e-4, "tokens": 250_000, "expansion": 4}
    assert wanted.items() <= record["job"]["config"].items()
    assert took < SECONDS
