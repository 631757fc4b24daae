"""The Features tab: the table over a real discovery, its order, search, stars, and one feature."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PySide6.QtCore import QObject, Qt
from PySide6.QtWidgets import QApplication, QWidget

from mistudio import formatting
from mistudio.engine.features.store import EARLIER_COLUMNS
from mistudio.jobs.features import open_features
from mistudio.library.library import Library
from mistudio.settings import Settings
from mistudio.ui.bridge import Background, ChangeNotifier, JobManager
from mistudio.ui.features.page import FeaturesPage
from mistudio.ui.features.presenter import FeaturesPresenter
from mistudio.ui.features.query import Range
from mistudio.ui.features.reader import FeatureReader
from mistudio.ui.features.shown import frequency
from mistudio.ui.features.table import HISTOGRAM_ROLE, SNIPPET_ROLE, STAR_ROLE, FeatureTable
from mistudio.ui.services import Services
from mistudio.ui.widgets import Badge, ToastArea

from .checks import cut_off, nameless, too_small
from .screens import shot
from .small_jobs import Count

SIZES = [(1280, 720), (1920, 1080)]


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
    yield from make_services(qtbot, trained_library)


def open_page(
    qtbot: Any, services: Services, size: tuple[int, int] = SIZES[0], wait: bool = True
) -> FeaturesPage:
    page = FeaturesPage(services)
    qtbot.addWidget(page)
    page.resize(*size)
    page.show()
    if wait:
        qtbot.waitUntil(lambda: page.presenter.reader is not None)
    return page


def wait_for_rows(qtbot: Any, page: FeaturesPage) -> None:
    """Until the tokens of the first row are there."""
    table = page.presenter.table
    qtbot.waitUntil(lambda: table.text(int(table.visible[0])) is not None)


def cell(table: FeatureTable, row: int, name: str) -> Any:
    return table.index(row, table.section(name))


def as_first_format(library: Library) -> None:
    """The newest discovery as the first version wrote it."""
    folder = library.path(library.feature_runs.all()[0].folder)
    meta = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    top, span = np.load(folder / "top.npy"), np.load(folder / "top_span.npy")
    arrays = {f"top_{name}": np.array(top[name]) for name in ("value", "window", "position")}
    arrays["top_span"] = span * top["value"][..., None].astype(np.float16)
    kept = {name: np.load(folder / "columns" / f"{name}.npy") for name in EARLIER_COLUMNS}
    for name in ("logit_ids", "logit_values"):
        kept[name] = np.load(folder / f"{name}.npy")
    shutil.rmtree(folder)
    folder.mkdir()
    for name, array in {**arrays, **kept}.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "meta.json").write_text(json.dumps({**meta, "format": 1}), encoding="utf-8")


def store_of(library: Library) -> Any:
    return open_features(library, library.feature_runs.all()[0])


# --- the page over a real discovery ---------------------------------------------------------------


def test_an_empty_library_leads_to_training(qtbot: Any, empty: Services) -> None:
    page = open_page(qtbot, empty, wait=False)
    assert page.stack.currentWidget() is page._none and not page.sae.isVisible()
    shot(page, "features_empty-1280x720")
    page._on_go_to_training()
    assert empty.navigate.places == [("training", {})]
    assert nameless(page) == [] and too_small(page) == []


def test_the_newest_sae_is_chosen_and_its_table_shows_the_store(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    page = open_page(qtbot, trained)
    browser, table = page.browser, page.presenter.table
    store, tokens = store_of(trained_library)
    run = trained_library.feature_runs.all()[0]
    assert page.sae.currentText().startswith("BatchTopK SAE • tiny-llama-0.9m • intros • Started ")
    chips = [chip.text() for chip in page.findChildren(Badge)]
    assert "Model: tiny-llama-0.9m" in chips and "Dataset: intros" in chips
    low = np.array(store.columns["score_low"])
    scored = ~np.isnan(low)
    assert {name: tile.value for name, tile in browser.tiles.items()} == {
        "features": formatting.count(run.n_features),
        "interpretable": formatting.percent((low >= 0.7).sum() / scored.sum()),
        "l0": f"{frequency(run.summary['l0'] / run.n_features)} ({run.summary['l0']:.1f})",
        "alive": f"{run.summary['alive']} "
        f"({formatting.percent(run.summary['alive'] / run.n_features)})",
        "density": frequency(run.summary["median_density_alive"]),
    }
    assert f"of {scored.sum()} scored features" in browser.tiles["interpretable"].toolTip()

    wait_for_rows(qtbot, page)
    feature = int(table.visible[0])
    density = np.array(store.columns["density"])
    assert feature == int(np.argmax(density))
    score = float(store.columns["score"][feature])
    shown = {name: cell(table, 0, name).data() for name in ("id", "density", "score")}
    assert shown == {
        "id": f"#{feature}",
        "density": frequency(float(density[feature])),
        "score": "—" if np.isnan(score) else formatting.percent(score, 0),
    }
    best = store.examples(feature, tokens, 1)[0]
    snippet = cell(table, 0, "context").data(SNIPPET_ROLE)
    assert snippet.activations[snippet.peak] == max(snippet.activations)
    assert snippet.activations[snippet.peak] == pytest.approx(best.activation, rel=1e-3)
    assert np.array_equal(
        cell(table, 0, "histogram").data(HISTOGRAM_ROLE), store.histograms[feature]
    )
    qtbot.waitUntil(lambda: cell(table, 0, "label").data() != "…")
    assert cell(table, 0, "label").data() == page.presenter.reader.rows([feature])[0].description
    total = formatting.count(run.n_features)
    assert browser.summary.text() == f"Showing {len(table.visible)} of {total} features"
    table.set_wanted(["id", "top_token"])
    top = cell(table, 0, "top_token").data()
    assert top == f"“{page.presenter.reader.rows([feature])[0].pieces['top_token']}”"


@pytest.mark.parametrize("size", SIZES)
def test_the_table_can_be_read(qtbot: Any, trained: Services, size: tuple[int, int]) -> None:
    page = open_page(qtbot, trained, size)
    wait_for_rows(qtbot, page)
    table = page.presenter.table
    page.presenter.label(int(table.visible[1]), "Joins two nouns")
    page.presenter.star(int(table.visible[1]), True)
    assert cell(table, 1, "star").data(STAR_ROLE)  # at once
    table.set_query(table.query.with_range(Range("density", 0.0001, 0.5)))
    page.browser.by_text_button.setChecked(True)
    wait_for_rows(qtbot, page)
    shot(page, f"features_table-{size[0]}x{size[1]}")
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []


def test_rows_are_read_only_where_they_can_be_seen(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    wait_for_rows(qtbot, page)
    table = page.presenter.table
    qtbot.waitUntil(lambda: not page.presenter._reading_rows)
    last = len(table.visible) - 1
    assert table.text(int(table.visible[last])) is None
    page.browser.view.scrollToBottom()
    qtbot.waitUntil(lambda: table.text(int(table.visible[last])) is not None)


def test_sort_controls_and_header_agree(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    browser, table = page.browser, page.presenter.table
    browser.sort.set_value("max_activation")
    assert (table.query.sort, table.query.descending) == ("max_activation", True)
    browser.sort.set_value("nearest_cosine")
    assert not table.query.descending  # where less is better, the least comes first
    header, down = browser.view.horizontalHeader(), Qt.Orientation.Horizontal
    header.sectionClicked.emit(table.section("score"))
    assert table.headerData(table.section("score"), down) == "Interpretability ↓"
    header.sectionClicked.emit(table.section("score"))
    assert not table.query.descending
    header.sectionClicked.emit(table.section("id"))
    assert browser.sort.value == "id" and not table.query.descending
    browser.direction.click()
    assert np.array_equal(table.visible, np.sort(table.visible)[::-1])
    header.sectionClicked.emit(table.section("context"))  # has no order of its own
    assert table.query.sort == "id"


def test_search_finds_labels_tokens_and_texts(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    page = open_page(qtbot, trained)
    browser, table, presenter = page.browser, page.presenter.table, page.presenter
    chosen = int(table.visible[5])
    presenter.label(chosen, "Zebra crossings")
    qtbot.waitUntil(lambda: table.notes.labelled[chosen])
    browser.search.setText("crossings zebra")
    qtbot.waitUntil(lambda: table.visible.tolist() == [chosen])
    assert browser.summary.text().startswith("Showing 1 of ")
    presenter.label(chosen, "Stripes")
    qtbot.waitUntil(browser._nothing.isVisible)

    store, _ = store_of(trained_library)
    alive = store.alive

    def found(text: str, fields: tuple[str, ...]) -> list[int]:
        return [f for f in presenter.reader.search(text, fields).tolist() if alive[f]]

    browser.search.setText("the")
    everywhere = found("the", ("description", "tokens", "logits", "context"))
    qtbot.waitUntil(lambda: sorted(table.visible.tolist()) == everywhere)
    browser.fields.set_value(("logits",))
    promoted = found("the", ("logits",))
    assert 0 < len(promoted) < len(everywhere)
    qtbot.waitUntil(lambda: sorted(table.visible.tolist()) == promoted)
    browser.search.clear()
    qtbot.waitUntil(lambda: len(table.visible) == int(alive.sum()))


def test_a_discovery_of_an_earlier_version_opens_and_says_what_it_lacks(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    """The first format: seven columns, no histograms, no scores, no index of texts."""
    as_first_format(trained_library)
    page = open_page(qtbot, trained)
    browser, table = page.browser, page.presenter.table
    assert [one.name for one in table.shown] == ["id", "label", "context", "density", "star"]
    assert browser.tiles["interpretable"].value == "—"
    wait_for_rows(qtbot, page)
    qtbot.waitUntil(lambda: cell(table, 0, "label").data() != "…")
    store, _ = store_of(trained_library)
    browser.search.setText("the")
    qtbot.waitUntil(lambda: "no index" in browser._searching.text())
    assert 0 < len(table.visible) < int(store.alive.sum())


def test_a_star_is_kept_in_the_library(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    page = open_page(qtbot, trained)
    view, table = page.browser.view, page.presenter.table
    feature = int(table.visible[2])
    place = view.visualRect(cell(table, 2, "star")).center()
    qtbot.mouseClick(view.viewport(), Qt.MouseButton.LeftButton, pos=place)
    assert trained_library.feature_notes.of_sae(1)[feature].starred
    qtbot.waitUntil(lambda: bool(table.notes.starred[feature]))
    table.set_query(replace(table.query, starred=True))
    assert table.visible.tolist() == [feature]
    view.selectRow(0)
    page.browser.actions_.star.trigger()
    assert not trained_library.feature_notes.of_sae(1)[feature].starred
    qtbot.waitUntil(lambda: len(table.visible) == 0)


def test_the_page_comes_back_as_it_was(qtbot: Any, trained: Services) -> None:
    page = open_page(qtbot, trained)
    table, view = page.presenter.table, page.browser.view
    table.set_wanted(["id", "density", "label", "kurtosis", "star"])
    table.set_query(replace(table.query.with_range(Range("density", 0.005)), alive=False))
    page.browser.sort.set_value("kurtosis")
    view.horizontalHeader().resizeSection(table.section("label"), 301)
    state = json.loads(json.dumps(page.save_state()))
    other = open_page(qtbot, trained)
    other.restore_state(state)
    assert other.save_state() == state
    header = other.browser.view.horizontalHeader()
    assert header.sectionSize(table.section("label")) >= 301
    assert other.browser.view.widths == {"label": 301}
    assert np.array_equal(other.presenter.table.visible, table.visible)
    before = other.save_state()
    other.restore_state({})
    other.restore_state({"sae": 77, "sort": "density", "widths": [1], "low": "x", "query": 3})
    assert other.save_state() == before  # an earlier version's state changes nothing


def test_what_comes_too_late_is_dropped(
    qtbot: Any, trained: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(qtbot, trained)
    presenter = page.presenter
    columns = presenter.table.columns
    answer = (presenter._generation, (presenter.reader, presenter.table.notes))
    presenter._open_newest()
    presenter._on_opened(answer)  # of the SAE chosen before
    assert presenter.reader is None and presenter.table.columns is None
    qtbot.waitUntil(lambda: presenter.reader is not None)
    assert presenter.table.columns is not columns


def test_a_store_that_cannot_be_read_is_said(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    run = trained_library.feature_runs.all()[0]
    (trained_library.path(run.folder) / "run.json").unlink()
    page = open_page(qtbot, trained, wait=False)
    qtbot.waitUntil(lambda: page.stack.currentWidget() is page._before)
    assert page.card._failure.count() == 1
    assert "features are damaged" in page.card._failure.itemAt(0).widget().accessibleName()


# --- one feature ----------------------------------------------------------------------------------


def test_enter_opens_the_feature_and_its_row_is_selected_afterwards(
    qtbot: Any, trained: Services
) -> None:
    page = open_page(qtbot, trained)
    view, table = page.browser.view, page.presenter.table
    view.selectRow(3)
    qtbot.keyClick(view, Qt.Key.Key_Return)
    assert page.dialog is not None and page.dialog.feature == int(table.visible[3])
    page.dialog.next.click()
    assert page.dialog.feature == int(table.visible[4])
    page.dialog.close()
    assert page.dialog is None and view.current_feature() == int(table.visible[4])


# --- discovery ------------------------------------------------------------------------------------


def test_discover_runs_and_opens_its_table(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    trained_library.discard("feature_runs", 1)
    page = open_page(qtbot, trained, wait=False)
    assert page.stack.currentWidget() is page._before
    shot(page, "features_before-1280x720")
    assert nameless(page) == [] and cut_off(page) == []
    page.card.evaluation_tokens.setValue(4000)
    page.card.top_k.setValue(5)
    page.card.discover.click()
    (job,) = [job for job in trained.jobs.active() if job.kind == "discover"]
    asked = {"sae_id": 1, "max_tokens": 4000, "top_k": 5, "dataset_id": None,
             "max_documents": None}  # fmt: skip
    assert {name: job.params[name] for name in asked} == asked
    assert page.stack.currentWidget() is page._during
    qtbot.waitUntil(lambda: page.stack.currentWidget() is page._after)
    assert page.presenter.reader is not None
    assert page.presenter.run.summary["top_k"] == 5
    assert page.presenter.reader.columns.meta.top_k == 5
    qtbot.waitUntil(lambda: trained.jobs.running() == [])


def test_a_discovery_can_be_cancelled_and_the_old_table_stays(
    qtbot: Any, trained: Services, trained_library: Library
) -> None:
    page = open_page(qtbot, trained)
    trained.jobs.submit(Count(to=2000))  # keeps the lane
    page.browser.again.click()
    assert page.stack.currentWidget() is page._before and page.card.back.isVisible()
    page.card.discover.click()
    assert page.stack.currentWidget() is page._during
    page.cancel.click()
    qtbot.waitUntil(lambda: page.stack.currentWidget() is page._after)
    assert trained_library.feature_runs.count() == 1
    trained.jobs.cancel(trained.jobs.running()[0])
    qtbot.waitUntil(lambda: trained.jobs.running() == [])


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
    qtbot.waitUntil(lambda: page.dialog is not None)
    assert page.dialog.feature == 17
    page.activate(sae_id=1, feature=18)
    assert page.dialog.feature == 18
    page.dialog.close()


def test_background_answers_come_to_the_gui_thread_only(
    qtbot: Any, trained: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is only ever changed in the thread that shows it."""
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
