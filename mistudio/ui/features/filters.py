"""What limits the table, as chips behind a Filter button: a chip is clicked to change it, its cross
takes it away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from PySide6.QtCore import Signal
from PySide6.QtGui import QAction, QActionGroup
from PySide6.QtWidgets import QFrame, QMenu, QSizePolicy, QWidget

from mistudio.engine.features.columns import BANDS
from mistudio.ui.features import shown as columns_of
from mistudio.ui.features.popups import RangeEditor
from mistudio.ui.features.presenter import FeaturesPresenter
from mistudio.ui.features.query import Query, Range
from mistudio.ui.features.shown import Shown
from mistudio.ui.services import Services
from mistudio.ui.widgets import Button, FlowLayout, IconButton, Text, debounced, row

HIDDEN_TEXTS = {
    "without": "Not shown",
    "with": "Shown with the others",
    "only": "Only hidden ones",
}


@dataclass(frozen=True)
class Limit:
    """What a chip says and does. `change` gets the widget below which it may open something."""

    text: str
    remove: Callable[[], None]
    change: Callable[[QWidget], object] | None = None
    tooltip: str = ""


class Chip(QFrame):
    """One limit: its words, and a cross."""

    def __init__(self, limit: Limit) -> None:
        super().__init__()
        self._limit, text, change = limit, limit.text, limit.change
        self.setProperty("surface", "toast")
        self.text = text
        self.setToolTip(limit.tooltip)
        words: QWidget = Text(text, "label")
        if change is not None:
            words = Button(text, "link", tooltip="Click to change it")
            words.clicked.connect(self._on_clicked)
        self.words = words
        cross = IconButton("x", f"Remove: {text}", size=14)
        cross.clicked.connect(self._on_cross_clicked)
        self.cross = cross
        cross.setFixedSize(26, 26)
        line = row(words, cross, spacing=4)
        line.setContentsMargins(2 if change is not None else 10, 0, 1, 0)
        self.setLayout(line)

    def _on_clicked(self, checked: bool = False) -> None:
        if self._limit.change is not None:
            self._limit.change(self.words)

    def _on_cross_clicked(self, checked: bool = False) -> None:
        self._limit.remove()


class FilterBar(QWidget):
    """The Filter button and the chips. `query_wanted` brings the query that was asked for."""

    query_wanted = Signal(object)
    list_wanted = Signal(int)
    subset_unwanted = Signal()

    def __init__(self, services: Services, presenter: FeaturesPresenter) -> None:
        super().__init__()
        self._services, self._presenter = services, presenter
        self.button = Button("Filter", "small", "filter", "Limit what the table shows")
        self.menu = QMenu(self.button)
        self.menu.setToolTipsVisible(True)
        self.menu.aboutToShow.connect(self._fill_menu)
        self.button.setMenu(self.menu)
        self._flow = FlowLayout(8)
        self.setLayout(self._flow)
        policy = QSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Minimum)
        policy.setHeightForWidth(True)
        self.setSizePolicy(policy)
        self._flow.addWidget(self.button)
        # After the table has been painted: making a chip takes milliseconds.
        presenter.table.query_changed.connect(debounced(self, 20, self.refresh))
        presenter.lists_changed.connect(self.refresh)
        self.refresh()

    @property
    def _query(self) -> Query:
        return self._presenter.table.query

    def chips(self) -> list[Chip]:
        widgets = (self._flow.itemAt(i).widget() for i in range(self._flow.count()))
        return [widget for widget in widgets if isinstance(widget, Chip)]

    def _want(self, **values: object) -> None:
        self.query_wanted.emit(replace(self._query, **values))

    # --- chips ----------------------------------------------------------------------------------

    def refresh(self) -> None:
        """The chips of what limits the table now."""
        old = {chip.text: chip for chip in self.chips()}
        wanted = self._limits()
        if [limit.text for limit in wanted] == list(old):
            return
        for chip in old.values():
            self._flow.removeWidget(chip)
        for limit in wanted:
            chip = old.pop(limit.text, None) or Chip(limit)
            self._flow.addWidget(chip)
            chip.show()
            chip.ensurePolished()  # its size depends on the style
        for chip in old.values():
            chip.hide()
            chip.deleteLater()
        self._flow.invalidate()
        self._flow.activate()
        self.updateGeometry()

    def _limits(self) -> list[Limit]:
        query, table = self._query, self._presenter.table
        limits = []
        if table.subset is not None:
            limits.append(Limit(table.subset.title, self.subset_unwanted.emit))
        if query.list_id:
            record = self._services.library.feature_lists.find(query.list_id)
            name = f"List: {record.name}" if record else "List"
            limits.append(Limit(name, lambda: self.list_wanted.emit(0)))
        for wanted, name in (("alive", "Alive"), ("starred", "Starred"), ("labelled", "Labelled")):
            if getattr(query, wanted):
                limits.append(Limit(name, partial(self._want, **{wanted: False})))
        if query.hidden != "without":
            text = "With hidden ones" if query.hidden == "with" else "Only hidden ones"
            limits.append(Limit(text, lambda: self._want(hidden="without")))
        if query.bands:
            text = f"Band: {', '.join(query.bands)}"
            limits.append(Limit(text, lambda: self._want(bands=()), self._change_bands))
        available = {one.name for one in table.available()}
        for one in query.ranges:
            if one.column in columns_of.ALL:
                limits.append(self._range_limit(one, one.column in available))
        return limits

    def _range_limit(self, one: Range, there: bool) -> Limit:
        shown = columns_of.ALL[one.column]
        return Limit(
            columns_of.range_text(shown, one.low, one.high),
            lambda: self.query_wanted.emit(self._query.without_range(one.column)),
            (lambda anchor: self.edit_range(shown, anchor)) if there else None,
            "" if there else "This discovery has no such column: it limits nothing.",
        )

    # --- the menu -------------------------------------------------------------------------------

    def _fill_menu(self) -> None:
        menu, query = self.menu, self._query
        menu.clear()
        for wanted, text, tip in (
            ("alive", "Alive", "Fired on at least one token of the discovery"),
            ("starred", "Starred", "With a star of yours"),
            ("labelled", "Labelled", "With a label of yours"),
        ):
            action = menu.addAction(text)
            action.setToolTip(tip)
            action.setCheckable(True)
            action.setChecked(getattr(query, wanted))
            action.toggled.connect(lambda on, wanted=wanted: self._want(**{wanted: on}))
        self._add_hidden(menu.addMenu("Hidden features"))
        if any(one.name == "band" for one in self._presenter.table.available()):
            self._add_bands(menu.addMenu("Frequency band"))
        self._add_lists(menu.addMenu("In a list"))
        menu.addSection("Range of a column")
        groups: dict[str, QMenu] = {}
        meta = self._presenter.table.columns.meta if self._presenter.table.columns else None
        for one in self._presenter.table.available():
            if one.ranged:
                if one.group not in groups:
                    groups[one.group] = menu.addMenu(one.group)
                    groups[one.group].setToolTipsVisible(True)
                action = groups[one.group].addAction(f"{one.title}…")
                action.setToolTip(columns_of.tip(one, meta))
                action.triggered.connect(lambda _=False, one=one: self.edit_range(one))

    def _add_hidden(self, menu: QMenu) -> None:
        group = QActionGroup(menu)
        for value, text in HIDDEN_TEXTS.items():
            action = menu.addAction(text)
            action.setCheckable(True)
            action.setChecked(self._query.hidden == value)
            action.triggered.connect(lambda _=False, value=value: self._want(hidden=value))
            group.addAction(action)

    def _add_bands(self, menu: QMenu) -> None:
        for band in BANDS:
            action = QAction(band.capitalize(), menu)
            action.setCheckable(True)
            action.setChecked(band in self._query.bands)
            action.toggled.connect(lambda on, band=band: self._take_band(band, on))
            menu.addAction(action)

    def _take_band(self, band: str, on: bool) -> None:
        kept = {*self._query.bands, band} if on else set(self._query.bands) - {band}
        alive = self._query.alive and "dead" not in kept
        self._want(bands=tuple(one for one in BANDS if one in kept), alive=alive)

    def _change_bands(self, anchor: QWidget) -> None:
        menu = QMenu(self)
        self._add_bands(menu)
        menu.popup(anchor.mapToGlobal(anchor.rect().bottomLeft()))

    def _add_lists(self, menu: QMenu) -> None:
        lists = self._services.library.feature_lists.all()
        menu.setEnabled(bool(lists))
        for record in lists:
            action = menu.addAction(record.name)
            action.setCheckable(True)
            action.setChecked(record.id == self._query.list_id)
            action.toggled.connect(
                lambda on, number=record.id: self.list_wanted.emit(number if on else 0)
            )

    def edit_range(self, shown: Shown, anchor: QWidget | None = None) -> RangeEditor | None:
        columns = self._presenter.table.columns
        if columns is None or shown.name not in columns.values:
            return None
        editor = RangeEditor(
            self,
            shown,
            columns.values[shown.name],
            self._query.range_of(shown.name),
            columns.meta,
        )
        editor.range_changed.connect(self._on_range_changed)
        editor.show_below(anchor or self.button)
        return editor

    def _on_range_changed(self, wanted: Range) -> None:
        self.query_wanted.emit(self._query.with_range(wanted))
