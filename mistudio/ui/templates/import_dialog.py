"""Before templates are taken in: what the file holds, entry by entry; then what became of each."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtCore import (
    QAbstractTableModel,
    QModelIndex,
    QPersistentModelIndex,
    QSize,
    Qt,
    QTimer,
)
from PySide6.QtGui import QColor
from PySide6.QtWidgets import (
    QAbstractItemView,
    QCheckBox,
    QDialog,
    QHeaderView,
    QStyledItemDelegate,
    QStyleOptionViewItem,
    QTableView,
    QWidget,
)

from mistudio import formatting
from mistudio.errors import UserError, explain
from mistudio.jobs.template_files import Entry
from mistudio.jobs.templates import Outcome, import_templates
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import Button, Text, column, row

KINDS = {"training": "Training", "extraction": "Extraction", "steering": "Preset"}
RESULTS = {
    "added": "Added",
    "replaced": "Replaced",
    "kept": "Already there",
    "refused": "Refused",
}
HEADINGS = ("Name", "Kind", "Result", "Notes")


class EntriesModel(QAbstractTableModel):
    """Entries of a file, and what became of them once they are taken in."""

    def __init__(self, entries: Sequence[Entry], parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._entries = list(entries)
        self._outcomes: list[Outcome] = []

    def set_outcomes(self, outcomes: list[Outcome]) -> None:
        self.beginResetModel()
        self._outcomes = outcomes
        self.endResetModel()

    def rowCount(self, parent: QModelIndex | QPersistentModelIndex = QModelIndex()) -> int:  # noqa: B008
        return 0 if parent.isValid() else len(self._entries)

    def columnCount(self, parent: QModelIndex | QPersistentModelIndex = QModelIndex()) -> int:  # noqa: B008
        return 0 if parent.isValid() else len(HEADINGS)

    def headerData(
        self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole
    ) -> str | None:
        shown = role == Qt.ItemDataRole.DisplayRole and orientation == Qt.Orientation.Horizontal
        return HEADINGS[section] if shown else None

    def data(
        self,
        index: QModelIndex | QPersistentModelIndex,
        role: int = Qt.ItemDataRole.DisplayRole,
    ) -> object:
        entry = self._entries[index.row()]
        if role == Qt.ItemDataRole.ForegroundRole and entry.problem:
            return QColor(tokens.RED)
        if role not in (Qt.ItemDataRole.DisplayRole, Qt.ItemDataRole.ToolTipRole):
            return None
        notes = entry.problem or " ".join(entry.notes)
        return (entry.name or "(no name)", KINDS[entry.kind], self._result(index.row()), notes)[
            index.column()
        ]

    def _result(self, number: int) -> str:
        if self._outcomes:
            outcome = self._outcomes[number]
            renamed = outcome.name and outcome.name != outcome.entry.name
            return RESULTS[outcome.result] + (f" as {outcome.name}" if renamed else "")
        return RESULTS["refused"] if self._entries[number].problem else "Can be added"


class NoteDelegate(QStyledItemDelegate):
    """Room above and below notes of several lines."""

    def sizeHint(
        self, option: QStyleOptionViewItem, index: QModelIndex | QPersistentModelIndex
    ) -> QSize:
        return super().sizeHint(option, index) + QSize(0, 14)


class ImportDialog(QDialog):
    """Nothing is changed before Import is pressed."""

    def __init__(
        self, services: Services, entries: list[Entry], name: str, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self._services, self._entries = services, entries
        self.setWindowTitle(f"Import templates from {name}")
        self.resize(1040, 520)
        self._summary = Text("", "body", wrap=True)
        self.model = EntriesModel(entries, self)
        self.table = QTableView()
        self.table.setModel(self.model)
        self.table.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.table.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.table.verticalHeader().hide()
        self.table.setItemDelegateForColumn(3, NoteDelegate(self.table))
        self.table.setAccessibleName("Entries of the file")
        header = self.table.horizontalHeader()
        header.setDefaultAlignment(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter)
        for section, width in enumerate((200, 110, 150)):
            header.resizeSection(section, width)
        header.setSectionResizeMode(3, QHeaderView.ResizeMode.Stretch)
        header.sectionResized.connect(self._on_header_section_resized)
        self._fit = QTimer(self)
        self._fit.setSingleShot(True)
        self._fit.timeout.connect(self.table.resizeRowsToContents)
        self.replace = QCheckBox("Replace templates that have the same name")
        self.cancel = Button("Cancel")
        self.cancel.clicked.connect(self.reject)
        self.accept_button = Button("Import", "primary", "check")
        self.accept_button.clicked.connect(self._on_accept_clicked)
        layout = column(16, 24)
        layout.addWidget(self._summary)
        layout.addWidget(self.table, 1)
        layout.addWidget(self.replace)
        layout.addLayout(row(None, self.cancel, self.accept_button, spacing=8))
        self.setLayout(layout)
        usable = sum(not entry.problem for entry in entries)
        self.accept_button.setEnabled(usable > 0)
        bad = len(entries) - usable
        self._summary.setText(
            f"{formatting.count(usable)} of {formatting.count(len(entries))} entries can be added."
            + (
                f" {formatting.count(bad)} refused; the table says why. What is damaged must be "
                "exported again."
                if bad
                else ""
            )
        )

    def _on_header_section_resized(self, *_: int) -> None:
        """Notes are shown whole: what is to be done is at their end."""
        self._fit.start(0)

    def _on_accept_clicked(self, checked: bool = False) -> None:
        if self.accept_button.text() == "Close":
            self.accept()
            return
        self.accept_button.setEnabled(False)
        library, entries, replace = self._services.library, self._entries, self.replace.isChecked()
        self._services.background.run(
            lambda: import_templates(library, entries, replace), self._on_imported, self._on_failed
        )

    def _on_failed(self, error: Exception) -> None:
        self.accept_button.setEnabled(True)
        known = explain(error)
        self._services.toasts.error(known or UserError("Nothing was imported", str(error)))

    def _on_imported(self, outcomes: list[Outcome]) -> None:
        self.model.set_outcomes(outcomes)
        self.table.resizeRowsToContents()
        counts = {name: sum(o.result == name for o in outcomes) for name in RESULTS}
        told = [f"{counts[name]} {text.lower()}" for name, text in RESULTS.items() if counts[name]]
        self._summary.setText(f"{', '.join(told)}.")
        self.replace.hide()
        self.cancel.hide()
        self.accept_button.setText("Close")
        self.accept_button.setEnabled(True)
