"""The folded part of the form: sampling, where and when steering acts, what is compared."""

from __future__ import annotations

from PySide6.QtCore import Qt, Signal
from PySide6.QtWidgets import QGridLayout, QHBoxLayout, QWidget

from mistudio.ui.steering.layer_strengths import LayerShare, LayerStrengths
from mistudio.ui.steering.request import SCOPES, Form
from mistudio.ui.steering.strengths import Multipliers
from mistudio.ui.steering.token_picker import TokenPicker
from mistudio.ui.steering.units import NOTHING
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import (
    Choice,
    Collapsible,
    FloatBox,
    FormRow,
    IntBox,
    LayerGrid,
    Text,
    Toggle,
    add,
    column,
    row,
)

OWN, SPREAD = "own", "spread"
_PLACES = (
    (OWN, "Each feature at its own layer"),
    (SPREAD, "One vector at chosen layers"),
)


class Advanced(Collapsible):
    """Everything of the form that the first view does not ask; `changed` after every edit."""

    changed = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__("Advanced", parent=parent)
        self._restoring = False
        self._left, self._right = column(), column()
        sides = row(self._left, self._right, spacing=2 * tokens.CARD_PADDING)
        sides.setStretch(0, 1)
        sides.setStretch(1, 1)
        self.add(sides)
        self._add_sampling()
        self._add_comparison()
        self._add_places()
        for side in (self._left, self._right):
            side.addStretch(1)
        self.setObjectName("steering_advanced")

    def _add_sampling(self) -> None:
        self.top_p = FloatBox(1.0, 0.01, 1.0, 0.05, 2)
        self.top_k = IntBox(0, 0, 1000)
        self.penalty = FloatBox(1.0, 0.5, 2.0, 0.05, 2)
        self.seed = IntBox(0, 0, 2**31 - 1)
        self.chat = Toggle("Chat format")
        self.chat_note = Text("", "helper", wrap=True)
        grid = QGridLayout()
        grid.setHorizontalSpacing(tokens.GAP)
        grid.setVerticalSpacing(12)
        for place, (name, box, tip) in enumerate(
            (
                ("Top-p", self.top_p, "Draw only from the likeliest tokens that reach this share"),
                ("Top-k", self.top_k, "Draw only from this many of the likeliest tokens; 0: all"),
                (
                    "Repetition Penalty",
                    self.penalty,
                    "Above 1, tokens that stood before become less likely; 1 changes nothing",
                ),
                ("Seed", self.seed, "The same seed gives the same text; all texts share it"),
            )
        ):
            box.setToolTip(tip)
            box.valueChanged.connect(self._on_changed)
            grid.addWidget(FormRow(name, box), place // 2, place % 2)
        grid.setColumnStretch(0, 1)
        grid.setColumnStretch(1, 1)
        self.chat.toggled.connect(self._on_changed)
        add(self._left, grid, _switch(self.chat, "Chat format", self.chat_note))

    def _add_places(self) -> None:
        self.place = Choice(_PLACES)
        self.place.currentIndexChanged.connect(self._on_place_changed)
        self.place.setToolTip(
            "One vector: the sum of the added features acts after each chosen block, at the same "
            "share of that layer's median norm, divided by the root of their number"
        )
        self.layers = LayerGrid(label="Intervention Layers")
        self.layers.changed.connect(self._on_changed)
        self.bars = LayerStrengths()
        self.bars_title = Text("Length added after each block (raw)", "label")
        self.bars_title.setToolTip(self.bars.toolTip())
        self.bars_note = Text(
            f"Lengths shown as {NOTHING} are known after the next generation.", "helper", wrap=True
        )
        self.scope = Choice(SCOPES)
        self.scope.setToolTip("The first token and special tokens are never steered")
        self.scope.currentIndexChanged.connect(self._on_scope_changed)
        self.picker = TokenPicker()
        self.picker.changed.connect(self._on_changed)
        self.keep_norm = Toggle("Keep the norm")
        self.keep_norm.toggled.connect(self._on_changed)
        keep = Text("Every changed activation gets its former length back", "helper", wrap=True)
        add(
            self._right,
            FormRow("Where", self.place),
            self.layers,
            self.bars_title,
            self.bars,
            self.bars_note,
            FormRow("At which tokens", self.scope),
            self.picker,
            _switch(self.keep_norm, "Keep norm", keep),
        )
        self._show_places()

    def _add_comparison(self) -> None:
        self.scales = Multipliers()
        self.scales.changed.connect(self._on_changed)
        self.control = Toggle("Random direction as control")
        self.control.toggled.connect(self._on_changed)
        note = Text("One more text: a change of the same size, somewhere random", "helper")
        note.setWordWrap(True)
        add(self._left, self.scales, _switch(self.control, "Random control", note))

    # --- values ---------------------------------------------------------------------------------

    def fill(self, form: Form) -> Form:
        """The form with what is set here."""
        spread = self.place.value == SPREAD
        return Form(
            prompt=form.prompt,
            temperature=form.temperature,
            max_tokens=form.max_tokens,
            top_p=round(self.top_p.value(), 2),
            top_k=self.top_k.value(),
            repetition_penalty=round(self.penalty.value(), 2),
            seed=self.seed.value(),
            chat=self.chat.isChecked() and self.chat.isEnabled(),
            scales=self.scales.values,
            scope=str(self.scope.value),
            positions=self.picker.positions,
            layers=tuple(self.layers.selected()) if spread else None,
            keep_norm=self.keep_norm.isChecked(),
            control=self.control.isChecked(),
        )

    def show_form(self, form: Form) -> None:
        self._restoring = True
        self.top_p.setValue(form.top_p)
        self.top_k.setValue(form.top_k)
        self.penalty.setValue(form.repetition_penalty)
        self.seed.setValue(form.seed)
        self.chat.setChecked(form.chat)
        self.scales.set_values(form.scales)
        self.scope.set_value(form.scope)
        self.picker.set_positions(form.positions)
        self.place.set_value(OWN if form.layers is None else SPREAD)
        if form.layers is not None:
            self.layers.set_selected(form.layers)
        self.keep_norm.setChecked(form.keep_norm)
        self.control.setChecked(form.control)
        self._restoring = False
        self._on_changed()

    def show_model(self, n_layers: int, layer: int) -> None:
        """Another model: its layers, of which the SAE's own is chosen at first."""
        if self.layers.n_layers != n_layers:
            self.layers.set_n_layers(n_layers)
        if not self.layers.selected() and 0 <= layer < n_layers:
            self.layers.set_selected([layer])

    def show_shares(self, found: list[LayerShare]) -> None:
        """How much of the vector each chosen layer gets."""
        self.bars.show_shares(found)
        unknown = any(share.raw is None for share in found)
        self.bars_note.setVisible(unknown and self.place.value == SPREAD)

    def show_chat(self, possible: bool) -> None:
        self.chat.setEnabled(possible)
        self.chat_note.setText(
            "The prompt is a user's message" if possible else "This model has no chat template"
        )

    def _on_changed(self, *_: object) -> None:
        if self._restoring:
            return
        self._show_places()
        self.changed.emit()

    def _on_place_changed(self, index: int) -> None:
        self._on_changed()

    def _on_scope_changed(self, index: int) -> None:
        self._on_changed()

    def _show_places(self) -> None:
        spread = self.place.value == SPREAD
        self.layers.setVisible(spread)
        self.bars.setVisible(spread)
        self.bars_title.setVisible(spread)
        self.bars_note.setVisible(spread and any(share.raw is None for share in self.bars.shown))
        self.picker.setVisible(self.scope.value == "chosen")


def _switch(toggle: Toggle, name: str, note: Text) -> QHBoxLayout:
    label = Text(name, "label")
    label.setBuddy(toggle)
    texts = column(0)
    texts.addWidget(label)
    texts.addWidget(note)
    line = row(toggle, texts)
    line.setStretch(1, 1)
    line.setAlignment(toggle, Qt.AlignmentFlag.AlignTop)
    return line
