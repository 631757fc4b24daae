"""The section of saved configurations that three forms share: save, load, favourite, delete."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from PySide6.QtCore import Qt, QTimer, Signal
from PySide6.QtWidgets import QFileDialog, QFrame, QLineEdit, QScrollArea, QWidget

from mistudio.errors import UserError, explain
from mistudio.jobs import templates
from mistudio.jobs.presets import with_bindings
from mistudio.jobs.template_files import LONGEST_NAME, LONGEST_TEXT, Config, read_templates
from mistudio.library.records import Template
from mistudio.ui.services import Services
from mistudio.ui.templates.import_dialog import ImportDialog
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import (
    Button,
    Collapsible,
    ConfirmDialog,
    ElidedLabel,
    FormRow,
    IconButton,
    Surface,
    Text,
    clear,
    column,
    row,
)

LIST_HEIGHT = 256
NAMES = {"training": "Template", "extraction": "Template", "steering": "Preset"}
SAVE_TITLES = {
    "training": "Save Configuration as Template",
    "extraction": "Save Extraction Configuration",
    "steering": "Save Steering Preset",
}
AUTOMATIC = {
    "training": templates.training_name,
    "extraction": templates.extraction_name,
    "steering": templates.steering_name,
}
FILE_FILTER = "Templates (*.json)"


class TemplateRow(Surface):
    """One saved configuration; Enter or Load takes it into the form."""

    load_wanted = Signal(int)
    delete_wanted = Signal(int)
    star_wanted = Signal(int, bool)

    def __init__(self, template: Template, meta: str, parent: QWidget | None = None) -> None:
        super().__init__("row", None, 10, parent)
        self.template = template
        name = template.name
        self.star = IconButton("star", f"Favourite: {name}", size=18)
        self.star.setCheckable(True)
        self.star.setChecked(template.favourite)
        self.star.set_icon(
            "star", f"Favourite: {name}", tokens.YELLOW if template.favourite else tokens.LABEL
        )
        self.star.clicked.connect(self._on_star_clicked)
        texts = column(2)
        texts.addWidget(ElidedLabel(name, "label"))
        for text in (template.description, meta):
            if text:
                texts.addWidget(ElidedLabel(text, "helper"))
        self.load = Button("Load", "small", "upload")
        self.load.setAccessibleName(f"Load {name}")
        self.load.clicked.connect(self._on_load_clicked)
        self.delete = IconButton("trash-2", f"Delete {name}", size=18)
        self.delete.clicked.connect(self._on_delete_clicked)
        line = row(self.star, texts, self.load, self.delete, spacing=10)
        line.setStretch(1, 1)
        self.add(line)

    def stops(self) -> tuple[QWidget, ...]:
        return self.star, self.load, self.delete

    def _on_star_clicked(self, checked: bool = False) -> None:
        self.star_wanted.emit(self.template.id, checked)

    def _on_load_clicked(self, checked: bool = False) -> None:
        self.load_wanted.emit(self.template.id)

    def _on_delete_clicked(self, checked: bool = False) -> None:
        self.delete_wanted.emit(self.template.id)


class TemplateSection(Collapsible):
    """`current()` gives the form's configuration, or raises UserError where it cannot be saved;
    `meta` is a template's line of facts. `load_wanted` brings a chosen template."""

    load_wanted = Signal(object)

    def __init__(
        self,
        services: Services,
        kind: str,
        title: str,
        current: Callable[[], Config],
        meta: Callable[[Config], str],
        travels: bool = False,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(title, parent=parent)
        self.setObjectName(f"{kind}_templates")
        self._services, self._kind = services, kind
        self._current, self._meta = current, meta
        noun = NAMES[kind]
        self.save = Button(
            "Save Current Preset" if noun == "Preset" else "Save Current Config", "primary", "save"
        )
        self.save.clicked.connect(self._on_save_clicked)
        self.export = Button("Export", "info", "download", "All templates and presets as one file")
        self.export.clicked.connect(self._on_export_clicked)
        self.take_in = Button("Import", "purple", "upload", "Templates and presets from a file")
        self.take_in.clicked.connect(self._on_import_clicked)
        for button in (self.export, self.take_in):
            button.setVisible(travels)
        self.add(row(self.save, None, self.export, self.take_in, spacing=8))
        self._add_form(noun)
        self._list = column(8)
        self._list.addStretch(1)
        inner = QWidget()
        inner.setProperty("surface", "clear")
        inner.setLayout(self._list)
        self._scroll = QScrollArea()
        self._scroll.setWidgetResizable(True)
        self._scroll.setFrameShape(QFrame.Shape.NoFrame)
        self._scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self._scroll.setFocusPolicy(Qt.FocusPolicy.NoFocus)  # its rows have all there is to do
        self._scroll.setWidget(inner)
        self._empty = Text(f"No {noun.lower()}s saved yet", "helper")
        self.add(self._empty, self._scroll)
        services.changes.changed.connect(self._on_changes_changed)
        self.refresh()

    def _add_form(self, noun: str) -> None:
        self.form = Surface("tile", None, 16)
        self.name = QLineEdit()
        self.name.setMaxLength(LONGEST_NAME)
        self.name.returnPressed.connect(self._on_commit_clicked)
        self.name.textChanged.connect(self._on_name_text_changed)
        self.description = QLineEdit()
        self.description.setMaxLength(LONGEST_TEXT)
        self.description.setPlaceholderText("Description (optional)…")
        self.description.returnPressed.connect(self._on_commit_clicked)
        self._name_row = FormRow("Name", self.name)
        self.commit = Button(f"Save {noun}", "primary", "check")
        self.commit.clicked.connect(self._on_commit_clicked)
        self.cancel = Button("Cancel")
        self.cancel.clicked.connect(self._on_cancel_clicked)
        self.form.add(
            Text(SAVE_TITLES[self._kind], "label"),
            self._name_row,
            FormRow("Description", self.description),
            row(self.commit, self.cancel, None, spacing=8),
        )
        self.form.hide()
        self.add(self.form)

    # --- showing --------------------------------------------------------------------------------

    def rows(self) -> list[TemplateRow]:
        found = (self._list.itemAt(i).widget() for i in range(self._list.count()))
        return [widget for widget in found if isinstance(widget, TemplateRow)]

    def stops(self) -> list[QWidget]:
        """What Tab visits, in the order in which the eye does."""
        head = [self.button, self.save, self.export, self.take_in]
        form = [self.name, self.description, self.commit, self.cancel]
        lines = (stop for line in self.rows() for stop in line.stops())
        return [*head, *form, *lines]

    def refresh(self) -> None:
        found = self._services.library.templates.of_kind(self._kind)
        focus = self._focus_in_rows()
        clear(self._list)
        for template in found:
            line = TemplateRow(template, self._meta_of(template))
            line.load_wanted.connect(self._on_row_load_wanted)
            line.delete_wanted.connect(self._on_row_delete_wanted)
            line.star_wanted.connect(self._on_row_star_wanted)
            self._list.addWidget(line)
        self._list.addStretch(1)
        self.set_count(len(found))
        self._empty.setVisible(not found)
        self._scroll.setVisible(bool(found))
        wanted = sum(line.sizeHint().height() + 8 for line in self.rows())
        self._scroll.setFixedHeight(min(LIST_HEIGHT, wanted))
        for before, after in pairwise(self.stops()):
            QWidget.setTabOrder(before, after)
        if focus is not None:
            self._give_focus(*focus)

    def _focus_in_rows(self) -> tuple[int, int, int] | None:
        """Place of the row that has the focus, its template and which of its stops; None: none."""
        focused = self.window().focusWidget()
        for place, line in enumerate(self.rows()):
            for number, stop in enumerate(line.stops()):
                if stop is focused:
                    return place, line.template.id, number
        return None

    def _give_focus(self, place: int, template_id: int, number: int) -> None:
        """To the same template, wherever it stands now, or to what took the place of one that is
        gone."""
        rows = self.rows()
        if not rows:
            self.save.setFocus()
            return
        same = [line for line in rows if line.template.id == template_id]
        line = (same or rows[place : place + 1] or rows[-1:])[0]
        line.stops()[number].setFocus()
        # once the new rows have their places
        QTimer.singleShot(0, line, lambda: self._scroll.ensureWidgetVisible(line, 0, 8))

    def _meta_of(self, template: Template) -> str:
        try:
            return self._meta(template.config)
        except (UserError, KeyError, TypeError, ValueError):
            return "Made by another version of miStudio"

    # --- saving ---------------------------------------------------------------------------------

    def _on_save_clicked(self, checked: bool = False) -> None:
        try:
            config = self._current()
        except UserError as exc:
            self._services.toasts.error(exc)
            return
        wanted = AUTOMATIC[self._kind](config)
        self.name.setText(self._services.library.templates.free_name(self._kind, wanted))
        self.description.clear()
        self.form.show()
        self.name.setFocus()
        self.name.selectAll()

    def _on_name_text_changed(self, text: str) -> None:
        taken = self._services.library.templates.named(self._kind, text.strip())
        problem = "There is one of this name." if taken else ""
        self._name_row.set_error(problem if text.strip() else "It needs a name.")
        self.commit.setEnabled(bool(text.strip()) and not taken)

    def _on_commit_clicked(self, checked: bool = False) -> None:
        if not self.commit.isEnabled():
            return
        try:
            config = self._current()
            self._services.library.templates.save(
                self._kind, self.name.text().strip(), self.description.text().strip(), config
            )
        except UserError as exc:
            self._services.toasts.error(exc)
            return
        self.form.hide()
        self.save.setFocus()

    def _on_cancel_clicked(self, checked: bool = False) -> None:
        self.form.hide()
        self.save.setFocus()

    # --- rows -----------------------------------------------------------------------------------

    def _on_row_load_wanted(self, template_id: int) -> None:
        template = self._services.library.templates.find(template_id)
        if template is not None:
            self.load_wanted.emit(template)

    def _on_row_star_wanted(self, template_id: int, favourite: bool) -> None:
        self._services.library.templates.update(template_id, favourite=favourite)

    def _on_row_delete_wanted(self, template_id: int) -> None:
        template = self._services.library.templates.find(template_id)
        noun = NAMES[self._kind].lower()
        if template is None or not ConfirmDialog.ask(
            self, f"Delete {noun} “{template.name}”?", "You can undo this right after it."
        ):
            return
        self._services.library.templates.remove(template_id)
        self._services.toasts.info(
            f"“{template.name}” was deleted",
            action=("Undo", lambda: templates.restore(self._services.library, template)),
        )

    # --- the file -------------------------------------------------------------------------------

    def _on_export_clicked(self, checked: bool = False) -> None:
        start = str(Path.home() / templates.export_name())
        chosen, _ = QFileDialog.getSaveFileName(self, "Export templates", start, FILE_FILTER)
        if chosen:
            self.export_to(Path(chosen))

    def export_to(self, path: Path) -> None:
        library = self._services.library
        self._services.background.run(
            lambda: (templates.export_templates(library, path), path),
            self._on_exported,
            self._on_failed,
        )

    def _on_exported(self, result: tuple[int, Path]) -> None:
        count, path = result
        self._services.toasts.success(f"{count} templates exported", str(path))

    def _on_import_clicked(self, checked: bool = False) -> None:
        chosen, _ = QFileDialog.getOpenFileName(self, "Import templates", "", FILE_FILTER)
        if chosen:
            self.import_from(Path(chosen))

    def import_from(self, path: Path) -> None:
        """Read a file in the background, then show what it holds."""
        library = self._services.library
        self._services.background.run(
            lambda: (with_bindings(library, read_templates(path)), path),
            self._on_read,
            self._on_failed,
        )

    def _on_read(self, result: tuple[list[Any], Path]) -> None:
        entries, path = result
        dialog = ImportDialog(self._services, entries, path.name, self.window())
        dialog.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        dialog.open()

    def _on_failed(self, error: Exception) -> None:
        known = explain(error)
        self._services.toasts.error(known or UserError("This did not work", str(error)))

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table == "templates":
            self.refresh()
