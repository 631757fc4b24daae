"""Labels that know their role: headings, helper texts, elided names, status badges."""

from __future__ import annotations

from PySide6.QtCore import QSize, Qt
from PySide6.QtGui import QPainter, QPaintEvent, QResizeEvent
from PySide6.QtWidgets import QLabel, QSizePolicy, QWidget

from mistudio.ui.theme import set_look


class Text(QLabel):
    """A label in one of the roles of the style sheet: h1, card, body, small, label, helper, error,
    mono, stat, bigstat, chip; `tone` colours it (emerald, blue, purple, yellow, red)."""

    def __init__(
        self,
        text: str = "",
        role: str = "body",
        tone: str | None = None,
        wrap: bool = False,
        selectable: bool = False,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(text, parent)
        self.setTextFormat(Qt.TextFormat.PlainText)
        self.setProperty("role", role)
        if tone:
            self.setProperty("tone", tone)
        self.setWordWrap(wrap)
        if selectable:
            self.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)

    def set_tone(self, tone: str) -> None:
        if self.property("tone") != tone:
            set_look(self, tone=tone)


class ElidedLabel(Text):
    """One line that ends in … where room is short; the whole text is its tooltip then."""

    def __init__(
        self,
        text: str = "",
        role: str = "body",
        tone: str | None = None,
        mode: Qt.TextElideMode = Qt.TextElideMode.ElideRight,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(text, role, tone, parent=parent)
        self._mode = mode
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Preferred)

    def minimumSizeHint(self) -> QSize:
        return QSize(
            self.fontMetrics().horizontalAdvance("mmm…"), super().minimumSizeHint().height()
        )

    def _elided(self) -> str:
        return self.fontMetrics().elidedText(
            self.text().replace("\n", " "), self._mode, self.contentsRect().width()
        )

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        self.setToolTip(self.text() if self._elided() != self.text() else "")

    def setText(self, text: str) -> None:
        super().setText(text)
        self.setToolTip(text if self._elided() != text else "")

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        painter.setPen(self.palette().windowText().color())
        painter.drawText(
            self.contentsRect(), self.alignment() | Qt.TextFlag.TextSingleLine, self._elided()
        )


_STATUS_TONES = {
    "ready": "emerald",
    "running": "emerald",
    "training": "emerald",
    "finished": "emerald",
    "completed": "emerald",
    "downloading": "blue",
    "initializing": "blue",
    "queued": "slate",
    "paused": "yellow",
    "processing": "yellow",
    "stopped": "yellow",
    "interrupted": "yellow",
    "cancelled": "slate",
    "failed": "red",
    "error": "red",
}


def status_tone(status: str) -> str:
    """The tone that a status has everywhere in the window."""
    return _STATUS_TONES.get(status, "slate")


class Badge(Text):
    """A status as a pill: always its word, coloured by its meaning."""

    def __init__(
        self,
        status: str,
        text: str | None = None,
        tone: str | None = None,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__("", "badge", parent=parent)
        self.setSizePolicy(QSizePolicy.Policy.Maximum, QSizePolicy.Policy.Maximum)
        self.status = ""
        self.set_status(status, text, tone)

    def set_status(self, status: str, text: str | None = None, tone: str | None = None) -> None:
        self.status = status
        words = text if text is not None else status.capitalize()
        self.setText(words)
        self.setAccessibleName(f"Status: {words}" if text is None else words)
        set_look(self, tone=tone or status_tone(status))
