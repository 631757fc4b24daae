"""The installed PySide6 keeps Python's booleans alive.

PySide6 6.12.0 on CPython before 3.12 drops one reference to True at every emitted signal; after
some 570 signals the interpreter aborts ("bool_dealloc"). pyqtgraph emits at every redraw.
"""

from __future__ import annotations

import sys

import pytest

QtCore = pytest.importorskip("PySide6.QtCore")


def test_emitting_a_signal_costs_no_reference_to_true() -> None:
    class Sender(QtCore.QObject):
        changed = QtCore.Signal(bool)

    received = []
    sender = Sender()
    sender.changed.connect(received.append)
    sender.changed.emit(True)
    received.clear()
    before = sys.getrefcount(True)
    for _ in range(100):
        sender.changed.emit(True)
        received.clear()
    after = sys.getrefcount(True)
    assert abs(after - before) < 10, f"{before} references to True before, {after} after 100 emits"
