"""What several views of a dataset share."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QGridLayout, QScrollArea, QWidget

from mistudio import formatting
from mistudio.library.records import Dataset

SOURCE_NAMES = {"sample": "Sample", "local": "Local file", "hub": "Hugging Face"}


def scrolling(view: QWidget) -> QScrollArea:
    view.setProperty("surface", "clear")
    area = QScrollArea()
    area.setProperty("surface", "clear")
    area.setWidgetResizable(True)
    area.setFocusPolicy(Qt.FocusPolicy.NoFocus)
    area.setWidget(view)
    return area


def tiles(widgets: Sequence[QWidget], columns: int) -> QGridLayout:
    """Side by side, `columns` in a line, all of one width."""
    grid = QGridLayout()
    grid.setSpacing(12)
    for place, widget in enumerate(widgets):
        grid.addWidget(widget, place // columns, place % columns)
    for place in range(columns):
        grid.setColumnStretch(place, 1)
    return grid


def samples_text(dataset: Dataset) -> str:
    """`10,000 samples`; of a linked dataset only what is known: those that are kept for a look."""
    if dataset.link:
        return f"the first {formatting.count(dataset.documents)} samples are shown"
    noun = "sample" if dataset.documents == 1 else "samples"
    return f"{formatting.count(dataset.documents)} {noun}"


def count_or_dash(value: float | None) -> str:
    return "—" if value is None else formatting.count(value)
