"""Steering in the window, with clicks and keys: from a run to a text that comes out again after a
restart, through a preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PySide6.QtCore import Qt
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QApplication, QWidget

from mistudio.library.library import Library
from mistudio.settings import Settings
from mistudio.ui import theme
from mistudio.ui.main_window import MainWindow
from mistudio.ui.steering.page import SteeringPage

from .test_window_training import Person, choose, click, write

PROMPT = "The sea is"


class Steerer(Person):
    def open(self) -> SteeringPage:
        self.library = Library(self.root)
        self.window = MainWindow(self.library, Settings())
        self.window.resize(1280, 720)
        self.window.show()
        self.window.start()
        bar = self.window.tabs
        names = [bar.tabText(i) for i in range(bar.count())]
        place = bar.tabRect(names.index("Steering")).center()
        QTest.mouseClick(bar, Qt.MouseButton.LeftButton, pos=place)
        self.until(lambda: self.window.findChild(QWidget, "steering_page"))
        page: SteeringPage = self.window.findChild(QWidget, "steering_page")
        self.until(page.isVisible)
        self.until(lambda: page.presenter.index is not None)
        return page


@pytest.fixture
def person(qtbot: Any, qapp: QApplication, answer_dialogs: Any, root: Path) -> Steerer:
    theme.apply(qapp)
    return Steerer(qtbot, answer_dialogs, root)


def generate(person: Steerer, page: SteeringPage) -> tuple[str, str, set[tuple[str, str]]]:
    """Both texts, and what the panes showed while they were written."""
    seen: set[tuple[str, str]] = set()
    output = page.output
    tick = person.window.services.jobs.tick
    watch = tick.connect(lambda: seen.add((output.unsteered.text, output.steered.text)))
    before = output.shown
    click(page.configuration.generate)
    person.until(lambda: output.shown is not None and output.shown is not before)
    tick.disconnect(watch)
    return output.unsteered.text, output.steered.text, seen


@pytest.mark.timeout(180)
def test_a_feature_is_searched_amplified_kept_and_found_again(person: Steerer) -> None:
    page = person.open()
    choose(page.configuration.source, "BatchTopK SAE • tiny-llama-0.9m")
    index = page.presenter.index
    assert index is not None
    feature = index.max_activations.index(max(index.max_activations))
    word = index.item(feature, {}).top_token.strip() or f"#{feature}"
    write(page.features.search, word)
    person.until(lambda: page.features.found_rows())
    write(page.features.search, f"#{feature}")
    person.until(lambda: [row.feature for row in page.features.found_rows()][:1] == [feature])
    click(page.features.found_rows()[0].button)
    (card,) = page.features.cards()
    click(next(button for button in card.quick if button.text() == "Amplify"))
    assert card.strength == 2.0
    page.configuration.prompt.setFocus()
    QTest.keyClicks(page.configuration.prompt, PROMPT)
    write(page.configuration.max_tokens, "100")
    unsteered, steered, seen = generate(person, page)
    assert unsteered and steered and unsteered != steered
    assert all(bool(one) == bool(other) for one, other in seen)  # never one pane alone
    assert any(
        0 < len(one) < len(unsteered) and 0 < len(other) < len(steered) for one, other in seen
    )
    assert page.output.measures.tiles["kl"].value not in ("—", "0")

    click(page.presets.button)
    click(page.presets.save)
    write(page.presets.name, "sea")
    click(page.presets.commit)
    person.until(lambda: [row.template.name for row in page.presets.rows()] == ["sea"])
    click(card.remove)
    write(page.configuration.max_tokens, "7")
    person.close()

    page = person.open()
    assert not page.features.cards()
    if not page.presets.expanded:
        click(page.presets.button)
    click(page.presets.rows()[0].load)
    assert [c.as_list()[1:] for c in page.presenter.selected] == [[feature, 2.0, "add"]]
    assert page.form().prompt == PROMPT
    assert generate(person, page)[:2] == (unsteered, steered)
    person.close()
