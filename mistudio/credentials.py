"""The Hugging Face access token: where it is kept, and what a request to the Hub is made with.

The system's keyring keeps it; where there is none, a file that only the user can read. It is never
written anywhere else: no record, job, log or error text has it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mistudio import logs
from mistudio.engine.hub.access import (
    Access,
    Secret,
    endpoint_from_environment,
    offline_by_environment,
    set_provider,
    token_from_environment,
)
from mistudio.engine.hub.repository import check_repository
from mistudio.errors import InvalidInput, UserError
from mistudio.paths import config_folder
from mistudio.settings import Settings

log = logging.getLogger(__name__)

SERVICE, USER = "miStudio", "hugging-face-token"
FILE = "hugging-face-token"
_KEYRING_SENTENCE = "The token is kept in your system's keyring ({})."
_FILE_SENTENCE = "The token is kept in a file that only you can read: {}"
_typed: dict[str, Secret] = {}


@dataclass(frozen=True)
class Place:
    """Where the token is kept (`kind`: keyring or file), in a sentence for the settings page."""

    kind: str
    sentence: str


def place() -> Place:
    """Where a token would be kept now. Asks the system's keyring, which may take a moment."""
    backend = _keyring()
    if backend is not None:
        return Place("keyring", _KEYRING_SENTENCE.format(_name(backend)))
    return Place("file", f"Your system offers no keyring. {_FILE_SENTENCE.format(_file())}")


@dataclass(frozen=True)
class Status:
    """For the settings page. `elsewhere`: HF_TOKEN or `hf auth login` signs in where nothing is
    remembered here."""

    remembered: bool
    elsewhere: bool
    place: Place


def status() -> Status:
    """How the Hub would be asked now. May take a moment: not for the window's thread."""
    kept = remembered() is not None
    offline = bool(offline_by_environment() or Settings().get("offline"))
    elsewhere = not kept and not offline and token_from_environment() is not None
    if kept and _file().exists():
        return Status(kept, elsewhere, Place("file", _FILE_SENTENCE.format(_file())))
    return Status(kept, elsewhere, place())


def sign_in(text: str) -> str:
    """Ask the Hub whose token this is, then remember it; the account's name, or "" where the Hub
    may not be asked now (offline). UserError where the token is refused: then nothing changes."""
    token = checked(text)
    access = replace(access_for(), token=token)
    name = "" if access.offline else whose(access)
    remember(token.reveal())
    return name


def remembered() -> Secret | None:
    """The token that was remembered; None where there is none."""
    backend = _keyring()
    if backend is not None:
        with _quiet("read"):
            if text := backend.get_password(SERVICE, USER):
                return _secret(text)
    try:
        text = _file().read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return _secret(text) if text else None


def remember(text: str) -> Place:
    """Keep a token, in place of any earlier one; where it went. InvalidInput where it cannot be
    one."""
    text = checked(text).reveal()
    backend = _keyring()
    if backend is not None:
        with _quiet("write"):
            backend.set_password(SERVICE, USER, text)
            if backend.get_password(SERVICE, USER) == text:
                _file().unlink(missing_ok=True)
                return Place(
                    "keyring", f"The token is kept in your system's keyring ({_name(backend)})."
                )
    _write_file(text)
    return Place("file", _FILE_SENTENCE.format(_file()))


def forget() -> None:
    """Remove the token from wherever it is kept, and those typed for one download."""
    _typed.clear()
    backend = _keyring()
    if backend is not None:
        with _quiet("remove"):
            if backend.get_password(SERVICE, USER) is not None:
                backend.delete_password(SERVICE, USER)
    _file().unlink(missing_ok=True)
    if remembered() is not None:
        raise UserError(
            "The token could not be removed",
            "The system's keyring still has it.",
            f"Remove the entry {SERVICE!r} in the keyring's own program.",
        )


def use_for(repository: str, text: str) -> None:
    """Use a token for one repository, as long as this process runs: nothing is written."""
    _typed[_key(repository)] = checked(text)


def checked(text: str) -> Secret:
    """A token as typed or pasted; InvalidInput where it cannot be one. The text is not repeated."""
    text = text.strip().removeprefix("Bearer ").strip()
    if len(text) < 8 or not text.isascii() or not text.isprintable() or " " in text:
        raise InvalidInput(
            "This is no access token",
            "A token is one word of letters and digits; the Hub's begin with hf_.",
            "Copy it whole from huggingface.co/settings/tokens (reading is enough).",
            field="token",
        )
    return _secret(text)


def access_for(repository: str | None = None) -> Access:
    """What a request is made with: a token typed for this repository, else the remembered one,
    else HF_TOKEN or what `hf auth login` stored. Offline where the environment or the settings
    say so: then no token is looked up either."""
    offline = offline_by_environment()
    if not offline and Settings().get("offline"):
        offline = "Settings say to work offline"
    access = Access(endpoint_from_environment(), None, offline)
    if offline:
        return access
    token = _typed.get(_key(repository or "")) or remembered() or token_from_environment()
    if token is not None:
        logs.hide(token.reveal())
    return replace(access, token=token)


def whose(access: Access | None = None) -> str:
    """The account that a token belongs to, by asking the Hub. UserError where it is refused."""
    from mistudio.engine.hub.refusals import Subject
    from mistudio.engine.hub.session import Session

    with Session(Subject("account", "This token"), access or access_for()) as session:
        answer = session.json("/api/whoami-v2")
    return str(answer.get("name") or "") if isinstance(answer, dict) else ""


def install() -> None:
    """From now on the Hub is asked with what this module says."""
    set_provider(access_for)


def _key(repository: str) -> str:
    """One key for a repository, whether its id or the address of its page was typed."""
    with contextlib.suppress(InvalidInput):
        repository = check_repository(repository)
    return repository.strip().lower()


def _secret(text: str) -> Secret:
    logs.hide(text)
    return Secret(text)


def keyring_for_secrets() -> Any:
    """The system's keyring for other secrets than the token, or None. May take a moment."""
    return _keyring()


def _keyring() -> Any:
    """The system's keyring, or None. Backends that keep passwords in plain text have a priority
    below 1: our own file is no worse, and we say where it is."""
    try:
        import keyring

        backend = keyring.get_keyring()
        return backend if float(backend.priority) >= 1 else None
    except Exception as exc:  # a backend may fail in any way when it is looked for
        log.info("No keyring: %s", type(exc).__name__)
        return None


def _name(backend: Any) -> str:
    return str(getattr(backend, "name", "") or type(backend).__name__).partition(" (")[0]


@contextlib.contextmanager
def _quiet(what: str) -> Iterator[None]:
    """A locked keyring, or one that the user keeps closed, is as good as none."""
    try:
        yield
    except Exception as exc:  # each backend raises its own kinds
        log.warning("The keyring did not %s: %s", what, type(exc).__name__)


def _file() -> Path:
    return config_folder() / FILE


def _write_file(text: str) -> None:
    """Only for the user's eyes from the first byte on (mkstemp makes the file with 0600)."""
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".token-")
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
