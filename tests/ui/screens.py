"""Pictures of window states, for looking at: `shot(window, "datasets-empty")` -> build/screens."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtCore import QCoreApplication, QEvent
from PySide6.QtWidgets import QWidget

FOLDER = Path(__file__).resolve().parents[2] / "build" / "screens"


def shot(widget: QWidget, name: str) -> Path:
    """Let layouts settle, then save what the widget shows."""
    for _ in range(3):
        QCoreApplication.processEvents()
        QCoreApplication.sendPostedEvents(None, QEvent.Type.LayoutRequest.value)
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.png"
    assert widget.grab().save(str(path))
    return path
