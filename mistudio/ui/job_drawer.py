"""The list of running and past jobs, with what can be done to each."""

from __future__ import annotations

import json

from PySide6.QtCore import Qt, Signal
from PySide6.QtGui import QShowEvent
from PySide6.QtWidgets import QApplication, QDockWidget, QFrame, QScrollArea, QWidget

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.library.jobs import ENDED, JobRecord
from mistudio.ui.crash import system_report
from mistudio.ui.services import Services
from mistudio.ui.times import clock_time, seconds_between
from mistudio.ui.widgets import (
    Badge,
    Button,
    Collapsible,
    ElidedLabel,
    EmptyState,
    IconButton,
    ProgressRow,
    Surface,
    Text,
    column,
    row,
)

SHOWN = 40  # the newest; older ones stay in the library


class JobCard(Surface):
    """One job: title, status, progress while it runs, what happened after, its buttons."""

    def __init__(
        self, services: Services, record: JobRecord, parent: QWidget | None = None
    ) -> None:
        super().__init__("row", None, 12, parent)
        self._services = services
        self.record = record
        self._kept = False  # a checkpoint to go on from
        self._title = ElidedLabel(record.title, "label")
        self._badge = Badge(record.status)
        head = row(self._title, self._badge, spacing=8)
        head.setStretch(0, 1)
        self.progress = ProgressRow()
        self._when = Text("", "helper", wrap=True)
        self._error = Text("", "error", wrap=True, selectable=True)
        self.pause = Button("Pause", "small", "pause")
        self.cancel = Button("Cancel", "small", "square")
        self.again = Button("Run again", "small", "rotate-ccw")
        self.copy = Button("Copy report", "small", "copy")
        for button, action in (
            (self.pause, self._on_pause_clicked),
            (self.cancel, self._on_cancel_clicked),
            (self.again, self._on_again_clicked),
            (self.copy, self._on_copy_clicked),
        ):
            button.clicked.connect(action)
            button.setAccessibleName(f"{button.text()}: {record.title}")
        self.add(head, self.progress, self._when, self._error)
        self.add(row(self.pause, self.cancel, self.again, self.copy, None, spacing=8))
        self.show_record(record)

    def show_record(self, record: JobRecord) -> None:
        self.record = record
        owned = self._services.jobs.owns(record.id)
        self._title.setText(record.title)
        self._badge.set_status(record.status)
        self.setAccessibleName(f"{record.title}, {record.status}")
        self.progress.setVisible(record.status in ("running", "paused"))
        self._when.setText(_when(record, owned))
        self._when.setVisible(bool(self._when.text()))
        error = record.error
        self._error.setText(
            "\n".join(error[key] for key in ("title", "what", "next_step") if error.get(key))
        )
        self._error.setVisible(record.status == "failed")
        paused = record.status == "paused"
        self.pause.setText("Resume" if paused else "Pause")
        self.pause.set_icon("play" if paused else "pause")
        self.pause.setVisible(owned and record.status in ("running", "paused"))
        self.cancel.setVisible(owned and record.active)
        self.cancel.setEnabled(True)
        self._kept = self._services.jobs.can_go_on(record)
        self.again.setText("Go on" if self._kept else "Run again")
        self.again.setVisible(record.status in ("failed", "cancelled", "interrupted"))
        self.copy.setVisible(record.status == "failed")
        self.show_progress()

    def show_progress(self) -> None:
        if self.record.status not in ("running", "paused"):
            return
        snapshot = self._services.jobs.snapshot(self.record.id)
        if snapshot:
            self.progress.show_snapshot(snapshot)
        else:  # another process runs it: its row is all there is
            self.progress.show_fraction(self.record.fraction, self.record.phase)

    def _on_pause_clicked(self, checked: bool = False) -> None:
        if self.record.status == "paused":
            self._services.jobs.resume(self.record.id)
        else:
            self._services.jobs.pause(self.record.id)

    def _on_cancel_clicked(self, checked: bool = False) -> None:
        self._badge.set_status(self.record.status, "Cancelling…", "yellow")
        self.cancel.setEnabled(False)
        self._services.jobs.cancel(self.record.id)

    def _on_again_clicked(self, checked: bool = False) -> None:
        try:
            jobs = self._services.jobs
            jobs.go_on(self.record) if self._kept else jobs.retry(self.record)
        except UserError as exc:
            self._services.toasts.error(exc)

    def _on_copy_clicked(self, checked: bool = False) -> None:
        QApplication.clipboard().setText(report(self.record))
        self.copy.setText("Copied")


def report(record: JobRecord) -> str:
    """All that is known of a failed job, for a bug report."""
    error = dict(record.error)
    trace = error.pop("traceback", "")
    return "\n".join(
        [
            system_report(),
            f"Job {record.id} {record.kind}: {record.title} ({record.status}, {record.phase})",
            f"Parameters: {json.dumps(record.params, ensure_ascii=False)}",
            *(f"{key}: {value}" for key, value in error.items()),
            trace,
        ]
    )


def _when(record: JobRecord, owned: bool) -> str:
    if record.status == "queued":
        return "Waits for the job before it" if owned else "Queued by another miStudio"
    if record.status == "interrupted":
        return "miStudio ended while this ran; what was finished before is kept."
    if record.status in ENDED and record.ended_at:
        took = seconds_between(record.started_at, record.ended_at)
        spent = f" after {formatting.duration(took)}" if took is not None else ""
        return f"Ended {clock_time(record.ended_at)}{spent}"
    return "" if owned else "Runs in another miStudio"


class JobDrawer(QDockWidget):
    """Running and waiting jobs on top, ended ones below, newest first."""

    closed = Signal()

    def __init__(self, services: Services, parent: QWidget | None = None) -> None:
        super().__init__("Jobs", parent)
        self.setObjectName("job_drawer")
        self.setFeatures(QDockWidget.DockWidgetFeature.DockWidgetClosable)
        self.setAllowedAreas(Qt.DockWidgetArea.RightDockWidgetArea)
        self.setTitleBarWidget(QWidget())
        self._services = services
        self._cards: dict[int, JobCard] = {}
        frame = QFrame()
        frame.setProperty("surface", "drawer")
        frame.setMinimumWidth(340)
        close = IconButton("x", "Close the job list", size=18)
        close.clicked.connect(self.close)
        head = row(Text("Jobs", "card"), None, close)
        head.setContentsMargins(20, 16, 12, 4)
        self._empty = EmptyState("list-checks", "No jobs yet", helper="Long work shows up here.")
        self._active = column(8)
        self._ended_section = Collapsible("Ended", 0, expanded=True)
        self._ended_section.body.setSpacing(8)
        inner = QWidget()
        inner.setProperty("surface", "clear")
        inside = column(12)
        inside.setContentsMargins(16, 8, 16, 16)
        inside.addWidget(self._empty)
        inside.addLayout(self._active)
        inside.addWidget(self._ended_section)
        inside.addStretch(1)
        inner.setLayout(inside)
        scroll = QScrollArea()
        scroll.setProperty("surface", "clear")
        scroll.setWidgetResizable(True)
        scroll.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        scroll.setWidget(inner)
        layout = column(0)
        layout.addLayout(head)
        layout.addWidget(scroll, 1)
        frame.setLayout(layout)
        self.setWidget(frame)
        self._stale = True
        services.jobs.job_changed.connect(self._on_jobs_job_changed)
        services.jobs.tick.connect(self._on_jobs_tick)

    def cards(self) -> list[JobCard]:
        return list(self._cards.values())

    def card(self, job_id: int) -> JobCard | None:
        return self._cards.get(job_id)

    def refresh(self) -> None:
        """Read the newest jobs and update the list by difference."""
        self._stale = False
        records = self._services.library.jobs.all(
            "id > (SELECT COALESCE(MAX(id), 0) - ? FROM jobs)", (SHOWN,)
        )
        wanted = {record.id for record in records}
        for job_id in [job_id for job_id in self._cards if job_id not in wanted]:
            self._drop(job_id)
        for record in reversed(records):  # oldest first: each new one goes on top
            self._show(record)
        self._show_counts()

    def _show(self, record: JobRecord) -> None:
        card = self._cards.get(record.id)
        if card is not None and card.record.active != record.active:
            self._drop(record.id)
            card = None
        if card is None:
            card = JobCard(self._services, record)
            self._cards[record.id] = card
            if record.active:  # in the order in which they run
                self._active.addWidget(card)
            else:
                self._ended_section.body.insertWidget(0, card)
        else:
            card.show_record(record)

    def _drop(self, job_id: int) -> None:
        card = self._cards.pop(job_id)
        card.hide()
        card.deleteLater()

    def _show_counts(self) -> None:
        ended = sum(not card.record.active for card in self._cards.values())
        self._empty.setVisible(not self._cards)
        self._ended_section.setVisible(ended > 0)
        self._ended_section.set_count(ended)

    def _on_jobs_job_changed(self, job_id: int) -> None:
        if not self.isVisible():
            self._stale = True
            return
        record = self._services.library.jobs.find(job_id)
        if record is None or job_id not in self._cards:
            self.refresh()
        else:
            self._show(record)
            self._show_counts()

    def _on_jobs_tick(self) -> None:
        if self.isVisible():
            for job_id in self._services.jobs.running():
                if card := self._cards.get(job_id):
                    card.show_progress()

    def showEvent(self, event: QShowEvent) -> None:
        super().showEvent(event)
        if self._stale:
            self.refresh()
