"""Lucide icons in any colour, sharp at any pixel ratio.

Qt paints an SVG's `currentColor` black, so the colour is written into the file's text first.
"""

from __future__ import annotations

from functools import cache

from PySide6.QtCore import QByteArray, QRectF, Qt
from PySide6.QtGui import QIcon, QPainter, QPixmap
from PySide6.QtSvg import QSvgRenderer

from mistudio.resources import resource
from mistudio.ui.theme import tokens


@cache
def _source(name: str) -> str:
    return resource("icons", "lucide", f"{name}.svg").read_text(encoding="utf-8")


@cache
def _renderer(name: str, colour: str) -> QSvgRenderer:
    return QSvgRenderer(QByteArray(_source(name).replace("currentColor", colour).encode()))


@cache
def pixmap(name: str, colour: str = tokens.TEXT, size: int = 20, ratio: float = 1.0) -> QPixmap:
    """An icon as a picture of `size` logical pixels for a screen with this pixel ratio."""
    side = round(size * ratio)
    picture = QPixmap(side, side)
    picture.fill(Qt.GlobalColor.transparent)
    painter = QPainter(picture)
    _renderer(name, colour).render(painter, QRectF(0, 0, side, side))
    painter.end()
    picture.setDevicePixelRatio(ratio)
    return picture


_SIDES = (16, 20, 24, 40, 60)  # physical pixels; Qt takes the nearest and never enlarges


@cache
def icon(name: str, colour: str = tokens.LABEL, on: str | None = None) -> QIcon:
    """An icon for a button or an action; `on` is its colour while the button is checked."""
    return _icon(name, colour, on, 1.0)


@cache
def icon_beside_text(name: str, colour: str = tokens.LABEL) -> QIcon:
    """The same with air at its right (a third of its size): Qt's own gap before a text is 4 px."""
    return _icon(name, colour, None, 1.3)


def _icon(name: str, colour: str, on: str | None, width: float) -> QIcon:
    made = QIcon()
    for side in _SIDES:
        made.addPixmap(_wide(name, colour, side, width))
        made.addPixmap(_wide(name, tokens.DISABLED, side, width), QIcon.Mode.Disabled)
        if on:
            made.addPixmap(_wide(name, on, side, width), QIcon.Mode.Normal, QIcon.State.On)
    return made


def _wide(name: str, colour: str, side: int, width: float) -> QPixmap:
    if width == 1.0:
        return pixmap(name, colour, side)
    picture = QPixmap(round(side * width), side)
    picture.fill(Qt.GlobalColor.transparent)
    painter = QPainter(picture)
    _renderer(name, colour).render(painter, QRectF(0, 0, side, side))
    painter.end()
    return picture
