"""Cards of the Models tab: a model with its extractions, and a job that makes either."""

from __future__ import annotations

from PySide6.QtCore import Qt, Signal
from PySide6.QtGui import QKeyEvent, QMouseEvent
from PySide6.QtWidgets import QFrame, QWidget

from mistudio import formatting
from mistudio.library.jobs import JobRecord
from mistudio.library.records import Extraction
from mistudio.ui.hub.transfer import Transfer
from mistudio.ui.models.presenter import (
    QUANTISED,
    Memory,
    ModelItem,
    layer_of,
    points_text,
    precision_text,
    verdict_of,
)
from mistudio.ui.services import Services
from mistudio.ui.theme import set_look, tokens
from mistudio.ui.times import clock_time
from mistudio.ui.widgets import (
    Badge,
    Button,
    Card,
    Collapsible,
    ElidedLabel,
    ErrorPanel,
    IconButton,
    ProgressRow,
    Surface,
    Text,
    clear,
    column,
    picture,
    row,
)


class ExtractionRow(Surface):
    """Stored activations: what, when, how much, and the mean norm of each site."""

    delete_wanted = Signal(int)
    opened = Signal(int)

    def __init__(self, extraction: Extraction, dataset: str, parent: QWidget | None = None) -> None:
        super().__init__("row", None, 12, parent)
        self.extraction_id = extraction.id
        self.body.setSpacing(4)
        what = points_text(extraction.hook_points)
        when = clock_time(extraction.created_at)
        self.look = Button("Statistics and preview", "small", "chart-line")
        self.look.setAccessibleName(f"Statistics and preview of the extraction of {when}")
        self.look.clicked.connect(self._on_look_clicked)
        delete = IconButton("trash-2", f"Delete the extraction of {when}", size=16)
        delete.clicked.connect(self._on_delete_clicked)
        head = row(ElidedLabel(what, "label"), Text(when, "helper"), self.look, delete)
        head.setStretch(0, 1)
        self.add(head)
        statistics = extraction.statistics
        outliers = statistics.get("dropped_outliers")
        facts = [
            f"{formatting.count(extraction.tokens)} tokens of {dataset or 'a deleted dataset'}",
            f"{formatting.size(extraction.bytes)} on disk",
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
        self.norms = ElidedLabel(f"Mean norm: {', '.join(norms)}", "helper")
        self.norms.setVisible(bool(norms))
        self.add(self.norms)

    def _on_look_clicked(self, checked: bool = False) -> None:
        self.opened.emit(self.extraction_id)

    def _on_delete_clicked(self, checked: bool = False) -> None:
        self.delete_wanted.emit(self.extraction_id)


class ModelCard(QFrame):
    """One model; a click or Enter opens its architecture."""

    opened = Signal(int)
    extract_wanted = Signal(int)
    delete_wanted = Signal(int)
    unload_wanted = Signal(int)
    measure_wanted = Signal(int)
    extraction_delete_wanted = Signal(int)
    extraction_opened = Signal(int)

    def __init__(
        self, item: ModelItem, expanded: bool = False, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        model = item.model
        self.item, self.model_id = item, model.id
        self._loaded: int | None = -1  # nothing is shown yet
        self._memory: Memory | None = None
        self.setProperty("surface", "card")
        self.setProperty("hover", "true")
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setCursor(Qt.CursorShape.PointingHandCursor)
        self.setAccessibleName(f"Model {model.name}")
        self.setAccessibleDescription("Press Enter to see its architecture")
        texts = column(4)
        texts.addWidget(ElidedLabel(model.name, "card"))
        self.about = ElidedLabel("", "helper")
        texts.addWidget(self.about)
        self.extract = Button("Extract Activations", "purple", "layers")
        self.extract.setAccessibleName(f"Extract activations of {model.name}")
        self.extract.clicked.connect(self._on_extract_clicked)
        delete = IconButton("trash-2", f"Delete {model.name}", size=18)
        delete.clicked.connect(self._on_delete_clicked)
        ready = picture("circle-check", tokens.EMERALD, 18)
        top = row(
            picture("cpu", tokens.PURPLE, 32), texts, ready, Badge("ready"), self.extract, delete,
            spacing=14,
        )  # fmt: skip
        top.setStretch(1, 1)
        self._make_state(model.name)
        layout = column(12, 20)
        layout.addLayout(top)
        layout.addLayout(self._state)
        layout.addLayout(row(46, self.warning, spacing=0))
        self.setLayout(layout)
        self.history = Collapsible("Extractions", len(item.extractions), expanded)
        used = sum(extraction.bytes for extraction in item.extractions)
        self.history.add_to_header(Text(f"{formatting.size(used)} on disk", "helper"))
        self.history.setCursor(Qt.CursorShape.ArrowCursor)
        self.history.body.setSpacing(8)
        self.rows = []
        for extraction, dataset in zip(item.extractions, item.datasets, strict=True):
            line = ExtractionRow(extraction, dataset)
            line.delete_wanted.connect(self.extraction_delete_wanted)
            line.opened.connect(self.extraction_opened)
            self.rows.append(line)
            self.history.add(line)
        self.history.setVisible(bool(item.extractions))
        layout.addWidget(self.history)
        self.show_memory(None)
        self.show_loaded(None)

    def _make_state(self, name: str) -> None:
        """Whether it is in memory, and what quantising did to it."""
        self.loaded = Badge("loaded", "", "blue")
        self.unload = Button("Unload", "small", "x", "Free its memory now")
        self.unload.setAccessibleName(f"Unload {name}")
        self.unload.clicked.connect(self._on_unload_clicked)
        self.quality = Badge("quality", "", "slate")
        self.measure = Button(
            "Measure", "small", "gauge", "Compare it with the unquantised model on sample text"
        )
        self.measure.setAccessibleName(f"Measure what quantising costs {name}")
        self.measure.clicked.connect(self._on_measure_clicked)
        self.warning = Text("", "small", wrap=True)
        self._state = row(46, self.loaded, self.unload, self.quality, self.measure, None, spacing=8)

    def show_memory(self, memory: Memory | None) -> None:
        """What its precision means here and what it takes; None: not known yet."""
        model = self.item.model
        self._memory = memory
        if memory is None:
            precision, takes = precision_text(model.precision), "— memory"
        else:
            precision = memory.precision.upper()
            if model.precision == "auto":
                precision = f"Auto: {precision}"
            takes = f"{formatting.size(memory.in_use)} memory"
            if not memory.fits:
                takes += " (more than is free)"
        self.about.setText(
            f"{formatting.short_count(model.parameters)} params • {precision} • {takes} • "
            f"{formatting.size(model.bytes)} on disk"
        )
        verdict = verdict_of(model, memory.precision if memory else model.precision)
        self.quality.setVisible(verdict is not None)
        self.measure.setVisible(verdict is not None)
        if verdict is not None:
            self.quality.set_status("quality", verdict.text, verdict.tone)
            self.quality.setToolTip(verdict.about)
            self.quality.setAccessibleDescription(verdict.about)
            self.measure.setText("Measure again" if verdict.measured else "Measure")
        self.warning.setText(verdict.warning if verdict else "")
        self.warning.setVisible(bool(self.warning.text()))
        if verdict is not None:
            self.warning.set_tone(verdict.tone)

    def show_loaded(self, n_bytes: int | None) -> None:
        """`n_bytes` of weights are in memory; None: it is not loaded."""
        if n_bytes == self._loaded:
            return
        self._loaded = n_bytes
        self.loaded.setVisible(n_bytes is not None)
        self.unload.setVisible(n_bytes is not None)
        self.unload.setEnabled(True)
        if n_bytes is not None:
            self.loaded.set_status("loaded", f"Loaded: {formatting.size(n_bytes)}", "blue")
            self.loaded.setToolTip("Its weights are in the device's memory")

    @property
    def is_quantised(self) -> bool:
        precision = self._memory.precision if self._memory else self.item.model.precision
        return precision in QUANTISED

    def _on_extract_clicked(self, checked: bool = False) -> None:
        self.extract_wanted.emit(self.model_id)

    def _on_delete_clicked(self, checked: bool = False) -> None:
        self.delete_wanted.emit(self.model_id)

    def _on_unload_clicked(self, checked: bool = False) -> None:
        self.unload.setEnabled(False)
        self.unload_wanted.emit(self.model_id)

    def _on_measure_clicked(self, checked: bool = False) -> None:
        self.measure_wanted.emit(self.model_id)

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


_ICONS = {"add_model": "cpu", "extract": "layers", "check_quality": "gauge"}


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
        self.pause = Button("Pause", "small", "pause")
        self.cancel = Button("Cancel", "small", "x")
        self.again = Button("Run again", "small", "rotate-ccw")
        self.dismiss = Button("Dismiss", "small")
        for button, action in (
            (self.pause, self._on_pause_clicked),
            (self.cancel, self._on_cancel_clicked),
            (self.again, self._on_again_clicked),
            (self.dismiss, self._on_dismiss_clicked),
        ):
            button.clicked.connect(action)
        head = row(
            picture(_ICONS[job.kind], tokens.PURPLE, 20),
            ElidedLabel(job.title, "card"),
            self.badge,
            self.pause,
            self.cancel,
            self.again,
            self.dismiss,
        )
        head.setStretch(1, 1)
        self.amount = Text("", "helper", wrap=True)
        self._transfer = Transfer()
        self.note = Text("", "helper", wrap=True)
        self._error = column(0)
        self.add(head, self.progress, self.amount, self.note, self._error)
        self.show_job(job)

    def show_job(self, job: JobRecord) -> None:
        self.job = job
        working = "downloading" if _downloads(job) else "processing"
        words = {"queued": "Queued", "paused": "Paused", "running": working.capitalize()}
        self.badge.set_status(
            working if job.status == "running" else job.status,
            words.get(job.status, job.status.capitalize()),
        )
        owned = self._services.jobs.owns(job.id)
        goes_on = self._services.jobs.can_go_on(job)
        self.pause.setVisible(job.status in ("running", "paused") and owned)
        self.pause.setText("Resume" if job.status == "paused" else "Pause")
        self.pause.set_icon("play" if job.status == "paused" else "pause")
        self.pause.setEnabled(True)
        self.cancel.setVisible(job.active and owned)
        self.again.setVisible(not job.active)
        self.again.setText("Go on" if goes_on else "Run again")
        self.dismiss.setVisible(not job.active)
        for button in (self.pause, self.cancel, self.again, self.dismiss):
            button.setAccessibleName(f"{button.text()}: {job.title}")
        self.progress.setVisible(job.status in ("running", "paused"))
        set_look(self.progress, tone="yellow" if job.status == "paused" else "purple")
        self.note.setText(_note(job, owned, goes_on))
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
            self._show_amount("")
            return
        self.progress.show_snapshot(snapshot)
        detail = str(snapshot.metrics.get("detail") or "") if snapshot else ""
        if snapshot and detail and self.job.status == "running":
            self.progress.show_fraction(
                snapshot.fraction, detail, snapshot.elapsed, snapshot.remaining
            )
        downloading = snapshot is not None and detail.startswith("Downloading")
        metrics = snapshot.metrics if snapshot and downloading else {}
        self._show_amount(self._transfer.text(metrics, self.job.status == "running"))

    def _show_amount(self, text: str) -> None:
        if self.amount.text() != text:
            self.amount.setText(text)
        self.amount.setVisible(bool(text) and not self.progress.isHidden())

    def _on_pause_clicked(self, checked: bool = False) -> None:
        self.pause.setEnabled(False)
        if self.job.status == "paused":
            self._services.jobs.resume(self.job.id)
        else:
            self._services.jobs.pause(self.job.id)

    def _on_cancel_clicked(self, checked: bool = False) -> None:
        self.cancel.setEnabled(False)
        self._services.jobs.cancel(self.job.id)

    def _on_again_clicked(self, checked: bool = False) -> None:
        self.again_wanted.emit(self.job.id)

    def _on_dismiss_clicked(self, checked: bool = False) -> None:
        self.dismiss_wanted.emit(self.job.id)


def _downloads(job: JobRecord) -> bool:
    from mistudio.ui.models.presenter import is_local

    return job.kind == "add_model" and not is_local(str(job.params.get("source", "")))


def _note(job: JobRecord, owned: bool, goes_on: bool) -> str:
    if job.status == "queued":
        return "Waits for the job before it." if owned else "Queued by another miStudio."
    if job.status == "interrupted" and goes_on:
        return "miStudio ended while this ran. What was finished is kept: it can go on."
    if job.status == "interrupted":
        return "miStudio ended while this ran. Nothing half-made was kept; run it again."
    return "What was finished is kept: it can go on." if goes_on else ""
