"""The Samples of a dataset: pages over millions of documents, search, split, tokens."""

from __future__ import annotations

import html
from dataclasses import replace
from typing import TYPE_CHECKING

from PySide6.QtCore import Qt, Signal
from PySide6.QtGui import QKeyEvent
from PySide6.QtWidgets import QApplication, QLineEdit, QWidget

from mistudio import formatting
from mistudio.ui.datasets.detail import (
    MOST_MATCHES,
    PAGE,
    DatasetPresenter,
    Sample,
    Samples,
    TokenizerChoice,
    problem_of,
)
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import (
    Button,
    Choice,
    EmptyState,
    ErrorPanel,
    IconButton,
    IntBox,
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

_SHOWN = 20_000  # characters of one sample; Copy takes all of it
_CLAMP_LINES = 3
_CLAMP = 360
_BEFORE = 100  # characters before a match that is far in
_MARK = f"background-color: {tokens.PRIMARY}; color: {tokens.WHITE}"


class SampleRow(Surface):
    """One document: three lines, or all of it. Rows are kept and filled again: building ten of
    them takes longer than reading ten documents."""

    tokens_wanted = Signal(object)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__("row", None, 14, parent)
        self.sample = Sample(0, "")
        self._search = ""
        self._show_tokens = False
        self._title = Text("", "label")
        self.copy = IconButton("copy", "Copy", size=16)
        self.copy.clicked.connect(self._on_copy_clicked)
        self.expand = IconButton("chevron-down", "Expand", size=16)
        self.expand.setCheckable(True)
        self.expand.clicked.connect(self._on_expand_clicked)
        self.add(row(self._title, None, self.copy, self.expand, spacing=4))
        self.text = Text("", "body", wrap=True, selectable=True)
        self.strip = TokenStrip(tokens.DIALOG_ROW, chips=True)
        self.strip.hide()
        self.about = Text("", "helper", wrap=True)
        self.add(self.text, self.strip, self.about)

    def show_sample(self, sample: Sample, as_tokens: bool, search: str = "") -> None:
        """`search` is marked; the three lines are those around its first place."""
        self.sample, self._search = sample, search
        self.expand.setChecked(False)
        self.strip.hide()
        number = formatting.count(sample.index + 1)
        parts = [f"Sample #{number}", sample.split, sample.title]
        title = " • ".join(part for part in parts if part)
        self._title.setText(title if len(title) < 110 else title[:109] + "…")
        self.copy.setAccessibleName(f"Copy sample {number}")
        self.setAccessibleName(f"Sample {number}")
        self._show_tokens = as_tokens
        self._show(False)
        if as_tokens:
            self.tokens_wanted.emit(sample)

    def show_as_tokens(self, as_tokens: bool) -> None:
        self.show_sample(self.sample, as_tokens, self._search)

    def show_tokens(self, preview: Preview) -> None:
        chips = preview.chips
        self.strip.set_tokens([c.text for c in chips], token_ids=[c.id for c in chips])
        self.text.hide()
        self.strip.show()
        cut = "" if preview.tokens <= len(chips) else f"the first {len(chips)} tokens • "
        self.about.setText(f"{cut}{self._length()}")

    def _length(self) -> str:
        length = f"Length: {formatting.count(len(self.sample.text))} chars"
        return f"{length} • Topic: {self.sample.topic}" if self.sample.topic else length

    def _show(self, whole: bool) -> None:
        text = self.sample.text
        short = _clamp(text, _first_place(text, self._search))
        shown = (text[:_SHOWN] if whole else short).replace("\0", "␀")
        marked = _marked(shown, self._search)
        plain, rich = Qt.TextFormat.PlainText, Qt.TextFormat.RichText
        self.text.setTextFormat(rich if marked else plain)
        self.text.setText(marked or shown)
        self.text.setVisible(True)
        more = f" • the first {formatting.count(_SHOWN)} are shown; Copy takes all of them"
        self.about.setText(self._length() + (more if whole and len(text) > _SHOWN else ""))
        self.expand.setVisible(short != text and not self._show_tokens)
        number = formatting.count(self.sample.index + 1)
        self.expand.set_icon(
            "chevron-up" if whole else "chevron-down",
            f"{'Collapse' if whole else 'Expand'} sample {number}",
        )

    def _on_expand_clicked(self, checked: bool = False) -> None:
        self._show(checked)

    def _on_copy_clicked(self, checked: bool = False) -> None:
        QApplication.clipboard().setText(self.sample.text)


def _clamp(text: str, around: int = 0) -> str:
    """Three lines at most, that begin a little before `around` where that is far in."""
    begin = around - _BEFORE if around > _CLAMP - _BEFORE else 0
    head = text[begin : begin + 4 * _CLAMP]
    short = "\n".join(head.splitlines()[:_CLAMP_LINES])[:_CLAMP]
    if short == text:
        return text
    return ("…" if begin else "") + short.rstrip() + "…"


def _first_place(text: str, search: str) -> int:
    """About where it stands: folding may make a text longer by a few characters."""
    return max(0, text.casefold().find(search.casefold())) if search else 0


def _marked(text: str, search: str) -> str:
    """HTML with every place of `search` marked; empty where there is none to mark."""
    folded, wanted = text.casefold(), search.casefold()
    if not wanted or len(folded) != len(text) or wanted not in folded:
        return ""  # letters that fold to two would shift the marks: then none is better
    parts, at = [], 0
    while (place := folded.find(wanted, at)) >= 0:
        inside = html.escape(text[place : place + len(wanted)])
        parts += [html.escape(text[at:place]), f'<span style="{_MARK}">{inside}</span>']
        at = place + len(wanted)
    parts.append(html.escape(text[at:]))
    return f'<span style="white-space: pre-wrap">{"".join(parts)}</span>'


class SamplesView(QWidget):
    """A page of ten documents of any number, and a search through all of them."""

    def __init__(self, presenter: DatasetPresenter, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._presenter = presenter
        self._first = 0
        self._page: Samples | None = None
        self._started = False
        self.search = QLineEdit()
        self.search.setPlaceholderText("Search in samples…")
        self.search.setAccessibleName("Search in samples")
        self.search.setClearButtonEnabled(True)
        self.search.textChanged.connect(debounced(self, 200, self._on_search_changed))
        self.split = Choice([("", "All Splits")])
        self.split.setAccessibleName("Split")
        self.split.setFixedWidth(220)
        self.split.hide()
        self.split.currentIndexChanged.connect(self._on_split_changed)
        self.tokenizer = Choice()
        self.tokenizer.setAccessibleName("Tokenizer of the token view")
        self.tokenizer.setFixedWidth(220)
        self.tokenizer.hide()
        self.tokenizer.currentIndexChanged.connect(self._on_tokens_toggled)
        self.tokens = Toggle("Show tokens")
        self.tokens.toggled.connect(self._on_tokens_toggled)
        self._tokens_label = Text("Show tokens", "label")
        self._error = column(0)
        self.rows = [SampleRow() for _ in range(PAGE)]
        rows = column(10)
        for sample_row in self.rows:
            sample_row.hide()
            sample_row.tokens_wanted.connect(self._on_tokens_wanted)
            rows.addWidget(sample_row)
        self.index_note = Text("", "helper", wrap=True)
        self.index_note.hide()
        self.summary = Text("", "helper")
        self.go_to = IntBox(1, 1, 1)
        self.go_to.setAccessibleName("Go to sample")
        self.go_to.setFixedWidth(150)
        self.go_to.setKeyboardTracking(False)
        self.go_to.editingFinished.connect(self._on_go_to_edited)
        self._go_to_label = Text("Go to", "label")
        self.previous = Button("Previous", "small", "chevron-left")
        self.next = Button("Next", "small", "chevron-right")
        self.previous.clicked.connect(self._on_previous_clicked)
        self.next.clicked.connect(self._on_next_clicked)
        self._nothing = EmptyState(
            "search",
            "No sample holds this text",
            helper="Capital and small letters are the same; everything else must be as typed.",
        )
        self._nothing.hide()
        top = row(self.search, self.split, self.tokenizer, self._tokens_label, self.tokens)
        top.setStretch(0, 1)
        layout = column(16, 24)
        layout.addLayout(top)
        layout.addWidget(self.index_note)
        layout.addLayout(self._error)
        layout.addLayout(rows)
        layout.addWidget(self._nothing)
        layout.addLayout(
            row(self.summary, None, self._go_to_label, self.go_to, self.previous, self.next)
        )
        layout.addStretch(1)
        self.setLayout(layout)
        presenter.samples_read.connect(self._on_samples_read)
        presenter.matches_counted.connect(self._on_matches_counted)
        presenter.splits_read.connect(self._on_splits_read)
        presenter.index_changed.connect(self._on_index_changed)
        presenter.sample_tokens_ready.connect(self._on_sample_tokens_ready)
        presenter.failed.connect(self._on_failed)
        presenter.tokenizers_changed.connect(self._show_tokenizers)
        self._show_tokenizers()
        self._show_footer()

    def start(self) -> None:
        """Read the first page, the first time that the view is looked at."""
        if not self._started:
            self._started = True
            self._presenter.read_splits()
            self._read(0)

    def _read(self, first: int) -> None:
        self.summary.setText("Searching…" if self.search.text().strip() else "Reading…")
        self._presenter.read_samples(first, self.search.text(), self.split.value or "")

    def _on_samples_read(self, page: Samples) -> None:
        clear(self._error)
        self._page, self._first = page, page.first
        for place, sample_row in enumerate(self.rows):
            if place < len(page.samples):
                sample_row.show_sample(page.samples[place], self.tokens.isChecked(), page.search)
            sample_row.setVisible(place < len(page.samples))
        self._nothing.setVisible(page.total == 0 and bool(page.search))
        self._show_footer()

    def _on_matches_counted(self, total: int, complete: bool) -> None:
        if self._page and self._page.search:
            self._page = replace(self._page, total=total, complete=complete)
            self._show_footer()

    def _on_failed(self, error: Exception) -> None:
        problem = problem_of(error)
        clear(self._error)
        self._error.addWidget(ErrorPanel(problem.title, problem.what, problem.next_step))
        for sample_row in self.rows:
            sample_row.hide()
        self.summary.setText("")

    def _show_footer(self) -> None:
        page = self._page
        total = page.total if page else 0
        last = self._first + (len(page.samples) if page else 0)
        if page and total:
            more = "" if page.complete else ("+" if total >= MOST_MATCHES else " or more")
            matches = " matches" if page.search else ""
            self.summary.setText(
                f"Showing {formatting.count(self._first + 1)}-{formatting.count(last)} of "
                f"{formatting.count(total)}{more}{matches}"
            )
        elif page:
            self.summary.setText("")
        self.previous.setEnabled(self._first > 0)
        self.next.setEnabled(bool(page) and (last < total or not (page and page.complete)))
        far = total > PAGE and bool(page) and not (page and page.search)
        self.go_to.setVisible(far)
        self._go_to_label.setVisible(far)
        if far:
            self.go_to.blockSignals(True)
            self.go_to.setRange(1, total)
            self.go_to.setValue(self._first + 1)
            self.go_to.blockSignals(False)

    # --- split, index, tokens -------------------------------------------------------------------

    def _on_splits_read(self, splits: dict[str, int]) -> None:
        options: list[tuple[str, str]] = [("", "All Splits")]
        for name, number in splits.items():
            label = name.capitalize() if name else "No split"
            options.append((name, f"{label} ({formatting.count(number)})"))
        self.split.set_options(options)
        self.split.setVisible(bool([name for name in splits if name]))

    def _on_index_changed(self, sentence: str) -> None:
        if self.index_note.text() != sentence:
            self.index_note.setText(sentence)
        self.index_note.setVisible(bool(sentence))

    def _show_tokenizers(self) -> None:
        choices = self._presenter.tokenizers()
        self.tokenizer.set_options([(choice, choice.name) for choice in choices])
        for widget in (self.tokens, self._tokens_label):
            widget.setVisible(bool(choices))
        self.tokenizer.setVisible(self.tokens.isChecked() and len(choices) > 1)

    def _on_tokens_toggled(self, *_: object) -> None:
        on = self.tokens.isChecked()
        self.tokenizer.setVisible(on and self.tokenizer.count() > 1)
        for sample_row in self.rows:
            if sample_row.isVisible():
                sample_row.show_as_tokens(on)

    def _on_tokens_wanted(self, sample: Sample) -> None:
        choice = self.tokenizer.value
        if isinstance(choice, TokenizerChoice):
            self._presenter.tokens_of(choice, sample)

    def _on_sample_tokens_ready(self, index: int, preview: Preview) -> None:
        for sample_row in self.rows:
            if (
                sample_row.sample.index == index
                and sample_row.isVisible()
                and self.tokens.isChecked()
            ):
                sample_row.show_tokens(preview)

    # --- commands -------------------------------------------------------------------------------

    def _on_search_changed(self) -> None:
        if self._started:
            self._read(0)

    def _on_split_changed(self, index: int) -> None:
        if self._started:
            self._read(0)

    def _on_go_to_edited(self) -> None:
        wanted = (self.go_to.value() - 1) // PAGE * PAGE
        if wanted != self._first:
            self._read(wanted)

    def _on_previous_clicked(self, checked: bool = False) -> None:
        self._read(max(0, self._first - PAGE))

    def _on_next_clicked(self, checked: bool = False) -> None:
        self._read(self._first + PAGE)

    def keyPressEvent(self, event: QKeyEvent) -> None:
        key = event.key()
        if key == Qt.Key.Key_PageDown and self.next.isEnabled():
            self.next.click()
        elif key == Qt.Key.Key_PageUp and self.previous.isEnabled():
            self.previous.click()
        else:
            super().keyPressEvent(event)
