"""Signing in to the Hub on the settings page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from PySide6.QtWidgets import QApplication, QLineEdit

from mistudio import credentials
from mistudio.engine.hub import access
from mistudio.settings import Settings
from mistudio.ui.background import Background
from mistudio.ui.settings_dialog import SettingsDialog

from .checks import cut_off, nameless, too_small

TOKEN = "hf_abcdefgh12345678"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in (*access._OFFLINE_VARIABLES, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def test_sign_in_and_out(qtbot: Any, themed: QApplication, tmp_path: Path, hub: HubServer) -> None:
    background = Background()
    dialog = SettingsDialog(Settings(tmp_path / "settings.json"), background=background)
    qtbot.addWidget(dialog)
    dialog.show()
    account = dialog.account
    qtbot.waitUntil(lambda: "Not signed in" in account.state.text())
    assert "only you can read" in account.place.text()
    assert account.token.echoMode() is QLineEdit.EchoMode.Password
    assert not account.sign_in.isEnabled() and not account.sign_out.isEnabled()

    account.token.setText(TOKEN)
    account.sign_in.click()
    qtbot.waitUntil(lambda: "not accepted" in account.row.error.text())
    assert TOKEN not in account.row.error.text()
    assert credentials.remembered() is None
    assert cut_off(dialog) == [] and nameless(dialog) == [] and too_small(dialog) == []

    hub.accounts[TOKEN] = "ann"
    account.sign_in.click()
    qtbot.waitUntil(lambda: "you are signed in" in account.state.text())
    assert account.row.helper.text() == "Signed in as ann."
    assert account.token.text() == "" and account.row.error.text() == ""
    assert credentials.remembered() is not None

    account.sign_out.click()
    qtbot.waitUntil(lambda: "Not signed in" in account.state.text())
    assert credentials.remembered() is None
    dialog.close()
    assert background.wait()


def test_closing_while_the_hub_is_asked_harms_nothing(
    qtbot: Any, themed: QApplication, tmp_path: Path, hub: HubServer
) -> None:
    background = Background()
    dialog = SettingsDialog(Settings(tmp_path / "settings.json"), background=background)
    dialog.show()
    hub.throttled.append(("whoami", {"Retry-After": "1"}))
    hub.accounts[TOKEN] = "ann"
    dialog.account.token.setText(TOKEN)
    dialog.account.sign_in.click()
    qtbot.waitUntil(lambda: bool(hub.requests))
    dialog.close()
    QApplication.processEvents()
    assert background.wait()
    assert credentials.remembered() is not None
