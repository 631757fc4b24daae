"""The card on the right: whose features, the prompt, and what a generation is asked for."""

from __future__ import annotations

from PySide6.QtCore import Qt, Signal
from PySide6.QtWidgets import QGridLayout, QPlainTextEdit, QWidget

from mistudio.jobs.control import Snapshot
from mistudio.ui.steering.advanced import Advanced
from mistudio.ui.steering.layer_strengths import shares
from mistudio.ui.steering.presenter import SteeringPresenter
from mistudio.ui.steering.prompt_tokens import PromptTokens
from mistudio.ui.steering.request import Form
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import (
    Button,
    Card,
    Choice,
    FloatBox,
    FormRow,
    IntBox,
    ProgressRow,
    Surface,
    Text,
    column,
    debounced,
    row,
)

ONE_MODEL = (
    "The model whose activations the SAE learned: in another model its directions mean nothing, so "
    "there is none to choose."
)


class GenerationForm(Card):
    """Shows the presenter's source; `start_wanted` and `stop_wanted` are its two buttons. Its
    `advanced` part is laid out by the page, below both columns."""

    start_wanted = Signal()
    stop_wanted = Signal()
    edited = Signal()

    def __init__(self, presenter: SteeringPresenter, parent: QWidget | None = None) -> None:
        super().__init__("Generation Configuration", "settings", parent=parent)
        self.presenter = presenter
        self._add_source()
        self._add_prompt()
        self._add_buttons()
        self.advanced = Advanced()
        self.advanced.changed.connect(self._on_edited)
        self.body.addStretch(1)
        self._tokens_wanted = debounced(self, 300, self._read_tokens)
        presenter.tokens_read.connect(self._on_presenter_tokens_read)
        presenter.tokens_failed.connect(self.advanced.picker.show_problem)
        presenter.selection_changed.connect(self.refresh)
        presenter.index_changed.connect(self.refresh)

    def _add_source(self) -> None:
        self.source = Choice()
        self.source.setPlaceholderText("Select training…")
        self.source.currentIndexChanged.connect(self._on_source_changed)
        self.model = Text("—", "small", wrap=True)
        self.model.setToolTip(ONE_MODEL)
        self.layer = Text("—", "small", wrap=True)
        self.trained_on = Text("—", "small", wrap=True)
        facts = QGridLayout()
        facts.setHorizontalSpacing(16)
        facts.setVerticalSpacing(6)
        facts.setColumnStretch(1, 1)
        for line, (name, value) in enumerate(
            (
                ("Model (for generation)", self.model),
                ("Features of", self.layer),
                ("Trained on", self.trained_on),
            )
        ):
            label = Text(name, "label")
            label.setBuddy(value)
            facts.addWidget(label, line, 0, Qt.AlignmentFlag.AlignTop)
            facts.addWidget(value, line, 1)
        facts.itemAtPosition(0, 0).widget().setToolTip(ONE_MODEL)
        about = Surface("tile", padding=12)
        about.add(facts)
        self.add(FormRow("Training Job (Source of Features)", self.source), about)

    def _add_prompt(self) -> None:
        self.prompt = QPlainTextEdit()
        self.prompt.setPlaceholderText("Enter your prompt here…")
        self.prompt.setTabChangesFocus(True)
        self.prompt.setFixedHeight(4 * self.prompt.fontMetrics().lineSpacing() + 26)
        self.prompt.textChanged.connect(self._on_prompt_changed)
        self.temperature = FloatBox(0.7, 0.0, 2.0, 0.1, 2)
        self.temperature.setToolTip("0 always takes the most likely token")
        self.max_tokens = IntBox(100, 1, 2048, 10)
        self.max_tokens.setToolTip("The longest continuation")
        self.max_tokens.valueChanged.connect(self._on_max_tokens_changed)
        numbers = QGridLayout()
        numbers.setHorizontalSpacing(tokens.GAP)
        numbers.addWidget(FormRow("Temperature", self.temperature), 0, 0)
        numbers.addWidget(FormRow("Max Tokens", self.max_tokens), 0, 1)
        numbers.setColumnStretch(0, 1)
        numbers.setColumnStretch(1, 1)
        self.add(FormRow("Prompt", self.prompt), numbers)

    def _add_buttons(self) -> None:
        self.generate = Button("Generate Comparison", "primary", "zap")
        self.generate.clicked.connect(self._on_generate_clicked)
        self.stop = Button("Stop", "secondary", "square")
        self.stop.clicked.connect(self._on_stop_clicked)
        self.stop.hide()
        self.reason = Text("", "helper", wrap=True)
        self.progress = ProgressRow("Generating")
        self.progress.hide()
        buttons = row(self.generate, self.stop)
        buttons.setStretch(0, 1)
        # One place for both, always as high as the progress: nothing below moves as it comes.
        slot = QWidget()
        slot.setProperty("surface", "clear")
        said = column(0)
        said.addWidget(self.reason)
        said.addWidget(self.progress)
        said.addStretch(1)
        slot.setLayout(said)
        times = self.reason.fontMetrics().lineSpacing() + 6  # the progress hides them at first
        slot.setMinimumHeight(self.progress.sizeHint().height() + times)
        self._said = slot
        below = column(8)
        below.addLayout(buttons)
        below.addWidget(slot)
        self.add(below)

    # --- values ---------------------------------------------------------------------------------

    def form(self) -> Form:
        return self.advanced.fill(
            Form(
                prompt=self.prompt.toPlainText(),
                temperature=round(self.temperature.value(), 2),
                max_tokens=self.max_tokens.value(),
            )
        )

    def show_form(self, form: Form) -> None:
        self.prompt.setPlainText(form.prompt)
        self.temperature.setValue(form.temperature)
        self.max_tokens.setValue(form.max_tokens)
        self.advanced.show_form(form)
        if not form.is_plain:
            self.advanced.set_expanded(True)

    # --- showing --------------------------------------------------------------------------------

    def show_sources(self) -> None:
        found = self.presenter.sources()
        was_blocked = self.source.blockSignals(True)
        self.source.set_options([(source.sae.id, source.menu_text) for source in found])
        self.source.set_value(self.presenter.sae_id)
        self.source.blockSignals(was_blocked)
        source = self.presenter.source
        self.source.setToolTip(source.menu_text if source else "")
        self.model.setText(source.model if source else "—")
        self.layer.setText(source.layer_text if source else "—")
        self.layer.setToolTip(source.sae.hook_point if source else "")
        self.trained_on.setText(source.trained_on if source else "—")
        if source is not None:
            self.advanced.show_model(source.model_layers, source.sae.layer)
        self.refresh()

    def refresh(self) -> None:
        """What depends on form and selection together."""
        form, busy = self.form(), self.presenter.job_id is not None
        focused = self.window().focusWidget()
        self.advanced.show_chat(self.presenter.has_chat_format)
        reason = self.presenter.reason(form)
        self.generate.setEnabled(not busy and not reason)
        self.generate.setText("Generating…" if busy else "Generate Comparison")
        self.generate.setToolTip(reason or "Ctrl+Return")
        self.stop.setVisible(busy)
        if busy and focused is self.generate:  # the focus would wander off with the disabled button
            self.stop.setFocus()
        elif not busy and focused is self.stop:
            self.generate.setFocus()
        if self.progress.isHidden() == busy:
            self.progress.setVisible(busy)
            self._said.updateGeometry()  # else Qt lays out a frame with the height of before
        self.reason.setText("" if busy else reason or self.presenter.warning(form))
        self.reason.setVisible(bool(self.reason.text()))
        self.advanced.show_shares(
            shares(form.layers or (), self.presenter.percent(), self.presenter.norms())
        )

    def show_progress(self, snapshot: Snapshot | None) -> None:
        self.progress.show_snapshot(snapshot)

    # --- what the user does ---------------------------------------------------------------------

    def _on_source_changed(self, index: int) -> None:
        self.presenter.choose(self.source.value)

    def _on_prompt_changed(self) -> None:
        self._on_edited()

    def _on_max_tokens_changed(self, value: int) -> None:
        self.edited.emit()

    def _on_edited(self) -> None:
        self.refresh()
        self.edited.emit()
        if self.advanced.scope.value == "chosen":
            self._tokens_wanted()

    def _read_tokens(self) -> None:
        form = self.form()
        if self.presenter.source is not None and not self._is_read(form):
            self.presenter.read_tokens(form.prompt, form.chat)

    def _is_read(self, form: Form) -> bool:
        read = self.advanced.picker.read
        source = self.presenter.source
        model_id = source.sae.model_id if source else 0
        return (read.prompt, read.chat, read.model_id) == (form.prompt, form.chat, model_id)

    def _on_presenter_tokens_read(self, read: PromptTokens) -> None:
        if read.prompt == self.prompt.toPlainText():
            self.advanced.picker.show_tokens(read)

    def _on_generate_clicked(self, checked: bool = False) -> None:
        self.start_wanted.emit()

    def _on_stop_clicked(self, checked: bool = False) -> None:
        self.stop.setText("Stopping…")
        self.stop_wanted.emit()
