"""A model brings its own program: what would run is shown, and nothing runs unless somebody agrees
to exactly that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PySide6.QtCore import QItemSelection, Qt, Signal
from PySide6.QtGui import QKeyEvent, QTextCursor, QTextDocument
from PySide6.QtWidgets import (
    QAbstractItemView,
    QCheckBox,
    QDialog,
    QLineEdit,
    QPlainTextEdit,
    QVBoxLayout,
    QWidget,
)

from mistudio import formatting
from mistudio.ui.models.parts import Column, FactsTable, head_of, room_of
from mistudio.ui.theme import fonts
from mistudio.ui.widgets import Button, Text, column, row

if TYPE_CHECKING:
    from mistudio.engine.models.custom_code import OwnCode

CHECK = "I have read these files and trust where they come from"
REMEMBERED = (
    "What is remembered: the hash of every file, with this model. Each time the model is loaded, "
    "its files are compared; if one was changed, added or is missing, it is not run and you are "
    "told. The consent is for this model alone, and ends when you delete it."
)
_ROWS = 3  # of the list of files, seen at once


class ConsentDialog(QDialog):
    """Cancel is what Enter and Escape do; agreeing takes a tick and a click."""

    def __init__(self, name: str, code: OwnCode, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.code = code
        self.setObjectName("consent_dialog")
        self.setWindowTitle("This model brings its own program")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        room = room_of(parent)
        self.resize(min(1000, room.width() - 64), round(room.height() * 0.92))
        self._make_files()
        self._make_source()
        self._make_choice()
        self._build(name)
        self._show_file(0)
        self.cancel.setFocus()

    def _make_files(self) -> None:
        columns = (
            Column("File", 250, mono=True),
            Column("Bytes", 90, right=True, mono=True),
            Column("SHA-256", mono=True, tip="Of the file's bytes, as they would run"),
        )
        cells = [(file.name, formatting.count(file.bytes), file.sha256) for file in self.code.files]
        tips = [f"{file.name}\nSHA-256 {file.sha256}" for file in self.code.files]
        self.files = FactsTable("Files of the model's program", columns, cells, tips)
        header = self.files.horizontalHeader().sizeHint().height()
        self.files.setFixedHeight(fonts.px(32) * min(len(cells), _ROWS) + header + 4)
        self.files.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.files.selectionModel().selectionChanged.connect(self._on_selection_changed)

    def _make_source(self) -> None:
        self.shown = Text("", "label")
        self.wanted = _FindField()
        self.wanted.setPlaceholderText("Find in all files")
        self.wanted.setAccessibleName("Find in the source of all files")
        self.wanted.setClearButtonEnabled(True)
        self.wanted.entered.connect(self._on_next_clicked)
        self.next = Button("Find next", "small", "search")
        self.next.clicked.connect(self._on_next_clicked)
        self.found = Text("", "helper")
        self.source = QPlainTextEdit()
        self.source.setReadOnly(True)
        self.source.setTabChangesFocus(True)
        self.source.setFont(fonts.mono(14))
        # Long lines are wrapped: nothing may hide behind the right edge.
        self.source.setLineWrapMode(QPlainTextEdit.LineWrapMode.WidgetWidth)
        self.source.setTextInteractionFlags(
            Qt.TextInteractionFlag.TextSelectableByMouse
            | Qt.TextInteractionFlag.TextSelectableByKeyboard
        )

    def _make_choice(self) -> None:
        self.agreed = QCheckBox(CHECK)
        self.agreed.toggled.connect(self._on_agreed_toggled)
        self.cancel = Button("Cancel")
        self.cancel.setDefault(True)
        self.cancel.clicked.connect(self.reject)
        self.consent = Button("Trust this program and add the model", "danger")
        self.consent.setAutoDefault(False)
        self.consent.setEnabled(False)
        self.consent.setToolTip("Tick the box above first")
        self.consent.clicked.connect(self.accept)
        for button in (self.next, self.cancel):
            button.setAutoDefault(button is self.cancel)

    def _build(self, name: str) -> None:
        from mistudio.engine.models.custom_code import MEANING

        code = self.code
        where = f"{code.origin}, commit {code.revision}" if code.revision else code.origin
        n = len(code.files)
        facts = [
            f"From {where}",
            f"{n} Python file{'' if n == 1 else 's'}, {formatting.size(code.bytes)}",
            f"Runs {', '.join(code.classes.values())}, which transformers does not have",
        ]
        meaning = Text(f"{MEANING} Nothing of it has run so far.", "body", "yellow", wrap=True)
        self.about = Text(" • ".join(facts), "helper", wrap=True, selectable=True)
        inside = column(10)
        inside.setContentsMargins(24, 0, 24, 20)
        search = row(self.shown, None, self.found, self.wanted, self.next)
        inside.addWidget(self.about)
        inside.addWidget(self.files)
        inside.addLayout(search)
        inside.addWidget(self.source, 1)
        inside.addWidget(Text(REMEMBERED, "helper", wrap=True))
        inside.addLayout(row(self.agreed, None, self.cancel, self.consent))
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addLayout(head_of(self, f"{name} brings its own program", meaning))
        layout.addLayout(inside, 1)

    def _show_file(self, index: int) -> None:
        file = self.code.files[index]
        if self.files.currentIndex().row() != index:
            self.files.selectRow(index)
        lines = file.text.count("\n") + (not file.text.endswith("\n"))
        self.shown.setText(f"{file.name} ({formatting.count(lines)} lines)")
        self.source.setPlainText(file.text)
        self.source.setAccessibleName(f"Source of {file.name}")

    def _on_selection_changed(self, selected: QItemSelection, before: QItemSelection) -> None:
        rows = selected.indexes()
        if rows:
            self._show_file(rows[0].row())

    def _on_next_clicked(self, checked: bool = False) -> None:
        """The next place from the cursor on, through all files and around."""
        wanted = self.wanted.text()
        if not wanted or self.source.find(wanted):
            self.found.setText("")
            return
        now, n = self.files.currentIndex().row(), len(self.code.files)
        for step in range(1, n + 1):
            index = (now + step) % n
            if wanted.casefold() in self.code.files[index].text.casefold():
                self._show_file(index)
                self.source.moveCursor(QTextCursor.MoveOperation.Start)
                self.source.find(wanted, QTextDocument.FindFlag(0))
                self.found.setText("")
                return
        self.found.setText("Not found")

    def _on_agreed_toggled(self, checked: bool) -> None:
        self.consent.setEnabled(checked)
        self.consent.setToolTip("" if checked else "Tick the box above first")


class _FindField(QLineEdit):
    """Enter looks further; it must not reach the dialog, whose default is Cancel."""

    entered = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setFixedWidth(fonts.px(220))

    def keyPressEvent(self, event: QKeyEvent) -> None:
        if event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter):
            self.entered.emit()
            event.accept()
        else:
            super().keyPressEvent(event)
