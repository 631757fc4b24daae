"""Charts of a dataset's statistics, each with its values as CSV and its picture as PNG or SVG.

Imported only where a chart is shown: pyqtgraph takes a quarter of a second to import.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import numpy as np
import pyqtgraph as pg
from PySide6.QtCore import Qt
from PySide6.QtGui import QColor
from PySide6.QtWidgets import QWidget

from mistudio import formatting
from mistudio.ui.theme import fonts, tokens
from mistudio.ui.widgets import IconButton, Text, column, row
from mistudio.ui.widgets.chart_export import ExportedChart


class StatisticsChart(ExportedChart):
    """A plot with a title, a definition as its tooltip, and a menu to take it along."""

    def __init__(
        self, title: str, tooltip: str, height: int, parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self._title = title
        self._rows: list[tuple[object, ...]] = []
        self._heading: tuple[str, ...] = ()
        self.plot = pg.PlotWidget(background=tokens.CARD)
        self.plot.setFixedHeight(height)
        self.plot.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self.plot.setMouseEnabled(x=False, y=False)
        self.plot.setMenuEnabled(False)
        self.plot.hideButtons()
        self.plot.setAccessibleName(title)
        self.plot.setToolTip(tooltip)
        for side in ("bottom", "left"):
            axis = self.plot.getAxis(side)
            axis.setTickFont(fonts.sans(14))
            axis.setTextPen(QColor(tokens.HELPER))
            axis.setPen(QColor(tokens.RAISED_HOVER))
            axis.enableAutoSIPrefix(False)
        button = IconButton("ellipsis", f"{title}: copy or save", size=18)
        button.setMenu(self.export_menu())
        button.setPopupMode(IconButton.ToolButtonPopupMode.InstantPopup)
        heading = Text(title, "card")
        heading.setToolTip(tooltip)
        layout = column(8)
        layout.addLayout(row(heading, None, button))
        layout.addWidget(self.plot)
        self.setLayout(layout)
        self.setAccessibleName(title)
        self.setToolTip(tooltip)

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self._heading)
        writer.writerows(self._rows)
        return text.getvalue()

    def drawing(self) -> QWidget:
        return self.plot

    def _label(self, side: str, text: str) -> None:
        style = {"color": tokens.LABEL, "font-size": f"{fonts.px(14)}px"}
        self.plot.getAxis(side).setLabel(text, **style)

    def _describe(self, rows: Sequence[tuple[object, ...]]) -> None:
        """What a screen reader says of it."""
        said = "; ".join(" ".join(str(value) for value in entry) for entry in rows[:12])
        self.setAccessibleDescription(said)
        self.plot.setAccessibleDescription(said)


class BarChart(StatisticsChart):
    """Horizontal bars, each with its number at the end."""

    def __init__(
        self,
        title: str,
        tooltip: str,
        bars: Sequence[tuple[str, float]],
        heading: tuple[str, str],
        colour: str = tokens.BLUE,
        percent: bool = False,
        parent: QWidget | None = None,
    ) -> None:
        """`percent`: the values are shares of 1."""
        super().__init__(title, tooltip, fonts.px(30) * max(len(bars), 1) + 16, parent)
        self._heading = heading
        self._rows = [(label, value) for label, value in bars]
        values = np.asarray([value for _, value in bars], float)
        places = np.arange(len(bars), dtype=float)
        most = float(values.max(initial=0.0)) or 1.0
        fill = QColor(colour)
        fill.setAlpha(150)
        self.plot.addItem(
            pg.BarGraphItem(x0=0, y=places, height=0.66, width=values, brush=fill, pen=fill)
        )
        for place, value in zip(places, values, strict=True):
            text = formatting.percent(value) if percent else formatting.count(value)
            # Inside the end of a long bar, beside a short one.
            inside = value > 0.6 * most
            label = pg.TextItem(text, color=tokens.TEXT, anchor=(1.05 if inside else -0.05, 0.5))
            label.setFont(fonts.mono(14))
            label.setPos(value, place)
            self.plot.addItem(label, ignoreBounds=True)
        left = self.plot.getAxis("left")
        left.setTicks([[(place, label) for place, (label, _) in enumerate(bars)]])
        left.setStyle(tickLength=0)
        left.setPen(None)
        longest = max((len(label) for label, _ in bars), default=4)
        left.setWidth(fonts.px(12 + 9 * min(longest, 24)))
        self.plot.hideAxis("bottom")
        view = self.plot.getPlotItem().getViewBox()
        view.invertY(True)
        view.setRange(xRange=(0, most * 1.02), yRange=(-0.5, len(bars) - 0.5), padding=0)
        self._describe(self._rows)


class ZipfChart(StatisticsChart):
    """How often the token of each rank occurs, both axes logarithmic."""

    def __init__(
        self,
        title: str,
        tooltip: str,
        points: Sequence[tuple[int, int]],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(title, tooltip, 260, parent)
        self._heading = ("rank", "occurrences")
        self._rows = [(int(rank), int(number)) for rank, number in points]
        ranks = np.asarray([rank for rank, _ in points], float)
        numbers = np.asarray([number for _, number in points], float)
        self.plot.setLogMode(x=True, y=True)
        self.plot.showGrid(x=True, y=True, alpha=0.15)
        self.plot.plot(ranks, numbers, pen=pg.mkPen(tokens.EMERALD, width=1))
        for side, values in (("bottom", ranks), ("left", numbers)):
            most = int(np.ceil(np.log10(max(values.max(initial=1.0), 10.0))))
            powers = [(power, formatting.short_count(10.0**power)) for power in range(most + 1)]
            self.plot.getAxis(side).setTicks([powers])
        self._label("bottom", "Rank of the token")
        self._label("left", "Occurrences")
        self.plot.getAxis("left").setWidth(fonts.px(72))
        self._describe(self._rows)
