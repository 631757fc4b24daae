"""Numbers on tiles, and how far a job is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QFrame, QProgressBar, QWidget

from mistudio import formatting
from mistudio.ui.theme import set_look
from mistudio.ui.widgets.containers import column, row
from mistudio.ui.widgets.text import ElidedLabel, Text

if TYPE_CHECKING:
    from mistudio.jobs.control import Snapshot


class StatTile(QFrame):
    """One measured number with its label; an em dash until it exists. The tooltip tells method,
    sample and unit."""

    def __init__(
        self,
        label: str,
        value: str = "—",
        role: str = "emerald",
        tooltip: str = "",
        note: str = "",
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.setProperty("surface", "tile")
        self._label = ElidedLabel(label, "helper")
        self._value = Text(value, "stat", role)
        self._note = ElidedLabel(note, "helper")
        self._note.setVisible(bool(note))
        layout = column(4, 14)
        layout.addWidget(self._label)
        layout.addWidget(self._value)
        layout.addWidget(self._note)
        layout.addStretch(1)
        self.setLayout(layout)
        self.setToolTip(tooltip)
        self._name()

    @property
    def value(self) -> str:
        return self._value.text()

    def set_value(self, value: str, note: str | None = None, tooltip: str | None = None) -> None:
        if value != self._value.text():
            self._value.setText(value)
        if note is not None:
            self._note.setText(note)
            self._note.setVisible(bool(note))
        if tooltip is not None:
            self.setToolTip(tooltip)
        self._name()

    def set_role(self, role: str) -> None:
        self._value.set_tone(role)

    def _name(self) -> None:
        parts = [f"{self._label.text()}: {self._value.text()}", self._note.text()]
        self.setAccessibleName(" ".join(part for part in parts if part))


class ProgressRow(QWidget):
    """Phase and percent, an 8 px bar, elapsed and remaining time; fed with snapshots of a job."""

    def __init__(
        self, title: str = "", tone: str = "emerald", parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self._title = title
        self._phase = ElidedLabel(title, "label")
        self._percent = Text("", "label", tone)
        self._bar = QProgressBar()
        self._bar.setRange(0, 1000)
        self._bar.setTextVisible(False)
        self._bar.setAccessibleName(title or "Progress")
        set_look(self._bar, tone=tone)
        self._times = Text("", "helper", wrap=True)
        layout = column(6)
        top = row(self._phase, self._percent)
        top.setStretch(0, 1)
        layout.addLayout(top)
        layout.addWidget(self._bar)
        layout.addWidget(self._times)
        self.setLayout(layout)
        self.setAttribute(Qt.WidgetAttribute.WA_StyledBackground, False)
        self.show_snapshot(None)

    @property
    def percent_text(self) -> str:
        return self._percent.text()

    @property
    def times_text(self) -> str:
        return self._times.text()

    def show_snapshot(self, snapshot: Snapshot | None) -> None:
        """Show where the job stands; None: it has not begun to measure."""
        if snapshot is None:
            self.show_fraction(None, self._title)
        else:
            self.show_fraction(
                snapshot.fraction,
                snapshot.phase or self._title,
                snapshot.elapsed,
                snapshot.remaining,
            )

    def show_fraction(
        self,
        fraction: float | None,
        phase: str = "",
        elapsed: float | None = None,
        remaining: float | None = None,
        of: str = "",
    ) -> None:
        """`fraction` None shows an empty bar and an em dash; `of`: what it is that remains."""
        _set(self._phase, phase[:1].upper() + phase[1:])
        _set(self._percent, formatting.percent(fraction))
        self._bar.setValue(0 if fraction is None else round(fraction * 1000))
        _set(self._times, times_text(elapsed, remaining, of))
        self._times.setVisible(bool(self._times.text()))


def times_text(elapsed: float | None, remaining: float | None, of: str = "") -> str:
    """`3 min 05 s elapsed • about 2 min 10 s of training remaining`."""
    if elapsed is None:
        return ""
    spent = f"{formatting.duration(elapsed)} elapsed"
    if remaining is None:
        return f"{spent} • remaining time not known yet"
    what = f"{of} " if of else ""
    return f"{spent} • about {formatting.duration(remaining)} {what}remaining"


def _set(label: Text, text: str) -> None:
    """Most ticks change nothing; setting a label's text costs a layout pass."""
    if label.text() != text:
        label.setText(text)
