"""The feature table: a model over numpy columns, its order and filters, and how tokens are painted.

A row is a position in `visible`, an int32 array of feature numbers: sorting and filtering make a
new array and touch no row. Descriptions and tokens come later, for the rows that can be seen.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from PySide6.QtCore import (
    QAbstractTableModel,
    QModelIndex,
    QObject,
    QPersistentModelIndex,
    QPoint,
    QPointF,
    QRect,
    QSize,
    Qt,
    Signal,
)
from PySide6.QtGui import QColor, QFont, QIcon, QPainter, QPixmap, QPolygonF
from PySide6.QtWidgets import QStyle, QStyledItemDelegate, QStyleOptionViewItem, QWidget

from mistudio import formatting
from mistudio.library.features import FeatureNote
from mistudio.ui.features.reader import Columns, RowText, Snippet
from mistudio.ui.theme import fonts, icons, tokens
from mistudio.ui.widgets.token_strip import Arrangement, arrange_tokens, paint_tokens

Index = QModelIndex | QPersistentModelIndex

ID, LABEL, CONTEXT, DENSITY, MAXIMUM, TOP_TOKEN, STAR = range(7)
TITLES = ("ID", "Label", "Example Context", "Activation Freq", "Max activation",
          "Top-token share", "Starred")  # fmt: skip
ROW_HEIGHT = 44
KEPT_TEXTS = 2000  # rows whose tokens stay in memory

# key -> (what the combo says, the column of the table that shows it)
SORTS = {
    "density": ("Activation Freq", DENSITY),
    "max_activation": ("Max activation", MAXIMUM),
    "top_token_share": ("Top-token share", TOP_TOKEN),
    "id": ("Feature ID", ID),
}

SNIPPET_ROLE = Qt.ItemDataRole.UserRole + 1
FEATURE_ROLE = Qt.ItemDataRole.UserRole + 2
STAR_ROLE = Qt.ItemDataRole.UserRole + 3


@dataclass(frozen=True)
class Filters:
    """What is shown. Densities are shares, both ends included."""

    hide_dead: bool = True
    starred_only: bool = False
    low: float = 0.0
    high: float = 1.0
    search: str = ""


class FeatureTable(QAbstractTableModel):
    """Rows are features that pass the filters, in order. Emits `starred` when a star is clicked."""

    order_changed = Signal()
    starred = Signal(int, bool)

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.columns: Columns | None = None
        self.visible = np.empty(0, np.int32)
        self.sort_key, self.descending = "density", True
        self.filters = Filters()
        self._found: np.ndarray | None = None
        self._notes: dict[int, FeatureNote] = {}
        self._texts: OrderedDict[int, RowText] = OrderedDict()
        self._italic = fonts.sans(tokens.TEXT_BODY)
        self._italic.setItalic(True)
        self._mono = fonts.mono(tokens.TEXT_SMALL)

    # --- what is shown --------------------------------------------------------------------------

    def set_columns(self, columns: Columns | None, notes: dict[int, FeatureNote]) -> None:
        self.columns, self._notes, self._found = columns, notes, None
        self._texts.clear()
        self._arrange()

    def set_notes(self, notes: dict[int, FeatureNote]) -> None:
        """Labels and stars changed; the order changes only where it depends on them."""
        self._notes = notes
        if self.filters.starred_only or self.filters.search:
            self._arrange()
        elif len(self.visible):
            self._row_changed(0, len(self.visible) - 1)

    def set_sort(self, key: str, descending: bool) -> None:
        if (key, descending) != (self.sort_key, self.descending):
            self.sort_key, self.descending = key, descending
            self._arrange()

    def set_filters(self, filters: Filters) -> None:
        if filters != self.filters:
            if not filters.search:
                self._found = None
            self.filters = filters
            self._arrange()

    def set_found(self, search: str, found: np.ndarray | None) -> None:
        """The mask that a search brought; labels are looked at here."""
        self._found = found
        self.filters = replace(self.filters, search=search)
        self._arrange()

    def _arrange(self) -> None:
        self.beginResetModel()
        self.visible = self._order()
        self.endResetModel()
        self.headerDataChanged.emit(Qt.Orientation.Horizontal, 0, len(TITLES) - 1)
        self.order_changed.emit()

    def _order(self) -> np.ndarray:
        if self.columns is None:
            return np.empty(0, np.int32)
        density = self.columns.values["density"]
        kept = (density >= np.float32(self.filters.low)) & (
            density <= np.float32(self.filters.high)
        )
        if self.filters.hide_dead:
            kept &= density > 0
        if self.filters.starred_only:
            kept &= self._mask(note.feature for note in self._notes.values() if note.starred)
        if self.filters.search and self._found is not None:
            wanted = self.filters.search.lower()
            labelled = self._mask(
                note.feature for note in self._notes.values() if wanted in note.label.lower()
            )
            kept &= self._found | labelled
        chosen = np.flatnonzero(kept).astype(np.int32)
        if self.sort_key == "id":
            return chosen[::-1] if self.descending else chosen
        values = self.columns.values[self.sort_key][chosen]
        return chosen[np.argsort(-values if self.descending else values, kind="stable")]

    def _mask(self, features: Iterable[int]) -> np.ndarray:
        assert self.columns is not None
        mask = np.zeros(len(self.columns), bool)
        numbers = np.fromiter(features, np.int64)
        mask[numbers[(numbers >= 0) & (numbers < len(mask))]] = True
        return mask

    # --- texts ----------------------------------------------------------------------------------

    def missing(self, first: int, last: int) -> list[int]:
        """Features of the rows first..last whose tokens have not been read."""
        rows = self.visible[max(first, 0) : last + 1]
        return [feature for feature in rows.tolist() if feature not in self._texts]

    def add_texts(self, texts: list[RowText]) -> None:
        for text in texts:
            self._texts[text.feature] = text
        while len(self._texts) > KEPT_TEXTS:
            self._texts.popitem(last=False)
        read = {text.feature for text in texts}
        for row in np.flatnonzero(np.isin(self.visible, list(read))).tolist():
            self._row_changed(row, row)

    def text(self, feature: int) -> RowText | None:
        return self._texts.get(feature)

    def note(self, feature: int) -> FeatureNote | None:
        return self._notes.get(feature)

    def row_of(self, feature: int) -> int:
        """The row that shows a feature, -1 where none does."""
        rows = np.flatnonzero(self.visible == feature)
        return int(rows[0]) if len(rows) else -1

    def _row_changed(self, first: int, last: int) -> None:
        self.dataChanged.emit(self.index(first, 0), self.index(last, len(TITLES) - 1))

    # --- the model ------------------------------------------------------------------------------

    def rowCount(self, parent: Index | None = None) -> int:
        return 0 if parent is not None and parent.isValid() else len(self.visible)

    def columnCount(self, parent: Index | None = None) -> int:
        return 0 if parent is not None and parent.isValid() else len(TITLES)

    def headerData(
        self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole
    ) -> Any:
        if orientation != Qt.Orientation.Horizontal:
            return None
        if role == Qt.ItemDataRole.DisplayRole:
            arrow = (" ↓" if self.descending else " ↑") if self._sorted_by(section) else ""
            return "" if section == STAR else TITLES[section] + arrow
        if role == Qt.ItemDataRole.AccessibleTextRole:
            return TITLES[section]
        if role == Qt.ItemDataRole.ToolTipRole:
            return self._header_tip(section)
        if role == Qt.ItemDataRole.TextAlignmentRole:
            right = section in (DENSITY, MAXIMUM, TOP_TOKEN)
            side = Qt.AlignmentFlag.AlignRight if right else Qt.AlignmentFlag.AlignLeft
            return side | Qt.AlignmentFlag.AlignVCenter
        return None

    def _sorted_by(self, section: int) -> bool:
        return SORTS[self.sort_key][1] == section

    def _header_tip(self, section: int) -> str | None:
        n = formatting.count(self.columns.meta.tokens) if self.columns else "—"
        return {
            DENSITY: f"Share of {n} tokens on which the feature fires",
            MAXIMUM: f"Largest activation over {n} tokens",
            TOP_TOKEN: "Share of the top examples whose strongest token is the most common one",
            LABEL: "Your label, or in italics what the top examples share, found by rule",
            CONTEXT: "The text around the strongest activation",
        }.get(section)

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        if not index.isValid() or self.columns is None:
            return None
        feature = int(self.visible[index.row()])
        column = index.column()
        if role == FEATURE_ROLE:
            return feature
        if role == SNIPPET_ROLE:
            text = self._texts.get(feature)
            return text.snippet if text and column == CONTEXT else None
        if role in (Qt.ItemDataRole.DisplayRole, Qt.ItemDataRole.AccessibleTextRole):
            return self._shown(feature, column, role)
        if role == Qt.ItemDataRole.ForegroundRole:
            return self._colour(feature, column)
        if role == Qt.ItemDataRole.FontRole:
            if column == ID:
                return self._mono
            return self._italic if column == LABEL and not self._label(feature) else None
        if role == Qt.ItemDataRole.TextAlignmentRole:
            right = column in (DENSITY, MAXIMUM, TOP_TOKEN)
            side = Qt.AlignmentFlag.AlignRight if right else Qt.AlignmentFlag.AlignLeft
            return side | Qt.AlignmentFlag.AlignVCenter
        if role == Qt.ItemDataRole.ToolTipRole and column == LABEL:
            text = self._texts.get(feature)
            return text.evidence.capitalize() if text and not self._label(feature) else None
        if role == STAR_ROLE:
            return self._starred(feature)
        return None

    def _shown(self, feature: int, column: int, role: int) -> str | None:
        assert self.columns is not None
        values = self.columns.values
        if column == ID:
            return f"#{feature}"
        if column == LABEL:
            return self._label(feature) or self._description(feature)
        if column == CONTEXT:
            if role == Qt.ItemDataRole.DisplayRole:
                return None  # painted by the delegate
            text = self._texts.get(feature)
            return "".join(text.snippet.texts) if text else ""
        if column == DENSITY:
            return frequency(float(values["density"][feature]))
        if column == MAXIMUM:
            return formatting.number(float(values["max_activation"][feature]), 2)
        if column == TOP_TOKEN:
            if values["top_token"][feature] < 0:
                return "—"
            return formatting.percent(float(values["top_token_share"][feature]), 0)
        if role == Qt.ItemDataRole.AccessibleTextRole:
            return "Starred" if self._starred(feature) else "Not starred"
        return None

    def _description(self, feature: int) -> str:
        text = self._texts.get(feature)
        if text is not None:
            return text.description or "never fired"
        return "…"

    def _label(self, feature: int) -> str:
        note = self._notes.get(feature)
        return note.label if note else ""

    def _starred(self, feature: int) -> bool:
        note = self._notes.get(feature)
        return bool(note and note.starred)

    def _colour(self, feature: int, column: int) -> QColor | None:
        if column == ID or (column == LABEL and not self._label(feature)):
            return QColor(tokens.HELPER)
        if column == DENSITY:
            return QColor(tokens.EMERALD)
        if column == MAXIMUM:
            return QColor(tokens.PURPLE)
        return QColor(tokens.BLUE) if column == TOP_TOKEN else None

    def flags(self, index: Index) -> Qt.ItemFlag:
        return Qt.ItemFlag.ItemIsEnabled | Qt.ItemFlag.ItemIsSelectable

    def toggle_star(self, row: int) -> None:
        feature = int(self.visible[row])
        self.starred.emit(feature, not self._starred(feature))


def frequency(share: float) -> str:
    """A density as people compare it: `0.23%`, and `0.0012%` where two decimals would say 0."""
    if share <= 0:
        return "0%"
    if share < 0.0001:
        return formatting.percent(share, 4)
    return formatting.percent(share, 2)


# --- painting -------------------------------------------------------------------------------------


class TokenDelegate(QStyledItemDelegate):
    """Paints a snippet's tokens with their heat in one line, the strongest one in sight."""

    def __init__(self, colour_map: str, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.colour_map = colour_map
        self._font: QFont = fonts.mono(tokens.TEXT_SMALL)
        self._arrangements: OrderedDict[Snippet, Arrangement] = OrderedDict()

    def paint(self, painter: QPainter, option: QStyleOptionViewItem, index: Index) -> None:
        style = option.widget.style()
        style.drawPrimitive(
            QStyle.PrimitiveElement.PE_PanelItemViewItem, option, painter, option.widget
        )
        snippet = index.data(SNIPPET_ROLE)
        if not isinstance(snippet, Snippet) or not snippet.texts:
            return
        line = self._line(snippet)
        cell = option.rect.adjusted(8, 0, -8, 0)
        place = QRect(cell)
        place.setTop(cell.top() + (cell.height() - line.height) // 2)
        place.setHeight(line.height)
        shift = self._shift(line, snippet.peak, cell.width())
        moved = Arrangement(
            tuple(rect.translated(-shift, 0) for rect in line.rects), line.texts, line.height
        )
        selected = bool(option.state & QStyle.StateFlag.State_Selected)
        paint_tokens(
            painter,
            place,
            snippet.texts,
            snippet.activations,
            max(snippet.activations),
            font=self._font,
            background=tokens.SELECTION if selected else tokens.CARD,
            colour_map=self.colour_map,
            arrangement=moved,
            text_colour=tokens.LABEL,
        )

    def _line(self, snippet: Snippet) -> Arrangement:
        """All tokens in one line; laying out costs more than painting, so it is kept."""
        line = self._arrangements.get(snippet)
        if line is None:
            line = arrange_tokens(snippet.texts, self._font, 1_000_000)
            self._arrangements[snippet] = line
            while len(self._arrangements) > 200:
                self._arrangements.popitem(last=False)
        return line

    @staticmethod
    def _shift(line: Arrangement, peak: int, width: int) -> int:
        """How far to the left: the peak stands at 60 % of the width, nothing is left empty."""
        peak_rect = line.rects[peak]
        end = line.rects[-1].right() + 1
        wanted = peak_rect.center().x() - round(width * 0.6)
        return max(0, min(wanted, end - width))

    def sizeHint(self, option: QStyleOptionViewItem, index: Index) -> QSize:
        return QSize(240, ROW_HEIGHT)


class StarDelegate(QStyledItemDelegate):
    """A star, yellow and filled where it is set: told by the shape as well as by the colour."""

    def paint(self, painter: QPainter, option: QStyleOptionViewItem, index: Index) -> None:
        style = option.widget.style()
        style.drawPrimitive(
            QStyle.PrimitiveElement.PE_PanelItemViewItem, option, painter, option.widget
        )
        on = bool(index.data(STAR_ROLE))
        picture = star_pixmap(on, option.widget)
        side = 18
        corner = option.rect.center() - QPoint(side // 2, side // 2)
        painter.drawPixmap(QRect(corner, QSize(side, side)), picture)

    def sizeHint(self, option: QStyleOptionViewItem, index: Index) -> QSize:
        return QSize(52, ROW_HEIGHT)


def star_pixmap(on: bool, widget: QWidget | None) -> QPixmap:
    ratio = widget.devicePixelRatioF() if widget else 1.0
    if not on:
        return icons.pixmap("star", tokens.EDGE, 18, ratio)
    return filled_star(ratio)


def star_icon() -> QIcon:
    """For a button: an outline, and filled while it is checked."""
    icon = QIcon()
    for side in (20, 40):
        icon.addPixmap(icons.pixmap("star", tokens.LABEL, side))
        icon.addPixmap(filled_star(1.0, side), QIcon.Mode.Normal, QIcon.State.On)
    return icon


@cache
def filled_star(ratio: float, size: int = 18) -> QPixmap:
    """Lucide's star with its inside filled."""
    side = round(size * ratio)
    picture = QPixmap(side, side)
    picture.fill(Qt.GlobalColor.transparent)
    painter = QPainter(picture)
    painter.setRenderHint(QPainter.RenderHint.Antialiasing)
    painter.setPen(Qt.PenStyle.NoPen)
    painter.setBrush(QColor(tokens.YELLOW))
    points = []
    for corner in range(10):
        radius = side * (0.40 if corner % 2 == 0 else 0.18)
        angle = math.pi * (corner / 5 - 0.5)
        points.append(
            QPointF(side / 2 + radius * math.cos(angle), side * 0.52 + radius * math.sin(angle))
        )
    painter.drawPolygon(QPolygonF(points))
    painter.drawPixmap(0, 0, icons.pixmap("star", tokens.YELLOW, side, 1.0))
    painter.end()
    picture.setDevicePixelRatio(ratio)
    return picture
