"""The Training Configuration card: fields made from the engine's table of hyper-parameters."""

from __future__ import annotations

from typing import Any

from PySide6.QtCore import Qt, Signal
from PySide6.QtWidgets import QGridLayout, QLineEdit, QWidget

from mistudio import formatting
from mistudio.engine.training.config import option
from mistudio.errors import UserError
from mistudio.library.records import Extraction
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.times import clock_time
from mistudio.ui.training.form import (
    ADVANCED,
    ENCODERS,
    ESSENTIAL,
    LATER,
    NAMES,
    SITES,
    SPARSITY_NAMES,
    Check,
    Form,
    default_text,
    limits_text,
    point_parts,
)
from mistudio.ui.training.presenter import TrainingPresenter
from mistudio.ui.widgets import (
    Button,
    Card,
    Choice,
    Collapsible,
    FormRow,
    LayerGrid,
    Surface,
    Text,
    Toggle,
    debounced,
    picture,
    row,
)

COLUMNS = 3  # of the advanced fields


class OptionField(FormRow):
    """One field of the table. Its value is a text (empty: derived) or, for a switch, a bool."""

    changed = Signal()

    def __init__(self, name: str, parent: QWidget | None = None) -> None:
        limits = option(name)
        default = default_text(name)
        editor: QWidget
        if isinstance(default, bool):
            editor = Toggle(limits["label"], default)
            editor.toggled.connect(self._on_editor_changed)
        elif "choices" in limits:
            editor = Choice([(c, SPARSITY_NAMES.get(c, str(c))) for c in limits["choices"]])
            editor.currentIndexChanged.connect(self._on_editor_changed)
        elif "choices_hint" in limits:
            editor = Choice([(f"{c:g}", f"{c:g}") for c in limits["choices_hint"]])
            editor.setEditable(True)
            editor.setInsertPolicy(Choice.InsertPolicy.NoInsert)
            editor.setCurrentText(default)
            editor.editTextChanged.connect(self._on_editor_changed)
        else:
            editor = QLineEdit(default)
            editor.textChanged.connect(self._on_editor_changed)
        super().__init__(limits["label"], editor, parent=parent)
        self.setObjectName(f"option_{name}")
        self.name = name
        unit = limits.get("unit")
        if unit:
            self.label.setText(f"{limits['label']} ({unit})")
        tip = limits["help"]
        if limits_text(name):
            tip += f"\nFrom {limits_text(name)}."
        for widget in (self, self.label, editor):
            widget.setToolTip(f"<qt>{tip}</qt>".replace("\n", "<br>"))

    @property
    def value(self) -> str | bool:
        if isinstance(self.editor, Toggle):
            return self.editor.isChecked()
        if isinstance(self.editor, QLineEdit):
            return self.editor.text()
        assert isinstance(self.editor, Choice)
        return self.editor.currentText() if self.editor.isEditable() else str(self.editor.value)

    def set_value(self, value: str | bool) -> None:
        if isinstance(self.editor, Toggle):
            self.editor.setChecked(bool(value))
        elif isinstance(self.editor, QLineEdit):
            self.editor.setText(str(value))
        elif isinstance(self.editor, Choice):
            if self.editor.isEditable():
                self.editor.setCurrentText(str(value))
            else:
                self.editor.set_value(value)

    def set_automatic(self, text: str) -> None:
        """What the field becomes where it is left empty."""
        if isinstance(self.editor, QLineEdit):
            self.editor.setPlaceholderText(f"auto: {text}" if text else "auto")

    def _on_editor_changed(self, *_: object) -> None:
        self.changed.emit()


class ConfigurationCard(Card):
    """The everyday form asks five things; the rest has defaults and lies in a section of its
    own. `form()` is what stands in it."""

    def __init__(
        self, services: Services, presenter: TrainingPresenter, parent: QWidget | None = None
    ) -> None:
        super().__init__("Training Configuration", "brain", parent=parent)
        self.setObjectName("training_configuration")
        self._services, self._presenter = services, presenter
        self.check: Check | None = None
        self._restoring = False

        self.dataset = Choice()
        self.dataset.setObjectName("dataset")
        self.dataset.currentIndexChanged.connect(self._on_inputs_changed)
        self.add_dataset = Button("Add a dataset", "link", "plus")
        self.add_dataset.clicked.connect(self._on_add_dataset_clicked)
        self.model = Choice()
        self.model.setObjectName("model")
        self.model.currentIndexChanged.connect(self._on_model_changed)
        self.add_model = Button("Add a model", "link", "plus")
        self.add_model.clicked.connect(self._on_add_model_clicked)
        self.encoder = Choice(ENCODERS)
        self.encoder.setObjectName("encoder")
        for value, _ in ENCODERS[1:]:
            self.encoder.disable(value, LATER)
        self.encoder.setToolTip(
            "A sparse autoencoder explains a site's activations by a few active latents. Skip "
            "autoencoders and transcoders come with the training engine."
        )
        self._dataset_row = FormRow("Dataset", self.dataset, beside=self.add_dataset)
        self._model_row = FormRow("Model", self.model, beside=self.add_model)
        self.add(_equal(self._dataset_row, self._model_row, FormRow("Encoder Type", self.encoder)))

        self.fields = {name: OptionField(name) for name in NAMES}
        for entry in self.fields.values():
            entry.changed.connect(self._on_fields_changed)
        self.add(_equal(*(self.fields[name] for name in ESSENTIAL)))

        self.site = Choice(list(SITES.items()))
        self.site.setObjectName("site")
        self.site.setToolTip(
            "Where in each chosen layer the activations are read. The residual stream after the "
            "block is what most published dictionaries use."
        )
        self.site.currentIndexChanged.connect(self._on_inputs_changed)
        self.source = Choice([(None, "Stream from the model")])
        self.source.setObjectName("source")
        self.source.setToolTip(
            "Streaming runs the model while the dictionary learns and needs no disk space. Stored "
            "activations (Models tab, Extract Activations) are read instead, which is faster when "
            "you train on them more than once."
        )
        self.source.currentIndexChanged.connect(self._on_source_changed)
        self._source_row = FormRow("Activations", self.source)
        self.add(_equal(FormRow("Site", self.site), self._source_row))
        self.layers = LayerGrid(8, 0, "Training Layers", "Select a model to see available layers")
        self.layers.changed.connect(self._on_inputs_changed)
        self.add(self.layers)

        self.advanced = Collapsible("Advanced Hyperparameters")
        self.advanced.setObjectName("advanced")
        grid = QGridLayout()
        grid.setHorizontalSpacing(tokens.GAP)
        grid.setVerticalSpacing(tokens.GAP)
        for place, name in enumerate(ADVANCED):
            grid.addWidget(self.fields[name], place // COLUMNS, place % COLUMNS)
        for place in range(COLUMNS):
            grid.setColumnStretch(place, 1)
        self.advanced.add(grid)
        self.reset = Button("Reset to defaults", "link", "rotate-ccw")
        self.reset.clicked.connect(self._on_reset_clicked)
        self.advanced.add(row(self.reset, None))
        self.add(self.advanced)

        self._summary_text = Text("", "small", wrap=True)
        self._summary = Surface("row", None, 14)
        line = row(picture("gauge", tokens.HELPER, 18), self._summary_text)
        line.setStretch(1, 1)
        line.setAlignment(line.itemAt(0).widget(), Qt.AlignmentFlag.AlignTop)
        self._summary.add(line)
        self._summary.setToolTip(
            "Disk: four bytes for every parameter. Memory: the model in 32 bit, 16 bytes for every "
            "parameter that learns (weight, gradient, two moments of Adam) and one batch."
        )
        self.add(self._summary)
        self.start = Button("Start Training", "primary", "play")
        self.start.setObjectName("start_training")
        self.start.clicked.connect(self._on_start_clicked)
        self.reason = Text("", "helper", wrap=True)
        self.reason.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self.add(self.start, self.reason)

        self._recheck = debounced(self, 120, self.refresh_check)
        presenter.choices_changed.connect(self.refresh_choices)
        presenter.starting_changed.connect(self._on_starting_changed)
        self.refresh_choices()

    # --- what stands in the form ----------------------------------------------------------------

    def form(self) -> Form:
        return Form(
            dataset=self.dataset.value,
            model=self.model.value,
            layers=tuple(self.layers.selected()),
            site=self.site.value,
            extraction=self.source.value,
            values={name: entry.value for name, entry in self.fields.items()},
        )

    def save_state(self) -> dict[str, Any]:
        form = self.form()
        return {
            "dataset": form.dataset.id if form.dataset else None,
            "model": form.model.id if form.model else None,
            "extraction": form.extraction.id if form.extraction else None,
            "site": form.site,
            "layers": list(form.layers),
            "values": form.values,
            "advanced": self.advanced.expanded,
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """Take back a form; what no longer exists is left at its default."""
        self._restoring = True
        self.choose(state.get("dataset"), state.get("model"))
        self.site.set_value(state.get("site", "resid_post"))
        layers = state.get("layers")
        if isinstance(layers, list) and self.model.value is not None:
            self.layers.set_selected(layer for layer in layers if isinstance(layer, int))
        values = state.get("values")
        for name, value in (values if isinstance(values, dict) else {}).items():
            if name in self.fields and type(value) is type(self.fields[name].value):
                self.fields[name].set_value(value)
        self.advanced.set_expanded(bool(state.get("advanced")))
        self.choose_extraction(state.get("extraction"))
        self._restoring = False
        self.refresh_check()

    def choose(self, dataset_id: int | None = None, model_id: int | None = None) -> None:
        for choice, wanted in ((self.dataset, dataset_id), (self.model, model_id)):
            for index in range(choice.count()):
                record = choice.itemData(index)
                if wanted is not None and record is not None and record.id == wanted:
                    choice.setCurrentIndex(index)

    def choose_extraction(self, extraction_id: int | None) -> None:
        for index in range(self.source.count()):
            record = self.source.itemData(index)
            if isinstance(record, Extraction) and record.id == extraction_id:
                self.source.setCurrentIndex(index)

    # --- showing --------------------------------------------------------------------------------

    def refresh_choices(self) -> None:
        """Read datasets and models again; what was chosen stays chosen."""
        datasets, models = self._presenter.datasets(), self._presenter.models()
        self._fill(self.dataset, datasets, "Select dataset…", "No datasets yet")
        self._fill(self.model, models, "Select model…", "No models yet")
        self.add_dataset.setVisible(not datasets)
        self.add_model.setVisible(not models)
        self._show_model()
        self._refresh_sources()
        self.refresh_check()

    def _fill(self, choice: Choice, records: list[Any], prompt: str, empty: str) -> None:
        chosen = choice.value
        first = choice.count() == 0
        blocked = choice.blockSignals(True)
        options: list[tuple[Any, str]] = [(None, prompt if records else empty)]
        choice.set_options(options + [(record, record.name) for record in records])
        choice.setEnabled(bool(records))
        kept = next((r for r in records if chosen is not None and r.id == chosen.id), None)
        if kept is None and (first or chosen is None) and len(records) == 1:
            kept = records[0]
        choice.set_value(kept)
        choice.blockSignals(blocked)

    def _show_model(self) -> None:
        model = self.model.value
        n_layers = model.n_layers if model else 0
        if n_layers != self.layers.n_layers:
            self.layers.set_n_layers(n_layers)
            if n_layers and not self.layers.selected() and not self._restoring:
                self.layers.set_selected([n_layers // 2])

    def _refresh_sources(self) -> None:
        chosen = self.source.value
        found = self._presenter.extractions(self.model.value, self.dataset.value)
        blocked = self.source.blockSignals(True)
        self.source.set_options(
            [(None, "Stream from the model"), *((record, _stored(record)) for record in found)]
        )
        kept = next((r for r in found if chosen is not None and r.id == chosen.id), None)
        self.source.set_value(kept)
        self.source.blockSignals(blocked)

    def refresh_check(self) -> None:
        """Show what is wrong, what is derived and what it would cost."""
        form = self.form()
        found = self.check = self._presenter.check(form)
        for name, entry in self.fields.items():
            entry.set_error(found.errors.get(name, ""))
            entry.set_automatic(found.automatic.get(name, ""))
        self._source_row.set_error(found.errors.get("extraction", ""))
        plan = found.plan
        self.fields["expansion"].set_helper(
            f"{formatting.count(plan.d_sae)} latents" if plan else ""
        )
        stored = form.extraction.settings.get("context") if form.extraction else None
        context = self.fields["context"]
        context.editor.setEnabled(stored is None)
        context.set_helper(f"The stored activations have {stored}." if stored else "")
        self._summary_text.setText(found.summary)
        self._summary.setVisible(bool(found.summary))
        hidden = [name for name in found.errors if name in ADVANCED]
        if hidden and not self.advanced.expanded and not self._restoring:
            self.advanced.set_expanded(True)
        self._show_start()

    def _show_start(self) -> None:
        blocker = self.check.blocker if self.check else ""
        starting = self._presenter.starting
        self.start.setEnabled(not blocker and not starting)
        self.start.setText("Loading the engine…" if starting else "Start Training")
        self.start.setToolTip(blocker)
        self.start.setAccessibleDescription(blocker)
        self.reason.setText(blocker)
        self.reason.setVisible(bool(blocker))

    # --- slots ----------------------------------------------------------------------------------

    def _on_fields_changed(self) -> None:
        self._recheck()

    def _on_inputs_changed(self, *_: object) -> None:
        self._refresh_sources()
        if not self._restoring:
            self.refresh_check()

    def _on_model_changed(self, *_: object) -> None:
        self._show_model()
        self._on_inputs_changed()

    def _on_source_changed(self, *_: object) -> None:
        """Stored activations hold some sites only: the form goes to those."""
        extraction = self.source.value
        if extraction is not None and not self._restoring:
            form = self.form()
            held = [point_parts(name) for name in extraction.hook_points]
            if any(point not in extraction.hook_points for point in form.points) or not form.layers:
                site = held[0][0]
                if site:
                    self.site.blockSignals(True)
                    self.site.set_value(site)
                    self.site.blockSignals(False)
                    self.layers.set_selected(layer for name, layer in held if name == site)
        if not self._restoring:
            self.refresh_check()

    def _on_starting_changed(self, starting: bool) -> None:
        self._show_start()

    def _on_reset_clicked(self, checked: bool = False) -> None:
        for name in ADVANCED:
            self.fields[name].set_value(default_text(name))

    def _on_add_dataset_clicked(self, checked: bool = False) -> None:
        self._services.navigate("datasets")

    def _on_add_model_clicked(self, checked: bool = False) -> None:
        self._services.navigate("models")

    def _on_start_clicked(self, checked: bool = False) -> None:
        self._recheck.flush()
        try:
            self._presenter.start(self.form())
        except UserError as exc:
            self._services.toasts.error(exc)


def _equal(*widgets: QWidget) -> Any:
    """Side by side, all of the same width."""
    grid = QGridLayout()
    grid.setHorizontalSpacing(tokens.GAP)
    for place, widget in enumerate(widgets):
        grid.addWidget(widget, 0, place, Qt.AlignmentFlag.AlignTop)
        grid.setColumnStretch(place, 1)
        grid.setColumnMinimumWidth(place, 1)
    return grid


def _stored(extraction: Extraction) -> str:
    layers = sorted({point_parts(name)[1] for name in extraction.hook_points})
    named = ", ".join(f"L{layer}" for layer in layers[:4]) + (" …" if len(layers) > 4 else "")
    return (
        f"Stored: {formatting.short_count(extraction.tokens)} tokens at {named} "
        f"({formatting.size(extraction.bytes)}, {clock_time(extraction.created_at)})"
    )
