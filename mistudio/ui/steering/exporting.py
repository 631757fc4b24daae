"""What is selected as a file for other programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from PySide6.QtWidgets import QFileDialog, QMenu, QWidget

from mistudio.ui.services import Services
from mistudio.ui.steering.presenter import SteeringPresenter
from mistudio.ui.steering.request import Form
from mistudio.ui.widgets import Button

# Format, what the menu says, what the file is called.
FORMATS = (
    ("gguf", "Control vector for llama.cpp (GGUF)…", "GGUF (*.gguf)", "steering.gguf"),
    (
        "safetensors",
        "Tensors (safetensors)…",
        "safetensors (*.safetensors)",
        "steering.safetensors",
    ),
    ("neuronpedia", "Neuronpedia vector (JSON)…", "JSON (*.json)", "steering.json"),
    ("python", "Python program that repeats this…", "Python (*.py)", "steering.py"),
)


class ExportButton(Button):
    """A menu of formats; `form()` gives the tab's form."""

    def __init__(
        self,
        services: Services,
        presenter: SteeringPresenter,
        form: Callable[[], Form],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__("Export", "small", "download", parent=parent)
        self._services, self._presenter, self._form = services, presenter, form
        self.setAccessibleName("Export the selected features for other programs")
        menu = QMenu(self)
        for kind, text, file_filter, name in FORMATS:
            menu.addAction(text, partial(self._ask, kind, file_filter, name))
        self.setMenu(menu)
        presenter.selection_changed.connect(self.refresh)
        presenter.exported.connect(self._on_presenter_exported)
        self.refresh()

    def refresh(self) -> None:
        there = bool(self._presenter.selected)
        self.setEnabled(there)
        self.setToolTip(
            "The selected features as a vector or a program that needs no miStudio"
            if there
            else "Add at least one feature."
        )

    def _ask(self, kind: str, file_filter: str, name: str) -> None:
        chosen, _ = QFileDialog.getSaveFileName(
            self, "Export steering vector", str(Path.home() / name), file_filter
        )
        if chosen:
            self._presenter.export_vector(self._form(), kind, Path(chosen))

    def _on_presenter_exported(self, files: list[str], notes: Sequence[str] = ()) -> None:
        text = " ".join([f"{', '.join(files)}.", *notes])
        # What a file cannot say must be read: it stays until it is closed.
        seconds = 0 if notes else None
        self._services.toasts.show("success", "Steering exported", text, seconds=seconds)
