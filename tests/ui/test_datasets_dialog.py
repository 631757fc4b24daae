"""A dataset's dialog: life cycle, search with its index, tokens, statistics; and the whole way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QApplication, QWidget

from mistudio.engine.datasets import search
from mistudio.engine.datasets.documents import Document, write_documents
from mistudio.library.library import Library
from mistudio.ui.datasets.dialog import DatasetDialog
from mistudio.ui.datasets.overview import RenameDialog
from mistudio.ui.datasets.page import DatasetsPage
from mistudio.ui.datasets.samples import SampleRow, _clamp, _marked
from mistudio.ui.services import Services

from .checks import cut_off, nameless, too_small
from .conftest import TINY_MODEL
from .screens import shot

ServicesOf = Callable[[Library], Services]


def stored(library: Library, texts: list[str], split: Callable[[int], str] | None = None) -> int:
    folder = library.new_folder("datasets", "stored")
    documents = (Document(t, split=split(n) if split else "") for n, t in enumerate(texts))
    written = write_documents(documents, library.path(folder))
    return library.datasets.add(
        name="stored", source="local", origin="/home/me/notes.txt", folder=folder,
        documents=written.documents, characters=written.characters, bytes=written.bytes,
        provenance={"sha256": written.sha256, "licence": "mine"},
    )  # fmt: skip


def opened(qtbot: Any, services: Services, dataset_id: int, tab: str = "overview") -> DatasetDialog:
    dialog = DatasetDialog(services, services.library.datasets.get(dataset_id), None, tab)
    qtbot.addWidget(dialog)
    dialog.resize(1152, 648)
    dialog.show()
    return dialog


def click(qtbot: Any, widget: QWidget) -> None:
    assert widget.isEnabled()
    qtbot.mouseClick(widget, Qt.MouseButton.LeftButton)


def shown(dialog: DatasetDialog) -> list[int]:
    return [row.sample.index for row in dialog.samples.rows if not row.isHidden()]


# --- life cycle -----------------------------------------------------------------------------------


def test_rename_is_shown_everywhere(qtbot: Any, library: Library, services_of: ServicesOf) -> None:
    dialog = opened(qtbot, services_of(library), stored(library, ["one"]))
    dialog.overview._on_rename_clicked()
    asked = dialog.overview.findChild(RenameDialog)
    asked.name.setText("   ")
    assert not asked.rename_button.isEnabled()
    asked.name.setText(" Another   name ")
    click(qtbot, asked.rename_button)
    qtbot.waitUntil(lambda: dialog.title.text() == "Another name")
    assert library.datasets.all()[0].name == "Another name"
    dialog.close()


def test_provenance_is_copied_and_exported_whole(
    qtbot: Any, library: Library, services_of: ServicesOf, tmp_path: Path, answer_dialogs: Any
) -> None:
    dataset_id = stored(library, ["one", "two"])
    dialog = opened(qtbot, services_of(library), dataset_id)
    target = tmp_path / "record.json"
    answer_dialogs("QFileDialog.getSaveFileName", (str(target), ""))
    dialog.overview._on_export_clicked()
    record = json.loads(target.read_text(encoding="utf-8"))
    dialog.overview._on_copy_clicked()
    copied = json.loads(QApplication.clipboard().text())
    for one in (record, copied):
        assert one["provenance"]["sha256"] == library.datasets.get(dataset_id).provenance["sha256"]
        assert (one["documents"], one["provenance"]["licence"]) == (2, "mine")
    dialog.close()


def test_disk_use_counts_every_file(qtbot: Any, library: Library, services_of: ServicesOf) -> None:
    dataset_id = stored(library, ["one", "two"])
    folder = library.path(library.datasets.get(dataset_id).folder)
    (folder / "search.index").write_bytes(bytes(4096))
    dialog = opened(qtbot, services_of(library), dataset_id)
    size = sum(path.stat().st_size for path in folder.iterdir())
    qtbot.waitUntil(lambda: "Documents" in dialog.overview.disk.toolTip())
    assert dialog.overview.disk.value == f"{size / 1024:.2f} KB".replace(".00", "")
    dialog.close()


def test_delete_from_the_dialog_closes_it(
    qtbot: Any, library: Library, services_of: ServicesOf, answer_dialogs: Any
) -> None:
    page = DatasetsPage(services_of(library))
    qtbot.addWidget(page)
    page.show()
    page.open(stored(library, ["one"]))
    assert page._dialog is not None
    answer_dialogs("ConfirmDialog.exec", 1)
    click(qtbot, page._dialog.overview.delete_button)
    qtbot.waitUntil(lambda: page._dialog is None)
    assert library.datasets.count() == 0 and len(list((library.root / "trash").iterdir())) == 1


def test_dataset_whose_index_is_being_built_is_deleted_after_the_stop(
    qtbot: Any, library: Library, services_of: ServicesOf
) -> None:
    from mistudio.jobs.searching import IndexDataset

    services = services_of(library)
    page = DatasetsPage(services)
    qtbot.addWidget(page)
    dataset_id = stored(library, ["some text to index " * 50] * 3000)
    job_id = services.jobs.submit(IndexDataset(dataset_id))
    page.presenter.delete(dataset_id)
    assert library.datasets.count() == 1  # not while something writes into its folder
    qtbot.waitUntil(lambda: library.datasets.count() == 0)
    assert library.jobs.get(job_id).status == "cancelled"


# --- samples --------------------------------------------------------------------------------------


def test_large_dataset_is_searched_while_and_after_its_index_is_built(
    qtbot: Any, library: Library, services_of: ServicesOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SCAN_BYTES", 0)
    texts = [
        f"Text {number} of many, {'needle' if number % 7 == 3 else 'hay'}" for number in range(90)
    ]
    dataset_id = stored(library, texts)
    services = services_of(library)
    dialog = opened(qtbot, services, dataset_id, "samples")
    qtbot.waitUntil(lambda: shown(dialog) == list(range(10)))
    said: list[str] = []
    dialog.presenter.index_changed.connect(said.append)
    with qtbot.waitSignal(services.jobs.job_finished):
        qtbot.keyClicks(dialog.samples.search, "NEEDLE")
        qtbot.waitUntil(lambda: shown(dialog) == list(range(3, 73, 7)))
    assert "is being built" in said[0] and said[-1] == ""
    folder = library.path(library.datasets.get(dataset_id).folder)
    assert (folder / search.INDEX).exists()
    qtbot.waitUntil(lambda: "of 13 matches" in dialog.samples.summary.text())
    click(qtbot, dialog.samples.next)
    qtbot.waitUntil(lambda: shown(dialog) == [73, 80, 87])
    assert not dialog.samples.next.isEnabled()
    dialog.samples.search.setText("no such text")
    qtbot.waitUntil(lambda: dialog.samples._nothing.isVisible())
    assert shown(dialog) == []
    dialog.close()


def test_split_is_filtered_and_searched(
    qtbot: Any, library: Library, services_of: ServicesOf
) -> None:
    dataset_id = stored(
        library, [f"text {n}" for n in range(40)], lambda n: "train" if n < 25 else "test"
    )
    dialog = opened(qtbot, services_of(library), dataset_id, "samples")
    qtbot.waitUntil(lambda: dialog.samples.split.count() == 3)
    assert dialog.samples.split.itemText(2) == "Test (15)"
    dialog.samples.split.set_value("test")
    qtbot.waitUntil(lambda: shown(dialog) == list(range(25, 35)))
    assert dialog.samples.summary.text() == "Showing 1-10 of 15"
    dialog.samples.search.setText("text 3")
    qtbot.waitUntil(lambda: shown(dialog) == list(range(30, 40)))
    dialog.close()


def test_go_to_a_far_sample(qtbot: Any, library: Library, services_of: ServicesOf) -> None:
    dialog = opened(qtbot, services_of(library), stored(library, ["x y"] * 1234), "samples")
    qtbot.waitUntil(lambda: dialog.samples.go_to.isVisible())
    dialog.samples.go_to.setValue(1005)
    qtbot.keyClick(dialog.samples.go_to, Qt.Key.Key_Return)
    qtbot.waitUntil(lambda: shown(dialog) == list(range(1000, 1010)))
    shot(dialog, "dataset-samples-far")
    assert cut_off(dialog) == []
    dialog.close()


def test_sample_is_expanded_and_copied_whole(qtbot: Any, themed: QApplication) -> None:
    from mistudio.ui.datasets.detail import Sample

    text = "\n".join(f"line {number}" for number in range(9000))
    row = SampleRow()
    qtbot.addWidget(row)
    row.show()
    row.show_sample(Sample(4, text), False)
    assert row.text.text() == "line 0\nline 1\nline 2…"
    click(qtbot, row.expand)
    assert row.text.text() == text[:20_000] and "Copy takes all" in row.about.text()
    click(qtbot, row.copy)
    assert QApplication.clipboard().text() == text
    assert nameless(row) == []


def test_match_far_inside_is_shown_and_marked() -> None:
    text = "word " * 400 + "the NEEDLE here " + "word " * 50
    short = _clamp(text, text.index("NEEDLE"))
    assert short.startswith("…") and "NEEDLE" in short
    assert ">NEEDLE</span>" in _marked(short, "needle")
    assert "&lt;b&gt;" in _marked("a <b> needle", "needle")
    assert _marked("Straße", "strasse") == ""  # folds to more letters: no marks rather than wrong


# --- tokens and statistics ------------------------------------------------------------------------


@pytest.fixture
def with_model(library: Library) -> Library:
    from mistudio.jobs.job import run_job, submit
    from mistudio.jobs.models import AddModel

    job = AddModel(str(TINY_MODEL), "fp32")
    assert run_job(library, job, submit(library, job)).status == "finished"
    return library


def test_preview_follows_text_and_settings(
    qtbot: Any, with_model: Library, services_of: ServicesOf
) -> None:
    dialog = opened(qtbot, services_of(with_model), stored(with_model, ["a b c"]), "tokenization")
    view = dialog.tokenization
    qtbot.keyClicks(view.text, "Hello there")
    qtbot.waitUntil(lambda: view.strip.isVisible())
    assert view.counted.text().endswith("tokens")
    assert view.strip.describe(0).splitlines()[1].startswith("Token ID: ")
    assert not view.form.max_length.isEnabled() and "default" in view.form.why.text()
    view.form.padding.set_value("max_length")
    assert view.form.max_length.isEnabled() and view.form.truncation.isEnabled()
    view.form.max_length.setValue(4)
    qtbot.waitUntil(lambda: "left out" in view.counted.text())
    view.text.clear()
    qtbot.waitUntil(lambda: not view.strip.isVisible())
    click(qtbot, view.sample_button)
    qtbot.waitUntil(lambda: view.text.toPlainText() == "a b c")
    shot(dialog, "dataset-tokenization-padded")
    assert cut_off(dialog) == [] and nameless(dialog) == [] and too_small(dialog) == []
    dialog.close()


def test_several_tokenizations_are_listed_and_a_second_same_one_is_reused(
    qtbot: Any, with_model: Library, services_of: ServicesOf
) -> None:
    dataset_id = stored(with_model, ["Some text to tokenize. " * 20] * 30)
    dialog = opened(qtbot, services_of(with_model), dataset_id, "tokenization")
    view = dialog.tokenization
    for padding, said in (("pack", "successfully"), ("none", "successfully"), ("pack", "reused")):
        view.form.padding.set_value(padding)
        view.form.max_length.setValue(64)
        click(qtbot, view.apply)
        assert not view.apply.isEnabled() and view.apply.text() == "Processing Dataset…"
        qtbot.waitUntil(lambda: view.apply.isEnabled())
        assert said in view.message.text()
    assert len(with_model.tokenizations.of_dataset(dataset_id)) == 2
    qtbot.waitUntil(lambda: view._done.count() == 3)  # the heading and two
    dialog.close()


def test_statistics_are_counted_once_and_taken_along(
    qtbot: Any, with_model: Library, services_of: ServicesOf, tmp_path: Path
) -> None:
    from mistudio.ui.datasets.charts import StatisticsChart

    texts = [f"A sentence number {n}, which is a little different." for n in range(60)] * 2
    dataset_id = stored(with_model, texts)
    services = services_of(with_model)
    dialog = opened(qtbot, services, dataset_id, "tokenization")
    with qtbot.waitSignal(services.jobs.job_finished):
        click(qtbot, dialog.tokenization.apply)
    with qtbot.waitSignal(services.jobs.job_finished):
        dialog.tabs.setCurrentIndex(3)
    view = dialog.statistics

    def seen() -> dict[str, StatisticsChart]:
        found = view.findChildren(StatisticsChart)
        return {chart.accessibleName(): chart for chart in found if chart.isVisible()}

    qtbot.waitUntil(lambda: len(seen()) >= 5)
    charts = seen()
    assert set(charts) == {
        "Sequence Length Distribution", "Token Frequency", "Document Length", "Languages",
        "Kinds of Characters",
    }  # fmt: skip
    for name, chart in charts.items():
        assert "Counted over" in chart.toolTip()
        lines = chart.csv().splitlines()
        assert len(lines) > 1 and lines[0].count(",") == 1
        for ending in ("png", "svg"):
            chart.save_picture(tmp_path / f"{name}.{ending}")
            assert (tmp_path / f"{name}.{ending}").stat().st_size > 500
    found = with_model.datasets.get(dataset_id).statistics
    assert found["duplicates"]["copies"] == 60
    shot(dialog, "dataset-statistics-counted")
    assert cut_off(dialog) == [] and nameless(dialog) == [] and too_small(dialog) == []
    dialog.close()
    again = opened(qtbot, services, dataset_id, "statistics")
    assert services.jobs.active() == [] and again.statistics.findChildren(StatisticsChart)
    again.close()


# --- the whole way --------------------------------------------------------------------------------


def test_from_a_file_on_the_desktop_to_tokens_in_five_clicks(
    qtbot: Any,
    with_model: Library,
    services_of: ServicesOf,
    tmp_path: Path,
    answer_dialogs: Any,
) -> None:
    """A new user, offline: nothing is typed and no default is changed."""
    file = tmp_path / "my notes.csv"
    rows = "".join(f'{n},"Once upon a time, number {n}, there was a text."\n' for n in range(400))
    file.write_text("id,story\n" + rows, encoding="utf-8")
    page = DatasetsPage(services_of(with_model))
    qtbot.addWidget(page)
    page.resize(1280, 720)
    page.show()
    began = time.monotonic()
    answer_dialogs("QFileDialog.getOpenFileNames", ([str(file)], ""))
    click(qtbot, page.add_file)  # 1
    qtbot.waitUntil(
        lambda: page._add_dialog is not None and page._add_dialog.add_button.isEnabled()
    )
    assert page._add_dialog is not None
    assert page._add_dialog.columns.currentText() == "Automatic: story"
    click(qtbot, page._add_dialog.add_button)  # 2
    qtbot.waitUntil(lambda: len(page.cards()) == 1)
    click(qtbot, page.cards()[0])  # 3
    dialog = page._dialog
    assert dialog is not None
    tab = dialog.tabs.tabBar().tabRect(2).center()
    qtbot.mouseClick(dialog.tabs.tabBar(), Qt.MouseButton.LeftButton, pos=tab)  # 4
    click(qtbot, dialog.tokenization.apply)  # 5
    qtbot.waitUntil(lambda: dialog.tokenization.message.isVisible())
    assert "successfully" in dialog.tokenization.message.text()
    assert time.monotonic() - began < 60
    made = with_model.tokenizations.all()[0]
    assert made.tokens > 400 and made.statistics["documents"] == 400
    qtbot.waitUntil(lambda: page.cards()[0].item.tokenizations == 1)
    dialog.close()
