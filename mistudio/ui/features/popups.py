"""Small windows of the Features tab that hang below a button: which columns are shown, the range
of one column; and the dialog that asks for a name.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PySide6.QtCore import QPoint, QSize, Qt, Signal
from PySide6.QtGui import QColor, QKeyEvent
from PySide6.QtWidgets import (
    QDialog,
    QFrame,
    QLineEdit,
    QTreeWidget,
    QTreeWidgetItem,
    QWidget,
)

from mistudio.engine.features.store import FeatureMeta
from mistudio.ui.features import shown as columns_of
from mistudio.ui.features.query import Range
from mistudio.ui.features.shown import Shown
from mistudio.ui.theme import set_look, tokens
from mistudio.ui.widgets import Button, FormRow, Text, column, debounced, row

NAME = Qt.ItemDataRole.UserRole


class Popup(QFrame):
    """Goes away where one clicks beside it, or with Esc."""

    def __init__(self, parent: QWidget, width: int) -> None:
        super().__init__(parent, Qt.WindowType.Popup)
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setProperty("surface", "toast")
        self.setFixedWidth(width)
        self.body = column(12, 16)
        self.setLayout(self.body)

    def show_below(self, anchor: QWidget) -> None:
        """Below its button, inside the screen."""
        self.adjustSize()
        corner = anchor.mapToGlobal(QPoint(0, anchor.height() + 4))
        room = anchor.screen().availableGeometry()
        corner.setX(max(room.left(), min(corner.x(), room.right() - self.width())))
        corner.setY(max(room.top(), min(corner.y(), room.bottom() - self.height())))
        self.move(corner)
        self.show()

    def keyPressEvent(self, event: QKeyEvent) -> None:
        if event.key() == Qt.Key.Key_Escape:
            self.close()
        else:
            super().keyPressEvent(event)


class ColumnChooser(Popup):
    """All columns in groups; those with a mark are shown. Typing narrows the list."""

    wanted_changed = Signal(list)

    def __init__(
        self,
        parent: QWidget,
        available: Sequence[Shown],
        wanted: Sequence[str],
        meta: FeatureMeta | None,
    ) -> None:
        super().__init__(parent, 460)
        self.setAccessibleName("Columns of the table")
        self._wanted = list(wanted)
        self.search = QLineEdit()
        self.search.setPlaceholderText("Find a column…")
        self.search.setAccessibleName("Find a column")
        self.search.setClearButtonEnabled(True)
        self.search.textChanged.connect(self._on_search_changed)
        self.tree = QTreeWidget()
        self.tree.setHeaderHidden(True)
        self.tree.setAccessibleName("Columns")
        self.tree.setMinimumHeight(340)
        self.tree.setIndentation(18)
        self.tree.setRootIsDecorated(False)
        groups: dict[str, QTreeWidgetItem] = {}
        for one in available:
            group = groups.get(one.group)
            if group is None:
                group = groups[one.group] = QTreeWidgetItem(self.tree, [one.group])
                group.setFlags(Qt.ItemFlag.ItemIsEnabled)
                group.setForeground(0, QColor(tokens.HELPER))
                group.setSizeHint(0, QSize(0, 34))
            item = QTreeWidgetItem(group, [one.title])
            item.setData(0, NAME, one.name)
            item.setSizeHint(0, QSize(0, 30))
            item.setToolTip(0, columns_of.tip(one, meta))
            on = one.name in wanted
            item.setCheckState(0, Qt.CheckState.Checked if on else Qt.CheckState.Unchecked)
        self.tree.expandAll()
        self.tree.itemChanged.connect(self._on_tree_item_changed)
        self.tree.currentItemChanged.connect(self._on_tree_current_changed)
        self.definition = Text("Choose a column to read what it says.", "helper", wrap=True)
        self.definition.setFixedHeight(150)
        self.definition.setAlignment(Qt.AlignmentFlag.AlignTop)
        self.defaults = Button("Default columns", "small", "rotate-ccw")
        self.defaults.clicked.connect(self._on_defaults_clicked)
        done = Button("Done", "small")
        done.clicked.connect(self._on_done_clicked)
        for part in (self.search, self.tree, self.definition):
            self.body.addWidget(part)
        self.body.addLayout(row(self.defaults, None, done))
        self.search.setFocus()

    def items(self) -> dict[str, QTreeWidgetItem]:
        root = self.tree.invisibleRootItem()
        groups = [root.child(i) for i in range(root.childCount())]
        found = [group.child(i) for group in groups if group for i in range(group.childCount())]
        return {item.data(0, NAME): item for item in found if item}

    def _on_search_changed(self, text: str) -> None:
        wanted = text.casefold().split()
        for item in self.items().values():
            words = f"{item.text(0)} {item.parent().text(0)} {item.toolTip(0)}".casefold()
            item.setHidden(not all(word in words for word in wanted))
        root = self.tree.invisibleRootItem()
        for i in range(root.childCount()):
            group = root.child(i)
            left = any(not group.child(j).isHidden() for j in range(group.childCount()))
            group.setHidden(not left)

    def _on_tree_item_changed(self, item: QTreeWidgetItem, place: int) -> None:
        name = item.data(0, NAME)
        on = item.checkState(0) == Qt.CheckState.Checked
        if on and name not in self._wanted:
            # Before the star, which stands last; elsewhere at the end.
            last = self._wanted.index(columns_of.STAR) if self._stands_last() else None
            self._wanted.insert(len(self._wanted) if last is None else last, name)
        elif not on and name in self._wanted:
            self._wanted.remove(name)
        self.wanted_changed.emit(list(self._wanted))

    def _stands_last(self) -> bool:
        return bool(self._wanted) and self._wanted[-1] == columns_of.STAR

    def _on_tree_current_changed(self, item: QTreeWidgetItem | None, old: object) -> None:
        if item is not None and item.toolTip(0):
            self.definition.setText(item.toolTip(0))

    def _on_defaults_clicked(self, checked: bool = False) -> None:
        self._wanted = list(columns_of.DEFAULT)
        self.tree.blockSignals(True)
        for name, item in self.items().items():
            on = name in self._wanted
            item.setCheckState(0, Qt.CheckState.Checked if on else Qt.CheckState.Unchecked)
        self.tree.blockSignals(False)
        self.wanted_changed.emit(list(self._wanted))

    def _on_done_clicked(self, checked: bool = False) -> None:
        self.close()


class RangeEditor(Popup):
    """The bounds of one column; the table follows while they are typed."""

    range_changed = Signal(object)

    def __init__(
        self,
        parent: QWidget,
        shown: Shown,
        values: np.ndarray,
        old: Range | None,
        meta: FeatureMeta | None,
    ) -> None:
        super().__init__(parent, 400)
        self.setAccessibleName(f"Range of {shown.title}")
        self._shown = shown
        unit = "%" if shown.percent else shown.unit
        self.low, self.high = QLineEdit(), QLineEdit()
        for box, name, bound in (
            (self.low, "From", old.low if old else None),
            (self.high, "To", old.high if old else None),
        ):
            box.setAccessibleName(f"{name}: {shown.title}")
            box.setPlaceholderText("no limit")
            box.setText("" if bound is None else columns_of.bound_text(shown, bound))
            box.textChanged.connect(debounced(self, 30, self._apply))
            box.returnPressed.connect(self.close)
        self.body.addWidget(Text(shown.title, "card"))
        self.body.addWidget(Text(columns_of.tip(shown, meta), "helper", wrap=True))
        suffix = f" ({unit})" if unit else ""
        fields = row(
            FormRow(f"From{suffix}", self.low), FormRow(f"To{suffix}", self.high), spacing=12
        )
        fields.setStretch(0, 1)
        fields.setStretch(1, 1)
        self.body.addLayout(fields)
        self._wrong = Text("", "error", wrap=True)
        self._wrong.hide()
        self.body.addWidget(self._wrong)
        self.body.addWidget(Text(spread_text(shown, values), "helper", wrap=True))
        self.remove = Button("No limits", "small", "x")
        self.remove.clicked.connect(self._on_remove_clicked)
        done = Button("Done", "small")
        done.clicked.connect(self._on_done_clicked)
        self.body.addLayout(row(self.remove, None, done))
        self.low.setFocus()

    def _apply(self) -> None:
        bounds: list[float | None] = []
        wrong = []
        for box in (self.low, self.high):
            try:
                bounds.append(columns_of.bound_of(self._shown, box.text()))
                good = True
            except ValueError:
                wrong.append(box.text().strip())
                good = False
            set_look(box, invalid=str(not good).lower())
        said = f"“{wrong[0]}” is not a number." if wrong else ""
        if not wrong and None not in bounds and bounds[0] > bounds[1]:  # type: ignore[operator]
            said = "The lower end is above the upper one: nothing lies between."
        self._wrong.setText(said)
        self._wrong.setVisible(bool(said))
        if not wrong:
            self.range_changed.emit(Range(self._shown.name, bounds[0], bounds[1]))

    def _on_remove_clicked(self, checked: bool = False) -> None:
        self.range_changed.emit(Range(self._shown.name))
        self.close()

    def _on_done_clicked(self, checked: bool = False) -> None:
        self._apply()
        self.close()


def spread_text(shown: Shown, values: np.ndarray) -> str:
    """`From 0% to 12%; the middle half from 0.02% to 0.3% (9,120 features with a number).`"""
    numbers = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    if not len(numbers):
        return "No feature has this number."
    low, first, third, high = (float(x) for x in np.percentile(numbers, (0, 25, 75, 100)))
    said = [columns_of.written(shown, value) for value in (low, high, first, third)]
    return (
        f"From {said[0]} to {said[1]}; the middle half from {said[2]} to {said[3]} "
        f"({len(numbers):,} features)."
    )


class NameDialog(QDialog):
    """Asks for the name of a list or a view. `named` brings it."""

    named = Signal(str)

    def __init__(self, parent: QWidget, title: str, label: str, name: str = "") -> None:
        super().__init__(parent)
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setWindowTitle(title)
        self.setMinimumWidth(420)
        self.name = QLineEdit(name)
        self.name.setMaxLength(80)
        self.name.selectAll()
        self.name.textChanged.connect(self._on_name_changed)
        body = column(16, 24)
        body.addWidget(Text(title, "card"))
        body.addWidget(FormRow(label, self.name))
        cancel = Button("Cancel")
        cancel.clicked.connect(self.reject)
        self.save = Button("Save", "primary")
        self.save.setDefault(True)
        self.save.clicked.connect(self.accept)
        body.addLayout(row(None, cancel, self.save))
        self.setLayout(body)
        self._on_name_changed(name)
        self.accepted.connect(self._on_accepted)
        self.name.setFocus()

    def _on_name_changed(self, text: str) -> None:
        self.save.setEnabled(bool(text.strip()))

    def _on_accepted(self) -> None:
        self.named.emit(self.name.text().strip())
