"""Asking for a discovery: over which text, how much of it, how many examples, for one SAE or for
all of its run.
"""

from __future__ import annotations

from PySide6.QtCore import Signal
from PySide6.QtWidgets import QCheckBox, QWidget

from mistudio import formatting
from mistudio.errors import UserError, explain
from mistudio.ui.features.presenter import FeaturesPresenter
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import (
    Button,
    Card,
    Choice,
    ErrorPanel,
    FormRow,
    IntBox,
    Text,
    clear,
    column,
    row,
)

EVALUATION_TOKENS = 500_000  # at first, or all of a shorter text
MOST = 1_000_000_000


class DiscoverCard(Card):
    """The form. `submitted` tells that a discovery was asked for, `left` that it was not."""

    submitted = Signal()
    left = Signal()

    def __init__(self, services: Services, presenter: FeaturesPresenter) -> None:
        super().__init__("Feature Discovery & Analysis", "microscope")
        self._services, self._presenter = services, presenter
        self._sae_id: int | None = None
        self.invitation = Text("", "body", wrap=True)
        self.dataset = Choice()
        self.dataset.setObjectName("discover_dataset")
        self._dataset_row = FormRow(
            "Dataset",
            self.dataset,
            "An imported SAE has no text of its own: choose what its features are looked for in.",
        )
        self.evaluation_tokens = IntBox(EVALUATION_TOKENS, 1_000, MOST, 10_000)
        self.evaluation_tokens.setObjectName("evaluation_tokens")
        self.samples = IntBox(0, 0, MOST, 1_000)
        self.samples.setObjectName("evaluation_samples")
        self.samples.setSpecialValueText("All")
        self.top_k = IntBox(20, 1, 200)
        self.top_k.setObjectName("top_k")
        self._tokens_row = FormRow(
            "Evaluation tokens", self.evaluation_tokens, "At most; rare features need many."
        )
        self._samples_row = FormRow(
            "Evaluation samples", self.samples, "Documents, the first ones; 0 for all."
        )
        fields = row(
            self._tokens_row,
            self._samples_row,
            FormRow("Top-K examples per feature", self.top_k, "Each from another context."),
            spacing=tokens.GAP,
        )
        for place in range(3):
            fields.setStretch(place, 1)
        self.whole_run = QCheckBox("All SAEs of this run in one pass")
        self.estimate = Text("", "helper", wrap=True)
        self.discover = Button("Discover Features", "primary", "zap")
        self.discover.setObjectName("discover_features")
        self.discover.clicked.connect(self._on_discover_clicked)
        self.back = Button("Back to the features", "secondary", "chevron-left")
        self.back.clicked.connect(self._on_back_clicked)
        self._failure = column(0)
        self.add(self.invitation, self._dataset_row, fields, self.whole_run, self.estimate)
        self.add(self._failure)
        buttons = row(self.back, self.discover)
        buttons.setStretch(1, 1)
        self.add(buttons)
        self.evaluation_tokens.valueChanged.connect(self._show_estimate)
        self.dataset.currentIndexChanged.connect(self._show_estimate)

    # --- showing --------------------------------------------------------------------------------

    def refresh(self) -> None:
        """As it fits the chosen SAE."""
        presenter, choice = self._presenter, self._presenter.choice
        if choice is None:
            return
        if choice.sae.id != self._sae_id:
            self._sae_id = choice.sae.id
            self._take_limits()
        imported = choice.training is None
        self._dataset_row.setVisible(imported)
        if imported:
            datasets = self._services.library.datasets.all()
            self.dataset.set_options([(record.id, record.name) for record in datasets])
        n = (
            len(self._services.library.saes.of_training(choice.training.id))
            if choice.training
            else 1
        )
        self.whole_run.setVisible(n > 1)
        self.whole_run.setText(f"All {n} SAEs of this run in one pass: the model runs once")
        again = presenter.reader is not None
        self.back.setVisible(again)
        self.invitation.setText(
            "A new discovery takes the place of the old one in this table; your labels stay."
            if again
            else "Discover interpretable features in the imported SAE."
            if imported
            else "Training complete. Discover interpretable features in the trained encoder."
        )
        self._show_failure()
        self._show_estimate()

    def _take_limits(self) -> None:
        corpus = self._presenter.corpus()
        available, documents = corpus or (MOST, 0)
        self.evaluation_tokens.setMaximum(max(available, 1000))
        self.evaluation_tokens.setValue(EVALUATION_TOKENS)
        self.samples.setMaximum(documents or MOST)
        self.samples.setValue(0)
        self.whole_run.setChecked(False)
        if corpus is not None:
            self._tokens_row.set_helper(
                f"At most; the text has {formatting.count(available)}. Rare features need many."
            )
            self._samples_row.set_helper(
                f"Documents, the first of {formatting.count(documents)}; 0 for all."
                if documents
                else "Documents, the first ones; 0 for all."
            )

    def _show_estimate(self, *_: object) -> None:
        """By what this SAE's last discovery took here; nothing where there was none."""
        nowhere = self._dataset_row.isVisibleTo(self) and self.dataset.value is None
        self.discover.setEnabled(not nowhere)
        speed = self._presenter.speed() if self._presenter.choice is not None else None
        if nowhere:
            said = "Add a dataset in the Datasets tab first."
        elif speed:
            seconds = self.evaluation_tokens.value() / speed
            said = (
                f"About {formatting.duration(seconds)}, by the {formatting.count(speed)} tokens a "
                "second of this SAE's last discovery."
            )
        else:
            said = ""
        self.estimate.setText(said)
        self.estimate.setVisible(bool(said))

    def _show_failure(self) -> None:
        clear(self._failure)
        presenter = self._presenter
        failed = presenter.failure()
        panel: QWidget | None = None
        if presenter.error is not None:
            known = explain(presenter.error)
            panel = (
                ErrorPanel.of_error(known)
                if known
                else ErrorPanel(
                    "The features cannot be read",
                    f"{type(presenter.error).__name__}: {presenter.error}",
                    "Discover them again.",
                )
            )
        elif failed is not None and failed.status == "failed":
            panel = ErrorPanel.of_row({**failed.error, "retryable": False})
        elif failed is not None:
            panel = Text(
                "The last discovery was interrupted when miStudio ended.", "small", "yellow"
            )
        if panel is not None:
            self._failure.addWidget(panel)

    # --- asking ---------------------------------------------------------------------------------

    def _on_discover_clicked(self, checked: bool = False) -> None:
        choice = self._presenter.choice
        if choice is None:
            return
        try:
            self._presenter.discover(
                self.evaluation_tokens.value(),
                self.top_k.value(),
                self.samples.value() or None,
                self.dataset.value if choice.training is None else None,
                whole_run=self.whole_run.isChecked() and self.whole_run.isVisibleTo(self),
            )
        except UserError as exc:
            self._services.toasts.error(exc)
        self.submitted.emit()

    def _on_back_clicked(self, checked: bool = False) -> None:
        self.left.emit()
