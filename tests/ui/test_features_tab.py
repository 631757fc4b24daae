"""The Features tab: the table over a real discovery, its order, search, stars, and one feature."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PySide6.QtCore import QObject, QPoint, Qt
from PySide6.QtWidgets import QApplication, QTabWidget, QWidget

from mistudio import formatting
from mistudio.engine.features.store import FeatureMeta
from mistudio.jobs.features import open_features
from mistudio.library.library import Library
from mistudio.library.features import FeatureNote
from mistudio.settings import Settings
from mistudio.ui.bridge import Background, ChangeNotifier, JobManager
from mistudio.ui.features.page import FeaturesPage
from mistudio.ui.features.presenter import FeaturesPresenter
from mistudio.ui.features.reader import Columns, FeatureReader, RowText, Snippet
from mistudio.ui.features.table import (
    CONTEXT,
    DENSITY,
    ID,
    KEPT_TEXTS,
    LABEL,
    MAXIMUM,
    SNIPPET_ROLE,
    STAR,
    STAR_ROLE,
    TOP_TOKEN,
    FeatureTable,
    Filters,
    frequency,
)
from mistudio.ui.services import Services
from mistudio.ui.widgets import Badge, ToastArea

from .checks import cut_off, nameless, too_small
from .screens import shot
from .small_jobs import Count

SIZES = [(1280, 720), (1920, 1080)]
LONG = 120_000  # ms: this machine may be busy


class Journey:
    """Where the page asked the window to go."""

    def __init__(self) -> None:
        self.places: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, tab_name: str, **context: Any) -> None:
        self.places.append((tab_name, context))


def make_services(qtbot: Any, library: Library) -> Iterator[Services]:
    window = QWidget()
    window.resize(1280, 720)
    qtbot.addWidget(window)
    changes = ChangeNotifier(library)
    jobs = JobManager(library, changes)
    background = Background(library)
    yield Services(
        library=library,
        jobs=jobs,
        changes=changes,
        background=background,
        settings=Settings(),
        toasts=ToastArea(window, seconds=0.2),
        navigate=Journey(),
    )
    assert background.wait(60)
    assert jobs.shutdown(seconds=60)
    changes.close()


@pytest.fixture
def empty(qtbot: Any, themed: QApplication, library: Library) -> Iterator[Services]:
    yield from make_services(qtbot, library)


@pytest.fixture
def trained(qtbot: Any, themed: QApplication, trained_library: Library) -> Iterator[Services]:
    import torch

    torch.set_num_threads(2)
    yield from make_services(qtbot, trained_library)


def open_page(
    qtbot: Any, services: Services, size: tuple[int, int] = SIZES[0], wait: bool = True
) -> FeaturesPage:
    page = FeaturesPage(services)
    qtbot.addWidget(page)
    page.resize(*size)
    page.show()
    if wait:
        qtbot.waitUntil(lambda: page.presenter.reader is not None, timeout=LONG)
    return page


def wait_for_rows(qtbot: Any, page: FeaturesPage) -> None:
    """Until the tokens of the first row are there."""
    table = page.presenter.table
    qtbot.waitUntil(lambda: table.text(int(table.visible[0])) is not None, timeout=LONG)


def store_of(library: Library) -> Any:
    return open_features(library, library.feature_runs.all()[0])


def synthetic(n: int, seed: int = 0) -> Columns:
    generator = np.random.default_rng(seed)
    density = generator.random(n, np.float32) ** 6
    density[generator.random(n) < 0.1] = 0
    values = {
        "density": density,
        "context_density": density,
        "max_activation": generator.random(n, np.float32) * (density > 0),
        "mean_activation": density,
        "std_activation": density,
        "top_token_share": generator.random(n, np.float32),
        "top_token": np.where(density > 0, generator.integers(0, 50, n), -1).astype(np.int32),
    }
    meta = FeatureMeta(n, 1_000_000, 8000, 128, "train", 20, 24, "blocks.1.hook_resid_post")
    return Columns(meta, values)


# --- the table ------------------------------------------------------------------------------------


def test_order_is_the_one_that_numpy_gives(qtbot: Any) -> None:
    columns = synthetic(5000)
    table = FeatureTable()
    table.set_columns(columns, {})
    alive = np.flatnonzero(columns.values["density"] > 0)
    for key in ("density", "max_activation", "top_token_share"):
        for descending in (True, False):
            table.set_sort(key, descending)
            values = columns.values[key][alive]
            expected = alive[np.argsort(-values if descending else values, kind="stable")]
            assert table.visible.dtype == np.int32
            assert np.array_equal(table.visible, expected)
    table.set_sort("id", False)
    assert np.array_equal(table.visible, alive)
    table.set_sort("id", True)
    assert np.array_equal(table.visible, alive[::-1])


def test_filters_keep_what_numpy_keeps(qtbot: Any) -> None:
    columns = synthetic(5000)
    density = columns.values["density"]
    table = FeatureTable()
    starred = {7: FeatureNote(1, 7, "", "", True), 9: FeatureNote(1, 9, "x", "", False),
               99_999: FeatureNote(1, 99_999, "of another pass", "", True)}  # fmt: skip
    table.set_columns(columns, starred)
    assert len(table.visible) == (density > 0).sum()  # dead ones are hidden at first
    table.set_filters(Filters(hide_dead=False))
    assert len(table.visible) == 5000
    table.set_filters(Filters(low=0.01, high=0.1))
    kept = (density >= np.float32(0.01)) & (density <= np.float32(0.1))
    assert set(table.visible.tolist()) == set(np.flatnonzero(kept).tolist())
    table.set_filters(Filters(hide_dead=False, starred_only=True))
    assert table.visible.tolist() == [7]


def test_a_hundred_thousand_rows_are_sorted_without_touching_one(qtbot: Any, themed: Any) -> None:
    """Sorting and filtering make one new array: no call of data() for each row, no row objects."""

    class Counted(FeatureTable):
        calls = 0

        def data(self, index: Any, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
            Counted.calls += 1
            return super().data(index, role)

    from PySide6.QtWidgets import QTableView

    view = QTableView()
    qtbot.addWidget(view)
    table = Counted(view)
    table.set_columns(synthetic(100_000), {})
    view.setModel(table)
    view.resize(1200, 500)
    view.show()
    qtbot.waitExposed(view)
    QApplication.processEvents()
    Counted.calls = 0
    for key in ("max_activation", "top_token_share", "id", "density"):
        table.set_sort(key, False)
        table.set_filters(Filters(low=0.001 if key == "id" else 0.0))
    assert Counted.calls < 200
    QApplication.processEvents()
    assert Counted.calls < 20_000  # what can be seen, not 700,000 cells
    assert table.rowCount() == (table.columns.values["density"] > 0).sum()


def test_texts_are_kept_for_some_rows_only(qtbot: Any) -> None:
    table = FeatureTable()
    table.set_columns(synthetic(10_000), {})
    snippet = Snippet(("a",), (1.0,), 0)
    for first in range(0, 5000, 50):
        table.add_texts([RowText(i, "d", "e", snippet) for i in range(first, first + 50)])
    assert len(table._texts) == KEPT_TEXTS
    assert table.text(4999) is not None and table.text(0) is None


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0023, "0.23%"), (0.23, "23.00%"), (0.000012, "0.0012%"), (0.0, "0%"), (1.0, "100.00%")],
)
def test_frequencies_as_people_compare_them(share: float, text: str) -> None:
    assert frequency(share) == text


# --- the page over a real discovery ---------------------------------------------------------------


def test_an_empty_library_leads_to_training(qtbot: Any, empty: Services) -> None:
    page = open_page(qtbot, empty, wait=False)
    assert page.stack.currentWidget() is page._none and not page._chooser.isVisible()
    shot(page, "features_empty-1280x720")
    page._on_go_to_training()
    assert empty.navigate.places == [("training", {})]
    assert nameless(page) == [] and too_small(page) == []


def test_the_newest_sae_is_chosen_and_its_table_shows_the_store(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    page = open_page(qtbot, trained)
    store, tokens = store_of(trained_library)
    run = trained_library.feature_runs.all()[0]
    title = page.sae.currentText()
    assert title.startswith("BatchTopK SAE • tiny-llama-0.9m • intros • Started ")
    chips = [chip.text() for chip in page.findChildren(Badge)]
    assert "Model: tiny-llama-0.9m" in chips and "Dataset: intros" in chips
    assert page.tiles["features"].value == formatting.count(run.n_features)
    assert page.tiles["alive"].value.startswith(formatting.count(run.summary["alive"]))
    assert page.tiles["l0"].value == formatting.number(run.summary["l0"], 1)
    assert page.tiles["density"].value == frequency(run.summary["median_density_alive"])

    table = page.presenter.table
    wait_for_rows(qtbot, page)
    feature = int(table.visible[0])
    density = np.array(store.columns["density"])
    assert feature == int(np.argmax(density))
    shown = {column: table.index(0, column).data() for column in (ID, DENSITY, MAXIMUM, TOP_TOKEN)}
    assert shown == {
        ID: f"#{feature}",
        DENSITY: frequency(float(density[feature])),
        MAXIMUM: formatting.number(float(store.columns["max_activation"][feature]), 2),
        TOP_TOKEN: formatting.percent(float(store.columns["top_token_share"][feature]), 0),
    }
    best = store.examples(feature, tokens, 1)[0]
    snippet = table.index(0, CONTEXT).data(SNIPPET_ROLE)
    assert snippet.activations[snippet.peak] == max(snippet.activations)
    assert snippet.activations[snippet.peak] == pytest.approx(best.activation, rel=1e-3)
    assert table.index(0, LABEL).data() == page.presenter.reader.rows([feature])[0].description
    total = formatting.count(run.n_features)
    assert (
        page.summary.text() == f"Showing {formatting.count(len(table.visible))} of {total} features"
    )


@pytest.mark.parametrize("size", SIZES)
def test_the_table_can_be_read(qtbot: Any, trained: Services, size: tuple[int, int]) -> None:
    page = open_page(qtbot, trained, size)
    wait_for_rows(qtbot, page)
    table = page.presenter.table
    page.presenter.label(int(table.visible[1]), "Joins two nouns")
    page.presenter.star(int(table.visible[1]), True)
    qtbot.waitUntil(lambda: table.index(1, STAR).data(STAR_ROLE), timeout=5000)
    qtbot.waitUntil(lambda: not table.missing(0, 8), timeout=LONG)
    shot(page, f"features_table-{size[0]}x{size[1]}")
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []


def test_rows_are_read_only_where_they_can_be_seen(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    wait_for_rows(qtbot, page)
    table = page.presenter.table
    qtbot.waitUntil(lambda: not page.presenter._reading_rows, timeout=LONG)
    last = len(table.visible) - 1
    assert table.text(int(table.visible[last])) is None
    page.view.scrollToBottom()
    qtbot.waitUntil(lambda: table.text(int(table.visible[last])) is not None, timeout=LONG)


def test_sort_controls_and_header_agree(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    table = page.presenter.table
    page.sort.set_value("max_activation")
    assert (table.sort_key, table.descending) == ("max_activation", True)
    assert table.headerData(MAXIMUM, Qt.Orientation.Horizontal) == "Max activation ↓"
    page.view.horizontalHeader().sectionClicked.emit(MAXIMUM)
    assert not table.descending
    page.view.horizontalHeader().sectionClicked.emit(ID)
    assert page.sort.value == "id" and not table.descending
    page.direction.click()
    assert table.descending and np.array_equal(table.visible, np.sort(table.visible)[::-1])
    page.view.horizontalHeader().sectionClicked.emit(LABEL)  # has no order of its own
    assert table.sort_key == "id"


def test_search_finds_labels_top_tokens_and_promoted_tokens(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    page = open_page(qtbot, trained)
    table, presenter = page.presenter.table, page.presenter
    chosen = int(table.visible[5])
    presenter.label(chosen, "Zebra crossings")
    qtbot.waitUntil(lambda: table.note(chosen) is not None, timeout=5000)
    page.search.setText("zebra")
    qtbot.waitUntil(lambda: table.visible.tolist() == [chosen], timeout=LONG)
    assert page.summary.text().startswith("Showing 1 of ")

    from mistudio.engine.features.describe import search
    from mistudio.engine.models.loading import load_tokenizer

    store, _ = store_of(trained_library)
    tokenizer = load_tokenizer(trained_library.path(trained_library.models.get(1).folder))
    page.search.setText("the")
    expected = search(store, tokenizer, "the", range(len(store)))
    alive = [feature for feature in expected if store.alive[feature]]
    qtbot.waitUntil(lambda: sorted(table.visible.tolist()) == alive, timeout=LONG)
    assert 0 < len(alive) < len(store)
    page.search.setText("no token holds this")
    qtbot.waitUntil(page._nothing.isVisible, timeout=LONG)
    page.search.clear()
    qtbot.waitUntil(lambda: len(table.visible) == int(store.alive.sum()), timeout=LONG)


def test_a_star_is_kept_in_the_library(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    page = open_page(qtbot, trained)
    table = page.presenter.table
    feature = int(table.visible[2])
    cell = page.view.visualRect(table.index(2, STAR)).center()
    qtbot.mouseClick(page.view.viewport(), Qt.MouseButton.LeftButton, pos=cell)
    assert trained_library.feature_notes.of_sae(1)[feature].starred
    qtbot.waitUntil(lambda: table.index(2, STAR).data(STAR_ROLE), timeout=5000)
    page.starred_only.setChecked(True)
    assert table.visible.tolist() == [feature]
    page.view.selectRow(0)
    qtbot.keyClick(page.view, Qt.Key.Key_Space)
    assert not trained_library.feature_notes.of_sae(1)[feature].starred
    qtbot.waitUntil(lambda: len(table.visible) == 0, timeout=5000)


def test_the_page_comes_back_as_it_was(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    page.sort.set_value("top_token_share")
    page.direction.click()
    page.hide_dead.setChecked(False)
    page.low.setValue(0.5)
    page.view.horizontalHeader().resizeSection(LABEL, 301)
    qtbot.waitUntil(lambda: page.presenter.table.filters.low > 0, timeout=5000)
    state = json.loads(json.dumps(page.save_state()))
    other = open_page(qtbot, trained)
    other.restore_state(state)
    assert other.save_state() == state
    assert other.view.horizontalHeader().sectionSize(LABEL) == 301
    assert np.array_equal(other.presenter.table.visible, page.presenter.table.visible)
    other.restore_state({})
    other.restore_state({"sae": 77, "sort": "beauty", "widths": [1], "low": "x"})


def test_what_comes_too_late_is_dropped(
    qtbot: Any, trained: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(qtbot, trained)
    presenter = page.presenter
    columns = presenter.table.columns
    generation = presenter._generation
    presenter._open_newest()
    presenter._on_opened((generation, presenter.reader))  # of the SAE chosen before
    assert presenter.reader is None and presenter.table.columns is None
    qtbot.waitUntil(lambda: presenter.reader is not None, timeout=LONG)
    assert presenter.table.columns is not columns


def test_a_store_that_cannot_be_read_is_said(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    run = trained_library.feature_runs.all()[0]
    (trained_library.path(run.folder) / "run.json").unlink()
    page = open_page(qtbot, trained, wait=False)
    qtbot.waitUntil(lambda: page.stack.currentWidget() is page._before, timeout=LONG)
    assert page._failure.count() == 1
    assert "features are damaged" in page._failure.itemAt(0).widget().accessibleName()


# --- one feature ----------------------------------------------------------------------------------


def open_dialog(qtbot: Any, page: FeaturesPage, row: int) -> Any:
    page.view.selectRow(row)
    qtbot.keyClick(page.view, Qt.Key.Key_Return)
    dialog = page.dialog
    assert dialog is not None
    qtbot.waitUntil(lambda: dialog.details is not None, timeout=LONG)
    return dialog


def test_examples_are_those_of_the_store(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    from mistudio.engine.datasets.documents import Documents

    page = open_page(qtbot, trained)
    dialog = open_dialog(qtbot, page, 3)
    feature = int(page.presenter.table.visible[3])
    assert dialog.title.text() == f"Feature #{feature}"
    store, tokens = store_of(trained_library)
    documents = Documents(trained_library.path(trained_library.datasets.get(1).folder))
    expected = store.examples(feature, tokens)
    shown = dialog.examples()
    assert len(shown) == len(expected) == store.n_examples(feature)
    for view, example in zip(shown, expected, strict=True):
        assert view.example.ids == tuple(example.ids.tolist())
        assert view.example.snippet.activations == tuple(example.activations.tolist())
        assert view.example.snippet.peak == example.peak
        assert view.example.activation == example.activation
        number = tokens.document_at(example.window, example.position, store.meta.context)
        assert view.source.text() == f"Source: {documents[number].title}"
    assert [v for v, _ in dialog.details.promoted] == [
        page.presenter.reader._piece(token) for token, _ in store.promoted(feature)
    ]
    assert [v for _, v in dialog.details.suppressed] == [v for _, v in store.suppressed(feature)]
    assert dialog.tiles["max_activation"].value == formatting.number(
        float(store.columns["max_activation"][feature]), 3
    )
    dialog.close()


def test_zoom_shows_that_many_tokens_on_each_side(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    dialog = open_dialog(qtbot, page, 0)
    for zoom in (5, 16, 0):
        dialog._zoom.set_value(zoom)
        for view in dialog.examples():
            snippet = view.example.snippet
            first = max(0, snippet.peak - zoom) if zoom else 0
            last = snippet.peak + zoom + 1 if zoom else len(snippet.texts)
            assert view.strip._tokens == list(snippet.texts[first:last])
    dialog.close()


def test_only_tabs_that_do_something_are_shown(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    dialog = open_dialog(qtbot, page, 0)
    tabs = dialog.findChild(QTabWidget)
    assert [tabs.tabText(i) for i in range(tabs.count())] == ["Examples", "Logit Lens"]
    dialog.close()


@pytest.mark.parametrize("size", SIZES)
def test_the_dialog_can_be_read(qtbot: Any, trained: Services, size: tuple[int, int]) -> None:
    page = open_page(qtbot, trained, size)
    dialog = open_dialog(qtbot, page, 1)
    shot(dialog, f"feature_detail-{size[0]}x{size[1]}")
    assert nameless(dialog) == [] and too_small(dialog) == [] and cut_off(dialog) == []
    dialog.tabs.setCurrentIndex(1)
    shot(dialog, f"feature_lens-{size[0]}x{size[1]}")
    assert nameless(dialog) == [] and too_small(dialog) == [] and cut_off(dialog) == []
    dialog.close()


def test_label_and_note_are_saved_before_the_next_feature(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    page = open_page(qtbot, trained)
    dialog = open_dialog(qtbot, page, 0)
    order = page.presenter.table.visible
    first, second = int(order[0]), int(order[1])
    assert not dialog.previous.isEnabled()
    qtbot.keyClicks(dialog.label, "Months")
    qtbot.keyClicks(dialog.note, "also weekdays?")
    dialog.star.click()
    dialog.next.click()
    note = trained_library.feature_notes.of_sae(1)[first]
    assert (note.label, note.note, note.starred) == ("Months", "also weekdays?", True)
    assert dialog.feature == second and dialog.label.text() == "" and not dialog.star.isChecked()
    assert second not in trained_library.feature_notes.of_sae(1)
    qtbot.waitUntil(lambda: page.presenter.table.note(first) is not None, timeout=5000)
    dialog.previous.click()
    assert dialog.label.text() == "Months" and dialog.star.isChecked()
    qtbot.keyClicks(dialog.label, "!")
    dialog.close()  # what was typed last is saved too
    assert trained_library.feature_notes.of_sae(1)[first].label == "Months!"
    qtbot.waitUntil(lambda: page.presenter.table.index(0, LABEL).data() == "Months!", timeout=5000)


def test_steering_begins_with_the_feature(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    dialog = open_dialog(qtbot, page, 0)
    feature = dialog.feature
    dialog.steer.click()
    assert trained.navigate.places == [("steering", {"sae_id": 1, "feature": feature})]
    assert page.dialog is None


# --- discovery ------------------------------------------------------------------------------------


def test_discover_runs_and_opens_its_table(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    trained_library.discard("feature_runs", 1)
    page = open_page(qtbot, trained, wait=False)
    assert page.stack.currentWidget() is page._before
    shot(page, "features_before-1280x720")
    assert nameless(page) == [] and cut_off(page) == []
    page.evaluation_tokens.setValue(4000)
    page.top_k.setValue(5)
    page.discover.click()
    (job,) = [job for job in trained.jobs.active() if job.kind == "discover"]
    asked = {"sae_id": 1, "max_tokens": 4000, "top_k": 5, "dataset_id": None}
    assert {name: job.params[name] for name in asked} == asked
    assert page.stack.currentWidget() is page._during
    qtbot.waitUntil(lambda: page.presenter.reader is not None, timeout=LONG)
    assert page.stack.currentWidget() is page._after
    assert page.presenter.run.summary["top_k"] == 5
    assert page.presenter.reader.columns.meta.top_k == 5
    qtbot.waitUntil(lambda: trained.jobs.running() == [], timeout=LONG)


def test_a_discovery_can_be_cancelled_and_the_old_table_stays(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    page = open_page(qtbot, trained)
    trained.jobs.submit(Count(to=2000))  # keeps the lane
    page._discover_again.click()
    assert page.stack.currentWidget() is page._before and page._back.isVisible()
    page.discover.click()
    assert page.stack.currentWidget() is page._during
    page.cancel.click()
    qtbot.waitUntil(lambda: page.stack.currentWidget() is page._after, timeout=5000)
    assert trained_library.feature_runs.count() == 1
    trained.jobs.cancel(trained.jobs.running()[0])
    qtbot.waitUntil(lambda: trained.jobs.running() == [], timeout=5000)


def test_activate_chooses_an_sae_and_opens_a_feature(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    first = trained_library.saes.get(1)
    fields = {name: getattr(first, name) for name in ("model_id", "architecture", "d_in", "d_sae",
                                                      "k", "metrics", "training_id")}  # fmt: skip
    other = trained_library.saes.add(
        hook_point="blocks.3.hook_resid_post", layer=3, folder="trainings/none", **fields
    )
    page = open_page(qtbot, trained)
    assert "Layer 2" in page.sae.currentText()  # a run with several SAEs says which
    page.activate(sae_id=other)
    assert page.presenter.choice.sae.id == other
    assert page.stack.currentWidget() is page._before and page.presenter.reader is None
    page.activate(sae_id=1, feature=17)  # before its table is there
    qtbot.waitUntil(lambda: page.dialog is not None, timeout=LONG)
    assert page.dialog.feature == 17
    page.activate(sae_id=1, feature=18)
    assert page.dialog.feature == 18
    qtbot.waitUntil(lambda: page.dialog.details is not None, timeout=LONG)
    page.dialog.close()


def test_background_answers_come_to_the_gui_thread_only(
    qtbot: Any, trained: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is only ever changed in the thread that shows it."""
    import threading

    seen: list[str] = []
    real_open, real_add = FeatureReader.open.__func__, FeatureTable.add_texts
    real_opened = FeaturesPresenter._on_opened

    def opened(self: QObject, answer: Any) -> None:
        seen.append(f"opened in {threading.current_thread() is threading.main_thread()}")
        real_opened(self, answer)

    def add(self: FeatureTable, texts: Any) -> None:
        seen.append(f"texts in {threading.current_thread() is threading.main_thread()}")
        real_add(self, texts)

    def open_(cls: type, *args: Any) -> Any:
        seen.append(f"open in {threading.current_thread() is threading.main_thread()}")
        return real_open(cls, *args)

    monkeypatch.setattr(FeaturesPresenter, "_on_opened", opened)
    monkeypatch.setattr(FeatureTable, "add_texts", add)
    monkeypatch.setattr(FeatureReader, "open", classmethod(open_))
    page = open_page(qtbot, trained)
    wait_for_rows(qtbot, page)
    assert set(seen) == {"open in False", "opened in True", "texts in True"}
    assert page.view.rowAt(QPoint(0, 0).y()) == 0
