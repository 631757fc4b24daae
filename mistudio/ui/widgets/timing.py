"""Calling something once, a little after the last time it was asked for."""

from __future__ import annotations

from collections.abc import Callable

from PySide6.QtCore import QObject, QTimer


class Debounced(QTimer):
    """`debounced(owner, 200, self._search)` gives an object to call; the last call within 200 ms
    counts. Dies with its owner."""

    def __init__(self, owner: QObject, milliseconds: int, action: Callable[[], None]) -> None:
        super().__init__(owner)
        self._action = action
        self.setSingleShot(True)
        self.setInterval(milliseconds)
        self.timeout.connect(self._on_timeout)

    def __call__(self, *_: object) -> None:
        self.start()

    def flush(self) -> None:
        """Do it now if it is pending."""
        if self.isActive():
            self.stop()
            self._action()

    def _on_timeout(self) -> None:
        self._action()


def debounced(owner: QObject, milliseconds: int, action: Callable[[], None]) -> Debounced:
    return Debounced(owner, milliseconds, action)
