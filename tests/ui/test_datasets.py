"""The Datasets tab over a real library: what it lists, adds, reads and deletes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PySide6.QtCore import QMimeData, QObject, QPointF, Qt, QUrl
from PySide6.QtGui import QDropEvent
from PySide6.QtWidgets import QApplication

from mistudio import formatting
from mistudio.errors import InvalidInput
from mistudio.jobs.kinds import AddDataset, AddSampleDataset
from mistudio.library.library import Library
from mistudio.settings import Settings
from mistudio.ui.bridge import Background, ChangeNotifier, JobManager
from mistudio.ui.datasets.detail import PAGE, DatasetPresenter, Samples
from mistudio.ui.datasets.dialog import DatasetDialog
from mistudio.ui.datasets.page import DatasetsPage
from mistudio.ui.datasets.presenter import ADDING_KINDS
from mistudio.ui.services import Services
from mistudio.ui.widgets import StatTile, ToastArea

from .checks import cut_off, nameless, too_small
from .screens import shot


@pytest.fixture
def services(
    qtbot: Any, themed: QApplication, library: Library, jobs: JobManager, changes: ChangeNotifier
) -> Iterator[Services]:
    from PySide6.QtWidgets import QWidget

    window = QWidget()
    window.resize(1280, 720)
    qtbot.addWidget(window)
    background = Background(library)
    yield Services(
        library=library,
        jobs=jobs,
        changes=changes,
        background=background,
        settings=Settings(),
        toasts=ToastArea(window, seconds=0.2),
        navigate=lambda tab_name, **context: None,
    )
    assert background.wait(5)


def add_dataset(library: Library, name: str = "Notes", documents: int = 25, **values: Any) -> int:
    folder = library.new_folder("datasets", name)
    path = library.path(folder)
    path.mkdir(parents=True)
    offsets = [0]
    with (path / "documents.jsonl").open("wb") as file:
        for number in range(documents):
            text = f"Document {number}. " + "The quick brown fox jumps over the lazy dog. " * 4
            line = json.dumps({"text": text, "title": f"Title {number}"}).encode() + b"\n"
            file.write(line)
            offsets.append(offsets[-1] + len(line))
    np.save(path / "documents.offsets.npy", np.asarray(offsets, dtype=np.int64))
    fields: dict[str, Any] = {
        "source": "local", "origin": f"/home/me/{name}.txt", "documents": documents,
        "characters": documents * 190, "bytes": offsets[-1], "provenance": {"licence": "mine"},
    }  # fmt: skip
    return library.datasets.add(name=name, folder=folder, **(fields | values))


def add_tokenization(library: Library, dataset_id: int, folder: str = "datasets/tokens") -> int:
    library.path(folder).mkdir(parents=True)
    return library.tokenizations.add(
        dataset_id=dataset_id,
        tokenizer_hash="c0ffee12",
        settings={},
        folder=folder,
        tokens=5_234_567,
        statistics={
            "documents": 25, "tokens": 5_234_567, "unique_tokens": 50_257, "length_min": 10,
            "length_median": 487.0, "length_mean": 523.4, "length_max": 2048,
            "length_edges": [0, 100, 200, 400, 600, 800, 1000],
            "length_histogram": [120, 800, 3000, 3500, 1500, 700, 380],
        },
    )  # fmt: skip


def open_page(qtbot: Any, services: Services, size: tuple[int, int] = (1280, 720)) -> DatasetsPage:
    page = DatasetsPage(services)
    qtbot.addWidget(page)
    page.resize(*size)
    page.show()
    return page


def test_kinds_that_make_datasets_are_the_ones_of_the_jobs() -> None:
    from mistudio.jobs.hub_datasets import DownloadDataset

    assert {AddDataset.kind, AddSampleDataset.kind, DownloadDataset.kind} == set(ADDING_KINDS)


def test_empty_library_says_how_to_begin(qtbot: Any, services: Services) -> None:
    page = open_page(qtbot, services)
    assert page._empty_card.isVisible()
    assert page.cards() == []
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []


@pytest.mark.parametrize("size", [(1280, 720), (1920, 1080)])
def test_cards_show_what_there_is(
    qtbot: Any, services: Services, library: Library, size: tuple[int, int]
) -> None:
    first = add_dataset(library)
    add_dataset(library, "A dataset whose name is much longer than any card is wide, truly " * 2)
    add_dataset(library, "TinyStories", source="hub", origin="roneneldan/TinyStories")
    add_tokenization(library, first)
    page = open_page(qtbot, services, size)
    shot(page, f"datasets-{size[0]}x{size[1]}")
    names = [card.accessibleName() for card in page.cards()]
    assert names[0] == "Dataset TinyStories" and names[-1] == "Dataset Notes"
    assert [card.item.tokenizations for card in page.cards()] == [0, 0, 1]
    assert cut_off(page) == [] and nameless(page) == [] and too_small(page) == []


def test_list_follows_the_library(qtbot: Any, services: Services, library: Library) -> None:
    page = open_page(qtbot, services)
    kept = add_dataset(library, "Kept")
    qtbot.waitUntil(lambda: len(page.cards()) == 1)
    card = page.cards()[0]
    add_dataset(library, "New")
    qtbot.waitUntil(lambda: len(page.cards()) == 2)
    assert page.cards()[1] is card  # unchanged ones are not rebuilt
    assert page.cards()[1].dataset_id == kept


def test_filter_finds_by_words(qtbot: Any, services: Services, library: Library) -> None:
    for name in ("Wikipedia intros", "Wikipedia long", "Stories", "Code", "Poems"):
        add_dataset(library, name)
    page = open_page(qtbot, services)
    page._filter.setText("intros wiki")
    qtbot.waitUntil(lambda: len(page.cards()) == 1)
    page._filter.setText("nothing")
    qtbot.waitUntil(lambda: page._no_match.isVisible())
    assert page.save_state()["filter"] == "nothing"
    page.restore_state({"filter": "poems"})
    qtbot.waitUntil(lambda: [c.item.dataset.name for c in page.cards()] == ["Poems"])
    page.restore_state({})


def test_sample_is_added_by_one_click(qtbot: Any, services: Services, library: Library) -> None:
    page = open_page(qtbot, services)
    with qtbot.waitSignal(services.jobs.job_finished) as ended:
        qtbot.mouseClick(page.add_sample, Qt.MouseButton.LeftButton)
    assert ended.args[1] == "finished", library.jobs.get(ended.args[0]).error
    qtbot.waitUntil(lambda: len(page.cards()) == 1)
    assert page.cards()[0].item.dataset.source == "sample"


def accept_next(qtbot: Any, page: DatasetsPage) -> None:
    """Wait for the Add dialog to know the file, then click Add."""
    qtbot.waitUntil(lambda: page._add_dialog is not None and page._add_dialog.preview is not None)
    assert page._add_dialog is not None
    qtbot.mouseClick(page._add_dialog.add_button, Qt.MouseButton.LeftButton)


def test_file_is_added_and_its_progress_shows(
    qtbot: Any, services: Services, library: Library, tmp_path: Path, answer_dialogs: Any
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("A paragraph of text.\n\n" * 2000)
    page = open_page(qtbot, services)
    answer_dialogs("QFileDialog.getOpenFileNames", ([str(file)], ""))
    qtbot.mouseClick(page.add_file, Qt.MouseButton.LeftButton)
    with qtbot.waitSignal(services.jobs.job_finished) as ended:
        accept_next(qtbot, page)
        page.refresh_jobs()
        assert len(page._adding) == 1
        assert nameless(page) == []
    assert ended.args[1] == "finished", library.jobs.get(ended.args[0]).error
    qtbot.waitUntil(lambda: not page._adding and len(page.cards()) == 1)


def test_folder_is_added_as_one_dataset(
    qtbot: Any, services: Services, library: Library, tmp_path: Path, answer_dialogs: Any
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for split in ("train", "test"):
        rows = "".join(f"{split} text {number}\n" for number in range(3))
        (folder / f"{split}.csv").write_text("text\n" + rows)
    page = open_page(qtbot, services)
    answer_dialogs("QFileDialog.getExistingDirectory", str(folder))
    qtbot.mouseClick(page.add_folder, Qt.MouseButton.LeftButton)
    accept_next(qtbot, page)
    qtbot.waitUntil(lambda: len(page.cards()) == 1)
    assert library.datasets.all()[0].documents == 6


def drop(page: DatasetsPage, *paths: Path) -> None:
    mime = QMimeData()
    mime.setUrls([QUrl.fromLocalFile(str(path)) for path in paths])
    event = QDropEvent(
        QPointF(20, 20),
        Qt.DropAction.CopyAction,
        mime,
        Qt.MouseButton.LeftButton,
        Qt.KeyboardModifier.NoModifier,
    )
    page.dropEvent(event)


def test_dropped_files_are_added_one_by_one_and_others_refused(
    qtbot: Any, services: Services, library: Library, tmp_path: Path
) -> None:
    good, bad, packed = tmp_path / "a.md", tmp_path / "b.exe", tmp_path / "c.jsonl.gz"
    good.write_text("Some text to keep.\n" * 50)
    bad.write_text("no")
    packed.write_bytes(gzip.compress(b'{"text": "packed text"}\n'))
    page = open_page(qtbot, services)
    drop(page, good, bad, packed)
    assert "b.exe" in services.toasts.toasts[0].message
    services.toasts.toasts[0].dismiss()
    accept_next(qtbot, page)
    qtbot.waitUntil(lambda: page._add_dialog is not None and page._add_dialog.name.text() == "c")
    accept_next(qtbot, page)
    qtbot.waitUntil(lambda: len(page.cards()) == 2)
    assert {dataset.name for dataset in library.datasets.all()} == {"a", "c"}


def test_failed_file_says_why_and_is_tried_again(
    qtbot: Any, services: Services, library: Library, tmp_path: Path
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n{broken\n')
    page = open_page(qtbot, services)
    page.add_paths([file])
    accept_next(qtbot, page)
    qtbot.waitUntil(lambda: any(card.panel is not None for card in page._adding.values()))
    card = next(iter(page._adding.values()))
    assert card.panel is not None
    assert card.badge.text() == "Error" and "line 2" in card.panel.accessibleName()
    assert library.datasets.count() == 0
    assert nameless(page) == [] and cut_off(page) == []
    file.write_text('{"text": "fine"}\n{"text": "mended"}\n')
    qtbot.mouseClick(card.panel.retry_button, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: len(page.cards()) == 1)
    qtbot.waitUntil(lambda: not page._adding)


def test_failed_file_can_be_dismissed(qtbot: Any, services: Services, library: Library) -> None:
    job_id = library.jobs.submit("add_dataset", "Add x", "disk", {"path": "/nowhere"})
    library.jobs.move(job_id, ("queued",), "failed", error={"title": "File not found"})
    page = open_page(qtbot, services)
    card = page._adding[job_id]
    qtbot.mouseClick(card.dismiss, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: not page._adding)
    assert library.jobs.find(job_id) is None


def test_delete_asks_first_and_moves_to_the_trash(
    qtbot: Any, services: Services, library: Library, answer_dialogs: Any
) -> None:
    dataset_id = add_dataset(library)
    add_tokenization(library, dataset_id)
    folder = library.path(library.datasets.get(dataset_id).folder)
    page = open_page(qtbot, services)
    answer_dialogs("ConfirmDialog.exec", 0)
    page.ask_delete(dataset_id)
    assert library.datasets.count() == 1
    answer_dialogs("ConfirmDialog.exec", 1)
    page.ask_delete(dataset_id)
    assert library.datasets.count() == 0 and library.tokenizations.count() == 0
    assert not folder.exists()
    assert len(list((library.root / "trash").iterdir())) == 2
    qtbot.waitUntil(lambda: page.cards() == [])


def test_dataset_in_use_is_not_deleted_and_says_by_what(
    qtbot: Any, services: Services, library: Library
) -> None:
    dataset_id = add_dataset(library)
    tokens = add_tokenization(library, dataset_id)
    model_id = library.models.add(
        name="tiny", source="local", origin="x", folder="models/x", n_layers=2, d_model=8,
        parameters=1, bytes=1,
    )  # fmt: skip
    library.extractions.add(
        model_id=model_id, tokenization_id=tokens, hook_points=["blocks.0.hook_resid_post"],
        folder="activations/x", tokens=1, bytes=1,
    )  # fmt: skip
    page = open_page(qtbot, services)
    page.ask_delete(dataset_id)
    assert "1 extraction" in services.toasts.toasts[0].message
    with pytest.raises(InvalidInput, match="1 extraction"):
        page.presenter.delete(dataset_id)
    assert library.datasets.count() == 1
    services.toasts.toasts[0].dismiss()


class Inbox(QObject):
    """Keeps what a presenter's signal brought."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[Any] = []

    def take(self, value: object) -> None:
        self.got.append(value)


def test_samples_are_read_in_pages_and_searched(
    qtbot: Any, services: Services, library: Library
) -> None:
    dataset = library.datasets.get(add_dataset(library, documents=25))
    presenter = DatasetPresenter(services, dataset)
    inbox = Inbox()
    presenter.samples_read.connect(inbox.take)
    presenter.read_samples(20)
    qtbot.waitUntil(lambda: len(inbox.got) == 1)
    page: Samples = inbox.got[0]
    assert (page.first, page.total, [s.index for s in page.samples]) == (
        20,
        25,
        [20, 21, 22, 23, 24],
    )
    presenter.read_samples(0, "document 7.")
    qtbot.waitUntil(lambda: len(inbox.got) == 2)
    assert [sample.index for sample in inbox.got[1].samples] == [7]
    presenter.read_samples(0, "not there")
    qtbot.waitUntil(lambda: len(inbox.got) == 3)
    assert inbox.got[2].total == 0


def test_only_the_last_of_several_searches_is_shown(
    qtbot: Any, services: Services, library: Library
) -> None:
    dataset = library.datasets.get(add_dataset(library, documents=400))
    presenter = DatasetPresenter(services, dataset)
    inbox = Inbox()
    presenter.samples_read.connect(inbox.take)
    for word in ("d", "do", "doc", "document 399"):
        presenter.read_samples(0, word)
    qtbot.waitUntil(lambda: bool(inbox.got) and inbox.got[-1].search == "document 399")
    assert services.background.wait(5)
    qtbot.wait(50)
    assert inbox.got[-1].search == "document 399"


def test_dialog_shows_samples_and_statistics(
    qtbot: Any, trained_library: Library, services_of: Callable[[Library], Services]
) -> None:
    from mistudio.engine.datasets.documents import Documents
    from mistudio.engine.models.loading import load_tokenizer

    library = trained_library
    dataset = library.datasets.all()[0]
    model = library.models.all()[0]
    tokenizer = load_tokenizer(library.path(model.folder))
    ids = [
        tokenizer(document.text, add_special_tokens=False)["input_ids"]
        for document in Documents(library.path(dataset.folder))
    ]
    dialog = DatasetDialog(services_of(library), dataset)
    qtbot.addWidget(dialog)
    dialog.resize(1152, 648)
    dialog.show()
    for index, name in enumerate(("overview", "samples", "tokenization", "statistics")):
        dialog.tabs.setCurrentIndex(index)
        if index == 1:
            qtbot.waitUntil(lambda: f"of {len(ids)}" in dialog.samples.summary.text())
        shot(dialog, f"dataset-{name}")
        assert cut_off(dialog) == [] and too_small(dialog) == []
    shown = {tile.value for tile in dialog.tabs.currentWidget().findChildren(StatTile)}
    assert shown >= {
        formatting.count(len(ids)),
        formatting.count(sum(map(len, ids))),
        formatting.number(sum(map(len, ids)) / len(ids), 1),
        formatting.count(len({token for one in ids for token in one})),
    }
    assert nameless(dialog) == []
    assert dialog.samples.next.isEnabled() and not dialog.samples.previous.isEnabled()
    dialog.tabs.setCurrentIndex(1)
    qtbot.mouseClick(dialog.samples.next, Qt.MouseButton.LeftButton)
    second = f"Showing {PAGE + 1}-{2 * PAGE} of {len(ids)}"
    qtbot.waitUntil(lambda: dialog.samples.summary.text() == second)
    dialog.close()


def test_dialog_closes_when_its_dataset_is_gone(
    qtbot: Any, services: Services, library: Library
) -> None:
    dataset_id = add_dataset(library)
    page = open_page(qtbot, services)
    page.activate(dataset_id=dataset_id)
    assert page._dialog is not None
    page.presenter.delete(dataset_id)
    qtbot.waitUntil(lambda: page._dialog is None)


def test_without_a_model_tokenizing_says_what_is_missing(
    qtbot: Any, services: Services, library: Library
) -> None:
    dialog = DatasetDialog(services, library.datasets.get(add_dataset(library)))
    qtbot.addWidget(dialog)
    assert not dialog.tokenization.apply.isEnabled()
    assert "Models tab" in dialog.tokenization.picker.which.currentText()
    dialog.close()


def test_what_is_loaded_is_told_in_bytes_and_rows() -> None:
    from mistudio.jobs.control import Snapshot
    from mistudio.ui.datasets.cards import _amount

    loading = Snapshot(1, "download", 3 * 1024**2, 4 * 1024**2, 0.7, 1.0, 2.0)
    assert _amount(loading) == "3 MB of 4 MB"
    told = {"rows": 1200, "rows_total": 5000}
    reading = Snapshot(1, "read", 1024, 2048, 0.5, 1.0, None, told)
    assert _amount(reading) == "1 KB of 2 KB • 1,200 of 5,000 rows"
    limited = Snapshot(1, "read", 0.25, 1.0, 0.25, 1.0, None, {"rows": 7, "bytes_done": 512})
    assert _amount(limited) == "512 B • 7 rows"
    assert _amount(Snapshot(1, "look", 0, None, 0.0, 0.0, None)) == ""
