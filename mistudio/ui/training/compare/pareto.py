"""FVU against L0: each point one SAE, those that no other beats in both joined."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import pyqtgraph as pg
from PySide6.QtCore import Qt
from PySide6.QtGui import QColor
from PySide6.QtWidgets import QSizePolicy, QStackedLayout, QWidget

from mistudio import formatting
from mistudio.engine.training.compare import comparable_groups, finite, pareto_front
from mistudio.ui.theme import fonts, tokens
from mistudio.ui.training.charts import site_label
from mistudio.ui.training.compare.curves import curve_pen
from mistudio.ui.training.compare.gather import Subject
from mistudio.ui.widgets import IconButton, Text, column, row
from mistudio.ui.widgets.chart_export import ExportedChart

ABOUT = (
    "Lower is better for both, and one is bought with the other. Joined are those that no other of "
    "the same model and hook point beats in both."
)
SYMBOLS = ("o", "s", "t", "d", "star", "+", "p", "h")
SIGNS = ("●", "■", "▼", "◆", "★", "✚", "⬟", "⬢")


class ParetoChart(ExportedChart):
    """Points carry numbers; the key beside the plot says whose they are."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._title = "FVU against L0"
        self._subjects: list[Subject] = []
        self._group: dict[int, int] = {}
        self.front: set[int] = set()
        self.setToolTip(ABOUT)
        self._plot = pg.PlotWidget(background=tokens.CARD)
        self._plot.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self._plot.setMinimumHeight(180)
        self._plot.setMenuEnabled(False)
        self._plot.hideButtons()
        self._plot.setMouseEnabled(x=False, y=False)
        self._plot.showGrid(x=True, y=True, alpha=0.15)
        style = {"color": tokens.LABEL, "font-size": f"{fonts.px(14)}px"}
        labels = (("bottom", "L0 (active latents per token)"),
                  ("left", "FVU (fraction of variance unexplained)"))  # fmt: skip
        for side, label in labels:
            axis = self._plot.getAxis(side)
            axis.setTickFont(fonts.sans(14))
            axis.setTextPen(QColor(tokens.HELPER))
            axis.setPen(QColor(tokens.RAISED_HOVER))
            axis.enableAutoSIPrefix(False)
            axis.setLabel(label, **style)
        self._key = Text("", "small", wrap=True, selectable=True)
        self._key.setAlignment(Qt.AlignmentFlag.AlignTop)
        self._key.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Preferred)
        self._key.setFixedWidth(fonts.px(320))
        self._drawing = QWidget()
        self._drawing.setProperty("surface", "card")
        line = row(self._plot, self._key, spacing=16)
        line.setContentsMargins(8, 8, 8, 8)
        line.setStretch(0, 1)
        self._drawing.setLayout(line)
        self._empty = Text(
            "None of these SAEs has a measured FVU and L0 yet. A training measures them at its "
            "end; imported SAEs have Measure on their card.", "helper", wrap=True)  # fmt: skip
        self._empty.setAlignment(Qt.AlignmentFlag.AlignCenter)
        menu_button = IconButton("ellipsis", f"{self._title}: copy or save", size=18)
        menu_button.setMenu(self.export_menu())
        menu_button.setPopupMode(IconButton.ToolButtonPopupMode.InstantPopup)
        stack = QWidget()
        self._stack = QStackedLayout(stack)
        self._stack.addWidget(self._empty)
        self._stack.addWidget(self._drawing)
        about = Text(ABOUT, "helper", wrap=True)
        head = row(about, menu_button, spacing=8)
        head.setStretch(0, 1)
        layout = column(8)
        layout.addLayout(head)
        layout.addWidget(stack, 1)
        self.setLayout(layout)
        self.setAccessibleName(self._title)

    def show_subjects(self, subjects: Sequence[Subject]) -> None:
        self._plot.clear()
        self._subjects = list(subjects)
        groups = comparable_groups([subject.conditions for subject in subjects])
        groups = [group for group in groups if any(self._point(i) for i in group)]
        self._group = {i: number for number, group in enumerate(groups) for i in group}
        self.front = set()
        for number, group in enumerate(groups):
            self._draw_group(number, group)
        self._label_points()
        measured = any(self._point(i) for i in range(len(subjects)))
        self._stack.setCurrentIndex(1 if measured else 0)
        self._key.setText(self._told(groups))
        self.setAccessibleDescription(self._key.text() if measured else self._empty.text())
        if measured:
            self._frame()

    def _point(self, place: int) -> tuple[float, float] | None:
        metrics = self._subjects[place].metrics
        l0, fvu = finite(metrics.get("l0")), finite(metrics.get("fvu"))
        return None if l0 is None or fvu is None else (l0, fvu)

    def _draw_group(self, number: int, group: Sequence[int]) -> None:
        points = [self._point(i) or (None, None) for i in group]
        front = [group[place] for place in pareto_front(points)]
        self.front |= set(front)
        pen = curve_pen(number, 0)
        ends = [point for i in front if (point := self._point(i))]
        if len(ends) > 1:
            self._plot.plot([x for x, _ in ends], [y for _, y in ends], pen=pen)
        shown = [point for i in group if (point := self._point(i))]
        self._plot.plot(
            [x for x, _ in shown],
            [y for _, y in shown],
            pen=None,
            symbol=SYMBOLS[number % len(SYMBOLS)],
            symbolSize=11,
            symbolPen=pg.mkPen(pen.color(), width=1),
            symbolBrush=pen.color(),
        )

    def _label_points(self) -> None:
        """Numbers beside the points; those of one place share a label."""
        places: dict[tuple[float, float], list[str]] = {}
        for i in range(len(self._subjects)):
            if point := self._point(i):
                places.setdefault(point, []).append(str(i + 1))
        for (x, y), numbers in places.items():
            label = pg.TextItem(", ".join(numbers), color=tokens.TEXT, anchor=(-0.35, 1.0))
            label.setFont(fonts.sans(14))
            label.setPos(x, y)
            self._plot.addItem(label)

    def _frame(self) -> None:
        """Room around the points for their labels; neither figure goes below 0."""
        points = [point for i in range(len(self._subjects)) if (point := self._point(i))]
        for axis, values in enumerate(zip(*points, strict=True)):
            low, high = min(values), max(values)
            room = max(0.15 * (high - low), 0.05 * abs(high), 1e-6)
            ends = max(0.0, low - room), high + room
            if axis == 0:
                self._plot.setXRange(*ends, padding=0)
            else:
                self._plot.setYRange(*ends, padding=0)

    def _told(self, groups: Sequence[Sequence[int]]) -> str:
        lines = []
        if len(groups) > 1:
            lines.append("Points of different models or hook points cannot be compared and are "
                         "not joined.\n")  # fmt: skip
        for number, group in enumerate(groups):
            first = self._subjects[group[0]]
            where = f"{first.told.get('model', '')}, {site_label(first.site)}"
            lines.append(f"{SIGNS[number % len(SIGNS)]} {where}")
            for i in group:
                if point := self._point(i):
                    joined = ", not beaten" if i in self.front else ", beaten in both"
                    lines.append(f"   {i + 1}  {self._subjects[i].name}: "
                                 f"L0 {formatting.number(point[0], 1)}, "
                                 f"FVU {formatting.number(point[1], 3)}{joined}")  # fmt: skip
        left = [s.name for i, s in enumerate(self._subjects) if not self._point(i)]
        if left:
            lines.append(f"\nNot measured: {', '.join(left)}")
        return "\n".join(lines)

    @property
    def key_text(self) -> str:
        return self._key.text()

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["number", "name", "model", "hook point", "l0", "fvu", "not beaten"])
        for i, subject in enumerate(self._subjects):
            if point := self._point(i):
                writer.writerow([i + 1, subject.name, subject.told.get("model", ""), subject.site,
                                 *map(repr, point), i in self.front])  # fmt: skip
        return text.getvalue()

    def drawing(self) -> QWidget:
        return self._drawing
