"""Up to four multipliers of all strengths, for texts side by side."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtCore import Signal
from PySide6.QtGui import QShowEvent
from PySide6.QtWidgets import QWidget

from mistudio.ui.steering.request import MOST_SCALES
from mistudio.ui.widgets import Button, FloatBox, FlowLayout, IconButton, Text, column, row

_NEXT = (1.0, 0.5, 2.0, 1.5)  # what a new one begins with


class Multipliers(QWidget):
    """At least one; `changed` after every edit."""

    changed = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._boxes: list[FloatBox] = []
        self._holders: list[QWidget] = []
        self._flow = FlowLayout(8)
        self.add = Button("Add a strength", "small", "plus")
        self.add.setToolTip("Another text, with all coefficients times this number")
        self.add.clicked.connect(self._on_add_clicked)
        layout = column(6)
        layout.addWidget(Text("Strengths side by side", "label"))
        layout.addLayout(self._flow)
        self.setLayout(layout)
        self.set_values((1.0,))

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(round(box.value(), 2) for box in self._boxes)

    @property
    def boxes(self) -> list[FloatBox]:
        return list(self._boxes)

    def set_values(self, values: Sequence[float]) -> None:
        if tuple(values) == self.values and self._boxes:
            return
        for holder in self._holders:
            self._flow.removeWidget(holder)
            holder.hide()
            holder.deleteLater()
        self._boxes, self._holders = [], []
        for value in values[:MOST_SCALES] or (1.0,):
            self._append(value)
        self._place_add()
        self.changed.emit()

    def _append(self, value: float) -> None:
        number = len(self._boxes) + 1
        box = FloatBox(value, -5.0, 5.0, 0.25, 2)
        box.setPrefix("× ")
        box.setFixedWidth(104)
        box.setAccessibleName(f"Multiplier {number} of all coefficients")
        box.valueChanged.connect(self._on_box_changed)
        holder = QWidget()
        box.ensurePolished()  # its height is the style's
        holder.setFixedHeight(box.sizeHint().height())
        holder.setProperty("surface", "clear")
        line = row(box, spacing=2)
        if number > 1:
            remove = IconButton("x", f"Remove multiplier {number}", size=16)
            remove.clicked.connect(lambda checked=False, box=box: self._remove(box))
            line.addWidget(remove)
        holder.setLayout(line)
        self._boxes.append(box)
        self._holders.append(holder)
        self._flow.addWidget(holder)
        holder.show()

    def _place_add(self) -> None:
        self._flow.removeWidget(self.add)
        self._flow.addWidget(self.add)
        self.add.setFixedHeight(self._holders[0].height())  # in line with the fields
        self.add.setVisible(len(self._boxes) < MOST_SCALES)

    def showEvent(self, event: QShowEvent) -> None:
        super().showEvent(event)
        self._place_add()  # the style set a height of its own since

    def _remove(self, box: FloatBox) -> None:
        self.set_values([round(b.value(), 2) for b in self._boxes if b is not box])

    def _on_add_clicked(self, checked: bool = False) -> None:
        free = next((value for value in _NEXT if value not in self.values), 3.0)
        self._append(free)
        self._place_add()
        self._boxes[-1].setFocus()
        self.changed.emit()

    def _on_box_changed(self, value: float) -> None:
        self.changed.emit()
