"""The Features tab, with clicks and keys: discover, search, look a text up, label, measure, and
find it all again after a restart."""

from __future__ import annotations

from typing import Any

import pytest
from PySide6.QtCore import Qt
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QApplication, QWidget

from mistudio.library.library import Library
from mistudio.settings import Settings
from mistudio.ui import theme
from mistudio.ui.features.page import FeaturesPage
from mistudio.ui.main_window import MainWindow

from .test_window_training import Person, click, write


class Reader(Person):
    def open(self) -> FeaturesPage:
        self.library = Library(self.root)
        self.window = MainWindow(self.library, Settings())
        self.window.resize(1280, 720)
        self.window.show()
        self.window.start()
        self.look_at_window()
        bar = self.window.tabs
        names = [bar.tabText(i) for i in range(bar.count())]
        place = bar.tabRect(names.index("Features")).center()
        QTest.mouseClick(bar, Qt.MouseButton.LeftButton, pos=place)
        self.until(lambda: self.window.findChild(QWidget, "features_page"))
        page: FeaturesPage = self.window.findChild(QWidget, "features_page")
        self.until(page.isVisible)
        self.until(lambda: page.presenter.table.rowCount())
        return page

    def look_at_window(self) -> None:
        """Shortcuts reach only the window that is active; nothing makes it so again here."""
        self.window.activateWindow()
        self.until(self.window.isActiveWindow)


@pytest.fixture
def person(qtbot: Any, qapp: QApplication, answer_dialogs: Any, root: Any) -> Reader:
    theme.apply(qapp)
    return Reader(qtbot, answer_dialogs, root)


def shown(page: FeaturesPage) -> list[int]:
    return [int(feature) for feature in page.presenter.table.visible]


@pytest.mark.timeout(180)
def test_features_are_discovered_found_labelled_measured_and_found_again(person: Reader) -> None:
    page = person.open()
    old = page.presenter.run
    click(page.browser.again)
    write(page.card.top_k, "5")
    click(page.card.discover)
    person.until(lambda: page.presenter.run != old and page.presenter.table.rowCount())
    everything = shown(page)
    assert page.browser.tiles["interpretable"].value != "—"

    # A word narrows the table to the features that it has to do with.
    QTest.keyClick(page, Qt.Key.Key_F, Qt.KeyboardModifier.ControlModifier)
    QTest.keyClicks(page.browser.search, "the")
    person.until(lambda: 0 < len(shown(page)) < len(everything))
    QTest.keyClick(page.browser.search, Qt.Key.Key_A, Qt.KeyboardModifier.ControlModifier)
    QTest.keyClick(page.browser.search, Qt.Key.Key_Delete)
    person.until(lambda: shown(page) == everything)

    # A text of one's own brings those that fire on it.
    click(page.browser.by_text_button)
    QTest.keyClicks(page.browser.by_text.text, "The ships sailed to Paris.")
    QTest.keyClick(page.browser.by_text.text, Qt.Key.Key_Return)
    person.until(lambda: page.browser.by_text.probe is not None)
    person.until(lambda: 0 < len(shown(page)) < len(everything))
    feature = shown(page)[0]

    # Star it from the keyboard, open it, label it, and see what removing it does.
    person.look_at_window()
    view = page.browser.view
    view.setFocus()
    view.selectRow(0)
    QTest.keyClick(view, Qt.Key.Key_Space)
    sae_id = page.presenter.choice.sae.id
    notes = person.library.feature_notes
    person.until(lambda: feature in notes.of_sae(sae_id))
    QTest.keyClick(view, Qt.Key.Key_Return)
    person.until(lambda: page.dialog is not None and page.dialog.feature == feature)
    dialog = page.dialog
    write(dialog.label, "Ships and harbours")
    QTest.keyClick(dialog.label, Qt.Key.Key_Return)
    names = [dialog.tabs.tabText(i) for i in range(dialog.tabs.count())]
    assert names == ["Examples", "Logit Lens", "Correlations", "Ablation", "Notes"]
    bar = dialog.tabs.tabBar()
    QTest.mouseClick(bar, Qt.MouseButton.LeftButton, pos=bar.tabRect(3).center())
    ablation = dialog.tabs.currentWidget()
    person.until(lambda: ablation.panel.button.isVisible())
    click(ablation.panel.button)
    person.until(lambda: "nats" in ablation.sentence.text())
    dialog.close()
    person.close()

    page = person.open()
    note = person.library.feature_notes.of_sae(page.presenter.choice.sae.id)[feature]
    assert (note.label, note.starred) == ("Ships and harbours", True)
    write(page.browser.search, "harbours")
    person.until(lambda: shown(page) == [feature])
    page.browser.view.setFocus()
    page.browser.view.selectRow(0)
    QTest.keyClick(page.browser.view, Qt.Key.Key_Return)
    person.until(lambda: page.dialog is not None)
    bar = page.dialog.tabs.tabBar()
    QTest.mouseClick(bar, Qt.MouseButton.LeftButton, pos=bar.tabRect(3).center())
    ablation = page.dialog.tabs.currentWidget()
    person.until(lambda: "nats" in ablation.sentence.text())  # kept, not measured again
    page.dialog.close()
    person.close()
