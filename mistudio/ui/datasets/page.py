"""The Datasets tab: the form for the Hub, ways to add files, cards of what there is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from PySide6.QtGui import QDragEnterEvent, QDragLeaveEvent, QDropEvent
from PySide6.QtWidgets import QFileDialog, QLineEdit, QVBoxLayout, QWidget

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.ui.datasets.add import AddFileDialog
from mistudio.ui.datasets.cards import AddingCard, DatasetCard
from mistudio.ui.datasets.dialog import DatasetDialog
from mistudio.ui.datasets.hub import HubCard
from mistudio.ui.datasets.presenter import FILE_FILTER, DatasetItem, DatasetsPresenter
from mistudio.ui.services import Services
from mistudio.ui.theme import set_look
from mistudio.ui.widgets import (
    Button,
    Card,
    CardGrid,
    ColumnPage,
    ConfirmDialog,
    EmptyState,
    PageTitle,
    Text,
    column,
    debounced,
    row,
)

if TYPE_CHECKING:
    from mistudio.jobs.datasets import AddDataset

SHOWN = 50  # cards; above that a filter finds the rest
FILTER_FROM = 5


class DatasetsPage(QWidget):
    """Takes files by button or by drag and drop."""

    def __init__(self, services: Services, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("datasets_page")
        self.setAcceptDrops(True)
        self._services = services
        self.presenter = DatasetsPresenter(services, self)
        self._adding: dict[int, AddingCard] = {}
        self._dialog: DatasetDialog | None = None
        self._add_dialog: AddFileDialog | None = None
        self._to_add: list[Path] = []

        self.add_sample = Button("Add the sample", "secondary", "flask-conical")
        self.add_sample.setToolTip("A small corpus that comes with miStudio")
        self.add_sample.clicked.connect(self._on_add_sample_clicked)
        self.add_folder = Button("Add a folder…", "secondary", "folder-open")
        self.add_folder.setToolTip("Every readable file in it, as one dataset")
        self.add_folder.clicked.connect(self._on_add_folder_clicked)
        self.add_file = Button("Add a file…", "primary", "file-plus")
        self.add_file.setToolTip(
            "txt, md, jsonl, json, csv, tsv, parquet or arrow, also packed (Ctrl+O)"
        )
        self.add_file.clicked.connect(self._on_add_file_clicked)
        title = PageTitle("Datasets", "Manage training datasets from HuggingFace or local sources")
        title.add_action(self.add_sample, self.add_folder, self.add_file)
        self.hub = HubCard(services)

        self._drop_hint = Card()
        set_look(self._drop_hint, accent="true")
        self._drop_hint.add(EmptyState("download", "Drop files or folders to add them"))
        self._drop_hint.hide()
        self._adding_place = column(12)
        self._heading = Text("", "card")
        self._filter = QLineEdit()
        self._filter.setPlaceholderText("Filter by name…")
        self._filter.setAccessibleName("Filter datasets")
        self._filter.setFixedWidth(280)
        self._filter.setClearButtonEnabled(True)
        self._filter.textChanged.connect(debounced(self, 150, self._on_filter_changed))
        self._grid = CardGrid(card_width=540)
        self._more = Text("", "helper")
        self._empty_card = Card()
        self._empty = EmptyState(
            "database",
            "No datasets yet",
            "Add a file…",
            "Download a dataset from HuggingFace to get started, choose a file or drop one here, "
            "or add the sample to try everything offline.",
        )
        self._empty.action.connect(self._on_add_file_clicked)
        self._empty_card.add(self._empty)
        self._no_match = EmptyState("search", "No dataset has this name")

        page = ColumnPage()
        page.add(title, self._drop_hint, self._adding_place, self.hub)
        page.add(row(self._heading, None, self._filter), self._grid)
        page.add(self._more, self._no_match, self._empty_card)
        page.body.addStretch(1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(page)

        self.presenter.datasets_changed.connect(self.refresh)
        self.presenter.jobs_changed.connect(self.refresh_jobs)
        self.presenter.deleted.connect(self._on_deleted)
        self.presenter.refused.connect(self._on_refused)
        services.jobs.tick.connect(self._on_jobs_tick)
        self.refresh()
        self.refresh_jobs()

    # --- the page protocol ----------------------------------------------------------------------

    def activate(self, **context: Any) -> None:
        """`dataset_id` opens it; `add` asks for a file; `add_sample` adds the sample."""
        if context.get("add_sample"):
            self._on_add_sample_clicked()
        elif context.get("add"):
            self._on_add_file_clicked()
        elif "dataset_id" in context:
            self.open(int(context["dataset_id"]))

    def save_state(self) -> dict[str, Any]:
        return {"filter": self._filter.text(), "hub": self.hub.save_state()}

    def restore_state(self, state: dict[str, Any]) -> None:
        self._filter.setText(str(state.get("filter", "")))
        hub = state.get("hub", {})
        if isinstance(hub, dict):
            self.hub.restore_state(hub)

    # --- showing --------------------------------------------------------------------------------

    def cards(self) -> list[DatasetCard]:
        return [card for card in self._grid.cards if isinstance(card, DatasetCard)]

    def refresh(self) -> None:
        """Show the datasets; nothing is rebuilt where nothing changed."""
        items = self.presenter.items()
        total = self.presenter.count()
        if [card.item for card in self.cards()] != items[:SHOWN]:
            self._grid.set_cards([self._card(item) for item in items[:SHOWN]])
        self._heading.setText(f"Your Datasets ({formatting.count(total)})")
        self._heading.setVisible(total > 0)
        self._filter.setVisible(total >= FILTER_FROM or bool(self.presenter.filter))
        hidden = len(items) - SHOWN
        self._more.setText(
            f"{formatting.count(hidden)} more: type a part of the name to find them."
        )
        self._more.setVisible(hidden > 0)
        self._no_match.setVisible(total > 0 and not items)
        self._show_empty()

    def _card(self, item: DatasetItem) -> DatasetCard:
        known = next((card for card in self.cards() if card.item == item), None)
        if known:
            return known
        card = DatasetCard(item)
        card.opened.connect(self.open)
        card.delete_wanted.connect(self.ask_delete)
        return card

    def refresh_jobs(self) -> None:
        jobs = {job.id: job for job in self.presenter.adding()}
        for job_id in [job_id for job_id in self._adding if job_id not in jobs]:
            card = self._adding.pop(job_id)
            card.hide()
            card.deleteLater()
        for job_id, job in sorted(jobs.items()):
            if job_id in self._adding:
                self._adding[job_id].show_job(job)
            else:
                card = AddingCard(self._services, job)
                card.retry_wanted.connect(self._on_retry_wanted)
                card.dismissed.connect(self.presenter.dismiss)
                self._adding[job_id] = card
                self._adding_place.addWidget(card)
        self._show_empty()

    def _show_empty(self) -> None:
        self._empty_card.setVisible(self.presenter.count() == 0 and not self._adding)

    def _on_jobs_tick(self) -> None:
        if self.isVisible():
            for card in self._adding.values():
                card.show_progress()

    def _on_filter_changed(self) -> None:
        self.presenter.set_filter(self._filter.text())

    # --- commands -------------------------------------------------------------------------------

    def open(self, dataset_id: int, tab: str = "overview") -> None:
        dataset = self._services.library.datasets.find(dataset_id)
        if dataset is None:
            return
        if self._dialog is not None:
            self._dialog.close()
        self._dialog = DatasetDialog(self._services, dataset, self, tab)
        self._dialog.finished.connect(self._on_dialog_finished)
        self._dialog.delete_wanted.connect(self.ask_delete)
        self._dialog.open()

    def _on_dialog_finished(self, result: int) -> None:
        self._dialog = None

    def ask_delete(self, dataset_id: int) -> None:
        dataset = self._services.library.datasets.get(dataset_id)
        if refusal := self.presenter.delete_refusal(dataset_id):
            self._services.toasts.warning(f"{dataset.name} cannot be deleted", refusal)
            return
        what = (
            f"“{dataset.name}” with {formatting.count(dataset.documents)} samples and its "
            "tokenizations go to the trash, where they stay for seven days."
        )
        if dataset.link:
            what = (
                f"“{dataset.name}” and its tokenizations go to the trash, where they stay for "
                "seven days. The text that it reads stays where it is."
            )
        if not ConfirmDialog.ask(self._dialog or self, "Delete this dataset?", what):
            return
        try:
            self.presenter.delete(dataset_id)
        except UserError as exc:
            self._services.toasts.error(exc)

    def _on_deleted(self, name: str) -> None:
        self._services.toasts.info(f"{name} was deleted", "It is in the library's trash.")

    def _on_refused(self, error: UserError) -> None:
        self._services.toasts.error(error)

    def _on_retry_wanted(self, job_id: int) -> None:
        try:
            self.presenter.retry(job_id)
        except UserError as exc:
            self._services.toasts.error(exc)

    def add_paths(self, paths: list[Path]) -> None:
        """Ask about each file or folder, one after the other; what cannot be read is refused."""
        for path in paths:
            try:
                self.presenter.require_readable(path)
            except UserError as exc:
                self._services.toasts.error(exc)
            else:
                self._to_add.append(path)
        if self._add_dialog is None:
            self._ask_next()

    def _ask_next(self) -> None:
        if not self._to_add:
            return
        self._add_dialog = AddFileDialog(self._services, self._to_add.pop(0), self)
        self._add_dialog.add_wanted.connect(self._on_add_wanted)
        self._add_dialog.finished.connect(self._on_add_dialog_finished)
        self._add_dialog.open()

    def _on_add_wanted(self, job: AddDataset) -> None:
        try:
            self.presenter.add(job)
        except UserError as exc:
            self._services.toasts.error(exc)

    def _on_add_dialog_finished(self, result: int) -> None:
        if self._add_dialog is not None:
            self._add_dialog.deleteLater()
            self._add_dialog = None
        self._ask_next()

    def _on_add_sample_clicked(self, checked: bool = False) -> None:
        try:
            self.presenter.add_sample()
        except UserError as exc:
            self._services.toasts.error(exc)

    def _on_add_file_clicked(self, checked: bool = False) -> None:
        names, _ = QFileDialog.getOpenFileNames(self, "Add text files", "", FILE_FILTER)
        self.add_paths([Path(name) for name in names])

    def _on_add_folder_clicked(self, checked: bool = False) -> None:
        name = QFileDialog.getExistingDirectory(self, "Add a folder of text files")
        if name:
            self.add_paths([Path(name)])

    # --- drag and drop --------------------------------------------------------------------------

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:
        if any(url.isLocalFile() for url in event.mimeData().urls()):
            event.acceptProposedAction()
            self._drop_hint.show()

    def dragLeaveEvent(self, event: QDragLeaveEvent) -> None:
        self._drop_hint.hide()

    def dropEvent(self, event: QDropEvent) -> None:
        self._drop_hint.hide()
        paths = [Path(url.toLocalFile()) for url in event.mimeData().urls() if url.isLocalFile()]
        event.acceptProposedAction()
        self.add_paths(paths)
