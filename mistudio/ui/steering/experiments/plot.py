"""Means with 95 % intervals over strengths or layers. Imports pyqtgraph: only when shown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import pyqtgraph as pg
from PySide6.QtCore import Qt
from PySide6.QtGui import QColor
from PySide6.QtWidgets import QWidget

from mistudio.ui.steering.experiments.results import EstimateCurve
from mistudio.ui.theme import fonts, tokens
from mistudio.ui.widgets import IconButton, Text, column, row
from mistudio.ui.widgets.chart_export import ExportedChart

_SYMBOLS = ("o", "s", "t", "d", "star", "+", "p", "h")
_SIGNS = ("●", "■", "▼", "◆", "★", "✚", "⬟", "⬢")


class EstimateChart(ExportedChart):
    """Curves differ in colour and in the shape of their points; the key below names them."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._title = "Experiment"
        self._x_label = ""
        self._curves: list[EstimateCurve] = []
        self._plot = pg.PlotWidget(background=tokens.CARD)
        self._plot.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self._plot.setMinimumHeight(260)
        self._plot.setMenuEnabled(False)
        self._plot.hideButtons()
        self._plot.setMouseEnabled(x=False, y=False)
        self._plot.showGrid(x=False, y=True, alpha=0.15)
        for side in ("bottom", "left"):
            axis = self._plot.getAxis(side)
            axis.setTickFont(fonts.sans(14))
            axis.setTextPen(QColor(tokens.HELPER))
            axis.setPen(QColor(tokens.RAISED_HOVER))
            axis.enableAutoSIPrefix(False)
        self._heading = Text("", "label")
        self._key = Text("", "helper", wrap=True)
        menu = IconButton("ellipsis", "Chart: copy or save", size=18)
        menu.setMenu(self.export_menu())
        menu.setPopupMode(IconButton.ToolButtonPopupMode.InstantPopup)
        layout = column(8)
        layout.addLayout(row(self._heading, None, menu))
        layout.addWidget(self._plot)
        layout.addWidget(self._key)
        self.setLayout(layout)

    def show_curves(
        self, title: str, unit: str, x_label: str, found: Sequence[EstimateCurve]
    ) -> None:
        self._title, self._x_label, self._curves = title, x_label, list(found)
        self._heading.setText(f"{title} ({unit})")
        self._plot.clear()
        style = {"color": tokens.LABEL, "font-size": f"{fonts.px(14)}px"}
        self._plot.setLabel("bottom", x_label, **style)
        self._plot.setLabel("left", title, **style)
        for number, curve in enumerate(found):
            self._draw(number, curve)
        named = [
            f"{_SIGNS[number % len(_SIGNS)]} {curve.name}"
            for number, curve in enumerate(found)
            if curve.name
        ]
        seeds = any(low is not None for curve in found for low in curve.low)
        bars = "Bars: 95 % interval over seeds." if seeds else "One seed: no intervals."
        self._key.setText("   ".join([*named, bars]))
        self.setAccessibleName(title)
        self.setAccessibleDescription(self._told())

    def _draw(self, number: int, curve: EstimateCurve) -> None:
        colour = QColor(tokens.SERIES[number % len(tokens.SERIES)])
        symbol = _SYMBOLS[number % len(_SYMBOLS)]
        self._plot.plot(
            curve.x,
            curve.mean,
            pen=pg.mkPen(colour, width=1),
            symbol=symbol,
            symbolSize=9,
            symbolBrush=colour,
            symbolPen=pg.mkPen(colour),
        )
        for x, low, high in zip(curve.x, curve.low, curve.high, strict=True):
            if low is not None and high is not None:
                self._plot.plot([x, x], [low, high], pen=pg.mkPen(colour, width=1))

    def _told(self) -> str:
        return "; ".join(
            f"{curve.name} {x:g}: {mean:.3g}".strip()
            for curve in self._curves
            for x, mean in zip(curve.x, curve.mean, strict=True)
        )

    def csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(["curve", self._x_label, "mean", "low", "high"])
        for curve in self._curves:
            for values in zip(curve.x, curve.mean, curve.low, curve.high, strict=True):
                writer.writerow([curve.name, *values])
        return out.getvalue()

    def drawing(self) -> QWidget:
        found: QWidget = self._plot
        return found
