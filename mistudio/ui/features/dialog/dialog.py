"""The dialog of one feature: its head, four tiles and a tab for each question about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PySide6.QtCore import QRect, Qt, QTimer, Signal
from PySide6.QtGui import (
    QAction,
    QCloseEvent,
    QColor,
    QFont,
    QFontMetrics,
    QKeySequence,
    QPainter,
    QPaintEvent,
    QShortcut,
)
from PySide6.QtWidgets import (
    QApplication,
    QDialog,
    QHBoxLayout,
    QInputDialog,
    QLineEdit,
    QMenu,
    QSizePolicy,
    QTabWidget,
    QWidget,
)

from mistudio import formatting
from mistudio.engine.features.columns import BY_NAME, why_no_score
from mistudio.errors import UserError
from mistudio.library.features import FeatureNote
from mistudio.library.records import FeatureRun
from mistudio.ui.features.dialog.ablation import AblationTab
from mistudio.ui.features.dialog.correlations import CorrelationsTab
from mistudio.ui.features.dialog.examples import ExamplesTab
from mistudio.ui.features.dialog.logit_lens import LogitLensTab
from mistudio.ui.features.dialog.notes import NotesTab
from mistudio.ui.features.dialog.reading import Reading
from mistudio.ui.features.dialog.tab import FeatureTab
from mistudio.ui.features.presenter import FeaturesPresenter
from mistudio.ui.features.table import star_icon
from mistudio.ui.services import Services
from mistudio.ui.theme import fonts, tokens
from mistudio.ui.widgets import Button, IconButton, Text, column, debounced, row

if TYPE_CHECKING:
    from mistudio.ui.features.reader import Columns, RowText

TABS: tuple[tuple[str, type[FeatureTab]], ...] = (
    ("Examples", ExamplesTab),
    ("Logit Lens", LogitLensTab),
    ("Correlations", CorrelationsTab),
    ("Ablation", AblationTab),
    ("Notes", NotesTab),
)
NO_LABEL = "Add label…"
SAVE_MS = 500
LATER_MS = 40  # after the first painting
TILE_PADDING = 12
MOST_BLANK_MS = 60


class Tile(QWidget):
    """One number with what it is of, in two lines. Painted: labels would take a while to make."""

    def __init__(self, label: str, role: str) -> None:
        super().__init__()
        self._label, self._colour = label, QColor(tokens.TONES[role][0])
        self.value, self.note = "—", ""
        self._small = fonts.sans(tokens.TEXT_SMALL)
        self._large = fonts.sans(tokens.TEXT_STAT, QFont.Weight.DemiBold)
        self._line = QFontMetrics(self._small).height() + 1
        self._middle = QFontMetrics(self._large).height() + 2
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setFixedHeight(3 * self._line + self._middle + 2 * TILE_PADDING)

    def set_value(self, value: str, first: str, second: str, tooltip: str) -> None:
        self.value, self.note = value, f"{first}\n{second}"
        self.setToolTip(tooltip)
        self.setAccessibleName(f"{self._label}: {value}. {first}. {second}")
        self.update()

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(QColor(tokens.DIALOG_TILE))
        painter.drawRoundedRect(self.rect(), tokens.RADIUS, tokens.RADIUS)
        width, y = self.width() - 2 * TILE_PADDING, TILE_PADDING
        metrics = QFontMetrics(self._small)
        for text in (self._label, None, *self.note.split("\n")):
            large = text is None
            height = self._middle if large else self._line
            painter.setFont(self._large if large else self._small)
            painter.setPen(self._colour if large else QColor(tokens.HELPER))
            told = self.value if text is None else text
            if not large:
                told = metrics.elidedText(told, Qt.TextElideMode.ElideRight, width)
            place = QRect(TILE_PADDING, y, width, height)
            painter.drawText(place, Qt.AlignmentFlag.AlignVCenter, told)
            y += height


class FeatureDialog(QDialog):
    """Opens on one feature; Previous and Next follow the table's order, Back what was looked at
    before. Nothing but the head is made before it stands: tabs are built when they are looked at,
    and what they show is read in the background."""

    steer_wanted = Signal(int)
    described = Signal()
    """`description` is there."""

    def __init__(
        self,
        services: Services,
        presenter: FeaturesPresenter,
        feature: int,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.setObjectName("feature_dialog")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        room = parent.window().size() if parent else QApplication.primaryScreen().size()
        self.resize(min(1152, room.width() - 64), round(room.height() * 0.9))
        assert presenter.run is not None and presenter.reader is not None
        assert presenter.choice is not None and presenter.table.columns is not None
        self.services, self.presenter = services, presenter
        self.run: FeatureRun = presenter.run
        self.sae_id = presenter.choice.sae.id
        self.columns: Columns = presenter.table.columns
        self.reading = Reading.of(services.library, self.run, presenter.reader)
        self._visited: list[int] = []
        self._loading = False
        self._typed = ""  # the label as it was shown
        self.description = ""
        """What a rule says of the feature; "" where it says nothing, or is not read yet."""

        self.tabs = QTabWidget()
        self.tabs.setAccessibleName("Views of the feature")
        self.feature = feature
        for title, kind in TABS:
            tab = kind(self)
            if not self.tabs.count():
                tab.look_at(feature)  # what is read first is on its way while the rest is built
            self.tabs.addTab(tab, title)
        self.tabs.currentChanged.connect(self._on_tabs_current_changed)
        layout = column(12)
        layout.addLayout(self._make_head())
        self.tiles = {
            "density": Tile("Activation Frequency", "emerald"),
            "score": Tile("Interpretability", "blue"),
            "max_activation": Tile("Max Activation", "purple"),
            "contexts": Tile("Active Samples", "yellow"),
        }
        tiles = row(*self.tiles.values(), spacing=12)
        for place in range(len(self.tiles)):
            tiles.setStretch(place, 1)
        tiles.setContentsMargins(24, 0, 24, 0)
        layout.addLayout(tiles)
        layout.addWidget(self.tabs, 1)
        self.setLayout(layout)
        presenter.state_changed.connect(self._on_presenter_state_changed)
        services.changes.changed.connect(self._on_changes_changed)
        self.show_feature(feature)
        self.tabs.setFocus()
        # Painted once, with its examples, where they come as fast as they should.
        self.setUpdatesEnabled(False)
        QTimer.singleShot(MOST_BLANK_MS, self, self.is_read)

    def _make_head(self) -> QHBoxLayout:
        self.title = Text("", "h1")
        self.label = QLineEdit()
        self.label.setPlaceholderText(NO_LABEL)
        self.label.setAccessibleName("Label")
        self.label.setMaxLength(200)
        self._save_label = debounced(self, SAVE_MS, self._write_label)
        self.label.textEdited.connect(self._save_label)
        self.label.editingFinished.connect(self._on_label_editing_finished)
        self.star = IconButton("star", "Star this feature", tokens.LABEL, tokens.YELLOW)
        self.star.setIcon(star_icon())
        self.star.toggled.connect(self._on_star_toggled)
        self.hide_it = IconButton("eye", "Hide this feature", tokens.LABEL, tokens.YELLOW)
        self.hide_it.toggled.connect(self._on_hide_toggled)
        self.add_to = IconButton("list-checks", "Add to list")
        self.add_to.setPopupMode(self.add_to.ToolButtonPopupMode.InstantPopup)
        self._lists = QMenu(self.add_to)
        self._lists.setToolTipsVisible(True)
        self._lists.aboutToShow.connect(self._fill_lists)
        self._lists.triggered.connect(self._on_lists_triggered)
        self.add_to.setMenu(self._lists)
        self.back = IconButton("rotate-ccw", "Back")
        self.back.clicked.connect(self._on_back_clicked)
        self.previous = IconButton("chevron-left", "Previous feature (Alt+Left)")
        self.next = IconButton("chevron-right", "Next feature (Alt+Right)")
        self.previous.clicked.connect(self._on_previous_clicked)
        self.next.clicked.connect(self._on_next_clicked)
        QShortcut(QKeySequence("Alt+Left"), self, self._on_previous_clicked)
        QShortcut(QKeySequence("Alt+Right"), self, self._on_next_clicked)
        QShortcut(QKeySequence("Alt+Backspace"), self, self._on_back_clicked)
        self.place = Text("", "helper")
        self.steer = Button("Steer", "primary", "wand-sparkles", "Steer with this feature")
        self.steer.clicked.connect(self._on_steer_clicked)
        close = IconButton("x", "Close")
        close.clicked.connect(self.close)
        self.steer.setAutoDefault(False)  # Enter in the label must not steer
        head = row(
            self.title, self.label, self.star, self.hide_it, self.add_to, 4, self.back,
            self.previous, self.place, self.next, 4, self.steer, close, spacing=6,
        )  # fmt: skip
        head.setStretch(1, 1)
        head.setContentsMargins(24, 16, 16, 0)
        return head

    # --- showing --------------------------------------------------------------------------------

    def value_of(self, name: str, feature: int) -> float | None:
        """One statistic of a feature; None where there is none."""
        values = self.columns.values.get(name)
        if values is None or not 0 <= feature < len(values):
            return None
        found = float(values[feature])
        return found if found == found else None

    def value(self, name: str) -> float | None:
        return self.value_of(name, self.feature)

    def note_of(self, feature: int) -> FeatureNote | None:
        return self.services.library.feature_notes.of_feature(self.sae_id, feature)

    def show_feature(self, feature: int) -> None:
        """Show another feature; what was typed for the old one is saved first."""
        self.flush()
        self.feature = feature
        self.setWindowTitle(f"Feature #{feature}")
        self.title.setText(f"Feature #{feature}")
        self.description = ""
        self.label.setPlaceholderText(NO_LABEL)
        self._show_note()
        self._show_tiles()
        self._show_place()
        self._show_tab()
        QTimer.singleShot(LATER_MS, self, self._read_description)

    def _read_description(self) -> None:
        reader, feature = self.presenter.reader, self.feature
        if reader is not None:
            self.services.background.run(
                lambda: reader.rows([feature])[0], self._on_description, self._on_no_description
            )

    def _on_description(self, text: RowText) -> None:
        if text.feature == self.feature and text.description:
            self.description = text.description
            self.label.setPlaceholderText(f"{text.description} (by rule)")
            self.label.setToolTip(f"By rule: {text.description}. {text.evidence}".strip())
            self.described.emit()

    def _on_no_description(self, error: Exception) -> None:
        """The field still says what it is for."""

    def is_read(self) -> None:
        """There is something to paint."""
        if not self.updatesEnabled():
            self.setUpdatesEnabled(True)

    def go_to(self, feature: int) -> None:
        """Show another feature; Back comes back to this one."""
        if feature != self.feature:
            self._visited.append(self.feature)
            self.show_feature(feature)

    def _show_tab(self) -> None:
        tab = self.tabs.currentWidget()
        assert isinstance(tab, FeatureTab)
        tab.look_at(self.feature)

    def _show_note(self) -> None:
        note = self.note_of(self.feature)
        self._loading = True
        self._typed = note.label if note else ""
        self.label.setText(self._typed)
        self.star.setChecked(bool(note and note.starred))
        hidden = bool(note and note.hidden)
        self.hide_it.setChecked(hidden)
        self.hide_it.setToolTip("Show in the table again" if hidden else "Hide in the table")
        self.hide_it.setAccessibleName("Hidden" if hidden else "Hide this feature")
        self._loading = False

    def _show_place(self) -> None:
        order = self.presenter.table.visible
        place = self._position(order)
        self.place.setText(
            f"{formatting.count(place + 1)} of {formatting.count(len(order))}" if place >= 0 else ""
        )
        self.previous.setEnabled(place > 0)
        self.next.setEnabled(0 <= place < len(order) - 1)
        self.back.setVisible(bool(self._visited))
        if self._visited:
            name = f"Back to feature #{self._visited[-1]} (Alt+Backspace)"
            self.back.setToolTip(name)
            self.back.setAccessibleName(name)

    def _show_tiles(self) -> None:
        meta = self.columns.meta
        seen, contexts = formatting.count(meta.tokens), formatting.count(meta.contexts)
        density, n = self.value("density") or 0.0, self.value("n_active")
        self.tiles["density"].set_value(
            frequency(density),
            f"of {seen} tokens",
            f"{formatting.count(n)} active" if n is not None else "—",
            _tip("density", f"{seen} tokens"),
        )
        self._show_score()
        middle, high = (self.value(name) for name in ("median_activation", "p99_activation"))
        self.tiles["max_activation"].set_value(
            formatting.number(self.value("max_activation") or None, 3),  # 0: it never fired
            f"median {formatting.number(middle, 2)}",
            f"99th percentile {formatting.number(high, 2)}",
            _tip("max_activation", f"{formatting.count(n or 0)} active tokens"),
        )
        active = self.value("n_contexts")
        share = self.value("context_density") or 0.0
        self.tiles["contexts"].set_value(
            formatting.count(active) if active is not None else "—",
            f"{frequency(share)} of {contexts} contexts",
            f"of {meta.context} tokens each",
            _tip("n_contexts", f"{contexts} contexts"),
        )

    def _show_score(self) -> None:
        score, accuracy = self.value("score"), self.value("score_accuracy")
        low, high = self.value("score_low"), self.value("score_high")
        tried, rank = int(self.value("score_contexts") or 0), self.value("score_percentile")
        if score is None or accuracy is None:
            scored = "score" in self.columns.values
            first = "too few active or silent contexts" if scored else "not scored yet"
            tip = f"{self.why_no_score()}\n{_tip('score', f'{tried} contexts')}"
            self.tiles["score"].set_value("—", first, "", tip)
            return
        bounds = ""
        if low is not None and high is not None:
            bounds = f" ({formatting.number(low, 2)}–{formatting.number(high, 2)})"
        null = "—" if rank is None else f"better than {rank:.0f}% of null"
        self.tiles["score"].set_value(
            formatting.percent(score),
            f"accuracy {formatting.number(accuracy, 2)}{bounds}",
            f"n = {formatting.count(tried)} • {null}",
            f"{_tip('score', f'{tried} contexts')}\n{BY_NAME['score_accuracy'].definition}\n"
            f"{BY_NAME['score_percentile'].definition}",
        )

    def why_no_score(self) -> str:
        """A sentence in place of the score of a feature that has none."""
        if "score" not in self.columns.values:
            return "Not scored: this discovery is of an earlier version. Discover again for it."
        return why_no_score(
            int(self.value("n_contexts") or 0), float(self.value("context_density") or 0.0)
        )

    # --- saving ---------------------------------------------------------------------------------

    def flush(self) -> None:
        """Save what was typed and not saved yet."""
        self._keep_label()
        for number in range(self.tabs.count()):
            tab = self.tabs.widget(number)
            if isinstance(tab, FeatureTab):
                tab.flush()

    def _write_label(self) -> None:
        """While one types: what is shown. A label of its own it becomes when it is finished."""
        self.presenter.label(self.feature, self.label.text())

    def _keep_label(self) -> None:
        self._save_label.stop()
        text = self.label.text().strip()
        if text != self._typed:
            self._typed = text
            self.services.library.feature_labels.write_human(self.sae_id, self.feature, text)
            self.presenter.label(self.feature, text)

    def _on_label_editing_finished(self) -> None:
        self._keep_label()

    def _on_star_toggled(self, checked: bool) -> None:
        if not self._loading:
            self.presenter.star(self.feature, checked)

    def _on_hide_toggled(self, checked: bool) -> None:
        if not self._loading:
            self.services.library.feature_notes.write(self.sae_id, self.feature, hidden=checked)

    # --- lists ----------------------------------------------------------------------------------

    def _fill_lists(self) -> None:
        self._lists.clear()
        lists = self.services.library.feature_lists
        mine = {one.id for one in lists.containing(self.sae_id, self.feature)}
        for one in lists.all():
            action = self._lists.addAction(one.name)
            action.setCheckable(True)
            action.setChecked(one.id in mine)
            action.setData(one.id)
        if self._lists.actions():
            self._lists.addSeparator()
        self._lists.addAction("New list…").setData(0)

    def _on_lists_triggered(self, action: QAction) -> None:
        number, checked = action.data(), action.isChecked()
        lists = self.services.library.feature_lists
        if number:
            (lists.put if checked else lists.take)(number, self.sae_id, [self.feature])
            return
        name, good = QInputDialog.getText(self, "New list", "Name")
        if good:
            self.add_to_new_list(name)

    def add_to_new_list(self, name: str) -> None:
        lists = self.services.library.feature_lists
        try:
            lists.put(lists.add(name=name), self.sae_id, [self.feature])
        except UserError as exc:
            self.services.toasts.error(exc)

    # --- moving ---------------------------------------------------------------------------------

    def _position(self, order: np.ndarray) -> int:
        places = np.flatnonzero(order == self.feature)
        return int(places[0]) if len(places) else -1

    def _step(self, by: int) -> None:
        order = self.presenter.table.visible
        place = self._position(order)
        if place >= 0 and 0 <= place + by < len(order):
            self.show_feature(int(order[place + by]))

    def _on_previous_clicked(self, checked: bool = False) -> None:
        self._step(-1)

    def _on_next_clicked(self, checked: bool = False) -> None:
        self._step(1)

    def _on_back_clicked(self, checked: bool = False) -> None:
        if self._visited:
            self.show_feature(self._visited.pop())

    def _on_tabs_current_changed(self, number: int) -> None:
        self._show_tab()

    def _on_steer_clicked(self, checked: bool = False) -> None:
        self.steer_wanted.emit(self.feature)
        self.close()

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        """A label was chosen or a star set elsewhere; not while one types."""
        if table == "feature_notes" and self.sae_id in ids and not self.label.hasFocus():
            found = self.note_of(self.feature)
            if found is not None:
                self._loading = True
                if not self._save_label.isActive():
                    self._typed = found.label
                    self.label.setText(found.label)
                self.star.setChecked(found.starred)
                self.hide_it.setChecked(found.hidden)
                self._loading = False

    def _on_presenter_state_changed(self) -> None:
        """Another SAE or a newer discovery: these numbers are no longer the ones that are shown."""
        if self.presenter.reader is None:
            self.close()

    def closeEvent(self, event: QCloseEvent) -> None:
        self.flush()
        super().closeEvent(event)

    def done(self, result: int) -> None:
        self.flush()
        super().done(result)


def frequency(share: float) -> str:
    """A density as people compare it: `0.23%`, and `0.0012%` where two decimals would say 0."""
    if share <= 0:
        return "0%"
    return formatting.percent(share, 4 if share < 0.0001 else 2)


def _tip(name: str, sample: str) -> str:
    one = BY_NAME[name]
    unit = f"\nUnit: {one.unit}" if one.unit else ""
    return f"{one.definition}{unit}\nSample: {sample}"
