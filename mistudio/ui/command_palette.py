"""Finding a command by typing a part of its name (Ctrl+K)."""

from __future__ import annotations

from collections.abc import Iterable

from PySide6.QtCore import QEvent, QObject, QSize, Qt
from PySide6.QtGui import QAction, QColor, QKeyEvent
from PySide6.QtWidgets import QDialog, QHeaderView, QLineEdit, QTreeWidget, QTreeWidgetItem, QWidget

from mistudio.ui.theme import fonts, tokens
from mistudio.ui.widgets import Text, column


def matches(words: str, text: str) -> bool:
    """Every typed word occurs in the text, in any order and case."""
    return all(word in text.lower() for word in words.lower().split())


class CommandPalette(QDialog):
    """A field and a list; arrows choose, Enter runs, Esc leaves."""

    def __init__(self, actions: Iterable[QAction], parent: QWidget | None = None) -> None:
        super().__init__(parent, Qt.WindowType.Dialog | Qt.WindowType.FramelessWindowHint)
        self.setObjectName("command_palette")
        self.setWindowTitle("Command palette")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setFixedWidth(560)
        self._actions = [action for action in actions if action.isEnabled()]
        self.field = QLineEdit()
        self.field.setPlaceholderText("Type a command…")
        self.field.setAccessibleName("Command")
        self.field.textChanged.connect(self._on_field_text_changed)
        self.field.returnPressed.connect(self.run_current)
        self.field.installEventFilter(self)
        self.list = QTreeWidget()
        self.list.setColumnCount(2)
        self.list.setHeaderHidden(True)
        self.list.setRootIsDecorated(False)
        self.list.setUniformRowHeights(True)
        self.list.header().setStretchLastSection(False)
        self.list.header().setSectionResizeMode(0, QHeaderView.ResizeMode.Stretch)
        self.list.header().setSectionResizeMode(1, QHeaderView.ResizeMode.ResizeToContents)
        self.list.setAccessibleName("Commands")
        self.list.setIconSize(QSize(18, 18))
        self.list.setMinimumHeight(320)
        self.list.itemActivated.connect(self._on_list_item_activated)
        self._none = Text("No command has this name", "helper")
        layout = column(8, 16)
        for widget in (self.field, self.list, self._none):
            layout.addWidget(widget)
        layout.addWidget(Text("↑ ↓ choose   ⏎ run   Esc close", "helper"))
        self.setLayout(layout)
        self._on_field_text_changed("")
        self.field.setFocus()

    def shown(self) -> list[str]:
        return [self.list.topLevelItem(i).text(0) for i in range(self._count())]

    def _count(self) -> int:
        return self.list.topLevelItemCount()

    def run_current(self) -> None:
        item = self.list.currentItem()
        if item is None:
            return
        action: QAction = item.data(0, Qt.ItemDataRole.UserRole)
        self.accept()
        action.trigger()

    def _on_field_text_changed(self, text: str) -> None:
        self.list.clear()
        for action in self._actions:
            name = action.text().replace("&", "")
            if matches(text, f"{name} {action.statusTip()}"):
                item = QTreeWidgetItem([name, action.shortcut().toString()])
                item.setSizeHint(0, QSize(0, fonts.px(36)))
                item.setIcon(0, action.icon())
                item.setData(0, Qt.ItemDataRole.UserRole, action)
                item.setForeground(1, QColor(tokens.HELPER))
                item.setToolTip(0, action.statusTip())
                self.list.addTopLevelItem(item)
        if self._count():
            self.list.setCurrentItem(self.list.topLevelItem(0))
        self.list.setVisible(self._count() > 0)
        self._none.setVisible(self._count() == 0)

    def _on_list_item_activated(self, item: QTreeWidgetItem, column: int) -> None:
        self.run_current()

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if event.type() == QEvent.Type.KeyPress and isinstance(event, QKeyEvent):
            step = {Qt.Key.Key_Down: 1, Qt.Key.Key_Up: -1}.get(Qt.Key(event.key()))
            if step and self._count():
                place = self.list.indexOfTopLevelItem(self.list.currentItem()) + step
                self.list.setCurrentItem(self.list.topLevelItem(place % self._count()))
                return True
        return super().eventFilter(watched, event)
