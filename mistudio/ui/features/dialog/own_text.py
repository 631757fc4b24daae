"""A text of one's own, looked at while it is typed: where one feature fires, or all starred."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PySide6.QtCore import Signal
from PySide6.QtWidgets import QCheckBox, QPlainTextEdit, QWidget

from mistudio import formatting
from mistudio.errors import Busy, explain
from mistudio.jobs.probing import Probe, probe
from mistudio.ui.features.dialog.reading import Line
from mistudio.ui.features.dialog.strips import LineStrip
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import Button, Text, clear, column, debounced, row
from mistudio.ui.widgets.token_strip import shown

if TYPE_CHECKING:
    from mistudio.ui.features.dialog.dialog import FeatureDialog

PAUSE_MS = 300
MOST_STARRED = 50


class OwnText(QWidget):
    """The newest answer wins: while one is on its way, what is typed waits for the next."""

    chosen = Signal(int)

    def __init__(self, services: Services, dialog: FeatureDialog, colour_map: str) -> None:
        super().__init__()
        self._services, self._dialog, self._colours = services, dialog, colour_map
        self._feature = -1
        self._running = self._again = False
        self._asked = ""
        self.result: Probe | None = None
        self.edit = QPlainTextEdit()
        self.edit.setObjectName("own_text")
        self.edit.setAccessibleName("Test your own text")
        self.edit.setPlaceholderText("Type or paste a text…")
        self.edit.setTabChangesFocus(True)
        self.edit.setFixedHeight(84)
        self._ask_soon = debounced(self, PAUSE_MS, self._ask)
        self.edit.textChanged.connect(self._ask_soon)
        self.all_starred = QCheckBox("All starred features too")
        self.all_starred.setToolTip(
            f"Up to {MOST_STARRED} starred features of this SAE on the same text, strongest first"
        )
        self.all_starred.toggled.connect(self._on_all_starred_toggled)
        self.status = Text("", "helper", wrap=True)
        self.strip = LineStrip(colour_map, tokens.DIALOG, chips=True)
        self.strip.hide()
        self._others = column(6)
        layout = column(8)
        layout.addWidget(Text("Test your own text", "label"))
        layout.addWidget(self.edit)
        layout.addWidget(self.all_starred)
        layout.addWidget(self.status)
        layout.addWidget(self.strip)
        layout.addLayout(self._others)
        self.setLayout(layout)
        services.jobs.idle.connect(self._on_jobs_idle)
        self._tell("")

    def show_feature(self, feature: int) -> None:
        """The text stays; what is known of it holds for every feature."""
        self._feature = feature
        self._show()

    def set_text(self, text: str) -> None:
        self.edit.setPlainText(text)
        self.edit.setFocus()

    def _tell(self, text: str) -> None:
        self.status.setText(text or "The model reads it while you type. Nothing leaves this "
                            "computer.")  # fmt: skip

    def _ask(self) -> None:
        text = self.edit.toPlainText()
        if not text.strip():
            self.result = None
            self._show()
            self._tell("")
            return
        if self._running:
            self._again = True
            return
        self._running, self._again, self._asked = True, False, text
        if self.result is None:
            self._tell("Reading…")
        sae_id, library = self._dialog.sae_id, self._services.library
        self._services.background.run(
            lambda: probe(library, sae_id, text), self._on_probed, self._on_probe_failed
        )

    def _on_probed(self, result: Probe) -> None:
        self._running = False
        if self._asked == self.edit.toPlainText() or not self._again:
            self.result = result if self.edit.toPlainText().strip() else None
            self._show()
        self._next()

    def _on_probe_failed(self, error: Exception) -> None:
        self._running = False
        self.result = None
        self._show()
        known = explain(error)
        if isinstance(error, Busy):
            self._tell(
                "A job is using the model now; your text is read as soon as that job is done."
            )
        elif known is not None:
            self._tell(f"{known.title}. {known.what} {known.next_step}".strip())
        else:
            self._tell(f"This text could not be read: {type(error).__name__}: {error}")
        self._next()

    def _next(self) -> None:
        if self._again:
            self._ask()

    def _on_jobs_idle(self) -> None:
        if self.result is None and self.edit.toPlainText().strip():
            self._ask_soon()

    def _on_all_starred_toggled(self, checked: bool) -> None:
        self._show()

    # --- what came back -------------------------------------------------------------------------

    def _show(self) -> None:
        clear(self._others)
        self.strip.setVisible(self.result is not None)
        if self.result is None:
            return
        values = self.result.of(self._feature)
        maximum = self._dialog.value_of("max_activation", self._feature) or 0.0
        self.strip.set_line(line_of(self.result, values), max(maximum, float(values.max())))
        self._tell(f"{told(self.result, values, maximum)} Read in "
                   f"{formatting.number(self.result.seconds * 1000, 0)} ms.")  # fmt: skip
        if self.all_starred.isChecked():
            self._show_starred()

    def _show_starred(self) -> None:
        assert self.result is not None
        notes = self._dialog.presenter.table.notes.of.values()
        starred = [n for n in notes if n.starred and n.feature != self._feature]
        found = [(self.result.of(note.feature), note) for note in starred]
        found.sort(key=lambda pair: -float(pair[0].max(initial=0.0)))
        if not found:
            self._others.addWidget(Text("No other feature is starred.", "helper"))
        for values, note in found[:MOST_STARRED]:
            maximum = self._dialog.value_of("max_activation", note.feature) or 0.0
            name = f"#{note.feature} {note.label}".strip()
            go = Button(name if len(name) <= 28 else f"{name[:27]}…", "link")
            go.setAccessibleName(f"Open feature {name}")
            go.setToolTip(name)
            go.setProperty("feature", note.feature)
            go.clicked.connect(self._on_starred_clicked)
            most = float(values.max(initial=0.0))
            amount = formatting.number(most, 2) if most > 0 else "silent"
            self._others.addLayout(row(go, None, Text(amount, "mono", "emerald")))
            if most > 0:
                strip = LineStrip(self._colours, tokens.DIALOG, chips=True)
                strip.set_line(line_of(self.result, values), max(maximum, most))
                self._others.addWidget(strip)
        if len(found) > MOST_STARRED:
            rest = len(found) - MOST_STARRED
            self._others.addWidget(Text(f"{rest} more starred ones are not shown.", "helper"))

    def _on_starred_clicked(self, checked: bool = False) -> None:
        self.chosen.emit(int(self.sender().property("feature")))


def line_of(found: Probe, values: np.ndarray) -> Line:
    """The typed text with one feature's activations; the token before it is left out."""
    texts: list[str] = []
    ids: list[list[int]] = []
    heats: list[float] = []
    places: list[int] = []
    for number in range(1, len(found.ids)):
        if found.pieces[number] or not texts:
            texts.append(found.pieces[number])
            ids.append([])
            heats.append(0.0)
            places.append(number)
        ids[-1].append(found.ids[number])
        heats[-1] = max(heats[-1], float(values[number]))
    peak = int(np.argmax(heats)) if max(heats, default=0.0) > 0 else -1
    return Line(
        tuple(texts), tuple(tuple(i) for i in ids), tuple(heats), (*places, len(found.ids)), peak
    )


def told(found: Probe, values: np.ndarray, maximum: float) -> str:
    """In a sentence: how strong and where."""
    n, active = int(found.counted.sum()), int((values > 0).sum())
    if not active:
        return f"Silent on all {formatting.count(n)} tokens that count."
    most = float(values.max())
    share = f" ({formatting.percent(most / maximum, 0)} of its maximum)" if maximum > 0 else ""
    line = line_of(found, values)
    return (
        f"Fires on {formatting.count(active)} of {formatting.count(n)} tokens; strongest "
        f"{formatting.number(most, 3)}{share} on “{shown(line.texts[line.peak]).strip()}”."
    )
