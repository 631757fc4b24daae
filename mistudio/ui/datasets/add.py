"""Adding a file or a folder: what is in it, which column is the text, what to leave out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from PySide6.QtCore import QTimer, Signal
from PySide6.QtWidgets import QDialog, QGridLayout, QLineEdit, QWidget

from mistudio import formatting
from mistudio.ui.datasets.detail import problem_of
from mistudio.ui.services import Services
from mistudio.ui.widgets import (
    Button,
    Choice,
    Collapsible,
    ElidedLabel,
    ErrorPanel,
    FormRow,
    IntBox,
    Surface,
    Text,
    Toggle,
    clear,
    column,
    row,
    scrolling,
)

if TYPE_CHECKING:
    from mistudio.engine.datasets.sources import FilePreview, ReadOptions
    from mistudio.jobs.datasets import AddDataset

_FORMATS = {
    ".txt": "Text", ".md": "Markdown", ".jsonl": "JSON Lines", ".json": "JSON", ".csv": "CSV",
    ".tsv": "TSV", ".parquet": "Parquet", ".arrow": "Arrow",
}  # fmt: skip
_ENCODINGS = (
    "utf-8", "utf-16", "cp1252", "latin-1", "cp1251", "shift_jis", "gb18030", "big5", "euc_kr",
)  # fmt: skip
_SHOWN = 3  # first documents
_MEGABYTE = 1024**2
_WIDTH = 680


class AddFileDialog(QDialog):
    """Opens at once and fills itself in the background; Enter adds with what was guessed."""

    add_wanted = Signal(object)
    """An `AddDataset` job."""

    def __init__(self, services: Services, path: Path, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._services, self._path = services, path
        self._asked = 0
        self.preview: FilePreview | None = None
        self.setObjectName("add_file_dialog")
        self.setWindowTitle("Add a folder" if path.is_dir() else "Add a file")
        self.name = QLineEdit(_name_of(path))
        self.name.setMaxLength(200)
        self.columns = Choice([(None, "Automatic")])
        self.columns.currentIndexChanged.connect(self._on_options_changed)
        self._column_row = FormRow("Text column", self.columns, "Which column holds the text.")
        self._column_row.hide()
        self.facts = Text("Reading…", "helper", wrap=True)
        self._first = column(8)
        self._problem = column(0)
        cancel = Button("Cancel")
        cancel.clicked.connect(self.reject)
        self.add_button = Button("Add", "primary", "file-plus")
        self.add_button.clicked.connect(self._on_add_clicked)
        self.add_button.setDefault(True)
        self.add_button.setEnabled(False)
        self._content = QWidget()
        body = column(14)
        body.setContentsMargins(24, 24, 24, 8)
        body.addWidget(ElidedLabel(f"Add {path.name}", "card"))
        body.addWidget(self.facts)
        body.addWidget(FormRow("Name", self.name))
        body.addWidget(self._column_row)
        body.addLayout(self._problem)
        body.addLayout(self._first)
        body.addWidget(self._more())
        body.addStretch(1)
        self._content.setLayout(body)
        buttons = row(None, cancel, self.add_button)
        buttons.setContentsMargins(24, 8, 24, 24)
        layout = column(0)
        layout.addWidget(scrolling(self._content, sideways=True), 1)
        layout.addLayout(buttons)
        self.setLayout(layout)
        self.resize(_WIDTH, 420)
        self._read()

    def _more(self) -> Collapsible:
        self.bad_rows = Choice(
            [("refuse", "Stop and name the row"), ("skip", "Leave it out and count it")]
        )
        self.encoding = Choice([(None, "Automatic"), *((name, name) for name in _ENCODINGS)])
        self.encoding.currentIndexChanged.connect(self._on_options_changed)
        self.max_documents = IntBox(0, 0, 2_000_000_000, 1000)
        self.max_documents.setSpecialValueText("All")
        self.max_megabytes = IntBox(0, 0, 10_000_000, 10, " MB")
        self.max_megabytes.setSpecialValueText("All")
        self.keep = Toggle("Keep it where it is")
        self.keep.toggled.connect(self._on_keep_toggled)
        self._keep_help = Text("", "helper", wrap=True)
        self._on_keep_toggled(False)
        grid = QGridLayout()
        grid.setHorizontalSpacing(16)
        grid.setVerticalSpacing(12)
        self._encoding_row = FormRow("Encoding", self.encoding)
        grid.addWidget(FormRow("A row that cannot be read", self.bad_rows), 0, 0)
        grid.addWidget(self._encoding_row, 0, 1)
        grid.addWidget(FormRow("At most so many samples", self.max_documents), 1, 0)
        grid.addWidget(FormRow("At most so much text", self.max_megabytes), 1, 1)
        for place in (0, 1):
            grid.setColumnStretch(place, 1)
        more = Collapsible("More options")
        more.add(grid, row(self.keep, Text("Keep it where it is", "label"), None), self._keep_help)
        more.expanded_changed.connect(self._on_expanded_changed)
        return more

    # --- what is in it --------------------------------------------------------------------------

    def _options(self) -> ReadOptions:
        from mistudio.engine.datasets.sources import ReadOptions

        megabytes = self.max_megabytes.value()
        return ReadOptions(
            text_column=self.columns.value,
            bad_rows=self.bad_rows.value,
            max_documents=self.max_documents.value() or None,
            max_bytes=megabytes * _MEGABYTE if megabytes else None,
            encoding=self.encoding.value,
        )

    def _read(self) -> None:
        self._asked += 1
        number, path = self._asked, self._path
        column_name, encoding = self.columns.value, self.encoding.value

        def read() -> tuple[int, FilePreview]:
            from mistudio.engine.datasets.sources import ReadOptions, describe

            options = ReadOptions(text_column=column_name, encoding=encoding)
            return number, describe(path, options)

        self._services.background.run(read, self._on_read, self._on_failed)

    def _on_read(self, result: tuple[int, FilePreview]) -> None:
        number, preview = result
        if number != self._asked:
            return
        self.preview = preview
        self.facts.setText(" • ".join(_facts(preview)))
        self._show_columns(preview)
        clear(self._problem)
        clear(self._first)
        self._encoding_row.setVisible(bool(preview.encoding))
        if preview.problem:
            found = preview.problem
            self._problem.addWidget(ErrorPanel(found.title, found.what, found.next_step))
        elif not preview.first:
            self._problem.addWidget(
                ErrorPanel("No text found", "Its beginning holds no text.", "Choose another file.")
            )
        if preview.first:
            self._first.addWidget(Text("First samples", "label"))
        for number, document in enumerate(preview.first[:_SHOWN]):
            one = Surface("row", None, 12)
            one.setAccessibleName(f"Sample {number + 1}")
            one.add(Text(_short(document.text), "small", wrap=True))
            self._first.addWidget(one)
        bad = preview.rejected
        if bad.rows and bad.first:
            self._problem.addWidget(
                Text(
                    f"⚠ {bad.first[0]}: {bad.first[0].reason} What to do with such rows is under "
                    "More options.",
                    "small", "yellow", wrap=True,
                )
            )  # fmt: skip
        self.add_button.setEnabled(bool(preview.first) and preview.problem is None)
        if self.add_button.isEnabled() and not self._asked > 1:
            self.add_button.setFocus()
        self._fit()

    def _show_columns(self, preview: FilePreview) -> None:
        self._column_row.setVisible(bool(preview.columns))
        if not preview.columns:
            return
        chosen = self.columns.value
        guessed = f"Automatic: {preview.text_column}" if preview.text_column else "Automatic"
        if chosen is not None:
            guessed = "Automatic"
        self.columns.blockSignals(True)
        self.columns.set_options([(None, guessed), *((name, name) for name in preview.columns)])
        self.columns.set_value(chosen)
        self.columns.blockSignals(False)

    def _on_failed(self, error: Exception) -> None:
        problem = problem_of(error)
        self.facts.setText("")
        clear(self._problem)
        clear(self._first)
        self._problem.addWidget(ErrorPanel(problem.title, problem.what, problem.next_step))
        self.add_button.setEnabled(False)
        self._fit()

    def _on_options_changed(self, index: int) -> None:
        self._read()

    def _on_keep_toggled(self, on: bool) -> None:
        self._keep_help.setText(
            "Nothing is copied: the files are read each time they are needed, and must stay where "
            "they are and as they are."
            if on
            else "Off: the text is copied into the library, so the files may be moved or deleted."
        )

    def _on_expanded_changed(self, expanded: bool) -> None:
        self._fit()

    def _fit(self) -> None:
        """As high as what is shown, once the layout has settled; a small screen scrolls."""
        QTimer.singleShot(0, self, self._on_settled)

    def _on_settled(self) -> None:
        layout = self._content.layout()
        layout.activate()
        inner = _WIDTH - 16  # a scroll bar's width less
        wanted = max(layout.totalHeightForWidth(inner), layout.totalSizeHint().height()) + 86
        parent = self.parentWidget()
        room = parent.window().height() if parent else self.screen().availableGeometry().height()
        self.resize(_WIDTH, min(wanted, max(room - 32, 480)))

    # --- the job --------------------------------------------------------------------------------

    def _on_add_clicked(self, checked: bool = False) -> None:
        self.add_wanted.emit(self.job())
        self.accept()

    def job(self) -> AddDataset:
        from mistudio.jobs.datasets import AddDataset

        options = self._options()
        return AddDataset(
            str(self._path),
            text_column=options.text_column,
            name=self.name.text().strip() or None,
            skip_bad_rows=options.skips,
            keep_in_place=self.keep.isChecked(),
            max_documents=options.max_documents,
            max_bytes=options.max_bytes,
            encoding=options.encoding,
        )


def _name_of(path: Path) -> str:
    """`notes` of `notes.jsonl.gz`."""
    name = path.name
    for suffix in reversed(path.suffixes[-2:]) if not path.is_dir() else ():
        if 1 < len(suffix) < 10 and not suffix[1:].isdigit():
            name = name.removesuffix(suffix)
    return name or path.name


def _facts(preview: FilePreview) -> list[str]:
    facts = [
        f"{formatting.count(preview.files)} file{'' if preview.files == 1 else 's'}",
        formatting.size(preview.bytes),
        ", ".join(_FORMATS.get(name, name) for name in preview.formats),
    ]
    if preview.encoding_name:
        facts.append(preview.encoding_name)
    if preview.chat:
        facts.append("conversations")
    if preview.splits:
        facts.append(f"splits: {', '.join(preview.splits)}")
    return facts


def _short(text: str) -> str:
    short = " ".join(text[:600].split())[:220].replace("\0", "␀")
    return short if short == text else f"{short.rstrip()}…"
