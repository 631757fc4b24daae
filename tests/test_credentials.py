"""The access token: where it is kept, who may read it, and in what order tokens are used."""

from __future__ import annotations

import copy
import json
import os
import pickle
import stat
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import keyring
import keyring.backend
import keyring.errors
import pytest
from hub_server import HubServer

from mistudio import credentials, paths
from mistudio.engine.hub import Secret, access
from mistudio.errors import AccessDenied, InvalidInput, UserError
from mistudio.settings import Settings

TOKEN = "hf_abcdefgh12345678"


class MemoryKeyring(keyring.backend.KeyringBackend):
    """A real backend of `keyring`, in memory."""

    priority = 5  # type: ignore[assignment]
    name = "memory of this test"

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        return self.entries.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.entries[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        del self.entries[service, username]


class LockedKeyring(MemoryKeyring):
    def get_password(self, service: str, username: str) -> str | None:
        raise keyring.errors.KeyringLocked("the user said no")

    def set_password(self, service: str, username: str, password: str) -> None:
        raise keyring.errors.KeyringLocked(f"the user said no to {password}")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = keyring.get_keyring()
    for name in (*access._OFFLINE_VARIABLES, "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    yield
    keyring.set_keyring(before)
    credentials._typed.clear()


@pytest.fixture
def ring() -> MemoryKeyring:
    backend = MemoryKeyring()
    keyring.set_keyring(backend)
    return backend


def file() -> Path:
    return paths.config_folder() / credentials.FILE


def test_the_keyring_keeps_it_where_there_is_one(ring: MemoryKeyring) -> None:
    file().parent.mkdir(parents=True)
    file().write_text("hf_an_older_one\n")
    assert credentials.remember(f"  {TOKEN}\n").kind == "keyring"
    assert list(ring.entries.values()) == [TOKEN]
    assert not file().exists()
    token = credentials.remembered()
    assert token is not None and token.reveal() == TOKEN
    assert "memory of this test" in credentials.status().place.sentence
    credentials.forget()
    assert ring.entries == {} and credentials.remembered() is None


@pytest.mark.parametrize("locked", [True, False], ids=["locked", "none"])
def test_without_a_keyring_a_file_for_the_user_alone(
    locked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if locked:
        keyring.set_keyring(LockedKeyring())
    assert credentials.remember(TOKEN).kind == "file"
    if os.name == "posix":
        assert stat.S_IMODE(file().stat().st_mode) == 0o600
    assert [entry.name for entry in file().parent.iterdir()] == [credentials.FILE]
    status = credentials.status()
    assert status.remembered
    assert str(file()) in status.place.sentence and "only you can read" in status.place.sentence
    token = credentials.remembered()
    assert token is not None and token.reveal() == TOKEN
    credentials.forget()
    assert not file().exists()
    assert TOKEN not in caplog.text


def test_a_keyring_that_keeps_it_after_all_is_named(ring: MemoryKeyring) -> None:
    credentials.remember(TOKEN)
    ring.delete_password = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(UserError, match="keyring still has it"):
        credentials.forget()


@pytest.mark.parametrize(
    "text", ["", "hf_", "two words here", "hf_abc\ndef:injected", "hf_ünïcödé"]
)
def test_what_cannot_be_a_token_is_not_taken_nor_repeated(text: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        credentials.remember(text)
    assert refusal.value.field == "token"
    assert len(text) < 4 or text not in str(refusal.value)
    assert not file().exists()


def test_the_nearest_token_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(repository: str | None = None) -> str | None:
        token = credentials.access_for(repository).token
        return token.reveal() if token else None

    assert used() is None
    monkeypatch.setenv("HF_TOKEN", "hf_from_environment")
    assert used() == "hf_from_environment"
    assert credentials.status().elsewhere
    credentials.remember(TOKEN)
    assert used("a/b") == TOKEN
    credentials.use_for("https://huggingface.co/datasets/A/b", "hf_typed_for_this")
    assert used("a/B") == "hf_typed_for_this"
    assert used("a/c") == TOKEN


def test_offline_by_environment_or_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    credentials.remember(TOKEN)
    assert credentials.access_for().offline == ""
    Settings().set("offline", True)
    found = credentials.access_for()
    assert "Settings" in found.offline and found.token is None
    Settings().set("offline", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert credentials.access_for().offline == "HF_HUB_OFFLINE is set"


def test_a_secret_shows_itself_to_nobody() -> None:
    secret = Secret(TOKEN)
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        repr(access.Access(token=secret)),
    ]
    assert not any(TOKEN in text for text in shown)
    for write in (
        pickle.dumps,
        json.dumps,
        copy.deepcopy,
        lambda s: asdict(access.Access(token=s)),
    ):
        with pytest.raises(TypeError):
            write(secret)


def test_signing_in_asks_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.echo_token = True
        with pytest.raises(AccessDenied, match="not accepted") as refusal:
            credentials.sign_in(TOKEN)
        assert TOKEN not in str(refusal.value)
        assert credentials.remembered() is None
        hub.accounts[TOKEN] = "ann"
        assert credentials.sign_in(TOKEN) == "ann"
        assert credentials.remembered() is not None
        before = len(hub.requests)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert credentials.sign_in("hf_another_token") == ""  # kept, not checked
        assert len(hub.requests) == before
