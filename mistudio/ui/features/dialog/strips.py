"""One window of text with the heat of a feature, its place and what can be done with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from PySide6.QtCore import QEvent, QSize, Qt, Signal
from PySide6.QtGui import (
    QColor,
    QFont,
    QFontMetrics,
    QKeyEvent,
    QKeySequence,
    QPainter,
    QPaintEvent,
    QPen,
)
from PySide6.QtWidgets import QApplication, QWidget

from mistudio import formatting
from mistudio.ui.features.dialog.reading import Line, Shown
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import ElidedLabel, IconButton, Surface, Text, TokenStrip, row
from mistudio.ui.widgets.token_strip import Arrangement, shown

# Of `widgets.token_strip`.
PAD_X, PAD_Y, LINE_GAP = 2, 3, 3
MOST_WIDTHS = 100_000
TOOLS_WIDTH = 84  # of an example's buttons


class LineStrip(TokenStrip):
    """Spans of whole characters; the tooltip tells every token of a span, and where an activation
    is not known it says so. A peak without heat is framed."""

    def __init__(
        self,
        colour_map: str,
        surface: str = tokens.DIALOG_ROW,
        chips: bool = False,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(surface, colour_map, chips, parent)
        self.line: Line | None = None
        self._first = 0
        self._framed = -1
        self._layouts: dict[int, Arrangement] = {}
        self._advances: list[int] = []
        self._metrics, self._widths = _measured(self._font.toString())
        self._line_height = self._metrics.height() + 2 * PAD_Y

    def _arranged(self, width: int) -> Arrangement:
        if width not in self._layouts:
            self._layouts[width] = super()._arranged(width)
        return self._layouts[width]

    def _advance(self, text: str) -> int:
        """Pixels of a token with the room around it."""
        if text not in self._widths:
            if len(self._widths) > MOST_WIDTHS:
                self._widths.clear()
            self._widths[text] = self._metrics.horizontalAdvance(shown(text)) + 2 * PAD_X
        return self._widths[text]

    def heightForWidth(self, width: int) -> int:
        """As it is arranged, by widths that are measured once a text: layouts ask for many."""
        room, lines, x = max(width, 1), 1, 0
        for advance in self._advances:
            if x and x + min(advance, room) > room:
                x, lines = 0, lines + 1
            x += min(advance, room)
        return lines * (self._line_height + LINE_GAP) - LINE_GAP

    def sizeHint(self) -> QSize:
        width = max(self.width(), 320)
        return QSize(320, self.heightForWidth(width))

    def resizeEvent(self, event: QEvent) -> None:
        super().resizeEvent(event)
        self._arrangement = self._layouts.get(self.width())

    def set_line(self, line: Line, maximum: float, zoom: int = 0) -> None:
        """`zoom` tokens on each side of the peak; 0 shows all."""
        self.line = line
        first, last = line.around(zoom)
        self._first = first
        self._layouts.clear()
        known = [value if value == value else 0.0 for value in line.activations[first:last]]
        self._advances = [self._advance(text) for text in line.texts[first:last]]
        self.set_tokens(line.texts[first:last], known, maximum)
        peak = line.peak - first
        silent = 0 <= peak < len(known) and known[peak] <= 0
        self._framed = peak if silent else -1

    def describe(self, index: int) -> str:
        if self.line is None:
            return super().describe(index)
        ids = self.line.ids[self._first + index]
        value = self.line.activations[self._first + index]
        one = len(ids) == 1
        lines = [f"Token {shown(self.line.texts[self._first + index])!r}"]
        if not one:
            lines[0] = f"Character {self.line.texts[self._first + index]!r}, {len(ids)} tokens"
        lines.append(f"Token ID{'' if one else 's'}: {', '.join(str(i) for i in ids)}")
        lines.append(f"Activation: {value:.4f}" if value == value else "Activation: not stored")
        return "\n".join(lines)

    def paintEvent(self, event: QPaintEvent) -> None:
        super().paintEvent(event)
        if self._framed >= 0 and self._arrangement is not None:
            painter = QPainter(self)
            painter.setPen(QPen(QColor(tokens.YELLOW), 1, Qt.PenStyle.DashLine))
            place = self._arrangement.rects[self._framed]
            painter.drawRoundedRect(place.adjusted(0, 1, -1, -1), 3, 3)


@cache
def _measured(font: str) -> tuple[QFontMetrics, dict[str, int]]:
    """(metrics, widths of texts by now) of a font by its description."""
    made = QFont()
    made.fromString(font)
    return QFontMetrics(made), {}


class ExampleView(Surface):
    """One example. Up and down go to its neighbours; Ctrl+C copies it."""

    wants_test = Signal(str)
    moved = Signal(int)

    def __init__(
        self,
        number: int,
        example: Shown,
        maximum: float,
        zoom: int,
        colour_map: str,
        describe: Callable[[Shown], str],
    ) -> None:
        super().__init__("row", None, 10)
        self.body.setSpacing(4)
        self.number, self.example = number, example
        self._maximum, self._zoom = maximum, zoom
        self._describe = describe
        self.strip = LineStrip(colour_map)
        self.strength = Text(self._told(), "label")
        self.source = ElidedLabel(f"Source: {example.source}", "helper")
        self.source.setAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
        self._head = row(self.strength, self.source, TOOLS_WIDTH, spacing=8)
        self._head.setStretch(1, 1)
        self.add(self._head)
        self.add(self.strip)
        self._show()

    def add_tools(self) -> None:
        """Its buttons; they come after the first painting, into room that is kept for them."""
        if self._head.count() > 3:
            return
        self._head.takeAt(2)
        try_it = IconButton("flask-conical", f"Put example {self.number} into your own text",
                            size=16)  # fmt: skip
        try_it.clicked.connect(self._on_try_clicked)
        copy = IconButton("copy", f"Copy example {self.number}", size=16)
        copy.clicked.connect(self._on_copy_clicked)
        self._head.addWidget(try_it)
        self._head.addWidget(copy)
        self.setTabOrder(try_it, copy)
        self.setTabOrder(copy, self.strip)

    def show_zoom(self, zoom: int) -> None:
        self._zoom = zoom
        self._show()

    def show_example(self, example: Shown) -> None:
        """The same window, of which more is known now."""
        self.example = example
        self.strength.setText(self._told())
        self._show()

    def _told(self) -> str:
        return f"Example #{self.number}   {self._describe(self.example)}"

    def _show(self) -> None:
        self.strip.set_line(self.example.line, self._maximum, self._zoom)

    def text(self) -> str:
        """What is shown, the peak in «»."""
        return self.example.line.text(self._zoom, mark=True)

    def copy(self) -> None:
        QApplication.clipboard().setText(self.example.line.text(self._zoom))

    def keyPressEvent(self, event: QKeyEvent) -> None:
        """What the strip leaves."""
        if event.matches(QKeySequence.StandardKey.Copy):
            self.copy()
        elif event.key() in (Qt.Key.Key_Down, Qt.Key.Key_Up):
            self.moved.emit(1 if event.key() == Qt.Key.Key_Down else -1)
        else:
            super().keyPressEvent(event)

    def _on_copy_clicked(self, checked: bool = False) -> None:
        self.copy()

    def _on_try_clicked(self, checked: bool = False) -> None:
        self.wants_test.emit(self.example.line.text(self._zoom))


def strength(example: Shown) -> str:
    if example.activation is None:
        return "Silent here"
    return f"Max activation: {formatting.number(example.activation, 3)}"
