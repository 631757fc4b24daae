"""The Training tab: the form, and below it every training that runs, failed or ended well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PySide6.QtCore import QTimer
from PySide6.QtWidgets import QFileDialog, QVBoxLayout, QWidget

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.library.jobs import JobRecord
from mistudio.ui.services import Services
from mistudio.ui.training.cards import JobCard, RunCard
from mistudio.ui.training.configuration import ConfigurationCard
from mistudio.ui.training.presenter import Run, TrainingPresenter
from mistudio.ui.widgets import (
    Button,
    Card,
    ColumnPage,
    ConfirmDialog,
    EmptyState,
    Text,
    column,
    debounced,
    row,
)

SHOWN = 12  # cards; Show more adds as many


class TrainingPage(QWidget):
    """Form on top, cards below; cards are changed by difference, never rebuilt."""

    def __init__(self, services: Services, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("training_page")
        self._services = services
        self.presenter = TrainingPresenter(services, self)
        self._jobs: dict[int, JobCard] = {}
        self._runs: dict[int, RunCard] = {}
        self._dismissed: set[int] = set()
        self._shown = SHOWN
        self._goal: QWidget | None = None

        self.configuration = ConfigurationCard(services, self.presenter)
        self._heading = Text("Training Jobs", "card")
        self._count = Text("", "helper")
        self._cards = column(16)
        self._more = Button("Show more", "secondary", "chevron-down")
        self._more.clicked.connect(self._on_more_clicked)
        self._empty = Card()
        self._empty.add(
            EmptyState("activity", "No training jobs yet. Configure and start training above.")
        )
        self.column_page = ColumnPage()
        self.column_page.add(
            self.configuration,
            row(self._heading, self._count, None),
            self._cards,
            row(None, self._more, None),
            self._empty,
        )
        self.column_page.body.addStretch(1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.column_page)

        self._refresh_soon = debounced(self, 50, self.refresh)
        self.presenter.list_changed.connect(self._refresh_soon)
        self.presenter.submitted.connect(self._on_presenter_submitted)
        services.jobs.tick.connect(self._on_jobs_tick)
        self.refresh()

    # --- the page protocol ----------------------------------------------------------------------

    def activate(self, **context: Any) -> None:
        """`training_id` or `job_id` scrolls to its card; `model_id`, `dataset_id` and
        `extraction_id` fill the form."""
        self.configuration.choose(context.get("dataset_id"), context.get("model_id"))
        if "extraction_id" in context:
            self.configuration.choose_extraction(int(context["extraction_id"]))
        self.refresh()
        card: QWidget | None = None
        if "training_id" in context:
            card = self._runs.get(int(context["training_id"]))
        elif "job_id" in context:
            card = self._jobs.get(int(context["job_id"]))
        self._scroll_to(card)

    def save_state(self) -> dict[str, Any]:
        return {**self.configuration.save_state(), "dismissed": sorted(self._dismissed)}

    def restore_state(self, state: dict[str, Any]) -> None:
        dismissed = state.get("dismissed")
        if isinstance(dismissed, list):
            self._dismissed = {job_id for job_id in dismissed if isinstance(job_id, int)}
        self.configuration.restore_state(state)
        self.refresh()

    # --- showing --------------------------------------------------------------------------------

    def job_cards(self) -> list[JobCard]:
        return list(self._jobs.values())

    def run_cards(self) -> list[RunCard]:
        return list(self._runs.values())

    def refresh(self) -> None:
        """Bring the cards in line with the library, newest first; active jobs on top."""
        jobs = [job for job in self.presenter.jobs() if job.id not in self._dismissed]
        runs = self.presenter.runs()
        items: list[tuple[bool, str, JobRecord | Run]] = [
            *((job.active, job.created_at, job) for job in jobs),
            *((False, run.training.created_at, run) for run in runs),
        ]
        items.sort(key=lambda item: item[:2], reverse=True)
        shown = [item[2] for item in items[: self._shown]]
        self._drop({i.id for i in shown if isinstance(i, JobRecord)},
                   {i.training.id for i in shown if isinstance(i, Run)})  # fmt: skip
        for place, item in enumerate(shown):
            card = self._job_card(item) if isinstance(item, JobRecord) else self._run_card(item)
            if self._cards.indexOf(card) != place:
                self._cards.insertWidget(place, card)
        self._count.setText(f"({formatting.count(len(items))})" if items else "")
        self._more.setVisible(len(items) > self._shown)
        self._empty.setVisible(not items)

    def _drop(self, jobs: set[int], runs: set[int]) -> None:
        for cards, kept in ((self._jobs, jobs), (self._runs, runs)):
            for key in [key for key in cards if key not in kept]:
                card = cards.pop(key)
                self._cards.removeWidget(card)
                card.hide()
                card.deleteLater()

    def _scroll_to(self, card: QWidget | None) -> None:
        """A new card has no place before the layout has run."""
        self._goal = card
        QTimer.singleShot(0, self, self._on_scroll)

    def _on_scroll(self) -> None:
        card, self._goal = self._goal, None
        if card is not None and card in (*self._jobs.values(), *self._runs.values()):
            self.column_page.widget().layout().activate()
            self.column_page.ensureWidgetVisible(card, 0, 24)

    def _job_card(self, job: JobRecord) -> JobCard:
        card = self._jobs.get(job.id)
        if card is None:
            card = self._jobs[job.id] = JobCard(self._services, self.presenter, job)
            card.retry_wanted.connect(self._on_card_retry_wanted)
            card.go_on_wanted.connect(self._on_card_go_on_wanted)
            card.dismissed.connect(self._on_card_dismissed)
        elif card.job != job:
            card.show_job(job)
        return card

    def _run_card(self, run: Run) -> RunCard:
        card = self._runs.get(run.training.id)
        if card is None:
            card = self._runs[run.training.id] = RunCard(self._services, self.presenter, run)
            card.discover_wanted.connect(self._on_card_discover_wanted)
            card.explore_wanted.connect(self._on_card_explore_wanted)
            card.export_wanted.connect(self._on_card_export_wanted)
            card.delete_wanted.connect(self._on_card_delete_wanted)
        elif card.run != run:
            card.show_run(run)
        return card

    def _on_jobs_tick(self) -> None:
        if not self.isVisible():
            return
        for card in self._jobs.values():
            if card.job.active:
                card.show_progress()
        for run_card in self._runs.values():
            run_card.show_progress()

    # --- commands -------------------------------------------------------------------------------

    def _on_presenter_submitted(self, job_id: int) -> None:
        self.refresh()
        self._scroll_to(self._jobs.get(job_id))

    def _on_card_retry_wanted(self, job_id: int) -> None:
        if (card := self._jobs.get(job_id)) is not None:
            self._dismissed.add(job_id)
            self.presenter.retry(card.job)

    def _on_card_go_on_wanted(self, job_id: int) -> None:
        if (card := self._jobs.get(job_id)) is not None:
            self._drop(set(self._jobs) - {job_id}, set(self._runs))  # its charts begin anew
            self.presenter.go_on(card.job)

    def _on_card_dismissed(self, job_id: int) -> None:
        self._dismissed.add(job_id)
        self.refresh()

    def _on_card_discover_wanted(self, training_id: int) -> None:
        try:
            self.presenter.discover(self._runs[training_id].run)
        except UserError as exc:
            self._services.toasts.error(exc)

    def _on_card_explore_wanted(self, training_id: int) -> None:
        run = self._runs[training_id].run
        sae = next(sae for sae in run.saes if sae.id in run.discovered)
        self._services.navigate("features", sae_id=sae.id)

    def _on_card_export_wanted(self, training_id: int) -> None:
        training = self._runs[training_id].run.training
        folder = QFileDialog.getExistingDirectory(self, f"Export {training.name} into a folder")
        if not folder:
            return
        try:
            target = self.presenter.export(training, Path(folder))
        except UserError as exc:
            self._services.toasts.error(exc)
        else:
            self._services.toasts.info("Exporting", f"Into {target}")

    def _on_card_delete_wanted(self, training_id: int) -> None:
        run = self._runs[training_id].run
        if refusal := self.presenter.delete_refusal(run.training):
            self._services.toasts.warning(f"{run.title} cannot be deleted", refusal)
            return
        saes = f"{len(run.saes)} SAE{'s' if len(run.saes) != 1 else ''}"
        features = ", the features discovered in them and your labels" if run.discovered else ""
        what = (
            f"“{run.training.name}” with its {saes}{features} goes to the trash, where the files "
            "stay for seven days."
        )
        if not ConfirmDialog.ask(self, "Delete this run?", what):
            return
        try:
            self.presenter.delete(run.training)
        except UserError as exc:
            self._services.toasts.error(exc)
        else:
            self._services.toasts.info(f"{run.title} was deleted", "It is in the library's trash.")

    def _on_more_clicked(self, checked: bool = False) -> None:
        self._shown += SHOWN
        self.refresh()
