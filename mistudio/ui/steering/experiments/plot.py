"""Means with 95 % intervals over strengths or layers. Imports pyqtgraph: only when shown."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Sequence
from itertools import pairwise

import pyqtgraph as pg
from PySide6.QtCore import Qt
from PySide6.QtGui import QColor
from PySide6.QtWidgets import QWidget

from mistudio.ui.steering.experiments.results import EstimateCurve
from mistudio.ui.theme import fonts, tokens
from mistudio.ui.widgets import Choice, IconButton, Text, column, row
from mistudio.ui.widgets.chart_export import ExportedChart

_SYMBOLS = ("o", "s", "t", "d", "star", "+", "p", "h")
_SIGNS = ("●", "■", "▼", "◆", "★", "✚", "⬟", "⬢")


_HEIGHT = 290
_ASIDE = 0.06  # between curves, in shares of the least distance between two places
_MOST_TICKS, _TICK_ROOM = 16, 110  # names, and their letters together, along the bottom


class EstimateChart(ExportedChart):
    """Curves differ in colour and in the shape of their points; the key below names them. What is
    done when another `measure` is chosen is up to who shows it."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._title = "Experiment"
        self._x_label = ""
        self._curves: list[EstimateCurve] = []
        self._names: list[str] = []
        self._plot = pg.PlotWidget(background=tokens.CARD)
        self._plot.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self._plot.setFixedHeight(_HEIGHT)
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
        self.measure = Choice()
        self.measure.setMinimumContentsLength(20)
        self.measure.setAccessibleName("Measure to plot")
        self._unit = Text("", "helper", wrap=True)
        self._key = Text("", "helper", wrap=True)
        self._key.setTextFormat(Qt.TextFormat.RichText)
        menu = IconButton("ellipsis", "Chart: copy or save", size=18)
        menu.setMenu(self.export_menu())
        menu.setPopupMode(IconButton.ToolButtonPopupMode.InstantPopup)
        layout = column(8)
        head = row(self.measure, self._unit, menu)
        head.setStretch(1, 1)
        layout.addLayout(head)
        layout.addWidget(self._plot)
        layout.addWidget(self._key)
        self.setLayout(layout)

    def show_curves(
        self,
        title: str,
        unit: str,
        x_label: str,
        found: Sequence[EstimateCurve],
        names: Sequence[str] = (),
    ) -> None:
        """`names`: of the places 0, 1, ... along the bottom, where these are no numbers."""
        self._title, self._x_label, self._curves = title, x_label, list(found)
        self._names = list(names)
        self._unit.setText(unit)
        self._plot.clear()
        style = {"color": tokens.LABEL, "font-size": f"{fonts.px(14)}px"}
        self._plot.setLabel("bottom", x_label, **style)
        self._plot.setLabel("left", title, **style)
        tried = sorted({x for curve in found for x in curve.x})
        ticks = _ticks(names) if names else _numbers(tried)
        self._plot.getAxis("bottom").setTicks([ticks] if ticks else None)
        self._plot.setXRange(*_range(tried, len(names)), padding=0)
        for number, curve in enumerate(found):
            # Beside each other: intervals at one place would hide each other.
            aside = (number - (len(found) - 1) / 2) * _ASIDE * _gap(tried)
            self._draw(number, curve, aside)
        named = [
            f'<span style="color: {tokens.SERIES[number % len(tokens.SERIES)]}">'
            f"{_SIGNS[number % len(_SIGNS)]}</span> {html.escape(curve.name)}"
            for number, curve in enumerate(found)
            if curve.name
        ]
        seeds = any(low is not None for curve in found for low in curve.low)
        bars = "Bars: 95 % interval over seeds." if seeds else "One seed: no intervals."
        self._key.setText("&nbsp;&nbsp; ".join([*named, bars]))
        self.setAccessibleName(title)
        self.setAccessibleDescription(self._told())

    def _draw(self, number: int, curve: EstimateCurve, aside: float) -> None:
        places = [x + aside for x in curve.x]
        colour = QColor(tokens.SERIES[number % len(tokens.SERIES)])
        symbol = _SYMBOLS[number % len(_SYMBOLS)]
        self._plot.plot(
            places,
            curve.mean,
            pen=pg.mkPen(colour, width=1) if curve.joined else None,
            symbol=symbol,
            symbolSize=9,
            symbolBrush=colour,
            symbolPen=pg.mkPen(colour),
        )
        for x, low, high in zip(places, curve.low, curve.high, strict=True):
            if low is not None and high is not None:
                self._plot.plot([x, x], [low, high], pen=pg.mkPen(colour, width=1))

    def _told(self) -> str:
        return "; ".join(
            f"{curve.name} {self._place(x)}: {mean:.3g}".strip()
            for curve in self._curves
            for x, mean in zip(curve.x, curve.mean, strict=True)
        )

    def _place(self, x: float) -> str:
        return self._names[int(x)] if self._names else f"{x:g}"

    def csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(["curve", self._x_label, "mean", "low", "high"])
        for curve in self._curves:
            for x, *values in zip(curve.x, curve.mean, curve.low, curve.high, strict=True):
                writer.writerow([curve.name, self._place(x), *values])
        return out.getvalue()

    def drawing(self) -> QWidget:
        found: QWidget = self._plot
        return found


def _ticks(names: Sequence[str]) -> list[tuple[float, str]]:
    """Every so many of them, that they do not run into each other; cut where they are long."""
    room = max(4, _TICK_ROOM // max(1, min(len(names), _MOST_TICKS)))
    step = math.ceil(len(names) / _MOST_TICKS)
    short = [name if len(name) <= room else f"{name[: room - 1]}…" for name in names]
    return [(float(i), name) for i, name in enumerate(short) if i % step == 0]


def _numbers(places: Sequence[float]) -> list[tuple[float, str]]:
    """The strengths that were tried; none (the axis then has round ones) where they are too near
    each other."""
    if len(places) > 1 and _gap(places) < (places[-1] - places[0]) / 24:
        return []
    return [(x, f"{x:g}") for x in places]


def _gap(places: Sequence[float]) -> float:
    return min((b - a for a, b in pairwise(places)), default=1.0)


def _range(places: Sequence[float], names: int) -> tuple[float, float]:
    """With room for the labels of the first and the last."""
    if names:
        return -0.5, names - 0.5
    least, most = (places[0], places[-1]) if places else (0.0, 1.0)
    room = 0.06 * (most - least) or 0.5
    return least - room, most + room
