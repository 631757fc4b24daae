"""The form's fields, one for each entry of the engine's table, and the sections they stand in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from PySide6.QtCore import Qt, Signal
from PySide6.QtWidgets import QGridLayout, QLineEdit, QSizePolicy, QVBoxLayout, QWidget

from mistudio.engine.training.advice import Mend
from mistudio.engine.training.config import option
from mistudio.ui.theme import tokens
from mistudio.ui.training.form import choice_text, default_text, limits_text, times
from mistudio.ui.widgets import Button, Choice, FormRow, Surface, Text, Toggle, column, row

COLUMNS = 4  # of the whole form

# Said of fields for those who know them by an older name.
_ALSO = {
    "auxk": "Older tools offer ghost gradients for this; AuxK and re-initialisation replace them.",
    "revive": "Older tools offer ghost gradients for dead latents; AuxK and re-initialisation "
    "replace them.",
}


class Remark(QWidget):
    """Under what was chosen: advice in yellow, and a small button that mends it or the error above.
    Takes no room where there is neither."""

    wanted = Signal(object)
    """The `Mend` whose button was pressed."""

    def __init__(self, what: str, parent: QWidget | None = None) -> None:
        """`what` is remarked on, for whoever cannot see where the button stands."""
        super().__init__(parent)
        self._what = what
        self._mend: Mend | None = None
        self.text = Text("", "helper", "yellow", wrap=True)
        self.button = Button("", "small", "wand-sparkles")
        self.button.clicked.connect(self._on_button_clicked)
        layout = column(6)
        layout.addWidget(self.text)
        layout.addWidget(self.button, 0, Qt.AlignmentFlag.AlignLeft)
        self.setLayout(layout)
        self.show_remark("", None)

    def show_remark(self, advice: str, mend: Mend | None) -> None:
        self._mend = mend
        self.text.setText(f"⚠ {advice}" if advice else "")
        self.text.setVisible(bool(advice))
        label = mend.label if mend else ""
        self.button.setText(label)
        self.button.setAccessibleName(f"{label} for {self._what}" if label else self._what)
        self.button.setVisible(mend is not None)
        self.setVisible(bool(advice) or mend is not None)

    def _on_button_clicked(self, checked: bool = False) -> None:
        if self._mend is not None:
            self.wanted.emit(self._mend)


class OptionField(FormRow):
    """One field of the table. Its value is a text (empty: derived) or, for a switch, a bool."""

    changed = Signal()
    chosen = Signal()
    """The same, where the form may look another way now: of a choice or a switch."""

    def __init__(self, name: str, parent: QWidget | None = None) -> None:
        limits = option(name)
        default = default_text(name)
        editor: QWidget
        if isinstance(default, bool):
            editor = Toggle(limits["label"], default)
            editor.toggled.connect(self._on_editor_chosen)
        elif "choices" in limits:
            editor = Choice([(value, choice_text(name, value)) for value in limits["choices"]])
            editor.set_value(limits["default"])
            editor.currentIndexChanged.connect(self._on_editor_chosen)
        elif "choices_hint" in limits:
            editor = Choice([times(factor) for factor in limits["choices_hint"]])
            editor.setEditable(True)
            editor.setInsertPolicy(Choice.InsertPolicy.NoInsert)
            editor.setCurrentText(default)
            editor.editTextChanged.connect(self._on_editor_changed)
        else:
            editor = QLineEdit(default)
            editor.textChanged.connect(self._on_editor_changed)
        super().__init__(limits["label"], editor, parent=parent)
        self.remark = Remark(limits["label"])
        layout = self.layout()
        assert isinstance(layout, QVBoxLayout)
        layout.insertWidget(layout.count() - 1, self.remark)
        self.setObjectName(f"option_{name}")
        self.name = name
        unit = limits.get("unit")
        if unit and unit not in limits["label"]:
            self.label.setText(f"{limits['label']} ({unit})")
        tips = [limits["help"], _ALSO.get(name, "")]
        if limits_text(name):
            tips.append(f"From {limits_text(name)}.")
        for widget in (self, self.label, editor):
            widget.setToolTip(f"<qt>{'<br>'.join(filter(None, tips))}</qt>")

    @property
    def value(self) -> str | bool:
        if isinstance(self.editor, Toggle):
            return self.editor.isChecked()
        if isinstance(self.editor, QLineEdit):
            return self.editor.text()
        assert isinstance(self.editor, Choice)
        return self.editor.currentText() if self.editor.isEditable() else str(self.editor.value)

    def set_value(self, value: str | bool) -> None:
        if isinstance(self.editor, Toggle):
            self.editor.setChecked(bool(value))
        elif isinstance(self.editor, QLineEdit):
            self.editor.setText(str(value))
        elif isinstance(self.editor, Choice):
            if self.editor.isEditable():
                self.editor.setCurrentText(str(value))
            else:
                self.editor.set_value(value)

    def set_advice(self, text: str, mend: Mend | None) -> None:
        """What is likely to go wrong with a value that is taken; a mend of it or of an error."""
        self.remark.show_remark(text, mend)
        if not self.error.text():
            self.editor.setAccessibleDescription(text)

    def set_automatic(self, text: str) -> None:
        """What the field becomes where it is left empty."""
        if isinstance(self.editor, QLineEdit):
            self.editor.setPlaceholderText(text)

    def _on_editor_changed(self, *_: object) -> None:
        self.changed.emit()

    def _on_editor_chosen(self, *_: object) -> None:
        self.chosen.emit()


class Columns(QGridLayout):
    """`COLUMNS` equal columns, filled from the left; `place` lays widgets anew."""

    def __init__(self) -> None:
        super().__init__()
        self._fillers: list[QWidget] = []
        self.setContentsMargins(0, 0, 0, 0)
        self.setHorizontalSpacing(tokens.GAP)
        self.setVerticalSpacing(tokens.GAP)
        for number in range(COLUMNS):
            self.setColumnStretch(number, 1)
            self.setColumnMinimumWidth(number, 1)

    def place(self, widgets: Sequence[QWidget]) -> None:
        # `removeWidget` ends the item that held the widget. One that lived on (`takeAt` hands it to
        # Python) would be told of the widget's changes in place of the new one, whose size would
        # then be stale for ever: advice would be squeezed.
        while self.count():
            held = self.itemAt(0).widget()
            self.removeWidget(held)
            if held in self._fillers:
                held.deleteLater()
        # A column in which nothing stands would be narrower than the others by the spacing.
        self._fillers = [QWidget() for _ in range(COLUMNS - len(widgets))]
        for number, widget in enumerate([*widgets, *self._fillers]):
            line, at = divmod(number, COLUMNS)
            self.addWidget(widget, line, at, Qt.AlignmentFlag.AlignTop)


class Section(QWidget):
    """A heading over some of the advanced fields; those that do not apply take no room."""

    def __init__(
        self, title: str, fields: Mapping[str, OptionField], parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self.setAccessibleName(title)
        self._fields = fields
        line = Surface("line")
        line.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self._grid = Columns()
        layout = column(10)
        layout.setContentsMargins(0, 6, 0, 4)
        layout.addLayout(row(Text(title, "helper"), line))
        layout.addLayout(self._grid)
        self.setLayout(layout)
        for entry in fields.values():
            entry.setParent(self)
        self._kept: list[OptionField] = []
        self._arrange(fields)

    def show_only(self, names: Collection[str]) -> None:
        if self._arrange(names):
            self.setVisible(bool(self._kept))

    def _arrange(self, names: Collection[str]) -> bool:
        """Whether that was anything new."""
        kept = [entry for name, entry in self._fields.items() if name in names]
        if kept == self._kept:
            return False
        self._kept = kept
        self._grid.place(kept)
        for entry in self._fields.values():
            entry.setVisible(entry in kept)
        return True
