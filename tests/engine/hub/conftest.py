"""A Hub on the loopback interface, and access to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hub_server import HubServer

from mistudio.engine.hub import Access, Secret, access, session


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses after failures are as long as they are for people, in hundredths."""
    monkeypatch.setattr(session, "FIRST_PAUSE", 0.01)


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in access._OFFLINE_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def signed_in(hub: HubServer) -> Callable[[str], Access]:
    """Access as a user with a token that the server knows."""

    def sign_in(user: str) -> Access:
        hub.accounts[f"hf_{user}0123456789"] = user
        return Access(hub.endpoint, Secret(f"hf_{user}0123456789"))

    return sign_in
