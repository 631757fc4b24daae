"""A chart of a run's metrics: the whole history, cheap enough to redraw while training goes on.

Kept out of `mistudio.ui.widgets` itself: pyqtgraph takes a quarter of a second to import, which the
first paint of the window must not wait for.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyqtgraph as pg
from PySide6.QtCore import QSize, Qt, QTimer
from PySide6.QtGui import QColor, QFont, QPaintEvent, QWheelEvent
from PySide6.QtWidgets import QCheckBox, QStackedLayout, QWidget

from mistudio.ui.theme import fonts, tokens
from mistudio.ui.widgets.buttons import IconButton
from mistudio.ui.widgets.chart_export import ExportedChart
from mistudio.ui.widgets.containers import column, row
from mistudio.ui.widgets.decimation import Curve, Floats
from mistudio.ui.widgets.text import Text

pg.setConfigOptions(
    antialias=False, useOpenGL=False, background=tokens.CARD, foreground=tokens.LABEL
)

_EMPTY = "No data yet"
LEGEND_UP_TO = 6  # curves; more would cover them


@dataclass(frozen=True)
class Axis:
    """What the curves can run over: a key of the rows, its name, and whether it is seconds."""

    key: str
    label: str
    is_time: bool = False


class AxisLabels(pg.AxisItem):
    """Ticks as people write them: `1.25M` steps, `2:30` minutes."""

    is_time = False

    def tickStrings(self, values: list[float], scale: float, spacing: float) -> list[str]:
        if self.logMode:
            return list(super().tickStrings(values, scale, spacing))
        if self.is_time:
            return [clock(value, spacing) for value in values]
        return [short(value, spacing) for value in values]


def short(value: float, spacing: float) -> str:
    """A number with as many digits as tell it from its neighbours `spacing` away."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= limit:
            divisor = limit if unit != "K" else 1e3
            return _digits(value / divisor, spacing / divisor) + unit
    return _digits(value, spacing)


def _digits(value: float, spacing: float) -> str:
    if 0 < abs(value) < 1e-3:
        return f"{value:.2g}"
    decimals = 0
    while decimals < 6 and abs(round(spacing, decimals) - spacing) > 1e-3 * spacing:
        decimals += 1
    return f"{value:,.{decimals}f}"


def clock(seconds: float, spacing: float) -> str:
    """`2:30` (minutes), `1:02:30` (hours); with parts of a second where ticks stand closer."""
    whole = math.floor(seconds)
    rest = f"{seconds - whole:.2f}"[1:] if spacing < 1 else ""
    hours, minutes = whole // 3600, whole // 60 % 60
    tail = f"{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
    return (f"{hours}:" if hours else "") + tail + rest


class _Plot(pg.PlotWidget):
    """The wheel scrolls the page; with Ctrl it zooms."""

    def wheelEvent(self, event: QWheelEvent) -> None:
        if event.modifiers() & Qt.KeyboardModifier.ControlModifier:
            super().wheelEvent(event)
        else:
            event.ignore()


class _Line(pg.PlotCurveItem):
    """Draws the part that is seen; its bounds are those of all points."""

    def __init__(self, points: Curve, colour: str, label: str) -> None:
        # Width 1 without antialias: 65 times faster than width 2 with it.
        super().__init__(pen=pg.mkPen(colour, width=1), name=label)
        self.points, self.axis, self.log_y = points, "", False

    def dataBounds(
        self, ax: int, frac: float = 1.0, orthoRange: object = None
    ) -> tuple[float | None, float | None]:
        points = self.points
        if not len(points):
            return None, None
        if ax == 0:
            x = points.x(self.axis)
            return float(x[0]), float(x[-1])
        if not self.log_y:
            return float(points.low), float(points.high)
        y = self.yData  # what is drawn: zeros have no place here
        return (float(y.min()), float(y.max())) if y is not None and len(y) else (None, None)


class _Series:
    """One named curve and all its points."""

    def __init__(self, label: str, colour: str, axes: Sequence[Axis]) -> None:
        self.label, self.colour = label, colour
        self._axes = [axis.key for axis in axes]
        self.clear()
        self.curve = _Line(self.points, colour, label)

    def clear(self) -> None:
        self.points = Curve(self._axes)
        self._new: dict[str, list[float]] = {key: [] for key in (*self._axes, "")}

    def add(self, xs: Mapping[str, float], y: float) -> None:
        for key in self._axes:
            self._new[key].append(xs[key])
        self._new[""].append(y)

    def settle(self) -> Curve:
        """All points; those added since come in at once, which is far cheaper than one by one."""
        if self._new[""]:
            self.points.extend(self._new, self._new[""])
            for values in self._new.values():
                values.clear()
        return self.points

    def draw(self, axis: str, log_y: bool, columns: int, start: float, stop: float) -> None:
        points = self.settle()
        x, y = points.shown(axis, columns, start, stop)
        if log_y:
            above = y > 0
            x, y = x[above], np.log10(y[above])
        curve = self.curve
        curve.points, curve.axis, curve.log_y = points, axis, log_y
        curve.setData(x, y, skipFiniteCheck=True)


class MetricChart(ExportedChart):
    """Curves over steps.

    `series` maps a key of the rows to its label in the legend. `append` takes metric rows as a job
    records them and ignores keys that are not shown, values that are not finite numbers, and rows
    without a place on each of the `axes` (by default one, `x_key`). Of the history only what the
    screen can show is drawn (`decimation.py`), never only its newest part.
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
        axes: Sequence[Axis] = (),
        floor: float | None = None,
        legend: bool = True,
        parent: QWidget | None = None,
    ) -> None:
        """`counts`: the values are counts, so the axis begins at 0 and never shows parts of one;
        `floor`: it shows nothing below; `legend`: False where something beside the chart tells the
        curves apart (a saved picture has one all the same)."""
        super().__init__(parent)
        self._title = title
        self._axes = tuple(axes) or (Axis(x_key, x_label),)
        self._axis = self._axes[0]
        self._series: dict[str, _Series] = {}
        self._only: frozenset[str] | None = None
        self._with_legend = legend
        self._dirty = False
        self._drawing = False
        self._drawn = (-math.inf, math.inf, 0)  # range and columns of what is on the screen
        ends = {side: AxisLabels(side) for side in ("bottom", "left")}
        self._plot = _Plot(background=tokens.CARD, axisItems=ends)
        self._plot.setMinimumHeight(height)
        self._plot.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self._plot.setMouseEnabled(x=True, y=False)
        self._plot.setMenuEnabled(False)
        self._plot.hideButtons()
        self._plot.showGrid(x=False, y=True, alpha=0.15)
        self._plot.setAccessibleName(title)
        self._view = self._plot.getPlotItem().getViewBox()
        if counts:
            self._view.setLimits(yMin=0, minYRange=4)
        elif floor is not None:
            self._view.setLimits(yMin=floor)
        self._view.sigXRangeChanged.connect(self._on_view_changed)
        self._view.sigResized.connect(self._on_view_changed)
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
        self._menu.addAction("Zoom in (Ctrl + wheel)", self._on_zoom_in)
        self._menu.addAction("Zoom out", self._on_zoom_out)
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
        series = self._series[key] = _Series(label, colour, self._axes)
        series.curve.axis = self._axis.key
        self._plot.addItem(series.curve)
        self._show_curves()

    def append(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Add metric rows; drawn at once where the chart can be seen, else when it is shown."""
        self.add(rows)
        self.draw_if_needed()

    def add(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Add metric rows without drawing: whoever has several charts draws them in turn."""
        for metrics in rows:
            xs = {axis.key: metrics.get(axis.key) for axis in self._axes}
            if not all(isinstance(x, int | float) and math.isfinite(x) for x in xs.values()):
                continue
            for key, series in self._series.items():
                y = metrics.get(key)
                if isinstance(y, int | float) and math.isfinite(y):
                    series.add(xs, float(y))
                    self._dirty = True

    def extend(self, key: str, xs: Mapping[str, Floats], y: Floats) -> None:
        """Add points to one curve from arrays of one length, by axis, without drawing; points
        that are not finite are left out."""
        places = [xs[axis.key] for axis in self._axes]
        finite = np.isfinite(np.stack([y, *places])).all(0)
        if finite.any():
            kept = {axis: values[finite] for axis, values in xs.items()}
            self._series[key].settle().extend(kept, y[finite])
            self._dirty = True

    def draw_if_needed(self) -> bool:
        """Bring the picture up to date where something was added and it is in sight (what is
        scrolled away is drawn when it comes back)."""
        if not self._dirty or self.visibleRegion().isEmpty():
            return False
        self._stack.setCurrentIndex(0 if self.is_empty else 1)
        self._draw()
        return True

    def set_data(self, key: str, xs: Iterable[float], ys: Iterable[float]) -> None:
        """Replace one curve; points that are not finite are left out."""
        series = self._series[key]
        series.clear()
        for x, y in zip(xs, ys, strict=True):
            if math.isfinite(y):
                series.add({axis.key: float(x) for axis in self._axes}, float(y))
        self._changed()

    def clear(self) -> None:
        for series in self._series.values():
            series.clear()
        self._changed()

    def points(self, key: str) -> list[tuple[float, float]]:
        points = self._series[key].settle()
        return list(zip(points.x(self._axis.key).tolist(), points.y.tolist(), strict=True))

    def latest(self, key: str) -> float | None:
        points = self._series[key].settle()
        return float(points.y[-1]) if len(points) else None

    @property
    def is_empty(self) -> bool:
        return not any(len(series.settle()) for series in self._series.values())

    # --- look ---------------------------------------------------------------------------------

    def set_log_y(self, log_y: bool) -> None:
        self._log_box.setChecked(log_y)

    def show_all(self) -> None:
        """Undo zooming and panning."""
        self._plot.enableAutoRange()
        self._draw()

    def set_axis(self, key: str) -> None:
        """Let the curves run over another of the `axes`; everything is shown again."""
        self._axis = next(axis for axis in self._axes if axis.key == key)
        self._plot.getAxis("bottom").is_time = self._axis.is_time
        self._plot.setLabel("bottom", self._axis.label, **self._label_style)
        self.show_all()

    def show_only(self, keys: Collection[str] | None) -> None:
        """Show these curves, or all; the hidden ones keep growing."""
        self._only = None if keys is None else frozenset(keys)
        self._show_curves()
        self._describe()
        self._view.updateAutoRange()

    def _show_curves(self) -> None:
        shown = 0
        for key, series in self._series.items():
            visible = self._only is None or key in self._only
            series.curve.setVisible(visible)
            shown += visible
        self._legend.setVisible(self._with_legend and 1 < shown <= LEGEND_UP_TO)

    def csv(self) -> str:
        """Every point as `series,step,value`: what a screen reader or a spreadsheet can use."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["series", self._axis.label.lower(), "value"])
        for series in self._series.values():
            points = series.settle()
            for x, y in zip(points.x(self._axis.key).tolist(), points.y.tolist(), strict=True):
                writer.writerow([series.label, f"{x:.12g}", repr(y)])
        return text.getvalue()

    def drawing(self) -> QWidget:
        return self._plot

    def save_picture(self, path: Path) -> None:
        was = self._legend.isVisible()
        self._legend.setVisible(len(self._series) > 1)  # nothing beside the picture tells them
        try:
            super().save_picture(path)
        finally:
            self._legend.setVisible(was)

    def _style_axes(self, y_label: str) -> None:
        font: QFont = fonts.sans(14)
        style = self._label_style = {"color": tokens.LABEL, "font-size": f"{fonts.px(14)}px"}
        for side, text in (("bottom", self._axis.label), ("left", y_label)):
            axis = self._plot.getAxis(side)
            axis.setTickFont(font)
            axis.setTextPen(QColor(tokens.HELPER))
            axis.setPen(QColor(tokens.RAISED_HOVER))
            axis.enableAutoSIPrefix(False)
            axis.setStyle(maxTickLevel=0)  # each further level doubles what an axis costs
            if text:
                axis.setLabel(text, **style)
        self._plot.getAxis("left").setWidth(fonts.px(72))

    def _changed(self) -> None:
        self._dirty = True
        self._stack.setCurrentIndex(0 if self.is_empty else 1)
        self._describe()
        self.draw_if_needed()

    def _describe(self) -> None:
        """What a screen reader says: the newest value of each curve that is shown."""
        last = [
            f"{series.label} {points.y[-1]:.4g} at {self._axis.label.lower()} "
            f"{short(points.x(self._axis.key)[-1], 1)}"
            for key, series in self._series.items()
            if (self._only is None or key in self._only) and len(points := series.settle())
        ]
        self.setAccessibleDescription("; ".join(last) or _EMPTY)

    def _draw(self) -> None:
        self._dirty = False
        start, stop = -math.inf, math.inf
        if not self._view.autoRangeEnabled()[0]:
            start, stop = self._view.viewRange()[0]
        columns = max(50, round(self._view.width() * self.devicePixelRatioF()))
        self._drawn = (start, stop, columns)
        log_y = self._log_box.isChecked()
        self._drawing = True
        for series in self._series.values():
            series.draw(self._axis.key, log_y, columns, start, stop)
        self._drawing = False
        self._view.prepareForPaint()  # else the axes follow while it paints, and it paints twice
        self._describe()

    def paintEvent(self, event: QPaintEvent) -> None:
        """Also where it is scrolled into sight."""
        super().paintEvent(event)
        if self._dirty:
            QTimer.singleShot(0, self, self.draw_if_needed)

    def _on_view_changed(self, *_: object) -> None:
        """Another part is looked at, or in another size: cut down anew."""
        if self._drawing or self._dirty or not self.isVisible():
            return
        start, stop, columns = self._drawn
        moved = not self._view.autoRangeEnabled()[0] or not (start == -math.inf == -stop)
        if moved or abs(self._view.width() * self.devicePixelRatioF() - columns) > 0.1 * columns:
            self._draw()

    def showEvent(self, event: object) -> None:
        super().showEvent(event)
        self._changed()

    def _on_zoom_in(self) -> None:
        self._view.scaleBy(x=0.5)

    def _on_zoom_out(self) -> None:
        self._view.scaleBy(x=2.0)

    def _on_log_box_toggled(self, checked: bool) -> None:
        self._plot.setLogMode(y=checked)
        self._draw()
