"""The record of a run, from its card: as JSON, or as a page to print."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtWidgets import QFileDialog, QMenu, QWidget

from mistudio.errors import UserError, explain
from mistudio.library.records import Training
from mistudio.ui.services import Services
from mistudio.ui.theme import icons
from mistudio.ui.training.presenter import TrainingPresenter
from mistudio.ui.widgets import Button

HELP = (
    "<qt>Everything that says how this run came about: configuration, seed, versions, hashes of "
    "model, text and tokenizer, and every measure with its definition.</qt>"
)


class RecordButton(Button):
    """`Run Record` with a menu: Save JSON…, Save Printable Page…"""

    def __init__(
        self,
        services: Services,
        presenter: TrainingPresenter,
        training: Training,
        title: str,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__("Run Record", "secondary", "file-text", HELP, parent)
        self.setAccessibleName(f"Run Record: {title}")
        self._services, self._presenter, self._training = services, presenter, training
        menu = QMenu(self)
        menu.setToolTipsVisible(True)
        self.json = menu.addAction(icons.icon("save"), "Save JSON…")
        self.json.setToolTip("For programs; its schema comes with miStudio")
        self.html = menu.addAction(icons.icon("file-text"), "Save Printable Page…")
        self.html.setToolTip(
            "A page of HTML with the curves: print it, or save it as PDF, in a browser"
        )
        self.json.triggered.connect(self._on_json_triggered)
        self.html.triggered.connect(self._on_html_triggered)
        self.setMenu(menu)

    def _on_json_triggered(self, checked: bool = False) -> None:
        self._save("json", "JSON (*.json)", to_print=False)

    def _on_html_triggered(self, checked: bool = False) -> None:
        self._save("html", "Web page (*.html)", to_print=True)

    def _save(self, ending: str, kind: str, to_print: bool) -> None:
        name = "".join(c if c.isalnum() or c in "._- " else "-" for c in self._training.name)
        suggested = str(Path.home() / f"{name.strip() or 'run'}.{ending}")
        chosen, _ = QFileDialog.getSaveFileName(self, "Save the run's record", suggested, kind)
        if not chosen:
            return
        path = Path(chosen)
        if not path.suffix:
            path = path.with_name(f"{path.name}.{ending}")
        self._presenter.save_record(
            self._training.id, path, to_print, self._on_saved, self._on_failed
        )

    def _on_saved(self, path: Path) -> None:
        self._services.toasts.success("The run's record is saved", str(path))

    def _on_failed(self, error: Exception) -> None:
        known = explain(error)
        self._services.toasts.error(
            known or UserError("The run's record could not be saved", str(error))
        )
