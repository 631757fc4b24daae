"""Tokens of text with the heat of a feature's activation behind them.

One painter for the widget and for table delegates: `arrange_tokens` + `paint_tokens`. The heat's
opacity is clip(0.05 + 0.95 * log10(1 + 9 * activation / maximum), 0, 1), and 0 where inactive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PySide6.QtCore import QEvent, QPoint, QRect, QSize, Qt, Signal
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
from PySide6.QtWidgets import QSizePolicy, QToolTip, QWidget

from mistudio.ui.theme import fonts, tokens

EMERALD_MAP = "emerald"
SAFE_MAP = "safe"
COLOUR_MAPS = (EMERALD_MAP, SAFE_MAP)

# Cividis, thinned to five stops: the same order of lightness for every kind of colour vision.
_SAFE_STOPS = ("#12356F", "#49536E", "#7C7B78", "#B9AC6F", "#FDE737")

_PAD_X, _PAD_Y, _LINE_GAP = 2, 3, 3


def heat(activation: float, maximum: float) -> float:
    """Opacity 0..1 of the heat behind a token."""
    if activation <= 0 or maximum <= 0 or activation != activation:
        return 0.0
    return min(max(0.05 + 0.95 * math.log10(1 + 9 * activation / maximum), 0.0), 1.0)


def heat_colour(opacity: float, background: str, colour_map: str = EMERALD_MAP) -> str:
    """The opaque colour behind a token of this heat."""
    if opacity <= 0:
        return background
    if colour_map == SAFE_MAP:
        place = opacity * (len(_SAFE_STOPS) - 1)
        index = min(int(place), len(_SAFE_STOPS) - 2)
        return tokens.blend(_SAFE_STOPS[index + 1], _SAFE_STOPS[index], place - index)
    return tokens.blend(tokens.EMERALD, background, opacity)


def ink_on(background: str) -> str:
    """White or black, whichever is easier to read; at least 4.58:1 on any colour."""
    white = tokens.contrast(tokens.WHITE, background)
    return tokens.WHITE if white >= tokens.contrast("#000000", background) else "#000000"


def shown(token: str) -> str:
    """A token as it is written: line breaks as ↵, tabs as ⇥, a lone space as ␣."""
    text = token.replace("\r\n", "↵").replace("\n", "↵").replace("\r", "↵").replace("\t", "⇥")
    return text.replace(" ", "␣") if text and not text.strip() else text


@dataclass(frozen=True)
class Arrangement:
    """Where each token stands, in lines that end at `width`; `height` of them all."""

    rects: tuple[QRect, ...]
    texts: tuple[str, ...]
    height: int


def arrange_tokens(token_texts: Sequence[str], font: QFont, width: int) -> Arrangement:
    """Lay tokens out like running text; a token is never broken, an over-long one is elided."""
    metrics = QFontMetrics(font)
    line = metrics.height() + 2 * _PAD_Y
    rects, texts = [], []
    x = y = 0
    for token in token_texts:
        text = shown(token)
        advance = metrics.horizontalAdvance(text) + 2 * _PAD_X
        if advance > width > 0:
            text = metrics.elidedText(text, Qt.TextElideMode.ElideMiddle, width - 2 * _PAD_X)
            advance = metrics.horizontalAdvance(text) + 2 * _PAD_X
        if x and x + advance > width:
            x, y = 0, y + line + _LINE_GAP
        rects.append(QRect(x, y, advance, line))
        texts.append(text)
        x += advance
    return Arrangement(tuple(rects), tuple(texts), y + line if rects else line)


def paint_tokens(
    painter: QPainter,
    rect: QRect,
    token_texts: Sequence[str],
    activations: Sequence[float],
    max_activation: float,
    *,
    font: QFont | None = None,
    background: str = tokens.CARD,
    colour_map: str = EMERALD_MAP,
    arrangement: Arrangement | None = None,
    text_colour: str = tokens.TEXT,
    chips: bool = False,
) -> Arrangement:
    """Paint tokens into `rect` (clipped); the hottest token is underlined as well.

    Pass the arrangement of an earlier call where nothing changed: laying out costs more than
    painting. `chips` shows where each token begins and ends, also without heat.
    """
    font = font or fonts.mono()
    arrangement = arrangement or arrange_tokens(token_texts, font, rect.width())
    hottest = max(activations, default=0.0)
    painter.save()
    painter.setClipRect(rect, Qt.ClipOperation.IntersectClip)
    painter.setFont(font)
    painter.setRenderHint(QPainter.RenderHint.Antialiasing)
    for place, text, activation in zip(
        arrangement.rects, arrangement.texts, activations, strict=False
    ):
        box = place.translated(rect.topLeft())
        opacity = heat(activation, max_activation)
        ink = text_colour
        if chips and opacity <= 0:
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(QColor(tokens.RAISED))
            painter.drawRoundedRect(box.adjusted(0, 0, -1, 0), 3, 3)
        if opacity > 0:
            behind = heat_colour(opacity, background, colour_map)
            ink = ink_on(behind)
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(QColor(behind))
            painter.drawRoundedRect(box, 3, 3)
        painter.setPen(QColor(ink))
        painter.drawText(box.adjusted(_PAD_X, 0, 0, 0), Qt.AlignmentFlag.AlignVCenter, text)
        if opacity > 0 and activation == hottest:
            painter.setPen(QPen(QColor(ink), 2))
            painter.drawLine(box.left() + 3, box.bottom() - 2, box.right() - 3, box.bottom() - 2)
    painter.restore()
    return arrangement


class TokenStrip(QWidget):
    """A paragraph of tokens. Arrow keys walk over them; the tooltip tells token, id, activation."""

    token_activated = Signal(int)

    def __init__(
        self,
        surface: str = tokens.CARD,
        colour_map: str = EMERALD_MAP,
        chips: bool = False,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._surface, self._colour_map, self._chips = surface, colour_map, chips
        self._tokens: list[str] = []
        self._activations: list[float] = []
        self._ids: list[int] | None = None
        self._maximum = 0.0
        self._current = -1
        self._arrangement: Arrangement | None = None
        self._font = fonts.mono(tokens.TEXT_SMALL)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setMouseTracking(True)
        policy = QSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Minimum)
        policy.setHeightForWidth(True)
        self.setSizePolicy(policy)
        self.setAccessibleName("Tokens")

    def set_tokens(
        self,
        token_texts: Sequence[str],
        activations: Sequence[float] | None = None,
        max_activation: float | None = None,
        token_ids: Sequence[int] | None = None,
    ) -> None:
        """Without activations the strip only shows the tokens; the maximum defaults to theirs."""
        self._tokens = list(token_texts)
        self._activations = (
            list(activations) if activations is not None else [0.0] * len(self._tokens)
        )
        self._ids = list(token_ids) if token_ids is not None else None
        self._maximum = (
            max_activation if max_activation is not None else max(self._activations, default=0.0)
        )
        self._current = -1
        self._arrangement = None
        self.setAccessibleName(f"Tokens: {''.join(self._tokens)[:200]}")
        self.updateGeometry()
        self.update()

    def set_colour_map(self, colour_map: str) -> None:
        self._colour_map = colour_map
        self.update()

    def describe(self, index: int) -> str:
        """What the tooltip says about a token."""
        lines = [f"Token {shown(self._tokens[index])!r}"]
        if self._ids is not None:
            lines.append(f"Token ID: {self._ids[index]}")
        if self._maximum > 0:
            lines.append(f"activation {self._activations[index]:.3f} (maximum {self._maximum:.3f})")
        return "\n".join(lines)

    def _arranged(self, width: int) -> Arrangement:
        return arrange_tokens(self._tokens, self._font, max(width, 1))

    def hasHeightForWidth(self) -> bool:
        return True

    def heightForWidth(self, width: int) -> int:
        return self._arranged(width).height

    def sizeHint(self) -> QSize:
        return QSize(320, self._arranged(max(self.width(), 320)).height)

    def minimumSizeHint(self) -> QSize:
        return QSize(80, QFontMetrics(self._font).height() + 2 * _PAD_Y)

    def resizeEvent(self, event: QEvent) -> None:
        self._arrangement = None
        super().resizeEvent(event)

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        self._arrangement = paint_tokens(
            painter,
            self.rect(),
            self._tokens,
            self._activations,
            self._maximum,
            font=self._font,
            background=self._surface,
            colour_map=self._colour_map,
            arrangement=self._arrangement,
            chips=self._chips,
        )
        if self.hasFocus() and self._arrangement.rects:
            ring = self._arrangement.rects[self._current] if self._current >= 0 else self.rect()
            painter.setPen(QPen(QColor(tokens.FOCUS), 2))
            painter.setBrush(Qt.BrushStyle.NoBrush)
            painter.drawRoundedRect(ring.adjusted(1, 1, -1, -1), 3, 3)

    def token_at(self, position: QPoint) -> int:
        """The token under a point of the widget, -1 where there is none."""
        if self._arrangement is None:
            self._arrangement = self._arranged(self.width())
        for index, rect in enumerate(self._arrangement.rects):
            if rect.contains(position):
                return index
        return -1

    def event(self, event: QEvent) -> bool:
        if event.type() == QEvent.Type.ToolTip:
            assert isinstance(event, QHelpEvent)
            index = self.token_at(event.pos())
            if index >= 0:
                QToolTip.showText(event.globalPos(), self.describe(index), self)
            else:
                QToolTip.hideText()
            return True
        return super().event(event)

    def mousePressEvent(self, event: QMouseEvent) -> None:
        index = self.token_at(event.position().toPoint())
        if index >= 0:
            self._move_to(index)
            self.token_activated.emit(index)
        super().mousePressEvent(event)

    def keyPressEvent(self, event: QKeyEvent) -> None:
        key = event.key()
        if key == Qt.Key.Key_Right and self._tokens:
            self._move_to(min(self._current + 1, len(self._tokens) - 1), tip=True)
        elif key == Qt.Key.Key_Left and self._tokens:
            self._move_to(max(self._current - 1, 0), tip=True)
        elif key in (Qt.Key.Key_Return, Qt.Key.Key_Enter, Qt.Key.Key_Space) and self._current >= 0:
            self.token_activated.emit(self._current)
        else:
            super().keyPressEvent(event)

    def _move_to(self, index: int, tip: bool = False) -> None:
        self._current = index
        self.setAccessibleDescription(self.describe(index))
        if tip:
            if self._arrangement is None:
                self._arrangement = self._arranged(self.width())
            below = self._arrangement.rects[index].bottomLeft()
            QToolTip.showText(self.mapToGlobal(below), self.describe(index), self)
        self.update()
