"""How long work tells how far it is and hears that it should stop; knows no jobs, no windows."""

from __future__ import annotations

from typing import Protocol


class Cancelled(Exception):
    """The user stopped the work. Never shown as an error."""


class Interrupted(Cancelled):
    """The work must end now and is to go on later: the application quits. What can be kept for
    that is kept; where nothing can, it is a cancellation."""


class RolledBack(Cancelled):
    """The work goes back to something that it kept, and on from there."""


class Progress(Protocol):
    """What every long engine function takes.

    `check` is called at least every 200 ms of work: it raises `Cancelled` when the user stopped
    the work, `Interrupted` when the application quits, `RolledBack` when the user wants to go back,
    and blocks while it is paused; helper threads may call it too. `report` never blocks and may be
    called at any rate.
    """

    def check(self) -> None: ...

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None: ...


class Silent:
    """Progress that nobody watches."""

    def check(self) -> None:
        pass

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        pass


SILENT = Silent()
