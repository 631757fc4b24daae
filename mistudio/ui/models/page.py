"""The Models tab: a form that adds models, what is being added or extracted, and what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PySide6.QtCore import Qt, QTimer
from PySide6.QtGui import QDragEnterEvent, QDragLeaveEvent, QDropEvent, QHideEvent, QShowEvent
from PySide6.QtWidgets import QDialog, QVBoxLayout, QWidget

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.library.library import Library
from mistudio.library.records import Model
from mistudio.ui.models.add import AddCard
from mistudio.ui.models.architecture import ArchitectureDialog
from mistudio.ui.models.candidate import Candidate, Fit, fit_of
from mistudio.ui.models.cards import JobCard, ModelCard
from mistudio.ui.models.extract import ExtractDialog
from mistudio.ui.models.presenter import Memory, ModelsPresenter, points_text, precision_text
from mistudio.ui.models.stored import ExtractionDialog
from mistudio.ui.services import Services
from mistudio.ui.theme import set_look, tokens
from mistudio.ui.widgets import (
    Card,
    ColumnPage,
    ConfirmDialog,
    EmptyState,
    PageTitle,
    Text,
    clear,
    column,
)

_LOOK_MS = 1000  # how often the page asks what is in memory


class ModelsPage(QWidget):
    """Takes a repository, a folder by button, or a folder by drag and drop."""

    def __init__(self, services: Services, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("models_page")
        self.setAcceptDrops(True)
        self._services = services
        self.presenter = ModelsPresenter(services, self)
        self._jobs: dict[int, JobCard] = {}
        self._dialog: QDialog | None = None
        self._extract_state: dict[str, Any] = {}
        self._memory: dict[int, Memory] = {}
        self.form = AddCard(services, self.presenter)
        self.form.architecture_wanted.connect(self.open_candidate)

        self._drop_hint = Card()
        set_look(self._drop_hint, accent="true")
        self._drop_hint.add(EmptyState("download", "Drop a model's folder or .gguf file to add it"))
        self._drop_hint.hide()
        self._jobs_place = column(12)
        self._heading = Text("", "card")
        self._cards = column(tokens.GAP)
        self._empty_card = Card()
        self._empty_card.add(
            EmptyState(
                "cpu",
                "No models yet",
                helper="Add the sample model to try everything, or a model of your own above.",
            )
        )
        page = ColumnPage()
        page.add(
            PageTitle(
                "Model Management",
                "The language models whose activations you look into. They stay on this machine.",
            ),
            self._drop_hint,
            self.form,
            self._jobs_place,
        )
        page.add(self._heading, self._cards, self._empty_card)
        page.body.addStretch(1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(page)

        self.presenter.models_changed.connect(self.refresh)
        self.presenter.jobs_changed.connect(self.refresh_jobs)
        self.presenter.loaded_changed.connect(self._show_loaded)
        self.presenter.memory_known.connect(self._on_memory_known)
        services.jobs.tick.connect(self._on_jobs_tick)
        services.jobs.idle.connect(self._show_loaded)
        self._look_timer = QTimer(self)
        self._look_timer.setInterval(_LOOK_MS)
        self._look_timer.timeout.connect(self._show_loaded)
        self.refresh()
        self.refresh_jobs()

    # --- the page protocol ----------------------------------------------------------------------

    def activate(self, **context: Any) -> None:
        """`model_id` opens its architecture, with `extract` the extraction dialog; `add` puts the
        cursor where a model is named; `add_sample` adds the sample."""
        if context.get("add_sample"):
            self.form.add_sample()
        elif context.get("add"):
            self.form.source.setFocus(Qt.FocusReason.OtherFocusReason)
        elif "model_id" in context:
            model_id = int(context["model_id"])
            if context.get("extract"):
                self.open_extract(model_id)
            else:
                self.open(model_id)

    def save_state(self) -> dict[str, Any]:
        self._keep_extract_state()
        return {
            "form": self.form.save_state(),
            "dismissed": sorted(self.presenter.dismissed)[-50:],
            "expanded": self._expanded(),
            "extract": self._extract_state,
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        form = state.get("form")
        self.form.restore_state(form if isinstance(form, dict) else {})
        self.presenter.dismissed.update(
            job_id for job_id in state.get("dismissed", []) if isinstance(job_id, int)
        )
        extract = state.get("extract")
        self._extract_state = extract if isinstance(extract, dict) else {}
        for card in self.cards():
            card.history.set_expanded(card.model_id in state.get("expanded", []))
        self.refresh_jobs()

    # --- showing --------------------------------------------------------------------------------

    def cards(self) -> list[ModelCard]:
        widgets = (self._cards.itemAt(i).widget() for i in range(self._cards.count()))
        return [widget for widget in widgets if isinstance(widget, ModelCard)]

    def job_cards(self) -> dict[int, JobCard]:
        return dict(self._jobs)

    def _expanded(self) -> list[int]:
        return [card.model_id for card in self.cards() if card.history.expanded]

    def refresh(self) -> None:
        """Show the models; nothing is rebuilt where nothing changed."""
        items = self.presenter.items()
        if [card.item for card in self.cards()] != items:
            expanded = self._expanded()
            clear(self._cards)
            for item in items:
                card = ModelCard(item, item.model.id in expanded)
                card.opened.connect(self.open)
                card.extract_wanted.connect(self.open_extract)
                card.delete_wanted.connect(self.ask_delete)
                card.unload_wanted.connect(self.presenter.unload)
                card.measure_wanted.connect(self._on_measure_wanted)
                card.extraction_delete_wanted.connect(self.ask_delete_extraction)
                card.extraction_opened.connect(self.open_extraction)
                card.show_memory(self._memory.get(item.model.id))
                self._cards.addWidget(card)
            self._show_loaded()
            self._ask_memory()
        self._heading.setText(f"Your Models ({formatting.count(len(items))})")
        self._heading.setVisible(bool(items))
        self.form.refresh()
        self._show_empty()

    def refresh_jobs(self) -> None:
        jobs = {job.id: job for job in self.presenter.jobs()}
        for job_id in [job_id for job_id in self._jobs if job_id not in jobs]:
            card = self._jobs.pop(job_id)
            card.hide()
            card.deleteLater()
        for job_id, job in jobs.items():
            if job_id in self._jobs:
                if self._jobs[job_id].job != job:
                    self._jobs[job_id].show_job(job)
            else:
                card = JobCard(self._services, job)
                card.again_wanted.connect(self._on_again_wanted)
                card.dismiss_wanted.connect(self.presenter.dismiss)
                self._jobs[job_id] = card
                self._jobs_place.addWidget(card)
        self._show_empty()

    def _show_empty(self) -> None:
        adding = any(card.job.active for card in self._jobs.values())
        self._empty_card.setVisible(not self.cards() and not adding)

    def _on_jobs_tick(self) -> None:
        if self.isVisible():
            for card in self._jobs.values():
                if card.job.active:
                    card.show_progress()

    # --- memory ---------------------------------------------------------------------------------

    def _ask_memory(self) -> None:
        """Once for each model, when the page is looked at; what is free changes all the time."""
        unknown = [card.item.model for card in self.cards() if card.model_id not in self._memory]
        if unknown and self.isVisible():
            self.presenter.ask_memory(unknown)

    def _on_memory_known(self, found: dict[int, Memory]) -> None:
        self._memory |= found
        for card in self.cards():
            card.show_memory(self._memory.get(card.model_id))

    def _show_loaded(self) -> None:
        loaded = self.presenter.loaded()
        for card in self.cards():
            card.show_loaded(loaded.get(card.model_id))

    def showEvent(self, event: QShowEvent) -> None:
        super().showEvent(event)
        self.form.learn_device()
        self._ask_memory()
        self._show_loaded()
        self._look_timer.start()

    def hideEvent(self, event: QHideEvent) -> None:
        self._look_timer.stop()
        super().hideEvent(event)

    # --- commands -------------------------------------------------------------------------------

    def _on_measure_wanted(self, model_id: int) -> None:
        try:
            self.presenter.measure_quality(model_id)
        except UserError as exc:
            self._services.toasts.error(exc)

    def _on_again_wanted(self, job_id: int) -> None:
        try:
            self.presenter.run_again(self._services.library.jobs.get(job_id))
        except UserError as exc:
            self._services.toasts.error(exc)

    def open(self, model_id: int) -> None:
        """Show a model's architecture."""
        model = self._services.library.models.find(model_id)
        if model is not None:
            library = self._services.library
            self._open_dialog(
                ArchitectureDialog(
                    self._services,
                    model.name,
                    f"{precision_text(model.precision)} • {formatting.size(model.bytes)} on disk",
                    lambda: _fit_of_model(library, model),
                    self,
                )
            )

    def open_candidate(self, candidate: Candidate) -> None:
        """Show the architecture of a model that is not here yet."""
        about = f"not added yet • {formatting.size(candidate.fetch)}"
        self._open_dialog(
            ArchitectureDialog(self._services, candidate.name, about, lambda: candidate.fit, self)
        )

    def open_extraction(self, extraction_id: int) -> None:
        """Show stored activations: statistics and preview."""
        for card in self.cards():
            for extraction, dataset in zip(card.item.extractions, card.item.datasets, strict=True):
                if extraction.id == extraction_id:
                    self._open_dialog(ExtractionDialog(self._services, extraction, dataset, self))
                    return

    def open_extract(self, model_id: int) -> None:
        model = self._services.library.models.find(model_id)
        if model is not None:
            self._keep_extract_state()
            self._open_dialog(ExtractDialog(self._services, model, self._extract_state, self))

    def _open_dialog(self, dialog: QDialog) -> None:
        if self._dialog is not None:
            self._dialog.close()
        self._dialog = dialog
        dialog.finished.connect(self._on_dialog_finished)
        dialog.open()

    def _on_dialog_finished(self, result: int) -> None:
        self._keep_extract_state()
        self._dialog = None

    def _keep_extract_state(self) -> None:
        if isinstance(self._dialog, ExtractDialog):
            self._extract_state = self._dialog.save_state()

    def ask_delete(self, model_id: int) -> None:
        model = self._services.library.models.get(model_id)
        if refusal := self.presenter.delete_refusal(model_id):
            self._services.toasts.warning(f"{model.name} cannot be deleted", refusal)
            return
        what = (
            f"“{model.name}” ({formatting.size(model.bytes)}) goes to the trash, where it stays "
            "for seven days."
        )
        if not ConfirmDialog.ask(self, "Delete this model?", what):
            return
        try:
            self.presenter.delete(model_id)
        except UserError as exc:
            self._services.toasts.error(exc)
        else:
            self._services.toasts.info(f"{model.name} was deleted", "It is in the library's trash.")

    def ask_delete_extraction(self, extraction_id: int) -> None:
        extraction = self._services.library.extractions.get(extraction_id)
        if refusal := self.presenter.extraction_refusal(extraction_id):
            self._services.toasts.warning("These activations cannot be deleted", refusal)
            return
        what = (
            f"{points_text(extraction.hook_points)}: {formatting.count(extraction.tokens)} tokens "
            f"({formatting.size(extraction.bytes)}) go to the trash, where they stay for seven "
            "days. They can be extracted again."
        )
        if not ConfirmDialog.ask(self, "Delete these activations?", what):
            return
        try:
            self.presenter.delete_extraction(extraction_id)
        except UserError as exc:
            self._services.toasts.error(exc)

    # --- drag and drop --------------------------------------------------------------------------

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:
        if any(url.isLocalFile() for url in event.mimeData().urls()):
            event.acceptProposedAction()
            self._drop_hint.show()

    def dragLeaveEvent(self, event: QDragLeaveEvent) -> None:
        self._drop_hint.hide()

    def dropEvent(self, event: QDropEvent) -> None:
        self._drop_hint.hide()
        event.acceptProposedAction()
        for url in event.mimeData().urls():
            if url.isLocalFile():
                self._add_dropped(Path(url.toLocalFile()))

    def _add_dropped(self, path: Path) -> None:
        """A file of a model's folder stands for the folder."""
        inside = path.name == "config.json" or path.suffix == ".safetensors"
        source = str(path.parent if inside else path)
        self.form.source.setText(source)
        self.form.look_at(source, adding=True)


def _fit_of_model(library: Library, model: Model) -> Fit:
    from mistudio.engine.models.architecture import read_architecture

    return fit_of(library, read_architecture(library.path(model.folder)))
