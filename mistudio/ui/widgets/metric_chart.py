"""A chart of a run's metrics: the whole history, cheap enough to redraw while training goes on.

Kept out of `mistudio.ui.widgets` itself: pyqtgraph takes a quarter of a second to import, which the
first paint of the window must not wait for.
"""

from __future__ import annotations

import csv
import io
import math
from array import array
from collections.abc import Iterable, Mapping

import numpy as np
import pyqtgraph as pg
from PySide6.QtCore import QSize, Qt
from PySide6.QtGui import QColor, QFont
from PySide6.QtWidgets import QCheckBox, QStackedLayout, QWidget

from mistudio.ui.theme import fonts, tokens
from mistudio.ui.widgets.buttons import IconButton
from mistudio.ui.widgets.chart_export import ExportedChart
from mistudio.ui.widgets.containers import column, row
from mistudio.ui.widgets.text import Text

pg.setConfigOptions(
    antialias=False, useOpenGL=False, background=tokens.CARD, foreground=tokens.LABEL
)

_EMPTY = "No data yet"


class _Series:
    """One named curve and all its points."""

    def __init__(self, label: str, colour: str, curve: pg.PlotDataItem) -> None:
        self.label, self.colour, self.curve = label, colour, curve
        self.x, self.y = array("d"), array("d")

    def add(self, x: float, y: float) -> None:
        self.x.append(x)
        self.y.append(y)

    def draw(self, log_y: bool) -> None:
        x = np.frombuffer(self.x, dtype=np.float64) if self.x else np.empty(0)
        y = np.frombuffer(self.y, dtype=np.float64) if self.y else np.empty(0)
        if log_y:
            x, y = x[y > 0], y[y > 0]
        # Copies: an array whose buffer is exported cannot grow.
        self.curve.setData(x.copy(), y.copy(), skipFiniteCheck=True)


class MetricChart(ExportedChart):
    """Curves over steps.

    `series` maps a key of the rows to its label in the legend. `append` takes metric rows as a job
    records them and ignores keys that are not shown and values that are not finite numbers.
    """

    def __init__(
        self,
        title: str,
        series: Mapping[str, str],
        y_label: str = "",
        x_key: str = "step",
        x_label: str = "Step",
        log_y: bool = False,
        height: int = 220,
        counts: bool = False,
        parent: QWidget | None = None,
    ) -> None:
        """`counts`: the values are counts, so the axis begins at 0 and never shows parts of one."""
        super().__init__(parent)
        self._title, self._x_key, self._x_label = title, x_key, x_label
        self._series: dict[str, _Series] = {}
        self._dirty = False
        self._plot = pg.PlotWidget(background=tokens.CARD)
        self._plot.setMinimumHeight(height)
        self._plot.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self._plot.setMouseEnabled(x=True, y=False)
        self._plot.setMenuEnabled(False)
        self._plot.hideButtons()
        self._plot.setDownsampling(auto=True, mode="peak")
        self._plot.setClipToView(True)
        self._plot.showGrid(x=False, y=True, alpha=0.15)
        self._plot.setAccessibleName(title)
        if counts:
            self._plot.getPlotItem().getViewBox().setLimits(yMin=0, minYRange=4)
        self._style_axes(y_label)
        self._legend = self._plot.addLegend(
            offset=(-8, 4), labelTextColor=tokens.LABEL, labelTextSize=f"{fonts.px(14)}px"
        )
        self._legend.setVisible(len(series) > 1)

        self._log_box = QCheckBox("Log scale")
        self._log_box.setAccessibleName(f"{title}: log scale")
        self._log_box.setFont(fonts.sans(14))
        self._log_box.setChecked(log_y)
        self._log_box.toggled.connect(self._on_log_box_toggled)
        self._menu_button = IconButton("ellipsis", f"{title}: copy or save", size=18)
        self._menu = self.export_menu()
        self._menu.addAction("Show everything", self.show_all)
        self._menu_button.setMenu(self._menu)
        self._menu_button.setPopupMode(IconButton.ToolButtonPopupMode.InstantPopup)

        self._empty = Text(_EMPTY, "helper")
        self._empty.setAlignment(Qt.AlignmentFlag.AlignCenter)
        self._empty.setMinimumHeight(height)
        stack = QWidget()
        self._stack = QStackedLayout(stack)
        self._stack.addWidget(self._empty)
        self._stack.addWidget(self._plot)
        layout = column(4)
        layout.addLayout(
            row(Text(title, "label"), None, self._log_box, self._menu_button, spacing=8)
        )
        layout.addWidget(stack, 1)
        self.setLayout(layout)
        self.setAccessibleName(title)
        self.setAccessibleDescription(_EMPTY)
        for key, label in series.items():
            self.add_series(key, label)
        if log_y:
            self._plot.setLogMode(y=True)

    def sizeHint(self) -> QSize:
        return QSize(480, 260)

    # --- data ---------------------------------------------------------------------------------

    def add_series(self, key: str, label: str, colour: str | None = None) -> None:
        """Add a curve; the colour defaults to the next of `tokens.SERIES`."""
        if key in self._series:
            return
        colour = colour or tokens.SERIES[len(self._series) % len(tokens.SERIES)]
        # Width 1 without antialias: 65 times faster than width 2 with it.
        curve = self._plot.plot(pen=pg.mkPen(colour, width=1), name=label)
        self._series[key] = _Series(label, colour, curve)
        self._legend.setVisible(len(self._series) > 1)

    def append(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Add metric rows; drawn at once where the chart can be seen, else when it is shown."""
        grew = False
        for metrics in rows:
            x = metrics.get(self._x_key)
            if not isinstance(x, int | float):
                continue
            for key, series in self._series.items():
                y = metrics.get(key)
                if isinstance(y, int | float) and math.isfinite(y):
                    series.add(float(x), float(y))
                    grew = True
        if grew:
            self._changed()

    def set_data(self, key: str, xs: Iterable[float], ys: Iterable[float]) -> None:
        """Replace one curve; points that are not finite are left out."""
        series = self._series[key]
        series.x, series.y = array("d"), array("d")
        for x, y in zip(xs, ys, strict=True):
            if math.isfinite(y):
                series.add(float(x), float(y))
        self._changed()

    def clear(self) -> None:
        for series in self._series.values():
            series.x, series.y = array("d"), array("d")
        self._changed()

    def points(self, key: str) -> list[tuple[float, float]]:
        series = self._series[key]
        return list(zip(series.x, series.y, strict=True))

    def latest(self, key: str) -> float | None:
        series = self._series[key]
        return series.y[-1] if series.y else None

    @property
    def is_empty(self) -> bool:
        return not any(series.x for series in self._series.values())

    # --- look ---------------------------------------------------------------------------------

    def set_log_y(self, log_y: bool) -> None:
        self._log_box.setChecked(log_y)

    def show_all(self) -> None:
        """Undo zooming and panning."""
        self._plot.enableAutoRange()

    def csv(self) -> str:
        """Every point as `series,step,value`: what a screen reader or a spreadsheet can use."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["series", self._x_label.lower(), "value"])
        for series in self._series.values():
            for x, y in zip(series.x, series.y, strict=True):
                writer.writerow([series.label, f"{x:g}", repr(y)])
        return text.getvalue()

    def drawing(self) -> QWidget:
        return self._plot

    def _style_axes(self, y_label: str) -> None:
        font: QFont = fonts.sans(14)
        style = {"color": tokens.LABEL, "font-size": f"{fonts.px(14)}px"}
        for side, text in (("bottom", self._x_label), ("left", y_label)):
            axis = self._plot.getAxis(side)
            axis.setTickFont(font)
            axis.setTextPen(QColor(tokens.HELPER))
            axis.setPen(QColor(tokens.RAISED_HOVER))
            axis.enableAutoSIPrefix(False)
            if text:
                axis.setLabel(text, **style)
        self._plot.getAxis("left").setWidth(fonts.px(72))

    def _changed(self) -> None:
        self._stack.setCurrentIndex(0 if self.is_empty else 1)
        last = [
            f"{series.label} {series.y[-1]:.4g} at {self._x_label.lower()} {series.x[-1]:g}"
            for series in self._series.values()
            if series.y
        ]
        self.setAccessibleDescription("; ".join(last) or _EMPTY)
        if self.isVisible():
            self._draw()
        else:
            self._dirty = True

    def _draw(self) -> None:
        self._dirty = False
        log_y = self._log_box.isChecked()
        for series in self._series.values():
            series.draw(log_y)

    def showEvent(self, event: object) -> None:
        super().showEvent(event)
        if self._dirty:
            self._draw()

    def _on_log_box_toggled(self, checked: bool) -> None:
        self._plot.setLogMode(y=checked)
        self._draw()
