"""The settings, as the table in mistudio/settings.py declares them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PySide6.QtCore import Qt
from PySide6.QtWidgets import (
    QDialog,
    QFileDialog,
    QLineEdit,
    QScrollArea,
    QVBoxLayout,
    QWidget,
)

from mistudio.errors import InvalidInput
from mistudio.settings import SETTINGS, Setting, Settings
from mistudio.ui.account import Account
from mistudio.ui.background import Background
from mistudio.ui.widgets import (
    Button,
    Card,
    Choice,
    FloatBox,
    FormRow,
    IntBox,
    Text,
    Toggle,
    column,
    row,
)


class SettingsDialog(QDialog):
    """Every change holds at once; what needs a restart says so."""

    def __init__(
        self,
        settings: Settings,
        parent: QWidget | None = None,
        background: Background | None = None,
    ) -> None:
        super().__init__(parent)
        self.setObjectName("settings_dialog")
        self.setWindowTitle("Settings")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.resize(680, 640)
        self._settings = settings
        self.editors: dict[str, QWidget] = {}
        self.rows: dict[str, FormRow] = {}
        self._readers: dict[str, Callable[[], Any]] = {}
        body = QWidget()
        body.setProperty("surface", "clear")
        inside = column(16, 24)
        body.setLayout(inside)
        inside.addWidget(Text("Settings", "h1"))
        groups: dict[str, Card] = {}
        for setting in SETTINGS:
            if setting.hidden:
                continue
            if setting.group not in groups:
                groups[setting.group] = Card(setting.group)
                inside.addWidget(groups[setting.group])
            groups[setting.group].add(self._row(setting))
        self.account = Account(background)
        groups["Hugging Face account"].add(self.account)
        inside.addStretch(1)
        scroll = QScrollArea()
        scroll.setProperty("surface", "clear")
        scroll.setWidgetResizable(True)
        scroll.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        scroll.setWidget(body)
        self._note = Text("", "small", "yellow")
        close = Button("Close", "primary")
        close.clicked.connect(self.accept)
        bottom = row(self._note, None, close)
        bottom.setContentsMargins(24, 12, 24, 16)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addWidget(scroll, 1)
        layout.addLayout(bottom)

    def _row(self, setting: Setting) -> QWidget:
        value = self._settings.get(setting.key)
        editor: QWidget
        if setting.type is bool:
            toggle = Toggle(setting.label, value)
            toggle.toggled.connect(lambda *_: self._take(setting))
            texts = column(2)
            texts.addWidget(Text(setting.label, "label"))
            texts.addWidget(Text(setting.help, "helper", wrap=True))
            line = QWidget()
            line.setLayout(row(texts, toggle))
            line.layout().setStretch(0, 1)
            self.editors[setting.key], self._readers[setting.key] = toggle, toggle.isChecked
            return line
        if setting.choices:
            combo = Choice(setting.choices)
            combo.set_value(value)
            combo.currentIndexChanged.connect(lambda *_: self._take(setting))
            editor, self._readers[setting.key] = combo, combo.currentData
        elif setting.type is str:
            field = QLineEdit(value)
            field.editingFinished.connect(lambda *_: self._take(setting))
            editor, self._readers[setting.key] = field, field.text
        else:
            low, high = setting.minimum or 0, setting.maximum or 1_000_000
            spin: IntBox | FloatBox
            if setting.type is int:
                spin = IntBox(value, int(low), int(high), suffix=setting.unit)
            else:
                spin = FloatBox(value, low, high, suffix=setting.unit)
            spin.valueChanged.connect(lambda *_: self._take(setting))
            editor, self._readers[setting.key] = spin, spin.value
        editor.setAccessibleName(setting.label)
        browse = None
        if setting.key == "library":
            browse = Button("Choose…", "secondary", "folder-open")
            browse.clicked.connect(self._on_browse_clicked)
        form_row = FormRow(setting.label, editor, setting.help, browse)
        self.editors[setting.key], self.rows[setting.key] = editor, form_row
        return form_row

    def _take(self, setting: Setting) -> None:
        value = self._readers[setting.key]()
        before = self._settings.get(setting.key)
        form_row = self.rows.get(setting.key)
        try:
            self._settings.set(setting.key, value)
        except InvalidInput as exc:
            if form_row:
                form_row.set_error(exc.what)
            return
        if form_row:
            form_row.set_error("")
        if setting.needs_restart and value != before:
            self._note.setText("Some changes hold after the next start.")

    def _on_browse_clicked(self, checked: bool = False) -> None:
        field = self.editors["library"]
        assert isinstance(field, QLineEdit)
        folder = QFileDialog.getExistingDirectory(self, "Library folder", field.text())
        if folder:
            field.setText(folder)
            self._take(SETTINGS[0])
