"""The texts beside each other, what their marks mean, and what the steering changed in numbers."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtWidgets import QWidget

from mistudio import formatting
from mistudio.library.records import Generation
from mistudio.settings import Settings
from mistudio.ui.steering.comparison import runs
from mistudio.ui.steering.measures import Measures
from mistudio.ui.steering.panes import HeatLegend, PaneGrid, Shades, TextPane
from mistudio.ui.steering.request import names
from mistudio.ui.widgets import Text, Toggle, column, row

_MARKS = (
    "Grey: the same in both. Overlined: the first token that differs. Underlined: words that the "
    "other text does not have."
)


class Output(QWidget):
    """One generation: streaming, finished, or none yet."""

    def __init__(self, settings: Settings, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._settings = settings
        self.grid = PaneGrid()
        self.legend = Text(_MARKS, "helper", wrap=True)
        self.heat = HeatLegend()
        self.shade = Toggle("Shade each steered token by its KL divergence")
        self.shade.toggled.connect(self._on_shade_toggled)
        label = Text("Shade tokens by KL", "label")
        label.setBuddy(self.shade)
        self.under = QWidget()
        line = row(self.legend, self.heat, label, self.shade)
        line.setStretch(0, 1)
        self.under.setLayout(line)
        self.measures = Measures()
        self.measures.shown_changed.connect(self._on_measures_shown_changed)
        self.outdated = Text("", "small", "yellow", wrap=True)
        self.outdated.hide()
        texts = column(12)
        texts.addWidget(self.outdated)
        texts.addWidget(self.grid)
        texts.addWidget(self.under)
        layout = column(24)
        layout.addLayout(texts)
        layout.addWidget(self.measures)
        self.setLayout(layout)
        self.shown: Generation | None = None
        self.show_generation(None)

    @property
    def unsteered(self) -> TextPane:
        return self.grid.panes[0]

    @property
    def steered(self) -> TextPane:
        return self.grid.panes[1]

    def begin(self, titles: Sequence[str]) -> None:
        """A generation was asked for: empty panes of these names."""
        self.show_generation(None)
        self.show_outdated("")
        self.grid.set_names(titles)
        self.say("Waiting for the first token…")

    def say(self, placeholder: str) -> None:
        for pane in self.grid.panes:
            pane.set_text(pane.text, placeholder)

    def show_outdated(self, features: str) -> None:
        """The features of a result that was made with other settings than those that are set;
        empty: it was made with these."""
        self.outdated.setText(
            f"Made with other settings than those above ({features}). Generate to see theirs."
            if features
            else ""
        )
        self.outdated.setVisible(bool(features))

    def stream(self, texts: Sequence[str]) -> None:
        """All rows so far, unsteered first."""
        if len(texts) == len(self.grid.panes):
            for pane, text in zip(self.grid.panes, texts, strict=True):
                pane.set_text(text, "Waiting for the first token…")

    def show_generation(self, generation: Generation | None) -> None:
        """Texts and measures of a generation; None: there is none."""
        self.shown = generation
        titles = names(generation.request) if generation else ["Steered"]
        if generation is not None:
            self.grid.set_names(titles)
        self.measures.show_generation(generation, titles)
        self.under.setVisible(generation is not None)
        if generation is None:
            for pane in self.grid.panes:
                pane.set_text("")
        else:
            self._show_texts(0)

    def _show_texts(self, compared: int) -> None:
        """Steered texts against the unsteered one, and that against one of them."""
        assert self.shown is not None
        result = self.shown.result
        variants = result["variants"]
        most = max((max(v["kl_by_token"], default=0.0) for v in variants), default=0.0)
        shading = self.shade.isChecked() and most > 0
        colours = self._settings.get("token_colours")
        self.heat.set_scale(most, colours)
        self.heat.setVisible(shading)
        before, pieces = result["unsteered"], result["unsteered_pieces"]
        for number, (pane, variant) in enumerate(zip(self.grid.panes[1:], variants, strict=True)):
            first, after = variant["first_difference"], variant["text"]
            if number == compared:
                parts = runs(before, after, pieces, first)
                self.unsteered.set_runs(before, parts, _where(first), first)
            shades = Shades(variant["kl_by_token"], most, colours) if shading else None
            parts = runs(after, before, variant["pieces"], first)
            pane.set_runs(after, parts, _where(first), first, shades)

    def _on_measures_shown_changed(self, number: int) -> None:
        if self.shown is not None:
            self._show_texts(number)

    def _on_shade_toggled(self, checked: bool) -> None:
        if self.shown is not None:
            self._show_texts(int(self.measures.which.value or 0))


def _where(first_difference: int | None) -> str:
    """Where two texts part."""
    if first_difference is None:
        return "The same text in both."
    if first_difference == 0:
        return "Different from the first token on."
    if first_difference == 1:
        return "The first token is the same in both."
    return f"The first {formatting.count(first_difference)} tokens are the same in both."
