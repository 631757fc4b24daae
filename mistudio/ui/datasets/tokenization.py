"""The Tokenization of a dataset: tokenizer, settings, a live preview, what was made already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PySide6.QtCore import Signal
from PySide6.QtWidgets import QFileDialog, QGridLayout, QPlainTextEdit, QWidget

from mistudio import formatting
from mistudio.engine.datasets.token_settings import HELP, LABELS, LONGEST_WINDOW, TokenSettings
from mistudio.engine.datasets.tokenizers import CHOICES
from mistudio.errors import UserError
from mistudio.library.records import Tokenization
from mistudio.ui.datasets.detail import DatasetPresenter, TokenizerChoice, problem_of
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.times import clock_time
from mistudio.ui.widgets import (
    Badge,
    Button,
    Card,
    Choice,
    ElidedLabel,
    ErrorPanel,
    FloatBox,
    FormRow,
    IconButton,
    IntBox,
    ProgressRow,
    Surface,
    Text,
    Toggle,
    TokenStrip,
    clear,
    column,
    debounced,
    row,
)

if TYPE_CHECKING:
    from mistudio.engine.datasets.tokenizers import Preview

_APPLY = "Apply && Tokenize Dataset"
_TOKENIZER_FILES = "Tokenizers (*.json *.model);;All files (*)"


class SettingsForm(QWidget):
    """Every setting of `TokenSettings`; those without effect are dimmed."""

    changed = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        defaults = TokenSettings()
        self.max_length = IntBox(defaults.max_length, 1, LONGEST_WINDOW, 64)
        self.max_length.setToolTip(HELP["max_length"])
        self.padding = Choice(list(LABELS["padding"].items()))
        self.truncation = Choice(list(LABELS["truncation"].items()))
        self.special = Toggle("Add Special Tokens", defaults.add_special_tokens)
        self.special.setToolTip(HELP["add_special_tokens"])
        self.attention_mask = Toggle("Return Attention Mask", defaults.attention_mask)
        self.attention_mask.setToolTip(HELP["attention_mask"])
        self.heldout = FloatBox(100 * defaults.heldout_share, 0, 100, 5, 0, " %")
        self.heldout.setToolTip(HELP["heldout_share"])
        grid = QGridLayout()
        grid.setHorizontalSpacing(16)
        grid.setVerticalSpacing(14)
        self.padding_row = FormRow("Padding Strategy", self.padding)
        self.truncation_row = FormRow("Truncation Strategy", self.truncation)
        self.length_row = FormRow("Max Sequence Length", self.max_length, "tokens")
        heldout = FormRow("Held-out Share", self.heldout, "of the documents, kept for judging")
        grid.addWidget(self.padding_row, 0, 0)
        grid.addWidget(self.truncation_row, 0, 1)
        grid.addWidget(self.length_row, 1, 0)
        grid.addWidget(heldout, 1, 1)
        for place in (0, 1):
            grid.setColumnStretch(place, 1)
        self.why = Text("", "helper", wrap=True)
        layout = column(14)
        layout.addLayout(grid)
        layout.addWidget(self.why)
        layout.addLayout(
            row(
                self.special, Text("Add Special Tokens", "label"), 24,
                self.attention_mask, Text("Return Attention Mask", "label"), None,
            )
        )  # fmt: skip
        self.setLayout(layout)
        for box in (self.max_length, self.heldout):
            box.valueChanged.connect(self._on_edited)
        for choice in (self.padding, self.truncation):
            choice.currentIndexChanged.connect(self._on_edited)
        for toggle in (self.special, self.attention_mask):
            toggle.toggled.connect(self._on_edited)
        self._show_effects()

    @property
    def settings(self) -> TokenSettings:
        return TokenSettings(
            max_length=self.max_length.value(),
            padding=self.padding.value,
            truncation=self.truncation.value,
            add_special_tokens=self.special.isChecked(),
            attention_mask=self.attention_mask.isChecked(),
            heldout_share=round(self.heldout.value() / 100, 4),
        )

    def _show_effects(self) -> None:
        settings = self.settings
        effects = settings.in_effect()
        self.max_length.setEnabled("max_length" in effects)
        self.truncation.setEnabled("truncation" in effects)
        self.attention_mask.setEnabled("attention_mask" in effects)
        packed = "Packing is the default. " if settings.packed else ""
        self.why.setText(packed + HELP[f"padding.{settings.padding}"])
        self.length_row.set_helper(
            "tokens" if "max_length" in effects else "not used when packing: the training chooses"
        )
        self.truncation_row.set_helper(
            HELP[f"truncation.{settings.truncation}"]
            if "truncation" in effects
            else "not used when packing: nothing is cut off"
        )

    def _on_edited(self, *_: object) -> None:
        self._show_effects()
        self.changed.emit()


class TokenizerPicker(QWidget):
    """Auto (from model), GPT-2, LLaMA or a tokenizer of one's own."""

    changed = Signal()
    wanted = Signal(str)
    """A source that `AddTokenizer` takes; `auto` for the sample model."""

    def __init__(self, presenter: DatasetPresenter, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._presenter = presenter
        self._choices: list[TokenizerChoice] = []
        self.kind = Choice([(choice.key, choice.label) for choice in CHOICES])
        self.kind.currentIndexChanged.connect(self._on_kind_changed)
        self.which = Choice()
        self.which.currentIndexChanged.connect(self._on_which_changed)
        self.add = Button("", "secondary", "download")
        self.add.clicked.connect(self._on_add_clicked)
        self._kind_row = FormRow("Tokenizer", self.kind)
        self._which_row = FormRow("Model", self.which, beside=self.add)
        line = row(self._kind_row, self._which_row, spacing=16)
        line.setStretch(0, 1)
        line.setStretch(1, 1)
        self.setLayout(line)
        self.refresh()

    @property
    def choice(self) -> TokenizerChoice | None:
        value = self.which.value
        return value if isinstance(value, TokenizerChoice) else None

    def refresh(self) -> None:
        self._choices = self._presenter.tokenizers()
        kind = next(choice for choice in CHOICES if choice.key == self.kind.value)
        self._kind_row.set_helper(kind.help)
        if kind.key == "auto":
            fitting = [choice for choice in self._choices if choice.model_id is not None]
            label, none = "Model", "No model yet (see the Models tab)"
        elif kind.key == "custom":
            fitting = [choice for choice in self._choices if choice.tokenizer_id is not None]
            label, none = "Your tokenizers", "None yet: add a file"
        else:
            fitting = [choice for choice in self._choices if choice.origin == kind.source]
            label, none = kind.label, "Not in your library yet"
        self._which_row.set_label(label)
        options: list[tuple[TokenizerChoice | None, str]] = [(c, c.name) for c in fitting]
        self.which.set_options(options or [(None, none)])
        self.which.setEnabled(bool(fitting))
        texts = {"custom": "Add a file…", "auto": "Add the sample model"}
        self.add.setText(texts.get(kind.key, f"Fetch {kind.label}"))
        self.add.setVisible(kind.key == "custom" or not fitting)

    def _on_kind_changed(self, index: int) -> None:
        self.refresh()
        self.changed.emit()

    def _on_which_changed(self, index: int) -> None:
        self.changed.emit()

    def _on_add_clicked(self, checked: bool = False) -> None:
        if self.kind.value != "custom":
            self.wanted.emit(self.kind.value)
            return
        name, _ = QFileDialog.getOpenFileName(self, "Add a tokenizer", "", _TOKENIZER_FILES)
        if name:
            self.wanted.emit(name)


class TokenizationView(QWidget):
    """Which tokenizer reads the text and how, a preview, and the job that does it for all."""

    def __init__(
        self, services: Services, presenter: DatasetPresenter, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self._services, self._presenter = services, presenter
        self._job_id: int | None = None
        self._made_before: set[int] = set()
        self.picker = TokenizerPicker(presenter)
        self.picker.changed.connect(self._on_form_changed)
        self.picker.wanted.connect(self._on_tokenizer_wanted)
        self.form = SettingsForm()
        self.form.changed.connect(self._on_form_changed)
        self.text = QPlainTextEdit()
        self.text.setPlaceholderText("Enter text to preview tokenization…")
        self.text.setAccessibleName("Text to preview")
        self.text.setFixedHeight(96)
        self.text.setTabChangesFocus(True)
        self._preview_soon = debounced(self, 250, self._preview)
        self.text.textChanged.connect(self._preview_soon)
        self.sample_button = Button("Use a sample", "small", "file-text")
        self.sample_button.setToolTip("The beginning of a document chosen by chance")
        self.sample_button.clicked.connect(self._on_sample_clicked)
        self.strip = TokenStrip(tokens.CARD, chips=True)
        self.strip.hide()
        self.counted = Text("", "helper", wrap=True)
        self.apply = Button(_APPLY, "primary", "circle-check")
        self.apply.clicked.connect(self._on_apply_clicked)
        self.cancel = Button("Cancel", "small", "x")
        self.cancel.clicked.connect(self._on_cancel_clicked)
        self.progress = ProgressRow("Tokenizing")
        self._working = QWidget()
        working = row(self.progress, self.cancel)
        working.setStretch(0, 1)
        self._working.setLayout(working)
        self._working.hide()
        self.message = Text("", "small", "emerald", wrap=True)
        self.message.hide()
        self._error = column(0)
        self._done = column(8)
        preview = Card("Preview")
        preview.add_to_header(self.sample_button)
        preview.add(self.text, self.counted, self.strip)
        layout = column(16, 24)
        layout.addWidget(Text("Tokenization Configuration", "card"))
        layout.addWidget(self.picker)
        layout.addWidget(self.form)
        layout.addWidget(preview)
        layout.addLayout(self._error)
        layout.addWidget(self.apply)
        layout.addWidget(self._working)
        layout.addWidget(self.message)
        layout.addLayout(self._done)
        layout.addStretch(1)
        self.setLayout(layout)
        presenter.preview_ready.connect(self._on_preview_ready)
        presenter.preview_failed.connect(self._on_failed)
        presenter.sample_picked.connect(self._on_sample_picked)
        presenter.tokenizations_changed.connect(self._show_done)
        presenter.tokenizers_changed.connect(self._on_tokenizers_changed)
        services.jobs.tick.connect(self._on_jobs_tick)
        services.jobs.job_finished.connect(self._on_jobs_job_finished)
        active = presenter.tokenizing()
        if active:
            self._follow(active[0].id)
        self._show_done()
        self._show_buttons()

    # --- preview --------------------------------------------------------------------------------

    def _preview(self) -> None:
        choice, text = self.picker.choice, self.text.toPlainText()
        if choice is None or not text:
            self._presenter.forget_preview()
            self.strip.hide()
            missing = "" if choice else "Choose a tokenizer to see the tokens of a text."
            self.counted.setText(missing if text else "")
            return
        if self.strip.isHidden():
            self.counted.setText("Tokenizing…")
        self._presenter.preview(choice, text, self.form.settings)

    def _on_preview_ready(self, preview: Preview) -> None:
        clear(self._error)
        self.strip.set_tokens(
            [chip.text for chip in preview.chips], token_ids=[chip.id for chip in preview.chips]
        )
        self.strip.setVisible(bool(preview.chips))
        said = [f"{formatting.count(preview.tokens)} token{'' if preview.tokens == 1 else 's'}"]
        if not self.form.settings.packed:
            windows = formatting.count(preview.windows)
            said.append(f"{windows} window{'' if preview.windows == 1 else 's'}")
        if preview.cut:
            said.append(f"{formatting.count(preview.cut)} tokens are left out")
        if len(preview.chips) < preview.tokens:
            said.append(f"the first {formatting.count(len(preview.chips))} are shown")
        self.counted.setText(" • ".join(said))

    def _on_sample_clicked(self, checked: bool = False) -> None:
        self._presenter.pick_sample()

    def _on_sample_picked(self, text: str) -> None:
        self.text.setPlainText(text)
        self._preview_soon.flush()

    def _on_form_changed(self) -> None:
        self._preview_soon()
        self._show_buttons()

    def _on_failed(self, error: Exception) -> None:
        problem = problem_of(error)
        clear(self._error)
        self._error.addWidget(ErrorPanel(problem.title, problem.what, problem.next_step))
        self.counted.setText("")

    # --- the job --------------------------------------------------------------------------------

    def _show_buttons(self) -> None:
        busy = self._job_id is not None
        self.apply.setText("Processing Dataset…" if busy else _APPLY)
        self.apply.setEnabled(not busy and self.picker.choice is not None)
        self.picker.add.setEnabled(not busy)
        self._working.setVisible(busy)

    def _follow(self, job_id: int, title: str = "Tokenizing") -> None:
        self._job_id = job_id
        self._made_before = {found.id for found in self._presenter.tokenizations()}
        clear(self._error)
        self.message.hide()
        self.progress.show_fraction(None, title)
        self._show_buttons()

    def _on_apply_clicked(self, checked: bool = False) -> None:
        choice = self.picker.choice
        if choice is None:
            return
        try:
            self._follow(self._presenter.tokenize(choice, self.form.settings))
        except UserError as exc:
            self._on_failed(exc)

    def _on_tokenizer_wanted(self, source: str) -> None:
        try:
            if source == "auto":
                self._follow(self._presenter.add_sample_model(), "Adding the sample model")
            else:
                self._follow(self._presenter.add_tokenizer(source), "Adding the tokenizer")
        except UserError as exc:
            self._on_failed(exc)

    def _on_cancel_clicked(self, checked: bool = False) -> None:
        if self._job_id is not None:
            self._services.jobs.cancel(self._job_id)

    def _on_jobs_tick(self) -> None:
        if self._job_id is not None and self.isVisible():
            self.progress.show_snapshot(self._services.jobs.snapshot(self._job_id))

    def _on_jobs_job_finished(self, job_id: int, status: str) -> None:
        if job_id != self._job_id:
            return
        self._job_id = None
        self._show_buttons()
        record = self._services.library.jobs.get(job_id)
        if status == "finished":
            self.message.setText(self._what_happened(record.kind, record.result))
            self.message.show()
        elif status == "failed":
            clear(self._error)
            self._error.addWidget(ErrorPanel.of_row(record.error))

    def _what_happened(self, kind: str, result: dict[str, object]) -> str:
        if kind == "add_model":
            return "The model is in your library, and its tokenizer with it."
        if kind == "add_tokenizer":
            return "The tokenizer is in your library."
        made = result.get("tokenization_id")
        tokens_text = formatting.count(float(str(result.get("tokens", 0))))
        if made in self._made_before:
            return f"These {tokens_text} tokens were there already and are reused."
        return (
            f"Tokenization settings applied successfully! {tokens_text} tokens are ready for "
            "training."
        )

    # --- what there is --------------------------------------------------------------------------

    def _on_tokenizers_changed(self) -> None:
        self.picker.refresh()
        self._on_form_changed()

    def _show_done(self) -> None:
        clear(self._done)
        made = self._presenter.tokenizations()
        if made:
            self._done.addWidget(Text(f"Tokenizations ({len(made)})", "card"))
        for tokenization in made:
            line = TokenizationRow(tokenization)
            line.delete_wanted.connect(self._on_delete_wanted)
            self._done.addWidget(line)

    def _on_delete_wanted(self, tokenization_id: int) -> None:
        try:
            self._presenter.discard_tokenization(tokenization_id)
        except UserError as exc:
            self._services.toasts.error(exc)
        else:
            self._services.toasts.info("The tokens are in the library's trash for seven days")


class TokenizationRow(Surface):
    """One of the dataset's token stores."""

    delete_wanted = Signal(int)

    def __init__(self, tokenization: Tokenization, parent: QWidget | None = None) -> None:
        super().__init__("row", None, 12, parent)
        self._id = tokenization.id
        found = tokenization.statistics
        name = str(found.get("tokenizer") or f"tokenizer {tokenization.tokenizer_hash[:8]}")
        self.setAccessibleName(f"Tokenization by {name}")
        unique = found.get("unique_tokens")
        facts = [f"{formatting.count(tokenization.tokens)} tokens"]
        facts += [f"{formatting.count(unique)} unique"] if unique is not None else []
        facts += [str(found["layout"])] if found.get("layout") else []
        facts.append(clock_time(tokenization.created_at))
        texts = column(2)
        texts.addWidget(ElidedLabel(name, "label"))
        texts.addWidget(ElidedLabel(" • ".join(facts), "helper"))
        delete = IconButton("trash-2", f"Move the tokens of {name} to the trash", size=18)
        delete.clicked.connect(self._on_delete_clicked)
        line = row(texts, Badge("ready"), delete)
        line.setStretch(0, 1)
        self.add(line)
        self.setToolTip(f"Tokenizer SHA-256 {tokenization.tokenizer_hash}")

    def _on_delete_clicked(self, checked: bool = False) -> None:
        self.delete_wanted.emit(self._id)
