"""The feature table: a model over numpy columns, and which of them are shown.

A row is a position in `visible`, an int32 array of feature numbers: sorting and filtering make a
new array and touch no row. Descriptions and tokens come later, for the rows that can be seen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PySide6.QtCore import (
    QAbstractTableModel,
    QModelIndex,
    QObject,
    QPersistentModelIndex,
    Qt,
    Signal,
)
from PySide6.QtGui import QColor

from mistudio import formatting
from mistudio.library.features import FeatureNote
from mistudio.ui.features import shown as columns_of
from mistudio.ui.features.notes import Notes
from mistudio.ui.features.painting import (
    CELL_ROLE,
    HISTOGRAM_ROLE,
    ROW_HEIGHT,
    SNIPPET_ROLE,
    STAR_ROLE,
    star_icon,
)
from mistudio.ui.features.query import GIVEN, Marks, Orders, Query
from mistudio.ui.features.reader import Columns, RowText
from mistudio.ui.features.shown import (
    CONTEXT,
    HISTOGRAM,
    ID,
    LABEL,
    STAR,
    SUBSET,
    Shown,
    frequency,
    tip,
    written,
)
from mistudio.ui.theme import fonts, tokens

__all__ = [
    "CONTEXT",
    "FEATURE_ROLE",
    "HISTOGRAM",
    "HISTOGRAM_ROLE",
    "ID",
    "LABEL",
    "ROW_HEIGHT",
    "SNIPPET_ROLE",
    "STAR",
    "STAR_ROLE",
    "FeatureTable",
    "Subset",
    "frequency",
    "star_icon",
]

Index = QModelIndex | QPersistentModelIndex

KEPT_TEXTS = 2000  # rows whose tokens stay in memory
FEATURE_ROLE = Qt.ItemDataRole.UserRole + 2
_LEFT = Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter
_RIGHT = Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter
_COLOURS = {
    "helper": QColor(tokens.HELPER),
    "emerald": QColor(tokens.EMERALD),
    "purple": QColor(tokens.PURPLE),
    "blue": QColor(tokens.BLUE),
}
_NO_NOTES = Notes()


@dataclass(frozen=True)
class Subset:
    """Only these `features` are shown, and `title` says why. `ranked`: their order means
    something. `values` float32 [n], NaN elsewhere, get a column of their own."""

    features: np.ndarray
    title: str
    ranked: bool = False
    values: np.ndarray | None = None
    column: Shown | None = None


class FeatureTable(QAbstractTableModel):
    """Rows are features that pass the query, in order. Emits `starred` when a star is clicked."""

    order_changed = Signal()
    query_changed = Signal()
    """The query or the subset is another one."""
    shown_changed = Signal()
    """Other columns are shown, or can be."""
    starred = Signal(int, bool)

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.columns: Columns | None = None
        self.visible = np.empty(0, np.int32)
        self.query = Query()
        self.subset: Subset | None = None
        self.shown: list[Shown] = []
        self._wanted: tuple[str, ...] = columns_of.DEFAULT
        self._orders = Orders({}, 0)
        self._rows: np.ndarray | None = None
        self._found: np.ndarray | None = None
        self._listed: np.ndarray | None = None
        self._notes = _NO_NOTES
        self._texts: OrderedDict[int, RowText] = OrderedDict()
        self._italic = fonts.sans(tokens.TEXT_BODY)
        self._italic.setItalic(True)
        self._mono = fonts.mono(tokens.TEXT_SMALL)
        self._choose_shown()

    # --- what is shown --------------------------------------------------------------------------

    def set_columns(
        self, columns: Columns | None, notes: Notes | Mapping[int, FeatureNote] = _NO_NOTES
    ) -> None:
        """Another discovery: its subset, search and list are forgotten, the query stays."""
        self.beginResetModel()
        self.columns, self._found, self._listed, self.subset = columns, None, None, None
        n = len(columns) if columns is not None else 0
        self._orders = Orders(columns.values if columns is not None else {}, n)
        self._notes = notes if isinstance(notes, Notes) else Notes.gathered(notes, n)
        self._texts.clear()
        if self.query.list_id or self.query.sort == GIVEN:
            sort = "density" if self.query.sort == GIVEN else self.query.sort
            self.query = replace(self.query, list_id=0, sort=sort)
        self._choose_shown()
        self._set_order()
        self.endResetModel()
        self.shown_changed.emit()
        self.query_changed.emit()
        self.order_changed.emit()

    def set_notes(self, notes: Notes | Mapping[int, FeatureNote]) -> None:
        """Labels and stars changed; the order changes only where it depends on them."""
        n = len(self.columns) if self.columns is not None else 0
        self._notes = notes if isinstance(notes, Notes) else Notes.gathered(notes, n)
        if not np.array_equal(self._arranged(), self.visible):
            self._arrange()
        elif len(self.visible):
            self._row_changed(0, len(self.visible) - 1)

    def set_query(self, query: Query) -> None:
        if query != self.query:
            self.query = query
            self._arrange()
            self.query_changed.emit()

    def set_sort(self, key: str, descending: bool) -> None:
        self.set_query(replace(self.query, sort=key, descending=descending))

    def set_search(self, text: str, fields: Sequence[str], found: np.ndarray | None) -> None:
        """`found` bool [n] is what the search for `text` brought; None shows all."""
        if found is None and self._found is None and self.query.fields == tuple(fields):
            return
        self._found = found
        self.query = replace(self.query, search=text, fields=tuple(fields))
        self._arrange()
        self.query_changed.emit()

    def patch_note(self, note: FeatureNote) -> None:
        """One note as it is now; masks and order follow with `set_notes`."""
        self._notes = replace(self._notes, of={**self._notes.of, note.feature: note})
        row = self.row_of(note.feature)
        if row >= 0:
            self._row_changed(row, row)

    def set_listed(self, list_id: int, features: Iterable[int]) -> None:
        """Only the members of a list; 0 shows all."""
        self._listed = self._mask(features) if list_id else None
        changed = self.query.list_id != list_id
        self.query = replace(self.query, list_id=list_id)
        self._arrange()
        if changed:
            self.query_changed.emit()

    def set_subset(self, features: np.ndarray | None, title: str = "") -> None:
        """Only these features are shown; None shows all. A chip with the title tells so."""
        self.show_subset(None if features is None else Subset(np.asarray(features), title))

    def show_subset(self, subset: Subset | None) -> None:
        if subset is not None:
            n = len(self.columns) if self.columns is not None else 0
            inside = np.asarray(subset.features, np.int64)
            inside = inside[(inside >= 0) & (inside < n)].astype(np.int32)
            subset = replace(subset, features=inside)
        if subset is None and self.subset is None:
            return
        self.beginResetModel()
        self.subset = subset
        if subset is not None and subset.ranked:
            self.query = replace(self.query, sort=GIVEN)
        elif self.query.sort in (GIVEN, SUBSET):
            self.query = replace(self.query, sort="density", descending=True)
        self._choose_shown()
        self._set_order()
        self.endResetModel()
        self.shown_changed.emit()
        self.query_changed.emit()
        self.order_changed.emit()

    def _arranged(self) -> np.ndarray:
        if self.columns is None:
            return np.empty(0, np.int32)
        notes, subset = self._notes, self.subset
        marks = Marks(
            starred=notes.starred,
            labelled=notes.labelled,
            hidden=notes.hidden,
            found=self._found,
            listed=self._listed,
            subset=subset.features if subset is not None else None,
            by_name=notes.by_name,
        )
        return self._orders.arrange(self.query, marks)

    def _set_order(self) -> None:
        self.visible, self._rows = self._arranged(), None

    def _arrange(self) -> None:
        self.beginResetModel()
        self._set_order()
        self.endResetModel()
        self.headerDataChanged.emit(Qt.Orientation.Horizontal, 0, max(len(self.shown) - 1, 0))
        self.order_changed.emit()

    def _mask(self, features: Iterable[int]) -> np.ndarray:
        mask = np.zeros(len(self.columns) if self.columns is not None else 0, bool)
        numbers = np.fromiter(features, np.int64)
        mask[numbers[(numbers >= 0) & (numbers < len(mask))]] = True
        return mask

    # --- columns --------------------------------------------------------------------------------

    def available(self) -> list[Shown]:
        """The columns that can be shown of this discovery."""
        names = self.columns.values if self.columns is not None else columns_of.ALL
        histograms = self.columns is None or self.columns.histograms is not None
        return columns_of.available(names, histograms)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns that were chosen, also those that this discovery lacks."""
        return self._wanted

    def set_wanted(self, names: Sequence[str]) -> None:
        """Show these columns, in this order."""
        known = tuple(name for name in dict.fromkeys(names) if name in columns_of.ALL)
        if known and known != self._wanted:
            self._wanted = known
            self.beginResetModel()
            self._choose_shown()
            self.endResetModel()
            self.shown_changed.emit()
            self.order_changed.emit()

    def section(self, name: str) -> int:
        """Where a column stands, -1 where it is not shown."""
        return next((i for i, one in enumerate(self.shown) if one.name == name), -1)

    def _choose_shown(self) -> None:
        there = {one.name: one for one in self.available()}
        self.shown = [there[name] for name in self._wanted if name in there]
        if self.subset is not None and self.subset.column is not None:
            place = max(self.section(LABEL), self.section(CONTEXT))
            self.shown.insert(place + 1, self.subset.column)

    # --- texts ----------------------------------------------------------------------------------

    def missing(self, first: int, last: int) -> list[int]:
        """Features of the rows first..last whose tokens have not been read."""
        rows = self.visible[max(first, 0) : last + 1].tolist()
        return [feature for feature in rows if feature not in self._texts]

    def add_texts(self, texts: list[RowText]) -> None:
        for text in texts:
            self._texts[text.feature] = text
        while len(self._texts) > KEPT_TEXTS:
            self._texts.popitem(last=False)
        rows = [row for row in (self.row_of(text.feature) for text in texts) if row >= 0]
        if rows:
            self._row_changed(min(rows), max(rows))

    def text(self, feature: int) -> RowText | None:
        return self._texts.get(feature)

    def note(self, feature: int) -> FeatureNote | None:
        return self._notes.of.get(feature)

    @property
    def notes(self) -> Notes:
        return self._notes

    def row_of(self, feature: int) -> int:
        """The row that shows a feature, -1 where none does."""
        n = len(self.columns) if self.columns is not None else 0
        if not 0 <= feature < n:
            return -1
        if self._rows is None:
            self._rows = np.full(n, -1, np.int32)
            self._rows[self.visible] = np.arange(len(self.visible), dtype=np.int32)
        return int(self._rows[feature])

    def _row_changed(self, first: int, last: int) -> None:
        self.dataChanged.emit(self.index(first, 0), self.index(last, len(self.shown) - 1))

    # --- the model ------------------------------------------------------------------------------

    def rowCount(self, parent: Index | None = None) -> int:
        return 0 if parent is not None and parent.isValid() else len(self.visible)

    def columnCount(self, parent: Index | None = None) -> int:
        return 0 if parent is not None and parent.isValid() else len(self.shown)

    def headerData(
        self, section: int, orientation: Qt.Orientation, role: int = Qt.ItemDataRole.DisplayRole
    ) -> Any:
        if orientation != Qt.Orientation.Horizontal or not 0 <= section < len(self.shown):
            return None
        one = self.shown[section]
        if role == Qt.ItemDataRole.DisplayRole:
            by = self.query.sort == one.name and one.sortable
            arrow = (" ↓" if self.query.descending else " ↑") if by else ""
            return arrow.strip() if one.name == STAR else one.title + arrow
        if role == Qt.ItemDataRole.AccessibleTextRole:
            return one.title
        if role == Qt.ItemDataRole.ToolTipRole:
            meta = self.columns.meta if self.columns is not None else None
            how = "\nClick to sort by it." if one.sortable else ""
            return f"{one.title}\n{tip(one, meta)}{how}"
        if role == Qt.ItemDataRole.TextAlignmentRole:
            return _RIGHT if one.right else _LEFT
        return None

    def data(self, index: Index, role: int = Qt.ItemDataRole.DisplayRole) -> Any:
        if not index.isValid() or self.columns is None:
            return None
        answer = _ANSWERS.get(role)
        if answer is None:
            return None
        return answer(self, int(self.visible[index.row()]), self.shown[index.column()])

    def _display(self, feature: int, one: Shown) -> str | None:
        """None for what a delegate paints."""
        return None if one.name in (CONTEXT, HISTOGRAM, STAR) else self.written(feature, one)

    def _accessible(self, feature: int, one: Shown) -> str | None:
        return self.written(feature, one)

    def written(self, feature: int, one: Shown) -> str:
        """What a cell says, in words."""
        assert self.columns is not None
        if one.name == ID:
            return f"#{feature}"
        if one.name == LABEL:
            return self._label(feature) or self._description(feature)
        if one.name == CONTEXT:
            text = self._texts.get(feature)
            return "".join(text.snippet.texts) if text else ""
        if one.name == STAR:
            return "Starred" if self._starred(feature) else "Not starred"
        if one.name == HISTOGRAM:
            return self._histogram_text(feature)
        if one.name == SUBSET:
            assert self.subset is not None and self.subset.values is not None
            return written(one, float(self.subset.values[feature]))
        value = self.columns.values[one.name][feature]
        if one.name in columns_of.TOKEN_COLUMNS:
            return self._token(feature, one.name, int(value))
        return written(one, float(value))

    def _token(self, feature: int, name: str, token: int) -> str:
        if token < 0:
            return "—"
        text = self._texts.get(feature)
        return f"“{text.pieces[name]}”" if text and name in text.pieces else "…"

    def _histogram_text(self, feature: int) -> str:
        assert self.columns is not None
        values = self.columns.values
        n = int(values["n_active"][feature]) if "n_active" in values else 0
        most = formatting.number(float(values["max_activation"][feature]), 2)
        return f"{formatting.count(n)} activations up to {most}" if n else "Never fired"

    def _font(self, feature: int, one: Shown) -> Any:
        if one.name == ID or one.name in columns_of.TOKEN_COLUMNS:
            return self._mono
        return self._italic if one.name == LABEL and not self._label(feature) else None

    def _alignment(self, feature: int, one: Shown) -> Any:
        return _RIGHT if one.right else _LEFT

    def _cell(self, feature: int, one: Shown) -> tuple[Any, ...]:
        return (
            self._display(feature, one),
            self._font(feature, one),
            self._colour(feature, one),
            _RIGHT if one.right else _LEFT,
        )

    def _tip(self, feature: int, one: Shown) -> str | None:
        assert self.columns is not None
        if one.name == LABEL:
            text = self._texts.get(feature)
            note = self.note(feature)
            words = [text.evidence] if text and not self._label(feature) else []
            words += [f"Note: {note.note}"] if note and note.note else []
            return "\n".join(words) or None
        if one.name == "score":
            values = self.columns.values
            return columns_of.score_tip(
                {
                    name: float(values[name][feature])
                    for name in columns_of.SCORE_PARTS & set(values)
                }
            )
        return self._histogram_text(feature) if one.name == HISTOGRAM else None

    def _histogram(self, feature: int, one: Shown) -> Any:
        if one.name != HISTOGRAM or self.columns is None or self.columns.histograms is None:
            return None
        return self.columns.histograms[feature]

    def _snippet(self, feature: int, one: Shown) -> Any:
        text = self._texts.get(feature)
        return text.snippet if text and one.name == CONTEXT else None

    def _feature(self, feature: int, one: Shown) -> int:
        return feature

    def _star(self, feature: int, one: Shown) -> bool:
        return self._starred(feature)

    def _description(self, feature: int) -> str:
        text = self._texts.get(feature)
        if text is None:
            return "…"
        if text.description:
            return text.description
        return "—" if self.columns is not None and self.columns.alive[feature] else "never fired"

    def _label(self, feature: int) -> str:
        note = self.note(feature)
        return note.label if note else ""

    def _starred(self, feature: int) -> bool:
        note = self.note(feature)
        return bool(note and note.starred)

    def _colour(self, feature: int, one: Shown) -> QColor | None:
        if one.name == ID or (one.name == LABEL and not self._label(feature)):
            return _COLOURS["helper"]
        return _COLOURS.get(one.tone)

    def flags(self, index: Index) -> Qt.ItemFlag:
        return Qt.ItemFlag.ItemIsEnabled | Qt.ItemFlag.ItemIsSelectable

    def toggle_star(self, row: int) -> None:
        feature = int(self.visible[row])
        self.starred.emit(feature, not self._starred(feature))


_ANSWERS: dict[int, Callable[[FeatureTable, int, Shown], Any]] = {
    CELL_ROLE: FeatureTable._cell,
    FEATURE_ROLE: FeatureTable._feature,
    SNIPPET_ROLE: FeatureTable._snippet,
    STAR_ROLE: FeatureTable._star,
    HISTOGRAM_ROLE: FeatureTable._histogram,
    Qt.ItemDataRole.DisplayRole: FeatureTable._display,
    Qt.ItemDataRole.AccessibleTextRole: FeatureTable._accessible,
    Qt.ItemDataRole.ForegroundRole: FeatureTable._colour,
    Qt.ItemDataRole.FontRole: FeatureTable._font,
    Qt.ItemDataRole.TextAlignmentRole: FeatureTable._alignment,
    Qt.ItemDataRole.ToolTipRole: FeatureTable._tip,
}
