"""The window of the pictures: map, correlations, activations over samples. It stays open beside
the table, which it is linked with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QApplication, QDialog, QTabWidget, QVBoxLayout, QWidget

from mistudio import formatting
from mistudio.ui.features.pictures.map_view import MapView
from mistudio.ui.features.pictures.sampled import HeatmapView, MatrixView
from mistudio.ui.features.pictures.session import Session
from mistudio.ui.services import Services
from mistudio.ui.widgets import ElidedLabel, IconButton, Text, column, row

if TYPE_CHECKING:
    from mistudio.ui.features.page import FeaturesPage

VIEWS = ("map", "correlations", "activations")
TITLES = ("Map", "Correlation heatmap", "Activation matrix")


class PicturesDialog(QDialog):
    """Views are built when they are first looked at."""

    def __init__(
        self,
        services: Services,
        page: FeaturesPage,
        features: Sequence[int],
        view: str = "map",
    ) -> None:
        """`features`: what heatmap and matrix are of at first, as many of them as fit."""
        super().__init__(page, Qt.WindowType.Window)
        self.setObjectName("pictures_dialog")
        self.setWindowTitle("Pictures of features")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        room = page.window().size() if page.window() else QApplication.primaryScreen().size()
        self.resize(min(1440, room.width() - 64), round(room.height() * 0.92))
        self.session = Session(services, page, self)
        self._features = list(features)
        self._views: dict[str, QWidget] = {}
        self._places = []
        self.title = Text("Pictures of features", "h1")
        self.subtitle = ElidedLabel("", "helper")
        titles = column(2)
        titles.addWidget(self.title)
        titles.addWidget(self.subtitle)
        close = IconButton("x", "Close")
        close.clicked.connect(self.close)
        head = row(titles, close)
        head.setStretch(0, 1)
        head.setAlignment(close, Qt.AlignmentFlag.AlignTop)
        head.setContentsMargins(24, 16, 16, 4)
        self.tabs = QTabWidget()
        self.tabs.setAccessibleName("Pictures")
        for title in TITLES:
            place = QWidget()
            place.setProperty("surface", "clear")
            layout = QVBoxLayout(place)
            layout.setContentsMargins(24, 12, 24, 16)
            self._places.append(layout)
            self.tabs.addTab(place, title)
        body = QVBoxLayout(self)
        body.setContentsMargins(0, 0, 0, 0)
        body.setSpacing(0)
        body.addLayout(head)
        body.addWidget(self.tabs, 1)
        self.session.opened.connect(self._show_subtitle)
        self.session.failed.connect(self._on_session_failed)
        self.tabs.setCurrentIndex(VIEWS.index(view))
        self.tabs.currentChanged.connect(self._on_tabs_current_changed)
        self.view(view)
        self._show_subtitle()
        self.tabs.tabBar().setFocus()

    def view(self, name: str) -> QWidget:
        """The view of this name, made now where it is looked at for the first time."""
        if name not in self._views:
            made: MapView | HeatmapView | MatrixView
            if name == "map":
                made = MapView(self.session)
            else:
                made = HeatmapView(self.session) if name == "correlations" else MatrixView(
                    self.session
                )  # fmt: skip
                made.set_features(self._features)
            self._views[name] = made
            self._places[VIEWS.index(name)].addWidget(made)
        return self._views[name]

    def show_view(self, name: str, features: Sequence[int]) -> None:
        """Look at this view; heatmap and matrix of these features."""
        self._features = list(features)
        self.tabs.setCurrentIndex(VIEWS.index(name))
        made = self.view(name)
        if isinstance(made, HeatmapView | MatrixView):
            made.set_features(self._features)

    def _on_tabs_current_changed(self, index: int) -> None:
        self.view(VIEWS[index])

    def _show_subtitle(self) -> None:
        run = self.session.run
        n = f"{formatting.count(run.n_features)} features" if run is not None else ""
        self.subtitle.setText(self.session.provenance or n)

    def _on_session_failed(self, error: Exception) -> None:
        self.session.services.toasts.error(
            "A picture cannot be read", f"{type(error).__name__}: {error}"
        )
