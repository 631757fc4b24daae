"""Panes of text: a continuation that streams, then with what differs marked and KL behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from PySide6.QtCore import QRectF, QSize, Qt, QTimer
from PySide6.QtGui import (
    QColor,
    QFont,
    QLinearGradient,
    QPainter,
    QPaintEvent,
    QResizeEvent,
    QTextCharFormat,
    QTextCursor,
)
from PySide6.QtWidgets import QApplication, QGridLayout, QSizePolicy, QTextEdit, QWidget

from mistudio.ui.steering.comparison import Run
from mistudio.ui.steering.request import CONTROL
from mistudio.ui.steering.units import significant
from mistudio.ui.theme import fonts, tokens
from mistudio.ui.widgets import IconButton, Surface, Text, row
from mistudio.ui.widgets.token_strip import EMERALD_MAP, heat, heat_colour, ink_on

PANE_HEIGHT, PANE_MOST = 200, 560
_COLUMN = 380  # a narrower pane breaks lines too often to be compared


@dataclass(frozen=True)
class Shades:
    """What lies behind each token: its KL in nats, the largest of all panes, and the map."""

    values: Sequence[float]
    most: float
    colours: str


class _GrowingText(QTextEdit):
    """As tall as its text between two limits, so that the page scrolls and not the pane."""

    def __init__(self, name: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setReadOnly(True)
        self.setTabChangesFocus(True)
        self.setAccessibleName(name)
        self.setProperty("surface", "clear")
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setMinimumHeight(PANE_HEIGHT)
        self.document().documentLayout().documentSizeChanged.connect(self._on_size_changed)

    def _on_size_changed(self, *_: object) -> None:
        height = round(self.document().size().height()) + 20
        self.setMinimumHeight(min(max(height, PANE_HEIGHT), PANE_MOST))

    def sizeHint(self) -> QSize:
        return QSize(320, self.minimumHeight())


class TextPane(Surface):
    """One continuation: streaming as plain text, then with its differences marked."""

    def __init__(
        self, title: str, tone: str, accent: bool = False, parent: QWidget | None = None
    ) -> None:
        super().__init__("card", None, 16, parent)
        if accent:
            self.setProperty("accent", "true")
        self._plain = ""
        self.title, self.steered = title, accent
        self.mark = tokens.TONES[tone][0] if accent or tone != "slate" else tokens.BLUE
        self.setAccessibleName(title)
        self.copy = IconButton("copy", f"Copy: {title}", size=18)
        self.copy.clicked.connect(self._on_copy_clicked)
        self._copied = QTimer(self)
        self._copied.setSingleShot(True)
        self._copied.setInterval(1500)
        self._copied.timeout.connect(self._on_copied_timeout)
        dot = Text("●", "small", tone)
        self._heading = Text(title, "card")
        head = row(dot, self._heading, None, self.copy, spacing=10)
        head.setContentsMargins(8, 0, 4, 0)  # in line with the text below, which has a padding
        self.add(head)
        self.view = _GrowingText(title)
        self.view.setPlaceholderText("No generation yet")
        self.add(self.view)
        self.body.setStretch(1, 1)
        self.caption = Text("", "helper", wrap=True)
        self.caption.setContentsMargins(8, 0, 8, 0)
        self.caption.hide()
        self.add(self.caption)
        self.set_text("")

    @property
    def text(self) -> str:
        return self._plain

    def set_title(self, title: str) -> None:
        if title == self.title:
            return
        self.title = title
        self._heading.setText(title)
        for widget in (self, self.view):
            widget.setAccessibleName(title)
        self._on_copied_timeout()

    def set_text(self, text: str, placeholder: str = "No generation yet") -> None:
        """Show plain text; while it grows only what is new is drawn."""
        self.view.setPlaceholderText(placeholder)
        if text.startswith(self._plain) and self._plain and not self.caption.isVisible():
            cursor = QTextCursor(self.view.document())
            cursor.movePosition(QTextCursor.MoveOperation.End)
            cursor.insertText(text[len(self._plain) :])
        elif text != self.view.toPlainText() or self.caption.isVisible():
            self.view.setCurrentCharFormat(QTextCharFormat())
            self.view.setPlainText(text)
        self._plain = text
        self.caption.hide()
        self.copy.setEnabled(bool(text))

    def set_runs(
        self,
        text: str,
        parts: Sequence[Run],
        caption: str,
        first_difference: int | None,
        shades: Shades | None = None,
    ) -> None:
        """Show a finished text: what both share in a quiet colour, words of its own underlined,
        the first token that differs on a raised ground."""
        self.view.clear()
        cursor = QTextCursor(self.view.document())
        cursor.beginEditBlock()
        for text_of, look in _looks(parts, self.mark, first_difference, shades):
            cursor.insertText(text_of, look)
        cursor.endEditBlock()
        self._plain = text
        self.view.setPlaceholderText("It ended at once: no text")
        self.caption.setText(caption)
        self.caption.setVisible(bool(caption))
        self.copy.setEnabled(bool(text))

    def _on_copy_clicked(self, checked: bool = False) -> None:
        QApplication.clipboard().setText(self._plain)
        self.copy.set_icon("check", f"Copied: {self.title}", tokens.EMERALD)
        self._copied.start()

    def _on_copied_timeout(self) -> None:
        self.copy.set_icon("copy", f"Copy: {self.title}")


def _looks(
    parts: Sequence[Run], mark: str, first_difference: int | None, shades: Shades | None
) -> Iterator[tuple[str, QTextCharFormat]]:
    """Texts and how they look. Without shades few looks are needed and neighbours share one."""
    known: dict[tuple[bool, bool, bool], QTextCharFormat] = {}
    for key, found in groupby(parts, lambda part: _key(part, first_difference, shades)):
        alike = list(found)
        look = known.get(key[:3])
        if look is None or shades is not None:
            look = known[key[:3]] = _format(alike[0], mark, key[2], shades)
        yield "".join(part.text for part in alike), look


def _key(
    part: Run, first_difference: int | None, shades: Shades | None
) -> tuple[bool, bool, bool, int]:
    """The same for parts that look alike; with shades each token has a colour and a tip."""
    parting = first_difference is not None and part.token == first_difference
    return part.common, part.only_here, parting, part.token if shades is not None else 0


def _format(part: Run, mark: str, parting: bool, shades: Shades | None) -> QTextCharFormat:
    look = QTextCharFormat(_words(part.only_here))
    colour = tokens.HELPER if part.common else tokens.TEXT
    if part.only_here:
        colour = mark
    tip = []
    if parting:
        look.setBackground(QColor(tokens.RAISED_HOVER))
        colour = tokens.WHITE
        tip.append("The first token that differs.")
    if shades is not None and 0 <= part.token < len(shades.values):
        value = shades.values[part.token]
        behind, colour = _shade(heat(value, shades.most), shades.colours)
        look.setBackground(QColor(behind))
        tip.insert(0, f"Token {part.token + 1}: KL {significant(value)} nats")
    look.setToolTip("\n".join(tip))
    look.setForeground(QColor(colour))
    if parting:
        look.setFontOverline(True)
    return look


@lru_cache(maxsize=512)
def _shade(opacity: float, colours: str) -> tuple[str, str]:
    """The ground of a shaded token and what is read on it."""
    behind = heat_colour(opacity, tokens.CARD, colours)
    return behind, ink_on(behind)


def _words(only_here: bool) -> QTextCharFormat:
    look = QTextCharFormat()
    look.setFont(
        fonts.sans(weight=QFont.Weight.Medium if only_here else QFont.Weight.Normal),
        QTextCharFormat.FontPropertiesInheritanceBehavior.FontPropertiesSpecifiedOnly,
    )
    look.setFontUnderline(only_here)
    return look


class PaneGrid(QWidget):
    """The unsteered pane and the steered ones, in as many columns as stay readable."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._grid = QGridLayout(self)
        self._grid.setContentsMargins(0, 0, 0, 0)
        self._grid.setSpacing(tokens.GAP)
        self._columns = 2
        self.panes: list[TextPane] = [TextPane("Unsteered (Baseline)", "slate")]
        self.set_names(["Steered"])

    def set_names(self, names: Sequence[str]) -> None:
        """One pane for each name beside the unsteered one; those that stay keep their text."""
        kept = self.panes[:1]
        for place, name in enumerate(names, 1):
            steered = name != CONTROL
            old = self.panes[place] if place < len(self.panes) else None
            if old is None or old.steered is not steered:
                old = TextPane(name, "emerald" if steered else "purple", accent=steered)
            old.set_title(name)
            kept.append(old)
        for pane in self.panes:
            if pane not in kept:
                self._grid.removeWidget(pane)
                pane.hide()
                pane.deleteLater()
        self.panes = kept
        self._arrange()

    def _arrange(self) -> None:
        for place, pane in enumerate(self.panes):
            self._grid.addWidget(pane, place // self._columns, place % self._columns)
            pane.show()
        for place in range(3):
            self._grid.setColumnStretch(place, 1 if place < self._columns else 0)

    def _wanted_columns(self) -> int:
        if len(self.panes) <= 2:
            return 2
        fitting = (self.width() + tokens.GAP) // (_COLUMN + tokens.GAP)
        return min(max(int(fitting), 2), 3, len(self.panes))

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        self.arrange_anew()

    def arrange_anew(self) -> None:
        if self._wanted_columns() != self._columns:
            self._columns = self._wanted_columns()
            self._arrange()


class HeatLegend(QWidget):
    """What the shades of KL mean: from 0 to `most` nats."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.most = 0.0
        self.setSizePolicy(QSizePolicy.Policy.Fixed, QSizePolicy.Policy.Fixed)
        self._bar = _HeatBar()
        self._high = Text("", "helper")
        self.setLayout(row(Text("0", "helper"), self._bar, self._high, spacing=8))
        self.setToolTip(
            "KL(steered ‖ unsteered) of the prediction of each token, in nats, on the text's own "
            "prefix at temperature 1. The scale is logarithmic and the same in all panes."
        )

    def set_scale(self, most: float, colours: str) -> None:
        self.most, self._bar.colours = most, colours
        self._bar.update()
        self._high.setText(f"{significant(most)} nats")
        self.setAccessibleName(f"Shades go from 0 to {significant(most)} nats")


class _HeatBar(QWidget):
    colours = EMERALD_MAP

    def sizeHint(self) -> QSize:
        return QSize(120, 14)

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        gradient = QLinearGradient(0, 0, self.width(), 0)
        for step in range(21):
            part = step / 20
            behind = heat_colour(heat(part, 1.0), tokens.CARD, self.colours)
            gradient.setColorAt(part, QColor(behind))
        painter.setPen(QColor(tokens.EDGE))
        painter.setBrush(gradient)
        painter.drawRoundedRect(QRectF(0.5, 0.5, self.width() - 1, self.height() - 1), 3, 3)
