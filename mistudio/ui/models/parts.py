"""What the dialogs of the Models tab share."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtCore import QSize, Qt
from PySide6.QtWidgets import (
    QApplication,
    QDialog,
    QGridLayout,
    QHBoxLayout,
    QScrollArea,
    QWidget,
)

from mistudio.ui.widgets import IconButton, Text, column, row


def head_of(dialog: QDialog, title: str, subtitle: Text, tone: str | None = None) -> QHBoxLayout:
    texts = column(4)
    texts.addWidget(Text(title, "h1", tone, wrap=True))
    texts.addWidget(subtitle)
    close = IconButton("x", "Close")
    close.clicked.connect(dialog.close)
    head = row(texts, close)
    head.setStretch(0, 1)
    head.setAlignment(close, Qt.AlignmentFlag.AlignTop)
    head.setContentsMargins(24, 20, 20, 16)
    return head


def scrolling(content: QWidget) -> QScrollArea:
    content.setProperty("surface", "clear")
    area = QScrollArea()
    area.setProperty("surface", "clear")
    area.setWidgetResizable(True)
    area.setFocusPolicy(Qt.FocusPolicy.NoFocus)
    area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
    area.setWidget(content)
    return area


def tiles(widgets: Sequence[QWidget], columns: int) -> QGridLayout:
    grid = QGridLayout()
    grid.setSpacing(12)
    for place, widget in enumerate(widgets):
        grid.addWidget(widget, place // columns, place % columns)
    for place in range(columns):
        grid.setColumnStretch(place, 1)
    return grid


def room_of(parent: QWidget | None) -> QSize:
    return parent.window().size() if parent else QApplication.primaryScreen().size()
