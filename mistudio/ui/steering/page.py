"""The Steering tab: choose features and their strength, generate with and without them, compare."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from PySide6.QtCore import QPoint, Qt, QTimer
from PySide6.QtGui import QKeySequence, QShortcut
from PySide6.QtWidgets import (
    QHBoxLayout,
    QLayout,
    QScrollArea,
    QTabBar,
    QVBoxLayout,
    QWidget,
)

from mistudio.errors import UserError
from mistudio.jobs.presets import BOUND, REFUSED
from mistudio.library.jobs import JobRecord
from mistudio.library.records import Generation, Template
from mistudio.ui.services import Services
from mistudio.ui.steering import presets
from mistudio.ui.steering.experiments.view import ExperimentsView
from mistudio.ui.steering.exporting import ExportButton
from mistudio.ui.steering.finder import FeatureFinder
from mistudio.ui.steering.form import GenerationForm
from mistudio.ui.steering.history import History
from mistudio.ui.steering.output import Output
from mistudio.ui.steering.presenter import SteeringPresenter
from mistudio.ui.steering.request import Form, features_text, from_request, is_of, names
from mistudio.ui.steering.units import NEW_STRENGTH
from mistudio.ui.templates.section import TemplateSection
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import (
    Card,
    ColumnPage,
    EmptyState,
    ErrorPanel,
    PageTitle,
    Surface,
    clear,
    column,
    settle_layouts,
)

NO_TRAINING = "No completed training jobs available."
NO_TRAINING_HINT = "Complete a training, then discover its features."
NO_FEATURES = "No features have been discovered yet."
NO_FEATURES_HINT = "There is a trained SAE: discover its features to steer with them."


class SteeringPage(QWidget):
    """Presets, two columns of choices, panes of text, what changed in numbers, earlier ones."""

    def __init__(self, services: Services, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("steering_page")
        self._services = services
        self.presenter = presenter = SteeringPresenter(services, self)
        self._empty_card = Card()
        self._empty = {
            False: EmptyState(
                "sliders-horizontal", NO_TRAINING, "Go to Training", NO_TRAINING_HINT
            ),
            True: EmptyState("sliders-horizontal", NO_FEATURES, "Go to Features", NO_FEATURES_HINT),
        }  # by whether there is an SAE
        for empty in self._empty.values():
            empty.action.connect(self._on_empty_action)
            self._empty_card.add(empty)
        self.presets = TemplateSection(
            services, "steering", "Steering Presets", self._preset, presets.meta
        )
        self.presets.load_wanted.connect(self._on_presets_load_wanted)
        preset_card = Surface("card", None, 10)
        preset_card.add(self.presets)
        self.presets.body.setContentsMargins(14, 0, 14, 14)
        self.features = FeatureFinder(presenter)
        self.features.edited.connect(self._on_features_edited)
        self.configuration = GenerationForm(presenter)
        self.configuration.start_wanted.connect(self._start)
        self.configuration.stop_wanted.connect(presenter.stop)
        self.configuration.edited.connect(self._on_configuration_edited)
        self.export = ExportButton(services, presenter, self.form)
        self.features.add_to_header(self.export)
        self.configuration.header.addStrut(self.export.sizeHint().height())  # titles in line
        self.output = Output(services.settings)
        self.history = History(services, presenter)
        self.history.opened.connect(self.reopen)
        self.comparison = QWidget()
        self.comparison.setProperty("surface", "clear")
        compared = column(24)
        compared.addWidget(self.output)
        compared.addWidget(self.history)
        self.comparison.setLayout(compared)
        self.experiments = ExperimentsView(services, presenter, self.form)
        self.experiments.form_wanted.connect(self.configuration.show_form)
        self.views = QTabBar()
        self.views.setAccessibleName("Comparison or experiments")
        self.views.setExpanding(False)
        for name in ("Comparison", "Experiments"):
            self.views.addTab(name)
        self.views.currentChanged.connect(self._on_views_current_changed)
        self._on_views_current_changed(0)
        self._error_place = column(0)
        self._work = QWidget()
        self._work.setProperty("surface", "clear")
        columns = QHBoxLayout()
        columns.setSpacing(tokens.GAP)
        columns.addWidget(self.features, 1)
        columns.addWidget(self.configuration, 1)
        advanced = Surface("card", None, 10)
        advanced.add(self.configuration.advanced)
        self.configuration.advanced.body.setContentsMargins(14, 0, 14, 14)
        work = column(24)
        work.addWidget(preset_card)
        work.addLayout(columns)
        work.addWidget(advanced)
        work.addLayout(self._error_place)
        work.addWidget(self.views)
        work.addWidget(self.comparison)
        work.addWidget(self.experiments)
        self._work.setLayout(work)
        self._page = ColumnPage()
        self._page.add(
            PageTitle(
                "Model Steering",
                "Push the model along features while it writes, and see what that changes.",
            ),
            self._empty_card,
            self._work,
        )
        self._page.body.addStretch(1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._page)

        shortcut = QShortcut(QKeySequence("Ctrl+Return"), self)
        shortcut.setContext(Qt.ShortcutContext.WidgetWithChildrenShortcut)
        shortcut.activated.connect(self._on_shortcut_activated)
        presenter.sources_changed.connect(self._show_sources)
        presenter.source_changed.connect(self._on_presenter_source_changed)
        presenter.selection_changed.connect(self._on_presenter_selection_changed)
        presenter.index_failed.connect(self._on_presenter_index_failed)
        presenter.job_failed.connect(self._on_presenter_job_failed)
        presenter.ended.connect(self._on_presenter_ended)
        services.jobs.tick.connect(self._on_jobs_tick)
        self._show_sources()
        self.features.show_selected()
        self._on_presenter_selection_changed()

    # --- the page protocol ----------------------------------------------------------------------

    def activate(self, **context: Any) -> None:
        """`sae_id` chooses the source; `feature` is added with `strength` (+2.0); `generation_id`
        brings back an earlier one."""
        if "sae_id" in context:
            self.presenter.choose(int(context["sae_id"]))
            self._show_sources()
        if "feature" in context:
            strength = float(context.get("strength", NEW_STRENGTH))
            self.presenter.add(int(context["feature"]), strength)
        if "generation_id" in context:
            self.reopen(int(context["generation_id"]))
        focused = self.focusWidget()
        if focused in (None, self.presets.button) and self._work.isVisible():
            self.features.search.setFocus(Qt.FocusReason.OtherFocusReason)
        self.presenter.load()

    def save_state(self) -> dict[str, Any]:
        shown = self.output.shown
        return {
            **self.presenter.save_state(),
            "form": self.form().as_dict(),
            "shade": self.output.shade.isChecked(),
            "history": self.history.expanded,
            "presets": self.presets.expanded,
            "advanced": self.configuration.advanced.expanded,
            "view": self.views.currentIndex(),
            "experiments": self.experiments.save_state(),
            "generation_id": shown.id if shown else None,
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        self.presenter.restore_state(state)
        self._show_sources()
        self.configuration.show_form(Form.read(state.get("form")))
        self.output.shade.setChecked(bool(state.get("shade")))
        self.history.set_expanded(bool(state.get("history")))
        self.presets.set_expanded(bool(state.get("presets")))
        self.configuration.advanced.set_expanded(bool(state.get("advanced")))
        self.views.setCurrentIndex(1 if state.get("view") == 1 else 0)
        self.experiments.restore_state(state.get("experiments"))
        generation_id = state.get("generation_id")
        generation = (
            self.presenter.generation(generation_id) if isinstance(generation_id, int) else None
        )
        if generation is not None and self.presenter.of_this_model(generation):
            self._show_result(generation)

    def form(self) -> Form:
        return self.configuration.form()

    # --- source ---------------------------------------------------------------------------------

    def _show_sources(self) -> None:
        found = self.presenter.sources()
        self._empty_card.setVisible(not found)
        self._work.setVisible(bool(found))
        if not found:
            there = self._services.library.saes.count() > 0
            for case, empty in self._empty.items():
                empty.setVisible(case is there)
        self.configuration.show_sources()

    def _on_presenter_source_changed(self) -> None:
        self.features.reset()
        shown = self.output.shown
        if shown is not None and not self.presenter.of_this_model(shown):
            self._show_result(None)
        self._show_sources()

    def _on_presenter_selection_changed(self) -> None:
        chosen = bool(self.presenter.selected)
        self.presets.save.setEnabled(chosen)
        self.presets.save.setToolTip("" if chosen else "Add at least one feature.")
        self._show_whether_asked_anew()

    def _on_features_edited(self) -> None:
        self.configuration.refresh()
        self._show_whether_asked_anew()
        self.experiments.refresh()

    def _on_configuration_edited(self) -> None:
        self.experiments.refresh()
        self._show_whether_asked_anew()

    def _show_whether_asked_anew(self) -> None:
        """Say so where what is shown was made with other settings than those above."""
        shown = self.output.shown
        same = shown is None or is_of(shown.request, self.presenter.selected, self.form())
        self.output.show_outdated("" if same or shown is None else features_text(shown.request))

    def _on_views_current_changed(self, index: int) -> None:
        self.comparison.setVisible(index == 0)
        self.experiments.setVisible(index == 1)

    def _on_presenter_index_failed(self, error: UserError) -> None:
        clear(self._error_place)
        panel = ErrorPanel(error.title, error.what, error.next_step, retryable=True)
        panel.retry.connect(self._on_retry_load)
        self._error_place.addWidget(panel)

    def _on_retry_load(self) -> None:
        clear(self._error_place)
        self.presenter.load()

    def _on_presenter_job_failed(self, error: dict[str, Any]) -> None:
        clear(self._error_place)
        self._error_place.addWidget(ErrorPanel.of_row(error))

    def _on_empty_action(self) -> None:
        there = self._services.library.saes.count()
        self._services.navigate("features" if there else "training")

    # --- presets --------------------------------------------------------------------------------

    def _preset(self) -> dict[str, Any]:
        return self.presenter.preset(self.form())

    def _on_presets_load_wanted(self, template: Template) -> None:
        form, binding, taken = self.presenter.load_preset(template)
        toasts = self._services.toasts
        if not taken:
            toasts.error(
                UserError(
                    f"“{template.name}” "
                    + ("is refused" if binding.result == REFUSED else "cannot be used yet"),
                    binding.message,
                    binding.next_step,
                )
            )
            return
        self._show_sources()
        self.configuration.show_form(form)
        if binding.result == BOUND:
            toasts.success(f"“{template.name}” loaded")
        else:
            toasts.warning(f"“{template.name}” loaded", binding.message)

    # --- generation -----------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self.presenter.job_id is not None

    def _on_shortcut_activated(self) -> None:
        if self.configuration.generate.isEnabled():
            self._start()

    def _start(self) -> None:
        clear(self._error_place)
        form = self.form()
        try:
            self.presenter.generate(form)
        except UserError as exc:
            self._error_place.addWidget(ErrorPanel(exc.title, exc.what, exc.next_step))
            return
        self.views.setCurrentIndex(0)
        self.output.begin(names(form.as_dict()))
        self.configuration.show_progress(None)
        self.configuration.stop.setText("Stop")
        self.configuration.refresh()
        settle_layouts()
        QTimer.singleShot(0, self._look_at_output)

    def focusNextPrevChild(self, forward: bool) -> bool:
        """Tab goes in the order of the layouts, whenever cards, rows and panes were made."""
        for before, after in pairwise(_in_order(self._page.widget())):
            QWidget.setTabOrder(before, after)
        return super().focusNextPrevChild(forward)

    def _look_at_error(self) -> None:
        if self._error_place.count():
            self._page.ensureWidgetVisible(self._error_place.itemAt(0).widget(), 0, tokens.GAP)

    def _look_at_output(self) -> None:
        """Scroll as little as brings the texts into sight."""
        bar, inside = self._page.verticalScrollBar(), self._page.widget()
        top = self.views.mapTo(inside, QPoint(0, 0)).y()
        end = self.output.grid.mapTo(inside, QPoint(0, self.output.grid.height())).y()
        height = self._page.viewport().height()
        if end + tokens.GAP > bar.value() + height:
            bar.setValue(min(end + tokens.GAP - height, top))
        elif top < bar.value():
            bar.setValue(top)

    def _on_jobs_tick(self) -> None:
        if not self.isVisible():
            return
        self.features.show_calibrating()
        if not self.busy:
            return
        snapshot = self._services.jobs.snapshot(self.presenter.job_id)
        if snapshot is None:
            waiting = self.presenter.waiting_for(self.presenter.job_id)
            if waiting:
                self.output.say(f"Waits for “{waiting}” to end…")
            return
        self.configuration.show_progress(snapshot)
        self.output.stream(self.presenter.texts())
        settle_layouts()

    def _on_presenter_ended(self, status: str, record: JobRecord) -> None:
        self.configuration.refresh()
        if status == "finished":
            generation = self.presenter.generation(int(record.result["generation_id"]))
            if generation is not None and self.presenter.of_this_model(generation):
                if not self.output.grid.visibleRegion().isEmpty():  # the user is there
                    QTimer.singleShot(0, self._look_at_output)
                self._show_result(generation)
            return
        self.output.say("No generation yet")
        if status == "failed":
            panel = ErrorPanel.of_row(record.error)
            panel.retry.connect(self._start)
            clear(self._error_place)
            self._error_place.addWidget(panel)
            QTimer.singleShot(0, self._look_at_error)
        else:
            self.output.measures.say("Stopped: the texts so far are shown, nothing was measured.")

    def _show_result(self, generation: Generation | None) -> None:
        self.output.show_generation(generation)
        self.history.show_current(generation.id if generation else None)
        self.configuration.refresh()  # it may have measured norms of layers
        self._show_whether_asked_anew()
        settle_layouts()

    def reopen(self, generation_id: int) -> None:
        """Bring back an earlier generation: its form, its features, its result."""
        generation = self.presenter.generation(generation_id)
        if generation is None or self.busy:
            return
        chosen, form = from_request(generation.request)
        self.presenter.set_selected(chosen)
        self.configuration.show_form(form)
        clear(self._error_place)
        self.views.setCurrentIndex(0)
        self._show_result(generation)
        QTimer.singleShot(0, self._look_at_output)


def _in_order(place: QWidget | QLayout) -> Iterator[QWidget]:
    """All that takes the focus by Tab, in the order of the layouts."""
    layout: QLayout | None = place if isinstance(place, QLayout) else None
    if isinstance(place, QWidget):
        if place.focusPolicy() & Qt.FocusPolicy.TabFocus:
            yield place
        layout = (place.widget() if isinstance(place, QScrollArea) else place).layout()
    for number in range(layout.count() if layout is not None else 0):
        item = layout.itemAt(number)
        inner = item.widget() or item.layout()
        if inner is not None:
            yield from _in_order(inner)
