"""The feature browser over a real discovery: chips, columns, views, lists, selections, search by a
text, and asking for discoveries of imported SAEs and of whole runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PySide6.QtCore import QEvent, Qt
from PySide6.QtGui import QKeyEvent
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QApplication, QMenu

from mistudio.jobs.job import device_turn
from mistudio.library.library import Library
from mistudio.ui.features import tools
from mistudio.ui.features.browser import INTERPRETABLE
from mistudio.ui.features.page import FeaturesPage
from mistudio.ui.features.popups import NameDialog
from mistudio.ui.features.query import GIVEN, Query, Range
from mistudio.ui.features.shown import ALL
from mistudio.ui.services import Services

from .checks import cut_off, nameless, squeezed, too_small
from .screens import shot

# The offscreen platform says so of every window that hangs below a button.
pytestmark = pytest.mark.qt_log_ignore("This plugin does not support")

TEXT = "The old town lies on the river, and its university was founded in 1348."


@pytest.fixture
def opened(
    qtbot: Any, trained_library: Library, services_of: Callable[[Library], Services]
) -> tuple[FeaturesPage, Services]:
    services = services_of(trained_library)
    services.toasts._seconds = 60  # until they are clicked
    page = FeaturesPage(services)
    qtbot.addWidget(page)
    page.resize(1280, 720)
    page.show()
    qtbot.waitUntil(lambda: page.presenter.reader is not None)
    return page, services


def chip_texts(page: FeaturesPage) -> list[str]:
    page.browser.filters.refresh()
    return [chip.text for chip in page.browser.filters.chips()]


def chip(page: FeaturesPage, text: str) -> Any:
    chip_texts(page)
    return next(one for one in page.browser.filters.chips() if one.text == text)


def answer(page: FeaturesPage, dialog: NameDialog, name: str) -> None:
    dialog.name.setText(name)
    dialog.save.click()


def texts_of(menu: QMenu) -> list[str]:
    menu.aboutToShow.emit()
    return [action.text() for action in menu.actions() if action.text()]


def test_a_filter_is_a_chip_that_can_be_changed_and_taken_away(qtbot: Any, opened: Any) -> None:
    page, _ = opened
    table, filters = page.presenter.table, page.browser.filters
    assert chip_texts(page) == ["Alive"]
    editor = filters.edit_range(ALL["density"])
    assert nameless(editor) == [] and too_small(editor) == [] and squeezed(editor) == []
    editor.low.setText("0.1")
    editor.high.setText("5%")
    qtbot.waitUntil(lambda: bool(table.query.ranges))
    editor.close()
    density = np.array(table.columns.values["density"])
    inside = (density >= np.float32(0.001)) & (density <= np.float32(0.05))
    assert set(table.visible.tolist()) == set(np.flatnonzero(inside).tolist())
    text = "0.1% ≤ Activation Freq ≤ 5%"
    assert chip_texts(page) == ["Alive", text]
    chip(page, text).words.click()  # to change it
    again = page.findChildren(type(editor))[-1]
    assert (again.low.text(), again.high.text()) == ("0.1%", "5%")
    again.low.setText("much")
    again._apply()
    assert "not a number" in again._wrong.text() and len(chip_texts(page)) == 2
    again.close()
    chip(page, text).cross.click()
    chip(page, "Alive").cross.click()
    assert len(table.visible) == len(table.columns) and chip_texts(page) == []
    filters._fill_menu()
    names = [action.text() for action in filters.menu.actions() if action.text()]
    assert names[:6] == [
        "Alive", "Starred", "Labelled", "Hidden features", "Frequency band", "In a list",
    ]  # fmt: skip
    filters._take_band("frequent", True)
    assert chip_texts(page) == ["Band: frequent"]
    assert set(table.visible.tolist()) == set(
        np.flatnonzero(np.array(table.columns.values["band"]) == 4).tolist()
    )


def test_columns_are_chosen_found_and_explained(qtbot: Any, opened: Any) -> None:
    page, _ = opened
    table = page.presenter.table
    chooser = page.browser.choose_columns()
    assert nameless(chooser) == [] and too_small(chooser) == []
    items = chooser.items()
    assert len(items) >= 40 and set(items) == {one.name for one in table.available()}
    chooser.search.setText("purity")
    assert [name for name, item in items.items() if not item.isHidden()] == ["token_purity"]
    items["token_purity"].setCheckState(0, Qt.CheckState.Checked)
    assert [one.name for one in table.shown][-2:] == ["token_purity", "star"]
    chooser.tree.setCurrentItem(items["token_purity"])
    assert "commonest token among the examples" in chooser.definition.text()
    shot(chooser, "features_columns")
    items["context"].setCheckState(0, Qt.CheckState.Unchecked)
    assert table.section("context") == -1
    chooser.defaults.click()
    assert [one.name for one in table.shown] == [
        "id", "label", "context", "density", "score", "histogram", "star",
    ]  # fmt: skip
    chooser.close()


def test_a_view_brings_back_filters_sort_columns_and_search(
    qtbot: Any, opened: Any, trained_library: Library
) -> None:
    page, services = opened
    table, views = page.presenter.table, page.browser.views_button
    table.set_wanted(["id", "label", "skewness"])
    table.set_query(Query().with_range(Range("density", 0.001, 0.3)))
    page.browser.search.setText("the")
    qtbot.waitUntil(lambda: table.query.search == "the")
    table.set_sort("skewness", False)
    expected, query = table.visible.copy(), table.query
    assert len(expected) > 0
    answer(page, views.ask_for_name(), "Skewed")
    (saved,) = trained_library.feature_views.all()
    table.set_wanted(["id"])
    page.browser.search.clear()
    table.set_query(Query())
    qtbot.waitUntil(lambda: table.query.search == "")
    assert texts_of(views.menu())[0] == "Skewed"
    views.show_view(saved)
    qtbot.waitUntil(lambda: np.array_equal(table.visible, expected))
    assert table.query == query and [one.name for one in table.shown] == [
        "id", "label", "skewness",
    ]  # fmt: skip
    assert page.browser.search.text() == "the"
    views.delete(saved)
    assert trained_library.feature_views.all() == []
    services.toasts.toasts[-1]._on_action_clicked()
    assert [view.query for view in trained_library.feature_views.all()] == [saved.query]


def test_selected_features_are_hidden_listed_and_copied_and_it_can_be_undone(
    qtbot: Any, opened: Any, trained_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, services = opened
    table, view, actions = page.presenter.table, page.browser.view, page.browser.actions_
    alive, notes = len(table.visible), trained_library.feature_notes
    chosen = table.visible[[1, 2, 5]].copy()
    view.setFocus()
    view.select(chosen)
    assert actions.selected.tolist() == chosen.tolist()

    answer(page, actions.ask_for_list(), "Odd ones")
    lists = trained_library.feature_lists
    qtbot.waitUntil(lambda: bool(lists.all() and lists.members(lists.all()[0].id)))
    (made,) = lists.all()
    assert lists.of_sae(made.id, 1) == sorted(chosen.tolist())
    page.browser.lists_button.list_wanted.emit(made.id)
    qtbot.waitUntil(lambda: len(table.visible) == 3)
    assert "List: Odd ones" in chip_texts(page)
    view.select(chosen[:1])
    actions.take.trigger()
    qtbot.waitUntil(lambda: len(table.visible) == 2)
    services.toasts.toasts[-1]._on_action_clicked()  # Undo
    qtbot.waitUntil(lambda: len(table.visible) == 3)
    monkeypatch.setattr("mistudio.ui.features.actions.ConfirmDialog.ask", lambda *_: True)
    actions.ask_to_delete(made.id)
    qtbot.waitUntil(lambda: len(table.visible) == alive)

    view.select(chosen)
    actions.hide.trigger()
    qtbot.waitUntil(lambda: len(table.visible) == alive - 3)
    assert {f for f, note in notes.of_sae(1).items() if note.hidden} == set(chosen.tolist())
    services.toasts.toasts[-1]._on_action_clicked()  # Undo
    qtbot.waitUntil(lambda: len(table.visible) == alive)

    view.select(chosen[:2])
    actions.copy.trigger()
    QApplication.clipboard().clear()
    qtbot.waitUntil(lambda: bool(QApplication.clipboard().text()))
    head, *lines = QApplication.clipboard().text().splitlines()
    assert head.split("\t")[:4] == ["ID", "Label", "Example Context", "Activation Freq"]
    assert [line.split("\t")[0] for line in lines] == [f"#{f}" for f in chosen[:2]]
    assert all(len(line.split("\t")) == len(table.shown) for line in lines)


def test_everything_can_be_done_by_key(qtbot: Any, opened: Any, trained_library: Library) -> None:
    page, _ = opened
    page.activateWindow()
    qtbot.waitExposed(page)
    table, browser = page.presenter.table, page.browser
    view, notes = browser.view, trained_library.feature_notes

    def press(key: Qt.Key, modifier: Any = Qt.KeyboardModifier.NoModifier) -> None:
        QTest.keyClick(QApplication.focusWidget() or page, key, modifier)

    view.setFocus()
    press(Qt.Key.Key_Slash)
    assert browser.search.hasFocus()
    press(Qt.Key.Key_Down)
    assert view.hasFocus() and view.current_feature() == int(table.visible[0])
    press(Qt.Key.Key_Down, Qt.KeyboardModifier.ShiftModifier)
    two = table.visible[:2].tolist()
    assert view.selected_features().tolist() == two
    press(Qt.Key.Key_Space)
    assert {f for f, note in notes.of_sae(1).items() if note.starred} == set(two)
    press(Qt.Key.Key_A, Qt.KeyboardModifier.ControlModifier)
    assert len(view.selected_features()) == len(table.visible)
    view.select(np.array(two))
    press(Qt.Key.Key_H)
    assert {f for f, note in notes.of_sae(1).items() if note.hidden} == set(two)
    table.set_subset(np.array([5, 6, 7]), "Three")
    view.setFocus()
    press(Qt.Key.Key_Delete)
    assert table.subset is None
    press(Qt.Key.Key_T, Qt.KeyboardModifier.ControlModifier)
    assert browser.by_text.text.hasFocus()
    QApplication.sendEvent(
        browser.search,
        QKeyEvent(QEvent.Type.KeyPress, Qt.Key.Key_Escape, Qt.KeyboardModifier.NoModifier),
    )
    menu = browser.actions_.menu()
    said = [action.text() for action in menu.actions() if action.text()]
    assert {"Add to list", "Copy rows"} <= set(said)


def test_a_text_finds_the_features_that_fire_on_it(
    qtbot: Any, opened: Any, trained_library: Library
) -> None:
    page, _ = opened
    table, search = page.presenter.table, page.browser.by_text
    page.browser.ask_text()
    search.text.setText(TEXT)
    search.find()
    qtbot.waitUntil(lambda: search.probe is not None)
    probe, columns = search.probe, table.columns
    assert "".join(probe.pieces[1:]) == TEXT == "".join(search.strip._tokens)
    fired = set(probe.features.tolist())
    alive = set(np.flatnonzero(columns.alive).tolist())
    assert set(table.visible.tolist()) == fired & alive and table.query.sort == GIVEN
    share = {
        f: max(probe.values[probe.features == f]) / columns.values["max_activation"][f]
        for f in fired & alive
    }
    shown = [share[f] for f in table.visible.tolist()]
    assert shown == sorted(shown, reverse=True)
    place = table.section("subset")
    assert table.index(0, place).data() == f"{shown[0] * 100:.1f}%"
    assert "Fires on this text" in chip_texts(page)
    shot(page, "features_by_text-1280x720")
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []

    counted = int(np.flatnonzero(probe.counted)[2])
    search.strip.token_activated.emit(counted - 1)  # the first of the probe is not shown
    on_token = set(probe.features[probe.tokens == counted].tolist())
    assert set(table.visible.tolist()) == on_token & alive
    search.rank.set_value("strongest")
    values = [max(probe.values[(probe.features == f) & (probe.tokens == counted)])
              for f in table.visible.tolist()]  # fmt: skip
    assert values == sorted(values, reverse=True)
    page.browser.by_text_button.setChecked(False)
    assert table.subset is None and table.query.sort == "density"


def test_a_text_is_refused_while_the_device_computes(qtbot: Any, opened: Any) -> None:
    page, _ = opened
    search = page.browser.by_text
    page.browser.ask_text()
    search.text.setText(TEXT)
    with device_turn:
        search.find()
        qtbot.waitUntil(search.problem.isVisible)
    assert "The model is in use" in search.problem.text()
    assert "Try again" in search.problem.text()
    assert page.presenter.table.subset is None and search.find_button.isEnabled()


def test_tools_get_the_selection_or_all_that_is_shown(
    qtbot: Any, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, _ = opened
    got: list[list[int]] = []
    tool = tools.Tool("Count", "info", "Counts", lambda _, features: got.append(features))
    monkeypatch.setattr(tools, "TOOLS", [tool])
    page.browser.tools_button.menu().aboutToShow.emit()
    (action,) = page.browser.tools_button.menu().actions()
    shown = page.presenter.table.visible
    page.browser.view.selectRow(2)
    action.trigger()
    page.browser.view.select(shown[[2, 4]])
    action.trigger()
    assert got == [shown.tolist(), shown[[2, 4]].tolist()]


def test_imported_saes_and_whole_runs_are_discovered(
    qtbot: Any, opened: Any, trained_library: Library
) -> None:
    page, services = opened
    library = trained_library
    first = library.saes.get(1)
    names = ("model_id", "architecture", "d_in", "d_sae", "k", "metrics", "hook_point")
    fields = {name: getattr(first, name) for name in names}
    twin = library.saes.add(layer=3, folder="trainings/none", training_id=1, **fields)
    brought = library.saes.add(
        layer=2, folder="saes/none", training_id=None, source="imported", name="From afar", **fields
    )
    page.refresh_choices()
    titles = [page.sae.itemText(i) for i in range(page.sae.count())]
    assert len(titles) == 3 and titles[2].startswith("From afar • tiny-llama-0.9m")
    asked: list[Any] = []
    services.jobs.submit = asked.append  # what it would run

    page.choose(twin)
    card = page.card
    assert page.stack.currentWidget() is page._before and card.whole_run.isVisible()
    assert "All 2 SAEs" in card.whole_run.text() and not card._dataset_row.isVisible()
    card.whole_run.setChecked(True)
    card.samples.setValue(50)
    card.discover.click()
    assert (asked[-1].kind, asked[-1].training_id, asked[-1].max_documents) == (
        "discover_run", 1, 50,
    )  # fmt: skip

    page.choose(brought)
    assert card._dataset_row.isVisible() and not card.whole_run.isVisible()
    assert card.samples.value() == 0 and card.samples.text() == "All"
    shot(page, "features_before_imported-1280x720")
    assert nameless(page) == [] and cut_off(page) == []
    card.discover.click()
    job = asked[-1]
    assert (job.kind, job.sae_id, job.dataset_id, job.max_documents) == (
        "discover", brought, library.datasets.all()[0].id, None,
    )  # fmt: skip


def test_the_bound_of_interpretable_is_that_of_the_scores() -> None:
    from mistudio.engine.features import score

    assert score.INTERPRETABLE == INTERPRETABLE
