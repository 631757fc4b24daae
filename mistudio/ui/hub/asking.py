"""Questions to the Hub from a form: made with the token that stands in it, answered in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What the Hub said to question `number`."""

    number: int
    value: Any


def ask(number: int, repository: str, token: str, function: Callable[[Any], Any]) -> Answer:
    """`function(access)`, not in the window's thread. A token that stands in the form is used at
    once, and kept nowhere."""
    from mistudio import credentials

    access = credentials.access_for(repository)
    if token and not access.offline:
        access = replace(access, token=credentials.checked(token))
    return Answer(number, function(access))
