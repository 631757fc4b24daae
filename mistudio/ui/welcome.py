"""The first page of an empty library: three ways in, and the road to a first steered model."""

from __future__ import annotations

from dataclasses import dataclass

from PySide6.QtCore import Qt, Signal
from PySide6.QtWidgets import QGridLayout, QLabel, QWidget

from mistudio.errors import UserError
from mistudio.library.library import Library
from mistudio.ui.services import Services
from mistudio.ui.theme import icons, tokens
from mistudio.ui.widgets import Button, Card, ColumnPage, Surface, Text, column, row


@dataclass(frozen=True)
class Step:
    """One step of the road; `table` has a row once it is done."""

    title: str
    what: str
    table: str
    tab: str


STEPS = (
    Step("Add a dataset", "Text that the model will read", "datasets", "datasets"),
    Step("Add a model", "The language model to look into", "models", "models"),
    Step("Train a dictionary", "A sparse autoencoder on its activations", "saes", "training"),
    Step("Discover features", "What each direction fires on", "feature_runs", "features"),
    Step("Steer", "Turn a feature up and read the difference", "generations", "steering"),
)


def steps_done(library: Library) -> list[bool]:
    return [getattr(library, step.table).count() > 0 for step in STEPS]


class _StepRow(Surface):
    chosen = Signal(str)

    def __init__(self, number: int, step: Step) -> None:
        super().__init__("row", None, 12)
        self._step, self._number = step, number
        self._mark = QLabel()
        self._mark.setFixedSize(24, 24)
        self._mark.setScaledContents(True)
        self._state = Text("", "helper")
        go = Button(f"Open {step.tab.capitalize()}", "link")
        go.setAccessibleName(f"{step.title}: open the {step.tab.capitalize()} tab")
        go.clicked.connect(self._on_go_clicked)
        texts = column(2)
        texts.addWidget(Text(f"{number}. {step.title}", "body"))
        texts.addWidget(Text(step.what, "helper"))
        line = row(self._mark, texts, None, self._state, go)
        self.add(line)
        self.show_done(False)

    def show_done(self, done: bool) -> None:
        name, colour = ("circle-check", tokens.EMERALD) if done else ("circle", tokens.EDGE)
        self._mark.setPixmap(icons.pixmap(name, colour, 24, 2.0))
        self._state.setText("Done" if done else "")
        self.setAccessibleName(
            f"Step {self._number}, {self._step.title}: {'done' if done else 'to do'}"
        )

    def _on_go_clicked(self, checked: bool = False) -> None:
        self.chosen.emit(self._step.tab)


class WelcomePage(ColumnPage):
    """Not a tab: shown at the start while the library is empty, and from the Help menu."""

    def __init__(self, services: Services, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._services = services
        head = column(6)
        head.addWidget(Text("Welcome to MechInterp Studio", "h1"))
        head.addWidget(
            Text(
                "Look inside a language model on your own machine: train a sparse autoencoder on "
                "its activations, read the features it finds, and steer the model with them.",
                "helper",
                wrap=True,
            )
        )
        self.add(head)

        self.try_sample = Button("Try the sample", "primary", "flask-conical")
        self.try_sample.clicked.connect(self._on_try_sample_clicked)
        self.add_dataset = Button("Add a dataset", "secondary", "database")
        self.add_dataset.clicked.connect(self._on_add_dataset_clicked)
        self.add_model = Button("Add a model", "secondary", "cpu")
        self.add_model.clicked.connect(self._on_add_model_clicked)
        grid = QGridLayout()
        grid.setSpacing(tokens.GAP)
        for place, (icon, colour, title, what, button) in enumerate(
            (
                ("flask-conical", tokens.EMERALD, "In a few minutes",
                 "A small corpus and a small model: the whole road below, in one go.",
                 self.try_sample),
                ("database", tokens.BLUE, "Your own text",
                 "A txt, md, jsonl, json, csv or tsv file: choose it, or drop it on Datasets.",
                 self.add_dataset),
                ("cpu", tokens.PURPLE, "A model to look into",
                 "A Hugging Face model folder from your disk or the Hub.",
                 self.add_model),
            )
        ):  # fmt: skip
            card = Card(title, icon, colour)
            text = Text(what, "helper", wrap=True)
            text.setAlignment(Qt.AlignmentFlag.AlignTop)
            card.body.addWidget(text, 1)
            card.body.addWidget(button)
            grid.addWidget(card, 0, place)
            grid.setColumnStretch(place, 1)
        self.body.addLayout(grid)

        road = Card("Your first steered model", "list-checks")
        road.body.setSpacing(8)
        self._rows = [_StepRow(number, step) for number, step in enumerate(STEPS, 1)]
        for step_row in self._rows:
            step_row.chosen.connect(self._on_step_chosen)
            road.add(step_row)
        self.add(road)
        self.body.addStretch(1)
        services.changes.changed.connect(self._on_changes_changed)
        self.refresh()

    def refresh(self) -> None:
        for step_row, done in zip(self._rows, steps_done(self._services.library), strict=True):
            step_row.show_done(done)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table in {step.table for step in STEPS}:
            self.refresh()

    def _on_step_chosen(self, tab: str) -> None:
        self._services.navigate(tab)

    def _on_add_dataset_clicked(self, checked: bool = False) -> None:
        self._services.navigate("datasets", add=True)

    def _on_add_model_clicked(self, checked: bool = False) -> None:
        self._services.navigate("models", add=True)

    def _on_try_sample_clicked(self, checked: bool = False) -> None:
        """The whole road on the sample, as one job."""
        from mistudio.jobs.kinds import Demo

        try:
            self._services.jobs.submit(Demo())
        except UserError as exc:
            self._services.toasts.error(exc)
            return
        self._services.toasts.info(
            "Trying the sample", "Follow it in the status bar or with Ctrl+J."
        )
        self.try_sample.setEnabled(False)
