"""The card on the left: search for features, those that are selected, those worth a try."""

from __future__ import annotations

from PySide6.QtCore import Qt, Signal
from PySide6.QtGui import QKeyEvent
from PySide6.QtWidgets import QLineEdit, QWidget

from mistudio import formatting
from mistudio.ui.steering.feature_card import SCORE_TIP, FeatureCard
from mistudio.ui.steering.feature_index import Found
from mistudio.ui.steering.presenter import SteeringPresenter
from mistudio.ui.steering.units import NEW_STRENGTH, significant
from mistudio.ui.theme import icons, tokens
from mistudio.ui.widgets import (
    Button,
    Card,
    ElidedLabel,
    EmptyState,
    Surface,
    Text,
    clear,
    column,
    debounced,
    row,
)


class SearchField(QLineEdit):
    """Esc empties it; Down goes on to the first match."""

    def keyPressEvent(self, event: QKeyEvent) -> None:
        if event.key() == Qt.Key.Key_Escape and self.text():
            self.clear()
        elif event.key() == Qt.Key.Key_Down:
            self.focusNextChild()
        else:
            super().keyPressEvent(event)


class FoundRow(Surface):
    """A feature that was found or suggested, with its Add button."""

    chosen = Signal(int)

    def __init__(
        self,
        feature: int,
        text: str,
        there: bool = False,
        score: float | None = None,
        parent: QWidget | None = None,
    ) -> None:
        super().__init__("tile", None, 8, parent)
        self.feature = feature
        number = Text(f"#{feature}", "mono", "emerald")
        number.setMinimumWidth(52)
        self.text = ElidedLabel("", "small")
        self.button = Button("Added" if there else "Add", "small", "check" if there else "plus")
        self.button.setEnabled(not there)
        self.button.clicked.connect(self._on_button_clicked)
        self.score = Text(f"score {significant(score, 2)}", "helper")
        self.score.setToolTip(SCORE_TIP)
        self.score.setVisible(score is not None)
        self.inside = Text("", "helper")
        line = row(number, self.text, self.inside, self.score, self.button, spacing=8)
        line.setStretch(1, 1)
        self.add(line)
        self.show_text(text)

    def show_text(self, text: str, inside: str = "") -> None:
        """What the feature is about, and where it was found if the text does not show it."""
        self.text.setText(text)
        self.button.setAccessibleName(f"Add feature {self.feature}, {text}")
        self.inside.setText(inside)
        self.inside.setVisible(bool(inside))

    def _on_button_clicked(self, checked: bool = False) -> None:
        self.chosen.emit(self.feature)


class FeatureFinder(Card):
    """Follows the presenter's source and selection."""

    edited = Signal()
    """A strength or method was changed here."""

    def __init__(self, presenter: SteeringPresenter, parent: QWidget | None = None) -> None:
        super().__init__("Select Features to Steer", "sparkles", parent=parent)
        self.presenter = presenter
        self._cards: dict[tuple[int, int], FeatureCard] = {}
        self._found: Found | None = None
        self.search = SearchField()
        self.search.setPlaceholderText("Search features to add…")
        self.search.addAction(
            icons.icon("search", tokens.HELPER), QLineEdit.ActionPosition.LeadingPosition
        )
        self.search.setAccessibleName("Search features to add")
        self.search.setToolTip(
            "By #number, label, description, example, the token it fires on, tokens it promotes"
        )
        self.search.setClearButtonEnabled(True)
        self._searched = debounced(self, 200, self._on_search_changed)
        self.search.textChanged.connect(self._searched)
        self.search.returnPressed.connect(self._on_search_return_pressed)
        self._found_place = column(4)
        self.note = Text("", "helper", wrap=True)
        self.note.hide()
        self.title_of_selected = Text("", "label")
        self._selected_place = column(12)
        self.nothing = EmptyState(
            "sliders-horizontal", "No features selected. Search and add features above."
        )
        found = column(6)
        found.addWidget(self.search)
        found.addLayout(self._found_place)
        found.addWidget(self.note)
        self.add(found, self.title_of_selected, self.nothing, self._selected_place)
        self._add_suggestions()
        self.body.addStretch(1)
        presenter.index_changed.connect(self._on_presenter_index_changed)
        presenter.found.connect(self._on_presenter_found)
        presenter.suggestions_changed.connect(self._show_suggestions)
        presenter.selection_changed.connect(self.show_selected)
        presenter.calibrations_changed.connect(self._show_known)

    def _add_suggestions(self) -> None:
        self.suggestions = QWidget()
        self.best = Button("Find those that steer best", "link")
        self.best.setToolTip(f"Scores every feature of this SAE; minutes at most. {SCORE_TIP}")
        self.best.clicked.connect(self._on_best_clicked)
        self._why = Text("", "helper", wrap=True)
        suggested = column(8)
        suggested.addLayout(row(Text("Worth a try", "label"), None, self.best))
        suggested.addWidget(self._why)
        self._suggested_place = column(4)
        suggested.addLayout(self._suggested_place)
        self.suggestions.setLayout(suggested)
        self.suggestions.hide()
        self.add(self.suggestions)

    def reset(self) -> None:
        """Another source: nothing is searched for."""
        self.search.clear()
        self._searched.flush()

    def _on_presenter_index_changed(self) -> None:
        self._show_known()
        self._show_suggestions()
        if self._found is not None and self._found.features:
            self._show_found(self._found)

    # --- search ---------------------------------------------------------------------------------

    def found_rows(self) -> list[FoundRow]:
        widgets = (self._found_place.itemAt(i).widget() for i in range(self._found_place.count()))
        return [widget for widget in widgets if isinstance(widget, FoundRow)]

    def _on_search_changed(self) -> None:
        text = self.search.text()
        self._show_suggestions()
        if not text.strip():
            self._show_found(Found("", 0))
            return
        if self.presenter.index is None:
            self.note.setText("Reading the features…")
            self.note.show()
        self.presenter.search(text)

    def _on_presenter_found(self, found: Found) -> None:
        if found.search == self.search.text() or not found.search:
            self._show_found(found)

    def _show_found(self, found: Found) -> None:
        """Rows that stay keep their focus; only their texts change."""
        self._found = found
        rows = self.found_rows()
        texts = {f: item.text for f in found.features if (item := self.presenter.item(f))}
        states = [(f, self.presenter.is_selected(f)) for f in found.features]
        if states != [(line.feature, not line.button.isEnabled()) for line in rows]:
            clear(self._found_place)
            for feature, there in states:
                line = FoundRow(feature, "", there, self.presenter.score(feature))
                line.chosen.connect(self._on_found_chosen)
                self._found_place.addWidget(line)
        words = found.search.lower().split()
        for line in self.found_rows():
            text = texts.get(line.feature, "")
            shows = all(word in text.lower() for word in words)
            line.show_text(text, "" if shows else found.inside.get(line.feature, ""))
        self.note.setText(" ".join(part for part in (_count_text(found), found.note) if part))
        self.note.setVisible(bool(self.note.text()))

    def _on_search_return_pressed(self) -> None:
        """Add the first match that is not added yet."""
        self._searched.flush()
        if self._found is None or self._found.search != self.search.text():
            return
        for feature in self._found.features:
            if not self.presenter.is_selected(feature):
                self._on_found_chosen(feature)
                return

    def _on_found_chosen(self, feature: int) -> None:
        self._add(feature, 0.0)

    def _add(self, feature: int, strength: float) -> None:
        self.presenter.add(feature, strength)
        card = self._cards.get((self.presenter.sae_id or 0, feature))
        if card is not None:
            card.box.setFocus(Qt.FocusReason.OtherFocusReason)

    # --- worth a try ----------------------------------------------------------------------------

    def suggestion_rows(self) -> list[FoundRow]:
        places = (self._suggested_place.itemAt(i) for i in range(self._suggested_place.count()))
        widgets = (place.widget() for place in places)
        return [widget for widget in widgets if isinstance(widget, FoundRow)]

    def _show_suggestions(self) -> None:
        """Only while nothing is selected and nothing is searched for."""
        wanted = not self.presenter.selected and not self.search.text().strip()
        if wanted:
            self.presenter.suggest()
        found, scored = self.presenter.suggested, self.presenter.has_scores
        self._why.setText(
            "Features that make their own tokens most likely when they are amplified."
            if scored
            else "Features whose examples a short rule predicts best."
        )
        self.best.setVisible(not scored)
        self.best.setEnabled(not self.presenter.is_scoring)
        self.best.setText("Scoring…" if self.presenter.is_scoring else "Find those that steer best")
        if [line.feature for line in self.suggestion_rows()] != [s.feature for s in found]:
            clear(self._suggested_place)
            for suggestion in found:
                score = self.presenter.score(suggestion.feature)
                line = FoundRow(suggestion.feature, suggestion.text, score=score)
                line.chosen.connect(self._on_suggestion_chosen)
                self._suggested_place.addWidget(line)
        self.suggestions.setVisible(wanted and bool(found))

    def _on_suggestion_chosen(self, feature: int) -> None:
        self._add(feature, NEW_STRENGTH)

    def _on_best_clicked(self, checked: bool = False) -> None:
        self.presenter.score_features()

    # --- selected -------------------------------------------------------------------------------

    def cards(self) -> list[FeatureCard]:
        return list(self._cards.values())

    def show_selected(self) -> None:
        """Cards follow the selection; those that stay keep their focus."""
        chosen = {c.key: c for c in self.presenter.selected}
        for key in [key for key in self._cards if key not in chosen]:
            card = self._cards.pop(key)
            self._selected_place.removeWidget(card)
            card.hide()
            card.deleteLater()
        for key, c in chosen.items():
            if key in self._cards:
                self._cards[key].set_chosen(c)
                continue
            card = FeatureCard(c)
            card.strength_changed.connect(self._on_card_strength_changed)
            card.method_changed.connect(self._on_card_method_changed)
            card.removed.connect(self.presenter.remove)
            card.calibrate_wanted.connect(self.presenter.calibrate)
            card.stop_wanted.connect(self.presenter.stop_calibrating)
            self._cards[key] = card
            self._selected_place.addWidget(card)
        self.title_of_selected.setText(f"Selected Features ({len(chosen)})")
        self.nothing.setVisible(not chosen)
        self._show_known()
        self._show_suggestions()
        if self._found is not None and self._found.features:
            self._show_found(self._found)

    def _show_known(self) -> None:
        for (sae_id, feature), card in self._cards.items():
            source = self.presenter.source_of(sae_id)
            elsewhere = source is not None and sae_id != self.presenter.sae_id
            where = f"Layer {source.sae.layer}" if source and elsewhere else ""
            item = self.presenter.item(feature, sae_id)
            card.show_item(
                item,
                self.presenter.median_norm(sae_id),
                self.presenter.unit_length(sae_id, feature),
                where,
            )
            card.show_calibration(
                self.presenter.calibration(sae_id, feature, str(card.method.value)),
                self.presenter.calibrating(sae_id, feature),
                self.presenter.score(feature, sae_id),
            )

    def show_calibrating(self) -> None:
        """Called at every tick."""
        if self.presenter.is_calibrating:
            for key, card in self._cards.items():
                card.show_running(self.presenter.calibrating(*key))

    def _on_card_strength_changed(self, sae_id: int, feature: int, strength: float) -> None:
        self.presenter.set_strength(sae_id, feature, strength)
        self.edited.emit()

    def _on_card_method_changed(self, sae_id: int, feature: int, method: str) -> None:
        self.presenter.set_method(sae_id, feature, method)
        self._show_known()
        self.edited.emit()


def _count_text(found: Found) -> str:
    hidden = found.total - len(found.features)
    if found.search and not found.total:
        return "No feature matches. Try a word, a label or #number."
    return f"{formatting.count(hidden)} more: type more to find them." if hidden > 0 else ""
