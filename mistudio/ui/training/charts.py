"""Live charts and the log of one training: every step that was recorded, one curve per site.

Building a chart takes 25 ms and drawing one 5, so both are done one at a time, in turn: the window
stays on time however many there are, and leaves the processor to the training.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import QTimer
from PySide6.QtWidgets import QApplication, QGridLayout, QPlainTextEdit, QWidget

from mistudio.ui.theme import tokens
from mistudio.ui.training.history import (
    LOG_LINES,
    PLACES,
    History,
    colours,
    history,
    note_line,
    site_label,
)
from mistudio.ui.widgets import Badge, Button, Choice, Text, column, row

if TYPE_CHECKING:
    from mistudio.ui.training.density import DensityChart
    from mistudio.ui.widgets.metric_chart import MetricChart

BUILD_MS = 40  # between two charts that are built
# Between two drawings while the training goes on. At 60 ms, drawing took 8 % of a core.
TURN_MS = 500

CHARTS = (
    ("loss", "Loss", "What the training lowers: squared error of the batch over the variance of a "
     "calibration sample (the batch's FVU; the auxiliary term is left out). "
     "0 is a perfect reconstruction."),
    ("explained_variance", "Explained variance", "1 − FVU of the training batch: the share of the "
     "activations' variance that is reconstructed. 1 is perfect, below 0 is worse than the mean."),
    ("l0", "L0", "Mean number of active latents per token, on the training batch. It falls from "
     "four times the target while the sparsity warms up."),
    ("dead", "Dead latents", "Latents that have not fired within the dead window."),
    ("learning_rate", "Learning rate", "Of this step: warm-up, the chosen schedule, then linear to "
     "0."),
    ("tokens_per_second", "Tokens/s", "Tokens of activations learnt from per second, mean since "
     "the training began; pauses are left out. All layers learn from the same tokens."),
)  # fmt: skip
NEVER_BELOW_ZERO = ("l0", "learning_rate", "tokens_per_second")
AXIS_NAMES = (("step", "Steps"), ("tokens", "Tokens"), ("seconds", "Time"))


def load_charts() -> None:
    """Import what draws, which takes a third of a second: for the background."""
    import mistudio.ui.training.density  # noqa: F401


class TrainingCharts(QWidget):
    """Charts and log. `append` takes metric rows as they come, `take` what a thread made of them;
    neither draws: that comes in turn. `load_charts` must have been called."""

    def __init__(
        self,
        points: Sequence[str],
        latents: int | None = None,
        live: bool = False,
        parent: QWidget | None = None,
    ) -> None:
        """`latents` of one site; `live`: the training goes on."""
        super().__init__(parent)
        self._points, self._latents = list(points), latents
        self._colours = dict(zip(points, colours(len(points)), strict=True))
        self._chosen: str | None = None  # the one site that is looked at
        self.n_rows = 0
        self._densities: dict[str, Mapping[str, Any]] = {}
        self._rows: list[Mapping[str, Any]] = []  # until the next turn: together they cost less
        self._waiting: list[History] = []  # until the charts are built
        self._to_build = [*CHARTS]
        self._next = 0
        self.charts: dict[str, MetricChart] = {}
        self.density: DensityChart | None = None
        self._turns = QTimer(self)
        self._turns.setInterval(BUILD_MS)
        self._turns.timeout.connect(self._on_turn)

        self.axis = Choice(AXIS_NAMES)
        self.axis.setAccessibleName("Charts over steps, tokens or time")
        self.axis.currentIndexChanged.connect(self._on_axis_changed)
        self._help = Text("Drag to move, Ctrl + wheel to zoom", "helper")
        everything = Button("Show everything", "small", "maximize-2")
        everything.clicked.connect(self._on_everything_clicked)
        self._grid = QGridLayout()
        self._grid.setSpacing(tokens.GAP)
        for side in (0, 1):
            self._grid.setColumnStretch(side, 1)
        self._below = column(0)
        self.log = QPlainTextEdit()
        self.log.setProperty("surface", "log")
        self.log.setReadOnly(True)
        self.log.setMaximumBlockCount(LOG_LINES)
        self.log.setFixedHeight(140)
        self.log.setLineWrapMode(QPlainTextEdit.LineWrapMode.NoWrap)
        self.log.setAccessibleName("Training log")
        self.log.setTabChangesFocus(True)
        self.live = Badge("live", "Live", "emerald")
        self.live.setToolTip("New lines are added as the training goes on")
        self.set_live(live)
        copy = Button("Copy", "small", "copy")
        copy.setAccessibleName("Copy the training log")
        copy.clicked.connect(self._on_copy_clicked)
        kept = Text(f"The newest {LOG_LINES} lines; the run's folder keeps all", "helper")
        layout = column(12)
        over = Text("Over", "label")
        over.setBuddy(self.axis)
        layout.addLayout(row(over, self.axis, everything, None, self._help, spacing=10))
        layout.addLayout(self._grid)
        layout.addLayout(self._below)
        layout.addLayout(
            row(Text("Training log", "label"), self.live, kept, None, copy, spacing=10)
        )
        layout.addWidget(self.log)
        self.setLayout(layout)
        self._turns.start()

    # --- what comes in --------------------------------------------------------------------------

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.n_rows += len(rows)
        self._rows.extend(rows)
        self._wake()

    def take(self, new: History) -> None:
        """Add what `history` made of further rows."""
        self.n_rows += new.n_rows
        self._settle()
        self._settle_history(new)
        self._wake()

    def _wake(self) -> None:
        if not self._turns.isActive():
            self._turns.start()

    def _settle(self) -> None:
        """Take in the rows that came since the last turn."""
        if self._rows:
            rows, self._rows = self._rows, []
            self._settle_history(history(rows, len(self._points) > 1, self._latents))

    def _settle_history(self, new: History) -> None:
        self._densities.update(new.densities)
        self._write(new.lines)
        if self._to_build:
            self._waiting.append(new)
        else:
            self._add(new)

    def add_notes(self, notes: Sequence[str], now: bool = True) -> None:
        """Sentences that the training told, for the log; `now`: they have just come."""
        self._settle()
        self._write([note_line(note, time.time() if now else None) for note in notes])

    def set_live(self, live: bool) -> None:
        """Whether the training goes on just now."""
        self.live_on = live
        self.live.setVisible(live)

    def choose(self, site: str | None) -> None:
        """Look at one site, or at all."""
        self._chosen = site
        for chart in self.charts.values():
            chart.show_only(None if site is None else [site])
        self._show_density()

    def show_density(self, site: str, found: Mapping[str, Any]) -> None:
        """A histogram that did not come with the rows (the final one)."""
        self._densities[site] = found
        self._show_density()

    def _add(self, new: History) -> None:
        for site, values in new.columns.items():
            if site not in self._points:
                self._points.append(site)
                for chart in self.charts.values():
                    chart.add_series(site, site_label(site))
            for key, chart in self.charts.items():
                chart.extend(site, {place: values[place] for place in PLACES}, values[key])

    def _write(self, lines: Sequence[str]) -> None:
        if not lines:
            return
        bar = self.log.verticalScrollBar()
        at_end = bar.value() >= bar.maximum() - 2
        self.log.appendPlainText("\n".join(lines[-LOG_LINES:]))
        if at_end:
            bar.setValue(bar.maximum())

    # --- in turn --------------------------------------------------------------------------------

    def _on_turn(self) -> None:
        """Build the next chart, or draw the next one that has something new."""
        self._settle()
        if self._to_build:
            self._build(*self._to_build.pop(0))
            if not self._to_build:
                waiting, self._waiting = self._waiting, []
                for new in waiting:
                    self._add(new)
            return
        if self.density is None:
            self._build_density()
            return
        self._turns.setInterval(TURN_MS if self.live_on else BUILD_MS)
        charts = list(self.charts.values())
        for _ in charts:
            chart = charts[self._next % len(charts)]
            self._next += 1
            if chart.draw_if_needed():
                return
        self._show_density()
        self._turns.stop()

    def _build(self, key: str, title: str, help: str) -> None:
        from mistudio.ui.widgets.metric_chart import Axis, MetricChart

        axes = [Axis(place, name, place == "seconds") for place, name in AXIS_NAMES]
        floor = 0.0 if key in NEVER_BELOW_ZERO else None
        several = len(self._points) > 1  # the table of layers is their legend
        chart = MetricChart(title, {}, height=170, counts=key == "dead", axes=axes, floor=floor,
                            legend=not several)  # fmt: skip
        for site in self._points:
            chart.add_series(site, site_label(site), self._colours.get(site))
        chart.setToolTip(f"<qt>{help}</qt>")
        chart.set_axis(self.axis.value)
        if self._chosen is not None:
            chart.show_only([self._chosen])
        place = len(self.charts)
        self.charts[key] = chart
        self._grid.addWidget(chart, place // 2, place % 2)

    def _build_density(self) -> None:
        from mistudio.ui.training.density import DensityChart

        self.density = DensityChart()
        self._below.addWidget(self.density)
        self._show_density()

    def _show_density(self) -> None:
        from mistudio.ui.training.density import together

        if self.density is None:
            return
        if self._chosen is not None:
            self.density.show_density(self._densities.get(self._chosen))
            return
        found = together(list(self._densities.values()))
        if found != self.density.found:
            self.density.show_density(found)

    # --- commands -------------------------------------------------------------------------------

    def _on_axis_changed(self, index: int) -> None:
        for chart in self.charts.values():
            chart.set_axis(self.axis.value)

    def _on_everything_clicked(self, checked: bool = False) -> None:
        for chart in self.charts.values():
            chart.show_all()

    def _on_copy_clicked(self, checked: bool = False) -> None:
        QApplication.clipboard().setText(self.log.toPlainText())
