"""Experiments on the Steering tab: planned with the features and the form above, run, kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PySide6.QtCore import QTimer, Signal
from PySide6.QtWidgets import QFileDialog, QScrollArea, QWidget

from mistudio.errors import UserError
from mistudio.library.steering import Experiment
from mistudio.ui.services import Services
from mistudio.ui.steering.experiments import plan as plans
from mistudio.ui.steering.experiments.planner import PlanCard
from mistudio.ui.steering.experiments.report import (
    RUNNING,
    RenameDialog,
    ReportCard,
    load_plot,
)
from mistudio.ui.steering.presenter import SteeringPresenter, problem_of
from mistudio.ui.steering.request import Form
from mistudio.ui.times import clock_time
from mistudio.ui.widgets import ConfirmDialog, ErrorPanel, clear, column

_CHANGED = -1  # the number of none
_REDRAWN = 0.25  # seconds between two pictures of an experiment that runs


class ExperimentsView(QWidget):
    """`form()` gives the settings of the tab's form, `form_wanted` one to show there; its features
    are the presenter's."""

    form_wanted = Signal(object)

    def __init__(
        self,
        services: Services,
        presenter: SteeringPresenter,
        form: Callable[[], Form],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self._services, self._presenter, self._form = services, presenter, form
        self.job_id: int | None = None
        self._job: Any = None
        self._title = ""
        self._partial: dict[str, Any] | None = None  # the newest table of the one that runs
        self._drawn = 0.0
        self._scrolled = -1  # where the page stood when a card was brought into view
        self._wanted: int | None = None  # shown, or being read
        self._asked: plans.Asked | None = None  # what would ask for the shown one again
        self._measure: str | None = None  # restored, to be chosen with the next one shown
        self._loads_plot = False
        self.planner = PlanCard(presenter, form)
        self.report = ReportCard()
        self._error_place = column(0)
        layout = column(24)
        layout.addWidget(self.planner)
        layout.addLayout(self._error_place)
        layout.addWidget(self.report)
        self.setLayout(layout)
        self.planner.start_wanted.connect(self._on_start_wanted)
        self.report.which_changed.connect(self._on_which_changed)
        self.report.chart_wanted.connect(self._on_chart_wanted)
        self.report.stop_wanted.connect(self._on_stop_wanted)
        self.report.repeat_wanted.connect(self._on_repeat_wanted)
        self.report.settings_wanted.connect(self._on_settings_wanted)
        self.report.rename_wanted.connect(self._on_rename_wanted)
        self.report.export_wanted.connect(self._on_export_wanted)
        self.report.delete_wanted.connect(self._on_delete_wanted)
        presenter.selection_changed.connect(self.refresh)
        presenter.source_changed.connect(self._on_presenter_source_changed)
        services.jobs.job_finished.connect(self._on_jobs_job_finished)
        services.jobs.queue_changed.connect(self._show_place)
        services.jobs.tick.connect(self._on_jobs_tick)
        services.changes.changed.connect(self._on_changes_changed)
        self._on_presenter_source_changed()

    @property
    def shown(self) -> Experiment | None:
        return self.report.shown

    def refresh(self) -> None:
        self.planner.refresh()

    def _on_presenter_source_changed(self) -> None:
        source = self._presenter.source
        if source is not None:
            self.planner.set_n_layers(source.model_layers)
        self._list()
        self.refresh()

    # --- state ----------------------------------------------------------------------------------

    def save_state(self) -> dict[str, Any]:
        shown = self.shown
        return {
            "plan": self.planner.save_state(),
            "shown": shown.id if shown else None,
            "measure": self.report.measure,
        }

    def restore_state(self, state: Any) -> None:
        given = state if isinstance(state, dict) else {}
        if isinstance(given.get("plan"), dict):
            self.planner.restore_state(given["plan"])
        if isinstance(given.get("shown"), int):
            self._measure = given.get("measure")
            self._list(given["shown"])

    # --- running --------------------------------------------------------------------------------

    def _on_start_wanted(self) -> None:
        sae_id = self._presenter.sae_id
        if sae_id is not None:
            plan, chosen = self.planner.plan(), self._presenter.selected
            self._run(plans.to_job(plan, self._form(), chosen, sae_id))

    def _on_repeat_wanted(self) -> None:
        from mistudio.jobs.kinds import job_from_row

        if self.shown is not None and self.job_id is None:
            self._run(job_from_row(self.shown.kind, self.shown.request))

    def _run(self, job: Any) -> None:
        clear(self._error_place)
        try:
            self.job_id = self._services.jobs.submit(job)
        except UserError as exc:
            self._show_problem(exc)
            return
        self._job, self._partial = job, None
        self._title = job.title(self._services.library)
        self.planner.set_busy(True)
        self.report.show_running(self._title)
        self._list(RUNNING)
        self._show_place()
        self.report.which.setFocus()
        self._bring_into_view(self.report)

    def _bring_into_view(self, widget: QWidget) -> None:
        """Its top to the top, once what has just changed has its place."""
        QTimer.singleShot(0, self, lambda: self._scroll_to(widget))

    def _scroll_to(self, widget: QWidget) -> None:
        area = self._area()
        if area is not None:
            top = widget.mapTo(area.widget(), widget.rect().topLeft()).y()
            area.verticalScrollBar().setValue(top - 8)
            self._scrolled = area.verticalScrollBar().value()

    def _area(self) -> QScrollArea | None:
        parent = self.parentWidget()
        while parent is not None and not isinstance(parent, QScrollArea):
            parent = parent.parentWidget()
        return parent

    def _show_place(self) -> None:
        """What a queued one waits for."""
        if self.job_id is None:
            return
        place = self._services.jobs.place(self.job_id)
        before = self._services.library.jobs.find(place.after) if place and place.after else None
        self.report.say(f"Waits for “{before.title}” to end…" if before else "")

    def _on_stop_wanted(self) -> None:
        if self.job_id is not None:
            self._services.jobs.cancel(self.job_id)

    def _on_jobs_tick(self) -> None:
        if self.job_id is None or not self.isVisible():
            return
        snapshot = self._services.jobs.snapshot(self.job_id)
        if snapshot is None:
            return
        self.report.show_progress(snapshot)
        partial, now = snapshot.metrics.get("partial"), time.monotonic()
        if partial is not None and partial is not self._partial and now - self._drawn > _REDRAWN:
            first = self._partial is None
            self._partial, self._drawn = partial, now
            if self._wanted == RUNNING:
                self._show(self._running())
                area = self._area()
                # The card has grown: it goes to the top, unless one looked elsewhere meanwhile.
                if first and area and area.verticalScrollBar().value() == self._scrolled:
                    self._bring_into_view(self.report)

    def _running(self) -> Experiment | None:
        """What there is of the one that runs, as an experiment."""
        if self._partial is None:
            return None
        job = self._job
        return Experiment(RUNNING, self._title, job.kind, asdict(job), self._partial, "")

    def _on_jobs_job_finished(self, job_id: int, status: str) -> None:
        if job_id != self.job_id:
            return
        self.job_id = None
        watched = self._wanted == RUNNING
        record = self._services.library.jobs.get(job_id)
        self.planner.set_busy(False)
        self.report.show_running(None)
        number = None
        if status == "failed":
            clear(self._error_place)
            self._error_place.addWidget(ErrorPanel.of_row(record.error))
        elif status == "finished":
            number = int(record.result["experiment_id"])
        else:
            snapshot = self._services.jobs.snapshot(job_id)
            number = snapshot.metrics.get("experiment_id") if snapshot else None
            if number is None:
                self.report.say("Stopped before its first texts were finished: nothing was kept.")
        self._list(number if watched else None)

    # --- which one ------------------------------------------------------------------------------

    def _list(self, wanted: int | None = None) -> None:
        """The experiments with the model's SAEs, newest first; without their results, which may
        be large."""
        source = self._presenter.source
        rows = self._services.library.rows(
            "SELECT id, name, created_at FROM experiments WHERE json_extract(request, '$.sae_id') "
            "IN (SELECT id FROM saes WHERE model_id = ?) ORDER BY id DESC",
            (source.sae.model_id if source else 0,),
        )
        options = [(row["id"], f"{row['name']} • {clock_time(row['created_at'])}") for row in rows]
        if self.job_id is not None:
            options.insert(0, (RUNNING, f"Running: {self._title}"))
        self.report.show_list(options, wanted)

    def _on_which_changed(self) -> None:
        wanted = self.report.which.value
        if wanted == self._wanted and wanted != RUNNING:
            return
        self._wanted = wanted
        if wanted is None or wanted == RUNNING:
            self._show(self._running() if wanted == RUNNING else None)
            return
        library = self._services.library

        def read() -> tuple[Experiment | None, plans.Asked | None]:
            found = library.experiments.find(wanted)
            return found, plans.read_back(found) if found else None

        self._services.background.run(read, self._on_read, self._on_failed)

    def _on_read(self, result: tuple[Experiment | None, plans.Asked | None]) -> None:
        experiment, asked = result
        if experiment is None or experiment.id != self._wanted:
            return  # another one was chosen meanwhile
        self._show(experiment, asked)
        if self._measure is not None:
            self.report.show_measure(self._measure)
            self._measure = None

    def _show(self, experiment: Experiment | None, asked: plans.Asked | None = None) -> None:
        there = asked is not None and all(self._presenter.source_of(c.sae_id) for c in asked[2])
        self._asked = asked if there else None
        self.report.show_experiment(experiment, there)

    def _on_chart_wanted(self) -> None:
        if not self._loads_plot:
            self._loads_plot = True
            self._services.background.run(load_plot, self._on_plot_loaded, self._on_failed)

    def _on_plot_loaded(self, _: object) -> None:
        self.report.make_chart()

    def _on_failed(self, error: Exception) -> None:
        self._show_problem(problem_of(error))

    def _show_problem(self, problem: UserError) -> None:
        clear(self._error_place)
        self._error_place.addWidget(ErrorPanel.of_error(problem))

    # --- what is done with it -------------------------------------------------------------------

    def _on_settings_wanted(self) -> None:
        if self._asked is None:
            return
        plan, form, chosen = self._asked
        self._presenter.set_selected(chosen)
        self.form_wanted.emit(form)
        self.planner.show_plan(plan)
        self.planner.start.setFocus()
        self._bring_into_view(self.planner)

    def _on_rename_wanted(self) -> None:
        if self.shown is not None:
            dialog = RenameDialog(self.shown.name, self)
            dialog.named.connect(self._on_named)
            dialog.exec()
            dialog.deleteLater()

    def _on_named(self, name: str) -> None:
        if self.shown is not None:
            try:
                self._services.library.experiments.rename(self.shown.id, name)
            except UserError as exc:
                self._show_problem(exc)

    def _on_export_wanted(self) -> None:
        chosen, _ = QFileDialog.getSaveFileName(
            self,
            "Export experiment",
            str(Path.home() / "miStudio-experiment.csv"),
            "Table (*.csv);;Everything (*.json)",
        )
        if chosen:
            self.export_to(Path(chosen))

    def export_to(self, path: Path) -> None:
        from mistudio.jobs.experiments import write_experiment

        experiment = self.shown
        if experiment is None:
            return

        def write() -> Path:
            write_experiment(experiment, path)
            return path

        self._services.background.run(write, self._on_exported, self._on_failed)

    def _on_exported(self, path: Path) -> None:
        self._services.toasts.success("Experiment exported", str(path))

    def _on_delete_wanted(self) -> None:
        shown = self.shown
        if shown is not None and ConfirmDialog.ask(
            self, f"Delete the experiment “{shown.name}”?", "It cannot be brought back."
        ):
            self._services.library.experiments.remove(shown.id)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table == "experiments":
            if self._wanted in ids:
                self._wanted = _CHANGED  # it has another name, or is gone
            self._list()
