"""Earlier generations with the model: look at one again, repeat it, take all of them along."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtCore import Signal
from PySide6.QtWidgets import QFileDialog, QWidget

from mistudio.ui.services import Services
from mistudio.ui.steering.earlier import Earlier
from mistudio.ui.steering.presenter import HISTORY, SteeringPresenter
from mistudio.ui.steering.request import features_text
from mistudio.ui.steering.units import NOTHING, significant
from mistudio.ui.times import clock_time
from mistudio.ui.widgets import (
    Button,
    Collapsible,
    ElidedLabel,
    Surface,
    Text,
    column,
    row,
)


class HistoryRow(Surface):
    """An earlier generation; Load again brings back its form, its features and its result."""

    opened = Signal(int)

    def __init__(self, earlier: Earlier, parent: QWidget | None = None) -> None:
        super().__init__("tile", None, 10, parent)
        self.generation_id = earlier.id
        self.body.setSpacing(2)
        kl = ", ".join(significant(value) for value in earlier.kl) or NOTHING
        self._earlier = earlier
        prompt = " ".join(str(earlier.request.get("prompt", "")).split())
        self._told = f"{features_text(earlier.request)} • KL {kl} nats per token"
        texts = column(2)
        self._facts = ElidedLabel("", "helper")
        texts.addWidget(ElidedLabel(prompt, "small"))
        texts.addWidget(self._facts)
        self.button = Button("Load again", "small")
        self.button.clicked.connect(self._on_button_clicked)
        line = row(texts, self.button)
        line.setStretch(0, 1)
        self.add(line)
        self.show_time()

    def show_time(self) -> None:
        """When it was, as it is said today."""
        when = clock_time(self._earlier.created_at)
        self._facts.setText(f"{when} • {self._told}")
        self.button.setAccessibleName(f"Load the generation of {when} again")

    def show_current(self, current: bool) -> None:
        """Whether it is the one that is shown above."""
        if current == self.button.isEnabled():
            self.button.setText("Shown" if current else "Load again")
            self.button.setEnabled(not current)

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
        for line in self.rows():
            line.show_current(line.generation_id == generation_id)

    def refresh(self) -> None:
        """Rows that stay are left as they are: a result must not wait for twenty new ones."""
        generations = self._presenter.history()
        wanted = {earlier.id for earlier in generations}
        for line in self.rows():
            if line.generation_id not in wanted:
                self._place.removeWidget(line)
                line.hide()
                line.deleteLater()
        there = {line.generation_id for line in self.rows()}
        for place, earlier in enumerate(generations):
            if earlier.id not in there:
                line = HistoryRow(earlier)
                line.opened.connect(self.opened)
                self._place.insertWidget(place, line)
        for line in self.rows():
            line.show_time()
        self.show_current(self._current)
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
