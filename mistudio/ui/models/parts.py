"""What the dialogs of the Models tab share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PySide6.QtCore import QAbstractTableModel, QModelIndex, QPersistentModelIndex, QSize, Qt
from PySide6.QtWidgets import (
    QAbstractItemView,
    QApplication,
    QDialog,
    QHBoxLayout,
    QHeaderView,
    QTableView,
    QWidget,
)

from mistudio.ui.theme import fonts
from mistudio.ui.widgets import IconButton, Text, column, row

Index = QModelIndex | QPersistentModelIndex
_ROOT = QModelIndex()
_MOST_LINES = 14  # of a table that are seen at once


def head_of(dialog: QDialog, title: str, subtitle: Text, tone: str | None = None) -> QHBoxLayout:
    texts = column(4)
    texts.addWidget(Text(title, "h1", tone, wrap=True))
    texts.addWidget(subtitle)
    close = IconButton("x", "Close")
    close.clicked.connect(dialog.close)
    head = row(texts, close)
    head.setStretch(0, 1)
    head.setAlignment(close, Qt.AlignmentFlag.AlignTop)
    head.setContentsMargins(24, 20, 20, 16)
    return head


def room_of(parent: QWidget | None) -> QSize:
    return parent.window().size() if parent else QApplication.primaryScreen().size()


@dataclass(frozen=True)
class Column:
    """Of a `FactsTable`; `width` 0 takes what is left over."""

    title: str
    width: int = 0
    right: bool = False
    mono: bool = False
    tip: str = ""


class _FactsModel(QAbstractTableModel):
    def __init__(
        self,
        columns: Sequence[Column],
        lines: Sequence[Sequence[str]],
        tips: Sequence[str],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._columns, self._lines, self._tips = columns, lines, tips

    def rowCount(self, parent: Index = _ROOT) -> int:
        return 0 if parent.isValid() else len(self._lines)

    def columnCount(self, parent: Index = _ROOT) -> int:
        return len(self._columns)

    def headerData(
        self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole
    ) -> object:
        if orientation != Qt.Orientation.Horizontal:
            return None
        told = {
            Qt.ItemDataRole.DisplayRole: self._columns[section].title,
            Qt.ItemDataRole.ToolTipRole: self._columns[section].tip,
            Qt.ItemDataRole.TextAlignmentRole: self._side(section),
        }
        return told.get(Qt.ItemDataRole(role))

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        if role == Qt.ItemDataRole.DisplayRole:
            return self._lines[index.row()][index.column()]
        if role == Qt.ItemDataRole.ToolTipRole:
            return self._tips[index.row()]
        if role == Qt.ItemDataRole.TextAlignmentRole:
            return self._side(index.column())
        if role == Qt.ItemDataRole.FontRole:
            return fonts.mono(14) if self._columns[index.column()].mono else fonts.sans(14)
        return None

    def _side(self, section: int) -> int:
        right = self._columns[section].right
        side = Qt.AlignmentFlag.AlignRight if right else Qt.AlignmentFlag.AlignLeft
        return int(side | Qt.AlignmentFlag.AlignVCenter)


class FactsTable(QTableView):
    """Lines of text under titles, however many; a line's tip is its tooltip."""

    def __init__(
        self,
        name: str,
        columns: Sequence[Column],
        lines: Sequence[Sequence[str]],
        tips: Sequence[str],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.setModel(_FactsModel(columns, lines, tips, self))
        self.setAccessibleName(name)
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setTabKeyNavigation(False)
        self.setShowGrid(False)
        self.setWordWrap(False)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.verticalHeader().hide()
        self.verticalHeader().setDefaultSectionSize(fonts.px(32))
        header = self.horizontalHeader()
        header.setHighlightSections(False)
        header.setSectionResizeMode(QHeaderView.ResizeMode.Fixed)
        for section, one in enumerate(columns):
            if one.width:
                self.setColumnWidth(section, fonts.px(one.width))
            else:
                header.setSectionResizeMode(section, QHeaderView.ResizeMode.Stretch)
        shown = min(len(lines), _MOST_LINES)
        self.setFixedHeight(fonts.px(32) * shown + header.sizeHint().height() + 4)
