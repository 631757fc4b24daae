"""How cells of the feature table are painted: a line of tokens with their heat, a star, the
histogram of a feature's activations.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import cache

import numpy as np
from PySide6.QtCore import (
    QModelIndex,
    QObject,
    QPersistentModelIndex,
    QPoint,
    QPointF,
    QRect,
    QSize,
    Qt,
)
from PySide6.QtGui import QColor, QFont, QFontMetrics, QIcon, QPainter, QPixmap, QPolygonF
from PySide6.QtWidgets import QStyle, QStyledItemDelegate, QStyleOptionViewItem, QWidget

from mistudio.ui.features.reader import Snippet
from mistudio.ui.theme import fonts, icons, tokens
from mistudio.ui.widgets.token_strip import Arrangement, arrange_tokens, paint_tokens

Index = QModelIndex | QPersistentModelIndex

ROW_HEIGHT = 38
SNIPPET_ROLE = Qt.ItemDataRole.UserRole + 1
STAR_ROLE = Qt.ItemDataRole.UserRole + 3
CELL_ROLE = Qt.ItemDataRole.UserRole + 5  # (text, font, colour, alignment)
HISTOGRAM_ROLE = Qt.ItemDataRole.UserRole + 4


_SELECTED, _HOVERED = QColor(tokens.SELECTION), QColor(tokens.TILE)
_TEXT = QColor(tokens.TEXT)


def paint_behind(painter: QPainter, option: QStyleOptionViewItem) -> None:
    """What is behind a cell. Asking the style for it costs more than all the rest of a cell."""
    state = option.state.value
    if state & QStyle.StateFlag.State_Selected.value:
        painter.fillRect(option.rect, _SELECTED)
    elif state & QStyle.StateFlag.State_MouseOver.value:
        painter.fillRect(option.rect, _HOVERED)


class TextDelegate(QStyledItemDelegate):
    """Plain cells in one line, cut with … where they have no room."""

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._plain = fonts.sans(tokens.TEXT_BODY)
        self._metrics: dict[int, QFontMetrics] = {}  # of the table's fonts, which outlive this

    def paint(self, painter: QPainter, option: QStyleOptionViewItem, index: Index) -> None:
        paint_behind(painter, option)
        found = index.data(CELL_ROLE)  # all at once: each question costs as much as the answer
        if found is None or not found[0]:
            return
        text, font, colour, alignment = found
        font = font or self._plain
        metrics = self._metrics.get(id(font))
        if metrics is None:
            metrics = self._metrics[id(font)] = QFontMetrics(font)
        cell = option.rect.adjusted(8, 0, -8, 0)
        painter.setFont(font)
        painter.setPen(colour or _TEXT)
        painter.drawText(
            cell, alignment, metrics.elidedText(text, Qt.TextElideMode.ElideRight, cell.width())
        )

    def sizeHint(self, option: QStyleOptionViewItem, index: Index) -> QSize:
        return QSize(120, ROW_HEIGHT)


class TokenDelegate(QStyledItemDelegate):
    """Paints a snippet's tokens with their heat in one line, the strongest one in sight."""

    def __init__(self, colour_map: str, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.colour_map = colour_map
        self._font: QFont = fonts.mono(tokens.TEXT_SMALL)
        self._arrangements: OrderedDict[Snippet, Arrangement] = OrderedDict()

    def paint(self, painter: QPainter, option: QStyleOptionViewItem, index: Index) -> None:
        paint_behind(painter, option)
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
        paint_behind(painter, option)
        on = bool(index.data(STAR_ROLE))
        picture = star_pixmap(on, option.widget)
        side = 18
        corner = option.rect.center() - QPoint(side // 2, side // 2)
        painter.drawPixmap(QRect(corner, QSize(side, side)), picture)

    def sizeHint(self, option: QStyleOptionViewItem, index: Index) -> QSize:
        return QSize(52, ROW_HEIGHT)


class SparklineDelegate(QStyledItemDelegate):
    """A feature's histogram of activations, 32 bars from 1/256 of its maximum to the maximum.

    Heights are square roots of counts: the tail, which is what tells features apart, stays in
    sight beside the peak."""

    def paint(self, painter: QPainter, option: QStyleOptionViewItem, index: Index) -> None:
        paint_behind(painter, option)
        counts = index.data(HISTOGRAM_ROLE)
        if counts is None:
            return
        cell = option.rect.adjusted(10, 6, -10, -6)
        painter.fillRect(cell.left(), cell.bottom(), cell.width(), 1, QColor(tokens.HANDLE))
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(QColor(tokens.EMERALD))
        painter.drawRects(bars(counts, cell))

    def sizeHint(self, option: QStyleOptionViewItem, index: Index) -> QSize:
        return QSize(128, ROW_HEIGHT)


BARS = 32


def bars(counts: np.ndarray, cell: QRect) -> list[QRect]:
    """The bars of a histogram [64] in a cell; nothing for a feature that never fired."""
    shown = counts[-BARS:].astype(np.float64)
    shown[0] += counts[:-BARS].sum()
    most = shown.max(initial=0.0)
    if most <= 0:
        return []
    heights = np.ceil(np.sqrt(shown / most) * (cell.height() - 1)).astype(int).tolist()
    wide = cell.width() / BARS
    edges = [cell.left() + round(place * wide) for place in range(BARS + 1)]
    gap = 1 if wide >= 3 else 0
    bottom = cell.bottom()
    return [
        QRect(edges[i], bottom - high, max(edges[i + 1] - edges[i] - gap, 1), high)
        for i, high in enumerate(heights)
        if high
    ]


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
