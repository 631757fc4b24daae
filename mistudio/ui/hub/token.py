"""The field of the access token, and what is done with what was typed there."""

from __future__ import annotations

import functools
from typing import Any

from PySide6.QtWidgets import QCheckBox, QLineEdit, QWidget

from mistudio.errors import UserError, explain
from mistudio.ui.services import Services
from mistudio.ui.widgets import FormRow


class TokenRow(FormRow):
    """`Access Token (optional)`: hidden as it is typed, and no part of any saved state."""

    def __init__(self, services: Services, label: str, helper: str, placeholder: str,
                 parent: QWidget | None = None) -> None:  # fmt: skip
        self.field = QLineEdit()
        self.field.setEchoMode(QLineEdit.EchoMode.Password)
        self.field.setPlaceholderText(placeholder)
        self.field.setProperty("role", "mono")
        self.remember = QCheckBox("Keep it for next time")
        self.remember.setToolTip("In your system's keyring, or in a file that only you can read")
        super().__init__(label, self.field, helper, beside=self.remember, parent=parent)
        self._services = services

    @property
    def text(self) -> str:
        return self.field.text().strip()

    def apply(self, repository: str) -> bool:
        """Use the token for this repository, and keep it where that is wanted. False where it
        cannot be a token: that is said at the field."""
        from mistudio import credentials

        self.set_error("")
        if not self.text:
            return True
        try:
            credentials.use_for(repository, self.text)
        except UserError as exc:
            self.set_error(f"{exc.title}. {exc.what}")
            return False
        if self.remember.isChecked():
            work = functools.partial(credentials.remember, self.text)
            self._services.background.run(work, self._on_remembered, self._on_failed)
        return True

    def _on_remembered(self, place: Any) -> None:
        self._services.toasts.success("The access token is kept", place.sentence)

    def _on_failed(self, error: Exception) -> None:
        known = explain(error)
        self._services.toasts.error(
            known or UserError("The access token could not be kept", type(error).__name__)
        )
