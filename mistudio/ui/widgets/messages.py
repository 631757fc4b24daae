"""What the window says: empty places, errors with a next step, confirmations."""

from __future__ import annotations

from PySide6.QtCore import Qt, Signal
from PySide6.QtWidgets import QApplication, QDialog, QVBoxLayout, QWidget

from mistudio.errors import UserError
from mistudio.ui.theme import tokens
from mistudio.ui.widgets.buttons import Button
from mistudio.ui.widgets.containers import Surface, column, picture, row
from mistudio.ui.widgets.text import Text


class EmptyState(QWidget):
    """Nothing here yet: an icon, what this place is for, and how to fill it."""

    action = Signal()

    def __init__(
        self,
        icon: str,
        sentence: str,
        action_text: str = "",
        helper: str = "",
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        layout = column(12, 24)
        layout.addWidget(picture(icon, tokens.EDGE, 44), 0, Qt.AlignmentFlag.AlignHCenter)
        self.sentence = Text(sentence, "body", wrap=True)
        self.sentence.setAlignment(Qt.AlignmentFlag.AlignCenter)
        layout.addWidget(self.sentence)
        if helper:
            below = Text(helper, "helper", wrap=True)
            below.setAlignment(Qt.AlignmentFlag.AlignCenter)
            layout.addWidget(below)
        self.button: Button | None = None
        if action_text:
            self.button = Button(action_text, "primary")
            self.button.clicked.connect(self._on_button_clicked)
            layout.addWidget(self.button, 0, Qt.AlignmentFlag.AlignHCenter)
        self.setLayout(layout)

    def _on_button_clicked(self, checked: bool = False) -> None:
        self.action.emit()


class ErrorPanel(Surface):
    """An error in its own words, with what to do, Try again and Copy report."""

    retry = Signal()

    def __init__(
        self,
        title: str,
        what: str = "",
        next_step: str = "",
        retryable: bool = False,
        report: str = "",
        parent: QWidget | None = None,
    ) -> None:
        super().__init__("note", "red", 16, parent)
        self._report = report
        head = row(picture("circle-alert", tokens.RED, 20), Text(title, "body", wrap=True))
        head.setStretch(1, 1)
        self.add(head)
        for text in (what, next_step):
            if text:
                line = Text(text, "small", wrap=True, selectable=True)
                self.add(line)
        self.setAccessibleName(f"{title}. {what} {next_step}".strip())
        buttons = row()
        self.retry_button = Button("Try again", "small", "rotate-ccw")
        self.retry_button.clicked.connect(self._on_retry_clicked)
        self.retry_button.setVisible(retryable)
        self.copy_button = Button("Copy report", "small", "copy")
        self.copy_button.clicked.connect(self._on_copy_clicked)
        self.copy_button.setVisible(bool(report))
        buttons.addWidget(self.retry_button)
        buttons.addWidget(self.copy_button)
        buttons.addStretch(1)
        if retryable or report:
            self.add(buttons)
        else:
            self.retry_button.setParent(self)
            self.copy_button.setParent(self)

    @classmethod
    def of_error(cls, error: UserError, report: str = "") -> ErrorPanel:
        return cls(error.title, error.what, error.next_step, error.retryable, report)

    @classmethod
    def of_row(cls, error: dict, parent: QWidget | None = None) -> ErrorPanel:
        """From a job row's `error`."""
        return cls(
            error.get("title", "Something went wrong"),
            error.get("what", ""),
            error.get("next_step", ""),
            bool(error.get("retryable")),
            error.get("traceback", ""),
            parent,
        )

    def _on_retry_clicked(self, checked: bool = False) -> None:
        self.retry.emit()

    def _on_copy_clicked(self, checked: bool = False) -> None:
        QApplication.clipboard().setText(self._report)
        self.copy_button.setText("Copied")


class ConfirmDialog(QDialog):
    """Asks before something is destroyed; Cancel has the focus."""

    def __init__(
        self,
        parent: QWidget | None,
        title: str,
        what: str,
        action: str = "Delete",
        variant: str = "danger",
    ) -> None:
        super().__init__(parent)
        self.setWindowTitle(title)
        self.setMinimumWidth(420)
        self.setMaximumWidth(560)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(24, 24, 24, 24)
        layout.setSpacing(16)
        tone = tokens.RED if variant == "danger" else tokens.YELLOW
        head = row(picture("triangle-alert", tone, 24), Text(title, "card", wrap=True))
        head.setStretch(1, 1)
        layout.addLayout(head)
        layout.addWidget(Text(what, "body", wrap=True))
        self.cancel_button = Button("Cancel")
        self.cancel_button.clicked.connect(self.reject)
        self.action_button = Button(action, variant)
        self.action_button.clicked.connect(self.accept)
        layout.addLayout(row(None, self.cancel_button, self.action_button))
        self.cancel_button.setDefault(True)
        self.cancel_button.setFocus()

    @classmethod
    def ask(cls, parent: QWidget | None, title: str, what: str, action: str = "Delete") -> bool:
        """True where the user agreed."""
        dialog = cls(parent, title, what, action)
        try:
            return dialog.exec() == QDialog.DialogCode.Accepted
        finally:
            dialog.deleteLater()
