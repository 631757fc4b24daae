"""Garbage collection, which would make the window stand still, or end it.

A full garbage collection looks through everything that refers to something. With torch and
transformers imported these are 394,000 objects: 266 ms in which no thread runs Python, the window's
neither. What was imported stays to the end, so it is set aside (0 ms after).
"""

from __future__ import annotations

import gc
import sys
import threading

from PySide6.QtCore import QObject, Qt, QTimer, Signal

from mistudio.engine import garbage

INTERVAL_MS = 1000
PATIENCE = 2.0  # seconds that a worker waits for a collection


def set_imports_aside() -> None:
    """To be called when a large import has ended. Nothing happens where a model is in memory: set
    aside, its reference cycles would never be freed."""
    loaded = sys.modules.get("mistudio.jobs.loaded")
    if loaded is None or not loaded.loaded_models():
        gc.freeze()


def collect_due() -> None:
    """Collect the oldest generation that is due by Python's own thresholds."""
    counts, thresholds = gc.get_count(), gc.get_threshold()
    for generation in (2, 1, 0):
        if counts[generation] > thresholds[generation]:
            gc.collect(generation)
            return


class Collector(QObject):
    """Collects garbage in the GUI thread only, from its creation until `stop`.

    Python collects in whatever thread happens to allocate. A worker would so destroy widgets that
    are part of a reference cycle, while the GUI thread uses them: a segmentation fault, or each
    thread waits for the other's lock (Qt's of the connections, Python's). A worker that needs the
    memory asks for a collection (`engine/garbage.py`) and waits for it.
    """

    _wanted = Signal(object)

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        gc.disable()
        self._timer = QTimer(self)
        self._timer.timeout.connect(self._on_timer_timeout)
        self._timer.start(INTERVAL_MS)
        self._wanted.connect(self._on_wanted, Qt.ConnectionType.QueuedConnection)
        garbage.collect_through(self.collect)

    def collect(self) -> None:
        """From any thread. A worker gives up after a while: a window that closes may be waiting
        for it."""
        if self.thread().isCurrentThread():
            gc.collect()
            return
        done = threading.Event()
        self._wanted.emit(done)
        done.wait(PATIENCE)

    def stop(self) -> None:
        """Leave it to Python again."""
        self._timer.stop()
        garbage.collect_through()
        gc.enable()

    def _on_timer_timeout(self) -> None:
        collect_due()

    def _on_wanted(self, done: threading.Event) -> None:
        gc.collect()
        done.set()
