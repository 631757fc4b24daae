"""Cards of the Datasets tab: a dataset, and one in the making."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PySide6.QtCore import Qt, Signal
from PySide6.QtGui import QKeyEvent, QMouseEvent
from PySide6.QtWidgets import QFrame, QWidget

from mistudio import formatting
from mistudio.library.jobs import JobRecord
from mistudio.ui.datasets.parts import SOURCE_NAMES
from mistudio.ui.datasets.presenter import DatasetItem
from mistudio.ui.hub.transfer import Transfer
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import (
    Badge,
    Button,
    Card,
    ElidedLabel,
    ErrorPanel,
    IconButton,
    ProgressRow,
    Text,
    column,
    picture,
    row,
)

if TYPE_CHECKING:
    from mistudio.jobs.control import Snapshot


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
        texts.addWidget(ElidedLabel(f"Source: {SOURCE_NAMES[dataset.source]} • {origin}", "helper"))
        delete = IconButton("trash-2", f"Delete {dataset.name}", size=18)
        delete.clicked.connect(self._on_delete_clicked)
        status = QWidget()
        status.setLayout(
            row(picture("circle-check", tokens.EMERALD, 18), Badge("ready"), delete, spacing=8)
        )
        top = row(picture("database", tokens.BLUE, 32), texts, status, spacing=14)
        top.setStretch(1, 1)
        top.setAlignment(status, Qt.AlignmentFlag.AlignTop)
        samples = (
            "Samples: many, read where they are"
            if dataset.link
            else (f"Samples: {formatting.count(dataset.documents)}")
        )
        numbers = row(Text(samples, "small"), spacing=16)
        if not dataset.link:
            numbers.insertWidget(0, Text(f"Size: {formatting.size(dataset.bytes)}", "small"))
        numbers.addStretch(1)
        if item.tokenizations:
            badge = Badge("tokenized", "Tokenized", "emerald")
            times = "once" if item.tokenizations == 1 else f"{item.tokenizations} times"
            badge.setToolTip(f"Tokenized {times}: the Tokenization tab has the settings")
            numbers.addWidget(badge)
        layout = column(14, 20)
        layout.addLayout(top)
        layout.addLayout(numbers)
        self.setLayout(layout)

    def _on_delete_clicked(self, checked: bool = False) -> None:
        self.delete_wanted.emit(self.dataset_id)

    def mouseReleaseEvent(self, event: QMouseEvent) -> None:
        if event.button() == Qt.MouseButton.LeftButton and self.rect().contains(
            event.position().toPoint()
        ):
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
    """A dataset in the making: the job's progress and Cancel, or why it failed and Try again."""

    retry_wanted = Signal(int)
    dismissed = Signal(int)

    def __init__(self, services: Services, job: JobRecord, parent: QWidget | None = None) -> None:
        super().__init__(parent=parent)
        self._services = services
        self.job_id = job.id
        self._downloads = job.kind == "download_dataset"
        self.badge = Badge("processing")
        self.progress = ProgressRow(tone="blue")
        self.cancel = Button("Cancel", "small", "x")
        self.cancel.setAccessibleName(f"Cancel: {job.title}")
        self.cancel.clicked.connect(self._on_cancel_clicked)
        self.dismiss = IconButton("x", f"Dismiss: {job.title}", size=18)
        self.dismiss.clicked.connect(self._on_dismiss_clicked)
        self._loads = picture("loader", tokens.BLUE, 20)
        self._failed = picture("activity", tokens.RED, 20)
        head = row(
            self._loads, self._failed, ElidedLabel(job.title, "card"), self.badge, self.cancel,
            self.dismiss,
        )  # fmt: skip
        head.setStretch(2, 1)
        self.panel: ErrorPanel | None = None
        self.amount = Text("", "helper", wrap=True)
        self._transfer, self._running = Transfer(), False
        self.add(head, self.progress, self.amount)
        self.show_job(job)

    def show_job(self, job: JobRecord) -> None:
        working = "downloading" if self._downloads else "processing"
        ended = {"failed": "error", "interrupted": "interrupted"}
        status = {"queued": "queued", "paused": "paused", **ended}.get(job.status, working)
        self.badge.set_status(status)
        self._running = job.status == "running"
        failed = job.status in ended
        self._loads.setVisible(not failed)
        self.cancel.setVisible(not failed)
        self.progress.setVisible(not failed)
        self.amount.setVisible(not failed and bool(self.amount.text()))
        self._failed.setVisible(failed)
        self.dismiss.setVisible(failed)
        if failed and self.panel is None:
            self.panel = _panel_of(job)
            self.panel.retry.connect(self._on_retry_wanted)
            self.add(self.panel)
        elif not failed and self.panel is not None:
            self.panel.hide()
            self.panel.deleteLater()
            self.panel = None
        if not failed:
            self.show_progress()

    def show_progress(self) -> None:
        snapshot = self._services.jobs.snapshot(self.job_id)
        self.progress.show_snapshot(snapshot)
        said = ""
        if snapshot is not None:
            metrics = snapshot.metrics if snapshot.phase == "download" else {}
            said = self._transfer.text(metrics, self._running) or _amount(snapshot)
        if self.amount.text() != said:
            self.amount.setText(said)
        self.amount.setVisible(bool(said) and not self.progress.isHidden())

    def _on_cancel_clicked(self, checked: bool = False) -> None:
        self._services.jobs.cancel(self.job_id)

    def _on_dismiss_clicked(self, checked: bool = False) -> None:
        self.dismissed.emit(self.job_id)

    def _on_retry_wanted(self) -> None:
        self.retry_wanted.emit(self.job_id)


def _amount(snapshot: Snapshot) -> str:
    """`1.2 GB of 3.4 GB • 12,345 rows`, as far as the job tells them."""
    said = []
    metrics = snapshot.metrics
    if snapshot.phase in ("download", "read") and snapshot.done and (snapshot.total or 0) > 1:
        total = formatting.size(snapshot.total or 0)
        said.append(f"{formatting.size(snapshot.done)} of {total}")
    elif metrics.get("bytes_done"):
        said.append(formatting.size(float(metrics["bytes_done"])))
    if rows := metrics.get("rows"):
        of = f" of {formatting.count(metrics['rows_total'])}" if metrics.get("rows_total") else ""
        said.append(f"{formatting.count(rows)}{of} rows")
    return " • ".join(said)


def _panel_of(job: JobRecord) -> ErrorPanel:
    """Trying again costs nothing, so it is always offered: the file may have been mended."""
    if job.status == "interrupted":
        title, what = "This was interrupted", "miStudio was closed while it ran."
        return ErrorPanel(title, what, "Try again to go on.", retryable=True)
    error = job.error
    return ErrorPanel(
        error.get("title", "Something went wrong"),
        error.get("what", ""),
        error.get("next_step", ""),
        True,
        error.get("traceback", ""),
    )
