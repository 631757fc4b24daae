"""The lines of an experiment with mean and interval of each measure."""

from __future__ import annotations

from PySide6.QtCore import QAbstractTableModel, QModelIndex, QPersistentModelIndex, Qt
from PySide6.QtWidgets import QWidget

from mistudio.library.steering import Experiment
from mistudio.ui.steering.experiments.results import Line, about, lines, measures, value_text

_Index = QModelIndex | QPersistentModelIndex


class ResultsModel(QAbstractTableModel):
    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.lines: list[Line] = []
        self.measures: list[str] = []

    def show_experiment(self, experiment: Experiment | None) -> None:
        self.beginResetModel()
        self.lines = lines(experiment) if experiment else []
        self.measures = measures(experiment) if experiment else []
        self.endResetModel()

    def rowCount(self, parent: _Index = QModelIndex()) -> int:  # noqa: B008
        return 0 if parent.isValid() else len(self.lines)

    def columnCount(self, parent: _Index = QModelIndex()) -> int:  # noqa: B008
        return 0 if parent.isValid() else 1 + len(self.measures)

    def headerData(
        self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole
    ) -> str | None:
        if orientation == Qt.Orientation.Vertical:
            return str(section + 1) if role == Qt.ItemDataRole.DisplayRole else None
        if role not in (Qt.ItemDataRole.DisplayRole, Qt.ItemDataRole.ToolTipRole):
            return None
        if section == 0:
            return "Steering"
        name, unit, _ = about(self.measures[section - 1])
        tip = f"{name}: {unit}; mean with its 95 % interval over seeds"
        return name if role == Qt.ItemDataRole.DisplayRole else tip

    def data(self, index: _Index, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        line = self.lines[index.row()]
        if index.column() == 0:
            return line.label if role == Qt.ItemDataRole.DisplayRole else None
        measure = self.measures[index.column() - 1]
        value = line.found.get(measure)
        if role == Qt.ItemDataRole.DisplayRole:
            return value_text(measure, value)
        if role == Qt.ItemDataRole.ToolTipRole and value:
            return f"Over {value['n']} seeds"
        return None
