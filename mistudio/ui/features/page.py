"""The Features tab: choose an SAE, discover its features, and look through the table of them."""

from __future__ import annotations

from typing import Any

from PySide6.QtGui import QResizeEvent
from PySide6.QtWidgets import QHBoxLayout, QSizePolicy, QStackedWidget, QWidget

from mistudio import formatting
from mistudio.ui.features.browser import Browser
from mistudio.ui.features.choices import SaeChoice
from mistudio.ui.features.dialog.dialog import FeatureDialog
from mistudio.ui.features.discovering import DiscoverCard
from mistudio.ui.features.presenter import FeaturesPresenter
from mistudio.ui.services import Services
from mistudio.ui.widgets import (
    Badge,
    Button,
    Card,
    Choice,
    EmptyState,
    ProgressRow,
    Text,
    clear,
    column,
    debounced,
    row,
)

WIDEST = 1760  # the table makes use of a wide window
LOW = 640  # pixels


class FeaturesPage(QWidget):
    """Does not scroll as a whole: the table takes what the lines above it leave."""

    def __init__(self, services: Services, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("features_page")
        self.setProperty("surface", "page")
        self._services = services
        self.presenter = FeaturesPresenter(services, self)
        self._dialog: FeatureDialog | None = None
        self._wanted_feature: int | None = None
        self._again = False

        self.sae = Choice()
        self.sae.setObjectName("sae")
        self.sae.setAccessibleName("Select Training Job to Analyze")
        self.sae.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.sae.currentIndexChanged.connect(self._on_sae_changed)
        self._chips = row(spacing=8)
        self._chips_place = QWidget()
        self._chips_place.setLayout(self._chips)

        self.stack = QStackedWidget()
        self._none = self._make_none()
        self.card = DiscoverCard(services, self.presenter)
        self.card.submitted.connect(self._on_card_submitted)
        self.card.left.connect(self._on_card_left)
        self._before = _top(self.card)
        self._during = self._make_during()
        self.browser = self._after = Browser(services, self.presenter, self)
        self.browser.again.clicked.connect(self._on_again_clicked)
        for view in (self._none, self._before, self._during, self._after):
            self.stack.addWidget(view)

        content = QWidget()
        content.setMaximumWidth(WIDEST)
        body = column(12)
        head = row(Text("Feature Discovery", "h1"), self.sae, spacing=20)
        head.setStretch(1, 1)
        body.addLayout(head)
        body.addWidget(self._chips_place)
        body.addWidget(self.stack, 1)
        content.setLayout(body)
        around = QHBoxLayout(self)
        around.setContentsMargins(24, 16, 24, 12)
        around.addStretch(1)
        around.addWidget(content, 1000)
        around.addStretch(1)

        presenter = self.presenter
        presenter.choices_changed.connect(debounced(self, 50, self.refresh_choices))
        presenter.state_changed.connect(self.refresh)
        presenter.opened.connect(self._on_presenter_opened)
        services.jobs.tick.connect(self._on_jobs_tick)
        self.refresh_choices()

    # --- building -------------------------------------------------------------------------------

    def _make_none(self) -> QWidget:
        card = Card()
        empty = EmptyState(
            "microscope",
            "No completed trainings yet. Complete a training job to discover features.",
            "Go to Training",
        )
        empty.action.connect(self._on_go_to_training)
        card.add(empty)
        return _top(card)

    def _make_during(self) -> QWidget:
        self._during_title = Text("Discovering features…", "card")
        self.progress = ProgressRow("Discovering features")
        self._during_text = Text("Processing activation patterns…", "helper")
        self.cancel = Button("Cancel", "small", "x")
        self.cancel.setAccessibleName("Cancel the discovery")
        self.cancel.clicked.connect(self._on_cancel_clicked)
        card = Card()
        card.add(row(self._during_title, None, self.cancel), self.progress, self._during_text)
        return _top(card)

    # --- the page protocol ----------------------------------------------------------------------

    def activate(self, **context: Any) -> None:
        """`sae_id` (or `training_id`) is chosen; `feature` is opened once its table is there."""
        self.refresh_choices()
        wanted = context.get("sae_id")
        if wanted is None and "training_id" in context:
            saes = self._services.library.saes.of_training(int(context["training_id"]))
            wanted = saes[0].id if saes else None
        if wanted is not None:
            self.choose(int(wanted))
        self._wanted_feature = int(context["feature"]) if "feature" in context else None
        if self.presenter.reader is not None:
            self._open_wanted()

    def _open_wanted(self) -> None:
        feature, self._wanted_feature = self._wanted_feature, None
        if feature is not None:
            self.open_feature(feature)

    def save_state(self) -> dict[str, Any]:
        sae_id = self.presenter.sae_id
        return {"sae": sae_id, **self.browser.save_state()}

    def restore_state(self, state: dict[str, Any]) -> None:
        self.browser.restore_state(state)
        if isinstance(state.get("sae"), int):
            self.choose(state["sae"])

    # --- showing --------------------------------------------------------------------------------

    def choose(self, sae_id: int) -> bool:
        """Look at this SAE; False where there is no such one."""
        for index in range(self.sae.count()):
            if self.sae.itemData(index).sae.id == sae_id:
                self.sae.setCurrentIndex(index)
                return True
        return False

    def refresh_choices(self) -> None:
        """Read the SAEs again; what was chosen stays chosen, else the newest is."""
        choices = self.presenter.choices()
        current = self.presenter.choice
        self.sae.blockSignals(True)
        self.sae.set_options([(choice, choice.title) for choice in choices])
        kept = next((c for c in choices if current and c.sae.id == current.sae.id), None)
        self.sae.set_value(kept or (choices[0] if choices else None))
        self.sae.blockSignals(False)
        self._on_sae_changed()

    def refresh(self) -> None:
        """Show the state of the chosen SAE: nothing, before, during or after its discovery."""
        presenter = self.presenter
        job = presenter.discovery()
        if presenter.choice is None:
            view = self._none
        elif job is not None:
            view = self._during
            self._again = False
            self._during_title.setText("Discovering features…")
            queued = job.status == "queued"
            self._during_text.setText(
                "Waits for the job before it." if queued else "Processing activation patterns…"
            )
            self.cancel.setVisible(self._services.jobs.owns(job.id))
            self._show_progress()
        elif presenter.opening:
            view = self._during
            self._during_title.setText("Opening the features…")
            self._during_text.setText("Reading the columns of the table")
            self.cancel.hide()
            self.progress.show_fraction(None, "Opening")
        elif presenter.reader is not None and presenter.run is not None and not self._again:
            view = self._after
            self.browser.show_tiles(presenter.run)
        else:
            view = self._before
            self.card.refresh()
        self.sae.setVisible(presenter.choice is not None)
        self.stack.setCurrentWidget(view)

    def _show_chips(self, choice: SaeChoice | None) -> None:
        clear(self._chips)
        self.sae.setToolTip("")
        if choice is None:
            return
        size = f"{formatting.count(choice.sae.d_sae)} latents"
        said = []
        for name, text, tone in (
            ("Model", choice.model, "purple"),
            ("Dataset", choice.dataset, "blue"),
            ("Site", choice.site, "emerald"),
            ("Size", size, "slate"),
        ):
            if text:
                said.append(f"{name}: {text}")
                self._chips.addWidget(Badge(name.lower(), said[-1], tone))
        self._chips.addStretch(1)
        self.sae.setToolTip("\n".join(said))

    def resizeEvent(self, event: QResizeEvent) -> None:
        """In a low window the chips make room for rows; the combo's tooltip says the same."""
        super().resizeEvent(event)
        self._chips_place.setVisible(self.height() >= LOW)

    def _show_progress(self) -> None:
        job = self.presenter.discovery()
        if job is None:
            return
        snapshot = self._services.jobs.snapshot(job.id)
        if snapshot is not None:
            self.progress.show_snapshot(snapshot)
        else:
            self.progress.show_fraction(job.fraction or None, job.phase or "Queued")

    # --- opening a feature ----------------------------------------------------------------------

    def open_row(self, row_number: int) -> None:
        self.open_feature(int(self.presenter.table.visible[row_number]))

    def open_feature(self, feature: int) -> None:
        columns = self.presenter.table.columns
        if columns is None or not 0 <= feature < len(columns):
            return
        if self._dialog is not None:
            self._dialog.close()
        self._dialog = FeatureDialog(self._services, self.presenter, feature, self)
        self._dialog.steer_wanted.connect(self._on_dialog_steer_wanted)
        self._dialog.finished.connect(self._on_dialog_finished)
        self._dialog.open()

    @property
    def dialog(self) -> FeatureDialog | None:
        return self._dialog

    def _on_dialog_finished(self, result: int) -> None:
        """Back in the table the row of the feature last seen is selected."""
        if self._dialog is not None:
            place = self.presenter.table.row_of(self._dialog.feature)
            if place >= 0:
                self.browser.view.selectRow(place)
        self._dialog = None

    def _on_dialog_steer_wanted(self, feature: int) -> None:
        if self.presenter.choice is not None:
            sae_id = self.presenter.choice.sae.id
            self._services.navigate("steering", sae_id=sae_id, feature=feature)

    # --- slots ----------------------------------------------------------------------------------

    def _on_sae_changed(self, *_: object) -> None:
        choice = self.sae.value
        if choice != self.presenter.choice:
            self._again = False
            self._show_chips(choice)
            self.presenter.choose(choice)
        self.refresh()

    def _on_presenter_opened(self) -> None:
        self.refresh()
        self._open_wanted()

    def _on_card_submitted(self) -> None:
        self._again = False
        self.refresh()

    def _on_card_left(self) -> None:
        self._again = False
        self.refresh()

    def _on_again_clicked(self, checked: bool = False) -> None:
        self._again = True
        self.refresh()

    def _on_cancel_clicked(self, checked: bool = False) -> None:
        if (job := self.presenter.discovery()) is not None:
            self._services.jobs.cancel(job.id)

    def _on_go_to_training(self) -> None:
        self._services.navigate("training")

    def _on_jobs_tick(self) -> None:
        if self.isVisible() and self.stack.currentWidget() is self._during:
            self._show_progress()


def _top(widget: QWidget) -> QWidget:
    """A view whose content stands at its top."""
    view = QWidget()
    layout = column(0)
    layout.addWidget(widget)
    layout.addStretch(1)
    view.setLayout(layout)
    return view
