"""The menus of the toolbar: saved views, lists, tools."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from PySide6.QtCore import Signal
from PySide6.QtWidgets import QMenu, QWidget

from mistudio.errors import UserError
from mistudio.library.features import SavedView
from mistudio.ui.features import tools
from mistudio.ui.features.actions import FeatureActions
from mistudio.ui.features.popups import NameDialog
from mistudio.ui.features.presenter import FeaturesPresenter
from mistudio.ui.features.query import Query
from mistudio.ui.services import Services
from mistudio.ui.theme import icons
from mistudio.ui.widgets import Button


class ViewsButton(Button):
    """Filters, sort, columns and search under a name."""

    def __init__(self, services: Services, presenter: FeaturesPresenter) -> None:
        super().__init__(
            "Views", "small", "bookmark", "Filters, sort, columns and search, kept under a name"
        )
        self._services, self._presenter = services, presenter
        menu = QMenu(self)
        menu.aboutToShow.connect(self._fill)
        self.setMenu(menu)

    def _fill(self) -> None:
        menu, views = self.menu(), self._services.library.feature_views.all()
        menu.clear()
        for view in sorted(views, key=lambda view: view.name.casefold()):
            action = menu.addAction(view.name)
            action.triggered.connect(lambda _=False, view=view: self.show_view(view))
        if views:
            menu.addSeparator()
        menu.addAction(icons.icon("save"), "Save this view…").triggered.connect(
            lambda _=False: self.ask_for_name()
        )
        if views:
            gone = menu.addMenu(icons.icon("trash-2"), "Delete a view")
            for view in views:
                gone.addAction(view.name).triggered.connect(
                    lambda _=False, view=view: self.delete(view)
                )

    def ask_for_name(self) -> NameDialog:
        dialog = NameDialog(self.window(), "Save this view", "Name")
        dialog.named.connect(self.save)
        dialog.open()
        return dialog

    def save(self, name: str) -> None:
        table = self._presenter.table
        query = {"query": table.query.to_dict(), "columns": list(table.wanted)}
        try:
            self._services.library.feature_views.save(name, query)
        except UserError as error:
            self._services.toasts.error(error)
        else:
            self._services.toasts.success(f"The view “{name}” is saved")

    def show_view(self, view: SavedView) -> None:
        values: dict[str, Any] = view.query
        query, columns = values.get("query"), values.get("columns")
        if isinstance(columns, list):
            self._presenter.table.set_wanted([str(name) for name in columns])
        if isinstance(query, dict):
            self._presenter.apply(Query.from_dict(query))

    def delete(self, view: SavedView) -> None:
        views = self._services.library.feature_views
        views.remove(view.id)
        self._services.toasts.info(
            f"The view “{view.name}” is deleted",
            action=("Undo", lambda: _restore(self._services, view)),
        )


def _restore(services: Services, view: SavedView) -> None:
    services.library.feature_views.save(view.name, view.query)


class ListsButton(Button):
    """Show a list, add the selection to one, rename and delete the one that is shown."""

    list_wanted = Signal(int)

    def __init__(
        self, services: Services, presenter: FeaturesPresenter, actions: FeatureActions
    ) -> None:
        super().__init__("Lists", "small", "list-checks", "Lists of features (L adds to one)")
        self._services, self._presenter, self._actions = services, presenter, actions
        menu = QMenu(self)
        menu.aboutToShow.connect(self._fill)
        self.setMenu(menu)

    def _fill(self) -> None:
        menu, actions = self.menu(), self._actions
        shown = self._presenter.table.query.list_id
        lists = self._services.library.feature_lists.all()
        menu.clear()
        if lists:
            menu.addSection("Show")
        for record in lists:
            action = menu.addAction(record.name)
            action.setCheckable(True)
            action.setChecked(record.id == shown)
            action.setToolTip(record.description)
            action.triggered.connect(
                lambda on, number=record.id: self.list_wanted.emit(number if on else 0)
            )
        menu.addSeparator()
        adding = menu.addMenu("Add the selected features to")
        adding.setEnabled(actions.lists.isEnabled())
        actions.fill_lists(adding)
        current = next((record for record in lists if record.id == shown), None)
        if current is not None:
            menu.addAction(actions.take)
            menu.addSeparator()
            menu.addAction(f"Rename “{current.name}”…").triggered.connect(
                lambda _=False: actions.ask_to_rename(current.id)
            )
            menu.addAction(f"Delete “{current.name}”…").triggered.connect(
                lambda _=False: actions.ask_to_delete(current.id)
            )


class ToolsButton(Button):
    """Windows over the selected features, or over all that are shown."""

    def __init__(self, actions: FeatureActions, parent: QWidget | None = None) -> None:
        super().__init__(
            "Tools", "small", "wand-sparkles",
            "Over the selected features, or all shown ones where fewer than two are selected",
        )  # fmt: skip
        self._actions = actions
        menu = QMenu(self)
        menu.aboutToShow.connect(self._fill)
        self.setMenu(menu)
        self.setVisible(bool(tools.TOOLS))

    def _fill(self) -> None:
        self.menu().clear()
        self._actions.fill_tools(self.menu())


def without_list(query: Query) -> Query:
    """As it is kept between two starts: lists and searches are of the moment."""
    return replace(query, list_id=0, search="")
