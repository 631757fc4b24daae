"""A table of numbers as coloured cells that pan, zoom and tell what they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PySide6.QtCore import QEvent, QPoint, QPointF, QRectF, QSize, Qt, Signal
from PySide6.QtGui import (
    QBrush,
    QColor,
    QFontMetrics,
    QImage,
    QKeyEvent,
    QMouseEvent,
    QPainter,
    QPaintEvent,
    QPen,
    QWheelEvent,
)
from PySide6.QtWidgets import QSizePolicy, QToolTip, QWidget

from mistudio.ui.features.pictures.scales import Scale
from mistudio.ui.theme import fonts, tokens

CLICK = 4
LARGEST_CELL = 40.0
LABEL_ROOM = 200  # pixels at the left; labels that need more end in …
TOP = 12  # pixels above the cells, for half of the first label
HATCHED = 8.0  # a cell of this size shows the hatching of "no data"


@dataclass(frozen=True)
class Grid:
    """`values` float [rows, columns], NaN where there is no data, in the order they are drawn;
    `rows` and `columns` name them; `square`: cells are as wide as they are high."""

    values: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    scale: Scale
    row_title: str = ""
    column_title: str = ""
    square: bool = True


def shown_every(cell: float, need: float) -> int:
    """Every how manieth label has room, where each needs so many pixels."""
    return max(1, math.ceil(need / max(cell, 1e-6)))


class GridPicture(QWidget):
    """Drag pans, the wheel zooms, arrow keys move from cell to cell, Enter opens."""

    clicked = Signal(int, int)
    """A cell, by row and column."""
    pointed = Signal(int, int)
    """The cell under the pointer or reached by keys; -1, -1 where none is."""

    def __init__(self, name: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setAccessibleName(name)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setMouseTracking(True)
        self.setMinimumSize(320, 240)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Expanding)
        self.tip: Callable[[int, int], str] = lambda row, column: ""
        self.grid: Grid | None = None
        self._image = QImage()
        self._zoom = 1.0
        self._offset = QPointF(0, 0)
        self._current = (-1, -1)
        self._pressed: QPointF | None = None
        self._pressed_offset = QPointF(0, 0)

    def sizeHint(self) -> QSize:
        return QSize(900, 560)

    def set_grid(self, grid: Grid) -> None:
        same = self.grid is not None and self.grid.values.shape == grid.values.shape
        self.grid = grid
        shades = grid.scale.palette()[grid.scale.shades(grid.values)]
        self._image = picture_of(shades)
        if not same:
            self._zoom, self._offset, self._current = 1.0, QPointF(0, 0), (-1, -1)
        self.update()

    # --- where things are -----------------------------------------------------------------------

    def _gutters(self) -> tuple[float, float]:
        """Pixels at the left and at the bottom for labels."""
        if self.grid is None:
            return 0.0, 0.0
        metrics = _metrics()
        widest = max((metrics.horizontalAdvance(text) for text in self.grid.rows), default=0)
        names = max((metrics.horizontalAdvance(text) for text in self.grid.columns), default=0)
        bottom = min(names, 0.6 * LABEL_ROOM) + 12 + metrics.height()
        room = LABEL_ROOM
        if self.grid.square:  # what the cells leave beside them
            room = max(room, self.width() - (self.height() - round(bottom) - TOP) - 24)
        return min(widest, room) + 12, bottom

    def _cells(self) -> tuple[float, float]:
        """Width and height of a cell."""
        if self.grid is None:
            return 1.0, 1.0
        rows, columns = self.grid.values.shape
        left, bottom = self._gutters()
        wide = max(self.width() - left - 8, 10) / columns
        high = max(self.height() - bottom - TOP - 4, 10) / rows
        if self.grid.square:
            wide = high = min(wide, high, LARGEST_CELL)
        return min(wide, LARGEST_CELL) * self._zoom, min(high, LARGEST_CELL) * self._zoom

    def _area(self) -> QRectF:
        """Where cells are drawn."""
        left, bottom = self._gutters()
        width, height = self.width() - left - 4, self.height() - bottom - TOP
        return QRectF(left, TOP, max(width, 1), max(height, 1))

    def cell_at(self, place: QPointF) -> tuple[int, int]:
        """(row, column) at a place of the widget; (-1, -1) where there is none."""
        area = self._area()
        if self.grid is None or not area.contains(place):
            return -1, -1
        wide, high = self._cells()
        column = math.floor((place.x() - area.left() - self._offset.x()) / wide)
        row = math.floor((place.y() - area.top() - self._offset.y()) / high)
        rows, columns = self.grid.values.shape
        return (row, column) if 0 <= row < rows and 0 <= column < columns else (-1, -1)

    def rect_of(self, row: int, column: int) -> QRectF:
        area, (wide, high) = self._area(), self._cells()
        return QRectF(
            area.left() + self._offset.x() + column * wide,
            area.top() + self._offset.y() + row * high,
            wide,
            high,
        )

    def zoom(self, factor: float, at: QPointF | None = None) -> None:
        area = self._area()
        at = at or area.center()
        before = self._zoom
        self._zoom = min(max(before * factor, 1.0), 60.0)
        grown = self._zoom / before
        place = at - area.topLeft() - self._offset
        self._offset -= QPointF(place.x() * (grown - 1), place.y() * (grown - 1))
        self._keep_in_sight()

    def show_all(self) -> None:
        self._zoom, self._offset = 1.0, QPointF(0, 0)
        self.update()

    def _keep_in_sight(self) -> None:
        if self.grid is None:
            return
        area, (wide, high) = self._area(), self._cells()
        rows, columns = self.grid.values.shape
        x = min(0.0, max(self._offset.x(), area.width() - columns * wide))
        y = min(0.0, max(self._offset.y(), area.height() - rows * high))
        self._offset = QPointF(x, y)
        self.update()

    # --- painting -------------------------------------------------------------------------------

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        painter.fillRect(self.rect(), QColor(tokens.CARD))
        if self.grid is not None:
            self._paint_cells(painter)
            self._paint_labels(painter)
        if self.hasFocus():
            painter.setPen(QPen(QColor(tokens.FOCUS), 2))
            painter.drawRect(self.rect().adjusted(1, 1, -1, -1))

    def _paint_cells(self, painter: QPainter) -> None:
        assert self.grid is not None
        area, (wide, high) = self._area(), self._cells()
        rows, columns = self.grid.values.shape
        painter.save()
        painter.setClipRect(area)
        corner = area.topLeft() + self._offset
        painter.drawImage(QRectF(corner.x(), corner.y(), columns * wide, rows * high), self._image)
        if min(wide, high) >= HATCHED:
            brush = QBrush(QColor(tokens.CARD), Qt.BrushStyle.BDiagPattern)
            for row, column in np.argwhere(~np.isfinite(self.grid.values)).tolist():
                painter.fillRect(self.rect_of(row, column), brush)
        row, column = self._current
        if row >= 0:
            painter.setPen(QPen(QColor(tokens.WHITE), 2))
            painter.drawRect(self.rect_of(row, column).adjusted(-1, -1, 1, 1))
        painter.restore()

    def _paint_labels(self, painter: QPainter) -> None:
        assert self.grid is not None
        grid, area = self.grid, self._area()
        wide, high = self._cells()
        painter.setFont(fonts.sans(tokens.TEXT_SMALL))
        metrics = painter.fontMetrics()
        line = metrics.height()
        elide = Qt.TextElideMode.ElideRight
        here_row, here_column = self._current
        painter.save()
        painter.setClipRect(QRectF(0, 0, area.left(), area.bottom()))
        for row in self._labelled(len(grid.rows), shown_every(high, line), here_row):
            middle = self.rect_of(row, 0).center().y()
            text = metrics.elidedText(grid.rows[row], elide, round(area.left()) - 12)
            painter.setPen(QColor(tokens.TEXT if row == here_row else tokens.HELPER))
            box = QRectF(4, middle - line / 2, area.left() - 10, line)
            painter.drawText(box, Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter, text)
        painter.restore()
        bottom = min(area.bottom(), self.rect_of(len(grid.rows) - 1, 0).bottom()) + 4
        room = round(self.height() - area.bottom() - line - 8)
        painter.save()
        painter.setClipRect(QRectF(area.left() - TOP, bottom, area.width() + TOP, self.height()))
        for column in self._labelled(len(grid.columns), shown_every(wide, line), here_column):
            painter.save()
            painter.translate(self.rect_of(0, column).center().x(), bottom)
            painter.rotate(-90)
            painter.setPen(QColor(tokens.TEXT if column == here_column else tokens.HELPER))
            text = metrics.elidedText(grid.columns[column], elide, room)
            box = QRectF(-room, -line / 2, room, line)
            painter.drawText(box, Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter, text)
            painter.restore()
        painter.restore()
        painter.setPen(QColor(tokens.LABEL))
        place = QRectF(area.left(), bottom + room + 4, area.width(), line)
        painter.drawText(place, Qt.AlignmentFlag.AlignLeft, grid.column_title)

    @staticmethod
    def _labelled(n: int, every: int, here: int) -> list[int]:
        """Which rows or columns get their label: every so manieth, and the one that is pointed at
        in place of those that would touch it."""
        chosen = list(range(0, n, every))
        if here >= 0:
            chosen = [i for i in chosen if abs(i - here) >= every] + [here]
        return chosen

    # --- pointing -------------------------------------------------------------------------------

    def _point_at(self, cell: tuple[int, int]) -> None:
        if cell == self._current:
            return
        self._current = cell
        self.setAccessibleDescription(self.tip(*cell) if cell[0] >= 0 else "")
        self.pointed.emit(*cell)
        self.update()

    def show_tip(self) -> None:
        if self._current[0] < 0:
            QToolTip.hideText()
            return
        place = self.rect_of(*self._current).bottomRight().toPoint() + QPoint(10, 6)
        text = self.tip(*self._current)
        self.setAccessibleDescription(text)
        QToolTip.showText(self.mapToGlobal(place), text, self)

    def mousePressEvent(self, event: QMouseEvent) -> None:
        if event.button() == Qt.MouseButton.LeftButton:
            self._pressed, self._pressed_offset = event.position(), QPointF(self._offset)

    def mouseMoveEvent(self, event: QMouseEvent) -> None:
        if self._pressed is not None:
            moved = event.position() - self._pressed
            if moved.manhattanLength() > CLICK:
                self._offset = self._pressed_offset + moved
                self._keep_in_sight()
            return
        self._point_at(self.cell_at(event.position()))
        self.show_tip()

    def mouseReleaseEvent(self, event: QMouseEvent) -> None:
        if event.button() != Qt.MouseButton.LeftButton or self._pressed is None:
            return
        moved = (event.position() - self._pressed).manhattanLength()
        self._pressed = None
        cell = self.cell_at(event.position())
        if moved <= CLICK and cell[0] >= 0:
            self.clicked.emit(*cell)

    def leaveEvent(self, event: QEvent) -> None:
        self._point_at((-1, -1))
        super().leaveEvent(event)

    def wheelEvent(self, event: QWheelEvent) -> None:
        self.zoom(math.exp(event.angleDelta().y() / 480), event.position())
        event.accept()

    def keyPressEvent(self, event: QKeyEvent) -> None:
        key = event.key()
        step = {
            Qt.Key.Key_Left: (0, -1),
            Qt.Key.Key_Right: (0, 1),
            Qt.Key.Key_Up: (-1, 0),
            Qt.Key.Key_Down: (1, 0),
        }.get(key)
        if step and self.grid is not None:
            rows, columns = self.grid.values.shape
            row, column = self._current if self._current[0] >= 0 else (-step[0], -step[1])
            cell = (
                min(max(row + step[0], 0), rows - 1),
                min(max(column + step[1], 0), columns - 1),
            )
            self._bring_into_sight(*cell)
            self._point_at(cell)
            self.show_tip()
        elif key in (Qt.Key.Key_Plus, Qt.Key.Key_Equal):
            self.zoom(1.4)
        elif key == Qt.Key.Key_Minus:
            self.zoom(1 / 1.4)
        elif key in (Qt.Key.Key_Home, Qt.Key.Key_0):
            self.show_all()
        elif key in (Qt.Key.Key_Return, Qt.Key.Key_Enter) and self._current[0] >= 0:
            self.clicked.emit(*self._current)
        else:
            super().keyPressEvent(event)

    def _bring_into_sight(self, row: int, column: int) -> None:
        area, cell = self._area(), self.rect_of(row, column)
        dx = max(area.left() - cell.left(), 0) - max(cell.right() - area.right(), 0)
        dy = max(area.top() - cell.top(), 0) - max(cell.bottom() - area.bottom(), 0)
        self._offset += QPointF(dx, dy)
        self._keep_in_sight()


def picture_of(colours: np.ndarray) -> QImage:
    """One pixel a cell, of uint32 [rows, columns] 0xffRRGGBB."""
    table = np.ascontiguousarray(colours, np.uint32)
    high, wide = table.shape
    return QImage(table.data, wide, high, wide * 4, QImage.Format.Format_RGB32).copy()


def _metrics() -> QFontMetrics:
    return QFontMetrics(fonts.sans(tokens.TEXT_SMALL))
