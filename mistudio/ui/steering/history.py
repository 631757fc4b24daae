"""Earlier generations with the model: look at one again, repeat it, take all of them along."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtCore import Signal
from PySide6.QtWidgets import QFileDialog, QWidget

from mistudio.library.records import Generation
from mistudio.ui.services import Services
from mistudio.ui.steering.presenter import HISTORY, SteeringPresenter
from mistudio.ui.steering.request import features_text
from mistudio.ui.steering.units import significant
from mistudio.ui.theme import set_look
from mistudio.ui.times import clock_time
from mistudio.ui.widgets import (
    Button,
    Collapsible,
    ElidedLabel,
    Surface,
    Text,
    clear,
    column,
    row,
)


class HistoryRow(Surface):
    """An earlier generation; Load again brings back its form, its features and its result."""

    opened = Signal(int)

    def __init__(
        self, generation: Generation, current: bool, parent: QWidget | None = None
    ) -> None:
        super().__init__("tile", None, 10, parent)
        self.generation_id = generation.id
        self.body.setSpacing(2)
        request = generation.request
        variants = generation.result.get("variants") or [{}]
        kl = ", ".join(significant(v.get("kl_per_token")) for v in variants)
        told = f"{clock_time(generation.created_at)} • {features_text(request)} • KL {kl} nats"
        texts = column(2)
        texts.addWidget(ElidedLabel(str(request.get("prompt", "")), "small"))
        texts.addWidget(ElidedLabel(told, "helper"))
        self.button = Button("Shown" if current else "Load again", "small")
        self.button.setEnabled(not current)
        self.button.setAccessibleName(
            f"Load the generation of {clock_time(generation.created_at)} again"
        )
        self.button.clicked.connect(self._on_button_clicked)
        line = row(texts, self.button)
        line.setStretch(0, 1)
        self.add(line)
        if current:
            set_look(self, current="true")

    def _on_button_clicked(self, checked: bool = False) -> None:
        self.opened.emit(self.generation_id)


class History(Collapsible):
    """The newest of them; `opened` tells which is wanted."""

    opened = Signal(int)

    def __init__(
        self, services: Services, presenter: SteeringPresenter, parent: QWidget | None = None
    ) -> None:
        super().__init__("Earlier generations", 0, parent=parent)
        self._services, self._presenter = services, presenter
        self._current: int | None = None
        self._place = column(6)
        self.export = Button("Export", "info", "download", "All of this model, as CSV or JSON")
        self.export.clicked.connect(self._on_export_clicked)
        self._note = Text("", "helper", wrap=True)
        head = row(self._note, self.export)
        head.setStretch(0, 1)
        self.add(head, self._place)
        presenter.history_changed.connect(self.refresh)
        self.refresh()

    def rows(self) -> list[HistoryRow]:
        found = (self._place.itemAt(i).widget() for i in range(self._place.count()))
        return [widget for widget in found if isinstance(widget, HistoryRow)]

    def show_current(self, generation_id: int | None) -> None:
        self._current = generation_id
        self.refresh()

    def refresh(self) -> None:
        generations = self._presenter.history()
        clear(self._place)
        for generation in generations:
            line = HistoryRow(generation, generation.id == self._current)
            line.opened.connect(self.opened)
            self._place.addWidget(line)
        self.set_count(len(generations))
        self.setVisible(bool(generations))
        self._note.setText(
            f"The newest {HISTORY}; Export has all." if len(generations) == HISTORY else ""
        )

    def _on_export_clicked(self, checked: bool = False) -> None:
        start = str(Path.home() / "miStudio-generations.csv")
        chosen, _ = QFileDialog.getSaveFileName(
            self, "Export generations", start, "Table (*.csv);;Everything (*.json)"
        )
        if chosen:
            self.export_to(Path(chosen))

    def export_to(self, path: Path) -> None:
        self._presenter.export_history(path, self._on_exported)

    def _on_exported(self, result: tuple[int, Path]) -> None:
        count, path = result
        self._services.toasts.success(f"{count} generations exported", str(path))
