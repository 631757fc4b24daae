"""The map as a widget: tens of thousands of points that pan, zoom and can be lassoed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PySide6.QtCore import QEvent, QPoint, QPointF, QRectF, QSize, Qt, Signal
from PySide6.QtGui import (
    QColor,
    QFont,
    QImage,
    QKeyEvent,
    QMouseEvent,
    QPainter,
    QPaintEvent,
    QPen,
    QPolygonF,
    QResizeEvent,
    QWheelEvent,
)
from PySide6.QtWidgets import QSizePolicy, QToolTip, QWidget

from mistudio.ui.features.pictures.raster import Canvas, inside, softened
from mistudio.ui.theme import fonts, tokens

PAN, LASSO, RECTANGLE = "pan", "lasso", "rectangle"
REPLACE, ADD, REMOVE = "replace", "add", "remove"
REACH = 12  # pixels from the pointer within which a point is meant
CLICK = 4  # pixels that a click may move
RINGED = 2000  # marked points that get a ring of their own; more would only be rings
FAINT, CHOSEN, STARRED = 0xFF2A3648, 0xFFF1F5F9, 0xFFFACC15
MARGIN = 28  # pixels around all points


@dataclass(frozen=True)
class View:
    """What is looked at: the point of the map in the middle, and pixels a unit."""

    x: float
    y: float
    scale: float


@dataclass(frozen=True)
class Caption:
    """A text at a place of the map."""

    text: str
    x: float
    y: float


class PointMap(QWidget):
    """Points by number. Drag pans, the wheel zooms; in the modes lasso and rectangle, or with
    Shift, a drag encloses points. With Ctrl they are added to those chosen, with Alt taken out.
    Arrow keys go from point to point, with Ctrl they pan."""

    clicked = Signal(int)
    """A point, by its feature."""
    enclosed = Signal(object, str)
    """int32 features, and whether they replace, add to or leave what was chosen."""
    pointed = Signal(int)
    """The feature under the pointer or reached by keys; -1 where none is."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("point_map")
        self.setAccessibleName("Map of features")
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setMouseTracking(True)
        self.setMinimumSize(320, 240)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Expanding)
        self.mode = PAN
        self.tip: Callable[[int], str] = lambda feature: f"#{feature}"
        self.features = np.empty(0, np.int32)
        self._x = self._y = np.empty(0, np.float32)
        self._shades = np.empty(0, np.uint8)
        self._palette = np.full(256, 0xFF60A5FA, np.uint32)
        self._soft = self._faint = self._palette
        self._kept = np.empty(0, bool)
        self._chosen = self._starred = np.empty(0, bool)
        self._captions: Sequence[Caption] = ()
        self._view: View | None = None
        self._canvas = Canvas(1, 1)
        self._current = -1  # index of the point that is pointed at
        self._pressed: QPointF | None = None
        self._pressed_view: View | None = None
        self._path: list[QPointF] = []
        self._enclosing = ""
        self._set_soft()

    def sizeHint(self) -> QSize:
        return QSize(900, 560)

    # --- what is shown --------------------------------------------------------------------------

    def set_points(self, features: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        """Numbers and places [n]; all of it comes into view."""
        # Drawn in an order that means nothing: else one colour would lie over the others.
        order = np.random.default_rng(0).permutation(len(features))
        self.features = np.asarray(features, np.int32)[order]
        self._x = np.asarray(x, np.float32)[order]
        self._y = np.asarray(y, np.float32)[order]
        n = len(order)
        self._shades = np.zeros(n, np.uint8)
        self._kept = np.ones(n, bool)
        self._chosen = self._starred = np.zeros(n, bool)
        self._captions = ()
        self._current, self._view = -1, None
        self.update()

    def set_colours(self, shades: np.ndarray, palette: np.ndarray) -> None:
        """`shades` uint8 by feature number, `palette` uint32 [256] by shade."""
        self._shades = np.asarray(shades)[self.features]
        self._palette = np.asarray(palette, np.uint32)
        self._set_soft()
        self.update()

    def set_marks(self, kept: np.ndarray, chosen: np.ndarray, starred: np.ndarray) -> None:
        """Bool by feature number each: those not `kept` are faint; a ring is around those
        `chosen`, a diamond around those `starred`."""
        self._kept = np.asarray(kept, bool)[self.features]
        self._chosen = np.asarray(chosen, bool)[self.features]
        self._starred = np.asarray(starred, bool)[self.features]
        self.update()

    def set_captions(self, captions: Sequence[Caption]) -> None:
        self._captions = tuple(captions)
        self.update()

    def _set_soft(self) -> None:
        ground = self._ground()
        self._soft = softened(self._palette, ground)
        self._faint = softened(np.array([FAINT], np.uint32), ground)

    @staticmethod
    def _ground() -> int:
        return 0xFF000000 | int(tokens.CARD[1:], 16)

    # --- looking --------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        if self._view is None:
            self._view = self._whole()
        return self._view

    def set_view(self, view: View) -> None:
        self._view = view
        self.update()

    def show_all(self) -> None:
        self._view = None
        self.update()

    def zoom(self, factor: float, at: QPointF | None = None) -> None:
        """Bring it closer by a factor; what is at `at` stays there."""
        at = at or QPointF(self.width() / 2, self.height() / 2)
        x, y = self.to_map(at)
        whole = self._whole().scale
        scale = min(max(self.view.scale * factor, whole / 4), whole * 2000)
        dx, dy = at.x() - self.width() / 2, at.y() - self.height() / 2
        self.set_view(View(x - dx / scale, y + dy / scale, scale))

    def pan(self, dx: float, dy: float) -> None:
        """Move the picture by pixels."""
        view = self.view
        self.set_view(View(view.x - dx / view.scale, view.y + dy / view.scale, view.scale))

    def _whole(self) -> View:
        if not len(self._x):
            return View(0.0, 0.0, 1.0)
        low_x, high_x = float(self._x.min()), float(self._x.max())
        low_y, high_y = float(self._y.min()), float(self._y.max())
        room_x = max(self.width() - 2 * MARGIN, 10)
        room_y = max(self.height() - 2 * MARGIN, 10)
        scale = min(room_x / max(high_x - low_x, 1e-6), room_y / max(high_y - low_y, 1e-6))
        return View((low_x + high_x) / 2, (low_y + high_y) / 2, scale)

    def to_map(self, place: QPointF) -> tuple[float, float]:
        view = self.view
        x = view.x + (place.x() - self.width() / 2) / view.scale
        return x, view.y - (place.y() - self.height() / 2) / view.scale

    def to_screen(self, x: float, y: float) -> QPointF:
        view = self.view
        return QPointF(
            self.width() / 2 + (x - view.x) * view.scale,
            self.height() / 2 - (y - view.y) * view.scale,
        )

    def _screen(self, ratio: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n] each: where every point is, in pixels."""
        view = self.view
        scale = np.float32(view.scale * ratio)
        x = (self._x - np.float32(view.x)) * scale + np.float32(self.width() * ratio / 2)
        y = (np.float32(view.y) - self._y) * scale + np.float32(self.height() * ratio / 2)
        return x, y

    # --- painting -------------------------------------------------------------------------------

    def draw(self) -> Canvas:
        """The points as pixels; what a frame costs, apart from showing it."""
        ratio = self.devicePixelRatioF()
        width, height = round(self.width() * ratio), round(self.height() * ratio)
        if (self._canvas.width, self._canvas.height) != (width, height):
            self._canvas = Canvas(width, height)
        canvas = self._canvas
        canvas.clear(self._ground())
        x, y = self._screen(ratio)
        seen, pixels = canvas.place(x, y)
        r = radius(len(seen)) * ratio
        kept = self._kept[seen]
        if not kept.all():
            faint = pixels[~kept]
            colour = np.full(len(faint), FAINT, np.uint32)
            canvas.discs(faint, colour, np.full(len(faint), self._faint[0], np.uint32), r)
            seen, pixels = seen[kept], pixels[kept]
        shades = self._shades[seen]
        canvas.discs(pixels, self._palette[shades], self._soft[shades], r)
        for marked, ring_colour, corners in (
            (self._starred[seen], STARRED, True),
            (self._chosen[seen], CHOSEN, False),
        ):
            if 0 < np.count_nonzero(marked) <= RINGED:
                canvas.rings(
                    pixels[marked], ring_colour, r + (3.5 if corners else 2) * ratio, corners
                )
        return canvas

    def paintEvent(self, event: QPaintEvent) -> None:
        canvas = self.draw()
        image = QImage(
            canvas.pixels.data,
            canvas.pixels.shape[1],
            canvas.pixels.shape[0],
            canvas.stride * 4,
            QImage.Format.Format_RGB32,
        )
        pad = (canvas.stride - canvas.width) // 2
        painter = QPainter(self)
        painter.drawImage(QRectF(self.rect()), image, QRectF(pad, pad, canvas.width, canvas.height))
        self._paint_captions(painter)
        self._paint_path(painter)
        if 0 <= self._current < len(self._x):
            place = self.to_screen(float(self._x[self._current]), float(self._y[self._current]))
            painter.setRenderHint(QPainter.RenderHint.Antialiasing)
            painter.setPen(QPen(QColor(tokens.WHITE), 2))
            painter.drawEllipse(place, 9, 9)
        if self.hasFocus():
            painter.setRenderHint(QPainter.RenderHint.Antialiasing, False)
            painter.setPen(QPen(QColor(tokens.FOCUS), 2))
            painter.setBrush(Qt.BrushStyle.NoBrush)
            painter.drawRect(self.rect().adjusted(1, 1, -1, -1))

    def _paint_captions(self, painter: QPainter) -> None:
        painter.setFont(fonts.sans(tokens.TEXT_SMALL, QFont.Weight.DemiBold))
        metrics = painter.fontMetrics()
        taken: list[QRectF] = []
        for caption in self._captions:
            place = self.to_screen(caption.x, caption.y)
            box = QRectF(metrics.boundingRect(caption.text)).adjusted(-4, -1, 4, 1)
            box.moveCenter(place)
            if not self.rect().contains(place.toPoint()) or any(box.intersects(b) for b in taken):
                continue
            taken.append(box)
            painter.fillRect(box, QColor(8, 14, 32, 190))
            painter.setPen(QColor(tokens.TEXT))
            painter.drawText(box, Qt.AlignmentFlag.AlignCenter, caption.text)

    def _paint_path(self, painter: QPainter) -> None:
        if len(self._path) < 2:
            return
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        painter.setPen(QPen(QColor(tokens.EMERALD), 2, Qt.PenStyle.DashLine))
        painter.setBrush(QColor(52, 211, 153, 40))
        painter.drawPolygon(QPolygonF(self._path))

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        self.update()

    # --- choosing -------------------------------------------------------------------------------

    def enclose(self, path: Sequence[tuple[float, float]]) -> np.ndarray:
        """int32: the features inside a polygon in pixels of the widget, ascending, faint or not."""
        x, y = self._screen()
        found = inside(x, y, np.asarray(path, np.float64).reshape(-1, 2))
        return np.sort(self.features[found])

    def nearest(self, place: QPointF, reach: float = REACH) -> int:
        """The index of the point closest to a place; -1 where none is within reach."""
        if not len(self._x):
            return -1
        x, y = self._screen()
        apart = (x - np.float32(place.x())) ** 2 + (y - np.float32(place.y())) ** 2
        # What is faint is meant only where nothing else is near.
        apart = np.where(self._kept, apart, apart + np.float32(reach * reach / 2))
        best = int(np.argmin(apart))
        return best if apart[best] <= reach * reach else -1

    @property
    def current(self) -> int:
        """The feature that is pointed at, -1 where none is."""
        return int(self.features[self._current]) if self._current >= 0 else -1

    def _point_at(self, index: int) -> None:
        if index == self._current:
            return
        self._current = index
        feature = self.current
        self.setAccessibleDescription(self.tip(feature) if feature >= 0 else "")
        self.pointed.emit(feature)
        self.update()

    def show_tip(self) -> None:
        """The text of the point that is pointed at, beside it."""
        if self._current < 0:
            QToolTip.hideText()
            return
        place = self.to_screen(float(self._x[self._current]), float(self._y[self._current]))
        self.setAccessibleDescription(self.tip(self.current))
        QToolTip.showText(
            self.mapToGlobal(place.toPoint() + QPoint(12, 8)), self.tip(self.current), self
        )

    # --- the pointer ----------------------------------------------------------------------------

    def mousePressEvent(self, event: QMouseEvent) -> None:
        if event.button() != Qt.MouseButton.LeftButton:
            return
        self._pressed, self._pressed_view = event.position(), self.view
        shift = bool(event.modifiers() & Qt.KeyboardModifier.ShiftModifier)
        self._enclosing = self.mode if self.mode != PAN else LASSO if shift else ""
        self._path = [event.position()] if self._enclosing else []

    def mouseMoveEvent(self, event: QMouseEvent) -> None:
        place = event.position()
        if self._pressed is None:
            self._point_at(self.nearest(place))
            self.show_tip()
            return
        moved = place - self._pressed
        if self._enclosing == LASSO:
            if (place - self._path[-1]).manhattanLength() >= 3:
                self._path.append(place)
        elif self._enclosing == RECTANGLE:
            a, b = self._pressed, place
            self._path = [a, QPointF(b.x(), a.y()), b, QPointF(a.x(), b.y())]
        elif self._pressed_view is not None and moved.manhattanLength() > CLICK:
            view = self._pressed_view
            self._view = View(
                view.x - moved.x() / view.scale, view.y + moved.y() / view.scale, view.scale
            )
            self.setCursor(Qt.CursorShape.ClosedHandCursor)
        self.update()

    def mouseReleaseEvent(self, event: QMouseEvent) -> None:
        if event.button() != Qt.MouseButton.LeftButton or self._pressed is None:
            return
        moved = (event.position() - self._pressed).manhattanLength()
        path, self._path = self._path, []
        self._pressed = None
        self.unsetCursor()
        self.update()
        if moved <= CLICK and len(path) < 8:
            index = self.nearest(event.position())
            if index >= 0:
                self.clicked.emit(int(self.features[index]))
        elif len(path) >= 3:
            found = self.enclose([(place.x(), place.y()) for place in path])
            self.enclosed.emit(found, way(event.modifiers()))

    def leaveEvent(self, event: QEvent) -> None:
        self._point_at(-1)
        super().leaveEvent(event)

    def wheelEvent(self, event: QWheelEvent) -> None:
        self.zoom(math.exp(event.angleDelta().y() / 480), event.position())
        event.accept()

    # --- keys -----------------------------------------------------------------------------------

    def keyPressEvent(self, event: QKeyEvent) -> None:
        key = event.key()
        step = {
            Qt.Key.Key_Left: (-1, 0),
            Qt.Key.Key_Right: (1, 0),
            Qt.Key.Key_Up: (0, -1),
            Qt.Key.Key_Down: (0, 1),
        }.get(key)
        if step and event.modifiers() & Qt.KeyboardModifier.ControlModifier:
            self.pan(-60 * step[0], -60 * step[1])
        elif step:
            self._point_at(self._next(*step))
            self.show_tip()
        elif key in (Qt.Key.Key_Plus, Qt.Key.Key_Equal):
            self.zoom(1.4)
        elif key == Qt.Key.Key_Minus:
            self.zoom(1 / 1.4)
        elif key in (Qt.Key.Key_Home, Qt.Key.Key_0):
            self.show_all()
        elif key in (Qt.Key.Key_Return, Qt.Key.Key_Enter) and self._current >= 0:
            self.clicked.emit(self.current)
        elif key == Qt.Key.Key_Escape and self._pressed is not None:
            self._pressed, self._path = None, []
            self.update()
        else:
            super().keyPressEvent(event)

    def _next(self, dx: int, dy: int) -> int:
        """The nearest kept point in this direction (within 45 degrees) of the current one, else
        of the middle."""
        if not self._kept.any():
            return -1
        x, y = self._screen()
        if self._current >= 0:
            from_x, from_y = float(x[self._current]), float(y[self._current])
        else:
            from_x, from_y, dx, dy = self.width() / 2, self.height() / 2, 0, 0
        along = (x - from_x) * dx + (y - from_y) * dy
        across = np.abs((x - from_x) * dy - (y - from_y) * dx)
        apart = (x - from_x) ** 2 + (y - from_y) ** 2
        allowed = self._kept & ((along > 0.5) & (across <= along) if dx or dy else True)
        if not allowed.any():
            return self._current
        return int(np.argmin(np.where(allowed, apart, np.inf)))


def radius(n: int) -> float:
    """Of a point in pixels, by how many can be seen."""
    for most, size in ((200, 5.0), (1000, 4.0), (4000, 3.0), (12_000, 2.5), (30_000, 2.0)):
        if n <= most:
            return size
    return 1.5


def way(modifiers: Qt.KeyboardModifier) -> str:
    if modifiers & Qt.KeyboardModifier.ControlModifier:
        return ADD
    return REMOVE if modifiers & Qt.KeyboardModifier.AltModifier else REPLACE
