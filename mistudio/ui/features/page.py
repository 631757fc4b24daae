"""The Features tab: choose an SAE, discover its features, and look through the table of them."""

from __future__ import annotations

from typing import Any

from PySide6.QtCore import QModelIndex, Qt, QTimer
from PySide6.QtGui import QKeyEvent, QMouseEvent, QResizeEvent
from PySide6.QtWidgets import (
    QAbstractItemView,
    QCheckBox,
    QHBoxLayout,
    QHeaderView,
    QLineEdit,
    QSizePolicy,
    QStackedWidget,
    QTableView,
    QWidget,
)

from mistudio import formatting
from mistudio.errors import UserError, explain
from mistudio.library.records import FeatureRun
from mistudio.ui.features.dialogs import FeatureDialog, tile_row
from mistudio.ui.features.presenter import FeaturesPresenter, SaeChoice
from mistudio.ui.features.table import (
    CONTEXT,
    DENSITY,
    FEATURE_ROLE,
    ID,
    LABEL,
    MAXIMUM,
    ROW_HEIGHT,
    SORTS,
    STAR,
    TITLES,
    TOP_TOKEN,
    Filters,
    StarDelegate,
    TokenDelegate,
    frequency,
)
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import (
    Badge,
    Button,
    Card,
    Choice,
    EmptyState,
    ErrorPanel,
    FloatBox,
    FormRow,
    IconButton,
    IntBox,
    ProgressRow,
    StatTile,
    Text,
    clear,
    column,
    debounced,
    row,
)

WIDTHS = {ID: 88, LABEL: 220, DENSITY: 152, MAXIMUM: 152, TOP_TOKEN: 160, STAR: 52}

EVALUATION_TOKENS = 500_000  # at first, or all of a shorter text


class FeatureView(QTableView):
    """The table with the keys and clicks that people expect of it."""

    def __init__(self, page: FeaturesPage) -> None:
        super().__init__()
        self._page = page
        self.setObjectName("feature_table")
        self.setAccessibleName("Features")
        self.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.setShowGrid(False)
        self.setWordWrap(False)
        self.setTabKeyNavigation(False)
        self.setVerticalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.setHorizontalScrollMode(QAbstractItemView.ScrollMode.ScrollPerPixel)
        self.verticalHeader().hide()
        self.verticalHeader().setDefaultSectionSize(ROW_HEIGHT)
        self.verticalHeader().setSectionResizeMode(QHeaderView.ResizeMode.Fixed)
        self.setMouseTracking(True)

    def keyPressEvent(self, event: QKeyEvent) -> None:
        index = self.currentIndex()
        if index.isValid() and event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter):
            self._page.open_row(index.row())
        elif index.isValid() and event.key() == Qt.Key.Key_Space:
            self._page.presenter.table.toggle_star(index.row())
        else:
            super().keyPressEvent(event)

    def mouseReleaseEvent(self, event: QMouseEvent) -> None:
        super().mouseReleaseEvent(event)
        index = self.indexAt(event.position().toPoint())
        if event.button() == Qt.MouseButton.LeftButton and index.column() == STAR:
            self._page.presenter.table.toggle_star(index.row())

    def mouseDoubleClickEvent(self, event: QMouseEvent) -> None:
        super().mouseDoubleClickEvent(event)
        index = self.indexAt(event.position().toPoint())
        if index.isValid() and index.column() != STAR:
            self._page.open_row(index.row())

    def resizeEvent(self, event: QResizeEvent) -> None:
        super().resizeEvent(event)
        self._page.look_at_rows()


class FeaturesPage(QWidget):
    """Does not scroll as a whole: the table takes what the lines above it leave."""

    def __init__(self, services: Services, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("features_page")
        self.setProperty("surface", "page")
        self._services = services
        self.presenter = FeaturesPresenter(services, self)
        self._dialog: FeatureDialog | None = None
        self._wanted_feature: int | None = None
        self._again = False

        self.sae = Choice()
        self.sae.setObjectName("sae")
        self.sae.setAccessibleName("Select Training Job to Analyze")
        self.sae.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.sae.currentIndexChanged.connect(self._on_sae_changed)
        self._chips = row(spacing=8)
        label = Text("Select Training Job to Analyze", "label")
        label.setBuddy(self.sae)
        self._chooser = QWidget()
        chooser = row(label, self.sae)
        chooser.setStretch(1, 1)
        self._chooser.setLayout(chooser)

        self.stack = QStackedWidget()
        self._none = self._make_none()
        self._before = self._make_before()
        self._during = self._make_during()
        self._after = self._make_after()
        for view in (self._none, self._before, self._during, self._after):
            self.stack.addWidget(view)

        content = QWidget()
        content.setMaximumWidth(tokens.COLUMN_WIDTH)
        body = column(14)
        body.addLayout(row(Text("Feature Discovery", "h1"), None, self._chips))
        body.addWidget(self._chooser)
        body.addWidget(self.stack, 1)
        content.setLayout(body)
        around = QHBoxLayout(self)
        around.setContentsMargins(24, 20, 24, 16)
        around.addStretch(1)
        around.addWidget(content, 1000)
        around.addStretch(1)

        self._look_soon = debounced(self, 15, self.look_at_rows)
        presenter = self.presenter
        presenter.choices_changed.connect(debounced(self, 50, self.refresh_choices))
        presenter.state_changed.connect(self.refresh)
        presenter.opened.connect(self._on_presenter_opened)
        presenter.searching_changed.connect(self._on_presenter_searching_changed)
        presenter.failed.connect(self._on_presenter_failed)
        presenter.table.order_changed.connect(self._on_table_order_changed)
        services.jobs.tick.connect(self._on_jobs_tick)
        self.refresh_choices()

    # --- building -------------------------------------------------------------------------------

    def _make_none(self) -> QWidget:
        card = Card()
        empty = EmptyState(
            "microscope",
            "No completed trainings yet. Complete a training job to discover features.",
            "Go to Training",
        )
        empty.action.connect(self._on_go_to_training)
        card.add(empty)
        return _top(card)

    def _make_before(self) -> QWidget:
        card = Card("Feature Discovery & Analysis", "microscope")
        self._invitation = Text(
            "Training complete. Discover interpretable features in the trained encoder.",
            "body",
            wrap=True,
        )
        self.evaluation_tokens = IntBox(EVALUATION_TOKENS, 1_000, 1_000_000_000, 10_000)
        self.evaluation_tokens.setObjectName("evaluation_tokens")
        self.top_k = IntBox(20, 1, 200)
        self.top_k.setObjectName("top_k")
        self._tokens_row = FormRow(
            "Evaluation tokens",
            self.evaluation_tokens,
            "How much text is looked through; rare features need more.",
        )
        fields = row(
            self._tokens_row,
            FormRow(
                "Top-K examples per feature",
                self.top_k,
                "Each from another window of the text, strongest first.",
            ),
            spacing=tokens.GAP,
        )
        fields.setStretch(0, 1)
        fields.setStretch(1, 1)
        self.discover = Button("Discover Features", "primary", "zap")
        self.discover.setObjectName("discover_features")
        self.discover.clicked.connect(self._on_discover_clicked)
        self._back = Button("Back to the features", "secondary", "chevron-left")
        self._back.clicked.connect(self._on_back_clicked)
        self._failure = column(0)
        card.add(self._invitation, fields, self._failure)
        buttons = row(self._back, self.discover)
        buttons.setStretch(1, 1)
        card.add(buttons)
        return _top(card)

    def _make_during(self) -> QWidget:
        self._during_title = Text("Discovering features…", "card")
        self.progress = ProgressRow("Discovering features")
        self._during_text = Text("Processing activation patterns…", "helper")
        self.cancel = Button("Cancel", "small", "x")
        self.cancel.setAccessibleName("Cancel the discovery")
        self.cancel.clicked.connect(self._on_cancel_clicked)
        card = Card()
        card.add(row(self._during_title, None, self.cancel), self.progress, self._during_text)
        return _top(card)

    def _make_after(self) -> QWidget:
        self.tiles = {
            "features": StatTile("Features", role="emerald"),
            "alive": StatTile("Alive", role="blue"),
            "density": StatTile("Median density", role="purple"),
            "l0": StatTile("L0", role="yellow"),
        }
        tiles = tile_row(list(self.tiles.values()))

        self.search = QLineEdit()
        self.search.setPlaceholderText("Search features…")
        self.search.setAccessibleName("Search labels, top tokens and promoted tokens")
        self.search.setToolTip("Searches your labels, the top tokens and the promoted tokens")
        self.search.setClearButtonEnabled(True)
        self.search.textChanged.connect(debounced(self, 200, self._on_search_changed))
        self.sort = Choice([(key, title) for key, (title, _) in SORTS.items()])
        self.sort.setAccessibleName("Sort by")
        self.sort.setMinimumContentsLength(14)
        self.sort.currentIndexChanged.connect(self._on_sort_changed)
        self.direction = IconButton("arrow-down", "Descending: click for ascending")
        self.direction.clicked.connect(self._on_direction_clicked)
        self.low = FloatBox(0.0, 0.0, 100.0, 0.01, 3, " %")
        self.low.setAccessibleName("Lowest activation frequency")
        self.high = FloatBox(100.0, 0.0, 100.0, 0.1, 3, " %")
        self.high.setAccessibleName("Highest activation frequency")
        for box in (self.low, self.high):
            box.setFixedWidth(124)
            box.valueChanged.connect(debounced(self, 200, self._on_filters_changed))
        self.starred_only = QCheckBox("Starred only")
        self.hide_dead = QCheckBox("Hide dead")
        self.hide_dead.setToolTip("Dead features fired on none of the tokens")
        self.hide_dead.setChecked(True)
        for check in (self.starred_only, self.hide_dead):
            check.toggled.connect(self._on_filters_changed)
        filters = row(
            self.search,
            self.sort,
            self.direction,
            Text("Freq", "label"),
            self.low,
            Text("to", "helper"),
            self.high,
            self.starred_only,
            self.hide_dead,
            spacing=10,
        )
        filters.setStretch(0, 1)

        self.view = FeatureView(self)
        self.view.setModel(self.presenter.table)
        self._tokens_delegate = TokenDelegate(
            self._services.settings.get("token_colours"), self.view
        )
        self._star_delegate = StarDelegate(self.view)
        self.view.setItemDelegateForColumn(CONTEXT, self._tokens_delegate)
        self.view.setItemDelegateForColumn(STAR, self._star_delegate)
        header = self.view.horizontalHeader()
        header.setHighlightSections(False)
        header.setSectionsClickable(True)
        header.setStretchLastSection(False)
        for section in range(len(TITLES)):
            header.setSectionResizeMode(section, QHeaderView.ResizeMode.Interactive)
        header.setSectionResizeMode(CONTEXT, QHeaderView.ResizeMode.Stretch)
        header.setSectionResizeMode(STAR, QHeaderView.ResizeMode.Fixed)
        for section, width in WIDTHS.items():
            header.resizeSection(section, width)
        header.sectionClicked.connect(self._on_header_section_clicked)
        self.view.verticalScrollBar().valueChanged.connect(self._on_view_scrolled)
        self._nothing = EmptyState("search", "No features match your search")
        self._nothing.hide()
        self.summary = Text("", "helper")
        self._searching = Text("", "helper")
        self._open = Button("Open", "small", "maximize-2", "Enter, or a double click on the row")
        self._open.setAccessibleName("Open the selected feature")
        self._open.clicked.connect(self._on_open_clicked)
        self._discover_again = Button("Discover again…", "small", "rotate-ccw")
        self._discover_again.clicked.connect(self._on_discover_again_clicked)

        view = QWidget()
        layout = column(12)
        layout.addWidget(tiles)
        layout.addLayout(filters)
        layout.addWidget(self.view, 1)
        layout.addWidget(self._nothing, 1)
        layout.addLayout(
            row(self.summary, self._searching, None, self._open, self._discover_again, spacing=8)
        )
        view.setLayout(layout)
        return view

    # --- the page protocol ----------------------------------------------------------------------

    def activate(self, **context: Any) -> None:
        """`sae_id` (or `training_id`) is chosen; `feature` is opened once its table is there."""
        self.refresh_choices()
        wanted = context.get("sae_id")
        if wanted is None and "training_id" in context:
            saes = self._services.library.saes.of_training(int(context["training_id"]))
            wanted = saes[0].id if saes else None
        if wanted is not None:
            self.choose(int(wanted))
        self._wanted_feature = int(context["feature"]) if "feature" in context else None
        if self.presenter.reader is not None:
            self._open_wanted()

    def _open_wanted(self) -> None:
        feature, self._wanted_feature = self._wanted_feature, None
        if feature is not None:
            self.open_feature(feature)

    def save_state(self) -> dict[str, Any]:
        table, filters = self.presenter.table, self.presenter.table.filters
        header = self.view.horizontalHeader()
        return {
            "sae": self.presenter.choice.sae.id if self.presenter.choice else None,
            "sort": table.sort_key,
            "descending": table.descending,
            "low": filters.low,
            "high": filters.high,
            "starred_only": filters.starred_only,
            "hide_dead": filters.hide_dead,
            "widths": {TITLES[section]: header.sectionSize(section) for section in WIDTHS},
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        header = self.view.horizontalHeader()
        widths = state.get("widths")
        for section in WIDTHS:
            width = (widths if isinstance(widths, dict) else {}).get(TITLES[section])
            if isinstance(width, int) and 40 <= width <= 800:
                header.resizeSection(section, width)
        self.starred_only.setChecked(bool(state.get("starred_only", False)))
        self.hide_dead.setChecked(bool(state.get("hide_dead", True)))
        for box, key in ((self.low, "low"), (self.high, "high")):
            if isinstance(state.get(key), int | float):
                box.setValue(100 * state[key])
        if state.get("sort") in SORTS:
            self._set_sort(state["sort"], bool(state.get("descending", True)))
        self._on_filters_changed()
        if isinstance(state.get("sae"), int):
            self.choose(state["sae"])

    # --- showing --------------------------------------------------------------------------------

    def choose(self, sae_id: int) -> bool:
        """Look at this SAE; False where there is no such one."""
        for index in range(self.sae.count()):
            if self.sae.itemData(index).sae.id == sae_id:
                self.sae.setCurrentIndex(index)
                return True
        return False

    def refresh_choices(self) -> None:
        """Read the SAEs again; what was chosen stays chosen, else the newest is."""
        choices = self.presenter.choices()
        current = self.presenter.choice
        self.sae.blockSignals(True)
        self.sae.set_options([(choice, choice.title) for choice in choices])
        kept = next((c for c in choices if current and c.sae.id == current.sae.id), None)
        self.sae.set_value(kept or (choices[0] if choices else None))
        self.sae.blockSignals(False)
        self._on_sae_changed()

    def refresh(self) -> None:
        """Show the state of the chosen SAE: nothing, before, during or after its discovery."""
        presenter = self.presenter
        job = presenter.discovery()
        if presenter.choice is None:
            view = self._none
        elif job is not None:
            view = self._during
            self._again = False
            self._during_title.setText("Discovering features…")
            queued = job.status == "queued"
            self._during_text.setText(
                "Waits for the job before it." if queued else "Processing activation patterns…"
            )
            self.cancel.setVisible(self._services.jobs.owns(job.id))
            self._show_progress()
        elif presenter.opening:
            view = self._during
            self._during_title.setText("Opening the features…")
            self._during_text.setText("Reading the tokenizer and the columns of the table")
            self.cancel.hide()
            self.progress.show_fraction(None, "Opening")
        elif presenter.reader is not None and not self._again:
            view = self._after
            self._show_tiles()
        else:
            view = self._before
            self._show_before()
        self._chooser.setVisible(presenter.choice is not None)
        self.stack.setCurrentWidget(view)

    def _show_chips(self, choice: SaeChoice | None) -> None:
        clear(self._chips)
        if choice is not None:
            size = f"{formatting.count(choice.sae.d_sae)} latents"
            for name, text, tone in (
                ("Model", choice.model, "purple"),
                ("Dataset", choice.dataset, "blue"),
                ("Site", choice.site, "emerald"),
                ("Size", size, "slate"),
            ):
                chip = Badge(name.lower(), f"{name}: {text}", tone)
                self._chips.addWidget(chip)

    def _show_before(self) -> None:
        presenter = self.presenter
        available = presenter.corpus_tokens()
        if available:
            self._tokens_row.set_helper(
                f"The text has {formatting.count(available)} tokens; rare features need many."
            )
        clear(self._failure)
        failed = presenter.failure()
        if presenter.error is not None:
            known = explain(presenter.error)
            panel = (
                ErrorPanel.of_error(known)
                if known
                else ErrorPanel(
                    "The features cannot be read",
                    f"{type(presenter.error).__name__}: {presenter.error}",
                    "Discover them again.",
                )
            )
            self._failure.addWidget(panel)
        elif failed is not None and failed.status == "failed":
            self._failure.addWidget(ErrorPanel.of_row({**failed.error, "retryable": False}))
        elif failed is not None:
            self._failure.addWidget(
                Text("The last discovery was interrupted when miStudio ended.", "small", "yellow")
            )
        self._back.setVisible(presenter.reader is not None)
        again = presenter.reader is not None
        self._invitation.setText(
            "A new discovery takes the place of the old one in this table; your labels stay."
            if again
            else "Training complete. Discover interpretable features in the trained encoder."
        )

    def _show_tiles(self) -> None:
        run: FeatureRun | None = self.presenter.run
        if run is None:
            return
        seen = f"{formatting.count(run.tokens)} tokens"
        alive = run.summary.get("alive")
        self.tiles["features"].set_value(
            formatting.count(run.n_features), tooltip="Latents of the SAE"
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
        self.tiles["l0"].set_value(
            formatting.number(run.summary.get("l0"), 1),
            tooltip=f"Mean number of active features per token over {seen} of training text",
        )

    def _show_progress(self) -> None:
        job = self.presenter.discovery()
        if job is None:
            return
        snapshot = self._services.jobs.snapshot(job.id)
        if snapshot is not None:
            self.progress.show_snapshot(snapshot)
        else:
            self.progress.show_fraction(job.fraction or None, job.phase or "Queued")

    def look_at_rows(self) -> None:
        """Ask for the tokens of the rows that can be seen."""
        table = self.presenter.table
        if not self.isVisible() or not table.rowCount():
            return
        first = max(self.view.rowAt(0), 0)
        last = self.view.rowAt(self.view.viewport().height() - 1)
        self.presenter.want_rows(first, last if last >= 0 else table.rowCount() - 1)

    # --- opening a feature ----------------------------------------------------------------------

    def open_row(self, row_number: int) -> None:
        self.open_feature(int(self.presenter.table.visible[row_number]))

    def open_feature(self, feature: int) -> None:
        columns = self.presenter.table.columns
        if columns is None or not 0 <= feature < len(columns):
            return
        if self._dialog is not None:
            self._dialog.close()
        self._dialog = FeatureDialog(self._services, self.presenter, feature, self)
        self._dialog.steer_wanted.connect(self._on_dialog_steer_wanted)
        self._dialog.finished.connect(self._on_dialog_finished)
        self._dialog.open()

    @property
    def dialog(self) -> FeatureDialog | None:
        return self._dialog

    def _on_dialog_finished(self, result: int) -> None:
        """Back in the table the row of the feature last seen is selected."""
        if self._dialog is not None:
            place = self.presenter.table.row_of(self._dialog.feature)
            if place >= 0:
                self.view.selectRow(place)
        self._dialog = None

    def _on_dialog_steer_wanted(self, feature: int) -> None:
        if self.presenter.choice is not None:
            sae_id = self.presenter.choice.sae.id
            self._services.navigate("steering", sae_id=sae_id, feature=feature)

    # --- slots ----------------------------------------------------------------------------------

    def _on_sae_changed(self, *_: object) -> None:
        choice = self.sae.value
        if choice != self.presenter.choice:
            self._again = False
            self._show_chips(choice)
            self.presenter.choose(choice)
            available = self.presenter.corpus_tokens() or EVALUATION_TOKENS
            self.evaluation_tokens.setMaximum(max(available, 1000))
            self.evaluation_tokens.setValue(EVALUATION_TOKENS)
        self.refresh()

    def _on_presenter_opened(self) -> None:
        self.refresh()
        self.view.scrollToTop()
        QTimer.singleShot(0, self, self.look_at_rows)
        self._open_wanted()

    def _on_presenter_searching_changed(self, searching: bool) -> None:
        self._searching.setText("Searching…" if searching else "")

    def _on_presenter_failed(self, error: Exception) -> None:
        if self.presenter.reader is not None and self._dialog is None:
            self._services.toasts.error(
                "A feature cannot be read", f"{type(error).__name__}: {error}"
            )

    def _on_table_order_changed(self) -> None:
        table = self.presenter.table
        shown, total = len(table.visible), len(table.columns) if table.columns else 0
        self.summary.setText(
            f"Showing {formatting.count(shown)} of {formatting.count(total)} features"
        )
        self.view.setVisible(shown > 0 or total == 0)
        self._nothing.setVisible(shown == 0 and total > 0)
        self.view.scrollToTop()
        self._look_soon()

    def _on_view_scrolled(self, value: int) -> None:
        self._look_soon()

    def _on_search_changed(self) -> None:
        self.presenter.search(self.search.text())

    def _on_filters_changed(self, *_: object) -> None:
        self.presenter.table.set_filters(
            Filters(
                hide_dead=self.hide_dead.isChecked(),
                starred_only=self.starred_only.isChecked(),
                low=self.low.value() / 100,
                high=self.high.value() / 100,
                search=self.presenter.table.filters.search,
            )
        )

    def _set_sort(self, key: str, descending: bool) -> None:
        self.sort.blockSignals(True)
        self.sort.set_value(key)
        self.sort.blockSignals(False)
        if descending:
            self.direction.set_icon("arrow-down", "Descending: click for ascending")
        else:
            self.direction.set_icon("arrow-up", "Ascending: click for descending")
        self.presenter.table.set_sort(key, descending)

    def _on_sort_changed(self, *_: object) -> None:
        self._set_sort(self.sort.value, self.presenter.table.descending)

    def _on_direction_clicked(self, checked: bool = False) -> None:
        table = self.presenter.table
        self._set_sort(table.sort_key, not table.descending)

    def _on_header_section_clicked(self, section: int) -> None:
        table = self.presenter.table
        key = next((key for key, (_, column) in SORTS.items() if column == section), None)
        if key is None:
            return
        if key == table.sort_key:
            self._set_sort(key, not table.descending)
        else:
            self._set_sort(key, key != "id")

    def _on_discover_clicked(self, checked: bool = False) -> None:
        self._again = False
        try:
            self.presenter.discover(self.evaluation_tokens.value(), self.top_k.value())
        except UserError as exc:
            self._services.toasts.error(exc)
        self.refresh()

    def _on_discover_again_clicked(self, checked: bool = False) -> None:
        self._again = True
        self.refresh()

    def _on_back_clicked(self, checked: bool = False) -> None:
        self._again = False
        self.refresh()

    def _on_cancel_clicked(self, checked: bool = False) -> None:
        if (job := self.presenter.discovery()) is not None:
            self._services.jobs.cancel(job.id)

    def _on_open_clicked(self, checked: bool = False) -> None:
        index: QModelIndex = self.view.currentIndex()
        if index.isValid():
            self.open_feature(int(index.data(FEATURE_ROLE)))
        elif self.presenter.table.rowCount():
            self.open_row(0)

    def _on_go_to_training(self) -> None:
        self._services.navigate("training")

    def _on_jobs_tick(self) -> None:
        if self.isVisible() and self.stack.currentWidget() is self._during:
            self._show_progress()


def _top(widget: QWidget) -> QWidget:
    """A view whose content stands at its top."""
    view = QWidget()
    layout = column(0)
    layout.addWidget(widget)
    layout.addStretch(1)
    view.setLayout(layout)
    return view
