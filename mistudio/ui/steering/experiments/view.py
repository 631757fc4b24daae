"""The second view of the Steering tab: strengths, layers, prompts and seeds, with intervals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import QItemSelection
from PySide6.QtWidgets import (
    QAbstractItemView,
    QFileDialog,
    QLineEdit,
    QPlainTextEdit,
    QTableView,
    QWidget,
)

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.library.steering import Experiment
from mistudio.ui.services import Services
from mistudio.ui.steering.experiments import plan as plans
from mistudio.ui.steering.experiments.plan import ABOUT, KINDS, STRENGTHS, Plan
from mistudio.ui.steering.experiments.results import about, curves
from mistudio.ui.steering.experiments.table import ResultsModel
from mistudio.ui.steering.presenter import SteeringPresenter, problem_of
from mistudio.ui.steering.request import Form
from mistudio.ui.times import clock_time
from mistudio.ui.widgets import (
    Button,
    Card,
    Choice,
    ConfirmDialog,
    ErrorPanel,
    FormRow,
    IntBox,
    LayerGrid,
    ProgressRow,
    Text,
    clear,
    column,
    row,
)

if TYPE_CHECKING:
    from mistudio.ui.steering.experiments.plot import EstimateChart

_TEXTS_SHOWN = 12


class ExperimentsView(QWidget):
    """`form()` gives the settings of the tab's form; its features are the presenter's."""

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
        self.shown: Experiment | None = None
        self._wanted: int | None = None  # shown, or being read
        self.chart: EstimateChart | None = None
        layout = column(24)
        self._error_place = column(0)
        layout.addWidget(self._make_plan())
        layout.addLayout(self._error_place)
        layout.addWidget(self._make_result())
        self.setLayout(layout)
        presenter.selection_changed.connect(self.refresh)
        presenter.source_changed.connect(self._on_presenter_source_changed)
        services.jobs.job_finished.connect(self._on_jobs_job_finished)
        services.jobs.tick.connect(self._on_jobs_tick)
        services.changes.changed.connect(self._on_changes_changed)
        self._on_presenter_source_changed()
        self._show(None)

    # --- building -------------------------------------------------------------------------------

    def _make_plan(self) -> Card:
        card = Card("New experiment", "flask-conical")
        self.kind = Choice(KINDS)
        self.kind.currentIndexChanged.connect(self._on_edited)
        self.about = Text("", "helper", wrap=True)
        self.prompts = QPlainTextEdit()
        self.prompts.setPlaceholderText("One prompt a line; empty: the prompt of the form above")
        self.prompts.setTabChangesFocus(True)
        self.prompts.setFixedHeight(4 * self.prompts.fontMetrics().lineSpacing() + 26)
        self.prompts.textChanged.connect(self._on_edited)
        self.strengths = QLineEdit(STRENGTHS)
        self.strengths.setToolTip("Each multiplies all coefficients")
        self.strengths.textChanged.connect(self._on_edited)
        self._strengths_row = FormRow("Strengths", self.strengths)
        self.seeds = IntBox(3, 1, 20)
        self.seeds.setToolTip("More seeds make the intervals narrower")
        self.seeds.valueChanged.connect(self._on_edited)
        self.layers = LayerGrid(label="Layers")
        self.layers.changed.connect(self._on_edited)
        self.start = Button("Run Experiment", "primary", "play")
        self.start.clicked.connect(self._on_start_clicked)
        self.stop = Button("Stop", "secondary", "square")
        self.stop.clicked.connect(self._on_stop_clicked)
        self.stop.hide()
        self.reason = Text("", "helper", wrap=True)
        self.progress = ProgressRow("Running")
        self.progress.hide()
        left, right = column(12), column(12)
        left.addWidget(FormRow("What to find out", self.kind))
        left.addWidget(self.about)
        left.addWidget(self._strengths_row)
        left.addWidget(FormRow("Seeds", self.seeds))
        left.addStretch(1)
        right.addWidget(FormRow("Prompts", self.prompts))
        right.addWidget(self.layers)
        right.addStretch(1)
        columns = row(spacing=24)
        columns.addLayout(left, 1)
        columns.addLayout(right, 1)
        buttons = row(self.start, self.stop, self.reason)
        buttons.setStretch(2, 1)
        card.add(columns, buttons, self.progress)
        return card

    def _make_result(self) -> Card:
        card = Card("Results", "chart-line")
        self.which = Choice()
        self.which.setAccessibleName("Experiment to show")
        self.which.currentIndexChanged.connect(self._on_which_changed)
        self.export = Button("Export", "info", "download", "Table as CSV, or everything as JSON")
        self.export.clicked.connect(self._on_export_clicked)
        self.delete = Button("Delete", "secondary", "trash-2")
        self.delete.clicked.connect(self._on_delete_clicked)
        head = row(self.which, self.export, self.delete)
        head.setStretch(0, 1)
        self.none = Text("No experiments yet.", "helper")
        self.measure = Choice()
        self.measure.currentIndexChanged.connect(self._on_measure_changed)
        self._chart_place = column(0)
        self.model = ResultsModel(self)
        self.table = QTableView()
        self.table.setModel(self.model)
        self.table.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.table.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.table.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.table.setTabKeyNavigation(False)
        self.table.setAccessibleName("Results of the experiment")
        self.table.setMinimumHeight(220)
        self.table.selectionModel().selectionChanged.connect(self._on_table_selection_changed)
        self.texts = QPlainTextEdit()
        self.texts.setReadOnly(True)
        self.texts.setTabChangesFocus(True)
        self.texts.setFixedHeight(200)
        self.texts.setPlaceholderText("Choose a line of the table to read its texts")
        self.texts.setAccessibleName("Texts of the chosen line")
        self._found = QWidget()
        self._found.setProperty("surface", "clear")
        below = column(16)
        below.addWidget(FormRow("Measure", self.measure))
        below.addLayout(self._chart_place)
        below.addWidget(self.table)
        below.addWidget(self.texts)
        self._found.setLayout(below)
        card.add(head, self.none, self._found)
        return card

    # --- the plan -------------------------------------------------------------------------------

    def plan(self) -> Plan:
        own = self._form().prompt.strip()
        prompts = plans.read_prompts(self.prompts.toPlainText()) or ((own,) if own else ())
        return Plan(
            str(self.kind.value),
            prompts,
            plans.read_strengths(self.strengths.text()),
            tuple(self.layers.selected()),
            self.seeds.value(),
        )

    def refresh(self) -> None:
        """What depends on plan, form and selection together."""
        plan, form, busy = self.plan(), self._form(), self.job_id is not None
        self.about.setText(ABOUT[plan.kind])
        self._strengths_row.setVisible(plan.kind in (plans.SWEEP, plans.BY_LAYER))
        self.layers.setVisible(plan.kind in (plans.BY_LAYER, plans.STUDY))
        reason = plans.reason(plan, self._presenter.selected)
        count = formatting.count(plans.texts(plan, form))
        self.start.setEnabled(not busy and not reason)
        self.start.setText("Running…" if busy else "Run Experiment")
        self.stop.setVisible(busy)
        self.progress.setVisible(busy)
        self.reason.setText(
            reason or f"{count} steered texts of up to {formatting.count(form.max_tokens)} tokens"
        )

    def _on_edited(self, *_: object) -> None:
        self.refresh()

    def _on_presenter_source_changed(self) -> None:
        source = self._presenter.source
        if source is not None and self.layers.n_layers != source.model_layers:
            self.layers.set_n_layers(source.model_layers)
            self.layers.set_selected(range(source.model_layers))
        self._list()
        self.refresh()

    def _on_start_clicked(self, checked: bool = False) -> None:
        clear(self._error_place)
        sae_id = self._presenter.sae_id
        if sae_id is None:
            return
        job = plans.to_job(self.plan(), self._form(), self._presenter.selected, sae_id)
        try:
            self.job_id = self._services.jobs.submit(job)
        except UserError as exc:
            self._error_place.addWidget(ErrorPanel(exc.title, exc.what, exc.next_step))
            return
        self.progress.show_snapshot(None)
        self.stop.setEnabled(True)
        self.refresh()

    def _on_stop_clicked(self, checked: bool = False) -> None:
        self.stop.setEnabled(False)
        if self.job_id is not None:
            self._services.jobs.cancel(self.job_id)

    def _on_jobs_tick(self) -> None:
        if self.job_id is not None and self.isVisible():
            self.progress.show_snapshot(self._services.jobs.snapshot(self.job_id))

    def _on_jobs_job_finished(self, job_id: int, status: str) -> None:
        if job_id != self.job_id:
            return
        self.job_id = None
        record = self._services.library.jobs.get(job_id)
        if status == "failed":
            clear(self._error_place)
            self._error_place.addWidget(ErrorPanel.of_row(record.error))
        elif status == "finished":
            self._list(int(record.result["experiment_id"]))
        self.refresh()

    # --- results --------------------------------------------------------------------------------

    def _list(self, wanted: int | None = None) -> None:
        """The experiments with the model's SAEs, newest first; without their results, which may
        be large."""
        source = self._presenter.source
        rows = self._services.library.rows(
            "SELECT id, name, created_at FROM experiments WHERE json_extract(request, '$.sae_id') "
            "IN (SELECT id FROM saes WHERE model_id = ?) ORDER BY id DESC",
            (source.sae.model_id if source else 0,),
        )
        chosen = wanted if wanted is not None else self.which.value
        was_blocked = self.which.blockSignals(True)
        self.which.set_options(
            [(row["id"], f"{row['name']} • {clock_time(row['created_at'])}") for row in rows]
        )
        self.which.set_value(chosen)
        self.which.blockSignals(was_blocked)
        self.none.setVisible(not rows)
        for widget in (self.which, self.export, self.delete):
            widget.setVisible(bool(rows))
        self._on_which_changed(0)

    def _on_which_changed(self, index: int) -> None:
        wanted = self.which.value
        if wanted == self._wanted:
            return
        self._wanted = wanted
        if wanted is None:
            self._show(None)
        else:
            library = self._services.library
            self._services.background.run(
                lambda: library.experiments.find(wanted), self._show, self._on_failed
            )

    def _show(self, experiment: Experiment | None) -> None:
        if experiment is not None and experiment.id != self._wanted:
            return  # another one was chosen meanwhile
        self.shown = experiment
        self._found.setVisible(experiment is not None)
        self.model.show_experiment(experiment)
        self.texts.clear()
        if experiment is None:
            return
        was_blocked = self.measure.blockSignals(True)
        self.measure.set_options([(name, about(name)[0]) for name in self.model.measures])
        self.measure.blockSignals(was_blocked)
        self.table.resizeColumnsToContents()
        self._draw()

    def _draw(self) -> None:
        if self.shown is None or self.measure.value is None:
            return
        if self.chart is None:
            from mistudio.ui.steering.experiments.plot import EstimateChart

            self.chart = EstimateChart()
            self._chart_place.addWidget(self.chart)
        name, unit, _ = about(self.measure.value)
        x_label, found = curves(self.shown, self.measure.value)
        self.chart.show_curves(name, unit, x_label, found)

    def _on_measure_changed(self, index: int) -> None:
        self._draw()

    def _on_table_selection_changed(self, new: QItemSelection, old: QItemSelection) -> None:
        chosen = self.table.selectionModel().selectedRows()
        if not chosen or self.shown is None:
            self.texts.clear()
            return
        line = self.model.lines[chosen[0].row()]
        told = [self._text_of(entry) for entry in line.texts[:_TEXTS_SHOWN]]
        hidden = len(line.texts) - len(told)
        if hidden > 0:
            told.append(f"{formatting.count(hidden)} more: Export as JSON has all.")
        self.texts.setPlainText("\n\n".join(told))

    def _text_of(self, entry: dict[str, Any]) -> str:
        assert self.shown is not None
        prompts, seeds = self.shown.result["prompts"], self.shown.result["seeds"]
        return f"[seed {seeds[entry['seed']]}] {prompts[entry['prompt']]}▸{entry['text']}"

    def _on_failed(self, error: Exception) -> None:
        problem = problem_of(error)
        clear(self._error_place)
        self._error_place.addWidget(ErrorPanel(problem.title, problem.what, problem.next_step))

    def _on_export_clicked(self, checked: bool = False) -> None:
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

    def _on_delete_clicked(self, checked: bool = False) -> None:
        shown = self.shown
        if shown is not None and ConfirmDialog.ask(
            self, f"Delete the experiment “{shown.name}”?", "It cannot be brought back."
        ):
            self._services.library.experiments.remove(shown.id)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table == "experiments":
            self._list()
