"""Choosing a text column, and one dataset in detail: facts, samples, tokens, statistics."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from PySide6.QtCore import Qt
from PySide6.QtGui import QCloseEvent
from PySide6.QtWidgets import (
    QApplication,
    QDialog,
    QGridLayout,
    QLineEdit,
    QPlainTextEdit,
    QProgressBar,
    QScrollArea,
    QTabWidget,
    QVBoxLayout,
    QWidget,
)

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.library.records import Dataset, Model, Tokenization
from mistudio.ui.datasets.presenter import (
    MOST_MATCHES,
    PAGE,
    SOURCE_NAMES,
    DatasetPresenter,
    Sample,
    Samples,
    TokenPreview,
    file_columns,
    problem_of,
)
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.times import clock_time
from mistudio.ui.widgets import (
    Badge,
    Button,
    Card,
    Choice,
    EmptyState,
    ErrorPanel,
    FormRow,
    IconButton,
    ProgressRow,
    StatTile,
    Surface,
    Text,
    TokenStrip,
    clear,
    column,
    debounced,
    row,
)


class AddFileDialog(QDialog):
    """A name, and the column that holds the text."""

    def __init__(self, path: Path, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setWindowTitle("Add a file")
        self.setMinimumWidth(480)
        self._name = QLineEdit(path.stem)
        self._columns = Choice([(None, "Automatic")])
        layout = column(16, 24)
        layout.addWidget(Text(f"Add {path.name}", "card", wrap=True))
        layout.addWidget(FormRow("Name", self._name))
        self.add_button = Button("Add", "primary", "file-plus")
        try:
            for name in file_columns(path):
                self._columns.addItem(name, name)
        except (UserError, OSError) as exc:
            problem = problem_of(exc)
            layout.addWidget(ErrorPanel(problem.title, problem.what, problem.next_step))
            self.add_button.setEnabled(False)
        else:
            layout.addWidget(
                FormRow(
                    "Text column",
                    self._columns,
                    "Automatic takes “text”, “content” and the like, else the longest text.",
                )
            )
        cancel = Button("Cancel")
        cancel.clicked.connect(self.reject)
        self.add_button.clicked.connect(self.accept)
        self.add_button.setDefault(True)
        layout.addLayout(row(None, cancel, self.add_button))
        self.setLayout(layout)

    @property
    def name(self) -> str | None:
        return self._name.text().strip() or None

    @property
    def text_column(self) -> str | None:
        return self._columns.currentData()


class DatasetDialog(QDialog):
    """Four views of one dataset."""

    def __init__(self, services: Services, dataset: Dataset, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("dataset_dialog")
        self.setWindowTitle(dataset.name)
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        room = parent.window().size() if parent else QApplication.primaryScreen().size()
        self.resize(min(1152, room.width() - 64), round(room.height() * 0.9))
        self.presenter = DatasetPresenter(services, dataset, self)
        self.presenter.gone.connect(self.close)
        titles = column(4)
        titles.addWidget(Text(dataset.name, "h1", wrap=True))
        titles.addWidget(
            Text(
                f"{formatting.size(dataset.bytes)} • "
                f"{formatting.count(dataset.documents)} documents",
                "helper",
            )
        )
        close = IconButton("x", "Close")
        close.clicked.connect(self.close)
        head = row(titles, close)
        head.setStretch(0, 1)
        head.setAlignment(close, Qt.AlignmentFlag.AlignTop)
        head.setContentsMargins(24, 20, 20, 8)
        self.overview = OverviewView(dataset)
        self.samples = SamplesView(self.presenter)
        self.tokenization = TokenizationView(services, self.presenter)
        self.statistics = StatisticsView(self.presenter)
        self.tabs = QTabWidget()
        self.tabs.setAccessibleName("Views of the dataset")
        for title, view in (
            ("Overview", self.overview),
            ("Samples", self.samples),
            ("Tokenization", self.tokenization),
            ("Statistics", self.statistics),
        ):
            self.tabs.addTab(_scrolling(view), title)
        self.tabs.currentChanged.connect(self._on_tabs_current_changed)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addLayout(head)
        layout.addWidget(self.tabs, 1)
        self.setFocus()

    def _on_tabs_current_changed(self, index: int) -> None:
        if index == 1:
            self.samples.start()

    def closeEvent(self, event: QCloseEvent) -> None:
        self.presenter.stop()
        super().closeEvent(event)

    def done(self, result: int) -> None:
        self.presenter.stop()
        super().done(result)


def _scrolling(view: QWidget) -> QScrollArea:
    view.setProperty("surface", "clear")
    area = QScrollArea()
    area.setProperty("surface", "clear")
    area.setWidgetResizable(True)
    area.setFocusPolicy(Qt.FocusPolicy.NoFocus)
    area.setWidget(view)
    return area


def _tiles(tiles: list[QWidget], columns: int) -> QGridLayout:
    grid = QGridLayout()
    grid.setSpacing(12)
    for place, tile in enumerate(tiles):
        grid.addWidget(tile, place // columns, place % columns)
    for place in range(columns):
        grid.setColumnStretch(place, 1)
    return grid


class OverviewView(QWidget):
    """Where it comes from and how much there is."""

    def __init__(self, dataset: Dataset, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        layout = column(16, 24)
        layout.addWidget(Text("Dataset Information", "card"))
        facts = []
        for label, value in (
            ("Source", SOURCE_NAMES[dataset.source]),
            ("Size", formatting.size(dataset.bytes)),
            ("Format", "JSON Lines"),
            ("Added", clock_time(dataset.created_at)),
        ):
            facts.append(StatTile(label, value, "slate"))
        layout.addLayout(_tiles(facts, 2))
        layout.addWidget(Text("Quick Stats", "card"))
        average = dataset.characters / dataset.documents if dataset.documents else None
        layout.addLayout(
            _tiles(
                [
                    StatTile("Documents", formatting.count(dataset.documents), "emerald"),
                    StatTile(
                        "Avg Length",
                        formatting.number(average, 0),
                        "blue",
                        "Characters of all documents divided by their number",
                        "characters",
                    ),
                    StatTile("Characters", formatting.count(dataset.characters), "purple"),
                ],
                3,
            )
        )
        layout.addWidget(Text("Origin", "card"))
        layout.addWidget(Text(dataset.origin, "mono", wrap=True, selectable=True))
        for key, value in dataset.provenance.items():
            if isinstance(value, str | int | float) and value not in ("", dataset.origin):
                layout.addWidget(
                    Text(f"{key.replace('_', ' ')}: {value}", "helper", wrap=True, selectable=True)
                )
        layout.addStretch(1)
        self.setLayout(layout)


class SampleRow(Surface):
    """One document: three lines, or all of it."""

    def __init__(self, sample: Sample, parent: QWidget | None = None) -> None:
        super().__init__("row", None, 14, parent)
        self._sample = sample
        title = f"Sample #{sample.index + 1:,}" + (f" • {sample.title}" if sample.title else "")
        copy = IconButton("copy", f"Copy sample {sample.index + 1}", size=16)
        copy.clicked.connect(self._on_copy_clicked)
        self.expand = IconButton("chevron-down", f"Expand sample {sample.index + 1}", size=16)
        self.expand.setCheckable(True)
        self.expand.clicked.connect(self._on_expand_clicked)
        self.add(row(Text(title, "label"), None, copy, self.expand, spacing=4))
        self._text = Text("", "body", wrap=True, selectable=True)
        self.add(self._text)
        about = f"Length: {formatting.count(len(sample.text))} chars"
        if sample.topic:
            about += f" • Topic: {sample.topic}"
        self.add(Text(about, "helper"))
        self._show(False)

    def _show(self, whole: bool) -> None:
        text = self._sample.text
        self._text.setText(text[:20_000] if whole else _clamp(text))
        number = self._sample.index + 1
        self.expand.set_icon(
            "chevron-up" if whole else "chevron-down",
            f"{'Collapse' if whole else 'Expand'} sample {number}",
        )

    def _on_expand_clicked(self, checked: bool = False) -> None:
        self._show(checked)

    def _on_copy_clicked(self, checked: bool = False) -> None:
        QApplication.clipboard().setText(self._sample.text)


def _clamp(text: str, characters: int = 360, lines: int = 3) -> str:
    short = "\n".join(text.splitlines()[:lines])[:characters]
    return short if short == text else short.rstrip() + "…"


class SamplesView(QWidget):
    """Pages of documents, and a search through all of them."""

    def __init__(self, presenter: DatasetPresenter, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._presenter = presenter
        self._first = 0
        self._total = 0
        self._started = False
        self.search = QLineEdit()
        self.search.setPlaceholderText("Search in samples…")
        self.search.setAccessibleName("Search in samples")
        self.search.setClearButtonEnabled(True)
        self.search.textChanged.connect(debounced(self, 250, self._on_search_changed))
        self._rows = column(10)
        self.summary = Text("", "helper")
        self.previous = Button("Previous", "small", "chevron-left")
        self.next = Button("Next", "small", "chevron-right")
        self.previous.clicked.connect(self._on_previous_clicked)
        self.next.clicked.connect(self._on_next_clicked)
        self._nothing = EmptyState("search", "No sample holds this text")
        self._nothing.hide()
        layout = column(16, 24)
        layout.addWidget(self.search)
        layout.addLayout(self._rows)
        layout.addWidget(self._nothing)
        layout.addLayout(row(self.summary, None, self.previous, self.next))
        layout.addStretch(1)
        self.setLayout(layout)
        presenter.samples_read.connect(self._on_samples_read)
        presenter.failed.connect(self._on_failed)
        self._show_buttons()

    def start(self) -> None:
        if not self._started:
            self._started = True
            self._read(0)

    def _read(self, first: int) -> None:
        self.summary.setText("Searching…" if self.search.text() else "Reading…")
        self._presenter.read_samples(first, self.search.text().strip())

    def _on_samples_read(self, samples: Samples) -> None:
        clear(self._rows)
        self._first, self._total = samples.first, samples.total
        for sample in samples.samples:
            self._rows.addWidget(SampleRow(sample))
        last = samples.first + len(samples.samples)
        if samples.total:
            total = formatting.count(samples.total)
            at_least = "" if samples.complete else f" (the first {MOST_MATCHES} matches)"
            self.summary.setText(
                f"Showing {formatting.count(samples.first + 1)}-{formatting.count(last)} of "
                f"{total}{at_least}"
            )
        else:
            self.summary.setText("")
        self._nothing.setVisible(samples.total == 0)
        self._show_buttons()

    def _on_failed(self, error: Exception) -> None:
        problem = problem_of(error)
        clear(self._rows)
        self._rows.addWidget(ErrorPanel(problem.title, problem.what, problem.next_step))
        self.summary.setText("")

    def _show_buttons(self) -> None:
        self.previous.setEnabled(self._first > 0)
        self.next.setEnabled(self._first + PAGE < self._total)

    def _on_search_changed(self) -> None:
        self._read(0)

    def _on_previous_clicked(self, checked: bool = False) -> None:
        self._read(max(0, self._first - PAGE))

    def _on_next_clicked(self, checked: bool = False) -> None:
        self._read(self._first + PAGE)


class TokenizationView(QWidget):
    """Which tokenizer reads the text, a preview, and the job that does it for all."""

    def __init__(
        self, services: Services, presenter: DatasetPresenter, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self._services, self._presenter = services, presenter
        self._job_id: int | None = None
        self.model = Choice()
        self.text = QPlainTextEdit()
        self.text.setPlaceholderText("Enter text to preview tokenization…")
        self.text.setAccessibleName("Text to preview")
        self.text.setFixedHeight(96)
        self.text.setTabChangesFocus(True)
        self.preview_button = Button("Tokenize Preview", "secondary", "eye")
        self.preview_button.clicked.connect(self._on_preview_clicked)
        self.strip = TokenStrip(tokens.CARD, chips=True)
        self.strip.hide()
        self.counted = Text("", "helper")
        self.apply = Button("Apply && Tokenize Dataset", "primary", "circle-check")
        self.apply.clicked.connect(self._on_apply_clicked)
        self.progress = ProgressRow("Tokenizing")
        self.progress.hide()
        self.message = Text("", "small", "emerald", wrap=True)
        self.message.hide()
        self._error = column(0)
        self._done = column(8)
        layout = column(16, 24)
        layout.addWidget(Text("Tokenization Configuration", "card"))
        layout.addWidget(
            FormRow(
                "Tokenizer",
                self.model,
                "The tokenizer of a model in your library: activations are only meaningful for "
                "the tokens that the model was trained on.",
            )
        )
        layout.addWidget(
            Text(
                "Documents are packed one after another into windows of the length that a run asks "
                "for: nothing is padded and nothing is cut off. Special tokens are added where the "
                "model was trained with them, and never count in a statistic.",
                "helper",
                wrap=True,
            )
        )
        preview = Card("Preview")
        preview.add(self.text, row(self.preview_button, self.counted, None), self.strip)
        layout.addWidget(preview)
        layout.addLayout(self._error)
        layout.addWidget(self.apply)
        layout.addWidget(self.progress)
        layout.addWidget(self.message)
        layout.addLayout(self._done)
        layout.addStretch(1)
        self.setLayout(layout)
        presenter.preview_ready.connect(self._on_preview_ready)
        presenter.failed.connect(self._on_failed)
        presenter.tokenizations_changed.connect(self.refresh)
        services.changes.changed.connect(self._on_changes_changed)
        services.jobs.tick.connect(self._on_jobs_tick)
        services.jobs.job_finished.connect(self._on_jobs_job_finished)
        self.refresh()

    def refresh(self) -> None:
        models = self._presenter.models()
        names: list[tuple[Model | None, str]] = [(model, model.name) for model in models]
        self.model.set_options(names or [(None, "No model yet: add one in the Models tab")])
        self.model.setEnabled(bool(models))
        self.apply.setEnabled(bool(models) and self._job_id is None)
        self.preview_button.setEnabled(bool(models))
        clear(self._done)
        tokenizations = self._presenter.tokenizations()
        if tokenizations:
            self._done.addWidget(Text(f"Tokenizations ({len(tokenizations)})", "card"))
        for tokenization in tokenizations:
            self._done.addWidget(_tokenization_row(tokenization))

    def _on_preview_clicked(self, checked: bool = False) -> None:
        model, text = self.model.currentData(), self.text.toPlainText()
        if isinstance(model, Model) and text:
            clear(self._error)
            self.counted.setText("Tokenizing…")
            self._presenter.preview(model, text)

    def _on_preview_ready(self, preview: TokenPreview) -> None:
        self.strip.set_tokens(preview.tokens, token_ids=preview.ids)
        self.strip.show()
        self.counted.setText(f"{formatting.count(len(preview.ids))} tokens")

    def _on_failed(self, error: Exception) -> None:
        problem = problem_of(error)
        clear(self._error)
        self._error.addWidget(ErrorPanel(problem.title, problem.what, problem.next_step))
        self.counted.setText("")

    def _on_apply_clicked(self, checked: bool = False) -> None:
        model = self.model.currentData()
        if not isinstance(model, Model):
            return
        clear(self._error)
        try:
            self._job_id = self._presenter.tokenize(model)
        except UserError as exc:
            self._on_failed(exc)
            return
        self.apply.setText("Processing Dataset…")
        self.apply.setEnabled(False)
        self.message.hide()
        self.progress.show_snapshot(None)
        self.progress.show()

    def _on_jobs_tick(self) -> None:
        if self._job_id is not None and self.isVisible():
            self.progress.show_snapshot(self._services.jobs.snapshot(self._job_id))

    def _on_jobs_job_finished(self, job_id: int, status: str) -> None:
        if job_id != self._job_id:
            return
        self._job_id = None
        self.apply.setText("Apply && Tokenize Dataset")
        self.apply.setEnabled(True)
        self.progress.hide()
        record = self._services.library.jobs.get(job_id)
        if status == "finished":
            self.message.setText("The dataset is tokenized.")
            self.message.show()
        elif status == "failed":
            clear(self._error)
            self._error.addWidget(ErrorPanel.of_row(record.error))

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table == "models":
            self.refresh()


def _tokenization_row(tokenization: Tokenization) -> QWidget:
    found = tokenization.statistics
    line = Surface("row", None, 12)
    unique = found.get("unique_tokens")
    line.add(
        row(
            Text(f"{formatting.count(tokenization.tokens)} tokens", "body"),
            Text(f"{formatting.count(unique)} unique" if unique is not None else "", "helper"),
            None,
            Text(f"tokenizer {tokenization.tokenizer_hash[:8]}", "mono"),
            Text(clock_time(tokenization.created_at), "helper"),
            Badge("ready"),
        )
    )
    return line


class StatisticsView(QWidget):
    """What the tokenization measured; nothing is shown before one exists."""

    def __init__(self, presenter: DatasetPresenter, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._presenter = presenter
        self._body = column(16)
        layout = column(0, 24)
        layout.addLayout(self._body)
        layout.addStretch(1)
        self.setLayout(layout)
        presenter.tokenizations_changed.connect(self.refresh)
        self.refresh()

    def refresh(self) -> None:
        clear(self._body)
        tokenizations = self._presenter.tokenizations()
        if not tokenizations:
            self._body.addWidget(
                EmptyState(
                    "chart-line",
                    "No statistics yet",
                    helper="Tokenize the dataset first; its lengths and tokens are counted then.",
                )
            )
            return
        found = tokenizations[0].statistics
        documents = found.get("documents", self._presenter.dataset.documents)
        self._body.addLayout(
            _tiles(
                [
                    StatTile("Documents", _count(documents), "emerald"),
                    StatTile("Total Tokens", _count(found.get("tokens")), "blue"),
                    StatTile(
                        "Avg Tokens/Document",
                        formatting.number(found.get("length_mean"), 1),
                        "purple",
                    ),
                    StatTile("Unique Tokens", _count(found.get("unique_tokens")), "yellow"),
                ],
                4,
            )
        )
        edges, counts = found.get("length_edges"), found.get("length_histogram")
        if edges and counts:
            lengths = Card("Sequence Length Distribution")
            lengths.body.setSpacing(8)
            for label, number in zip(_bucket_names(edges), counts, strict=False):
                lengths.add(_bar(label, number, max(counts)))
            lengths.add(
                Text(
                    f"Min: {_count(found.get('length_min'))} • "
                    f"Median: {_count(found.get('length_median'))} • "
                    f"Max: {_count(found.get('length_max'))} tokens",
                    "helper",
                )
            )
            self._body.addWidget(lengths)
        splits = found.get("splits")
        if isinstance(splits, dict) and splits:
            total = sum(value for value in splits.values() if isinstance(value, int)) or 1
            card = Card("Split Distribution")
            card.add(
                _tiles(
                    [
                        StatTile(
                            name.capitalize(),
                            _count(value),
                            "emerald",
                            note=f"{formatting.percent(value / total, 0)} of total",
                        )
                        for name, value in splits.items()
                        if isinstance(value, int)
                    ],
                    3,
                )
            )
            self._body.addWidget(card)


def _count(value: float | None) -> str:
    return "—" if value is None else formatting.count(value)


def _bucket_names(edges: list[int]) -> list[str]:
    names = [f"{low}-{high}" for low, high in pairwise(edges)]
    return [*names, f"{edges[-1]}+"]


def _bar(label: str, number: int, most: int) -> QWidget:
    bar = QProgressBar()
    bar.setRange(0, max(most, 1))
    bar.setValue(number)
    bar.setTextVisible(False)
    bar.setProperty("tone", "blue")
    bar.setAccessibleName(f"{label} tokens: {number:,} documents")
    name = Text(label, "mono")
    name.setFixedWidth(96)
    value = Text(formatting.count(number), "mono")
    value.setFixedWidth(88)
    value.setAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
    line = QWidget()
    layout = row(name, bar, value)
    layout.setStretch(1, 1)
    line.setLayout(layout)
    return line
