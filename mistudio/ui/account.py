"""The Hugging Face account on the settings page: sign in with a token, see where it is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PySide6.QtCore import Slot
from PySide6.QtWidgets import QLineEdit, QWidget

from mistudio import credentials
from mistudio.errors import explain
from mistudio.ui.background import Background
from mistudio.ui.widgets import Button, FormRow, Text, column, row

HELP = (
    "Needed only for private and gated datasets and models. Make one at "
    "huggingface.co/settings/tokens; reading is enough."
)


class Account(QWidget):
    """`background` keeps the window free while the keyring and the Hub are asked; without one they
    are asked at once."""

    def __init__(self, background: Background | None = None, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._background = background
        self.state = Text("Looking for a remembered token…", "label", wrap=True)
        self.place = Text("", "helper", wrap=True)
        self.token = QLineEdit()
        self.token.setEchoMode(QLineEdit.EchoMode.Password)
        self.token.setPlaceholderText("hf_...")
        self.sign_in = Button("Sign in", "secondary")
        self.sign_in.setEnabled(False)
        self.sign_out = Button("Forget the token", "secondary", "trash-2")
        self.sign_out.setEnabled(False)
        self.row = FormRow("Access token", self.token, HELP, self.sign_in)
        layout = column(8)
        layout.addWidget(self.state)
        layout.addWidget(self.place)
        layout.addWidget(self.row)
        layout.addLayout(row(self.sign_out, None))
        self.setLayout(layout)
        self.token.textChanged.connect(self._on_token_changed)
        self.token.returnPressed.connect(self._on_sign_in)
        self.sign_in.clicked.connect(self._on_sign_in)
        self.sign_out.clicked.connect(self._on_sign_out)
        self._look()

    def _look(self) -> None:
        self._do(credentials.status, self._on_status)

    def _do(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        if self._background is not None:
            self._background.run(work, then, self._on_failed)
            return
        try:
            result = work()
        except Exception as exc:
            self._on_failed(exc)
        else:
            then(result)

    @Slot(object)
    def _on_status(self, status: credentials.Status) -> None:
        if status.remembered:
            text = "A token is remembered: you are signed in."
        elif status.elsewhere:
            text = "Signed in by HF_TOKEN or `hf auth login`; nothing is remembered here."
        else:
            text = "Not signed in: public datasets and models only."
        self.state.setText(text)
        self.place.setText(status.place.sentence)
        self.sign_out.setEnabled(status.remembered)

    def _on_token_changed(self, text: str) -> None:
        self.sign_in.setEnabled(bool(text.strip()))
        self.row.set_error("")

    def _on_sign_in(self, checked: bool = False) -> None:
        text = self.token.text()
        if not text.strip() or not self.token.isEnabled():
            return
        self._set_busy(True)
        self._do(lambda: credentials.sign_in(text), self._on_signed_in)

    @Slot(object)
    def _on_signed_in(self, name: str) -> None:
        self._set_busy(False)
        self.token.clear()
        said = f"Signed in as {name}." if name else "Remembered; not checked, as you work offline."
        self.row.set_helper(said)
        self._look()

    def _on_sign_out(self, checked: bool = False) -> None:
        self._set_busy(True)
        self._do(credentials.forget, self._on_signed_out)

    @Slot(object)
    def _on_signed_out(self, _: object) -> None:
        self._set_busy(False)
        self.row.set_helper(HELP)
        self._look()

    @Slot(object)
    def _on_failed(self, exc: Exception) -> None:
        self._set_busy(False)
        known = explain(exc)
        self.row.set_error(
            f"{known.title}. {known.what} {known.next_step}" if known else type(exc).__name__
        )

    def _set_busy(self, busy: bool) -> None:
        self.token.setEnabled(not busy)
        self.sign_in.setEnabled(not busy and bool(self.token.text().strip()))
        self.sign_in.setText("Asking…" if busy else "Sign in")
        self.sign_out.setEnabled(False)
