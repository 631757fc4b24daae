"""The histogram of how often latents fire: quarters of a decade, and those that never did.

Imports pyqtgraph; what it shows was counted by the engine (engine/sae/metrics.py, `density`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pyqtgraph as pg
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QStackedLayout, QWidget

from mistudio import formatting
from mistudio.ui.theme import fonts, tokens
from mistudio.ui.widgets import ElidedLabel, IconButton, Text, column, row
from mistudio.ui.widgets.chart_export import ExportedChart
from mistudio.ui.widgets.metric_chart import AxisLabels

HELP = (
    "<qt>How many latents fire how often: a latent at 1 % was active on one token in a hundred. "
    "A good dictionary has most between 0.001 % and 1 %. Latents that fired on no token of the "
    "sample have a bar of their own: the larger the sample, the fewer they are.</qt>"
)
NEVER_AT = -6.75  # beside the lowest bin, which begins at one in a million
_EMPTY = "No data yet: counted anew every 5 % of the steps"


def together(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Histograms of several sites as one; None where there is none."""
    if not found:
        return None
    return {
        "log10_edges": found[0]["log10_edges"],
        "counts": [sum(column) for column in zip(*(one["counts"] for one in found), strict=True)],
        "never_fired": sum(one["never_fired"] for one in found),
        "tokens": max(one["tokens"] for one in found),
        "step": max(one.get("step") or 0 for one in found) or None,
        "sites": len(found),
    }


def sample_text(found: Mapping[str, Any]) -> str:
    """`61,440 training tokens up to step 1,200 • 37 of 4,608 latents never fired`."""
    latents = formatting.count(sum(found["counts"]) + found["never_fired"])
    tokens_text = formatting.count(found["tokens"])
    step = found.get("step")
    kind = f"training tokens up to step {formatting.count(step)}" if step else "held-out tokens"
    sites = found.get("sites", 1)
    where = f" of {sites} layers" if sites > 1 else ""
    never = formatting.count(found["never_fired"])
    return f"{tokens_text} {kind} • {never} of {latents} latents{where} never fired"


class DensityChart(ExportedChart):
    """`show_density` takes what the engine counted: `log10_edges`, `counts`, `never_fired` and the
    `tokens` it was counted on; with a `step` these are training tokens, without held-out ones."""

    def __init__(self, height: int = 190, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._title = "Firing frequency of latents"
        self.found: Mapping[str, Any] | None = None
        self._plot = pg.PlotWidget(
            background=tokens.CARD,
            axisItems={"bottom": _Shares("bottom"), "left": AxisLabels("left")},
        )
        self._plot.setMinimumHeight(height)
        self._plot.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self._plot.setMouseEnabled(x=False, y=False)
        self._plot.setMenuEnabled(False)
        self._plot.hideButtons()
        self._plot.showGrid(x=False, y=True, alpha=0.15)
        self._plot.setAttribute(Qt.WidgetAttribute.WA_TransparentForMouseEvents)
        style = {"color": tokens.LABEL, "font-size": f"{fonts.px(14)}px"}
        for side, text in (("bottom", "Share of tokens a latent fires on"), ("left", "Latents")):
            axis = self._plot.getAxis(side)
            axis.setTickFont(fonts.sans(14))
            axis.setTextPen(tokens.HELPER)
            axis.setPen(tokens.RAISED_HOVER)
            axis.enableAutoSIPrefix(False)
            axis.setStyle(maxTickLevel=0)
            axis.setLabel(text, **style)
        self._plot.getAxis("left").setWidth(fonts.px(72))
        self._plot.setXRange(NEVER_AT - 0.3, 0.0, padding=0.01)
        self._plot.getPlotItem().getViewBox().setLimits(yMin=0, minYRange=4)
        self._alive = pg.BarGraphItem(x=[], height=[], width=0.22, brush=tokens.EMERALD, pen=None)
        hatched = pg.mkBrush(tokens.RED)
        hatched.setStyle(Qt.BrushStyle.BDiagPattern)  # told apart without colour too
        self._never = pg.BarGraphItem(x=[], height=[], width=0.36, brush=hatched, pen=tokens.RED)
        self._plot.addItem(self._alive)
        self._plot.addItem(self._never)

        self._empty = Text(_EMPTY, "helper")
        self._empty.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self._empty.setMinimumHeight(height)
        stack = QWidget()
        self._stack = QStackedLayout(stack)
        self._stack.addWidget(self._empty)
        self._stack.addWidget(self._plot)
        self.sample = ElidedLabel("", "helper")
        menu = IconButton("ellipsis", f"{self._title}: copy or save", size=18)
        menu.setMenu(self.export_menu())
        menu.setPopupMode(IconButton.ToolButtonPopupMode.InstantPopup)
        head = row(Text(self._title, "label"), self.sample, menu, spacing=12)
        head.setStretch(1, 1)
        layout = column(4)
        layout.addLayout(head)
        layout.addWidget(stack, 1)
        self.setLayout(layout)
        self.setToolTip(HELP)
        self.show_density(None)

    def show_density(self, found: Mapping[str, Any] | None) -> None:
        if found is self.found and found is not None:
            return
        self.found = found
        self._stack.setCurrentIndex(0 if found is None else 1)
        self.setAccessibleName(self._title)
        if found is None:
            self.sample.setText("")
            self.setAccessibleDescription(_EMPTY)
            return
        edges = found["log10_edges"]
        centres = [(low + high) / 2 for low, high in pairwise(edges)]
        self._alive.setOpts(x=centres, height=found["counts"], width=0.22)
        self._never.setOpts(x=[NEVER_AT], height=[found["never_fired"]], width=0.36)
        self.sample.setText(sample_text(found))
        self.setAccessibleDescription(sample_text(found))

    def csv(self) -> str:
        """`log10_from,log10_to,latents`; latents that never fired have no logarithm."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["log10_from", "log10_to", "latents"])
        if self.found is not None:
            edges = self.found["log10_edges"]
            writer.writerow(["", "never", self.found["never_fired"]])
            writer.writerows(zip(edges, edges[1:], self.found["counts"], strict=False))
        return text.getvalue()

    def drawing(self) -> QWidget:
        return self._plot


class _Shares(pg.AxisItem):
    """Whole decades as shares, and where those that never fired stand."""

    def tickValues(self, low: float, high: float, size: float) -> list[tuple[float, list[float]]]:
        return [(1.0, [NEVER_AT, *map(float, range(-6, 1))])]

    def tickStrings(self, values: list[float], scale: float, spacing: float) -> list[str]:
        return ["never" if value < -6.5 else f"{100 * 10**value:g}%" for value in values]
