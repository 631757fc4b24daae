"""The dialog that extracts a model's activations: what of it, what it takes, and its progress."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from PySide6.QtCore import Qt, QTimer
from PySide6.QtWidgets import QCheckBox, QDialog, QSizePolicy, QVBoxLayout, QWidget

from mistudio import formatting
from mistudio.errors import InvalidInput, UserError
from mistudio.jobs.template_files import Config
from mistudio.jobs.templates import (
    dataset_reference,
    find_dataset,
    find_model,
    model_reference,
)
from mistudio.library.records import Model, Template
from mistudio.ui.models.parts import head_of, room_of
from mistudio.ui.models.planning import ExtractionForm, ExtractionPlan, ExtractPresenter
from mistudio.ui.models.presenter import EXTRACTED_SITES, point_name, problem_of, verdict_of
from mistudio.ui.services import Services
from mistudio.ui.templates.section import TemplateSection
from mistudio.ui.widgets import (
    Button,
    Choice,
    ErrorPanel,
    FormRow,
    IntBox,
    LayerGrid,
    ProgressRow,
    Surface,
    Text,
    clear,
    column,
    row,
    scrolling,
)

CLOSE_AFTER_MS = 1000
SEED_LAYERS = 12  # templates that name no model are written for so many
_SITE_WORDS = {"resid_post": "residual", "mlp_out": "mlp", "attn_out": "attention",
               "mlp_in": "mlp input", "resid_pre": "residual before"}  # fmt: skip
_NUMBERS = ("max_samples", "max_tokens", "context", "batch_windows")


class ExtractDialog(QDialog):
    """Which layers and sites, how much text; what it would take; then the job with its progress."""

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
        self._services = services
        self.presenter = ExtractPresenter(services, model, self)
        self.job_id: int | None = None
        self._measured: ExtractionForm | None = None  # what the job that runs only measures
        self.plan: ExtractionPlan | None = None
        self._build(model)
        self._restore(model, state or {})
        room = room_of(parent)
        # As tall as its form with room for a note, at most nine tenths of the window.
        wanted = self._body.sizeHint().height() + self.numbers.sizeHint().height() + 240
        self.resize(min(820, room.width() - 64), min(wanted, round(room.height() * 0.94)))
        self._close_timer = self._timer(CLOSE_AFTER_MS, self.accept)
        self._plan_timer = self._timer(150, self._on_plan_timer_timeout)
        for signal in (
            self.dataset.currentIndexChanged,
            self.storage.currentIndexChanged,
            self.layers.changed,
            *(box.toggled for box in self.sites.values()),
            *(box.valueChanged for box in self.boxes.values()),
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

    def _timer(self, milliseconds: int, action: Any) -> QTimer:
        timer = QTimer(self)
        timer.setSingleShot(True)
        timer.setInterval(milliseconds)
        timer.timeout.connect(action)
        return timer

    # --- building -------------------------------------------------------------------------------

    def _build(self, model: Model) -> None:
        self.dataset = Choice()
        self.layers = LayerGrid(
            6, model.n_layers, "Select Layers", clear_text="Deselect All", max_height=200
        )
        self.sites = {site: QCheckBox(title) for site, title in EXTRACTED_SITES}
        self.sites["mlp_in"].setToolTip("What enters the MLP after its norm: transcoders read it")
        longest = min(model.summary.get("context_length") or 4096, 4096)
        self.max_samples = IntBox(1000, 0, 2_000_000_000, 1000)
        self.max_tokens = IntBox(0, 0, 2_000_000_000, 10_000)
        for box in (self.max_samples, self.max_tokens):
            box.setSpecialValueText("All")
        self.context = IntBox(min(128, longest), 16, longest, 16)
        self.batch = IntBox(32, 1, 1024)
        self.storage = Choice([("fp16", "FP16"), ("bf16", "BF16")])
        self.storage.setToolTip("Both take two bytes: FP16 is finer, BF16 has the wider range")
        self.boxes = dict(
            zip(
                _NUMBERS, (self.max_samples, self.max_tokens, self.context, self.batch), strict=True
            )
        )
        self._make_numbers()
        self.refusal = Surface("note", "yellow", 12)
        self.refusal_text = Text("", "small", wrap=True)
        self.refusal.add(self.refusal_text)
        self.refusal.hide()
        self.warning = Text("", "small", "yellow", wrap=True)
        self.warning.hide()
        self.error_place = column(0)
        self.progress = ProgressRow("Extracting Activations…", "purple")
        self.waiting = Text("", "helper", wrap=True)
        self.progress_box = Surface("tile", padding=16)
        self.progress_box.add(self.progress, self.waiting)
        self.progress_box.hide()
        self.templates = TemplateSection(
            self._services,
            "extraction",
            "Extraction Templates",
            self.template_config,
            template_meta,
        )
        self.templates.load_wanted.connect(self._on_templates_load_wanted)
        self.templates.expanded_changed.connect(self._on_templates_expanded_changed)
        self._body = body = QWidget()
        inside = column(16)
        inside.setContentsMargins(24, 0, 24, 16)
        self.dataset_row = FormRow("Select Dataset", self.dataset)
        inside.addWidget(self.dataset_row)
        inside.addWidget(self.layers)
        inside.addLayout(self._make_sites())
        fields = row(
            FormRow("Max Samples", self.max_samples, "From the beginning"),
            FormRow("Max Tokens", self.max_tokens, "Both splits together"),
            FormRow("Context", self.context, "Tokens in a window"),
            FormRow("Batch Size", self.batch, "Windows at a time"),
            FormRow("Stored as", self.storage),
            spacing=12,
        )
        for place in range(5):
            fields.setStretch(place, 1)
        inside.addLayout(fields)
        inside.addWidget(self.templates)
        inside.addStretch(1)
        body.setLayout(inside)
        # Below the form and always in sight, however many layers there are.
        below = column(12)
        below.setContentsMargins(24, 4, 24, 0)
        below.addWidget(self.numbers)
        below.addWidget(self.warning)
        below.addWidget(self.refusal)
        below.addLayout(self.error_place)
        below.addWidget(self.progress_box)
        self.form_widgets = (
            self.dataset, self.layers, *self.sites.values(), *self.boxes.values(), self.storage,
            self.templates,
        )  # fmt: skip
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        about = Text(
            f"{model.name}: stored on disk, so that many trainings can read them",
            "helper",
            wrap=True,
        )
        layout.addLayout(head_of(self, "Extract Activations", about))
        self._area = scrolling(body)
        layout.addWidget(self._area, 1)
        layout.addLayout(below)
        layout.addLayout(self._make_footer())

    def _make_sites(self) -> QVBoxLayout:
        lines = column(6)
        lines.addWidget(Text("Activation Type", "label"))
        lines.addLayout(row(*self.sites.values(), None, spacing=20))
        return lines

    def _make_numbers(self) -> None:
        self.numbers = Surface("tile", padding=16)
        self.numbers.setAccessibleName("What it will take")
        self.tokens_text, self.tokens_note = self._number("emerald")
        self.disk_text, self.disk_note = self._number("blue")
        self.memory_text, self.memory_note = self._number("yellow")
        self.time_text, self.time_note = self._number("purple")
        self.measure = Button("Measure it", "link", "gauge")
        self.measure.setToolTip("Load the model and run one batch, after one that warms up")
        self.measure.clicked.connect(self._on_measure_clicked)
        parts = row(spacing=20)
        for title, value, note in (
            ("Tokens to run", self.tokens_text, self.tokens_note),
            ("Disk needed", self.disk_text, self.disk_note),
            ("Memory", self.memory_text, self.memory_note),
            ("Time", self.time_text, self.time_note),
        ):
            part = column(2)
            part.addWidget(Text(title, "label"))
            part.addWidget(value)
            part.addWidget(note)
            if value is self.time_text:
                part.addWidget(self.measure, 0, Qt.AlignmentFlag.AlignLeft)
            part.addStretch(1)
            parts.addLayout(part, 1)
        self.numbers.add(parts)

    @staticmethod
    def _number(tone: str) -> tuple[Text, Text]:
        return Text("—", "stat", tone), Text("", "helper", wrap=True)

    def _make_footer(self) -> Any:
        self.message = Text("", "helper", wrap=True)
        self.message.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Preferred)
        self.pause = Button("Pause", "secondary", "pause")
        self.pause.clicked.connect(self._on_pause_clicked)
        self.stop = Button("Cancel", "secondary", "square")
        self.stop.clicked.connect(self._on_stop_clicked)
        for button in (self.pause, self.stop):
            button.hide()
        self.start = Button("Start Extraction", "purple", "play")
        self.start.clicked.connect(self._on_start_clicked)
        self.start.setDefault(True)
        footer = row(self.message, self.pause, self.stop, self.start)
        footer.setContentsMargins(24, 12, 24, 20)
        return footer

    def _restore(self, model: Model, state: dict[str, Any]) -> None:
        self._show_datasets()
        self.dataset.set_value(state.get("dataset_id", self.dataset.value))
        self._set_sites(state.get("sites", ["resid_post"]))
        self.storage.set_value(state.get("storage", "fp16"))
        for name, box in self.boxes.items():
            if isinstance(state.get(name), int):
                box.setValue(state[name])
        self.templates.set_expanded(bool(state.get("templates")))
        count = model.n_layers
        same = state.get("model_id") == model.id
        chosen = [layer for layer in state.get("layers", []) if same and layer in range(count)]
        self.layers.set_selected(chosen or {0, (count - 1) // 2, count - 1})

    def _set_sites(self, sites: Iterable[str]) -> None:
        wanted = set(sites)
        for site, box in self.sites.items():
            box.setChecked(site in wanted)

    def selected_sites(self) -> list[str]:
        return [site for site, box in self.sites.items() if box.isChecked()]

    def save_state(self) -> dict[str, Any]:
        """The form, to begin with the next time."""
        return {
            "model_id": self.presenter.model.id,
            "dataset_id": self.dataset.value,
            "sites": self.selected_sites(),
            "layers": self.layers.selected(),
            "storage": self.storage.value,
            "templates": self.templates.expanded,
            **{name: box.value() for name, box in self.boxes.items()},
        }

    def _show_datasets(self) -> None:
        datasets = self.presenter.datasets()
        self.dataset.set_options(
            [
                (dataset.id, f"{dataset.name} ({formatting.count(dataset.documents)} samples)")
                for dataset in datasets
            ]
            or [(None, "No dataset yet: add one in the Datasets tab")]
        )
        self.dataset.setEnabled(bool(datasets) and self.job_id is None)

    # --- templates ------------------------------------------------------------------------------

    def template_config(self) -> Config:
        """The form as a template keeps it."""
        if not self.layers.selected() or not self.selected_sites():
            raise InvalidInput(
                "There is nothing to save",
                "A template needs layers and activation types.",
                "Select at least one of each.",
            )
        dataset = self._services.library.datasets.find(self.dataset.value or -1)
        config: Config = {
            "model": model_reference(self.presenter.model),
            "dataset": dataset_reference(dataset) if dataset else {},
            "layers": self.layers.selected(),
            "sites": self.selected_sites(),
            "batch_size": self.batch.value(),
            "context": self.context.value(),
        }
        for name, box in (("max_documents", self.max_samples), ("max_tokens", self.max_tokens)):
            if box.value():
                config[name] = box.value()
        return config

    def _on_templates_load_wanted(self, template: Template) -> None:
        self.load_template(template)

    def _on_templates_expanded_changed(self, expanded: bool) -> None:
        """Into sight, once the layout has settled."""
        if expanded:
            QTimer.singleShot(0, self, self._show_templates)

    def _show_templates(self) -> None:
        self._area.ensureWidgetVisible(self.templates, 0, 16)

    def load_template(self, template: Template) -> None:
        """Take a template into the form. One that names no model is written for one of
        `SEED_LAYERS` layers and is spread over those that this model has."""
        config, count = template.config, self.presenter.model.n_layers
        notes = []
        dataset, no_dataset = find_dataset(self._services.library, config.get("dataset", {}))
        if no_dataset:
            notes.append(no_dataset)
        if dataset is not None:
            self.dataset.set_value(dataset.id)
        layers = list(config.get("layers", []))
        if not config.get("model"):
            fitted = fitted_layers(layers, count)
            if fitted != layers:
                notes.append(f"Its layers were spread over the {count} of this model.")
            layers = fitted
        elif not self._is_of_this_model(config):
            notes.append(f"It was saved for {config['model'].get('name') or 'another model'}.")
        if too_deep := [layer for layer in layers if layer >= count]:
            notes.append(f"{len(too_deep)} layers are left out: the model has {count}.")
        self.layers.set_selected(layer for layer in layers if layer < count)
        sites = config.get("sites", ["resid_post"])
        if unknown := [site for site in sites if site not in self.sites]:
            notes.append(f"Not extracted here: {', '.join(_words(unknown))}.")
        self._set_sites(sites)
        for name, box in (
            ("max_documents", self.max_samples),
            ("max_tokens", self.max_tokens),
            ("batch_size", self.batch),
            ("context", self.context),
        ):
            limit = name.startswith("max_")
            if limit or config.get(name):
                box.setValue(min(int(config.get(name) or 0), box.maximum()))
        told = self._services.toasts.warning if notes else self._services.toasts.success
        told(f"Loaded “{template.name}”", " ".join(notes))

    def _is_of_this_model(self, config: Config) -> bool:
        found, _ = find_model(self._services.library, config["model"])
        return found is not None and found.id == self.presenter.model.id

    # --- the plan -------------------------------------------------------------------------------

    def form(self) -> ExtractionForm | None:
        """What is chosen; None while something is missing."""
        if self.dataset.value is None or not self.layers.selected() or not self.selected_sites():
            return None
        return ExtractionForm(
            dataset_id=self.dataset.value,
            hook_points=tuple(
                point_name(site, layer)
                for layer in self.layers.selected()
                for site in self.selected_sites()
            ),
            max_samples=self.max_samples.value() or None,
            max_tokens=self.max_tokens.value() or None,
            context=self.context.value(),
            batch_windows=self.batch.value(),
            storage=self.storage.value,
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
            for text in (self.tokens_text, self.disk_text, self.memory_text, self.time_text):
                text.setText("—")
            for text in (self.tokens_note, self.disk_note, self.memory_note, self.time_note):
                text.setText("")
            return
        about = "" if plan.exact else "≈ "
        self.tokens_text.setText(f"{about}{formatting.short_count(plan.tokens)}")
        self.tokens_text.setToolTip(f"{about}{formatting.count(plan.tokens)} tokens")
        self.tokens_note.setText(
            f"{formatting.count(plan.batches)} batches"
            if plan.exact
            else "Estimate: not tokenized yet"
        )
        self.disk_text.setText(f"{about or '≤ '}{formatting.size(plan.bytes)}")
        self.disk_note.setText(f"{formatting.size(plan.free)} free")
        self.memory_text.setText(formatting.size(plan.memory))
        self.memory_text.setToolTip(
            "\n".join(f"{name}: {formatting.size(value)}" for name, value in plan.parts.items())
        )
        self.memory_note.setText(
            f"At {plan.precision.upper()}, {formatting.size(plan.memory_free)} free"
        )
        verdict = verdict_of(self.presenter.model, plan.precision)
        self.warning.setText(verdict.warning if verdict else "")
        self.warning.setVisible(bool(self.warning.text()))
        if plan.seconds is None:
            self.time_text.setText("—")
            self.time_note.setText("Not measured yet")
        else:
            self.time_text.setText(f"≈ {formatting.duration(plan.seconds)}")
            speed = formatting.count(plan.tokens / max(plan.seconds, 1e-9))
            self.time_note.setText(
                f"Measured: {speed} tokens/s" if plan.measured else "As the last extraction"
            )
        self.refusal_text.setText(plan.refusal)
        self.refusal.setVisible(bool(plan.refusal) and self.job_id is None)

    def reason(self) -> str:
        """Why it cannot start; empty where it can."""
        if self.dataset.value is None:
            return "Add a dataset first."
        if not self.layers.selected():
            return "Select at least one layer."
        if not self.selected_sites():
            return "Select at least one activation type."
        if self.plan is None:
            return "Working out what it takes…"
        return "See the note above." if self.plan.refusal else ""

    def _show_buttons(self) -> None:
        running = self.job_id is not None
        reason = self.reason()
        self.start.setEnabled(not running and not reason)
        busy = "Measuring…" if self._measured else "Extracting…"
        self.start.setText(busy if running else "Start Extraction")
        self.start.setToolTip("" if running else reason)
        self.measure.setEnabled(not running and not reason)
        measured = self.plan is not None and self.plan.measured
        self.measure.setVisible(not measured)
        self.stop.setVisible(running)
        self.pause.setVisible(running and self._measured is None)
        if running:
            self.message.setText("" if self._measured else "It goes on if you close this.")
        else:
            self.message.setText(reason)
        for widget in self.form_widgets:
            widget.setEnabled(not running)

    # --- the job --------------------------------------------------------------------------------

    def _on_measure_clicked(self, checked: bool = False) -> None:
        self._begin(measure=True)

    def _on_start_clicked(self, checked: bool = False) -> None:
        self._begin(measure=False)

    def _begin(self, measure: bool) -> None:
        form = self.form()
        if form is None or self.job_id is not None:
            return
        clear(self.error_place)
        try:
            job_id = self.presenter.measure(form) if measure else self.presenter.start(form)
        except UserError as exc:
            self._show_error(exc)
            return
        self._measured = form if measure else None
        self._follow(job_id)

    def _follow(self, job_id: int) -> None:
        self.job_id = job_id
        self.progress.show_snapshot(None)
        self.progress_box.show()
        self.numbers.hide()
        self.refusal.hide()
        self.stop.setEnabled(True)
        self._show_buttons()
        self._show_status()

    def _show_status(self) -> None:
        assert self.job_id is not None
        status = self._services.library.jobs.get(self.job_id).status
        words = {"queued": "Waits for the job before it.", "paused": "Paused."}
        self.waiting.setText(words.get(status, ""))
        self.waiting.setVisible(status in words)
        self.pause.setText("Resume" if status == "paused" else "Pause")
        self.pause.set_icon("play" if status == "paused" else "pause")
        self.pause.setEnabled(status in ("running", "paused"))

    def _on_jobs_tick(self) -> None:
        if self.job_id is not None and self.isVisible():
            self.progress.show_snapshot(self._services.jobs.snapshot(self.job_id))

    def _on_jobs_job_changed(self, job_id: int) -> None:
        if job_id == self.job_id:
            self._show_status()

    def _on_jobs_job_finished(self, job_id: int, status: str) -> None:
        if job_id != self.job_id:
            return
        record = self._services.library.jobs.get(job_id)
        measured, self._measured = self._measured, None
        if status == "finished" and measured is None:
            self.progress.show_fraction(1.0, "Done")
            self.stop.hide()
            self.pause.hide()
            self.start.setText("Done")
            self.message.setText(
                f"{formatting.count(record.result['tokens'])} tokens stored, "
                f"{formatting.size(record.result['bytes'])}."
            )
            self._close_timer.start()
            return
        if status == "finished" and measured is not None:
            self.presenter.take_measured(measured, record.result)
        self.job_id = None
        self.progress_box.hide()
        self.numbers.show()
        self._on_form_changed()
        if status == "failed":
            clear(self.error_place)
            self.error_place.addWidget(ErrorPanel.of_row({**record.error, "retryable": False}))
        elif status != "finished":
            self.message.setText("Stopped; nothing was stored.")

    def _show_error(self, error: UserError) -> None:
        clear(self.error_place)
        self.error_place.addWidget(ErrorPanel(error.title, error.what, error.next_step))
        self._show_buttons()

    def _on_pause_clicked(self, checked: bool = False) -> None:
        if self.job_id is None:
            return
        self.pause.setEnabled(False)
        if self._services.library.jobs.get(self.job_id).status == "paused":
            self._services.jobs.resume(self.job_id)
        else:
            self._services.jobs.pause(self.job_id)

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


def fitted_layers(layers: list[int], n_layers: int) -> list[int]:
    """Layers of a model of `SEED_LAYERS` (or as many as they need), at the same relative depths of
    one of `n_layers`."""
    deepest = max([SEED_LAYERS - 1, *layers])
    return sorted({round(layer * (n_layers - 1) / deepest) for layer in layers})


def template_meta(config: Config) -> str:
    """`3 layers • residual, mlp • 5,000 samples`."""
    layers = config.get("layers", [])
    amount = "all text"
    if config.get("max_documents"):
        amount = f"{formatting.count(config['max_documents'])} samples"
    elif config.get("max_tokens"):
        amount = f"{formatting.count(config['max_tokens'])} tokens"
    parts = [
        f"{len(layers)} layer{'' if len(layers) == 1 else 's'}",
        ", ".join(_words(config["sites"])),
        amount,
        config.get("model", {}).get("name", ""),
    ]
    return " • ".join(filter(None, parts))


def _words(sites: Iterable[str]) -> list[str]:
    return [_SITE_WORDS.get(site, site) for site in sites]
