"""What a search of the Hub found, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PySide6.QtCore import QAbstractTableModel, QModelIndex, QPersistentModelIndex, Qt, Signal
from PySide6.QtGui import QKeyEvent
from PySide6.QtWidgets import QAbstractItemView, QHeaderView, QTableView, QWidget

from mistudio import formatting
from mistudio.ui.theme import fonts

if TYPE_CHECKING:
    from mistudio.engine.hub import Found

_GATED = {"": "", "auto": "Gated", "manual": "Gated (by request)"}
_COLUMNS = ("Name", "Downloads", "Likes", "Size", "Access", "Licence")
Index = QModelIndex | QPersistentModelIndex
_ROOT = QModelIndex()


class ResultsModel(QAbstractTableModel):
    """What a search found."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.found: list[Found] = []

    def show_found(self, found: list[Found]) -> None:
        self.beginResetModel()
        self.found = found
        self.endResetModel()

    def rowCount(self, parent: Index = _ROOT) -> int:
        return 0 if parent.isValid() else len(self.found)

    def columnCount(self, parent: Index = _ROOT) -> int:
        return len(_COLUMNS)

    def headerData(
        self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole
    ) -> Any:
        if orientation == Qt.Orientation.Horizontal:
            if role == Qt.ItemDataRole.DisplayRole:
                return _COLUMNS[section]
            if role == Qt.ItemDataRole.TextAlignmentRole:
                return _alignment(section)
        return None

    def data(
        self,
        index: QModelIndex | QPersistentModelIndex,
        role: int = Qt.ItemDataRole.DisplayRole,
    ) -> Any:
        one = self.found[index.row()]
        if role == Qt.ItemDataRole.DisplayRole:
            return _cells(one)[index.column()]
        if role == Qt.ItemDataRole.TextAlignmentRole:
            return _alignment(index.column())
        if role == Qt.ItemDataRole.ToolTipRole:
            return "\n".join(part for part in (one.repository, one.description) if part)
        return None


def _cells(one: Found) -> tuple[str, ...]:
    size = formatting.size(one.bytes) if one.bytes else (f"{one.rows} rows" if one.rows else "—")
    access = "Private" if one.private else _GATED.get(one.gated, "Gated") or "Open"
    return (
        one.repository,
        formatting.short_count(one.downloads),
        formatting.short_count(one.likes),
        size,
        access,
        one.licence or "—",
    )


def _alignment(section: int) -> int:
    right = Qt.AlignmentFlag.AlignRight if section in (1, 2, 3) else Qt.AlignmentFlag.AlignLeft
    return int(right | Qt.AlignmentFlag.AlignVCenter)


class Results(QTableView):
    """The found datasets or models; Enter or a click chooses one."""

    chosen = Signal(object)

    def __init__(self, name: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.found = ResultsModel(self)
        self.setModel(self.found)
        self.setAccessibleName(name)
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.setTabKeyNavigation(False)
        self.setShowGrid(False)
        self.setWordWrap(False)
        self.verticalHeader().hide()
        self.verticalHeader().setDefaultSectionSize(fonts.px(36))
        header = self.horizontalHeader()
        header.setSectionResizeMode(QHeaderView.ResizeMode.Fixed)
        header.setSectionResizeMode(0, QHeaderView.ResizeMode.Stretch)
        header.setHighlightSections(False)
        for section, width in enumerate((0, 110, 84, 130, 150, 150)):
            if width:
                self.setColumnWidth(section, fonts.px(width))
        self.clicked.connect(self._on_clicked)

    def show_found(self, found: list[Found]) -> None:
        self.found.show_found(found)
        rows = min(max(len(found), 1), 7)
        self.setFixedHeight(fonts.px(36) * rows + self.horizontalHeader().sizeHint().height() + 4)

    def offer(self, found: list[Found]) -> None:
        """Show what a search found, ready to be chosen from; nothing is not shown."""
        self.show_found(found)
        self.setVisible(bool(found))
        if found:
            self.setFocus()
            self.selectRow(0)

    def keyPressEvent(self, event: QKeyEvent) -> None:
        if event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter, Qt.Key.Key_Space):
            self._on_clicked(self.currentIndex())
        else:
            super().keyPressEvent(event)

    def _on_clicked(self, index: QModelIndex) -> None:
        if index.isValid():
            self.chosen.emit(self.found.found[index.row()])
