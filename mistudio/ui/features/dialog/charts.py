"""Bars that are painted, not built of widgets: ranked rows, and counts by value."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PySide6.QtCore import QEvent, QPointF, QRect, QRectF, QSize, Qt, Signal
from PySide6.QtGui import (
    QColor,
    QFont,
    QFontMetrics,
    QHelpEvent,
    QKeyEvent,
    QMouseEvent,
    QPainter,
    QPaintEvent,
    QPen,
)
from PySide6.QtWidgets import QSizePolicy, QToolTip, QVBoxLayout, QWidget

from mistudio.ui.theme import fonts, tokens
from mistudio.ui.widgets import IconButton, Text, row
from mistudio.ui.widgets.chart_export import ExportedChart

ROW = 30
PLOT_HEIGHT = 176


@dataclass(frozen=True)
class BarRow:
    """`share` of the bar's whole length, 0..1. `note` stands behind the label, weaker."""

    label: str
    value: str
    share: float
    tip: str = ""
    note: str = ""


class BarList(QWidget):
    """Ranked rows: number, label, bar, value. Arrow keys walk over them; with `clickable` a click
    or Enter emits `chosen`."""

    chosen = Signal(int)

    def __init__(
        self,
        name: str,
        tone: str = "emerald",
        clickable: bool = False,
        mono: bool = True,
        label_share: float = 0.42,
        surface: str = tokens.DIALOG,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._name, self._clickable = name, clickable
        self._colour = QColor(tokens.TONES[tone][0])
        self._label_share, self._surface = label_share, surface
        self._label_font = fonts.mono(tokens.TEXT_SMALL) if mono else fonts.sans(tokens.TEXT_SMALL)
        self._font = fonts.mono(tokens.TEXT_SMALL)
        self._small = fonts.sans(tokens.TEXT_SMALL)
        self._rows: tuple[BarRow, ...] = ()
        self._current = self._hovered = -1
        self._row_height = fonts.px(ROW)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setMouseTracking(True)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setAccessibleName(name)

    @property
    def rows(self) -> tuple[BarRow, ...]:
        return self._rows

    def set_rows(self, rows: Sequence[BarRow]) -> None:
        self._rows = tuple(rows)
        self._current = self._hovered = -1
        self.setFixedHeight(max(1, len(self._rows)) * self._row_height)
        first = ", ".join(f"{r.label} {r.value}" for r in self._rows[:5])
        self.setAccessibleName(f"{self._name}: {first}" if first else self._name)
        self.update()

    def sizeHint(self) -> QSize:
        return QSize(320, max(1, len(self._rows)) * self._row_height)

    def minimumSizeHint(self) -> QSize:
        return QSize(220, self.sizeHint().height())

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        metrics = QFontMetrics(self._font)
        rank_width = metrics.horizontalAdvance(f"#{max(len(self._rows), 10)}") + 10
        value_width = max((metrics.horizontalAdvance(r.value) for r in self._rows), default=0) + 12
        label_width = round((self.width() - rank_width - value_width) * self._label_share)
        for number, entry in enumerate(self._rows):
            place = QRect(0, number * self._row_height, self.width(), self._row_height)
            if not place.intersects(event.rect()):
                continue
            if self._clickable and number == self._hovered:
                painter.setPen(Qt.PenStyle.NoPen)
                painter.setBrush(QColor(tokens.RAISED))
                painter.drawRoundedRect(place, 6, 6)
            left = place.left() + 6
            rank = QRect(left, place.top(), rank_width, place.height())
            self._text(painter, f"#{number + 1}", rank, tokens.HELPER, self._font)
            left += rank_width
            self._label(painter, entry, QRect(left, place.top(), label_width - 12, place.height()))
            bar = QRectF(
                left + label_width, place.center().y() - 3,
                self.width() - left - label_width - value_width - 4, 8,
            )  # fmt: skip
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(QColor(tokens.RAISED))
            painter.drawRoundedRect(bar, 4, 4)
            filled = QRectF(bar)
            filled.setWidth(max(bar.width() * min(max(entry.share, 0.0), 1.0), 2.0))
            painter.setBrush(self._colour)
            painter.drawRoundedRect(filled, 4, 4)
            value = QRect(self.width() - value_width - 2, place.top(), value_width, place.height())
            self._text(painter, entry.value, value, self._colour.name(), self._font, right=True)
            if self.hasFocus() and number == self._current:
                painter.setPen(QPen(QColor(tokens.FOCUS), 2))
                painter.setBrush(Qt.BrushStyle.NoBrush)
                painter.drawRoundedRect(place.adjusted(1, 1, -1, -1), 6, 6)
        if self.hasFocus() and self._current < 0:
            painter.setPen(QPen(QColor(tokens.FOCUS), 2))
            painter.setBrush(Qt.BrushStyle.NoBrush)
            painter.drawRoundedRect(self.rect().adjusted(1, 1, -1, -1), 6, 6)

    def _label(self, painter: QPainter, entry: BarRow, place: QRect) -> None:
        metrics = QFontMetrics(self._label_font)
        told = metrics.elidedText(entry.label, Qt.TextElideMode.ElideRight, place.width())
        self._text(painter, told, place, tokens.TEXT, self._label_font)
        used = metrics.horizontalAdvance(told) + 10
        if entry.note and place.width() - used > 60:
            rest = place.adjusted(used, 0, 0, 0)
            note = QFontMetrics(self._small).elidedText(
                entry.note, Qt.TextElideMode.ElideRight, rest.width()
            )
            self._text(painter, note, rest, tokens.HELPER, self._small)

    @staticmethod
    def _text(
        painter: QPainter, text: str, place: QRect, colour: str, font: QFont, right: bool = False
    ) -> None:
        painter.setFont(font)
        painter.setPen(QColor(colour))
        side = Qt.AlignmentFlag.AlignRight if right else Qt.AlignmentFlag.AlignLeft
        painter.drawText(place, side | Qt.AlignmentFlag.AlignVCenter, text)

    def row_at(self, y: float) -> int:
        number = int(y) // self._row_height
        return number if 0 <= number < len(self._rows) else -1

    def event(self, event: QEvent) -> bool:
        if event.type() == QEvent.Type.ToolTip:
            assert isinstance(event, QHelpEvent)
            number = self.row_at(event.pos().y())
            tip = self._rows[number].tip if number >= 0 else ""
            QToolTip.showText(event.globalPos(), tip, self)
            return True
        return super().event(event)

    def mouseMoveEvent(self, event: QMouseEvent) -> None:
        hovered = self.row_at(event.position().y())
        if self._clickable and hovered != self._hovered:
            self._hovered = hovered
            self.setCursor(
                Qt.CursorShape.PointingHandCursor if hovered >= 0 else Qt.CursorShape.ArrowCursor
            )
            self.update()

    def leaveEvent(self, event: QEvent) -> None:
        self._hovered = -1
        self.update()

    def mouseReleaseEvent(self, event: QMouseEvent) -> None:
        number = self.row_at(event.position().y())
        if event.button() == Qt.MouseButton.LeftButton and number >= 0:
            self._current = number
            self.update()
            if self._clickable:
                self.chosen.emit(number)

    def keyPressEvent(self, event: QKeyEvent) -> None:
        key = event.key()
        if key in (Qt.Key.Key_Down, Qt.Key.Key_Up) and self._rows:
            by = 1 if key == Qt.Key.Key_Down else -1
            number = min(max(self._current + by, 0), len(self._rows) - 1)
            if number == self._current:  # at an end: let the page scroll
                super().keyPressEvent(event)
                return
            self._current = number
            entry = self._rows[number]
            self.setAccessibleDescription(
                f"#{number + 1} {entry.label}: {entry.value}. {entry.tip}"
            )
            below = self.mapToGlobal(QPointF(40, (number + 1) * self._row_height)).toPoint()
            QToolTip.showText(below, entry.tip, self)
            self.update()
        elif key in (Qt.Key.Key_Return, Qt.Key.Key_Enter, Qt.Key.Key_Space):
            if self._clickable and self._current >= 0:
                self.chosen.emit(self._current)
        else:
            super().keyPressEvent(event)


class _Bars(QWidget):
    """The drawing of a histogram: counts upward, values to the right."""

    def __init__(self, name: str, surface: str) -> None:
        super().__init__()
        self._name, self._surface = name, surface
        self.edges = np.zeros(1)
        self.counts = np.zeros(0, np.int64)
        self._noun, self._colours = "", (tokens.EMERALD, tokens.EMERALD)
        self._log_values = self._log_counts = False
        self._format: Callable[[float], str] = str
        self._current = -1
        self._font = fonts.sans(tokens.TEXT_SMALL)
        self.setFixedHeight(fonts.px(PLOT_HEIGHT))
        self.setMinimumWidth(200)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setMouseTracking(True)
        self.setAccessibleName(name)

    def set_bars(
        self,
        edges: np.ndarray,
        counts: np.ndarray,
        noun: str,
        show: Callable[[float], str],
        log_values: bool,
        below_zero: str | None,
    ) -> None:
        self.edges, self.counts, self._noun, self._format = edges, counts, noun, show
        self._log_values, self._current = log_values, -1
        self._colours = (below_zero or tokens.EMERALD, tokens.EMERALD)
        n, low, high = int(counts.sum()), show(float(edges[0])), show(float(edges[-1]))
        self.setAccessibleName(f"{self._name}: {n:,} {noun} from {low} to {high}")
        self.update()

    def set_log_counts(self, on: bool) -> None:
        self._log_counts = on
        self.update()

    def _plot(self) -> QRect:
        metrics = QFontMetrics(self._font)
        left = max(metrics.horizontalAdvance(text) for _, text in self._ticks()) + 10
        return QRect(left, 8, self.width() - left - 6, self.height() - metrics.height() - 16)

    def _ticks(self) -> list[tuple[float, str]]:
        most = int(self.counts.max()) if len(self.counts) else 0
        if self._log_counts:
            top = max(1, math.ceil(math.log10(most))) if most > 1 else 1
            return [(10.0**i, f"{10**i:,}") for i in range(0, top + 1, max(1, -(-top // 3)))]
        return [(0, "0"), (most / 2, f"{most // 2:,}"), (most, f"{most:,}")] if most else [(0, "0")]

    def _share(self, count: float) -> float:
        most = float(self.counts.max()) if len(self.counts) else 0.0
        if most <= 0 or count <= 0:
            return 0.0
        if self._log_counts:
            top = max(1, math.ceil(math.log10(most))) if most > 1 else 1
            return max(0.02, math.log10(count) / top) if count >= 1 else 0.0
        return count / most

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        painter.setFont(self._font)
        plot = self._plot()
        line = QFontMetrics(self._font).height()
        for count, text in self._ticks():
            y = plot.bottom() - round(self._share(count) * plot.height())
            if self._log_counts and count == 1:
                y = plot.bottom()
            painter.setPen(QColor(tokens.RAISED))
            painter.drawLine(plot.left(), y, plot.right(), y)
            painter.setPen(QColor(tokens.HELPER))
            side = Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter
            painter.drawText(QRect(0, y - line // 2, plot.left() - 6, line), side, text)
        n = len(self.counts)
        if not n:
            return
        width = plot.width() / n
        painter.setPen(Qt.PenStyle.NoPen)
        for number, count in enumerate(self.counts.tolist()):
            if not count:
                continue
            height = max(self._share(count) * plot.height(), 2.0)
            middle = (self.edges[number] + self.edges[number + 1]) / 2
            painter.setBrush(QColor(self._colours[0] if middle < 0 else self._colours[1]))
            gap = 1.0 if width > 3 else 0.0
            painter.drawRect(
                QRectF(plot.left() + number * width, plot.bottom() - height, width - gap, height)
            )
        painter.setPen(QColor(tokens.HELPER))
        for place in (0.0, 0.5, 1.0):
            text = self._format(self._value_at(place))
            x = plot.left() + round(place * plot.width())
            wide = QFontMetrics(self._font).horizontalAdvance(text)
            x = min(max(x - wide // 2, 0), self.width() - wide)
            painter.drawText(x, self.height() - 4, text)
        if self._current >= 0:
            painter.setPen(QPen(QColor(tokens.TEXT), 1))
            painter.setBrush(Qt.BrushStyle.NoBrush)
            painter.drawRect(
                QRectF(plot.left() + self._current * width, plot.top(), width, plot.height())
            )
        if self.hasFocus():
            painter.setPen(QPen(QColor(tokens.FOCUS), 2))
            painter.setBrush(Qt.BrushStyle.NoBrush)
            painter.drawRoundedRect(self.rect().adjusted(1, 1, -1, -1), 6, 6)

    def _value_at(self, place: float) -> float:
        low, high = float(self.edges[0]), float(self.edges[-1])
        if self._log_values and low > 0:
            return math.exp(math.log(low) + place * (math.log(high) - math.log(low)))
        return low + place * (high - low)

    def describe(self, number: int) -> str:
        low, high = (self._format(float(self.edges[i])) for i in (number, number + 1))
        return f"{low} to {high}: {int(self.counts[number]):,} {self._noun}"

    def bar_at(self, x: float) -> int:
        plot = self._plot()
        if not len(self.counts) or not plot.left() <= x <= plot.right():
            return -1
        return min(int((x - plot.left()) / plot.width() * len(self.counts)), len(self.counts) - 1)

    def mouseMoveEvent(self, event: QMouseEvent) -> None:
        number = self.bar_at(event.position().x())
        if number != self._current:
            self._current = number
            self.update()
        if number >= 0:
            QToolTip.showText(event.globalPosition().toPoint(), self.describe(number), self)

    def leaveEvent(self, event: QEvent) -> None:
        self._current = -1
        self.update()

    def keyPressEvent(self, event: QKeyEvent) -> None:
        if event.key() in (Qt.Key.Key_Left, Qt.Key.Key_Right) and len(self.counts):
            by = 1 if event.key() == Qt.Key.Key_Right else -1
            self._current = min(max(self._current + by, 0), len(self.counts) - 1)
            told = self.describe(self._current)
            self.setAccessibleDescription(told)
            QToolTip.showText(self.mapToGlobal(self.rect().bottomLeft()), told, self)
            self.update()
        else:
            super().keyPressEvent(event)


class HistogramCard(ExportedChart):
    """A histogram with its title, its sample and a menu to take it along."""

    def __init__(
        self, title: str, surface: str = tokens.DIALOG, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self._title = title
        self._unit = ""
        self.bars = _Bars(title, surface)
        self.note = Text("", "helper", wrap=True)
        menu = IconButton("ellipsis", f"{title}: copy or save")
        menu.setPopupMode(menu.ToolButtonPopupMode.InstantPopup)
        menu.setMenu(self.export_menu())
        self.head = row(Text(title, "label"), None, menu)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        layout.addLayout(self.head)
        layout.addWidget(self.bars)
        layout.addWidget(self.note)

    def set_bars(
        self,
        edges: np.ndarray,
        counts: np.ndarray,
        noun: str,
        show: Callable[[float], str],
        *,
        unit: str,
        note: str,
        log_values: bool = False,
        below_zero: str | None = None,
    ) -> None:
        """`edges` [n + 1], `counts` [n] of `noun`s; bars of values under 0 in `below_zero`."""
        self._unit = unit
        self.note.setText(note)
        self.bars.set_bars(edges, counts, noun, show, log_values, below_zero)

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([f"{self._unit} from", f"{self._unit} to", "count"])
        for number, count in enumerate(self.bars.counts.tolist()):
            writer.writerow([self.bars.edges[number], self.bars.edges[number + 1], count])
        return text.getvalue()

    def drawing(self) -> QWidget:
        return self.bars
