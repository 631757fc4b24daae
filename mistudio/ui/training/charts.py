"""Live charts and the log of one training: every step that was recorded, one curve per site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PySide6.QtWidgets import QGridLayout, QPlainTextEdit, QWidget

from mistudio import formatting
from mistudio.ui.theme import tokens
from mistudio.ui.training.form import SITES, point_parts
from mistudio.ui.widgets import Text, column

if TYPE_CHECKING:
    from mistudio.ui.widgets.metric_chart import MetricChart

LOG_LINES = 400  # shown; the charts keep everything

CHARTS = (
    ("loss", "Loss", "What the training lowers: squared error of the batch over the variance of a "
     "calibration sample (the batch's FVU; the auxiliary term is left out). "
     "0 is a perfect reconstruction."),
    ("l0", "L0", "Mean number of active latents per token, on the training batch. It falls from "
     "four times the target while the sparsity warms up."),
    ("dead", "Dead latents", "Latents that have not fired within the dead window."),
    ("learning_rate", "Learning rate", "Of this step: warm-up, the chosen schedule, then linear to "
     "0."),
)  # fmt: skip


def site_label(name: str) -> str:
    """`L10` for the usual site, `L10 MLP output` for another."""
    site, layer = point_parts(name)
    return f"L{layer}" if site == "resid_post" else f"L{layer} {SITES.get(site, site)}"


def log_line(row: Mapping[str, Any], several: bool = False) -> str:
    """A metric row as a line of the log."""
    where = f"{site_label(row['site'])}  " if several else ""
    return (
        f"Step {formatting.count(row['step'] + 1):>7}  {where}"
        f"loss {number(row, 'loss', 4)}  L0 {number(row, 'l0', 1)}  "
        f"dead {number(row, 'dead', 0)}  {number(row, 'tokens_per_second', 0)} tokens/s"
    )


def number(row: Mapping[str, Any], key: str, decimals: int) -> str:
    return formatting.number(row.get(key), decimals)


def averages(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Mean over the sites of each one's newest value; None where there is none."""
    newest = {row["site"]: row[key] for row in rows if row.get(key) is not None}
    values = [value for value in newest.values() if math.isfinite(value)]
    return sum(values) / len(values) if values else None


class TrainingCharts(QWidget):
    """Four charts and the log. `append` takes metric rows as they come and never redraws what
    does not change."""

    def __init__(self, points: Sequence[str], parent: QWidget | None = None) -> None:
        super().__init__(parent)
        from mistudio.ui.widgets.metric_chart import MetricChart

        self._points = list(points)
        self.n_rows = 0
        labels = {name: site_label(name) for name in self._points}
        self.charts: dict[str, MetricChart] = {}
        grid = QGridLayout()
        grid.setSpacing(tokens.GAP)
        for place, (key, title, help) in enumerate(CHARTS):
            chart = MetricChart(title, labels, height=170, counts=key == "dead")
            chart.setToolTip(help)
            self.charts[key] = chart
            grid.addWidget(chart, place // 2, place % 2)
            grid.setColumnStretch(place % 2, 1)
        self.log = QPlainTextEdit()
        self.log.setProperty("surface", "log")
        self.log.setReadOnly(True)
        self.log.setMaximumBlockCount(LOG_LINES)
        self.log.setFixedHeight(132)
        self.log.setLineWrapMode(QPlainTextEdit.LineWrapMode.NoWrap)
        self.log.setAccessibleName("Training log")
        self.log.setTabChangesFocus(True)
        layout = column(8)
        layout.addLayout(grid)
        layout.addWidget(Text("Training log", "label"))
        layout.addWidget(self.log)
        self.setLayout(layout)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if not rows:
            return
        self.n_rows += len(rows)
        for row in rows:
            name = row["site"]
            if name not in self._points:
                self._points.append(name)
                for chart in self.charts.values():
                    chart.add_series(name, site_label(name))
        for key, chart in self.charts.items():
            chart.append([{"step": row["step"], row["site"]: row.get(key)} for row in rows])
        several = len(self._points) > 1
        bar = self.log.verticalScrollBar()
        at_end = bar.value() >= bar.maximum() - 2
        self.log.appendPlainText("\n".join(log_line(row, several) for row in rows[-LOG_LINES:]))
        if at_end:
            bar.setValue(bar.maximum())
