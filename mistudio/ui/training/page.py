"""The Training tab: the form, and below it every training that runs, failed or ended well, and
every SAE that was imported."""

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
from mistudio.ui.training.imported import Imported, ImportedCard
from mistudio.ui.training.intake import Intake
from mistudio.ui.training.presenter import Run, TrainingPresenter
from mistudio.ui.training.selection import Key, Selection
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
        self.intake = Intake(services, self)
        self._imported: dict[int, ImportedCard] = {}
        self.selection = Selection(self)
        self.selection.changed.connect(self._on_selection_changed)
        self._dismissed: set[int] = set()
        self._shown = SHOWN
        self._goal: QWidget | None = None

        self.configuration = ConfigurationCard(services, self.presenter)
        self._heading = Text("Training Jobs", "card")
        self._count = Text("", "helper")
        self.clear_selection = Button("Clear selection", "link")
        self.clear_selection.clicked.connect(self._on_clear_clicked)
        self.compare = Button("Compare", "secondary", "git-compare")
        self.compare.clicked.connect(self._on_compare_clicked)
        self.import_saes = Button("Import SAEs…", "secondary", "download")
        self.import_saes.setToolTip("SAEs of other libraries, from this computer or from the Hub")
        self.import_saes.clicked.connect(self._on_import_clicked)
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
            row(
                self._heading,
                self._count,
                None,
                self.clear_selection,
                self.compare,
                self.import_saes,
            ),
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
        self.intake.changed.connect(self._refresh_soon)
        services.jobs.tick.connect(self._on_jobs_tick)
        self._on_selection_changed()
        self.refresh()

    # --- the page protocol ----------------------------------------------------------------------

    def activate(self, **context: Any) -> None:
        """`training_id`, `job_id` or `sae_id` (imported) scrolls to its card; `model_id`,
        `dataset_id` and `extraction_id` fill the form."""
        self.configuration.choose(context.get("dataset_id"), context.get("model_id"))
        if "extraction_id" in context:
            self.configuration.choose_extraction(int(context["extraction_id"]))
        self.refresh()
        card: QWidget | None = None
        if "training_id" in context:
            card = self._runs.get(int(context["training_id"]))
        elif "job_id" in context:
            card = self._jobs.get(int(context["job_id"]))
        elif "sae_id" in context:
            card = self._imported.get(int(context["sae_id"]))
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

    def imported_cards(self) -> list[ImportedCard]:
        return list(self._imported.values())

    def refresh(self) -> None:
        """Bring the cards in line with the library, newest first; active jobs on top."""
        jobs = [job for job in self.presenter.jobs() if job.id not in self._dismissed]
        items: list[tuple[bool, str, JobRecord | Run | Imported]] = [
            *((job.active, job.created_at, job) for job in jobs),
            *((False, run.training.created_at, run) for run in self.presenter.runs()),
            *((False, one.sae.created_at, one) for one in self.intake.imported()),
        ]
        items.sort(key=lambda item: item[:2], reverse=True)
        shown = [item[2] for item in items[: self._shown]]
        keys = [_key(item) for item in shown]
        self._drop(set(keys))
        for place, item in enumerate(shown):
            card = self._card(item)
            if self._cards.indexOf(card) != place:
                self._cards.insertWidget(place, card)
        self.selection.set_order(keys)
        self._count.setText(f"({formatting.count(len(items))})" if items else "")
        self._more.setVisible(len(items) > self._shown)
        self._empty.setVisible(not items)

    def _kinds(self) -> dict[str, Any]:
        return {"job": self._jobs, "run": self._runs, "sae": self._imported}

    def _drop(self, kept: set[Key]) -> None:
        for kind, cards in self._kinds().items():
            for number in [number for number in cards if (kind, number) not in kept]:
                card = cards.pop(number)
                self.selection.detach(card)
                self._cards.removeWidget(card)
                card.hide()
                card.deleteLater()

    def _scroll_to(self, card: QWidget | None) -> None:
        """A new card has no place before the layout has run."""
        self._goal = card
        QTimer.singleShot(0, self, self._on_scroll)

    def _on_scroll(self) -> None:
        card, self._goal = self._goal, None
        shown = (*self._jobs.values(), *self._runs.values(), *self._imported.values())
        if card is not None and card in shown:
            self.column_page.widget().layout().activate()
            self.column_page.ensureWidgetVisible(card, 0, 24)

    def _card(self, item: JobRecord | Run | Imported) -> Card:
        if isinstance(item, JobRecord):
            return self._job_card(item)
        return self._run_card(item) if isinstance(item, Run) else self._imported_card(item)

    def _job_card(self, job: JobRecord) -> JobCard:
        card = self._jobs.get(job.id)
        if card is None:
            card = self._jobs[job.id] = JobCard(self._services, self.presenter, job)
            card.retry_wanted.connect(self._on_card_retry_wanted)
            card.go_on_wanted.connect(self._on_card_go_on_wanted)
            card.dismissed.connect(self._on_card_dismissed)
            if job.params.get("hook_points"):
                self.selection.attach(card, ("job", job.id), self.presenter.job_title(job))
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
            self.selection.attach(card, ("run", run.training.id), run.training.name)
        elif card.run != run:
            card.show_run(run)
        return card

    def _imported_card(self, one: Imported) -> ImportedCard:
        card = self._imported.get(one.sae.id)
        if card is None:
            card = self._imported[one.sae.id] = ImportedCard(self._services, one)
            card.discover_wanted.connect(self._on_imported_discover_wanted)
            card.explore_wanted.connect(self._on_imported_explore_wanted)
            card.measure_wanted.connect(self._on_imported_measure_wanted)
            card.export_wanted.connect(self._on_imported_export_wanted)
            card.delete_wanted.connect(self._on_imported_delete_wanted)
            self.selection.attach(card, ("sae", one.sae.id), one.sae.name)
        elif card.imported != one:
            card.show_imported(one)
        return card

    def _on_jobs_tick(self) -> None:
        if not self.isVisible():
            return
        for card in self._jobs.values():
            if card.job.active:
                card.show_progress()
        for run_card in self._runs.values():
            run_card.show_progress()
        for imported_card in self._imported.values():
            imported_card.show_progress()

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
            kept = {(kind, n) for kind, cards in self._kinds().items() for n in cards}
            self._drop(kept - {("job", job_id)})  # its charts begin anew
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

    # --- comparing ------------------------------------------------------------------------------

    def _on_selection_changed(self) -> None:
        chosen = len(self.selection.keys)
        self.compare.setText(f"Compare ({chosen})" if chosen else "Compare")
        self.compare.setEnabled(chosen > 1)
        self.compare.setToolTip(
            "Curves, settings that differ, final metrics, FVU against L0"
            if chosen > 1
            else "Choose two or more by the box on their cards, or with Ctrl+click or Shift+click"
        )
        self.clear_selection.setVisible(chosen > 0)

    def _on_clear_clicked(self, checked: bool = False) -> None:
        self.selection.clear()

    def _on_compare_clicked(self, checked: bool = False) -> None:
        # Its charts need a library that is slow to import.
        from mistudio.ui.training.compare.dialog import CompareDialog

        CompareDialog(self._services, self.selection.keys, self).show()

    # --- imported SAEs --------------------------------------------------------------------------

    def _on_import_clicked(self, checked: bool = False) -> None:
        from mistudio.ui.training.import_saes import ImportDialog

        ImportDialog(self._services, self.intake, self).open()

    def _on_imported_discover_wanted(self, sae_id: int, dataset_id: int) -> None:
        try:
            self.intake.discover(sae_id, dataset_id)
        except UserError as exc:
            self._services.toasts.error(exc)

    def _on_imported_measure_wanted(self, sae_id: int, dataset_id: int) -> None:
        try:
            self.intake.measure(sae_id, dataset_id)
        except UserError as exc:
            self._services.toasts.error(exc)

    def _on_imported_explore_wanted(self, sae_id: int) -> None:
        self._services.navigate("features", sae_id=sae_id)

    def _on_imported_export_wanted(self, sae_id: int) -> None:
        sae = self._imported[sae_id].imported.sae
        folder = QFileDialog.getExistingDirectory(self, f"Export {sae.name} into a folder")
        if not folder:
            return
        try:
            target = self.intake.export(sae, Path(folder))
        except UserError as exc:
            self._services.toasts.error(exc)
        else:
            self._services.toasts.info("Exporting", f"Into {target}")

    def _on_imported_delete_wanted(self, sae_id: int) -> None:
        one = self._imported[sae_id].imported
        if refusal := self.intake.delete_refusal(one.sae):
            self._services.toasts.warning(f"{one.sae.name} cannot be deleted", refusal)
            return
        features = " with the features discovered in it and your labels" if one.discovered else ""
        what = (
            f"“{one.sae.name}”{features} goes to the trash, where the files stay for seven days. "
            "The files that it was imported from are not touched."
        )
        if not ConfirmDialog.ask(self, "Delete this SAE?", what):
            return
        try:
            self.intake.delete(one.sae)
        except UserError as exc:
            self._services.toasts.error(exc)
        else:
            self._services.toasts.info(
                f"{one.sae.name} was deleted", "It is in the library's trash."
            )


def _key(item: JobRecord | Run | Imported) -> Key:
    """What tells cards apart, over all their kinds."""
    if isinstance(item, JobRecord):
        return "job", item.id
    return ("run", item.training.id) if isinstance(item, Run) else ("sae", item.sae.id)
