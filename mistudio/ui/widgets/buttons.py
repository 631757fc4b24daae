"""Buttons: by variant with an icon, icon-only with a name, and the on/off toggle."""

from __future__ import annotations

from PySide6.QtCore import QRectF, QSize, Qt
from PySide6.QtGui import QColor, QPainter, QPaintEvent, QPen
from PySide6.QtWidgets import QAbstractButton, QPushButton, QSizePolicy, QToolButton, QWidget

from mistudio.ui.theme import fonts, icons, set_look, tokens

_ICON_COLOURS = {
    "primary": tokens.WHITE,
    "danger": tokens.WHITE,
    "info": tokens.WHITE,
    "purple": tokens.WHITE,
    "warning": tokens.INK,
    "link": tokens.EMERALD,
}


class Button(QPushButton):
    """A push button; `variant`: primary, secondary, danger, info, purple, warning, link, small."""

    def __init__(
        self,
        text: str,
        variant: str = "secondary",
        icon: str | None = None,
        tooltip: str = "",
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(text, parent)
        self.setProperty("variant", variant)
        self.setCursor(Qt.CursorShape.PointingHandCursor)
        self.setToolTip(tooltip)
        if icon:
            self.set_icon(icon)

    def set_icon(self, name: str) -> None:
        variant = self.property("variant")
        self.setIcon(icons.icon_beside_text(name, _ICON_COLOURS.get(variant, tokens.TEXT)))
        side = fonts.px(16 if variant in ("link", "small") else 18)
        self.setIconSize(QSize(round(side * 1.3), side))

    def set_variant(self, variant: str) -> None:
        set_look(self, variant=variant)


class IconButton(QToolButton):
    """An icon alone; `name` is what a screen reader and the tooltip say."""

    def __init__(
        self,
        icon: str,
        name: str,
        colour: str = tokens.LABEL,
        on_colour: str | None = None,
        size: int = 20,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.setIcon(icons.icon(icon, colour, on_colour))
        self.setIconSize(QSize(fonts.px(size), fonts.px(size)))
        self.setAccessibleName(name)
        self.setToolTip(name)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setCursor(Qt.CursorShape.PointingHandCursor)
        self.setCheckable(on_colour is not None)

    def set_icon(self, icon: str, name: str, colour: str = tokens.LABEL) -> None:
        self.setIcon(icons.icon(icon, colour))
        self.setAccessibleName(name)
        self.setToolTip(name)


class Toggle(QAbstractButton):
    """On or off, 48 x 24; the knob's place and a mark inside tell it, not the colour alone."""

    def __init__(self, name: str, checked: bool = False, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setCheckable(True)
        self.setChecked(checked)
        self.setAccessibleName(name)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setCursor(Qt.CursorShape.PointingHandCursor)
        self.setSizePolicy(QSizePolicy.Policy.Fixed, QSizePolicy.Policy.Fixed)

    def sizeHint(self) -> QSize:
        return QSize(54, 30)

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        track = QRectF(3, 3, 48, 24)
        on = self.isChecked()
        if not self.isEnabled():
            fill, edge, knob = tokens.TILE, tokens.DIVIDER, tokens.DISABLED
        elif on:
            fill, edge, knob = tokens.PRIMARY, tokens.FOCUS, tokens.WHITE
        else:
            fill, edge, knob = tokens.RAISED, tokens.EDGE, tokens.LABEL
        painter.setPen(QPen(QColor(edge), 1))
        painter.setBrush(QColor(fill))
        painter.drawRoundedRect(track.adjusted(0.5, 0.5, -0.5, -0.5), 12, 12)
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(QColor(knob))
        painter.drawEllipse(
            QRectF(track.right() - 21 if on else track.left() + 3, track.top() + 3, 18, 18)
        )
        painter.setPen(QPen(QColor(knob), 2))
        painter.setBrush(Qt.BrushStyle.NoBrush)
        if on:
            painter.drawLine(int(track.left()) + 12, 11, int(track.left()) + 12, 19)
        else:
            painter.drawEllipse(QRectF(track.right() - 16, 11, 8, 8))
        if self.hasFocus():
            painter.setPen(QPen(QColor(tokens.FOCUS if not on else tokens.TEXT), 2))
            painter.drawRoundedRect(QRectF(1, 1, 52, 28), 14, 14)
