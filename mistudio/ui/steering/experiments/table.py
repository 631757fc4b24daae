"""The lines of an experiment with mean and interval of each measure."""

from __future__ import annotations

from PySide6.QtCore import QAbstractTableModel, QModelIndex, QPersistentModelIndex, Qt
from PySide6.QtWidgets import QWidget

from mistudio.library.steering import Experiment
from mistudio.ui.steering.experiments.results import (
    Line,
    about,
    column_tip,
    lines,
    measures,
    value_text,
    value_tip,
)
from mistudio.ui.steering.units import NOTHING, significant

_Index = QModelIndex | QPersistentModelIndex
_LABEL, _PERCENT, _FIXED = 0, 1, 2
_PERCENT_TIP = (
    "The length of what is added at each steered layer, in % of the layer’s median activation "
    "norm. Computed, so without an interval; an em dash where it depends on the text"
)


class ResultsModel(QAbstractTableModel):
    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.lines: list[Line] = []
        self.measures: list[str] = []
        self._prompts = 0

    def show_experiment(self, experiment: Experiment | None) -> None:
        """Where only the numbers are other ones, what is selected stays so."""
        found = lines(experiment) if experiment else []
        columns = measures(experiment) if experiment else []
        same = [line.label for line in found] == [line.label for line in self.lines]
        if same and columns == self.measures:
            self.lines = found
            last = self.index(self.rowCount() - 1, self.columnCount() - 1)
            self.dataChanged.emit(self.index(0, 0), last)
            return
        self.beginResetModel()
        self.lines, self.measures = found, columns
        self._prompts = len(experiment.request["prompts"]) if experiment else 0
        self.endResetModel()

    def rowCount(self, parent: _Index = QModelIndex()) -> int:  # noqa: B008
        return 0 if parent.isValid() else len(self.lines)

    def columnCount(self, parent: _Index = QModelIndex()) -> int:  # noqa: B008
        return 0 if parent.isValid() else _FIXED + len(self.measures)

    def headerData(
        self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole
    ) -> object:
        if orientation == Qt.Orientation.Vertical:
            return str(section + 1) if role == Qt.ItemDataRole.DisplayRole else None
        if role == Qt.ItemDataRole.TextAlignmentRole:
            return self._side(section)
        if role not in (Qt.ItemDataRole.DisplayRole, Qt.ItemDataRole.ToolTipRole):
            return None
        tip = role == Qt.ItemDataRole.ToolTipRole
        if section == _LABEL:
            return None if tip else "Steering"
        if section == _PERCENT:
            return _PERCENT_TIP if tip else "% of norm"
        measure = self.measures[section - _FIXED]
        return column_tip(measure) if tip else about(measure)[0]

    def data(self, index: _Index, role: int = Qt.ItemDataRole.DisplayRole) -> object:
        if role == Qt.ItemDataRole.TextAlignmentRole:
            return self._side(index.column())
        if role not in (Qt.ItemDataRole.DisplayRole, Qt.ItemDataRole.ToolTipRole):
            return None
        line, tip = self.lines[index.row()], role == Qt.ItemDataRole.ToolTipRole
        if index.column() == _LABEL:
            return None if tip else line.label
        if index.column() == _PERCENT:
            if tip:
                return _PERCENT_TIP
            return NOTHING if line.percent is None else f"{significant(line.percent)} %"
        measure = self.measures[index.column() - _FIXED]
        value = line.found.get(measure)
        return value_tip(measure, value, self._prompts) if tip else value_text(measure, value)

    @staticmethod
    def _side(column: int) -> Qt.AlignmentFlag:
        side = Qt.AlignmentFlag.AlignLeft if column == _LABEL else Qt.AlignmentFlag.AlignRight
        return side | Qt.AlignmentFlag.AlignVCenter
