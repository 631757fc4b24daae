"""Quality lights of a dictionary, and the warning on the card of a run that is failing."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QWidget

from mistudio.engine.training.verdict import FailingRun, Light
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import Badge, Surface, Text, column, picture, row

# Never by colour alone: a word, a mark and a colour.
LOOKS = {
    "good": ("✓", "emerald"),
    "fair": ("△", "yellow"),
    "poor": ("✕", "red"),
}


class QualityLights(QWidget):
    """A pill for each quality; below them, for each that is not good, why and what would help."""

    def __init__(self, lights: Sequence[Light], parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.badges: dict[str, Badge] = {}
        for light in lights:
            mark, tone = LOOKS[light.level]
            badge = Badge(light.level, f"{mark} {light.name}: {light.level}", tone)
            badge.setToolTip(f"<qt>{light.why}</qt>")
            self.badges[light.name] = badge
        self.lines = [
            Text(f"{light.why} {light.remedy}", "small", wrap=True)
            for light in lights
            if light.level != "good"
        ]
        layout = column(6)
        layout.addLayout(row(*self.badges.values(), None, spacing=8))
        for line in self.lines:
            layout.addWidget(line)
        self.setLayout(layout)
        self.setVisible(bool(lights))


class FailingNote(Surface):
    """A run that will not give a usable dictionary: what is seen, and what to change."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__("note", "red", 14, parent)
        self._text = Text("", "small", wrap=True)
        mark = picture("triangle-alert", tokens.RED, 20)
        line = row(mark, self._text, spacing=10)
        line.setStretch(1, 1)
        line.setAlignment(mark, Qt.AlignmentFlag.AlignTop)
        self.add(line)
        self.hide()

    @property
    def text(self) -> str:
        return self._text.text()

    def show_warning(self, found: FailingRun | None) -> None:
        if found is not None:
            self._text.setText(f"{found.site}: {found.why} {found.remedy}")
            self.setAccessibleName(f"Warning. {self._text.text()}")
        self.setVisible(found is not None)
