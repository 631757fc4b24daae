"""Which cards are chosen to be compared: by a box on each, by Ctrl+click and by Shift+click."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtCore import QEvent, QObject, Qt, Signal
from PySide6.QtGui import QMouseEvent
from PySide6.QtWidgets import QBoxLayout, QCheckBox

from mistudio.ui.widgets import Card

Key = tuple[str, int]


class Selection(QObject):
    """Keys ("run", "job" or "sae", number) in the order of their cards."""

    changed = Signal()

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.boxes: dict[Key, QCheckBox] = {}
        self._cards: dict[QObject, Key] = {}
        self._order: list[Key] = []
        self._last: Key | None = None

    @property
    def keys(self) -> list[Key]:
        return [key for key in self._order if key in self.boxes and self.boxes[key].isChecked()]

    def attach(self, card: Card, key: Key, title: str) -> None:
        """Give a card its box, in its first line before what stands at the right."""
        box = QCheckBox("Compare")
        box.setAccessibleName(f"Compare {title}")
        box.setToolTip(
            f"Choose “{title}” for a comparison. Ctrl+click on the card does the same, "
            "Shift+click chooses all from the last one to here."
        )
        head = card.body.itemAt(0).layout()
        if isinstance(head, QBoxLayout):
            head.insertWidget(min(2, head.count()), box)
        else:
            card.body.insertWidget(0, box)
        box.toggled.connect(self._on_box_toggled)
        self.boxes[key] = box
        self._cards[card] = key
        card.installEventFilter(self)

    def detach(self, card: Card) -> None:
        card.removeEventFilter(self)
        key = self._cards.pop(card, None)
        box = self.boxes.pop(key) if key in self.boxes else None
        if self._last == key:
            self._last = None
        if box is not None and box.isChecked():
            self.changed.emit()

    def set_order(self, keys: Sequence[Key]) -> None:
        self._order = list(keys)

    def clear(self) -> None:
        for box in self.boxes.values():
            box.setChecked(False)
        self._last = None

    def eventFilter(self, card: QObject, event: QEvent) -> bool:
        if event.type() == QEvent.Type.MouseButtonPress and isinstance(event, QMouseEvent):
            key, held = self._cards.get(card), event.modifiers()
            if key is not None and event.button() == Qt.MouseButton.LeftButton:
                if held & Qt.KeyboardModifier.ShiftModifier:
                    self._extend(key)
                    return True
                if held & Qt.KeyboardModifier.ControlModifier:
                    self.boxes[key].toggle()
                    return True
        return super().eventFilter(card, event)

    def _extend(self, key: Key) -> None:
        """All from the last one that was chosen to this one."""
        start = self._last if self._last in self._order else key
        ends = sorted((self._order.index(start), self._order.index(key)))
        for other in self._order[ends[0] : ends[1] + 1]:
            if other in self.boxes:
                self.boxes[other].setChecked(True)

    def _on_box_toggled(self, checked: bool) -> None:
        sender = self.sender()
        self._last = next((key for key, box in self.boxes.items() if box is sender), self._last)
        self.changed.emit()
