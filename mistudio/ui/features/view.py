"""The table's view: keys and clicks that people expect, column widths and order that stay, and a
selection that follows its features through every new order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PySide6.QtCore import (
    QItemSelection,
    QItemSelectionModel,
    Qt,
    QTimer,
    Signal,
)
from PySide6.QtGui import QKeyEvent, QMouseEvent, QResizeEvent
from PySide6.QtWidgets import QAbstractItemView, QHeaderView, QTableView

from mistudio.ui.features.painting import (
    ROW_HEIGHT,
    SparklineDelegate,
    StarDelegate,
    TextDelegate,
    TokenDelegate,
)
from mistudio.ui.features.shown import CONTEXT, HISTOGRAM, ID, LABEL, STAR, SUBSET
from mistudio.ui.features.table import FeatureTable

LEAST_WIDTH, MOST_WIDTH = 48, 1200
LEAST_TEXT = 220  # of the column that gives way
KEPT_SELECTED = 5000  # of more than these the selection is not carried into a new order


class FeatureView(QTableView):
    """`opened` tells that a row is to be opened, `rows_seen` that others may be in sight."""

    opened = Signal(int)
    rows_seen = Signal()
    selection_changed = Signal()

    def __init__(self, table: FeatureTable, colour_map: str) -> None:
        super().__init__()
        self._table = table
        self._widths: dict[str, int] = {}
        self._laying_out = False
        self._held: tuple[np.ndarray, int] | None = None
        self.setObjectName("feature_table")
        self.setAccessibleName("Features")
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setSelectionMode(QAbstractItemView.SelectionMode.ExtendedSelection)
        self.setShowGrid(False)
        self.setWordWrap(False)
        self.setTabKeyNavigation(False)
        self.setVerticalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.setHorizontalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.setContextMenuPolicy(Qt.ContextMenuPolicy.CustomContextMenu)
        self.verticalHeader().hide()
        self.verticalHeader().setDefaultSectionSize(ROW_HEIGHT)
        self.verticalHeader().setSectionResizeMode(QHeaderView.ResizeMode.Fixed)
        self.setMouseTracking(True)
        self._tokens = TokenDelegate(colour_map, self)
        self._star = StarDelegate(self)
        self._sparkline = SparklineDelegate(self)
        self._plain = TextDelegate(self)
        header = self.horizontalHeader()
        header.setHighlightSections(False)
        header.setSectionsClickable(True)
        header.setSectionsMovable(True)
        header.setStretchLastSection(False)
        header.setMinimumSectionSize(LEAST_WIDTH)
        header.sectionResized.connect(self._on_header_section_resized)
        header.sectionMoved.connect(self._on_header_section_moved)
        table.modelAboutToBeReset.connect(self._on_table_about_to_be_reset)
        self.setModel(table)
        table.modelReset.connect(self._on_table_reset)
        self.lay_out()

    # --- columns --------------------------------------------------------------------------------

    @property
    def widths(self) -> dict[str, int]:
        """What the user made of the columns' widths."""
        return dict(self._widths)

    def set_widths(self, widths: Mapping[str, Any]) -> None:
        self._widths = {
            name: width
            for name, width in widths.items()
            if isinstance(width, int) and LEAST_WIDTH <= width <= MOST_WIDTH
        }
        self.lay_out()

    def lay_out(self) -> None:
        """Delegates and widths of the columns that are shown; the text takes what is left over,
        and gives way first."""
        header, shown = self.horizontalHeader(), self._table.shown
        self._laying_out = True
        total = 0
        for section, one in enumerate(shown):
            delegate = {
                CONTEXT: self._tokens, STAR: self._star, HISTOGRAM: self._sparkline,
            }.get(one.name, self._plain)  # fmt: skip
            self.setItemDelegateForColumn(section, delegate)
            width = self._widths.get(one.name, one.width)
            header.resizeSection(section, width)
            total += width
        self._laying_out = False
        self._fill(total)

    def _fill(self, total: int) -> None:
        names = [one.name for one in self._table.shown]
        elastic = next((name for name in (CONTEXT, LABEL) if name in names), None)
        if elastic is None:
            return
        section = names.index(elastic)
        wide = self._widths.get(elastic, self._table.shown[section].width)
        least = wide if elastic in self._widths else LEAST_TEXT
        self._laying_out = True
        self.horizontalHeader().resizeSection(
            section, max(wide + self.viewport().width() - total, least)
        )
        self._laying_out = False

    def _on_header_section_resized(self, section: int, old: int, new: int) -> None:
        if not self._laying_out and 0 <= section < len(self._table.shown):
            self._widths[self._table.shown[section].name] = new

    def _on_header_section_moved(self, section: int, old: int, new: int) -> None:
        if not self._laying_out:
            QTimer.singleShot(0, self, self._take_order)

    def _take_order(self) -> None:
        """The order that was dragged becomes that of the model; the header's is undone."""
        header, shown = self.horizontalHeader(), self._table.shown
        names = [shown[header.logicalIndex(place)].name for place in range(len(shown))]
        self._laying_out = True
        for section in range(len(shown)):
            header.moveSection(header.visualIndex(section), section)
        self._laying_out = False
        hidden = [name for name in self._table.wanted if name not in names]
        self._table.set_wanted([*(name for name in names if name != SUBSET), *hidden])

    # --- selection ------------------------------------------------------------------------------

    def selected_features(self) -> np.ndarray:
        """int32, in the order of the table; from ranges, as thousands may be selected."""
        visible = self._table.visible
        chosen = np.zeros(len(visible), bool)
        for part in self.selectionModel().selection():
            chosen[part.top() : part.bottom() + 1] = True
        return visible[chosen]

    def current_feature(self) -> int:
        """-1 where there is none."""
        row = self.currentIndex().row()
        return int(self._table.visible[row]) if 0 <= row < len(self._table.visible) else -1

    def select(self, features: np.ndarray, current: int = -1) -> None:
        """Select the rows of these features, those that are shown."""
        rows = np.array(sorted(self._table.row_of(int(feature)) for feature in features), int)
        rows = rows[rows >= 0]
        place = self._table.row_of(current)
        model, last = self._table, max(self._table.columnCount() - 1, 0)
        selection = QItemSelection()
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            if len(run):
                selection.select(model.index(int(run[0]), 0), model.index(int(run[-1]), last))
        if place >= 0:
            self.selectionModel().setCurrentIndex(
                model.index(place, 0), QItemSelectionModel.SelectionFlag.NoUpdate
            )
        self.selectionModel().select(selection, QItemSelectionModel.SelectionFlag.ClearAndSelect)

    def _on_table_about_to_be_reset(self) -> None:
        features, current = self.selected_features(), self.current_feature()
        keep = (0 < len(features) <= KEPT_SELECTED) or current >= 0
        self._held = (features[:KEPT_SELECTED], current) if keep else None

    def _on_table_reset(self) -> None:
        self.lay_out()
        held, self._held = self._held, None
        if held is not None:
            self.select(*held)
        self.selection_changed.emit()

    def selectionChanged(self, selected: QItemSelection, deselected: QItemSelection) -> None:
        super().selectionChanged(selected, deselected)
        self.selection_changed.emit()

    # --- keys, clicks ---------------------------------------------------------------------------

    def keyPressEvent(self, event: QKeyEvent) -> None:
        index = self.currentIndex()
        if index.isValid() and event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter):
            self.opened.emit(index.row())
        else:
            super().keyPressEvent(event)

    def keyboardSearch(self, search: str) -> None:
        """Letters are commands here; Qt would go through every row for one that begins so."""

    def mouseReleaseEvent(self, event: QMouseEvent) -> None:
        super().mouseReleaseEvent(event)
        index = self.indexAt(event.position().toPoint())
        plain = event.modifiers() == Qt.KeyboardModifier.NoModifier
        left = event.button() == Qt.MouseButton.LeftButton
        if left and plain and index.isValid() and self._name(index.column()) == STAR:
            self._table.toggle_star(index.row())

    def mouseDoubleClickEvent(self, event: QMouseEvent) -> None:
        super().mouseDoubleClickEvent(event)
        index = self.indexAt(event.position().toPoint())
        if index.isValid() and self._name(index.column()) != STAR:
            self.opened.emit(index.row())

    def _name(self, section: int) -> str:
        return self._table.shown[section].name if section < len(self._table.shown) else ID

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        self.lay_out()
        self.rows_seen.emit()
