"""The Overview of a dataset: what it is, where it comes from, and what can be done with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PySide6.QtCore import Signal
from PySide6.QtWidgets import QApplication, QDialog, QFileDialog, QGridLayout, QLineEdit, QWidget

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.ui.datasets.detail import DatasetPresenter
from mistudio.ui.datasets.parts import SOURCE_NAMES, count_or_dash
from mistudio.ui.services import Services
from mistudio.ui.times import clock_time
from mistudio.ui.widgets import (
    Button,
    Card,
    FormRow,
    StatTile,
    Text,
    clear,
    column,
    row,
    tiles,
)

_LONG = 400  # characters of a value of the provenance; the export has all
# Shown elsewhere on the page, or only for machines.
_NOT_LISTED = {"description", "rejected", "skipped_rows"}


class OverviewView(QWidget):
    """Facts, quick numbers, provenance, disk use; rename and delete."""

    delete_wanted = Signal()

    def __init__(
        self, services: Services, presenter: DatasetPresenter, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self._services, self._presenter = services, presenter
        self._body = column(16)
        self.disk = StatTile("Size", "—", "slate", "Bytes of every file of the dataset on disk")
        layout = column(16, 24)
        layout.addLayout(self._body)
        layout.addWidget(self._actions())
        layout.addStretch(1)
        self.setLayout(layout)
        presenter.dataset_changed.connect(self.refresh)
        presenter.tokenizations_changed.connect(self.refresh)
        presenter.disk_use_read.connect(self._on_disk_use_read)
        self.refresh()

    def _actions(self) -> QWidget:
        rename = Button("Rename…", "secondary", "pencil")
        rename.clicked.connect(self._on_rename_clicked)
        self.delete_button = Button("Move to trash…", "danger", "trash-2")
        self.delete_button.clicked.connect(self._on_delete_clicked)
        line = QWidget()
        line.setLayout(row(rename, None, self.delete_button))
        return line

    def refresh(self) -> None:
        dataset = self._presenter.dataset
        clear(self._body)
        body = self._body
        body.addWidget(Text("Dataset Information", "card"))
        where = "read where it is" if dataset.link else "stored in the library"
        self.disk = StatTile(
            "Size", formatting.size(dataset.bytes), "slate", "Bytes of its documents as stored"
        )
        facts = [
            StatTile("Source", SOURCE_NAMES[dataset.source], "slate", note=where),
            self.disk,
            StatTile("Format", "JSON Lines", "slate", note="one document a line"),
            StatTile("Status", "Ready", "emerald", note=f"added {clock_time(dataset.created_at)}"),
        ]
        body.addLayout(tiles(facts, 4 if self.width() > 900 else 2))
        description = str(dataset.provenance.get("description") or "").strip()
        if description:
            body.addWidget(Text("Description", "card"))
            body.addWidget(Text(description, "body", wrap=True, selectable=True))
        body.addWidget(Text("Quick Stats", "card"))
        body.addLayout(tiles(self._quick(), 3))
        body.addWidget(self._provenance())
        self._presenter.read_disk_use()

    def _quick(self) -> list[QWidget]:
        dataset = self._presenter.dataset
        made = self._presenter.tokenizations()
        found: dict[str, Any] = made[0].statistics if made else {}
        of = f"of {found.get('tokenizer', 'the newest tokenization')}" if made else ""
        if made:
            length = StatTile(
                "Avg Length", formatting.number(found.get("length_mean"), 0), "blue",
                "Tokens of all documents divided by their number, by the newest tokenization",
                "tokens",
            )  # fmt: skip
        else:
            mean = dataset.characters / dataset.documents if dataset.documents else None
            length = StatTile(
                "Avg Length", formatting.number(mean, 0), "blue",
                "Characters of all documents divided by their number", "characters",
            )  # fmt: skip
        samples = StatTile(
            "Total Samples", formatting.count(dataset.documents), "emerald",
            "Documents with any text; empty ones are left out when a dataset is added",
        )  # fmt: skip
        if dataset.link:
            samples.set_value(formatting.count(dataset.documents), "kept for a look; not all")
        vocabulary = StatTile(
            "Vocabulary", count_or_dash(found.get("unique_tokens")), "purple",
            "How many different tokens occur, by the newest tokenization",
            f"unique tokens {of}".strip() if made else "known once it is tokenized",
        )  # fmt: skip
        return [samples, length, vocabulary]

    def _provenance(self) -> Card:
        dataset = self._presenter.dataset
        card = Card("Provenance")
        copy = Button("Copy", "small", "copy")
        copy.setAccessibleName("Copy the provenance as JSON")
        copy.clicked.connect(self._on_copy_clicked)
        export = Button("Export JSON…", "small", "save")
        export.clicked.connect(self._on_export_clicked)
        card.add_to_header(copy, export)
        grid = QGridLayout()
        grid.setHorizontalSpacing(24)
        grid.setVerticalSpacing(8)
        grid.setColumnStretch(1, 1)
        for place, (name, value) in enumerate(_facts(dataset.origin, dataset.provenance)):
            grid.addWidget(Text(name, "helper"), place, 0)
            hashed = name in ("Revision", "SHA-256")
            role = "mono" if hashed or name == "Origin" else "small"
            grid.addWidget(Text(value, role, wrap=True, selectable=True), place, 1)
        card.add(grid)
        left_out = _left_out(dataset.provenance.get("rejected"))
        if left_out:
            card.add(Text(left_out, "small", "yellow", wrap=True, selectable=True))
        return card

    # --- commands -------------------------------------------------------------------------------

    def _text(self) -> str:
        return json.dumps(self._presenter.provenance(), indent=2, ensure_ascii=False)

    def _on_copy_clicked(self, checked: bool = False) -> None:
        QApplication.clipboard().setText(self._text())
        self._services.toasts.success("The provenance is on the clipboard")

    def _on_export_clicked(self, checked: bool = False) -> None:
        name = f"{self._presenter.dataset.name[:60]}-provenance.json".replace("/", "-")
        path, _ = QFileDialog.getSaveFileName(self, "Export the provenance", name, "JSON (*.json)")
        if not path:
            return
        try:
            Path(path).write_text(self._text() + "\n", encoding="utf-8")
        except OSError as exc:
            self._services.toasts.error("The file could not be written", str(exc))
        else:
            self._services.toasts.success("The provenance was exported", path)

    def _on_rename_clicked(self, checked: bool = False) -> None:
        dialog = RenameDialog(self._presenter.dataset.name, self)
        dialog.accepted_name.connect(self._on_name_accepted)
        dialog.open()

    def _on_name_accepted(self, name: str) -> None:
        try:
            self._presenter.rename(name)
        except UserError as exc:
            self._services.toasts.error(exc)

    def _on_delete_clicked(self, checked: bool = False) -> None:
        self.delete_wanted.emit()

    def _on_disk_use_read(self, sizes: dict[str, int]) -> None:
        lines = [f"{name}: {formatting.size(size)}" for name, size in sizes.items()]
        tokens = sum(size for name, size in sizes.items() if name != "Documents")
        note = f"{formatting.size(tokens)} of it tokens" if tokens else "on disk"
        self.disk.set_value(
            formatting.size(sum(sizes.values())), note, "On disk, every file\n" + "\n".join(lines)
        )


class RenameDialog(QDialog):
    """Asks for a name; Enter takes it."""

    accepted_name = Signal(str)

    def __init__(self, name: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setWindowTitle("Rename the dataset")
        self.setMinimumWidth(480)
        self.name = QLineEdit(name)
        self.name.setMaxLength(200)
        self.name.selectAll()
        self.name.textChanged.connect(self._on_name_changed)
        self.rename_button = Button("Rename", "primary")
        self.rename_button.setDefault(True)
        self.rename_button.clicked.connect(self._on_rename_clicked)
        cancel = Button("Cancel")
        cancel.clicked.connect(self.reject)
        layout = column(16, 24)
        layout.addWidget(FormRow("Name", self.name, "Files and tokenizations stay as they are."))
        layout.addLayout(row(None, cancel, self.rename_button))
        self.setLayout(layout)
        self.name.setFocus()

    def _on_name_changed(self, text: str) -> None:
        self.rename_button.setEnabled(bool(text.strip()))

    def _on_rename_clicked(self, checked: bool = False) -> None:
        self.accepted_name.emit(self.name.text())
        self.accept()


_NAMES = {"sha256": "SHA-256", "licence": "Licence", "url": "Address"}


def _facts(origin: str, provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known, in the order that it was written down."""
    facts = [("Origin", origin)]
    for key, value in provenance.items():
        if key in _NOT_LISTED or value in (None, "", [], {}, origin):
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if isinstance(value, int) and not isinstance(value, bool):
            text = formatting.size(value) if key.endswith("bytes") else formatting.count(value)
        if len(text) > _LONG:
            text = f"{text[:_LONG]}… (whole in the export)"
        facts.append((_NAMES.get(key, key.replace("_", " ").capitalize()), text))
    return facts


def _left_out(rejected: object) -> str:
    """Which rows were left out and why, the first ones by name."""
    if not isinstance(rejected, dict):
        return ""
    lines = []
    rows, files = rejected.get("rows", 0), rejected.get("files", 0)
    if rows or files:
        parts = [f"{formatting.count(rows)} rows"] if rows else []
        parts += [f"{formatting.count(files)} files"] if files else []
        lines.append(f"⚠ {' and '.join(parts)} could not be read and were left out:")
        for bad in rejected.get("first", [])[:5]:
            place = f"{bad.get('file')}, line {bad.get('line')}" if bad.get("line") else bad["file"]
            lines.append(f"{place}: {bad.get('reason', '')}")
    if replaced := rejected.get("replaced"):
        lines.append(f"⚠ {formatting.count(replaced)} places held no character of the encoding.")
    lines += [str(sentence) for sentence in rejected.get("left_out", [])]
    return "\n".join(lines)
