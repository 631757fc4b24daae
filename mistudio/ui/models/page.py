"""The Models tab: a form that adds models, what is being added or extracted, and what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PySide6.QtCore import Qt, Signal
from PySide6.QtGui import QDragEnterEvent, QDragLeaveEvent, QDropEvent, QKeyEvent, QMouseEvent
from PySide6.QtWidgets import (
    QDialog,
    QFileDialog,
    QFrame,
    QGridLayout,
    QHBoxLayout,
    QLineEdit,
    QVBoxLayout,
    QWidget,
)

from mistudio import formatting
from mistudio.errors import InvalidInput, UserError
from mistudio.library.jobs import JobRecord
from mistudio.library.records import Extraction
from mistudio.ui.models.dialogs import ArchitectureDialog, ExtractDialog
from mistudio.ui.models.presenter import (
    PRECISIONS,
    QUANTISED,
    QUANTISED_REASON,
    ModelItem,
    ModelsPresenter,
    layer_of,
    points_text,
    precision_text,
)
from mistudio.ui.services import Services
from mistudio.ui.theme import set_look, tokens
from mistudio.ui.times import clock_time
from mistudio.ui.widgets import (
    Badge,
    Button,
    Card,
    Choice,
    Collapsible,
    ColumnPage,
    ConfirmDialog,
    ElidedLabel,
    EmptyState,
    ErrorPanel,
    IconButton,
    PageTitle,
    ProgressRow,
    Surface,
    Text,
    clear,
    column,
    picture,
    row,
)

SAMPLE_ABOUT = "SmolLM2-135M-Instruct: 93 MB download, 260 MB on disk"


class ExtractionRow(Surface):
    """Stored activations: what, when, how much, and the mean norm of each site."""

    delete_wanted = Signal(int)

    def __init__(self, extraction: Extraction, dataset: str, parent: QWidget | None = None) -> None:
        super().__init__("row", None, 12, parent)
        self.extraction_id = extraction.id
        self.body.setSpacing(4)
        what = points_text(extraction.hook_points)
        when = clock_time(extraction.created_at)
        delete = IconButton("trash-2", f"Delete the extraction of {when}", size=16)
        delete.clicked.connect(self._on_delete_clicked)
        head = row(ElidedLabel(what, "label"), Text(when, "helper"), delete)
        head.setStretch(0, 1)
        self.add(head)
        statistics = extraction.statistics
        outliers = statistics.get("dropped_outliers")
        facts = [
            f"{formatting.count(extraction.tokens)} tokens of {dataset or 'a deleted dataset'}",
            formatting.size(extraction.bytes),
            "outliers dropped: " + ("—" if outliers is None else formatting.count(outliers)),
        ]
        self.facts = Text(" • ".join(facts), "helper", wrap=True)
        self.facts.setToolTip(
            "Outliers: tokens whose activation is longer than ten times the site's median norm "
            "at any of the sites. Position 0 of a window and special tokens are never stored."
        )
        self.add(self.facts)
        sites = statistics.get("sites", {})
        norms = [
            f"L{layer_of(point)} {formatting.number(sites[point].get('mean_norm'))}"
            for point in extraction.hook_points
            if point in sites
        ]
        self.norms = Text(f"Mean norm: {', '.join(norms)}", "helper", wrap=True)
        self.norms.setToolTip("Mean L2 norm of the stored training activations, by layer")
        self.norms.setVisible(bool(norms))
        self.add(self.norms)

    def _on_delete_clicked(self, checked: bool = False) -> None:
        self.delete_wanted.emit(self.extraction_id)


class ModelCard(QFrame):
    """One model; a click or Enter opens its architecture."""

    opened = Signal(int)
    extract_wanted = Signal(int)
    delete_wanted = Signal(int)
    extraction_delete_wanted = Signal(int)

    def __init__(
        self, item: ModelItem, expanded: bool = False, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        model = item.model
        self.item, self.model_id = item, model.id
        self.setProperty("surface", "card")
        self.setProperty("hover", "true")
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setCursor(Qt.CursorShape.PointingHandCursor)
        self.setAccessibleName(f"Model {model.name}")
        self.setAccessibleDescription("Press Enter to see its architecture")
        texts = column(4)
        texts.addWidget(ElidedLabel(model.name, "card"))
        self.about = ElidedLabel(
            f"{formatting.short_count(model.parameters)} params • "
            f"{precision_text(model.precision)} • {formatting.size(model.bytes)} on disk",
            "helper",
        )
        texts.addWidget(self.about)
        self.extract = Button("Extract Activations", "purple", "layers")
        self.extract.setAccessibleName(f"Extract activations of {model.name}")
        self.extract.clicked.connect(self._on_extract_clicked)
        delete = IconButton("trash-2", f"Delete {model.name}", size=18)
        delete.clicked.connect(self._on_delete_clicked)
        top = row(
            picture("cpu", tokens.PURPLE, 32), texts, Badge("ready"), self.extract, delete,
            spacing=14,
        )  # fmt: skip
        top.setStretch(1, 1)
        layout = column(12, 20)
        layout.addLayout(top)
        self.setLayout(layout)
        self.history = Collapsible("Extractions", len(item.extractions), expanded)
        self.history.setCursor(Qt.CursorShape.ArrowCursor)
        self.history.body.setSpacing(8)
        self.rows = []
        for extraction, dataset in zip(item.extractions, item.datasets, strict=True):
            line = ExtractionRow(extraction, dataset)
            line.delete_wanted.connect(self.extraction_delete_wanted)
            self.rows.append(line)
            self.history.add(line)
        self.history.setVisible(bool(item.extractions))
        layout.addWidget(self.history)

    def _on_extract_clicked(self, checked: bool = False) -> None:
        self.extract_wanted.emit(self.model_id)

    def _on_delete_clicked(self, checked: bool = False) -> None:
        self.delete_wanted.emit(self.model_id)

    def mouseReleaseEvent(self, event: QMouseEvent) -> None:
        place = event.position().toPoint()
        inside = self.rect().contains(place) and not (
            self.history.isVisible() and place.y() >= self.history.y()
        )
        if event.button() == Qt.MouseButton.LeftButton and inside:
            self.opened.emit(self.model_id)
        super().mouseReleaseEvent(event)

    def keyPressEvent(self, event: QKeyEvent) -> None:
        if event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter, Qt.Key.Key_Space):
            self.opened.emit(self.model_id)
        elif event.key() == Qt.Key.Key_Delete:
            self.delete_wanted.emit(self.model_id)
        else:
            super().keyPressEvent(event)


class JobCard(Card):
    """A model being added or activations being extracted: progress, or why it ended."""

    again_wanted = Signal(int)
    dismiss_wanted = Signal(int)

    def __init__(self, services: Services, job: JobRecord, parent: QWidget | None = None) -> None:
        super().__init__(parent=parent)
        self._services = services
        self.job = job
        self.badge = Badge("queued")
        self.progress = ProgressRow(tone="purple")
        self.cancel = Button("Cancel", "small", "x")
        self.again = Button("Run again", "small", "rotate-ccw")
        self.dismiss = Button("Dismiss", "small")
        for button, action in (
            (self.cancel, self._on_cancel_clicked),
            (self.again, self._on_again_clicked),
            (self.dismiss, self._on_dismiss_clicked),
        ):
            button.setAccessibleName(f"{button.text()}: {job.title}")
            button.clicked.connect(action)
        icon = "cpu" if job.kind == "add_model" else "layers"
        head = row(
            picture(icon, tokens.PURPLE, 20),
            ElidedLabel(job.title, "card"),
            self.badge,
            self.cancel,
            self.again,
            self.dismiss,
        )
        head.setStretch(1, 1)
        self.note = Text("", "helper", wrap=True)
        self._error = column(0)
        self.add(head, self.progress, self.note, self._error)
        self.show_job(job)

    def show_job(self, job: JobRecord) -> None:
        self.job = job
        words = {"queued": "Queued", "paused": "Paused", "running": "Processing"}
        self.badge.set_status(
            "processing" if job.status == "running" else job.status,
            words.get(job.status, job.status.capitalize()),
        )
        owned = self._services.jobs.owns(job.id)
        self.cancel.setVisible(job.active and owned)
        self.again.setVisible(not job.active)
        self.dismiss.setVisible(not job.active)
        self.progress.setVisible(job.status in ("running", "paused"))
        self.note.setText(_note(job, owned))
        self.note.setVisible(bool(self.note.text()))
        clear(self._error)
        if job.status == "failed":
            error = job.error
            self._error.addWidget(
                ErrorPanel(
                    error.get("title", "Something went wrong"),
                    error.get("what", ""),
                    error.get("next_step", ""),
                    report=error.get("traceback", ""),
                )
            )
        self.show_progress()

    def show_progress(self) -> None:
        snapshot = self._services.jobs.snapshot(self.job.id)
        if snapshot is None and self.job.active:  # another process runs it
            self.progress.show_fraction(self.job.fraction, self.job.phase)
            return
        self.progress.show_snapshot(snapshot)
        detail = str(snapshot.metrics.get("detail") or "") if snapshot else ""
        if detail and self.job.status == "running":
            self.progress.show_fraction(
                snapshot.fraction, detail, snapshot.elapsed, snapshot.remaining
            )

    def _on_cancel_clicked(self, checked: bool = False) -> None:
        self.cancel.setEnabled(False)
        self._services.jobs.cancel(self.job.id)

    def _on_again_clicked(self, checked: bool = False) -> None:
        self.again_wanted.emit(self.job.id)

    def _on_dismiss_clicked(self, checked: bool = False) -> None:
        self.dismiss_wanted.emit(self.job.id)


def _note(job: JobRecord, owned: bool) -> str:
    if job.status == "queued":
        return "Waits for the job before it." if owned else "Queued by another miStudio."
    if job.status == "interrupted":
        return "miStudio ended while this ran. Nothing half-made was kept; run it again."
    return ""


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

        self._drop_hint = Card()
        set_look(self._drop_hint, accent="true")
        self._drop_hint.add(EmptyState("download", "Drop the model's folder to add it"))
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
            self._make_form(),
            self._jobs_place,
        )
        page.add(self._heading, self._cards, self._empty_card)
        page.body.addStretch(1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(page)

        self.presenter.models_changed.connect(self.refresh)
        self.presenter.jobs_changed.connect(self.refresh_jobs)
        services.jobs.tick.connect(self._on_jobs_tick)
        self.refresh()
        self.refresh_jobs()

    def _make_form(self) -> Card:
        card = Card("Add a model", "download", tokens.PURPLE)
        self.source = QLineEdit()
        self.source.setPlaceholderText("e.g., EleutherAI/pythia-70m, or /home/me/models/pythia-70m")
        self.source.setClearButtonEnabled(True)
        self.source.textChanged.connect(self._on_source_text_changed)
        self.source.returnPressed.connect(self._on_add_clicked)
        label = Text("Hugging Face repository, or a local folder", "label")
        label.setBuddy(self.source)
        self.source.setAccessibleName(label.text())
        self.browse = Button("Browse…", "secondary", "folder-open")
        self.browse.clicked.connect(self._on_browse_clicked)
        self.precision = Choice(PRECISIONS)
        self.precision.setAccessibleName("Precision")
        self.precision.setMinimumWidth(304)
        for value in QUANTISED:
            self.precision.disable(value, QUANTISED_REASON)
        precision_label = Text("Precision", "label")
        precision_label.setBuddy(self.precision)
        self.source_error = Text("", "error", wrap=True)
        self.source_error.hide()
        helper = Text(
            "Only safetensors weights are read, and no code that comes with a model is run.",
            "helper",
            wrap=True,
        )
        grid = QGridLayout()
        grid.setHorizontalSpacing(12)
        grid.setVerticalSpacing(6)
        grid.addWidget(label, 0, 0)
        grid.addWidget(precision_label, 0, 2)
        grid.addWidget(self.source, 1, 0)
        grid.addWidget(self.browse, 1, 1)
        grid.addWidget(self.precision, 1, 2)
        grid.addWidget(self.source_error, 2, 0, 1, 3)
        grid.addWidget(helper, 3, 0, 1, 3)
        grid.setColumnStretch(0, 1)
        self.add_button = Button("Add Model", "primary", "download")
        self.add_button.clicked.connect(self._on_add_clicked)
        self.sample_button = Button("Add the sample model", "secondary", "flask-conical")
        self.sample_button.clicked.connect(self._on_sample_clicked)
        self.sample_about = Text(SAMPLE_ABOUT, "helper", wrap=True)
        buttons: QHBoxLayout = row(self.add_button, self.sample_button, self.sample_about)
        buttons.setStretch(2, 1)
        card.add(grid, buttons)
        return card

    # --- the page protocol ----------------------------------------------------------------------

    def activate(self, **context: Any) -> None:
        """`model_id` opens its architecture, with `extract` the extraction dialog; `add` puts the
        cursor where a model is named; `add_sample` adds the sample."""
        if context.get("add_sample"):
            self._on_sample_clicked()
        elif context.get("add"):
            self.source.setFocus(Qt.FocusReason.OtherFocusReason)
        elif "model_id" in context:
            model_id = int(context["model_id"])
            if context.get("extract"):
                self.open_extract(model_id)
            else:
                self.open(model_id)

    def save_state(self) -> dict[str, Any]:
        self._keep_extract_state()
        return {
            "source": self.source.text(),
            "precision": self.precision.value,
            "dismissed": sorted(self.presenter.dismissed)[-50:],
            "expanded": self._expanded(),
            "extract": self._extract_state,
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        self.source.setText(str(state.get("source", "")))
        if state.get("precision") not in QUANTISED:
            self.precision.set_value(state.get("precision", "auto"))
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
                card.extraction_delete_wanted.connect(self.ask_delete_extraction)
                self._cards.addWidget(card)
        self._heading.setText(f"Your Models ({formatting.count(len(items))})")
        self._heading.setVisible(bool(items))
        there = self.presenter.has_sample()
        self.sample_button.setEnabled(not there)
        self.sample_about.setText("The sample model is in your library." if there else SAMPLE_ABOUT)
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

    # --- commands -------------------------------------------------------------------------------

    def add(self, source: str) -> None:
        """Queue a job for a repository or a folder; what is wrong with it is said at the field."""
        try:
            self.presenter.add(source, self.precision.value)
        except InvalidInput as exc:
            self._show_source_error(" ".join(t for t in (exc.what, exc.next_step) if t))
        except UserError as exc:
            self._services.toasts.error(exc)
        else:
            self.source.clear()

    def _show_source_error(self, text: str) -> None:
        self.source_error.setText(f"⚠ {text}" if text else "")
        self.source_error.setVisible(bool(text))
        self.source.setAccessibleDescription(text)
        set_look(self.source, invalid="true" if text else "false")

    def _on_source_text_changed(self, text: str) -> None:
        if self.source_error.text():
            self._show_source_error("")

    def _on_add_clicked(self, checked: bool = False) -> None:
        self.add(self.source.text())

    def _on_sample_clicked(self, checked: bool = False) -> None:
        if self.presenter.has_sample():
            self._services.toasts.info("The sample model is in your library already")
            return
        try:
            self.presenter.add_sample()
        except UserError as exc:
            self._services.toasts.error(exc)

    def _on_browse_clicked(self, checked: bool = False) -> None:
        folder = QFileDialog.getExistingDirectory(self, "Choose a model's folder")
        if folder:
            self.source.setText(folder)
            self.source.setFocus(Qt.FocusReason.OtherFocusReason)

    def _on_again_wanted(self, job_id: int) -> None:
        try:
            self.presenter.run_again(self._services.library.jobs.get(job_id))
        except UserError as exc:
            self._services.toasts.error(exc)

    def open(self, model_id: int) -> None:
        """Show a model's architecture."""
        model = self._services.library.models.find(model_id)
        if model is not None:
            self._open_dialog(ArchitectureDialog(self._services, model, self))

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
        folder = path.parent if path.name in ("config.json", "model.safetensors") else path
        self.source.setText(str(folder))
        self.add(str(folder))
