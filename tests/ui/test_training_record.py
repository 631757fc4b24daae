"""The record of a run is saved from its card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mistudio.library.library import Library
from mistudio.ui.services import Services
from mistudio.ui.training.page import TrainingPage

from .checks import nameless, too_small
from .screens import shot


@pytest.fixture
def page(
    qtbot: Any, trained_library: Library, services_of: Callable[[Library], Services]
) -> TrainingPage:
    shown = TrainingPage(services_of(trained_library))
    qtbot.addWidget(shown)
    shown.resize(1280, 900)
    shown.show()
    return shown


def test_a_runs_record_is_saved_as_json_and_as_a_page(
    qtbot: Any, page: TrainingPage, trained_library: Library, tmp_path: Path, answer_dialogs: Any
) -> None:
    (card,) = page.run_cards()
    assert card.record.menu().actions() == [card.record.json, card.record.html]
    assert nameless(card) == [] and too_small(card) == []
    answer_dialogs("QFileDialog.getSaveFileName", (str(tmp_path / "record"), ""))
    card.record.json.trigger()
    file = tmp_path / "record.json"
    qtbot.waitUntil(file.exists)
    training = trained_library.trainings.all()[0]
    assert json.loads(file.read_text(encoding="utf-8")) == training.record
    answer_dialogs("QFileDialog.getSaveFileName", (str(tmp_path / "my run.html"), ""))
    card.record.html.trigger()
    sheet = tmp_path / "my run.html"
    qtbot.waitUntil(sheet.exists)
    assert training.name in sheet.read_text(encoding="utf-8")
    page.column_page.ensureWidgetVisible(card, 0, 0)
    shot(page, "training_run_record-1280x900")


def test_a_record_that_cannot_be_saved_says_so(
    qtbot: Any,
    page: TrainingPage,
    tmp_path: Path,
    answer_dialogs: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (card,) = page.run_cards()
    told: list[Any] = []
    toasts = page._services.toasts
    monkeypatch.setattr(type(toasts), "error", lambda self, *words, **more: told.append(words))
    answer_dialogs("QFileDialog.getSaveFileName", (str(tmp_path / "missing" / "x.json"), ""))
    card.record.json.trigger()
    qtbot.waitUntil(lambda: len(told) == 1)
    answer_dialogs("QFileDialog.getSaveFileName", ("", ""))
    card.record.html.trigger()
    assert len(told) == 1 and list(tmp_path.glob("missing*")) == []
