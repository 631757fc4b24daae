"""The Training Configuration card: fields made from the engine's table of hyper-parameters."""

from __future__ import annotations

from html import escape
from itertools import pairwise
from typing import Any

from PySide6.QtCore import Qt, QTimer
from PySide6.QtWidgets import QWidget

from mistudio import formatting
from mistudio.engine.training.advice import Mend
from mistudio.engine.training.config import option
from mistudio.errors import InvalidInput, UserError
from mistudio.jobs.template_files import Config
from mistudio.jobs.templates import (
    dataset_reference,
    find_dataset,
    find_model,
    model_reference,
)
from mistudio.library.records import Extraction, Template
from mistudio.ui.services import Services
from mistudio.ui.templates.section import TemplateSection
from mistudio.ui.theme import tokens
from mistudio.ui.times import clock_time
from mistudio.ui.training.estimate import method, rate
from mistudio.ui.training.fields import COLUMNS, Columns, OptionField, Remark, Section
from mistudio.ui.training.form import (
    ACROSS_MLP,
    ADVANCED,
    ESSENTIAL,
    NAMES,
    SITES,
    SOURCES,
    TRANSCODERS,
    Check,
    Form,
    default_text,
    default_value,
    encoder_of,
    groups,
    mended_text,
    point_parts,
    value_text,
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
    column,
    debounced,
    picture,
    row,
)

IDLE_MS = 1500  # after the last change the speed is measured, where that is cheap
AGE_MS = 10_000  # how old a measurement is, is told anew this often
MEASURE_HELP = (
    "Loads the model and runs about two seconds of just this training: the model on real text, and "
    "steps of the real size."
)
NOT_MEASURABLE = (
    "Nothing is measured beside other work on the device, or while the form has an error or does "
    "not fit."
)
SITE_HELP = (
    "Where in each chosen layer the activations are read. The residual stream after the block is "
    "what most published dictionaries use."
)
ACROSS_HELP = (
    "A transcoder reads what enters each layer's MLP and reconstructs what the MLP adds to the "
    "residual stream."
)


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
        self._free_site = "resid_post"  # of the autoencoders, kept while a transcoder is chosen

        self.fields = {name: OptionField(name) for name in NAMES}
        for entry in self.fields.values():
            entry.changed.connect(self._on_fields_changed)
            entry.chosen.connect(self._on_fields_chosen)
            entry.remark.wanted.connect(self._on_remark_wanted)
        self._add_everyday_fields()
        self._add_advanced()
        self._add_templates()
        self._add_summary()
        self.start = Button("Start Training", "primary", "play")
        self.start.setObjectName("start_training")
        self.start.clicked.connect(self._on_start_clicked)
        self.reason = Text("", "helper", wrap=True)
        self.reason.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self.anyway = Button("Start anyway", "link", "play")
        self.anyway.clicked.connect(self._on_anyway_clicked)
        self.add(self.start, self.reason, row(None, self.anyway, None))

        self._recheck = debounced(self, 120, self.refresh_check)
        self._measure_soon = debounced(self, IDLE_MS, self._on_idle)
        self._age = QTimer(self)
        self._age.setInterval(AGE_MS)
        self._age.timeout.connect(self._show_method)
        presenter.measuring_changed.connect(self._on_measuring_changed)
        self._device_soon = debounced(self, 200, self._show_method)  # other work begins or ends
        presenter.list_changed.connect(self._device_soon)
        presenter.choices_changed.connect(self.refresh_choices)
        presenter.computer_changed.connect(self._on_computer_changed)
        presenter.starting_changed.connect(self._on_starting_changed)
        self.refresh_choices()

    # --- building -------------------------------------------------------------------------------

    def _add_everyday_fields(self) -> None:
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
        self.source = Choice(list(SOURCES.items()))
        self.source.setObjectName("source")
        self.source.setToolTip(
            "<qt>Streaming runs the model while the dictionary learns and needs no disk space.<br>"
            "Storing first, at once or in portions, keeps the model and the dictionary from being "
            "in memory together.<br>Stored activations (Models tab, Extract Activations) are "
            "faster when you train on them more than once.</qt>"
        )
        self.source.view().setMinimumWidth(460)  # the list says more than the column has room for
        self.source.currentIndexChanged.connect(self._on_source_changed)
        self._dataset_row = FormRow("Dataset", self.dataset, below=self.add_dataset)
        self._model_row = FormRow("Model", self.model, below=self.add_model)
        self._source_remark = Remark("Activations")
        self._source_remark.wanted.connect(self._on_remark_wanted)
        self._source_row = FormRow("Activations", self.source, below=self._source_remark)
        kind = [self.fields["wiring"], self.fields["sparsity"]]
        size = [entry for name, entry in self.fields.items() if name in ESSENTIAL]
        size = [entry for entry in size if entry not in kind]
        rows = [self._dataset_row, self._model_row, *kind, *size, self._source_row]
        grid = Columns()
        grid.place(rows)
        self._add_where(grid, -(-len(rows) // COLUMNS))
        self.add(grid)

    def _add_where(self, grid: Columns, line: int) -> None:
        self.site = Choice(list(SITES.items()))
        self.site.setObjectName("site")
        self.site.setToolTip(SITE_HELP)
        self.site.currentIndexChanged.connect(self._on_inputs_changed)
        self._site_row = FormRow("Site", self.site)
        self.layers = LayerGrid(8, 0, "Training Layers", "Select a model to see available layers")
        self.layers.changed.connect(self._on_inputs_changed)
        # Both headings on one line, as high as the buttons beside the second.
        self.layers.select_all.ensurePolished()
        self._site_row.label.setMinimumHeight(self.layers.select_all.sizeHint().height())
        grid.addWidget(self._site_row, line, 0, Qt.AlignmentFlag.AlignTop)
        self._layers_remark = Remark("Training Layers")
        self._layers_remark.wanted.connect(self._on_remark_wanted)
        places = column(8)
        places.addWidget(self.layers)
        places.addWidget(self._layers_remark)
        grid.addLayout(places, line, 1, 1, COLUMNS - 1, Qt.AlignmentFlag.AlignTop)

    def _add_advanced(self) -> None:
        self.advanced = Collapsible("Advanced Hyperparameters")
        self.advanced.setObjectName("advanced")
        self._sections = [
            Section(title, {name: self.fields[name] for name in names}) for title, names in groups()
        ]
        self.reset = Button("Reset to defaults", "link", "rotate-ccw")
        self.reset.clicked.connect(self._on_reset_clicked)
        self.advanced.add(*self._sections, row(self.reset, None))
        self.advanced.button.toggled.connect(self._on_advanced_toggled)
        self.add(self.advanced)

    def _add_templates(self) -> None:
        self.templates = TemplateSection(
            self._services,
            "training",
            "Training Templates",
            self.template_config,
            template_meta,
            travels=True,
        )
        self.templates.load_wanted.connect(self._on_templates_load_wanted)
        self.add(self.templates)

    def _add_summary(self) -> None:
        """What the training would do, need and take, how that is known and a button to measure
        it; below, in yellow, where something is short."""
        self._work = Text("", "small", wrap=True)
        self._needs = Text("", "small", wrap=True)
        self._time = Text("", "small")
        self._method = Text("", "helper", wrap=True)
        self.measure = Button("Measure the speed", "small", "gauge")
        self.measure.setObjectName("measure_speed")
        self.measure.clicked.connect(self._on_measure_clicked)
        self._advice = Text("", "small", "yellow", wrap=True)
        self._summary = Surface("row", None, 14)
        self._advice_row = QWidget()
        took = row(self._time, self.measure)
        took.setStretch(0, 1)
        figures, advice = column(6), column(6)
        figures.addWidget(self._work)
        figures.addWidget(self._needs)
        figures.addLayout(took)
        figures.addWidget(self._method)
        advice.addWidget(self._advice)
        for lines, icon, colour in (
            (figures, "gauge", tokens.HELPER),
            (advice, "triangle-alert", tokens.YELLOW),
        ):
            mark = picture(icon, colour, 18)
            line = row(mark, lines)
            line.setStretch(1, 1)
            line.setAlignment(mark, Qt.AlignmentFlag.AlignTop)
            if lines is advice:
                self._advice_row.setLayout(line)
                self._summary.add(self._advice_row)
            else:
                self._summary.add(line)
        self.add(self._summary)

    # --- what stands in the form ----------------------------------------------------------------

    def form(self) -> Form:
        chosen = self.source.value
        return Form(
            dataset=self.dataset.value,
            model=self.model.value,
            layers=tuple(self.layers.selected()),
            site=self._free_site if self._is_transcoder else self.site.value,
            extraction=chosen if isinstance(chosen, Extraction) else None,
            source=chosen if isinstance(chosen, str) else "auto",
            values={name: entry.value for name, entry in self.fields.items()},
        )

    @property
    def _is_transcoder(self) -> bool:
        return self.fields["wiring"].value in TRANSCODERS

    def save_state(self) -> dict[str, Any]:
        form = self.form()
        return {
            "dataset": form.dataset.id if form.dataset else None,
            "model": form.model.id if form.model else None,
            "extraction": form.extraction.id if form.extraction else None,
            "source": form.source,
            "site": form.site,
            "layers": list(form.layers),
            "values": form.values,
            "advanced": self.advanced.expanded,
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """Take back a form; what no longer exists is left at its default."""
        self._restoring = True
        self.choose(state.get("dataset"), state.get("model"))
        values = state.get("values")
        for name, value in (values if isinstance(values, dict) else {}).items():
            if name in self.fields and type(value) is type(self.fields[name].value):
                self.fields[name].set_value(value)
        self._set_site(state.get("site", "resid_post"))
        layers = state.get("layers")
        if isinstance(layers, list) and self.model.value is not None:
            self.layers.set_selected(layer for layer in layers if isinstance(layer, int))
        self.advanced.set_expanded(bool(state.get("advanced")))
        self.source.set_value(state.get("source", "auto"))
        self.choose_extraction(state.get("extraction"))
        self._restoring = False
        self.refresh_check()

    def template_config(self) -> Config:
        """The form as a template keeps it. InvalidInput where a field is wrong."""
        self._recheck.flush()
        form, found = self.form(), self.check
        assert found is not None
        if found.errors:
            name, sentence = next(iter(found.errors.items()))
            raise InvalidInput("This configuration has an error", sentence, field=name)
        return {
            "model": model_reference(form.model) if form.model else {},
            "dataset": dataset_reference(form.dataset) if form.dataset else {},
            "layers": list(form.layers),
            "site": form.site,
            "source": form.source,
            "hyperparameters": found.config,
        }

    def load_template(self, template: Template) -> None:
        """Take a template into the form; what it names and is not here stays as it was."""
        config, library = template.config, self._services.library
        model, no_model = find_model(library, config.get("model", {}))
        dataset, no_dataset = find_dataset(library, config.get("dataset", {}))
        notes = [note for note in (no_model, no_dataset) if note]
        self._restoring = True
        self.choose(dataset.id if dataset else None, model.id if model else None)
        values = config.get("hyperparameters", {})
        for name, entry in self.fields.items():
            wanted = value_text(name, values[name]) if name in values else default_text(name)
            entry.set_value(wanted)
        self._set_site(config.get("site", "resid_post"))
        self.source.set_value(config.get("source", "auto"))
        layers, n_layers = config.get("layers", []), self.layers.n_layers
        there = [layer for layer in layers if layer < n_layers]
        if layers and n_layers and len(there) < len(layers):
            notes.append(f"Layers above {n_layers - 1} are left out: the model has {n_layers}.")
        if there:
            self.layers.set_selected(there)
        self._restoring = False
        self._show_site()
        self.refresh_check()
        told = self._services.toasts.warning if notes else self._services.toasts.success
        told(f"Loaded “{template.name}”", " ".join(notes))

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
            self._order_tabs()
            if n_layers and not self.layers.selected() and not self._restoring:
                self.layers.set_selected([n_layers // 2])

    def _order_tabs(self) -> None:
        """Tab goes as the eye does: by rows, then through the sections."""

        def of(*names: str) -> list[QWidget]:
            found = [self.fields[name] for name in names]
            return [widget for entry in found for widget in (entry.editor, entry.remark.button)]

        everyday = [name for name in ESSENTIAL if name != "sparsity"]
        stops = [
            self.dataset, self.add_dataset, self.model, self.add_model,
            *of(everyday[0], "sparsity", *everyday[1:]), self.source, self._source_remark.button,
            self.site, self.layers.select_all, self.layers.clear_all, *self.layers.buttons,
            self._layers_remark.button, self.advanced.button,
            *of(*(name for _, names in groups() for name in names)),
            self.reset, *self.templates.stops(), self.measure, self.start, self.anyway,
        ]  # fmt: skip
        for before, after in pairwise(stops):
            QWidget.setTabOrder(before, after)

    def _set_site(self, site: Any) -> None:
        """Choose where autoencoders read; a transcoder keeps its own place meanwhile."""
        self._free_site = site if site in SITES else "resid_post"
        if not self._is_transcoder:
            blocked = self.site.blockSignals(True)
            self.site.set_value(self._free_site)
            self.site.blockSignals(blocked)

    def _show_site(self) -> None:
        """A transcoder has one place; the autoencoders' comes back after it."""
        fixed = not self.site.isEnabled()
        if fixed == self._is_transcoder:
            return
        blocked = self.site.blockSignals(True)
        if self._is_transcoder:
            self._free_site = self.site.value
            self.site.set_options([("mlp_in", ACROSS_MLP)])
        else:
            self.site.set_options(list(SITES.items()))
            self.site.set_value(self._free_site)
        self.site.blockSignals(blocked)
        self.site.setEnabled(not self._is_transcoder)
        self.site.setToolTip(ACROSS_HELP if self._is_transcoder else SITE_HELP)
        self._site_row.set_helper(ACROSS_HELP if self._is_transcoder else "")

    def _refresh_sources(self) -> None:
        chosen = self.source.value
        found = self._presenter.extractions(self.model.value, self.dataset.value)
        blocked = self.source.blockSignals(True)
        self.source.set_options(
            [*SOURCES.items(), *((record, _stored(record)) for record in found)]
        )
        kept = chosen
        if isinstance(chosen, Extraction):
            kept = next((record for record in found if record.id == chosen.id), "auto")
        self.source.set_value(kept)
        self.source.blockSignals(blocked)

    def refresh_check(self) -> None:
        """Show what is wrong, what applies, what is derived and what it would cost."""
        found = self.check = self._presenter.check(self.form())
        for name, entry in self.fields.items():
            entry.set_error(found.errors.get(name, ""))
            entry.set_advice(found.advice.get(name, ""), found.mends.get(name))
            entry.set_automatic(found.automatic.get(name, ""))
            entry.set_helper(found.notes.get(name, ""))
            entry.editor.setEnabled(name not in found.fixed)
        for section in self._sections:
            section.show_only(found.shown)
        self._source_row.set_error(found.errors.get("extraction", ""))
        self._source_remark.show_remark("", found.mends.get("extraction"))
        self._layers_remark.show_remark(found.advice.get("layers", ""), found.mends.get("layers"))
        hidden = [name for name in found.errors if name in ADVANCED]
        if hidden and not self.advanced.expanded and not self._restoring:
            self.advanced.set_expanded(True)
        self._show_estimate(found)
        self._show_start()

    def _show_estimate(self, found: Check) -> None:
        needs = found.estimate
        # What stands beside the grid, with its mend, is not said twice.
        twice = " at a time" if "layers" in found.advice else None
        lines = [line for line in needs.advice if twice is None or twice not in line]
        if not self.advanced.expanded:
            hidden = [name for name in found.advice if name in ADVANCED]
            lines += [f"{option(name)['label']}: {found.advice[name]}" for name in hidden]
        for text, content in (
            (self._work, needs.work),
            (self._needs, needs.needs),
            (self._time, needs.time),
            (self._advice, "\n".join(lines)),
        ):
            text.setText(content)
            text.setVisible(bool(content))
        self._advice_row.setVisible(bool(lines))
        self._summary.setVisible(bool(needs.work))
        parts = "".join(f"<p>{escape(line)}</p>" for line in needs.details)
        self._summary.setToolTip(f"<qt>{parts}</qt>" if parts else "")
        self._show_method()

    def _show_method(self) -> None:
        """How the time is known, and whether it can be measured now."""
        found, presenter = self.check, self._presenter
        if found is None:
            return
        text = method(found.estimate.pace) or presenter.measuring_failed
        self._method.setText("Measuring the speed…" if presenter.measuring else text)
        self._method.setVisible(bool(self._method.text()))
        known = found.estimate.measured
        self.measure.setText("Measure again" if known else "Measure the speed")
        self.measure.setVisible(not presenter.measuring)
        can = not presenter.measuring and presenter.measurable(self.form(), found)
        self.measure.setEnabled(can)
        self.measure.setToolTip(MEASURE_HELP if can else NOT_MEASURABLE)
        if known and self.isVisible() and not self._age.isActive():
            self._age.start()
        elif not known:
            self._age.stop()

    def _show_start(self) -> None:
        blocker = self.check.blocker if self.check else ""
        doubt = self.check.doubt if self.check and not blocker else ""
        starting = self._presenter.starting
        self.start.setEnabled(not blocker and not doubt and not starting)
        self.start.setText("Loading the engine…" if starting else "Start Training")
        self.start.setToolTip(blocker or doubt)
        self.start.setAccessibleDescription(blocker or doubt)
        self.reason.setText(blocker or doubt)
        self.reason.setVisible(bool(blocker or doubt))
        self.anyway.setVisible(bool(doubt))
        self.anyway.setEnabled(not starting)

    # --- slots ----------------------------------------------------------------------------------

    def _on_fields_changed(self) -> None:
        self._recheck()
        self._touched()

    def _on_fields_chosen(self) -> None:
        self._show_site()
        if not self._restoring:
            self.refresh_check()
            self._touched()

    def _touched(self) -> None:
        """Someone is at the form: what it describes is measured once they pause."""
        if not self._restoring and self.isVisible():
            self._measure_soon()

    def _on_idle(self) -> None:
        self._recheck.flush()
        found, form = self.check, self.form()
        self._presenter.stop_measuring(unless=form)
        if found is None or found.estimate.measured or self._presenter.measuring:
            return
        if not self.isVisible() or not self._presenter.measurable(form, found):
            return
        if self._presenter.is_cheap(form):
            self._presenter.measure(form)
        else:
            self._presenter.look_at_speed()

    def _on_measure_clicked(self, checked: bool = False) -> None:
        self._recheck.flush()
        self._presenter.measure(self.form())

    def _on_advanced_toggled(self, expanded: bool) -> None:
        if self.check is not None:  # advice on fields that cannot be seen is told below
            self._show_estimate(self.check)

    def _on_measuring_changed(self) -> None:
        self.refresh_check()

    def _on_remark_wanted(self, mend: Mend) -> None:
        """One click: the value goes into its field, and the keyboard with it."""
        if mend.field == "layers":
            self.layers.set_selected(mend.value)
        elif mend.field == "source":
            self.source.set_value(mend.value)
        else:
            entry = self.fields[mend.field]
            entry.set_value(mended_text(mend))
            entry.editor.setFocus(Qt.FocusReason.OtherFocusReason)
            self._recheck.flush()

    def _on_computer_changed(self) -> None:
        reason = self._presenter.no_8bit
        if reason:
            editor = self.fields["optimizer"].editor
            assert isinstance(editor, Choice)
            editor.disable("adam8bit", reason)
        self.refresh_check()

    def _on_inputs_changed(self, *_: object) -> None:
        self._refresh_sources()
        if not self._restoring:
            self.refresh_check()
            self._touched()

    def _on_model_changed(self, *_: object) -> None:
        self._show_model()
        self._on_inputs_changed()

    def _on_source_changed(self, *_: object) -> None:
        """Stored activations hold some sites only: the form goes to those."""
        form = self.form()
        if form.extraction is not None and not self._restoring:
            held = form.extraction.hook_points
            if any(name not in held for name in form.needed) or not form.layers:
                self._go_to(held)
        if not self._restoring:
            self.refresh_check()

    def _go_to(self, held: list[str]) -> None:
        places = [point_parts(name) for name in held]
        if self._is_transcoder:
            both = [layer for site, layer in places if site == "mlp_in"]
            both = [layer for layer in both if ("mlp_out", layer) in places]
            if both:
                self.layers.set_selected(both)
        elif places[0][0]:
            self._set_site(places[0][0])
            self.layers.set_selected(layer for site, layer in places if site == places[0][0])

    def _on_starting_changed(self, starting: bool) -> None:
        self._show_start()

    def _on_templates_load_wanted(self, template: Template) -> None:
        self.load_template(template)

    def _on_reset_clicked(self, checked: bool = False) -> None:
        for name in ADVANCED:
            self.fields[name].set_value(default_text(name))

    def _on_add_dataset_clicked(self, checked: bool = False) -> None:
        self._services.navigate("datasets")

    def _on_add_model_clicked(self, checked: bool = False) -> None:
        self._services.navigate("models")

    def _on_start_clicked(self, checked: bool = False) -> None:
        self._start()

    def _on_anyway_clicked(self, checked: bool = False) -> None:
        self._start(anyway=True)

    def _start(self, anyway: bool = False) -> None:
        self._recheck.flush()
        self._measure_soon.stop()
        try:
            self._presenter.start(self.form(), anyway)
        except UserError as exc:
            self._services.toasts.error(exc)


def template_meta(config: Config) -> str:
    """`BatchTopK SAE • LR: 1e-4 • 8x expansion`."""
    values = config["hyperparameters"]
    given = values.get("learning_rate")
    width = values.get("width")
    size = f"{formatting.count(width)} latents" if width else ""
    layers = config.get("layers", [])
    parts = [
        encoder_of(values),
        f"LR: {rate(given) if given else 'auto'}",
        size or f"{values.get('expansion') or default_value('expansion'):g}x expansion",
        f"{len(layers)} layers" if len(layers) > 1 else f"layer {layers[0]}" if layers else "",
        config.get("model", {}).get("name", ""),
    ]
    return " • ".join(filter(None, parts))


def _stored(extraction: Extraction) -> str:
    layers = sorted({point_parts(name)[1] for name in extraction.hook_points})
    named = ", ".join(f"L{layer}" for layer in layers[:4]) + (" …" if len(layers) > 4 else "")
    return (
        f"Stored: {formatting.short_count(extraction.tokens)} tokens at {named} "
        f"({formatting.size(extraction.bytes)}, {clock_time(extraction.created_at)})"
    )
