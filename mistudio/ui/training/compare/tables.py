"""Tables of a comparison: a line for each setting or metric, a column for each run or SAE."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PySide6.QtCore import QAbstractTableModel, QModelIndex, QPersistentModelIndex, Qt
from PySide6.QtGui import QColor, QFont
from PySide6.QtWidgets import QAbstractItemView, QTableView, QWidget

from mistudio import formatting
from mistudio.engine.training.compare import (
    METRICS,
    Metric,
    best,
    comparable_groups,
    differing,
    finite,
)
from mistudio.ui.theme import fonts, tokens
from mistudio.ui.training.compare.gather import (
    Compared,
    Subject,
    setting_label,
    setting_text,
)
from mistudio.ui.widgets import Button, Text, column, row
from mistudio.ui.widgets.chart_export import ExportedChart

Index = QModelIndex | QPersistentModelIndex
_ROOT = QModelIndex()
BEST = "★ best"
WAYS = {"low": "↓ lower is better", "high": "↑ higher is better", "": ""}


@dataclass(frozen=True)
class Line:
    """`marked`: the columns whose value is the best; `tips`: one for each cell, or none."""

    label: str
    tip: str
    cells: tuple[str, ...]
    marked: frozenset[int] = frozenset()
    tips: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    lines: tuple[Line, ...]

    def csv(self, corner: str) -> str:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([corner, *self.columns])
        for line in self.lines:
            writer.writerow([line.label, *line.cells])
        return text.getvalue()


def settings_table(compared: Sequence[Compared]) -> Table:
    """Only what differs, as the options table calls it."""
    lines = []
    for name in differing([one.settings for one in compared]):
        label, help = setting_label(name)
        cells = tuple(setting_text(name, one.settings.get(name)) for one in compared)
        lines.append(Line(label, help, cells))
    return Table(tuple(one.name for one in compared), tuple(lines))


def metrics_table(subjects: Sequence[Subject]) -> Table:
    """The final held-out metrics of each SAE. The best is sought among those of the same model and
    hook point."""
    groups = comparable_groups([subject.conditions for subject in subjects])
    lines = []
    for metric in METRICS:
        values = [finite(subject.metrics.get(metric.name)) for subject in subjects]
        if metric.form == "count" and not any(values):
            continue
        marked = frozenset(
            group[place]
            for group in groups
            for place in best([values[i] for i in group], metric.better)
        )
        cells = tuple(
            f"{metric_text(metric, value)}  {BEST}" if i in marked else metric_text(metric, value)
            for i, value in enumerate(values)
        )
        tips = tuple(_cell_tip(metric, subject) for subject in subjects)
        unit = f" ({metric.unit})" if metric.unit else ""
        way = f"  {WAYS[metric.better]}" if metric.better else ""
        tip = f"{metric.definition} {way.strip()}".strip()
        lines.append(Line(f"{metric.label}{unit}{way}", tip, cells, marked, tips))
    return Table(tuple(subject.name for subject in subjects), tuple(lines))


def metric_text(metric: Metric, value: float | None) -> str:
    if value is None:
        return "—"
    if metric.form == "share":
        return formatting.percent(value, metric.decimals)
    if metric.form == "count":
        return formatting.count(value)
    return formatting.number(value, metric.decimals)


def _cell_tip(metric: Metric, subject: Subject) -> str:
    value, sample = subject.metrics.get(metric.name), subject.metrics.get(metric.sample)
    if finite(value) is None:
        return f"{metric.label} of {subject.name} was not measured."
    if metric.form == "count" or not sample:
        return metric.definition
    noun = "held-out tokens" if metric.sample == "tokens" else "held-out predictions"
    return f"{metric.definition} On {formatting.count(sample)} {noun}. Exactly {value:.6g}."


class TableModel(QAbstractTableModel):
    def __init__(self, corner: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._corner = corner
        self.table = Table((), ())

    def show_table(self, table: Table) -> None:
        self.beginResetModel()
        self.table = table
        self.endResetModel()

    def rowCount(self, parent: Index = _ROOT) -> int:
        return 0 if parent.isValid() else len(self.table.lines)

    def columnCount(self, parent: Index = _ROOT) -> int:
        return 0 if parent.isValid() else 1 + len(self.table.columns)

    def headerData(
        self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole
    ) -> Any:
        if orientation != Qt.Orientation.Horizontal:
            return None
        title = self._corner if section == 0 else self.table.columns[section - 1]
        if role in (Qt.ItemDataRole.DisplayRole, Qt.ItemDataRole.ToolTipRole):
            return title
        if role == Qt.ItemDataRole.TextAlignmentRole:
            return int(Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter)
        return None

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        line, place = self.table.lines[index.row()], index.column() - 1
        if role == Qt.ItemDataRole.DisplayRole:
            return line.label if place < 0 else line.cells[place]
        if role == Qt.ItemDataRole.ToolTipRole:
            tip = line.tips[place] if line.tips and place >= 0 else line.tip
            return f"<qt>{tip}</qt>" if tip else None
        if role == Qt.ItemDataRole.FontRole:
            weight = QFont.Weight.Medium if place in line.marked else QFont.Weight.Normal
            return fonts.sans(14, weight)
        if role == Qt.ItemDataRole.ForegroundRole:
            if place in line.marked:
                return QColor(tokens.EMERALD)
            return QColor(tokens.LABEL if place < 0 else tokens.TEXT)
        return None


class ComparisonTable(ExportedChart):
    """A table with its heading, to be copied or saved as CSV."""

    def __init__(self, title: str, corner: str, empty: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._title, self._corner = title, corner
        self.model = TableModel(corner, self)
        self.view = QTableView()
        self.view.setModel(self.model)
        self.view.setAccessibleName(title)
        self.view.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectItems)
        self.view.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.view.setTabKeyNavigation(False)
        self.view.setHorizontalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.view.setShowGrid(False)
        self.view.setWordWrap(False)
        self.view.setTextElideMode(Qt.TextElideMode.ElideMiddle)
        self.view.verticalHeader().hide()
        self.view.verticalHeader().setDefaultSectionSize(fonts.px(36))
        self.view.horizontalHeader().setHighlightSections(False)
        self.copy = Button("Copy as CSV", "small", "copy")
        self.copy.clicked.connect(self._on_copy_clicked)
        self.save = Button("Save as CSV…", "small", "save")
        self.save.clicked.connect(self._on_save_clicked)
        for button in (self.copy, self.save):
            button.setAccessibleName(f"{button.text()}: {title}")
        self._about = Text("", "helper", wrap=True)
        self._empty = Text(empty, "helper", wrap=True)
        layout = column(8)
        head = row(self._about, self.copy, self.save, spacing=8)
        head.setStretch(0, 1)
        layout.addLayout(head)
        layout.addWidget(self._empty)
        layout.addWidget(self.view, 1000)
        layout.addStretch(1)
        self.setLayout(layout)

    def show_table(self, table: Table, about: str = "") -> None:
        self.model.show_table(table)
        self._about.setText(about)
        self._empty.setVisible(not table.lines)
        self.view.setVisible(bool(table.lines))
        for button in (self.copy, self.save):
            button.setEnabled(bool(table.lines))
        header = self.view.horizontalHeader().sizeHint().height()
        bar = self.view.horizontalScrollBar().sizeHint().height()
        self.view.setMaximumHeight(fonts.px(36) * len(table.lines) + header + bar + 4)
        self._fit()

    def _fit(self) -> None:
        """Each column as wide as its text, within limits; what is over goes to the runs."""
        columns = self.model.columnCount()
        if columns < 2:
            return
        self.view.resizeColumnsToContents()
        widths = [
            min(max(self.view.columnWidth(i) + 16, fonts.px(180)), fonts.px(420))
            for i in range(columns)
        ]
        over = self.view.viewport().width() - sum(widths)
        share = max(0, over // (columns - 1))
        for place, width in enumerate(widths):
            self.view.setColumnWidth(place, width + (share if place else 0))

    def resizeEvent(self, event: Any) -> None:
        super().resizeEvent(event)
        self._fit()

    def showEvent(self, event: Any) -> None:
        super().showEvent(event)
        self._fit()

    def csv(self) -> str:
        return self.model.table.csv(self._corner)

    def drawing(self) -> QWidget:
        return self.view

    def _on_copy_clicked(self, checked: bool = False) -> None:
        self.copy_csv()

    def _on_save_clicked(self, checked: bool = False) -> None:
        self._on_save_csv()
