"""One feature in full: its label and note, its examples, and what it promotes."""

from __future__ import annotations

from typing import Any

import numpy as np
from PySide6.QtCore import Qt, Signal
from PySide6.QtGui import QCloseEvent, QKeySequence, QShortcut
from PySide6.QtWidgets import (
    QApplication,
    QDialog,
    QGridLayout,
    QLineEdit,
    QProgressBar,
    QScrollArea,
    QSizePolicy,
    QTabWidget,
    QWidget,
)

from mistudio import formatting
from mistudio.ui.features.presenter import FeaturesPresenter
from mistudio.ui.features.reader import DetailExample, Details
from mistudio.ui.features.table import frequency, star_icon
from mistudio.ui.services import Services
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import (
    Button,
    Choice,
    EmptyState,
    ErrorPanel,
    FormRow,
    IconButton,
    StatTile,
    Surface,
    Text,
    TokenStrip,
    clear,
    column,
    debounced,
    row,
)

ZOOMS = ((5, "5 tokens each side"), (16, "16 tokens each side"), (0, "All that is stored"))
LENS_NOTE = (
    "Method: the feature's direction times the gain of the model's final norm, through the "
    "unembedding, centred over the vocabulary. This is the direct path only: what later layers "
    "make of the feature is not in it, and the scale is relative."
)


def tile_row(tiles: list[StatTile]) -> QWidget:
    """Tiles of equal width that take no more height than they need."""
    place = QWidget()
    line = row(*tiles, spacing=12)
    for index in range(len(tiles)):
        line.setStretch(index, 1)
    place.setLayout(line)
    place.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Maximum)
    return place


class ExampleView(Surface):
    """One example: its tokens with heat, how strong it is and where it comes from."""

    def __init__(
        self, number: int, example: DetailExample, maximum: float, zoom: int, colour_map: str
    ) -> None:
        super().__init__("row", None, 14)
        self.example, self._maximum = example, maximum
        self.strip = TokenStrip(tokens.DIALOG_ROW, colour_map)
        source = example.title or f"document {formatting.count(example.document + 1)}"
        strength = Text(f"Max activation: {formatting.number(example.activation, 3)}", "small")
        self.source = Text(f"Source: {source}", "helper")
        self.add(row(Text(f"Example #{number}", "label"), strength, None, self.source, spacing=16))
        self.add(self.strip)
        self.show_zoom(zoom)

    def show_zoom(self, zoom: int) -> None:
        """`zoom` tokens on each side of the peak; 0 shows all."""
        snippet = self.example.snippet
        first = max(0, snippet.peak - zoom) if zoom else 0
        last = snippet.peak + zoom + 1 if zoom else len(snippet.texts)
        self.strip.set_tokens(
            snippet.texts[first:last],
            snippet.activations[first:last],
            self._maximum,
            self.example.ids[first:last],
        )


class FeatureDialog(QDialog):
    """Opens on one feature; Previous and Next follow the table's order."""

    steer_wanted = Signal(int)

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
        self._services, self._presenter = services, presenter
        self._colours = services.settings.get("token_colours")
        self.feature = -1
        self.details: Details | None = None
        self._loading = False

        self.title = Text("", "h1")
        self.previous = IconButton("chevron-left", "Previous feature (Alt+Left)")
        self.next = IconButton("chevron-right", "Next feature (Alt+Right)")
        self.previous.clicked.connect(self._on_previous_clicked)
        self.next.clicked.connect(self._on_next_clicked)
        QShortcut(QKeySequence("Alt+Left"), self, self._on_previous_clicked)
        QShortcut(QKeySequence("Alt+Right"), self, self._on_next_clicked)
        self.star = IconButton("star", "Star this feature", tokens.LABEL, tokens.YELLOW)
        self.star.setIcon(star_icon())
        self.star.toggled.connect(self._on_star_toggled)
        self.steer = Button("Steer with this feature", "primary", "wand-sparkles")
        self.steer.clicked.connect(self._on_steer_clicked)
        close = IconButton("x", "Close")
        close.clicked.connect(self.close)
        self._place = Text("", "helper")
        head = row(
            self.title, self.star, self._place, None, self.previous, self.next, self.steer, close
        )
        head.setContentsMargins(24, 20, 16, 0)

        self.label = QLineEdit()
        self.label.setPlaceholderText("Add label…")
        self.label.setMaxLength(200)
        self.note = QLineEdit()
        self.note.setPlaceholderText("Add a note…")
        self._save_label = debounced(self, 500, self._write_label)
        self._save_note = debounced(self, 500, self._write_note)
        self.label.textEdited.connect(self._save_label)
        self.note.textEdited.connect(self._save_note)
        self.label.editingFinished.connect(self._save_label.flush)
        self.note.editingFinished.connect(self._save_note.flush)
        self._shared = Text("", "helper", wrap=True)
        self._shared.setContentsMargins(24, 0, 24, 0)
        words = row(FormRow("Label", self.label), FormRow("Note", self.note), spacing=tokens.GAP)
        words.setStretch(0, 1)
        words.setStretch(1, 1)
        words.setContentsMargins(24, 0, 24, 0)

        self.tiles = {
            "density": StatTile("Activation Frequency", role="emerald"),
            "max_activation": StatTile("Max Activation", role="purple"),
            "mean_activation": StatTile("Mean When Active", role="blue"),
            "context_density": StatTile("Active Contexts", role="yellow"),
        }
        tiles = tile_row(list(self.tiles.values()))
        tiles.layout().setContentsMargins(24, 0, 24, 0)

        self._zoom = Choice(ZOOMS)
        self._zoom.setAccessibleName("Tokens shown of each example")
        self._zoom.set_value(16)
        self._zoom.setMinimumContentsLength(20)
        self._zoom.currentIndexChanged.connect(self._on_zoom_changed)
        self._count = Text("", "helper")
        self._examples = column(10)
        self._lens = QGridLayout()
        self._lens.setHorizontalSpacing(2 * tokens.CARD_PADDING)
        self.tabs = QTabWidget()
        self.tabs.setAccessibleName("Views of the feature")
        bar = row(Text("Top Activating Contexts", "card"), self._count, None, self._zoom)
        self.tabs.addTab(self._view(bar, self._examples), "Examples")
        lens_title = Text(
            "If this feature alone determined the next token, these would be most and least "
            "likely:",
            "small",
            wrap=True,
        )
        self.tabs.addTab(
            self._view(lens_title, self._lens, Text(LENS_NOTE, "helper", wrap=True)), "Logit Lens"
        )
        layout = column(14)
        layout.addLayout(head)
        layout.addLayout(words)
        layout.addWidget(self._shared)
        layout.addWidget(tiles)
        layout.addWidget(self.tabs, 1)
        self.setLayout(layout)
        presenter.details_ready.connect(self._on_presenter_details_ready)
        presenter.failed.connect(self._on_presenter_failed)
        presenter.state_changed.connect(self._on_presenter_state_changed)
        self.show_feature(feature)

    def _view(self, *items: Any) -> QScrollArea:
        inner = QWidget()
        inner.setProperty("surface", "clear")
        body = column(14, 24)
        for item in items:
            if isinstance(item, QWidget):
                body.addWidget(item)
            else:
                body.addLayout(item)
        body.addStretch(1)
        inner.setLayout(body)
        scroll = QScrollArea()
        scroll.setProperty("surface", "clear")
        scroll.setWidgetResizable(True)
        scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        scroll.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        scroll.setWidget(inner)
        return scroll

    # --- showing --------------------------------------------------------------------------------

    def show_feature(self, feature: int) -> None:
        """Show another feature; what was typed for the old one is saved first."""
        self.flush()
        columns = self._presenter.table.columns
        if columns is None:
            return
        self.feature, self.details = feature, None
        self.setWindowTitle(f"Feature #{feature}")
        self.title.setText(f"Feature #{feature}")
        note = self._presenter.table.note(feature)
        self._loading = True
        self.label.setText(note.label if note else "")
        self.note.setText(note.note if note else "")
        self.star.setChecked(bool(note and note.starred))
        self._loading = False
        values = {name: float(array[feature]) for name, array in columns.values.items()}
        tokens_seen = formatting.count(columns.meta.tokens)
        contexts = formatting.count(columns.meta.contexts)
        self.tiles["density"].set_value(
            frequency(values["density"]),
            f"of {tokens_seen} tokens",
            f"Share of {tokens_seen} tokens on which the feature fires",
        )
        self.tiles["max_activation"].set_value(
            formatting.number(values["max_activation"], 3), " ", f"Over {tokens_seen} tokens"
        )
        spread = formatting.number(values["std_activation"], 3)
        alive = values["density"] > 0
        self.tiles["mean_activation"].set_value(
            formatting.number(values["mean_activation"] if alive else None, 3),
            f"± {spread}" if alive else " ",
            "Mean and standard deviation over the tokens on which it fires",
        )
        self.tiles["context_density"].set_value(
            frequency(values["context_density"]),
            f"of {contexts} contexts",
            f"Share of {contexts} contexts of {columns.meta.context} tokens with at least one "
            "token on which the feature fires",
        )
        order = self._order()
        place = self._position(order)
        self._place.setText(
            f"{formatting.count(place + 1)} of {formatting.count(len(order))}" if place >= 0 else ""
        )
        self.previous.setEnabled(place > 0)
        self.next.setEnabled(0 <= place < len(order) - 1)
        self._shared.setText("What the examples share: …")
        self._count.setText("Reading…")
        self._presenter.read_details(feature)

    def _order(self) -> np.ndarray:
        return self._presenter.table.visible

    def _position(self, order: np.ndarray) -> int:
        places = np.flatnonzero(order == self.feature)
        return int(places[0]) if len(places) else -1

    def examples(self) -> list[ExampleView]:
        widgets = (self._examples.itemAt(i).widget() for i in range(self._examples.count()))
        return [widget for widget in widgets if isinstance(widget, ExampleView)]

    def _on_presenter_details_ready(self, details: Details) -> None:
        if details.feature != self.feature:
            return
        self.details = details
        shared = f"What the examples share: {details.description} — {details.evidence}"
        self._shared.setText(shared if details.description else "This feature never fired.")
        self._show_examples(details)
        self._show_lens(details)

    def _show_examples(self, details: Details) -> None:
        clear(self._examples)
        columns = self._presenter.table.columns
        assert columns is not None
        maximum = float(columns.values["max_activation"][self.feature])
        n = len(details.examples)
        self._count.setText(f"Showing {n} examples" if n != 1 else "Showing 1 example")
        for number, example in enumerate(details.examples, 1):
            self._examples.addWidget(
                ExampleView(number, example, maximum, self._zoom.value, self._colours)
            )
        if not details.examples:
            seen = formatting.count(columns.meta.tokens)
            self._examples.addWidget(
                EmptyState("circle", f"This feature fired on none of the {seen} tokens.")
            )

    def _show_lens(self, details: Details) -> None:
        clear(self._lens)
        for place, (title, pairs, tone) in enumerate(
            (("Promoted", details.promoted, "emerald"), ("Suppressed", details.suppressed, "red"))
        ):
            head = Text(title, "label")
            self._lens.addWidget(head, 0, place)
            self._lens.setColumnStretch(place, 1)
            most = max((abs(value) for _, value in pairs), default=1.0)
            for number, (text, value) in enumerate(pairs, 1):
                self._lens.addWidget(_lens_row(number, text, value, most, tone), number, place)

    # --- saving ---------------------------------------------------------------------------------

    def flush(self) -> None:
        """Save what was typed and not saved yet."""
        self._save_label.flush()
        self._save_note.flush()

    def _write_label(self) -> None:
        self._presenter.label(self.feature, self.label.text())

    def _write_note(self) -> None:
        self._presenter.annotate(self.feature, self.note.text())

    def _on_star_toggled(self, checked: bool) -> None:
        if not self._loading:
            self._presenter.star(self.feature, checked)

    # --- slots ----------------------------------------------------------------------------------

    def _step(self, by: int) -> None:
        order = self._order()
        place = self._position(order) + by
        if 0 <= place < len(order) and self._position(order) >= 0:
            self.show_feature(int(order[place]))

    def _on_previous_clicked(self, checked: bool = False) -> None:
        self._step(-1)

    def _on_next_clicked(self, checked: bool = False) -> None:
        self._step(1)

    def _on_zoom_changed(self, *_: object) -> None:
        for view in self.examples():
            view.show_zoom(self._zoom.value)

    def _on_steer_clicked(self, checked: bool = False) -> None:
        self.steer_wanted.emit(self.feature)
        self.close()

    def _on_presenter_failed(self, error: Exception) -> None:
        if self.details is None:
            clear(self._examples)
            self._count.setText("")
            self._examples.addWidget(
                ErrorPanel("This feature cannot be read", f"{type(error).__name__}: {error}")
            )

    def _on_presenter_state_changed(self) -> None:
        """Another SAE or a newer discovery: these numbers are no longer the ones that are shown."""
        if self._presenter.reader is None:
            self.close()

    def closeEvent(self, event: QCloseEvent) -> None:
        self.flush()
        super().closeEvent(event)

    def done(self, result: int) -> None:
        self.flush()
        super().done(result)


def _lens_row(number: int, text: str, value: float, most: float, tone: str) -> QWidget:
    from mistudio.ui.widgets.token_strip import shown

    rank = Text(f"#{number}", "helper")
    rank.setFixedWidth(36)
    token = Text(f'"{shown(text)}"', "mono")
    token.setMinimumWidth(150)
    bar = QProgressBar()
    bar.setRange(0, 1000)
    bar.setValue(round(1000 * abs(value) / most) if most else 0)
    bar.setTextVisible(False)
    bar.setProperty("tone", tone)
    bar.setAccessibleName(f"{text!r}: {value:+.2f}")
    amount = Text(f"{'+' if value > 0 else '−'}{formatting.number(abs(value), 2)}", "mono", tone)
    amount.setFixedWidth(64)
    amount.setAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
    line = QWidget()
    inside = row(rank, token, bar, amount)
    inside.setStretch(2, 1)
    line.setLayout(inside)
    return line
