"""Short work off the GUI thread, with its result back in it.

Part of the bridge; imports no library, since it also opens the library.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import QDeadlineTimer, QObject, QThread, Signal
from shiboken6 import isValid

if TYPE_CHECKING:
    from mistudio.library.library import Library

log = logging.getLogger(__name__)


_put_away: list[QThread] = []


def put_away(thread: QThread) -> None:
    """Delete a thread that has ended; to be called in the GUI thread.

    Its Python object must outlive its C++ object. Where that holds the last reference, shiboken
    frees the Python object within the destructor and then looks at it once more: if freeing what a
    job kept let another thread run meanwhile, that is a segmentation fault.
    """
    thread.wait()
    _put_away[:] = [old for old in _put_away if isValid(old)]
    _put_away.append(thread)
    thread.deleteLater()


class _Call(QThread):
    """One function in a thread of its own."""

    done = Signal(object)
    failed = Signal(object)

    def __init__(self, function: Callable[[], Any], library: Library | None) -> None:
        super().__init__()
        self._function, self._library = function, library

    def run(self) -> None:
        try:
            result = self._function()
        except Exception as exc:
            self.failed.emit(exc)
        else:
            self.done.emit(result)
        finally:
            if self._library:
                self._library.close()


class Background(QObject):
    """Short work (up to a few seconds) that the GUI thread must not wait for: reading samples, a
    preview, a count. Long work that a user may want to stop is a job."""

    def __init__(self, library: Library | None = None, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._library = library
        self._calls: set[_Call] = set()

    def run(
        self,
        function: Callable[[], Any],
        then: Callable[[Any], None],
        or_else: Callable[[Exception], None] | None = None,
    ) -> None:
        """Call `function()` in a thread, then `then(result)` or `or_else(exception)` in this one.

        `then` and `or_else` must be bound methods of QObjects: Qt queues only those to their own
        thread, and drops the call where the object is gone by then.
        """
        for receiver in (then, or_else):
            if receiver is not None and not isinstance(
                getattr(receiver, "__self__", None), QObject
            ):
                raise TypeError(f"{receiver!r} is not a bound method of a QObject")
        call = _Call(function, self._library)
        call.done.connect(then)
        call.failed.connect(or_else or self._on_call_failed)
        call.finished.connect(self._on_call_finished)
        self._calls.add(call)
        call.start()

    def wait(self, seconds: float = 10.0) -> bool:
        """Wait for what still runs; False where something does not end."""
        limit = QDeadlineTimer(round(seconds * 1000))
        ended = all(call.wait(limit) for call in list(self._calls))
        self._on_call_finished()
        return ended

    def _on_call_failed(self, error: Exception) -> None:
        log.error("Background work failed", exc_info=error)

    def _on_call_finished(self) -> None:
        for call in [call for call in self._calls if call.isFinished()]:
            self._calls.discard(call)
            put_away(call)
