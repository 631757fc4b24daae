"""A piece of work that costs forward passes: what it will take, how far it is, what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from PySide6.QtCore import Signal
from PySide6.QtWidgets import QWidget

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library
from mistudio.library.records import FeatureRun
from mistudio.ui.services import Services
from mistudio.ui.widgets import Button, ErrorPanel, ProgressRow, Text, clear, column, row


class JobPanel(QWidget):
    """A button with its estimate; the job's progress with Cancel while it is queued or runs; its
    error where it failed. `mine` tells this panel's jobs from others. Emits `ended` when one is
    over, however."""

    ended = Signal()

    def __init__(
        self,
        services: Services,
        title: str,
        icon: str,
        kind: str,
        mine: Callable[[JobRecord], bool],
        make: Callable[[], Any],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._services, self._kind, self._mine, self._make = services, kind, mine, make
        self._job_id: int | None = None
        self.button = Button(title, "primary", icon)
        self.button.clicked.connect(self._on_button_clicked)
        self.estimate = Text("", "helper", wrap=True)
        self.progress = ProgressRow()
        self.cancel = Button("Cancel", "small")
        self.cancel.clicked.connect(self._on_cancel_clicked)
        self._start, self._during = QWidget(), QWidget()
        start = row(self.button, self.estimate)
        start.setStretch(1, 1)
        during = row(self.progress, self.cancel)
        during.setStretch(0, 1)
        self._start.setLayout(start)
        self._during.setLayout(during)
        self._failure = column(8)
        layout = column(10)
        layout.addWidget(self._start)
        layout.addWidget(self._during)
        layout.addLayout(self._failure)
        self.setLayout(layout)
        services.jobs.job_changed.connect(self._on_jobs_job_changed)
        services.jobs.tick.connect(self._on_jobs_tick)
        self.refresh()

    def set_title(self, title: str, variant: str) -> None:
        self.button.setText(title)
        self.button.set_variant(variant)

    def set_estimate(self, text: str) -> None:
        self.estimate.setText(text)

    @property
    def job(self) -> JobRecord | None:
        """This panel's job that is queued or runs."""
        found = [job for job in self._services.jobs.active() if job.kind == self._kind]
        return next((job for job in found if self._mine(job)), None)

    def refresh(self) -> None:
        """Another feature: another job may be the one."""
        job, was_running = self.job, self._job_id is not None
        self._job_id = job.id if job else None
        self._start.setVisible(job is None)
        self._during.setVisible(job is not None)
        clear(self._failure)
        if job is None:
            newest = next(
                (j for j in self._services.library.jobs.all("kind = ?", (self._kind,))
                 if self._mine(j)), None,
            )  # fmt: skip
            if newest is not None and newest.status == "failed":
                self._failure.addWidget(ErrorPanel.of_row(newest.error))
            if was_running:
                self.ended.emit()
        self._on_jobs_tick()

    def _on_button_clicked(self, checked: bool = False) -> None:
        try:
            self._services.jobs.submit(self._make())
        except UserError as exc:
            clear(self._failure)
            self._failure.addWidget(ErrorPanel.of_error(exc))
            return
        self.refresh()

    def _on_cancel_clicked(self, checked: bool = False) -> None:
        if self._job_id is not None:
            self._services.jobs.cancel(self._job_id)

    def _on_jobs_job_changed(self, job_id: int) -> None:
        job = self._services.library.jobs.find(job_id)
        if job is not None and job.kind == self._kind and self._mine(job):
            self.refresh()

    def _on_jobs_tick(self) -> None:
        if self._job_id is None or not self.isVisible():
            return
        snapshot = self._services.jobs.snapshot(self._job_id)
        if snapshot is not None:
            self.progress.show_snapshot(snapshot)
        else:
            self.progress.show_fraction(None, "Waiting for its turn")


def estimate(library: Library, run: FeatureRun | None, tokens: float) -> str:
    """How long passes over so many tokens take, by how fast the discovery went here."""
    speed = speed_of(library, run) if run else None
    if speed is None:
        return "How long it takes is not known yet: no discovery was timed here."
    told = formatting.duration(tokens / speed)
    return f"About {told} at the {formatting.count(speed)} tokens/s of its discovery."


def speed_of(library: Library, run: FeatureRun) -> float | None:
    """Tokens per second of the job that made a discovery, loading the model included; None where
    its row is gone, or where it may have read stored activations: the model did not run then."""
    training = library.saes.get(run.sae_id).training_id
    record = library.trainings.find(training) if training is not None else None
    if record is not None and record.extraction_id is not None:
        return None
    for job in library.jobs.all("kind IN ('discover', 'discover_run') AND status = 'finished'"):
        numbers = [job.result.get("feature_run_id"), *job.result.get("feature_run_ids", [])]
        if run.id in numbers and job.started_at and job.ended_at:
            began, ended = (datetime.fromisoformat(t) for t in (job.started_at, job.ended_at))
            seconds = (ended - began).total_seconds()
            return run.tokens / seconds if seconds > 0 else None
    return None
