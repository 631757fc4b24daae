"""The browser of one discovery: tiles, search, filters, the table, commands over its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PySide6.QtCore import QEvent, QObject, Qt, QTimer
from PySide6.QtGui import QKeyEvent, QKeySequence, QResizeEvent, QShortcut
from PySide6.QtWidgets import QLineEdit, QSizePolicy, QWidget

from mistudio import formatting
from mistudio.engine.features.columns import BY_NAME
from mistudio.errors import explain
from mistudio.library.records import FeatureRun
from mistudio.ui.features.actions import FeatureActions
from mistudio.ui.features.by_text import TextSearch
from mistudio.ui.features.filters import FilterBar
from mistudio.ui.features.menus import ListsButton, ToolsButton, ViewsButton, without_list
from mistudio.ui.features.popups import ColumnChooser
from mistudio.ui.features.presenter import FeaturesPresenter
from mistudio.ui.features.query import FIELDS, GIVEN, Query
from mistudio.ui.features.reader import Columns
from mistudio.ui.features.shown import STAR, SUBSET, frequency
from mistudio.ui.features.view import FeatureView
from mistudio.ui.services import Services
from mistudio.ui.widgets import (
    Button,
    Choice,
    EmptyState,
    IconButton,
    StatTile,
    Text,
    column,
    debounced,
    row,
)

if TYPE_CHECKING:
    from mistudio.ui.features.page import FeaturesPage

SEARCH_DELAY_MS = 30
LOW = 560  # pixels
INTERPRETABLE = 0.70  # lower bound of the balanced accuracy (engine/features/score.py)

FIELD_CHOICES = (
    (FIELDS, "Everywhere"),
    (("label", "note"), "Labels and notes"),
    (("description",), "Descriptions by rule"),
    (("tokens",), "Tokens it fires on"),
    (("logits",), "Tokens it promotes"),
    (("context",), "Example contexts"),
)


class Browser(QWidget):
    """Everything below the choice of the SAE, once its features are discovered."""

    def __init__(
        self, services: Services, presenter: FeaturesPresenter, page: FeaturesPage
    ) -> None:
        super().__init__()
        self._services, self._presenter, self._page = services, presenter, page
        table = presenter.table
        self.tiles = {
            "features": StatTile("Features Found", role="emerald"),
            "interpretable": StatTile("Interpretable", role="blue"),
            "l0": StatTile("Activation Rate (L0)", role="purple"),
            "alive": StatTile("Alive", role="emerald"),
            "density": StatTile("Median Activation Freq", role="yellow"),
        }
        tiles = row(*self.tiles.values(), spacing=12)
        for place, tile in enumerate(self.tiles.values()):
            tiles.setStretch(place, 1)
            tile.layout().setContentsMargins(14, 8, 14, 8)
            tile.layout().setSpacing(0)

        self.view = FeatureView(table, services.settings.get("token_colours"))
        self.actions_ = FeatureActions(services, presenter, self.view, page)
        self._make_search()
        self._make_sort()
        self.filters = FilterBar(services, presenter)
        self.filters.query_wanted.connect(table.set_query)
        self.filters.list_wanted.connect(presenter.show_list)
        self.filters.subset_unwanted.connect(self.clear_subset)
        self.columns_button = Button("Columns", "small", "sliders-horizontal", "Choose columns")
        self.columns_button.clicked.connect(self._on_columns_clicked)
        self.views_button = ViewsButton(services, presenter)
        self.lists_button = ListsButton(services, presenter, self.actions_)
        self.lists_button.list_wanted.connect(presenter.show_list)
        self.tools_button = ToolsButton(self.actions_)
        self.by_text_button = Button(
            "By text", "secondary", "zap", "Find features by a text of yours (Ctrl+T)"
        )
        self.by_text_button.setCheckable(True)
        self.by_text_button.toggled.connect(self._on_by_text_toggled)
        self.by_text = TextSearch(services, presenter)
        self.by_text.subset_wanted.connect(table.show_subset)
        self.by_text.closed.connect(self._on_by_text_closed)
        self.by_text.hide()

        first = row(
            self.search, self.fields, self.sort, self.direction, self.by_text_button, spacing=10
        )
        first.setStretch(0, 1)
        buttons = row(
            self.columns_button, self.views_button, self.lists_button, self.tools_button, spacing=8
        )
        second = row(self.filters, buttons, spacing=16)
        second.setStretch(0, 1)
        second.setAlignment(buttons, Qt.AlignmentFlag.AlignTop)

        self._nothing = EmptyState("search", "No features match your search")
        self._nothing.hide()
        self.summary = Text("", "helper")
        self._searching = Text("", "helper")
        self._open = Button("Open", "small", "maximize-2", "Enter, or a double click on the row")
        self._open.setAccessibleName("Open the selected feature")
        self._open.clicked.connect(self._on_open_clicked)
        self.again = Button("Discover again…", "small", "rotate-ccw")
        body = column(10)
        self._tiles = QWidget()
        self._tiles.setLayout(tiles)
        self._tiles.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Maximum)
        body.addWidget(self._tiles)
        body.addLayout(first)
        body.addWidget(self.by_text)
        body.addLayout(second)
        body.addWidget(self.view, 1)
        body.addWidget(self._nothing, 1)
        body.addLayout(row(self.summary, self._searching, None, self._open, self.again, spacing=8))
        self.setLayout(body)
        self._connect()

    def _make_search(self) -> None:
        self.search = QLineEdit()
        self.search.setPlaceholderText("Search features…")
        self.search.setAccessibleName("Search features")
        self.search.setToolTip(
            "Features in whose texts every word begins some word (Ctrl+F or /): your labels and "
            "notes, descriptions, tokens, promoted tokens, example contexts"
        )
        self.search.setClearButtonEnabled(True)
        self._search_soon = debounced(self, SEARCH_DELAY_MS, self._search_now)
        self.search.textChanged.connect(self._search_soon)
        self.search.installEventFilter(self)
        self.fields = Choice(list(FIELD_CHOICES))
        self.fields.setAccessibleName("Where to search")
        self.fields.setMinimumContentsLength(16)
        self.fields.currentIndexChanged.connect(self._search_now)

    def _make_sort(self) -> None:
        self.sort = Choice()
        self.sort.setAccessibleName("Sort by")
        self.sort.setMinimumContentsLength(15)
        self.sort.currentIndexChanged.connect(self._on_sort_changed)
        self.direction = IconButton("arrow-down", "Descending: click for ascending")
        self.direction.clicked.connect(self._on_direction_clicked)

    def _connect(self) -> None:
        table, view, presenter = self._presenter.table, self.view, self._presenter
        self._look_soon = debounced(self, 15, self.look_at_rows)
        table.order_changed.connect(self._on_table_order_changed)
        table.query_changed.connect(self._on_table_query_changed)
        table.shown_changed.connect(self._on_table_shown_changed)
        presenter.searching_changed.connect(self._on_presenter_searching_changed)
        presenter.applied.connect(self._on_presenter_applied)
        presenter.opened.connect(self._on_presenter_opened)
        presenter.failed.connect(self._on_presenter_failed)
        view.horizontalHeader().sectionClicked.connect(self._on_header_section_clicked)
        view.verticalScrollBar().valueChanged.connect(self._look_soon)
        view.rows_seen.connect(self._look_soon)
        view.opened.connect(self._page.open_row)
        view.selection_changed.connect(debounced(self, 30, self._on_selection_changed))
        for keys, slot in (
            ("Ctrl+F", self._focus_search), ("/", self._focus_search), ("Ctrl+T", self.ask_text),
        ):  # fmt: skip
            shortcut = QShortcut(QKeySequence(keys), self, slot)
            shortcut.setContext(Qt.ShortcutContext.WidgetWithChildrenShortcut)
        self._on_table_shown_changed()

    # --- state ----------------------------------------------------------------------------------

    def save_state(self) -> dict[str, Any]:
        table = self._presenter.table
        query = without_list(table.query)
        if query.sort in (GIVEN, SUBSET):
            query = Query.from_dict({**query.to_dict(), "sort": "density"})
        return {
            "query": query.to_dict(),
            "columns": list(table.wanted),
            "widths": self.view.widths,
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """What an earlier version kept is left alone."""
        table = self._presenter.table
        if isinstance(state.get("widths"), dict):
            self.view.set_widths(state["widths"])
        if isinstance(state.get("columns"), list):
            table.set_wanted([str(name) for name in state["columns"]])
        if isinstance(state.get("query"), dict):
            table.set_query(without_list(Query.from_dict(state["query"])))

    # --- showing --------------------------------------------------------------------------------

    def show_tiles(self, run: FeatureRun) -> None:
        seen = f"{formatting.count(run.tokens)} tokens"
        alive = run.summary.get("alive")
        self.tiles["features"].set_value(
            formatting.count(run.n_features), tooltip="Latents of the SAE, each a feature"
        )
        share = f" ({formatting.percent(alive / run.n_features)})" if alive is not None else ""
        self.tiles["alive"].set_value(
            "—" if alive is None else f"{formatting.count(alive)}{share}",
            tooltip=f"Features that fired at least once on {seen}, and their share of all",
        )
        density = run.summary.get("median_density_alive")
        self.tiles["density"].set_value(
            "—" if density is None else frequency(density),
            tooltip=f"Median over the alive features of the share of {seen} on which each fires",
        )
        l0 = run.summary.get("l0")
        rate = "—" if l0 is None else f"{frequency(l0 / run.n_features)} ({l0:,.1f})"
        self.tiles["l0"].set_value(
            rate,
            tooltip=f"The share of features that are active on a token, and in brackets their "
            f"number (L0): means over {seen}",
        )
        value, tip = interpretable(self._presenter.table.columns)
        self.tiles["interpretable"].set_value(value, tooltip=tip)

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        self._make_room()

    def _make_room(self) -> None:
        """In a low window the tiles give way while a text is looked up."""
        self._tiles.setVisible(self.height() >= LOW or not self.by_text.isVisibleTo(self))

    def look_at_rows(self) -> None:
        """Ask for the tokens of the rows that can be seen."""
        table, view = self._presenter.table, self.view
        if not self.isVisible() or not table.rowCount():
            return
        first = max(view.rowAt(0), 0)
        last = view.rowAt(view.viewport().height() - 1)
        self._presenter.want_rows(first, last if last >= 0 else table.rowCount() - 1)

    def clear_subset(self) -> None:
        self._presenter.table.set_subset(None)

    def _on_presenter_opened(self) -> None:
        self.by_text.forget()
        self.view.scrollToTop()
        QTimer.singleShot(0, self, self.look_at_rows)

    def _on_presenter_failed(self, error: Exception) -> None:
        if self._presenter.reader is not None and self._page.dialog is None:
            known = explain(error)
            if known is not None:
                self._services.toasts.error(known)
            else:
                self._services.toasts.error(
                    "Features cannot be read", f"{type(error).__name__}: {error}"
                )

    def _on_presenter_searching_changed(self, searching: bool) -> None:
        self._searching.setText("Searching…" if searching else self._search_note())

    def _search_note(self) -> str:
        """What a search leaves out, where a discovery of an earlier version has no index."""
        reader = self._presenter.reader
        if reader is None or reader.indexed or not self._presenter.table.query.search:
            return ""
        return (
            "Only labels, notes, top tokens and promoted tokens were searched: this discovery "
            "has no index of its texts."
        )

    def _on_table_order_changed(self) -> None:
        table = self._presenter.table
        shown, total = len(table.visible), len(table.columns) if table.columns else 0
        self.summary.setText(
            f"Showing {formatting.count(shown)} of {formatting.count(total)} features"
        )
        if (shown > 0 or total == 0) == self.view.isHidden():
            self.view.setVisible(shown > 0 or total == 0)
            self._nothing.setVisible(shown == 0 and total > 0)
        if not self.view.selectionModel().hasSelection():
            self.view.scrollToTop()
        self._look_soon()

    # --- search ---------------------------------------------------------------------------------

    def _search_now(self, *_: object) -> None:
        self._presenter.search(self.search.text(), self.fields.value)

    def _on_presenter_applied(self, query: Query) -> None:
        """The fields say what is searched for; what was typed before is not searched any more."""
        self._search_soon.stop()
        for field in (self.search, self.fields):
            field.blockSignals(True)
        self.search.setText(query.search)
        self.fields.set_value(query.fields)
        for field in (self.search, self.fields):
            field.blockSignals(False)

    def _focus_search(self) -> None:
        self.search.setFocus(Qt.FocusReason.ShortcutFocusReason)
        self.search.selectAll()

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        """From the search, Down and Enter lead into the table; Esc empties it."""
        is_key = isinstance(event, QKeyEvent) and event.type() == QEvent.Type.KeyPress
        if watched is self.search and is_key and self._search_key(event.key()):
            return True
        return super().eventFilter(watched, event)

    def _search_key(self, key: int) -> bool:
        if key in (Qt.Key.Key_Down, Qt.Key.Key_Return, Qt.Key.Key_Enter):
            self.view.setFocus()
            if not self.view.currentIndex().isValid() and self._presenter.table.rowCount():
                self.view.selectRow(0)
            return True
        if key == Qt.Key.Key_Escape and self.search.text():
            self.search.clear()
            return True
        return False

    def ask_text(self) -> None:
        self.by_text_button.setChecked(True)
        self.by_text.text.setFocus()

    def _on_by_text_toggled(self, on: bool) -> None:
        self.by_text.setVisible(on)
        self._make_room()
        if on:
            self.by_text.text.setFocus()
        elif self.by_text.probe is not None:
            self.by_text.forget()
            self.clear_subset()

    def _on_by_text_closed(self) -> None:
        self.by_text_button.setChecked(False)

    def _on_selection_changed(self) -> None:
        one = self.view.selectionModel().hasSelection()
        self.by_text.show_feature(self.view.current_feature() if one else -1)

    # --- sort, columns --------------------------------------------------------------------------

    def _on_table_query_changed(self) -> None:
        query = self._presenter.table.query
        self.sort.blockSignals(True)
        if not self.sort.set_value(query.sort):
            self.sort.setCurrentIndex(-1)
        self.sort.blockSignals(False)
        self.direction.setEnabled(query.sort != GIVEN)
        if query.descending:
            self.direction.set_icon("arrow-down", "Descending: click for ascending")
        else:
            self.direction.set_icon("arrow-up", "Ascending: click for descending")
        self._searching.setText(self._search_note())

    def _on_table_shown_changed(self) -> None:
        """What can be sorted by: the statistics that there are, shown or not."""
        table = self._presenter.table
        options = [(one.name, one.title) for one in table.available() if one.sortable]
        if table.subset is not None and table.subset.ranked and table.subset.column:
            options.insert(0, (GIVEN, table.subset.column.title))
        self.sort.blockSignals(True)
        self.sort.set_options(options)
        self.sort.blockSignals(False)
        self.view.lay_out()
        self._on_table_query_changed()

    def set_sort(self, key: str, descending: bool) -> None:
        self._presenter.table.set_sort(key, descending)

    def _on_sort_changed(self, *_: object) -> None:
        key = self.sort.value
        if key is not None:
            self.set_sort(key, self._first_descending(key))

    def _on_direction_clicked(self, checked: bool = False) -> None:
        query = self._presenter.table.query
        self.set_sort(query.sort, not query.descending)

    def _on_header_section_clicked(self, section: int) -> None:
        table = self._presenter.table
        one = table.shown[section]
        if one.name == SUBSET:
            self.set_sort(GIVEN, True)
        elif one.sortable and one.name == table.query.sort:
            self.set_sort(one.name, not table.query.descending)
        elif one.sortable:
            self.set_sort(one.name, self._first_descending(one.name))

    @staticmethod
    def _first_descending(name: str) -> bool:
        """Numbers begin with the largest; names, and where less is better, with the smallest."""
        better = BY_NAME[name].better if name in BY_NAME else ""
        return name == STAR or (name not in ("id", "label") and better != "lower")

    def choose_columns(self) -> ColumnChooser:
        table = self._presenter.table
        meta = table.columns.meta if table.columns is not None else None
        chooser = ColumnChooser(self, table.available(), table.wanted, meta)
        chooser.wanted_changed.connect(table.set_wanted)
        chooser.show_below(self.columns_button)
        return chooser

    def _on_columns_clicked(self, checked: bool = False) -> None:
        self.choose_columns()

    def _on_open_clicked(self, checked: bool = False) -> None:
        feature = self.view.current_feature()
        if feature >= 0:
            self._page.open_feature(feature)
        elif self._presenter.table.rowCount():
            self._page.open_row(0)


def interpretable(columns: Columns | None) -> tuple[str, str]:
    """(share of the scored features that count as interpretable, what that means)"""
    said = (
        "Share of the scored features whose balanced accuracy has a lower bound (95 % interval) "
        f"of at least {INTERPRETABLE:.2f}"
    )
    if columns is None or "score_low" not in columns.values:
        return "—", f"{said}. This discovery has no scores."
    low = columns.values["score_low"]
    scored = int((~np.isnan(low)).sum())
    if not scored:
        return "—", f"{said}. No feature was active in enough contexts to be scored."
    good = int((low >= INTERPRETABLE).sum())
    return formatting.percent(good / scored), (
        f"{said}: {formatting.count(good)} of {formatting.count(scored)} scored features, of "
        f"{formatting.count(len(columns))} in all"
    )
