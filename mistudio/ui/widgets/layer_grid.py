"""Choosing layers: a grid of toggle buttons L0, L1, ... with Select All and Clear All."""

from __future__ import annotations

from collections.abc import Iterable

from PySide6.QtCore import QEvent, QObject, Qt, Signal
from PySide6.QtGui import QKeyEvent
from PySide6.QtWidgets import QFrame, QGridLayout, QPushButton, QScrollArea, QSizePolicy, QWidget

from mistudio.ui.widgets.buttons import Button
from mistudio.ui.widgets.containers import column, row
from mistudio.ui.widgets.text import Text


class LayerGrid(QWidget):
    """`columns` buttons a line; arrow keys move, Space toggles. `changed` carries the selection."""

    changed = Signal(list)

    def __init__(
        self,
        columns: int = 8,
        n_layers: int = 0,
        label: str = "Layers",
        hint: str = "Select a model to see its layers",
        clear_text: str = "Clear All",
        max_height: int = 168,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._columns, self._label_text = columns, label
        self._buttons: list[QPushButton] = []
        self._label = Text("", "label")
        self.select_all = Button("Select All", "link")
        self.clear_all = Button(clear_text, "link")
        self.select_all.clicked.connect(self._on_select_all_clicked)
        self.clear_all.clicked.connect(self._on_clear_all_clicked)
        self._hint = Text(hint, "helper", wrap=True)
        self._inner = QWidget()
        self._inner.setProperty("surface", "clear")
        self._grid = QGridLayout(self._inner)
        self._grid.setContentsMargins(0, 0, 4, 0)
        self._grid.setSpacing(6)
        self._scroll = QScrollArea()
        self._scroll.setProperty("surface", "clear")
        self._scroll.setWidgetResizable(True)
        self._scroll.setFrameShape(QFrame.Shape.NoFrame)
        self._scroll.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self._scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self._scroll.setWidget(self._inner)
        self._scroll.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self._max_height = max_height
        layout = column(6)
        layout.addLayout(row(self._label, None, self.select_all, self.clear_all, spacing=4))
        layout.addWidget(self._hint)
        layout.addWidget(self._scroll)
        self.setLayout(layout)
        self.set_n_layers(n_layers)

    @property
    def buttons(self) -> list[QPushButton]:
        return list(self._buttons)

    @property
    def n_layers(self) -> int:
        return len(self._buttons)

    def set_n_layers(self, n_layers: int) -> None:
        """Make the buttons anew; what was selected and still exists stays selected."""
        if n_layers == len(self._buttons) and n_layers:
            return
        kept = [layer for layer in self.selected() if layer < n_layers]
        for button in self._buttons:
            button.hide()
            button.deleteLater()
        self._buttons = []
        for layer in range(n_layers):
            button = QPushButton(f"L{layer}")
            button.setProperty("variant", "layer")
            button.setCheckable(True)
            button.setChecked(layer in kept)
            button.setAccessibleName(f"Layer {layer}")
            button.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
            button.installEventFilter(self)
            button.toggled.connect(self._on_layer_toggled)
            self._grid.addWidget(button, layer // self._columns, layer % self._columns)
            button.show()  # what the layout would show later has no size yet
            self._buttons.append(button)
        for place in range(self._columns):
            self._grid.setColumnStretch(place, 1)
        self._hint.setVisible(n_layers == 0)
        self._scroll.setVisible(n_layers > 0)
        self._scroll.setFixedHeight(min(self._max_height, self._inner.sizeHint().height() + 2))
        for button in (self.select_all, self.clear_all):
            button.setEnabled(n_layers > 0)
        self._show_count()

    def selected(self) -> list[int]:
        return [layer for layer, button in enumerate(self._buttons) if button.isChecked()]

    def set_selected(self, layers: Iterable[int]) -> None:
        wanted = set(layers)
        before = self.selected()
        for layer, button in enumerate(self._buttons):
            button.blockSignals(True)
            button.setChecked(layer in wanted)
            button.blockSignals(False)
        self._show_count()
        if self.selected() != before:
            self.changed.emit(self.selected())

    def _show_count(self) -> None:
        selected, layers = len(self.selected()), len(self._buttons)
        text = f"{self._label_text} ({selected} of {layers})" if layers else self._label_text
        self._label.setText(text)
        self._inner.setAccessibleName(text)

    def _on_layer_toggled(self, checked: bool) -> None:
        self._show_count()
        self.changed.emit(self.selected())

    def _on_select_all_clicked(self, checked: bool = False) -> None:
        self.set_selected(range(len(self._buttons)))

    def _on_clear_all_clicked(self, checked: bool = False) -> None:
        self.set_selected([])

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if event.type() == QEvent.Type.KeyPress and watched in self._buttons:
            assert isinstance(event, QKeyEvent)
            step = {
                Qt.Key.Key_Left: -1,
                Qt.Key.Key_Right: 1,
                Qt.Key.Key_Up: -self._columns,
                Qt.Key.Key_Down: self._columns,
            }.get(Qt.Key(event.key()))
            if step is not None:
                target = self._buttons.index(watched) + step
                if 0 <= target < len(self._buttons):
                    self._buttons[target].setFocus(Qt.FocusReason.TabFocusReason)
                    self._scroll.ensureWidgetVisible(self._buttons[target])
                return True
        return super().eventFilter(watched, event)
