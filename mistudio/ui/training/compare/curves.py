"""Histories of several runs in one chart. Imported only where it is shown: pyqtgraph is slow to
import."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyqtgraph as pg
from PySide6.QtCore import QRectF, QSize, Qt
from PySide6.QtGui import QColor, QPainter, QPaintEvent, QPen
from PySide6.QtWidgets import QCheckBox, QSizePolicy, QStackedLayout, QWidget

from mistudio import formatting
from mistudio.engine.training.compare import History, thinned
from mistudio.ui.theme import fonts, tokens
from mistudio.ui.widgets import FlowLayout, IconButton, Text, column, debounced, row
from mistudio.ui.widgets.chart_export import ExportedChart

# Metric -> (name, definition).
METRICS = {
    "loss": ("Loss", "What the training lowers, on the training batch: squared error over the "
             "variance of a calibration sample, and the price of sparsity where there is one."),
    "fvu": ("FVU (training batch)", "Fraction of variance unexplained, on the training batch."),
    "heldout_fvu": ("FVU (held-out text)", "Fraction of variance unexplained, on held-out tokens; "
                    "measured some twenty times a run."),
    "l0": ("L0", "Mean number of active latents per token, on the training batch."),
    "dead_share": ("Dead share", "Share of latents that have not fired within the dead window."),
    "learning_rate": ("Learning rate", "Of the step."),
}  # fmt: skip
AXES = {
    "tokens": ("Training tokens", "Tokens"),
    "step": ("Steps", "Step"),
    "seconds": ("Time of training", "Seconds of training, pauses left out"),
}

# Beside the colour, so that curves are told apart without it; in line widths.
DASHES: tuple[tuple[float, ...], ...] = (
    (), (8, 5), (2, 4), (9, 4, 2, 4), (16, 6), (9, 4, 2, 4, 2, 4), (5, 9), (16, 4, 2, 4),
)  # fmt: skip


@dataclass(frozen=True)
class CurveKey:
    """A curve: its run (place in the comparison), its site, and what the legend calls it."""

    run: int
    site: str
    name: str


def curve_pen(run: int, site: int) -> QPen:
    """A colour for the run, a line style for run and site: two curves never share both, up to 64
    of them."""
    colours = len(tokens.SERIES)
    style = DASHES[(run + run // colours + site) % len(DASHES)]
    pen = pg.mkPen(tokens.SERIES[run % colours], width=1)
    if style:
        pen.setStyle(Qt.PenStyle.CustomDashLine)
        pen.setDashPattern(list(style))
    return pen


class Key(QWidget):
    """A line of the legend: a piece of the curve and its name."""

    def __init__(self, pen: QPen, name: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._pen = QPen(pen)
        self._pen.setWidthF(2)
        if pen.style() == Qt.PenStyle.CustomDashLine:  # told in line widths
            self._pen.setDashPattern([length / 2 for length in pen.dashPattern()])
        self._name = name
        self.setFont(fonts.sans(14))
        self.setAccessibleName(name)
        self.setToolTip(name)
        self.setSizePolicy(QSizePolicy.Policy.Fixed, QSizePolicy.Policy.Fixed)

    def sizeHint(self) -> QSize:
        width = min(self.fontMetrics().horizontalAdvance(self._name), fonts.px(360))
        return QSize(fonts.px(64) + width + 4, fonts.px(24))

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        middle = self.height() / 2
        painter.setPen(self._pen)
        painter.drawLine(0, round(middle), fonts.px(52), round(middle))
        painter.setPen(QColor(tokens.LABEL))
        left = fonts.px(60)
        room = QRectF(left, 0, self.width() - left, self.height())
        text = self.fontMetrics().elidedText(
            self._name, Qt.TextElideMode.ElideMiddle, round(room.width())
        )
        painter.drawText(room, Qt.AlignmentFlag.AlignVCenter, text)


class CountAxis(pg.AxisItem):
    """`100,000` where pyqtgraph writes 100000."""

    def tickStrings(self, values: Sequence[float], scale: float, spacing: float) -> list[str]:
        if spacing < 1:
            return [str(text) for text in super().tickStrings(values, scale, spacing)]
        return [formatting.count(value) for value in values]


class OverlayChart(ExportedChart):
    """One metric of every chosen run and site over one axis. All points are kept; of those that
    are in view as many are drawn as can be seen, the first and the last always."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._title = "Compared runs"
        self._metric, self._axis = "loss", "tokens"
        self._curves: list[tuple[CurveKey, np.ndarray, np.ndarray]] = []
        self._items: list[pg.PlotDataItem] = []
        self._plot = pg.PlotWidget(
            background=tokens.CARD, axisItems={"bottom": CountAxis("bottom")}
        )
        self._plot.setMinimumHeight(180)
        self._plot.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self._plot.setMouseEnabled(x=True, y=False)
        self._plot.setMenuEnabled(False)
        self._plot.hideButtons()
        self._plot.showGrid(x=False, y=True, alpha=0.15)
        for side in ("bottom", "left"):
            axis = self._plot.getAxis(side)
            axis.setTickFont(fonts.sans(14))
            axis.setTextPen(QColor(tokens.HELPER))
            axis.setPen(QColor(tokens.RAISED_HOVER))
            axis.enableAutoSIPrefix(False)
        self._plot.getAxis("left").setWidth(fonts.px(84))
        self._redraw = debounced(self, 30, self._draw)
        self._plot.getPlotItem().sigXRangeChanged.connect(self._on_range_changed)

        self._log = QCheckBox("Log scale")
        self._log.setFont(fonts.sans(14))
        self._log.toggled.connect(self._on_log_toggled)
        menu_button = IconButton("ellipsis", "Chart: copy or save", size=18)
        menu = self.export_menu()
        menu.addAction("Show everything", self.show_all)
        menu_button.setMenu(menu)
        menu_button.setPopupMode(IconButton.ToolButtonPopupMode.InstantPopup)
        self.tools = QWidget()  # stands beside the selectors
        self.tools.setLayout(row(self._log, menu_button, spacing=8))

        self._legend = QWidget()
        self._flow = FlowLayout(12)
        self._legend.setLayout(self._flow)
        self._drawing = QWidget()  # with the legend, so that pictures have it
        self._drawing.setProperty("surface", "card")
        drawn = column(8, 8)
        drawn.addWidget(self._plot, 1)
        drawn.addWidget(self._legend)
        self._drawing.setLayout(drawn)
        self._empty = Text("", "helper", wrap=True)
        self._empty.setAlignment(Qt.AlignmentFlag.AlignCenter)
        stack = QWidget()
        self._stack = QStackedLayout(stack)
        self._stack.addWidget(self._empty)
        self._stack.addWidget(self._drawing)
        layout = column(0)
        layout.addWidget(stack, 1)
        self.setLayout(layout)

    # --- data -----------------------------------------------------------------------------------

    def show_curves(
        self,
        histories: Sequence[History | None],
        keys: Sequence[CurveKey],
        metric: str,
        axis: str,
        why_empty: str = "",
    ) -> None:
        """`histories` by run; `keys` of the curves that are wanted. Runs without such a history
        have no curve."""
        another = (metric, axis) != (self._metric, self._axis)
        self._metric, self._axis = metric, axis
        self._curves = []
        for key in keys:
            history = histories[key.run]
            if history is not None:
                x, y = history.curve(key.site, metric, axis)
                if len(x):
                    self._curves.append((key, x, y))
        name, definition = METRICS[metric]
        self._title = f"{name} over {AXES[axis][1].lower()}"
        self.setToolTip(definition)
        self._label_axes(name)
        self._empty.setText(why_empty or f"None of these runs has recorded “{name}”.")
        self._make_items()
        self._stack.setCurrentIndex(1 if self._curves else 0)
        self._describe()
        if another:
            self.show_all()
        self._draw()

    def _label_axes(self, name: str) -> None:
        style = {"color": tokens.LABEL, "font-size": f"{fonts.px(14)}px"}
        self._plot.getAxis("bottom").setLabel(AXES[self._axis][1], **style)
        self._plot.getAxis("left").setLabel(name, **style)

    def _make_items(self) -> None:
        """Curves that are there are used again: one that was taken out of the plot would be freed
        by whatever thread collects garbage, and Qt's are the window's."""
        while (old := self._flow.takeAt(0)) is not None:
            if widget := old.widget():
                widget.hide()
                widget.deleteLater()
        while len(self._items) < len(self._curves):
            self._items.append(self._plot.plot())
        sites: dict[int, list[str]] = {}
        for place, (key, _, _) in enumerate(self._curves):
            own = sites.setdefault(key.run, [])
            if key.site not in own:
                own.append(key.site)
            pen = curve_pen(key.run, own.index(key.site))
            self._items[place].setPen(pen)
            self._flow.addWidget(Key(pen, key.name))
        for item in self._items[len(self._curves) :]:
            item.setData([], [])

    def _describe(self) -> None:
        axis = AXES[self._axis][1].lower()
        told = [f"{key.name}: {y[-1]:.4g} at {axis} {x[-1]:g}" for key, x, y in self._curves]
        self.setAccessibleName(self._title)
        self.setAccessibleDescription("; ".join(told) or self._empty.text())

    def drawn(self) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """(name, x, y) of what is on the screen now."""
        return [
            (key.name, *item.getOriginalDataset())
            for (key, _, _), item in zip(self._curves, self._items, strict=False)
        ]

    def points(self) -> list[tuple[CurveKey, np.ndarray, np.ndarray]]:
        return list(self._curves)

    # --- look -----------------------------------------------------------------------------------

    def show_all(self) -> None:
        """Undo zooming and panning."""
        self._plot.enableAutoRange()

    def _draw(self) -> None:
        log = self._log.isChecked()
        low, high = self._plot.viewRange()[0]
        everything = bool(self._plot.getViewBox().autoRangeEnabled()[0])
        for (_, x, y), item in zip(self._curves, self._items, strict=False):
            if log:
                x, y = x[y > 0], y[y > 0]
            if not everything and len(x) and (np.diff(x) >= 0).all():
                # One point beyond each edge, so that lines leave the view.
                start = max(0, int(np.searchsorted(x, low)) - 1)
                end = int(np.searchsorted(x, high, side="right")) + 1
                x, y = x[start:end], y[start:end]
            item.setData(*thinned(x, y), skipFiniteCheck=True)

    def _on_range_changed(self) -> None:
        if not self._plot.getViewBox().autoRangeEnabled()[0]:
            self._redraw()

    def _on_log_toggled(self, checked: bool) -> None:
        self._plot.setLogMode(y=checked)
        self._draw()

    # --- to take along --------------------------------------------------------------------------

    def csv(self) -> str:
        """Every point of every curve."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["curve", AXES[self._axis][1].lower(), METRICS[self._metric][0]])
        for key, x, y in self._curves:
            writer.writerows([key.name, f"{a:.10g}", repr(float(b))]
                             for a, b in zip(x, y, strict=True))  # fmt: skip
        return text.getvalue()

    def drawing(self) -> QWidget:
        return self._drawing
