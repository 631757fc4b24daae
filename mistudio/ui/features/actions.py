"""What can be done with features of the table: the same commands by key, in the context menu and in
the menus of the toolbar. Hiding and taking out of a list can be undone from the message about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PySide6.QtCore import QObject, QPoint, Qt
from PySide6.QtGui import QAction, QKeySequence
from PySide6.QtWidgets import QApplication, QMenu

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.library.library import Library
from mistudio.ui.features import tools
from mistudio.ui.features.popups import NameDialog
from mistudio.ui.features.presenter import FeaturesPresenter
from mistudio.ui.features.reader import RowText
from mistudio.ui.features.view import FeatureView
from mistudio.ui.services import Services
from mistudio.ui.theme import icons
from mistudio.ui.widgets import ConfirmDialog

if TYPE_CHECKING:
    from mistudio.ui.features.page import FeaturesPage

MOST_COPIED = 500  # rows


class FeatureActions(QObject):
    """Commands over the selected rows of a view."""

    def __init__(
        self,
        services: Services,
        presenter: FeaturesPresenter,
        view: FeatureView,
        page: FeaturesPage,
    ) -> None:
        super().__init__(view)
        self._services, self._presenter, self._view, self._page = services, presenter, view, page
        self.open = self._action("Open", "maximize-2", "", self._open)
        self.open.setText("Open\tEnter")
        self.star = self._action("Star", "star", "Space", self._star)
        self.hide = self._action("Hide", "eye", "H", self._hide)
        self.lists = self._action("Add to list…", "list-checks", "L", self._choose_list)
        self.take = self._action("Take out of the list", "x", "", self._take_out)
        self.steer = self._action("Steer with it", "wand-sparkles", "", self._steer)
        self.copy = self._action("Copy rows", "copy", "Ctrl+C", self._copy)
        self.forget = self._action("Clear the subset", "x", "Del", self._clear_subset)
        view.customContextMenuRequested.connect(self._on_view_context_menu_requested)
        view.selection_changed.connect(self._on_view_selection_changed)
        presenter.table.query_changed.connect(self._on_view_selection_changed)
        self._on_view_selection_changed()

    def _action(self, text: str, icon: str, keys: str, slot: Callable[[], None]) -> QAction:
        action = QAction(icons.icon(icon), text, self)
        action.triggered.connect(lambda _=False: slot())
        if keys:
            action.setShortcut(QKeySequence(keys))
            action.setShortcutContext(Qt.ShortcutContext.WidgetShortcut)
            self._view.addAction(action)
        return action

    @property
    def selected(self) -> np.ndarray:
        """int32, in the order of the table."""
        return self._view.selected_features()

    # --- what can be done -----------------------------------------------------------------------

    def _on_view_selection_changed(self) -> None:
        some = self._view.selectionModel().hasSelection()
        for action in (self.open, self.star, self.hide, self.lists, self.steer, self.copy):
            action.setEnabled(some)
        self.take.setEnabled(some and self._presenter.table.query.list_id > 0)
        self.forget.setEnabled(self._presenter.table.subset is not None)

    def menu(self) -> QMenu:
        """All commands over the selection."""
        features, notes = self.selected, self._presenter.table.notes
        one = len(features) == 1
        menu = QMenu(self._view)
        menu.setToolTipsVisible(True)
        menu.addAction(self.open)
        self.star.setText("Take the star away" if _all(notes.starred, features) else "Star")
        self.hide.setText("Show again" if _all(notes.hidden, features) else "Hide")
        menu.addAction(self.star)
        menu.addAction(self.hide)
        self.fill_lists(menu.addMenu(icons.icon("list-checks"), "Add to list"))
        if self._presenter.table.query.list_id:
            menu.addAction(self.take)
        menu.addSeparator()
        if one:
            menu.addAction(self.steer)
        menu.addAction(self.copy)
        if self._presenter.table.subset is not None:
            menu.addAction(self.forget)
        if tools.TOOLS:
            menu.addSeparator()
            self.fill_tools(menu.addMenu("Tools"))
        return menu

    def _on_view_context_menu_requested(self, place: QPoint) -> None:
        if self._view.selectionModel().hasSelection():
            self.menu().popup(self._view.viewport().mapToGlobal(place))

    # --- commands -------------------------------------------------------------------------------

    def _open(self) -> None:
        feature = self._view.current_feature()
        if feature >= 0:
            self._page.open_feature(feature)

    def _star(self) -> None:
        features = self.selected
        starred = not _all(self._presenter.table.notes.starred, features)
        self._presenter.mark(features.tolist(), starred=starred)

    def _hide(self) -> None:
        features = self.selected
        if not len(features):
            return
        hidden = not _all(self._presenter.table.notes.hidden, features)
        self._presenter.mark(features.tolist(), hidden=hidden)
        if hidden:
            self._services.toasts.info(
                f"{_told(len(features))} hidden",
                "Filter › Hidden features shows them.",
                ("Undo", lambda: self._presenter.mark(features.tolist(), hidden=False)),
            )

    def _steer(self) -> None:
        feature, sae_id = self._view.current_feature(), self._presenter.sae_id
        if feature >= 0 and sae_id is not None:
            self._services.navigate("steering", sae_id=sae_id, feature=feature)

    def _clear_subset(self) -> None:
        self._presenter.table.set_subset(None)

    def _copy(self) -> None:
        """The selected rows as tab-separated text; their contexts are read first."""
        features = self.selected[:MOST_COPIED].tolist()
        reader = self._presenter.reader
        if features and reader is not None:
            self._services.background.run(
                lambda: (features, reader.rows(features)), self._on_read_for_copy
            )

    def _on_read_for_copy(self, answer: tuple[list[int], list[RowText]]) -> None:
        features, texts = answer
        table = self._presenter.table
        table.add_texts(texts)
        QApplication.clipboard().setText(as_tsv(table, features))
        n = len(self.selected)
        more = f" of {formatting.count(n)}; the export takes all" if n > len(features) else ""
        self._services.toasts.success(f"{_told(len(features))} copied{more}")

    # --- lists ----------------------------------------------------------------------------------

    def fill_lists(self, menu: QMenu) -> None:
        """Entries that add the selection to a list."""
        for record in self._services.library.feature_lists.all():
            action = menu.addAction(record.name)
            action.triggered.connect(lambda _=False, record=record: self.put(record.id))
        if not menu.isEmpty():
            menu.addSeparator()
        menu.addAction("New list…").triggered.connect(lambda _=False: self.ask_for_list())

    def _choose_list(self) -> None:
        row = self._view.currentIndex().row()
        menu = QMenu(self._view)
        menu.addSection(f"Add {_told(len(self.selected))} to")
        self.fill_lists(menu)
        place = self._view.visualRect(self._presenter.table.index(max(row, 0), 1)).bottomLeft()
        menu.popup(self._view.viewport().mapToGlobal(place))

    def put(self, list_id: int) -> None:
        """Add the selected features to a list."""
        features, sae_id = self.selected.tolist(), self._presenter.sae_id
        if not features or sae_id is None:
            return
        library = self._services.library
        name = library.feature_lists.get(list_id).name
        self._services.background.run(
            lambda: _put(library, list_id, sae_id, features, name), self._on_put
        )

    def _on_put(self, said: str) -> None:
        self._services.toasts.success(said)

    def ask_for_list(self) -> NameDialog:
        """A new list with the selected features in it."""
        dialog = NameDialog(self._page, "New list", "Name")
        dialog.named.connect(self._make_list)
        dialog.open()
        return dialog

    def _make_list(self, name: str) -> None:
        try:
            number = self._services.library.feature_lists.add(name=name)
        except UserError as error:
            self._services.toasts.error(error)
            return
        self.put(number)

    def _take_out(self) -> None:
        list_id, sae_id = self._presenter.table.query.list_id, self._presenter.sae_id
        features = self.selected.tolist()
        if not list_id or sae_id is None or not features:
            return
        lists = self._services.library.feature_lists
        name = lists.get(list_id).name
        lists.take(list_id, sae_id, features)
        self._services.toasts.info(
            f"{_told(len(features))} taken out of “{name}”",
            action=("Undo", lambda: lists.put(list_id, sae_id, features)),
        )

    def ask_to_rename(self, list_id: int) -> NameDialog:
        lists = self._services.library.feature_lists

        def rename(name: str) -> None:
            try:
                lists.rename(list_id, name)
            except UserError as error:
                self._services.toasts.error(error)

        dialog = NameDialog(self._page, "Rename the list", "Name", lists.get(list_id).name)
        dialog.named.connect(rename)
        dialog.open()
        return dialog

    def ask_to_delete(self, list_id: int) -> None:
        lists = self._services.library.feature_lists
        record, n = lists.get(list_id), len(lists.members(list_id))
        what = f"{_told(n)} are in it; they stay, the list goes."
        if ConfirmDialog.ask(self._page, f"Delete the list “{record.name}”?", what):
            lists.remove(list_id)

    # --- tools ----------------------------------------------------------------------------------

    def fill_tools(self, menu: QMenu) -> None:
        menu.setToolTipsVisible(True)
        for tool in tools.TOOLS:
            action = menu.addAction(icons.icon(tool.icon), tool.title)
            action.setToolTip(tool.tooltip)
            action.triggered.connect(
                lambda _=False, tool=tool: tool.open(self._page, self.for_tools())
            )

    def for_tools(self) -> list[int]:
        """The selected features, or all shown ones where fewer than two are selected."""
        selected = self.selected
        chosen = selected if len(selected) > 1 else self._presenter.table.visible
        return [int(feature) for feature in chosen]


def as_tsv(table: object, features: Sequence[int]) -> str:
    """The shown columns of some features, one a line, with a head."""
    from mistudio.ui.features.table import FeatureTable

    assert isinstance(table, FeatureTable)
    lines = ["\t".join(one.title for one in table.shown)]
    for feature in features:
        cells = (table.written(feature, one) for one in table.shown)
        lines.append("\t".join(" ".join(cell.split()) for cell in cells))
    return "\n".join(lines) + "\n"


def _all(mask: np.ndarray | None, features: np.ndarray) -> bool:
    return mask is not None and len(features) > 0 and bool(mask[features].all())


def _put(library: Library, list_id: int, sae_id: int, features: list[int], name: str) -> str:
    library.feature_lists.put(list_id, sae_id, features)
    return f"{_told(len(features))} added to “{name}”"


def _told(n: int) -> str:
    return "1 feature" if n == 1 else f"{formatting.count(n)} features"
