"""All layers of a run at a glance: a row each, one of which is looked at in detail."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PySide6.QtCore import QAbstractTableModel, QModelIndex, QPersistentModelIndex, Qt, Signal
from PySide6.QtGui import QColor, QIcon, QPixmap
from PySide6.QtWidgets import QAbstractItemView, QHeaderView, QTableView, QWidget

from mistudio.engine.training.verdict import Light
from mistudio.ui.theme import fonts, tokens
from mistudio.ui.training.quality import LOOKS

ROW = 34  # px
SHOWN = 13  # rows without scrolling: twelve layers, and all of them
WORST = ("poor", "fair", "good")
Index = QModelIndex | QPersistentModelIndex


@dataclass(frozen=True)
class Field:
    """A column: its key in what is shown, its name, what the number means."""

    key: str
    label: str
    help: str = ""


@dataclass(frozen=True)
class Layer:
    """A row: `key` is what `chosen` tells; `colour` that of its curves, "" without."""

    key: Hashable
    label: str
    colour: str = ""


QUALITY = Field("quality", "Quality", "The worst of the lights of this layer")


def verdict(found: Sequence[Light]) -> tuple[str, str, str]:
    """The worst of some lights as (text, colour of the text, why); an em dash where there is
    none."""
    if not found:
        return "—", "", "Not measured yet"
    worst = min(found, key=lambda light: WORST.index(light.level))
    mark, tone = LOOKS[worst.level]
    why = " ".join(f"{light.name}: {light.why}" for light in found)
    return f"{mark} {worst.level}", tokens.TONES[tone][0], why


class LayerModel(QAbstractTableModel):
    """Texts of layers by fields; tells only of what changed."""

    def __init__(self, layers: Sequence[Layer], fields: Sequence[Field]) -> None:
        super().__init__()
        self.layers, self.fields = list(layers), [Field("label", "Layer"), *fields, QUALITY]
        self._texts: list[dict[str, str]] = [{"label": layer.label} for layer in layers]
        self._quality = [("—", "", "Not measured yet")] * len(self.layers)
        self._swatches = [_swatch(layer.colour) for layer in layers]

    def show(self, key: Hashable, values: Mapping[str, str], lights: Sequence[Light]) -> None:
        """New texts and lights of a layer."""
        row = next(n for n, layer in enumerate(self.layers) if layer.key == key)
        quality = verdict(lights)
        texts = {"label": self.layers[row].label, **values, "quality": quality[0]}
        if texts == self._texts[row] and quality == self._quality[row]:
            return
        self._texts[row], self._quality[row] = texts, quality
        self.dataChanged.emit(self.index(row, 0), self.index(row, len(self.fields) - 1))

    def text(self, key: Hashable, field: str) -> str:
        row = next(n for n, layer in enumerate(self.layers) if layer.key == key)
        return self._texts[row].get(field, "—")

    # --- Qt's protocol --------------------------------------------------------------------------

    def rowCount(self, parent: Index | None = None) -> int:
        return 0 if parent is not None and parent.isValid() else len(self.layers)

    def columnCount(self, parent: Index | None = None) -> int:
        return 0 if parent is not None and parent.isValid() else len(self.fields)

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        row, field = index.row(), self.fields[index.column()]
        if role == Qt.ItemDataRole.DisplayRole:
            return self._texts[row].get(field.key, "—")
        if role == Qt.ItemDataRole.AccessibleTextRole:
            return f"{field.label}: {self._texts[row].get(field.key, '—')}"
        if role == Qt.ItemDataRole.TextAlignmentRole and index.column():
            return Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter
        if role == Qt.ItemDataRole.DecorationRole and not index.column():
            return self._swatches[row]
        if field is QUALITY:
            if role == Qt.ItemDataRole.ForegroundRole and self._quality[row][1]:
                return QColor(self._quality[row][1])
            if role == Qt.ItemDataRole.ToolTipRole:
                return f"<qt>{self._quality[row][2]}</qt>"
        return None

    def headerData(
        self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole
    ) -> Any:
        if orientation != Qt.Orientation.Horizontal:
            return None
        if role == Qt.ItemDataRole.DisplayRole:
            return self.fields[section].label
        if role == Qt.ItemDataRole.ToolTipRole and self.fields[section].help:
            return f"<qt>{self.fields[section].help}</qt>"
        if role == Qt.ItemDataRole.TextAlignmentRole:
            side = Qt.AlignmentFlag.AlignRight if section else Qt.AlignmentFlag.AlignLeft
            return side | Qt.AlignmentFlag.AlignVCenter
        return None


def _swatch(colour: str) -> QIcon | None:
    if not colour:
        return None
    pixmap = QPixmap(fonts.px(12), fonts.px(12))
    pixmap.fill(QColor(colour))
    icon = QIcon(pixmap)
    icon.addPixmap(pixmap, QIcon.Mode.Selected)  # the very colour of the curve, also when chosen
    return icon


class LayerTable(QTableView):
    """As high as its rows, up to `SHOWN`; arrow keys and clicks choose."""

    chosen = Signal(object)
    """The key of the layer that is looked at now."""

    def __init__(
        self,
        layers: Sequence[Layer],
        fields: Sequence[Field],
        name: str,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.rows = LayerModel(layers, fields)
        self.rows.setParent(self)
        self.setModel(self.rows)
        self.setAccessibleName(name)
        self.setAccessibleDescription("Choose a row to see that layer in detail below")
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.setShowGrid(False)
        self.setWordWrap(False)
        self.setTabKeyNavigation(False)
        self.setFont(fonts.sans(14))
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setVerticalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        vertical, header = self.verticalHeader(), self.horizontalHeader()
        vertical.hide()
        vertical.setSectionResizeMode(QHeaderView.ResizeMode.Fixed)
        vertical.setDefaultSectionSize(fonts.px(ROW))
        header.setSectionResizeMode(QHeaderView.ResizeMode.Stretch)
        header.setHighlightSections(False)
        header.setSectionsClickable(False)
        header.setFixedHeight(fonts.px(ROW + 4))
        rows = min(len(layers), SHOWN)
        self.setFixedHeight(header.height() + rows * fonts.px(ROW) + 4)
        self.selectRow(0)
        self.selectionModel().currentRowChanged.connect(self._on_current_row_changed)

    @property
    def key(self) -> Hashable:
        """Of the layer that is looked at."""
        return self.rows.layers[max(0, self.currentIndex().row())].key

    def choose(self, key: Hashable) -> None:
        row = next(n for n, layer in enumerate(self.rows.layers) if layer.key == key)
        self.selectRow(row)

    def _on_current_row_changed(self, current: QModelIndex, previous: QModelIndex) -> None:
        if current.isValid():
            self.chosen.emit(self.rows.layers[current.row()].key)
