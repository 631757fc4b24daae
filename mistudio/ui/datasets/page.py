"""The Datasets tab: cards of what there is, what is being added, and the ways to add more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PySide6.QtCore import Qt, Signal
from PySide6.QtGui import QDragEnterEvent, QDragLeaveEvent, QDropEvent, QKeyEvent, QMouseEvent
from PySide6.QtWidgets import QFileDialog, QFrame, QLineEdit, QVBoxLayout, QWidget

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.library.jobs import JobRecord
from mistudio.ui.datasets.dialogs import AddFileDialog, DatasetDialog
from mistudio.ui.datasets.presenter import (
    FILE_FILTER,
    SOURCE_NAMES,
    STRUCTURED,
    DatasetItem,
    DatasetsPresenter,
)
from mistudio.ui.services import Services
from mistudio.ui.theme import set_look, tokens
from mistudio.ui.widgets import (
    Badge,
    Button,
    Card,
    CardGrid,
    ColumnPage,
    ConfirmDialog,
    ElidedLabel,
    EmptyState,
    IconButton,
    PageTitle,
    ProgressRow,
    Text,
    column,
    debounced,
    picture,
    row,
)

SHOWN = 50  # cards; above that a filter finds the rest
FILTER_FROM = 5


class DatasetCard(QFrame):
    """One dataset; a click or Enter opens it."""

    opened = Signal(int)
    delete_wanted = Signal(int)

    def __init__(self, item: DatasetItem, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        dataset = item.dataset
        self.dataset_id = dataset.id
        self.item = item
        self.setProperty("surface", "card")
        self.setProperty("hover", "true")
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setCursor(Qt.CursorShape.PointingHandCursor)
        self.setAccessibleName(f"Dataset {dataset.name}")
        self.setAccessibleDescription("Press Enter to open it")
        texts = column(4)
        texts.addWidget(ElidedLabel(dataset.name, "card"))
        origin = Path(dataset.origin).name if dataset.source == "local" else dataset.origin
        source = ElidedLabel(f"{SOURCE_NAMES[dataset.source]} • {origin}", "helper")
        texts.addWidget(source)
        delete = IconButton("trash-2", f"Delete {dataset.name}", size=18)
        delete.clicked.connect(self._on_delete_clicked)
        top = row(picture("database", tokens.BLUE, 32), texts, delete, spacing=14)
        top.setStretch(1, 1)
        top.setAlignment(delete, Qt.AlignmentFlag.AlignTop)
        numbers = row(
            Text(f"{formatting.count(dataset.documents)} documents", "small"),
            Text("•", "helper"),
            Text(f"{formatting.short_count(dataset.characters)} characters", "small"),
            Text("•", "helper"),
            Text(formatting.size(dataset.bytes), "small"),
            None,
            spacing=8,
        )
        if item.tokenizations:
            numbers.addWidget(Badge("tokenized", "Tokenized", "emerald"))
        numbers.addWidget(Badge("ready"))
        layout = column(14, 20)
        layout.addLayout(top)
        layout.addLayout(numbers)
        self.setLayout(layout)

    def _on_delete_clicked(self, checked: bool = False) -> None:
        self.delete_wanted.emit(self.dataset_id)

    def mouseReleaseEvent(self, event: QMouseEvent) -> None:
        if event.button() == Qt.MouseButton.LeftButton and self.rect().contains(event.pos()):
            self.opened.emit(self.dataset_id)
        super().mouseReleaseEvent(event)

    def keyPressEvent(self, event: QKeyEvent) -> None:
        if event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter, Qt.Key.Key_Space):
            self.opened.emit(self.dataset_id)
        elif event.key() == Qt.Key.Key_Delete:
            self.delete_wanted.emit(self.dataset_id)
        else:
            super().keyPressEvent(event)


class AddingCard(Card):
    """A dataset in the making: the job's progress and Cancel."""

    def __init__(self, services: Services, job: JobRecord, parent: QWidget | None = None) -> None:
        super().__init__(parent=parent)
        self._services = services
        self.job_id = job.id
        self.badge = Badge("processing")
        self.progress = ProgressRow(tone="blue")
        cancel = Button("Cancel", "small", "x")
        cancel.setAccessibleName(f"Cancel: {job.title}")
        cancel.clicked.connect(self._on_cancel_clicked)
        head = row(
            picture("loader", tokens.BLUE, 20), ElidedLabel(job.title, "card"), self.badge, cancel
        )
        head.setStretch(1, 1)
        self.add(head, self.progress)
        self.show_job(job)

    def show_job(self, job: JobRecord) -> None:
        word = {"queued": "queued", "paused": "paused"}.get(job.status, "processing")
        self.badge.set_status(word)
        self.show_progress()

    def show_progress(self) -> None:
        self.progress.show_snapshot(self._services.jobs.snapshot(self.job_id))

    def _on_cancel_clicked(self, checked: bool = False) -> None:
        self._services.jobs.cancel(self.job_id)


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

        self.add_sample = Button("Add the sample", "secondary", "flask-conical")
        self.add_sample.setToolTip("A small corpus that comes with miStudio")
        self.add_sample.clicked.connect(self._on_add_sample_clicked)
        self.add_file = Button("Add a file…", "primary", "file-plus")
        self.add_file.setToolTip("A txt, md, jsonl, json, csv or tsv file (Ctrl+O)")
        self.add_file.clicked.connect(self._on_add_file_clicked)
        title = PageTitle("Datasets", "The text that models read. Files stay on this machine.")
        title.add_action(self.add_sample, self.add_file)

        self._drop_hint = Card()
        set_look(self._drop_hint, accent="true")
        self._drop_hint.add(EmptyState("download", "Drop the files to add them"))
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
            "Add the sample to try everything offline, choose a file, or drop one here.",
        )
        self._empty.action.connect(self._on_add_file_clicked)
        self._empty_card.add(self._empty)
        self._no_match = EmptyState("search", "No dataset has this name")

        page = ColumnPage()
        page.add(title, self._drop_hint, self._adding_place)
        page.add(row(self._heading, None, self._filter), self._grid)
        page.add(self._more, self._no_match, self._empty_card)
        page.body.addStretch(1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(page)

        self.presenter.datasets_changed.connect(self.refresh)
        self.presenter.jobs_changed.connect(self.refresh_jobs)
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
        return {"filter": self._filter.text()}

    def restore_state(self, state: dict[str, Any]) -> None:
        self._filter.setText(str(state.get("filter", "")))

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
                self._adding[job_id] = AddingCard(self._services, job)
                self._adding_place.addWidget(self._adding[job_id])
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

    def open(self, dataset_id: int) -> None:
        dataset = self._services.library.datasets.find(dataset_id)
        if dataset is None:
            return
        if self._dialog is not None:
            self._dialog.close()
        self._dialog = DatasetDialog(self._services, dataset, self)
        self._dialog.finished.connect(self._on_dialog_finished)
        self._dialog.open()

    def _on_dialog_finished(self, result: int) -> None:
        self._dialog = None

    def ask_delete(self, dataset_id: int) -> None:
        dataset = self._services.library.datasets.get(dataset_id)
        if refusal := self.presenter.delete_refusal(dataset_id):
            self._services.toasts.warning(f"{dataset.name} cannot be deleted", refusal)
            return
        what = (
            f"“{dataset.name}” with {formatting.count(dataset.documents)} documents and its "
            "tokenizations go to the trash, where they stay for seven days."
        )
        if not ConfirmDialog.ask(self, "Delete this dataset?", what):
            return
        try:
            self.presenter.delete(dataset_id)
        except UserError as exc:
            self._services.toasts.error(exc)
        else:
            self._services.toasts.info(
                f"{dataset.name} was deleted", "It is in the library's trash."
            )

    def add_paths(self, paths: list[Path]) -> None:
        """Add files; a structured one is asked for its text column first."""
        for path in paths:
            text_column, name = None, None
            if path.suffix.lower() in STRUCTURED:
                dialog = AddFileDialog(path, self)
                if not dialog.exec():
                    continue
                text_column, name = dialog.text_column, dialog.name
            try:
                self.presenter.add_file(path, text_column, name)
            except UserError as exc:
                self._services.toasts.error(exc)

    def _on_add_sample_clicked(self, checked: bool = False) -> None:
        try:
            self.presenter.add_sample()
        except UserError as exc:
            self._services.toasts.error(exc)

    def _on_add_file_clicked(self, checked: bool = False) -> None:
        names, _ = QFileDialog.getOpenFileNames(self, "Add text files", "", FILE_FILTER)
        self.add_paths([Path(name) for name in names])

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
