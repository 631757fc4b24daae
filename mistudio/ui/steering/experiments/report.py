"""The card that shows an experiment: the one that runs, as far as it is, or one that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PySide6.QtCore import QItemSelection, Qt, Signal
from PySide6.QtWidgets import (
    QAbstractItemView,
    QDialog,
    QHeaderView,
    QLineEdit,
    QPlainTextEdit,
    QTableView,
    QVBoxLayout,
    QWidget,
)

from mistudio.jobs.control import Snapshot
from mistudio.library.steering import Experiment
from mistudio.ui.steering.experiments.results import (
    about,
    curves,
    incomplete,
    setting,
    told_texts,
)
from mistudio.ui.steering.experiments.table import ResultsModel
from mistudio.ui.widgets import (
    Button,
    Card,
    Choice,
    EmptyState,
    FormRow,
    ProgressRow,
    Text,
    column,
    row,
)

if TYPE_CHECKING:
    from mistudio.ui.steering.experiments.plot import EstimateChart

RUNNING = 0  # no experiment that is kept has this number
_TEXTS_SHOWN = 12
_LINES_SHOWN = 14
_CHART_HEIGHT = 361  # of the chart with its measure and its key


def load_plot() -> None:
    """Import what draws, which takes a quarter of a second: for the background."""
    import mistudio.ui.steering.experiments.plot  # noqa: F401


class ReportCard(Card):
    """`which_changed` tells the number that was chosen, the buttons what is wanted of it.
    `chart_wanted`: import what draws (`load_plot`), then call `make_chart`."""

    which_changed = Signal()
    chart_wanted = Signal()
    stop_wanted = Signal()
    repeat_wanted = Signal()
    settings_wanted = Signal()
    rename_wanted = Signal()
    export_wanted = Signal()
    delete_wanted = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__("Results", "chart-line", parent=parent)
        self.shown: Experiment | None = None
        self.chart: EstimateChart | None = None
        self._measure: str | None = None  # to be plotted once there is a chart
        self.empty = EmptyState(
            "flask-conical",
            "No experiments yet.",
            helper="Run one above: its table and its plot fill while it runs, and it is kept here "
            "with all of its texts.",
        )
        self.note = Text("", "helper", wrap=True)
        self.add(self.empty, self._make_head(), self._make_running(), self.note)
        self.add(self._make_found())
        self.show_list([])
        self.show_running(None)
        self.show_experiment(None)

    # --- building -------------------------------------------------------------------------------

    def _make_head(self) -> QWidget:
        self.which = Choice()
        self.which.setAccessibleName("Experiment to show")
        self.which.currentIndexChanged.connect(self._on_which_changed)
        self.repeat = Button("Repeat", "secondary", "rotate-ccw", "Runs exactly this again")
        self.repeat.clicked.connect(self._on_repeat_clicked)
        self.settings = Button("Load Settings", "secondary", "upload")
        self.settings.clicked.connect(self._on_settings_clicked)
        self.rename = Button("Rename…", "secondary", "pencil")
        self.rename.clicked.connect(self._on_rename_clicked)
        self.export = Button("Export", "info", "download", "Table as CSV, or everything as JSON")
        self.export.clicked.connect(self._on_export_clicked)
        self.delete = Button("Delete", "secondary", "trash-2")
        self.delete.clicked.connect(self._on_delete_clicked)
        self._kept = (self.repeat, self.settings, self.rename, self.export, self.delete)
        self._head = QWidget()
        self._head.setProperty("surface", "clear")
        line = row(self.which, *self._kept)
        line.setStretch(0, 1)
        self._head.setLayout(line)
        return self._head

    def _make_running(self) -> QWidget:
        self.progress = ProgressRow("Running")
        self.stop = Button("Stop", "secondary", "square", "Keeps what is finished")
        self.stop.clicked.connect(self._on_stop_clicked)
        self._running = QWidget()
        self._running.setProperty("surface", "clear")
        line = row(self.progress, self.stop, spacing=16)
        line.setStretch(0, 1)
        self._running.setLayout(line)
        return self._running

    def _make_found(self) -> QWidget:
        self.setting = Text("", "helper", wrap=True, selectable=True)
        self.incomplete = Text("", "small", "yellow", wrap=True)
        self._preparing = Text("Preparing the plot…", "helper")
        self._preparing.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self._preparing.setFixedHeight(_CHART_HEIGHT)  # nothing below it moves when it is there
        self._chart_place = column(0)
        self._chart_place.addWidget(self._preparing)
        self.model = ResultsModel(self)
        self.table = QTableView()
        self.table.setModel(self.model)
        self.table.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.table.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.table.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.table.setHorizontalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.table.setTabKeyNavigation(False)
        self.table.setAccessibleName("Results of the experiment")
        self.table.verticalHeader().setSectionResizeMode(QHeaderView.ResizeMode.Fixed)
        self.table.verticalHeader().hide()
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
        below.addWidget(self.setting)
        below.addWidget(self.incomplete)
        below.addLayout(self._chart_place)
        below.addWidget(self.table)
        below.addWidget(self.texts)
        self._found.setLayout(below)
        return self._found

    # --- which one ------------------------------------------------------------------------------

    def show_list(self, options: Sequence[tuple[int, str]], wanted: int | None = None) -> None:
        """Experiments by number; goes to `wanted`, else stays with the one that was chosen."""
        chosen = wanted if wanted is not None else self.which.value
        was_blocked = self.which.blockSignals(True)
        self.which.set_options(options)
        self.which.set_value(chosen)
        self.which.blockSignals(was_blocked)
        self.empty.setVisible(not options)
        self._head.setVisible(bool(options))
        self.which_changed.emit()

    def show_experiment(self, experiment: Experiment | None, readable: bool = False) -> None:
        """`readable`: whether the screen can ask for it again."""
        another = experiment is None or self.shown is None or experiment.id != self.shown.id
        self.shown = experiment
        self.which.setToolTip(self.which.currentText())  # may be longer than it is wide
        self._found.setVisible(experiment is not None)
        if another:
            self.table.clearSelection()
        self.model.show_experiment(experiment)
        for button in self._kept:
            button.setVisible(self.which.value != RUNNING)
            button.setEnabled(experiment is not None)
        self.settings.setEnabled(readable)
        self.settings.setToolTip(
            "Brings its features, its form and its plan back to the screen"
            if readable
            else "Its settings have no place on this screen, or its SAE is gone"
        )
        if experiment is None:
            self.texts.clear()
            return
        self.setting.setText(setting(experiment))
        self._show_incomplete(experiment)
        self._fit_table()
        self._show_texts()
        self._draw()

    def _show_incomplete(self, experiment: Experiment) -> None:
        lacking = incomplete(experiment)
        if lacking and experiment.id != RUNNING:
            lacking = f"⚠ Stopped: {lacking}. Repeat does all of it."
        self.incomplete.setText(lacking)
        self.incomplete.set_tone("" if experiment.id == RUNNING else "yellow")
        self.incomplete.setVisible(bool(lacking))

    def _fit_table(self) -> None:
        """As high as its lines, up to a limit: a table that scrolls within a page that scrolls is
        tiresome."""
        self.table.resizeColumnsToContents()
        lines = min(max(self.model.rowCount(), 1), _LINES_SHOWN)
        rows = lines * self.table.verticalHeader().defaultSectionSize()
        header = self.table.horizontalHeader().sizeHint().height()
        bar = self.table.horizontalScrollBar().sizeHint().height()
        self.table.setFixedHeight(rows + header + bar + 4)

    def _draw(self) -> None:
        if self.shown is None:
            return
        if self.chart is None:
            self.chart_wanted.emit()
            return
        choice = self.chart.measure
        if [choice.itemData(i) for i in range(choice.count())] != self.model.measures:
            was_blocked = choice.blockSignals(True)
            choice.set_options([(name, about(name)[0]) for name in self.model.measures])
            choice.blockSignals(was_blocked)
        if self._measure is not None:
            wanted, self._measure = self._measure, None
            self.show_measure(wanted)
        if choice.value is not None:
            name, unit, _ = about(choice.value)
            self.chart.show_curves(name, unit, *curves(self.shown, choice.value))

    @property
    def measure(self) -> str | None:
        """Which one is plotted."""
        return self.chart.measure.value if self.chart else self._measure

    def show_measure(self, measure: str) -> None:
        if self.chart is None:
            self._measure = measure
        else:
            self.chart.measure.set_value(measure)

    def make_chart(self) -> None:
        """What draws has been imported."""
        from mistudio.ui.steering.experiments.plot import EstimateChart

        if self.chart is None:
            self.chart = EstimateChart()
            self.chart.measure.currentIndexChanged.connect(self._on_measure_changed)
            self._chart_place.replaceWidget(self._preparing, self.chart)
            self._preparing.deleteLater()
        self._draw()

    def _show_texts(self) -> None:
        chosen = self.table.selectionModel().selectedRows()
        told = ""
        if chosen and self.shown is not None:
            told = told_texts(self.shown, self.model.lines[chosen[0].row()], _TEXTS_SHOWN)
        if told != self.texts.toPlainText():
            self.texts.setPlainText(told)

    # --- the one that runs ----------------------------------------------------------------------

    def show_running(self, title: str | None) -> None:
        """None: none runs."""
        self._running.setVisible(title is not None)
        self.stop.setEnabled(True)
        self.say("")
        self.progress.show_snapshot(None)

    def show_progress(self, snapshot: Snapshot) -> None:
        self.progress.show_snapshot(snapshot)

    def say(self, text: str) -> None:
        self.note.setText(text)
        self.note.setVisible(bool(text))

    # --- what is done with it -------------------------------------------------------------------

    def _on_which_changed(self, index: int) -> None:
        self.which_changed.emit()

    def _on_measure_changed(self, index: int) -> None:
        self._draw()

    def _on_table_selection_changed(self, new: QItemSelection, old: QItemSelection) -> None:
        self._show_texts()

    def _on_stop_clicked(self, checked: bool = False) -> None:
        self.stop.setEnabled(False)
        self.stop_wanted.emit()

    def _on_repeat_clicked(self, checked: bool = False) -> None:
        self.repeat_wanted.emit()

    def _on_settings_clicked(self, checked: bool = False) -> None:
        self.settings_wanted.emit()

    def _on_rename_clicked(self, checked: bool = False) -> None:
        self.rename_wanted.emit()

    def _on_export_clicked(self, checked: bool = False) -> None:
        self.export_wanted.emit()

    def _on_delete_clicked(self, checked: bool = False) -> None:
        self.delete_wanted.emit()


class RenameDialog(QDialog):
    """Asks for a name; Enter takes it."""

    named = Signal(str)

    def __init__(self, name: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setWindowTitle("Rename the experiment")
        self.setMinimumWidth(480)
        self.name = QLineEdit(name)
        self.name.setMaxLength(200)
        self.name.selectAll()
        self.name.textChanged.connect(self._on_name_changed)
        self.rename = Button("Rename", "primary")
        self.rename.setDefault(True)
        self.rename.clicked.connect(self._on_rename_clicked)
        cancel = Button("Cancel")
        cancel.clicked.connect(self.reject)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(24, 24, 24, 24)
        layout.setSpacing(16)
        layout.addWidget(FormRow("Name", self.name))
        layout.addLayout(row(None, cancel, self.rename))
        self.name.setFocus()

    def _on_name_changed(self, text: str) -> None:
        self.rename.setEnabled(bool(text.strip()))

    def _on_rename_clicked(self, checked: bool = False) -> None:
        self.named.emit(self.name.text())
        self.accept()
