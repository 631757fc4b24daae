"""One dataset in detail: a window of four views."""

from __future__ import annotations

from PySide6.QtCore import Qt, Signal
from PySide6.QtGui import QCloseEvent
from PySide6.QtWidgets import QApplication, QDialog, QTabWidget, QVBoxLayout, QWidget

from mistudio import formatting
from mistudio.library.records import Dataset
from mistudio.ui.datasets.detail import DatasetPresenter
from mistudio.ui.datasets.overview import OverviewView
from mistudio.ui.datasets.parts import samples_text
from mistudio.ui.datasets.samples import SamplesView
from mistudio.ui.datasets.tokenization import TokenizationView
from mistudio.ui.services import Services
from mistudio.ui.widgets import (
    ElidedLabel,
    IconButton,
    Text,
    column,
    row,
    scrolling,
)

TABS = ("overview", "samples", "tokenization", "statistics")


class DatasetDialog(QDialog):
    """Opens on the overview; the other views are built when they are first looked at, so that
    opening takes no longer for a large dataset than for a small one."""

    delete_wanted = Signal(int)

    def __init__(
        self,
        services: Services,
        dataset: Dataset,
        parent: QWidget | None = None,
        tab: str = "overview",
    ) -> None:
        super().__init__(parent)
        self._services = services
        self.setObjectName("dataset_dialog")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        room = parent.window().size() if parent else QApplication.primaryScreen().size()
        self.resize(min(1152, room.width() - 64), round(room.height() * 0.9))
        self.presenter = DatasetPresenter(services, dataset, self)
        self.presenter.gone.connect(self.close)
        self.presenter.dataset_changed.connect(self._show_title)
        titles = column(4)
        self.title = ElidedLabel(dataset.name, "h1")
        self.subtitle = Text("", "helper")
        titles.addWidget(self.title)
        titles.addWidget(self.subtitle)
        close = IconButton("x", "Close")
        close.clicked.connect(self.close)
        head = row(titles, close)
        head.setStretch(0, 1)
        head.setAlignment(close, Qt.AlignmentFlag.AlignTop)
        head.setContentsMargins(24, 20, 20, 8)
        self._views: dict[str, QWidget] = {}
        self.tabs = QTabWidget()
        self.tabs.setAccessibleName("Views of the dataset")
        self._places = []
        for name in TABS:
            place = QWidget()
            place.setProperty("surface", "clear")
            layout = QVBoxLayout(place)
            layout.setContentsMargins(0, 0, 0, 0)
            self._places.append(layout)
            self.tabs.addTab(place, name.capitalize())
        self.tabs.currentChanged.connect(self._on_tabs_current_changed)
        body = QVBoxLayout(self)
        body.setContentsMargins(0, 0, 0, 0)
        body.setSpacing(0)
        body.addLayout(head)
        body.addWidget(self.tabs, 1)
        self._show_title()
        self.tabs.setCurrentIndex(TABS.index(tab))
        self._on_tabs_current_changed(self.tabs.currentIndex())
        self.tabs.tabBar().setFocus()

    # --- the views ------------------------------------------------------------------------------

    @property
    def overview(self) -> OverviewView:
        view = self._view("overview")
        assert isinstance(view, OverviewView)
        return view

    @property
    def samples(self) -> SamplesView:
        view = self._view("samples")
        assert isinstance(view, SamplesView)
        return view

    @property
    def tokenization(self) -> TokenizationView:
        view = self._view("tokenization")
        assert isinstance(view, TokenizationView)
        return view

    @property
    def statistics(self) -> QWidget:
        return self._view("statistics")

    def _view(self, name: str) -> QWidget:
        if name not in self._views:
            self._views[name] = view = self._make(name)
            self._places[TABS.index(name)].addWidget(scrolling(view, sideways=True))
        return self._views[name]

    def _make(self, name: str) -> QWidget:
        if name == "overview":
            view = OverviewView(self._services, self.presenter)
            view.delete_wanted.connect(self._on_delete_wanted)
            return view
        if name == "samples":
            return SamplesView(self.presenter)
        if name == "tokenization":
            return TokenizationView(self._services, self.presenter)
        # Its charts need a library that is slow to import.
        from mistudio.ui.datasets.statistics import StatisticsView

        return StatisticsView(self._services, self.presenter)

    def _show_title(self) -> None:
        dataset = self.presenter.dataset
        self.setWindowTitle(dataset.name)
        self.title.setText(dataset.name)
        self.subtitle.setText(f"{formatting.size(dataset.bytes)} • {samples_text(dataset)}")

    def _on_tabs_current_changed(self, index: int) -> None:
        self._view(TABS[index])
        if TABS[index] == "samples":
            self.samples.start()

    def _on_delete_wanted(self) -> None:
        self.delete_wanted.emit(self.presenter.dataset.id)

    def closeEvent(self, event: QCloseEvent) -> None:
        self.presenter.stop()
        super().closeEvent(event)

    def done(self, result: int) -> None:
        self.presenter.stop()
        super().done(result)
