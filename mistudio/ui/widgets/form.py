"""One line of a form: label, editor, helper text, and the error where the user looks."""

from __future__ import annotations

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QWidget

from mistudio.ui.theme import set_look
from mistudio.ui.widgets.containers import column, row
from mistudio.ui.widgets.text import Text


class FormRow(QWidget):
    """A label above its editor (its buddy, which also names it), helper text and error
    below; `beside` is a button at its right, `below` one under it where the row is narrow."""

    def __init__(
        self,
        label: str,
        editor: QWidget,
        helper: str = "",
        beside: QWidget | None = None,
        below: QWidget | None = None,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.editor = editor
        self.label = Text(label, "label")
        self.label.setBuddy(editor)
        if not editor.accessibleName():
            editor.setAccessibleName(label.replace("&", ""))
        self.helper = Text(helper, "helper", wrap=True)
        self.helper.setVisible(bool(helper))
        self.error = Text("", "error", wrap=True)
        self.error.hide()
        layout = column(6)
        layout.addWidget(self.label)
        if beside is None:
            layout.addWidget(editor)
        else:
            line = row(editor, beside, spacing=8)
            line.setStretch(0, 1)
            layout.addLayout(line)
        if below is not None:
            layout.addWidget(below, 0, Qt.AlignmentFlag.AlignLeft)
        layout.addWidget(self.helper)
        layout.addWidget(self.error)
        layout.addStretch(1)
        self.setLayout(layout)

    def set_label(self, label: str) -> None:
        self.label.setText(label)
        self.editor.setAccessibleName(label)

    def set_helper(self, text: str) -> None:
        self.helper.setText(text)
        self.helper.setVisible(bool(text))

    def set_error(self, text: str) -> None:
        """Show what is wrong with the value; an empty text takes the error away."""
        self.error.setText(f"⚠ {text}" if text else "")
        self.error.setVisible(bool(text))
        self.editor.setAccessibleDescription(text)
        set_look(self.editor, invalid="true" if text else "false")
