"""Who asks the Hub, where it is, and whether it may be asked at all.

The engine knows neither settings nor keyrings: who does hands an `Access` over, or sets the
provider that is asked where nobody handed one over.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from mistudio.errors import Offline

DEFAULT_ENDPOINT = "https://huggingface.co"
_TRUE = {"1", "ON", "YES", "TRUE"}
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


class Secret:
    """A token that no repr, log line or traceback shows."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def hide_in(self, text: str) -> str:
        """The text without the token, should somebody have put it there."""
        return text.replace(self._text, "[hidden]") if self._text else text

    def __repr__(self) -> str:
        return "Secret(hidden)"

    __str__ = __repr__

    def __reduce__(self) -> str:
        raise TypeError("a token is never written anywhere")


@dataclass(frozen=True)
class Access:
    """`offline` says why the Hub may not be asked; empty where it may."""

    endpoint: str = DEFAULT_ENDPOINT
    token: Secret | None = field(default=None, repr=False)
    offline: str = ""

    def require(self) -> None:
        """Offline where the Hub may not be asked."""
        if self.offline:
            raise Offline(
                "Offline mode is on",
                f"The Hugging Face Hub is not asked: {self.offline}.",
                "Turn it off to use the Hub, or add a file or folder from this computer.",
            )

    def hide(self, text: str) -> str:
        return self.token.hide_in(text) if self.token else text


def endpoint_from_environment() -> str:
    """HF_ENDPOINT, read each time: huggingface_hub reads it only once, when it is imported."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT


def offline_by_environment() -> str:
    """Which environment variable forbids the Hub; empty where none does."""
    for name in _OFFLINE_VARIABLES:
        if os.environ.get(name, "").upper() in _TRUE:
            return f"{name} is set"
    return ""


def token_from_environment() -> Secret | None:
    """HF_TOKEN, else what `hf auth login` has stored."""
    from huggingface_hub import get_token

    token = get_token()
    return Secret(token) if token else None


def from_environment(repository: str | None = None) -> Access:
    """Access as huggingface_hub itself would have it."""
    offline = offline_by_environment()
    # An expired browser login would be renewed over the network: not while offline.
    token = None if offline else token_from_environment()
    return Access(endpoint_from_environment(), token, offline)


_provider: Callable[[str | None], Access] = from_environment


def set_provider(provider: Callable[[str | None], Access]) -> None:
    """Where `current_access` comes from; it is given the repository that is asked for."""
    global _provider
    _provider = provider


def current_access(repository: str | None = None) -> Access:
    """The access that holds now for a repository."""
    return _provider(repository)
