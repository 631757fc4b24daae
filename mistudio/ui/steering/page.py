"""The Steering tab: choose features and their strength, generate with and without them, compare."""

from __future__ import annotations

from typing import Any

from PySide6.QtCore import Qt
from PySide6.QtGui import QKeyEvent, QKeySequence, QShortcut
from PySide6.QtWidgets import (
    QGridLayout,
    QHBoxLayout,
    QLineEdit,
    QPlainTextEdit,
    QVBoxLayout,
    QWidget,
)

from mistudio import formatting
from mistudio.errors import UserError
from mistudio.library.jobs import JobRecord
from mistudio.library.records import Generation
from mistudio.ui.services import Services
from mistudio.ui.steering.comparison import runs
from mistudio.ui.steering.presenter import (
    NEW_STRENGTH,
    Form,
    Found,
    SteeringPresenter,
    share,
    signed,
    significant,
)
from mistudio.ui.steering.widgets import (
    FeatureCard,
    FoundRow,
    HistoryRow,
    TextPane,
    features_text,
)
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import (
    Button,
    Card,
    Choice,
    Collapsible,
    ColumnPage,
    EmptyState,
    ErrorPanel,
    FloatBox,
    FormRow,
    IntBox,
    PageTitle,
    ProgressRow,
    StatTile,
    Surface,
    Text,
    Toggle,
    clear,
    column,
    debounced,
    row,
)

NOTHING = "Complete a training, then discover its features."


class SearchField(QLineEdit):
    """Esc empties it; Down goes on to the first match."""

    def keyPressEvent(self, event: QKeyEvent) -> None:
        if event.key() == Qt.Key.Key_Escape and self.text():
            self.clear()
        elif event.key() == Qt.Key.Key_Down:
            self.focusNextChild()
        else:
            super().keyPressEvent(event)


class SteeringPage(QWidget):
    """Two columns of choices, two panes of text, what changed in numbers, and earlier ones."""

    def __init__(self, services: Services, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("steering_page")
        self._services = services
        self.presenter = SteeringPresenter(services, self)
        self._feature_cards: dict[int, FeatureCard] = {}
        self._shown: Generation | None = None
        self._found: Found | None = None

        self._empty_card = Card()
        self._empty = EmptyState(
            "sliders-horizontal", "No completed training jobs available.", "Go to Training", NOTHING
        )
        self._empty.action.connect(self._on_empty_action)
        self._empty_card.add(self._empty)
        self._error_place = column(0)
        self._work = QWidget()
        self._work.setProperty("surface", "clear")
        work = column(24)
        columns = QHBoxLayout()
        columns.setSpacing(tokens.GAP)
        columns.addWidget(self._make_features(), 1)
        columns.addWidget(self._make_configuration(), 1)
        work.addLayout(columns)
        work.addLayout(self._error_place)
        work.addLayout(self._make_output())
        self._work.setLayout(work)
        page = ColumnPage()
        page.add(
            PageTitle(
                "Model Steering",
                "Push the model along features while it writes, and see what that changes.",
            ),
            self._empty_card,
            self._work,
        )
        page.body.addStretch(1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(page)
        self._page = page

        shortcut = QShortcut(QKeySequence("Ctrl+Return"), self)
        shortcut.setContext(Qt.ShortcutContext.WidgetWithChildrenShortcut)
        shortcut.activated.connect(self._on_shortcut_activated)
        presenter = self.presenter
        presenter.sources_changed.connect(self._show_sources)
        presenter.source_changed.connect(self._on_presenter_source_changed)
        presenter.index_changed.connect(self._on_presenter_index_changed)
        presenter.index_failed.connect(self._on_presenter_index_failed)
        presenter.found.connect(self._on_presenter_found)
        presenter.suggestions_changed.connect(self._show_suggestions)
        presenter.selection_changed.connect(self._show_selected)
        presenter.history_changed.connect(self._show_history)
        presenter.ended.connect(self._on_presenter_ended)
        services.jobs.tick.connect(self._on_jobs_tick)
        self._show_sources()
        self._show_selected()
        self._show_history()
        self._show_result(None)

    # --- building -------------------------------------------------------------------------------

    def _make_features(self) -> Card:
        card = Card("Select Features to Steer", "sparkles")
        self.search = SearchField()
        self.search.setPlaceholderText("Search features to add…")
        self.search.setAccessibleName("Search features to add")
        self.search.setToolTip("By #number, label, the token it fires on, or tokens it promotes")
        self.search.setClearButtonEnabled(True)
        self._searched = debounced(self, 200, self._on_search_changed)
        self.search.textChanged.connect(self._searched)
        self.search.returnPressed.connect(self._on_search_return_pressed)
        self._found_place = column(4)
        self._found_note = Text("", "helper", wrap=True)
        self._found_note.hide()
        self._selected_title = Text("", "label")
        self._selected_place = column(12)
        self._nothing_selected = EmptyState(
            "sliders-horizontal", "No features selected. Search and add features above."
        )
        found = column(6)
        found.addWidget(self.search)
        found.addLayout(self._found_place)
        found.addWidget(self._found_note)
        self._suggestions = QWidget()
        suggested = column(8)
        suggested.addWidget(Text("Worth a try", "label"))
        suggested.addWidget(
            Text(
                "Features whose strongest examples visibly share a word or a token.",
                "helper",
                wrap=True,
            )
        )
        self._suggested_place = column(4)
        suggested.addLayout(self._suggested_place)
        self._suggestions.setLayout(suggested)
        self._suggestions.hide()
        card.add(found, self._selected_title, self._nothing_selected, self._selected_place)
        card.add(self._suggestions)
        card.body.addStretch(1)
        return card

    def _make_configuration(self) -> Card:
        card = Card("Generation Configuration", "settings")
        self.source = Choice()
        self.source.currentIndexChanged.connect(self._on_source_changed)
        self.model = Text("—", "small")
        self.layer = Text("—", "small", wrap=True)
        self.prompt = QPlainTextEdit()
        self.prompt.setPlaceholderText("Enter your prompt here…")
        self.prompt.setTabChangesFocus(True)
        self.prompt.setFixedHeight(4 * self.prompt.fontMetrics().lineSpacing() + 26)
        self.prompt.textChanged.connect(self._show_buttons)
        self.temperature = FloatBox(0.7, 0.0, 2.0, 0.1, 2)
        self.max_tokens = IntBox(60, 1, 2048, 10)
        self.top_p = FloatBox(1.0, 0.01, 1.0, 0.05, 2)
        self.seed = IntBox(0, 0, 2**31 - 1)
        self.chat = Toggle("Chat format")
        self.chat_note = Text("", "helper", wrap=True)
        self.generate = Button("Generate Comparison", "primary", "zap")
        self.generate.clicked.connect(self._on_generate_clicked)
        self.stop = Button("Stop", "secondary", "square")
        self.stop.clicked.connect(self._on_stop_clicked)
        self.stop.hide()
        self.reason = Text("", "helper", wrap=True)
        self.progress = ProgressRow("Generating")
        self.progress.hide()

        facts = QGridLayout()
        facts.setHorizontalSpacing(16)
        facts.setVerticalSpacing(6)
        facts.setColumnStretch(1, 1)
        for line, (name, value) in enumerate(
            (("Model", self.model), ("Intervention layer", self.layer))
        ):
            facts.addWidget(Text(name, "label"), line, 0, Qt.AlignmentFlag.AlignTop)
            facts.addWidget(value, line, 1)
        self._facts = Surface("tile", padding=12)
        self._facts.add(facts)
        numbers = QGridLayout()
        numbers.setHorizontalSpacing(tokens.GAP)
        numbers.setVerticalSpacing(12)
        for place, (name, box, tip) in enumerate(
            (
                ("Temperature", self.temperature, "0 always takes the most likely token"),
                ("Max Tokens", self.max_tokens, "The longest continuation"),
                ("Top-p", self.top_p, "Draw only from the likeliest tokens that reach this share"),
                ("Seed", self.seed, "The same seed gives the same text; both texts share it"),
            )
        ):
            box.setToolTip(tip)
            numbers.addWidget(FormRow(name, box), place // 2, place % 2)
        numbers.setColumnStretch(0, 1)
        numbers.setColumnStretch(1, 1)
        chat_label = Text("Chat format", "label")
        chat_label.setBuddy(self.chat)
        chat = row(self.chat, chat_label, self.chat_note)
        chat.setStretch(2, 1)
        buttons = row(self.generate, self.stop)
        buttons.setStretch(0, 1)
        card.add(
            FormRow("Training Job (Source of Features)", self.source),
            self._facts,
            FormRow("Prompt", self.prompt),
            numbers,
            chat,
        )
        below = column(8)
        below.addLayout(buttons)
        below.addWidget(self.reason)
        below.addWidget(self.progress)
        card.add(below)
        card.body.addStretch(1)
        return card

    def _make_output(self) -> QVBoxLayout:
        self.unsteered = TextPane("Unsteered (Baseline)", "slate")
        self.steered = TextPane("Steered", "emerald", accent=True)
        panes = QHBoxLayout()
        panes.setSpacing(tokens.GAP)
        panes.addWidget(self.unsteered, 1)
        panes.addWidget(self.steered, 1)
        self.legend = Text(
            "Grey: the same in both. Underlined: words that the other text does not have.",
            "helper",
            wrap=True,
        )
        self.shade = Toggle("Shade each steered token by its KL divergence")
        self.shade.toggled.connect(self._on_shade_toggled)
        shade_label = Text("Shade tokens by KL", "label")
        shade_label.setBuddy(self.shade)
        self.shade_note = Text("", "helper")
        self.under = QWidget()
        line = row(self.legend, self.shade_note, shade_label, self.shade)
        line.setStretch(0, 1)
        self.under.setLayout(line)
        self.tiles = {
            "kl": StatTile("KL Divergence", role="purple", note="nats per token"),
            "perplexity": StatTile("Perplexity Δ", role="emerald", note="of the steered text"),
            "similarity": StatTile("Similarity", role="blue", note="cosine of word counts"),
            "overlap": StatTile("Word Overlap", role="emerald", note="shared words"),
        }
        tiles = QGridLayout()
        tiles.setSpacing(tokens.GAP)
        for place, tile in enumerate(self.tiles.values()):
            tiles.addWidget(tile, 0, place)
            tiles.setColumnStretch(place, 1)
        self.details = Text("", "helper", wrap=True)
        self.metrics = Card("Comparison Metrics", "git-compare")
        self.metrics.add(tiles, self.details)
        self.history = Collapsible("Earlier generations", 0)
        self._history_place = column(6)
        self.history.add(self._history_place)
        texts = column(12)
        texts.addLayout(panes)
        texts.addWidget(self.under)
        output = column(24)
        output.addLayout(texts)
        output.addWidget(self.metrics)
        output.addWidget(self.history)
        return output

    # --- the page protocol ----------------------------------------------------------------------

    def activate(self, **context: Any) -> None:
        """`sae_id` chooses the source; `feature` is added with `strength` (+2.0)."""
        if "sae_id" in context:
            self.presenter.choose(int(context["sae_id"]))
            self._show_sources()
        if "feature" in context:
            strength = float(context.get("strength", NEW_STRENGTH))
            self.presenter.add(int(context["feature"]), strength)
        self.presenter.load()

    def save_state(self) -> dict[str, Any]:
        form = self.form()
        return {
            **self.presenter.save_state(),
            "prompt": form.prompt,
            "temperature": form.temperature,
            "max_tokens": form.max_tokens,
            "top_p": form.top_p,
            "seed": form.seed,
            "chat": form.chat,
            "shade": self.shade.isChecked(),
            "history": self.history.expanded,
            "generation_id": self._shown.id if self._shown else None,
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        self.prompt.setPlainText(str(state.get("prompt", "")))
        for name, box, kinds in (
            ("temperature", self.temperature, (int, float)),
            ("max_tokens", self.max_tokens, int),
            ("top_p", self.top_p, (int, float)),
            ("seed", self.seed, int),
        ):
            if isinstance(state.get(name), kinds):
                box.setValue(state[name])
        self.chat.setChecked(bool(state.get("chat")))
        self.shade.setChecked(bool(state.get("shade")))
        self.history.set_expanded(bool(state.get("history")))
        self.presenter.restore_state(state)
        self._show_sources()
        generation_id = state.get("generation_id")
        generation = (
            self.presenter.generation(generation_id) if isinstance(generation_id, int) else None
        )
        if generation is not None and generation.sae_id == self.presenter.sae_id:
            self._show_result(generation)

    def form(self) -> Form:
        return Form(
            prompt=self.prompt.toPlainText(),
            temperature=round(self.temperature.value(), 2),
            max_tokens=self.max_tokens.value(),
            top_p=round(self.top_p.value(), 2),
            seed=self.seed.value(),
            chat=self.chat.isChecked(),
        )

    # --- source ---------------------------------------------------------------------------------

    def _show_sources(self) -> None:
        found = self.presenter.sources()
        self._empty_card.setVisible(not found)
        self._work.setVisible(bool(found))
        if not found and self._services.library.saes.count():
            self._empty.sentence.setText("No features have been discovered yet.")
            self._empty.button.setText("Go to Features")
        was_blocked = self.source.blockSignals(True)
        self.source.set_options([(source.sae.id, source.title) for source in found])
        self.source.set_value(self.presenter.sae_id)
        self.source.blockSignals(was_blocked)
        source = self.presenter.source
        self.source.setToolTip(source.title if source else "")
        self.model.setText(source.model if source else "—")
        self.layer.setText(source.layer_text if source else "—")
        self.layer.setToolTip(source.sae.hook_point if source else "")
        self._show_chat()
        self._show_buttons()

    def _on_source_changed(self, index: int) -> None:
        self.presenter.choose(self.source.value)

    def _on_presenter_source_changed(self) -> None:
        self.search.clear()
        self._searched.flush()
        if self._shown is not None and self._shown.sae_id != self.presenter.sae_id:
            self._show_result(None)
        self._show_sources()

    def _on_presenter_index_changed(self) -> None:
        self._show_known()
        self._show_suggestions()
        self._show_chat()

    def _on_presenter_index_failed(self, error: UserError) -> None:
        clear(self._error_place)
        panel = ErrorPanel(error.title, error.what, error.next_step, retryable=True)
        panel.retry.connect(self._on_retry_load)
        self._error_place.addWidget(panel)

    def _on_retry_load(self) -> None:
        clear(self._error_place)
        self.presenter.load()

    def _show_chat(self) -> None:
        index = self.presenter.index
        possible = index is None or index.has_chat_format
        self.chat.setEnabled(possible)
        self.chat_note.setText(
            "The prompt is a user's message" if possible else "This model has no chat template"
        )

    def _on_empty_action(self) -> None:
        there = self._services.library.saes.count()
        self._services.navigate("features" if there else "training")

    # --- search ---------------------------------------------------------------------------------

    def found_rows(self) -> list[FoundRow]:
        widgets = (self._found_place.itemAt(i).widget() for i in range(self._found_place.count()))
        return [widget for widget in widgets if isinstance(widget, FoundRow)]

    def _on_search_changed(self) -> None:
        text = self.search.text()
        self._show_suggestions()
        if not text.strip():
            self._show_found(Found("", 0, ()))
            return
        if self.presenter.index is None:
            self._found_note.setText("Reading the features…")
            self._found_note.show()
        self.presenter.search(text)

    def _on_presenter_found(self, found: Found) -> None:
        if found.search == self.search.text() or not found.search:
            self._show_found(found)

    def _show_found(self, found: Found) -> None:
        self._found = found
        clear(self._found_place)
        chosen = self.presenter.selected
        for item in found.items:
            line = FoundRow(item.feature, item.text, item.feature in chosen)
            line.chosen.connect(self._on_found_chosen)
            self._found_place.addWidget(line)
        hidden = found.total - len(found.items)
        if found.search and not found.total:
            self._found_note.setText("No feature matches. Try a word, a label or #number.")
        elif hidden > 0:
            self._found_note.setText(f"{formatting.count(hidden)} more: type more to find them.")
        else:
            self._found_note.setText("")
        self._found_note.setVisible(bool(self._found_note.text()))

    def _on_search_return_pressed(self) -> None:
        """Add the first match that is not added yet."""
        self._searched.flush()
        chosen = self.presenter.selected
        if self._found is None or self._found.search != self.search.text():
            return
        for item in self._found.items:
            if item.feature not in chosen:
                self._on_found_chosen(item.feature)
                return

    def _on_found_chosen(self, feature: int) -> None:
        self.presenter.add(feature, 0.0)
        self._feature_cards[feature].box.setFocus(Qt.FocusReason.OtherFocusReason)

    def suggestion_rows(self) -> list[FoundRow]:
        places = (self._suggested_place.itemAt(i) for i in range(self._suggested_place.count()))
        widgets = (place.widget() for place in places)
        return [widget for widget in widgets if isinstance(widget, FoundRow)]

    def _show_suggestions(self) -> None:
        """Only while nothing is selected and nothing is searched for."""
        wanted = not self.presenter.selected and not self.search.text().strip()
        if wanted:
            self.presenter.suggest()
        found = self.presenter.suggested
        if [line.feature for line in self.suggestion_rows()] != [s.feature for s in found]:
            clear(self._suggested_place)
            for suggestion in found:
                line = FoundRow(suggestion.feature, suggestion.text)
                line.chosen.connect(self._on_suggestion_chosen)
                self._suggested_place.addWidget(line)
        self._suggestions.setVisible(wanted and bool(found))

    def _on_suggestion_chosen(self, feature: int) -> None:
        self.presenter.add(feature, NEW_STRENGTH)
        self._feature_cards[feature].box.setFocus(Qt.FocusReason.OtherFocusReason)

    # --- selected features ----------------------------------------------------------------------

    def feature_cards(self) -> list[FeatureCard]:
        return list(self._feature_cards.values())

    def _show_selected(self) -> None:
        """Cards follow the selection; those that stay keep their focus."""
        chosen = self.presenter.selected
        for feature in [feature for feature in self._feature_cards if feature not in chosen]:
            card = self._feature_cards.pop(feature)
            self._selected_place.removeWidget(card)
            card.hide()
            card.deleteLater()
        for feature, strength in chosen.items():
            if feature not in self._feature_cards:
                card = FeatureCard(feature, strength)
                card.strength_changed.connect(self.presenter.set_strength)
                card.removed.connect(self.presenter.remove)
                self._feature_cards[feature] = card
                self._selected_place.addWidget(card)
            elif self._feature_cards[feature].strength != strength:
                self._feature_cards[feature].set_strength(strength)
        self._selected_title.setText(f"Selected Features ({len(chosen)})")
        self._nothing_selected.setVisible(not chosen)
        self._show_known()
        self._show_suggestions()
        if self._found is not None and self._found.items:
            self._show_found(self._found)
        self._show_buttons()

    def _show_known(self) -> None:
        source = self.presenter.source
        for feature, card in self._feature_cards.items():
            card.show_item(self.presenter.item(feature), source.median_norm if source else None)

    # --- generation -----------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self.presenter.job_id is not None

    def _show_buttons(self) -> None:
        reason = self.presenter.reason(self.prompt.toPlainText())
        self.generate.setEnabled(not self.busy and not reason)
        self.generate.setText("Generating…" if self.busy else "Generate Comparison")
        self.generate.setToolTip(reason or "Ctrl+Return")
        self.stop.setVisible(self.busy)
        self.progress.setVisible(self.busy)
        self.reason.setText("" if self.busy else reason)
        self.reason.setVisible(bool(self.reason.text()))

    def _on_shortcut_activated(self) -> None:
        if self.generate.isEnabled():
            self._start()

    def _on_generate_clicked(self, checked: bool = False) -> None:
        self._start()

    def _start(self) -> None:
        clear(self._error_place)
        try:
            self.presenter.generate(self.form())
        except UserError as exc:
            self._show_error(exc)
            return
        self._show_result(None)
        self.progress.show_snapshot(None)
        self.stop.setEnabled(True)
        for pane in (self.unsteered, self.steered):
            pane.set_text("", "Waiting for the first token…")
        self._show_buttons()

    def _on_stop_clicked(self, checked: bool = False) -> None:
        self.stop.setEnabled(False)
        self.presenter.stop()

    def _on_jobs_tick(self) -> None:
        if not self.busy or not self.isVisible():
            return
        snapshot = self._services.jobs.snapshot(self.presenter.job_id)
        if snapshot is None:
            waiting = self.presenter.waiting_for()
            if waiting:
                for pane in (self.unsteered, self.steered):
                    pane.set_text("", f"Waits for “{waiting}” to end…")
            return
        self.progress.show_snapshot(snapshot)
        self._show_streaming()

    def _show_streaming(self) -> None:
        texts = self.presenter.texts()
        if len(texts) >= 2:
            for pane, text in zip((self.unsteered, self.steered), texts, strict=False):
                pane.set_text(text, "Waiting for the first token…")

    def _on_presenter_ended(self, status: str, record: JobRecord) -> None:
        self._show_buttons()
        if status == "finished":
            generation = self.presenter.generation(int(record.result["generation_id"]))
            if generation is not None and generation.sae_id == self.presenter.sae_id:
                self._show_result(generation)
                self._show_history()
            return
        for pane in (self.unsteered, self.steered):
            pane.set_text(pane.text)
        if status == "failed":
            panel = ErrorPanel.of_row(record.error)
            panel.retry.connect(self._start)
            clear(self._error_place)
            self._error_place.addWidget(panel)
        else:
            self.details.setText("Stopped: the texts so far are shown, nothing was measured.")
            self.details.show()

    def _show_error(self, error: UserError) -> None:
        clear(self._error_place)
        self._error_place.addWidget(ErrorPanel(error.title, error.what, error.next_step))

    # --- result ---------------------------------------------------------------------------------

    def _show_result(self, generation: Generation | None) -> None:
        """Texts and measures of a generation; None: there is none."""
        self._shown = generation
        variant = generation.result["variants"][0] if generation else None
        self.under.setVisible(variant is not None)
        self._show_tiles(variant)
        if generation is None or variant is None:
            for pane in (self.unsteered, self.steered):
                pane.set_text("")
            self.shade_note.setText("")
            self.details.setText("")
            self.details.hide()
            return
        result = generation.result
        shading = variant["kl_by_token"] if self.shade.isChecked() else None
        self.shade_note.setText(
            f"darkest: {significant(max(shading))} nats" if shading and max(shading) > 0 else ""
        )
        first = variant["first_difference"]
        where = _where(first)
        before, after = result["unsteered"], variant["text"]
        self.unsteered.set_runs(
            before, runs(before, after, result["unsteered_pieces"], first), where, tokens.BLUE
        )
        self.steered.set_runs(
            after, runs(after, before, variant["pieces"], first), where, tokens.EMERALD, shading
        )
        self.details.setText(_details(generation, variant))
        self.details.show()

    def _show_tiles(self, variant: dict[str, Any] | None) -> None:
        measured = variant or {}
        n = f"over {formatting.count(measured['tokens'])} generated tokens" if measured else ""
        delta = None
        if measured:
            delta = measured["perplexity"] - measured["perplexity_unsteered"]
        worse = delta is not None and delta > 0
        self.tiles["kl"].set_value(
            significant(measured.get("kl_per_token")),
            tooltip=f"Mean of KL(steered ‖ unsteered) {n}: both distributions on the steered "
            "text's own prefix, at temperature 1, in nats.".replace("  ", " "),
        )
        self.tiles["perplexity"].set_role("red" if worse else "emerald")
        caption = "of the steered text"
        if delta is not None and delta == delta:
            caption = "No change" if delta == 0 else f"{'Higher' if worse else 'Lower'} uncertainty"
        self.tiles["perplexity"].set_value(
            signed(delta),
            caption,
            "Perplexity of the steered text minus that of the unsteered text, both under the "
            f"unsteered model {n}: "
            f"{significant(measured.get('perplexity'), 4)} − "
            f"{significant(measured.get('perplexity_unsteered'), 4)}."
            if measured
            else "Perplexity of the steered text minus that of the unsteered text, both under the "
            "unsteered model.",
        )
        self.tiles["similarity"].set_value(
            share(measured.get("similarity")),
            tooltip="Cosine of the two texts' word counts; 100 % for the same words as often.",
        )
        self.tiles["overlap"].set_value(
            share(measured.get("word_overlap")),
            tooltip="Words that both texts have, of all words that either has (Jaccard).",
        )

    def _on_shade_toggled(self, checked: bool) -> None:
        if self._shown is not None:
            self._show_result(self._shown)

    # --- history --------------------------------------------------------------------------------

    def history_rows(self) -> list[HistoryRow]:
        places = (self._history_place.itemAt(i) for i in range(self._history_place.count()))
        widgets = (place.widget() for place in places)
        return [widget for widget in widgets if isinstance(widget, HistoryRow)]

    def _show_history(self) -> None:
        generations = self.presenter.history()
        clear(self._history_place)
        for generation in generations:
            current = self._shown is not None and self._shown.id == generation.id
            line = HistoryRow(generation, current)
            line.opened.connect(self.reopen)
            self._history_place.addWidget(line)
        self.history.set_count(len(generations))
        self.history.setVisible(bool(generations))

    def reopen(self, generation_id: int) -> None:
        """Bring back an earlier generation: its form, its features, its result."""
        generation = self.presenter.generation(generation_id)
        if generation is None or self.busy:
            return
        request = generation.request
        self.prompt.setPlainText(request["prompt"])
        self.temperature.setValue(request["temperature"])
        self.top_p.setValue(request["top_p"])
        self.max_tokens.setValue(request["max_new_tokens"])
        self.seed.setValue(request["seed"])
        self.chat.setChecked(bool(request["chat"]))
        self.presenter.set_selected(request["features"])
        clear(self._error_place)
        self._show_result(generation)
        self._show_history()
        self._page.ensureWidgetVisible(self.steered)


def _where(first_difference: int | None) -> str:
    """Where two texts part."""
    if first_difference is None:
        return "The same text in both."
    if first_difference == 0:
        return "Different from the first token on."
    if first_difference == 1:
        return "The first token is the same in both."
    return f"The first {formatting.count(first_difference)} tokens are the same in both."


def _details(generation: Generation, variant: dict[str, Any]) -> str:
    """Small print: what was asked, and the measures that have no tile."""
    request, result = generation.request, generation.result
    parts = [
        features_text(request["features"]),
        f"together {significant(variant['percent_of_norm'])} % of the layer's median norm",
        f"perplexity ratio {significant(variant['perplexity_ratio'])}",
        f"distinct bigrams {share(variant['distinct_2'])} "
        f"(unsteered {share(variant['distinct_2_unsteered'])})",
        f"{formatting.number(result['tokens_per_second'], 0)} tokens/s in {result['precision']}",
    ]
    return " • ".join(parts)
