"""The card of an imported SAE: where it is from, what was measured of it, what can be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PySide6.QtCore import Signal
from PySide6.QtWidgets import QGridLayout, QWidget

from mistudio import formatting
from mistudio.engine.training.compare import METRICS, Metric, finite
from mistudio.library.records import Dataset, Sae
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.times import clock_time
from mistudio.ui.training.compare.tables import metric_text
from mistudio.ui.training.form import encoder_title, point_title
from mistudio.ui.widgets import (
    Badge,
    Button,
    Card,
    Choice,
    ElidedLabel,
    ProgressRow,
    StatTile,
    Text,
    column,
    picture,
    row,
)

FORMATS = {
    "saelens": "SAELens",
    "sparsify": "sparsify",
    "gemma_scope": "Gemma Scope",
    "gemma_scope_2": "Gemma Scope 2",
    "dictionary_learning": "dictionary_learning",
    "openai": "OpenAI",
    "llama_scope": "Llama Scope",
    "safetensors": "safetensors (miStudio)",
}
SHOWN = ("explained_variance", "fvu", "l0", "dead_share", "ce_loss_score", "ce_increase")
ROLES = ("emerald", "blue", "blue", "red", "emerald", "purple")


@dataclass(frozen=True)
class Imported:
    """An imported SAE as its card shows it. `busy` are the jobs that work on it: what they do ->
    job id."""

    sae: Sae
    model: str
    datasets: tuple[Dataset, ...]
    discovered: bool
    busy: tuple[tuple[str, int], ...] = ()


def format_name(sae: Sae) -> str:
    name = str(sae.provenance.get("format", ""))
    return FORMATS.get(name, name)


def origin_of(sae: Sae) -> str:
    """`ada/saes (layer_1/width_16k) on the Hub`, or the path it was read from."""
    place = str(sae.provenance.get("path", ""))
    if repository := sae.provenance.get("repository"):
        inside = f" ({place})" if place not in ("", ".") else ""
        return f"{repository}{inside} on the Hub"
    return place


class ImportedCard(Card):
    """`Explore` and `Discover` as on a run's card; the text for both Discover and Measure is chosen
    here, since an imported SAE has none of its own."""

    discover_wanted = Signal(int, int)
    explore_wanted = Signal(int)
    measure_wanted = Signal(int, int)
    export_wanted = Signal(int)
    delete_wanted = Signal(int)

    def __init__(
        self, services: Services, imported: Imported, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent=parent)
        self._services = services
        self.imported = imported
        sae = imported.sae
        self._title = ElidedLabel(sae.name, "card")
        about = [
            format_name(sae),
            encoder_title(sae.architecture, sae.wiring),
            imported.model,
            point_title(sae.hook_point, sae.wiring),
            f"{formatting.count(sae.d_sae)} latents",
            f"Imported {clock_time(sae.created_at)}",
        ]
        texts = column(4)
        texts.addWidget(self._title)
        texts.addWidget(ElidedLabel(" • ".join(filter(None, about)), "helper"))
        origin = ElidedLabel(f"From {origin_of(sae)}", "helper")
        origin.setToolTip(_origin_tip(sae))
        texts.addWidget(origin)
        self.badge = Badge("imported", "Imported", "blue")
        self.head = row(picture("download", tokens.BLUE, 24), texts, self.badge, spacing=14)
        self.head.setStretch(1, 1)
        self.tiles = {metric.name: _tile(metric) for metric in METRICS if metric.name in SHOWN}
        grid = QGridLayout()
        grid.setContentsMargins(0, 0, 0, 0)
        grid.setSpacing(12)
        for place, (name, role) in enumerate(zip(SHOWN, ROLES, strict=True)):
            self.tiles[name].set_role(role)
            grid.addWidget(self.tiles[name], 0, place)
            grid.setColumnStretch(place, 1)
        self._measured = Text("", "helper", wrap=True)
        self.progress = ProgressRow("Working")
        self.dataset = Choice([])
        self.dataset.setAccessibleName(f"Dataset to look through: {sae.name}")
        self.discover = Button("Discover Features", "primary", "zap")
        self.explore = Button("Explore Features", "primary", "microscope")
        self.measure = Button("Measure", "secondary", "gauge")
        self.export = Button("Export…", "secondary", "download",
                             "Write the SAE to a folder in SAELens' format")  # fmt: skip
        self.delete = Button("Delete", "secondary", "trash-2")
        for button, slot in (
            (self.discover, self._on_discover_clicked),
            (self.explore, self._on_explore_clicked),
            (self.measure, self._on_measure_clicked),
            (self.export, self._on_export_clicked),
            (self.delete, self._on_delete_clicked),
        ):
            button.clicked.connect(slot)
            button.setAccessibleName(f"{button.text()}: {sae.name}")
        label = Text("Dataset", "label")
        label.setBuddy(self.dataset)
        self.add(self.head, grid, self._measured, self.progress)
        self.add(row(self.explore, self.discover, self.measure, label, self.dataset, None,
                     self.export, self.delete))  # fmt: skip
        self.show_imported(imported)

    def show_imported(self, imported: Imported) -> None:
        """Something changed: it was measured, features were found, a dataset came."""
        self.imported = imported
        sae = imported.sae
        for metric in METRICS:
            if metric.name in self.tiles:
                value = finite(sae.metrics.get(metric.name))
                self.tiles[metric.name].set_value(
                    metric_text(metric, value), _note(metric, sae), _tip(metric, sae)
                )
        self._measured.setText(_measured_text(sae))
        self.dataset.set_options([(one.id, one.name) for one in imported.datasets])
        busy = dict(imported.busy)
        why = "Add a dataset first: an imported SAE has no text of its own."
        for button, kind, tip in (
            (self.discover, "discover", "Looks through the chosen text for what its latents mean"),
            (self.measure, "measure_sae", "Judges it on the held-out part of the chosen text, as "
             "a training is judged at its end"),
        ):  # fmt: skip
            button.setEnabled(bool(imported.datasets) and kind not in busy)
            button.setToolTip("Under way" if kind in busy else tip if imported.datasets else why)
        self.dataset.setEnabled(bool(imported.datasets))
        self.explore.setVisible(imported.discovered)
        self.discover.set_variant("secondary" if imported.discovered else "primary")
        self.progress.setVisible(bool(busy))
        self.setAccessibleName(f"{sae.name}, imported SAE")
        self.show_progress()

    def show_progress(self) -> None:
        for kind, job_id in self.imported.busy[:1]:
            snapshot = self._services.jobs.snapshot(job_id)
            self.progress.show_snapshot(snapshot)
            if snapshot is None:
                waits = "Measuring" if kind == "measure_sae" else "Discovering features"
                self.progress.show_fraction(None, f"{waits}: waits for the job before it")

    def _dataset_id(self) -> int:
        return int(self.dataset.value)

    def _on_discover_clicked(self, checked: bool = False) -> None:
        self.discover_wanted.emit(self.imported.sae.id, self._dataset_id())

    def _on_measure_clicked(self, checked: bool = False) -> None:
        self.measure_wanted.emit(self.imported.sae.id, self._dataset_id())

    def _on_explore_clicked(self, checked: bool = False) -> None:
        self.explore_wanted.emit(self.imported.sae.id)

    def _on_export_clicked(self, checked: bool = False) -> None:
        self.export_wanted.emit(self.imported.sae.id)

    def _on_delete_clicked(self, checked: bool = False) -> None:
        self.delete_wanted.emit(self.imported.sae.id)


def _tile(metric: Metric) -> StatTile:
    return StatTile(metric.label, note=" ")


def _note(metric: Metric, sae: Sae) -> str:
    if metric.name == "l0" and sae.k:
        return f"trained for {sae.k:g}"
    if metric.name == "dead_share":
        return f"of {formatting.short_count(sae.d_sae)} latents"
    return metric.unit or " "


def _tip(metric: Metric, sae: Sae) -> str:
    sample = sae.metrics.get(metric.sample)
    noun = "held-out tokens" if metric.sample == "tokens" else "held-out predictions"
    on = f"On {formatting.count(sample)} {noun}." if sample else "Not measured yet."
    return f"<qt>{metric.definition} {on}</qt>"


def _measured_text(sae: Sae) -> str:
    measured = sae.metrics.get("measured")
    if not measured:
        return "Not measured yet: its files tell no metrics. Choose a text and Measure it."
    return (
        f"Measured on the held-out part of {measured.get('dataset')}: "
        f"{formatting.count(sae.metrics.get('tokens') or 0)} tokens, windows of "
        f"{measured.get('context')}."
    )


def _origin_tip(sae: Sae) -> str:
    notes: Sequence[object] = sae.provenance.get("notes") or ()
    revision = str(sae.provenance.get("revision") or "")
    lines = [origin_of(sae), f"Revision {revision[:12]}" if revision else "", *map(str, notes)]
    return "\n".join(filter(None, lines))
