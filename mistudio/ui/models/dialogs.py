"""A model's architecture, and the dialog that extracts its activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PySide6.QtCore import Qt, QTimer
from PySide6.QtWidgets import (
    QApplication,
    QDialog,
    QGridLayout,
    QHBoxLayout,
    QScrollArea,
    QSizePolicy,
    QVBoxLayout,
    QWidget,
)

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.library.records import Model
from mistudio.ui.models.presenter import (
    EXTRACTED_SITES,
    HOOK_POINTS,
    ExtractionForm,
    ExtractionPlan,
    ExtractPresenter,
    heads_text,
    modules,
    point_name,
    precision_text,
    problem_of,
    read_head_dim,
)
from mistudio.ui.services import Services
from mistudio.ui.widgets import (
    Button,
    Choice,
    ErrorPanel,
    FormRow,
    IconButton,
    IntBox,
    LayerGrid,
    ProgressRow,
    StatTile,
    Surface,
    Text,
    clear,
    column,
    row,
)

CLOSE_AFTER_MS = 1000


def _head(dialog: QDialog, title: str, subtitle: str, tone: str | None = None) -> QHBoxLayout:
    texts = column(4)
    texts.addWidget(Text(title, "h1", tone, wrap=True))
    texts.addWidget(Text(subtitle, "helper", wrap=True))
    close = IconButton("x", "Close")
    close.clicked.connect(dialog.close)
    head = row(texts, close)
    head.setStretch(0, 1)
    head.setAlignment(close, Qt.AlignmentFlag.AlignTop)
    head.setContentsMargins(24, 20, 20, 16)
    return head


def _scrolling(content: QWidget) -> QScrollArea:
    content.setProperty("surface", "clear")
    area = QScrollArea()
    area.setProperty("surface", "clear")
    area.setWidgetResizable(True)
    area.setFocusPolicy(Qt.FocusPolicy.NoFocus)
    area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
    area.setWidget(content)
    return area


def _tiles(tiles: Sequence[QWidget], columns: int) -> QGridLayout:
    grid = QGridLayout()
    grid.setSpacing(12)
    for place, tile in enumerate(tiles):
        grid.addWidget(tile, place // columns, place % columns)
    for place in range(columns):
        grid.setColumnStretch(place, 1)
    return grid


def _room(parent: QWidget | None) -> Any:
    return parent.window().size() if parent else QApplication.primaryScreen().size()


class ArchitectureDialog(QDialog):
    """What the model's own files say of its parts; nothing is loaded."""

    def __init__(self, services: Services, model: Model, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("architecture_dialog")
        self.setWindowTitle(f"{model.name} Architecture")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        room = _room(parent)
        self.resize(min(896, room.width() - 64), round(room.height() * 0.8))
        summary = model.summary
        head_dim = read_head_dim(services.library.path(model.folder), summary)

        self.tiles = {
            "layers": StatTile(
                "Total Layers", str(summary["n_layers"]), "emerald", "Transformer blocks"
            ),
            "width": StatTile(
                "Hidden Dimension",
                formatting.count(summary["d_model"]),
                "purple",
                "Channels of the residual stream",
            ),
            "heads": StatTile(
                "Attention Heads",
                heads_text(summary),
                "blue",
                "Query heads of each block; KV: key/value heads, which several of them share",
            ),
            "parameters": StatTile(
                "Parameters",
                formatting.short_count(summary["parameters"]),
                "yellow",
                f"{formatting.count(summary['parameters'])}, from the headers of the weight files; "
                "tied embeddings count once",
            ),
        }
        self.modules = modules(summary, head_dim)
        body = QWidget()
        inside = column(16)
        inside.setContentsMargins(24, 0, 24, 24)
        inside.addLayout(_tiles(list(self.tiles.values()), 4))
        inside.addWidget(Text("Model Layers", "card"))
        inside.addLayout(self._module_rows())
        inside.addWidget(Text("Model Configuration", "card"))
        self.facts = self._facts(model, head_dim)
        inside.addLayout(_tiles(list(self.facts.values()), 2))
        inside.addWidget(Text("Hook Points", "card"))
        inside.addWidget(
            Text(
                f"Where activations are read and changed: once in each of the "
                f"{summary['n_layers']} blocks (N from 0 to {summary['n_layers'] - 1}), "
                "named as in TransformerLens.",
                "helper",
                wrap=True,
            )
        )
        inside.addLayout(self._hook_rows(summary["d_model"]))
        inside.addStretch(1)
        body.setLayout(inside)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addLayout(
            _head(
                self,
                f"{model.name} Architecture",
                f"{formatting.short_count(model.parameters)} parameters • "
                f"{precision_text(model.precision)}",
                "emerald",
            )
        )
        area = _scrolling(body)
        area.setFocusPolicy(Qt.FocusPolicy.StrongFocus)  # so that the arrow keys scroll
        area.setAccessibleName(f"Architecture of {model.name}")
        layout.addWidget(area, 1)
        area.setFocus()

    def _module_rows(self) -> QVBoxLayout:
        lines = column(6)
        for module in self.modules:
            line = Surface("row", padding=10)
            index = Text(module.index, "mono", "slate")
            index.setFixedWidth(32)
            kind = Text(module.kind, "mono", "emerald")
            kind.setMinimumWidth(190)
            details = Text(module.details, "small", wrap=True, selectable=True)
            items = row(index, kind, details)
            items.setStretch(2, 1)
            line.add(items)
            line.setAccessibleName(f"{module.index} {module.kind}: {module.details}")
            lines.addWidget(line)
        return lines

    def _facts(self, model: Model, head_dim: int | None) -> dict[str, StatTile]:
        summary = model.summary
        context = summary.get("context_length")
        ratio = formatting.number(summary["d_mlp"] / summary["d_model"])
        return {
            "vocabulary": StatTile(
                "Vocabulary Size", formatting.count(summary["vocab_size"]), "slate", note="tokens"
            ),
            "context": StatTile(
                "Context Length",
                formatting.count(context) if context else "—",
                "slate",
                "max_position_embeddings of config.json",
                "tokens",
            ),
            "ratio": StatTile(
                "MLP Ratio",
                f"{ratio.rstrip('0').rstrip('.')}×",
                "slate",
                "Width of the MLP over that of the residual stream",
                f"{formatting.count(summary['d_mlp'])} / {formatting.count(summary['d_model'])}",
            ),
            "architecture": StatTile(
                "Architecture",
                summary["architecture"] or summary["model_type"],
                "slate",
                note=f"decoder-only, type {summary['model_type']}",
            ),
            "head_dim": StatTile(
                "Head Dimension", str(head_dim) if head_dim else "—", "slate", note="channels"
            ),
            "weights": StatTile(
                "Size on Disk",
                formatting.size(model.bytes),
                "slate",
                "All files of the model's folder",
                ", ".join(summary["dtypes"]),
            ),
        }

    def _hook_rows(self, width: int) -> QVBoxLayout:
        lines = column(6)
        for suffix, meaning in HOOK_POINTS:
            line = Surface("row", padding=10)
            name = Text(f"blocks.N.{suffix}", "mono", "blue", selectable=True)
            name.setMinimumWidth(234)
            shape = Text(f"[batch, position, {width}]", "mono")
            items = row(name, Text(meaning, "small"), None, shape)
            line.add(items)
            line.setAccessibleName(f"blocks.N.{suffix}: {meaning}, {width} channels")
            lines.addWidget(line)
        return lines


class ExtractDialog(QDialog):
    """Which layers, how much text; what it would take; then the job with its progress."""

    def __init__(
        self,
        services: Services,
        model: Model,
        state: dict[str, Any] | None = None,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.setObjectName("extract_dialog")
        self.setWindowTitle(f"Extract Activations: {model.name}")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        room = _room(parent)
        self._services = services
        self.presenter = ExtractPresenter(services, model, self)
        self.job_id: int | None = None
        self.plan: ExtractionPlan | None = None
        self._build(model)
        self._restore(model, state or {})
        # As tall as its form with room for a note, at most nine tenths of the window.
        wanted = self._body.sizeHint().height() + self.numbers.sizeHint().height() + 230
        self.resize(min(768, room.width() - 64), min(wanted, round(room.height() * 0.9)))
        self._close_timer = QTimer(self)
        self._close_timer.setSingleShot(True)
        self._close_timer.setInterval(CLOSE_AFTER_MS)
        self._close_timer.timeout.connect(self.accept)
        self._plan_timer = QTimer(self)
        self._plan_timer.setSingleShot(True)
        self._plan_timer.setInterval(150)
        self._plan_timer.timeout.connect(self._on_plan_timer_timeout)
        for signal in (
            self.dataset.currentIndexChanged,
            self.site.currentIndexChanged,
            self.layers.changed,
            self.batch.valueChanged,
            self.max_tokens.valueChanged,
            self.context.valueChanged,
        ):
            signal.connect(self._on_form_changed)
        self.presenter.plan_ready.connect(self._on_presenter_plan_ready)
        self.presenter.plan_failed.connect(self._on_presenter_plan_failed)
        services.jobs.tick.connect(self._on_jobs_tick)
        services.jobs.job_changed.connect(self._on_jobs_job_changed)
        services.jobs.job_finished.connect(self._on_jobs_job_finished)
        services.changes.changed.connect(self._on_changes_changed)
        running = self.presenter.running_job()
        if running:
            self._follow(running.id)
        self._on_form_changed()
        self.dataset.setFocus()

    # --- building -------------------------------------------------------------------------------

    def _build(self, model: Model) -> None:
        self.dataset = Choice()
        self.layers = LayerGrid(
            6, model.n_layers, "Select Layers", clear_text="Deselect All", max_height=4000
        )
        self.site = Choice(EXTRACTED_SITES)
        longest = min(model.summary.get("context_length") or 4096, 4096)
        self.batch = IntBox(8, 1, 256)
        self.max_tokens = IntBox(500_000, 1_000, 1_000_000_000, 10_000)
        self.context = IntBox(min(128, longest), 16, longest, 16)
        self.numbers = Surface("tile", padding=16)
        self.numbers.setAccessibleName("What it will take")
        self.tokens_text = Text("—", "stat", "emerald")
        self.disk_text = Text("—", "stat", "blue")
        self.time_text = Text("—", "stat", "purple")
        self.tokens_note = Text("", "helper", wrap=True)
        self.disk_note = Text("", "helper", wrap=True)
        self.time_note = Text("", "helper", wrap=True)
        parts = row(spacing=24)
        for title, value, note in (
            ("Tokens to run", self.tokens_text, self.tokens_note),
            ("Disk needed", self.disk_text, self.disk_note),
            ("Time", self.time_text, self.time_note),
        ):
            part = column(2)
            part.addWidget(Text(title, "label"))
            part.addWidget(value)
            part.addWidget(note)
            part.addStretch(1)
            parts.addLayout(part, 1)
        self.numbers.add(parts)
        self.refusal = Surface("note", "yellow", 12)
        self.refusal_text = Text("", "small", wrap=True)
        self.refusal.add(self.refusal_text)
        self.refusal.hide()
        self.error_place = column(0)
        self.progress = ProgressRow("Extracting Activations…", "purple")
        self.waiting = Text("", "helper", wrap=True)
        self.progress_box = Surface("tile", padding=16)
        self.progress_box.add(self.progress, self.waiting)
        self.progress_box.hide()

        self._body = body = QWidget()
        inside = column(16)
        inside.setContentsMargins(24, 0, 24, 16)
        self.dataset_row = FormRow("Select Dataset", self.dataset)
        inside.addWidget(self.dataset_row)
        inside.addWidget(self.layers)
        fields = row(
            FormRow("Activation Type", self.site),
            FormRow("Max Tokens", self.max_tokens, "Both splits together"),
            FormRow("Context", self.context, "Tokens in a window"),
            FormRow("Batch Size", self.batch, "Windows at a time"),
            spacing=16,
        )
        for place, stretch in enumerate((6, 5, 4, 4)):  # "Attention Output" needs most
            fields.setStretch(place, stretch)
        inside.addLayout(fields)
        inside.addStretch(1)
        body.setLayout(inside)
        # Below the form and always in sight, however many layers there are.
        below = column(12)
        below.setContentsMargins(24, 4, 24, 0)
        below.addWidget(self.numbers)
        below.addWidget(self.refusal)
        below.addLayout(self.error_place)
        below.addWidget(self.progress_box)
        self.form_widgets = (
            self.dataset, self.layers, self.site, self.batch, self.max_tokens, self.context,
        )  # fmt: skip

        self.message = Text("", "helper", wrap=True)
        self.message.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Preferred)
        self.stop = Button("Stop", "secondary", "square")
        self.stop.clicked.connect(self._on_stop_clicked)
        self.stop.hide()
        self.start = Button("Start Extraction", "purple", "play")
        self.start.clicked.connect(self._on_start_clicked)
        self.start.setDefault(True)
        footer = row(self.message, self.stop, self.start)
        footer.setContentsMargins(24, 12, 24, 20)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addLayout(
            _head(
                self,
                "Extract Activations",
                f"{model.name}: stored on disk, so that many trainings can read them",
            )
        )
        layout.addWidget(_scrolling(body), 1)
        layout.addLayout(below)
        layout.addLayout(footer)

    def _restore(self, model: Model, state: dict[str, Any]) -> None:
        self._show_datasets()
        self.dataset.set_value(state.get("dataset_id", self.dataset.value))
        self.site.set_value(state.get("site", "resid_post"))
        for name, box in (
            ("max_tokens", self.max_tokens),
            ("context", self.context),
            ("batch_windows", self.batch),
        ):
            if isinstance(state.get(name), int):
                box.setValue(state[name])
        count = model.n_layers
        same = state.get("model_id") == model.id
        chosen = [layer for layer in state.get("layers", []) if same and layer in range(count)]
        self.layers.set_selected(chosen or {count // 4, count // 2, 3 * count // 4})

    def save_state(self) -> dict[str, Any]:
        """The form, to begin with the next time."""
        return {
            "model_id": self.presenter.model.id,
            "dataset_id": self.dataset.value,
            "site": self.site.value,
            "layers": self.layers.selected(),
            "max_tokens": self.max_tokens.value(),
            "context": self.context.value(),
            "batch_windows": self.batch.value(),
        }

    def _show_datasets(self) -> None:
        datasets = self.presenter.datasets()
        self.dataset.set_options(
            [
                (dataset.id, f"{dataset.name} ({formatting.count(dataset.documents)} documents)")
                for dataset in datasets
            ]
            or [(None, "No dataset yet: add one in the Datasets tab")]
        )
        self.dataset.setEnabled(bool(datasets) and self.job_id is None)

    # --- the plan -------------------------------------------------------------------------------

    def form(self) -> ExtractionForm | None:
        """What is chosen; None while something is missing."""
        if self.dataset.value is None or not self.layers.selected():
            return None
        return ExtractionForm(
            dataset_id=self.dataset.value,
            hook_points=tuple(
                point_name(self.site.value, layer) for layer in self.layers.selected()
            ),
            max_tokens=self.max_tokens.value(),
            context=self.context.value(),
            batch_windows=self.batch.value(),
        )

    def _on_form_changed(self, *_: object) -> None:
        self.plan = None
        self.refusal.hide()
        if self.form() is None:
            self._plan_timer.stop()
            self._show_plan(None)
        else:
            self._plan_timer.start()
        self._show_buttons()

    def _on_plan_timer_timeout(self) -> None:
        form = self.form()
        if form is not None:
            self.presenter.plan(form)

    def _on_presenter_plan_ready(self, result: tuple[ExtractionForm, ExtractionPlan]) -> None:
        form, plan = result
        if form == self.form():
            self.plan = plan
            self._show_plan(plan)
            self._show_buttons()

    def _on_presenter_plan_failed(self, error: Exception) -> None:
        self._show_error(problem_of(error))

    def _show_plan(self, plan: ExtractionPlan | None) -> None:
        if plan is None:
            for text in (self.tokens_text, self.disk_text, self.time_text):
                text.setText("—")
            for text in (self.tokens_note, self.disk_note, self.time_note):
                text.setText("")
            return
        up_to = "" if plan.exact else "≤ "
        self.tokens_text.setText(f"{up_to}{formatting.count(plan.tokens)}")
        self.tokens_note.setText(
            "" if plan.exact else "Not tokenized for this model yet; that is done first"
        )
        self.disk_text.setText(f"{up_to}{formatting.size(plan.bytes)}")
        self.disk_note.setText(f"{formatting.size(plan.free)} free")
        if plan.seconds is None:
            self.time_text.setText("—")
            self.time_note.setText("Not measured on this model yet")
        else:
            self.time_text.setText(f"about {formatting.duration(plan.seconds)}")
            self.time_note.setText("By the speed of the last extraction")
        self.refusal_text.setText(plan.refusal)
        self.refusal.setVisible(bool(plan.refusal))

    def reason(self) -> str:
        """Why it cannot start; empty where it can."""
        if self.dataset.value is None:
            return "Add a dataset first."
        if not self.layers.selected():
            return "Select at least one layer."
        if self.plan is None:
            return "Working out what it takes…"
        return "See the note above." if self.plan.refusal else ""

    def _show_buttons(self) -> None:
        running = self.job_id is not None
        reason = self.reason()
        self.start.setEnabled(not running and not reason)
        self.start.setText("Extracting…" if running else "Start Extraction")
        self.start.setToolTip("" if running else reason)
        self.stop.setVisible(running)
        if running:
            self.message.setText("It goes on if you close this.")
        else:
            self.message.setText(reason)
        for widget in self.form_widgets:
            widget.setEnabled(not running)

    # --- the job --------------------------------------------------------------------------------

    def _on_start_clicked(self, checked: bool = False) -> None:
        form = self.form()
        if form is None or self.job_id is not None:
            return
        clear(self.error_place)
        try:
            self._follow(self.presenter.start(form))
        except UserError as exc:
            self._show_error(exc)

    def _follow(self, job_id: int) -> None:
        self.job_id = job_id
        self.progress.show_snapshot(None)
        self.progress_box.show()
        self.numbers.hide()
        self.refusal.hide()
        self.stop.setEnabled(True)
        self._show_buttons()
        self._show_waiting()

    def _show_waiting(self) -> None:
        assert self.job_id is not None
        queued = self._services.library.jobs.get(self.job_id).status == "queued"
        self.waiting.setText("Waits for the job before it." if queued else "")
        self.waiting.setVisible(queued)

    def _on_jobs_tick(self) -> None:
        if self.job_id is not None and self.isVisible():
            self.progress.show_snapshot(self._services.jobs.snapshot(self.job_id))

    def _on_jobs_job_changed(self, job_id: int) -> None:
        if job_id == self.job_id:
            self._show_waiting()

    def _on_jobs_job_finished(self, job_id: int, status: str) -> None:
        if job_id != self.job_id:
            return
        record = self._services.library.jobs.get(job_id)
        if status == "finished":
            self.progress.show_fraction(1.0, "Done")
            self.stop.hide()
            self.start.setText("Done")
            self.message.setText(
                f"{formatting.count(record.result['tokens'])} tokens stored, "
                f"{formatting.size(record.result['bytes'])}."
            )
            self._close_timer.start()
            return
        self.job_id = None
        self.progress_box.hide()
        self.numbers.show()
        self._on_form_changed()
        if status == "failed":
            clear(self.error_place)
            self.error_place.addWidget(ErrorPanel.of_row({**record.error, "retryable": False}))
        else:
            self.message.setText("Stopped; nothing was stored.")

    def _show_error(self, error: UserError) -> None:
        clear(self.error_place)
        self.error_place.addWidget(ErrorPanel(error.title, error.what, error.next_step))
        self._show_buttons()

    def _on_stop_clicked(self, checked: bool = False) -> None:
        if self.job_id is not None:
            self.stop.setEnabled(False)
            self._services.jobs.cancel(self.job_id)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table in ("datasets", "tokenizations") and self.job_id is None:
            self._show_datasets()
            self._on_form_changed()
        elif table == "models" and not self.presenter.exists():
            self.reject()
