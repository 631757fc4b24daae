"""The Logit Lens tab: what the feature's direction says about the next token by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from PySide6.QtWidgets import QGridLayout, QHBoxLayout, QWidget

from mistudio import formatting
from mistudio.engine.features.columns import BY_NAME
from mistudio.jobs.feature_windows import LogitChange, logit_change
from mistudio.ui.features.dialog.charts import BarList, BarRow, HistogramCard
from mistudio.ui.features.dialog.reading import Lens, Shown
from mistudio.ui.features.dialog.tab import FeatureTab, method, problem, scrolled, sentence
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import Button, Choice, EmptyState, StatTile, Text, clear, column, row
from mistudio.ui.widgets.token_strip import shown as written

MOMENTS = (
    ("logit_std", "Deviation", "emerald", "how much it says directly"),
    ("logit_skewness", "Skewness", "blue", "above 0: promotes a few"),
    ("logit_kurtosis", "Excess kurtosis", "purple", "large: few tokens stand out"),
    ("logit_top_gap", "Gap", "yellow", "ten most promoted, deviations"),
)
METHOD = (
    "The feature's decoder direction times the gain of the model's final norm, through the "
    "unembedding, less its mean over the vocabulary. This is the direct path only: what later "
    "layers make of the feature is not in it (Ablation measures that). The scale is relative, as "
    "the final norm divides by the size of the stream at each token; choose an example below for "
    "the change in logits there."
)
EXAMPLES = 20


class LogitLensTab(FeatureTab):
    def build(self) -> None:
        self.promoted = BarList("Promoted tokens", "emerald")
        self.suppressed = BarList("Suppressed tokens", "red")
        self.tiles = {
            name: StatTile(label, role=role, note=note, tooltip=BY_NAME[name].definition)
            for name, label, role, note in MOMENTS
        }
        self.histogram = HistogramCard("Logits over the vocabulary")
        self.sides = QGridLayout()
        self.sides.setHorizontalSpacing(32)
        self.sides.setVerticalSpacing(6)
        for place, (title, bars) in enumerate(
            (("Promoted", self.promoted), ("Suppressed", self.suppressed))
        ):
            self.sides.addWidget(Text(title, "label"), 0, place)
            self.sides.addWidget(bars, 1, place)
            self.sides.setColumnStretch(place, 1)
        self.example = Choice()
        self.example.setAccessibleName("Example")
        self.example.setMinimumContentsLength(44)
        self.compute = Button("Compute its change of the logits", "secondary", "zap")
        self.compute.setToolTip("Runs the model over the example's context, in the background")
        self.compute.clicked.connect(self._on_compute_clicked)
        self.told = Text("", "helper", wrap=True)
        self.raised = BarList("Logits raised at the example", "emerald")
        self.lowered = BarList("Logits lowered at the example", "red")
        self._change = QWidget()
        change = QHBoxLayout(self._change)
        change.setContentsMargins(0, 0, 0, 0)
        change.setSpacing(32)
        change.addWidget(self.raised, 1)
        change.addWidget(self.lowered, 1)
        tiles = row(*self.tiles.values(), spacing=12)
        for place in range(len(self.tiles)):
            tiles.setStretch(place, 1)
        at = column(8)
        at.addWidget(Text("At one example", "card"))
        at.addLayout(row(self.example, self.compute, None, spacing=8))
        at.addWidget(self.told)
        at.addWidget(self._change)
        self._at = QWidget()
        self._at.setLayout(at)
        self._problem = column(0)
        lead = Text(
            "If this feature alone determined the next token, these would be most and least "
            "likely:",
            "small",
            wrap=True,
        )
        self._content = QWidget()
        body = column(16)
        body.addWidget(lead)
        body.addLayout(self.sides)
        body.addLayout(tiles)
        body.addWidget(self.histogram)
        body.addWidget(self._at)
        body.addWidget(method(METHOD))
        self._content.setLayout(body)
        layout = column(0)
        layout.addWidget(scrolled(self._problem, self._content))
        self.setLayout(layout)
        self._shown: tuple[Shown, ...] = ()

    def show_feature(self) -> None:
        clear(self._problem)
        self._content.hide()
        self._change.hide()
        self.told.setText(
            "Scaled by the example's activation and by what the final norm divides by there: "
            "the direct change of the logits, in logits."
        )
        feature, reading = self.feature, self.dialog.reading
        self.in_background(
            lambda: (reading.lens(feature), reading.top(feature, 0, EXAMPLES)),
            self._on_read,
            self._on_failed,
        )

    def _on_read(self, found: tuple[Lens, tuple[Shown, ...]]) -> None:
        lens, self._shown = found
        if not lens.promoted:
            self._problem.addWidget(
                EmptyState(
                    "unlink",
                    "The logit lens does not fit this SAE.",
                    helper="It does not write to the residual stream. Its ablation shows what it "
                    "does to the model's predictions.",
                )
            )
            return
        self._content.show()
        show_tokens(self.promoted, lens.promoted, "relative logit")
        show_tokens(self.suppressed, lens.suppressed, "relative logit")
        self._show_moments()
        self._show_histogram(lens)
        self.example.set_options(
            [(number, self._named(number, one)) for number, one in enumerate(self._shown)]
        )
        self._at.setVisible(bool(self._shown))

    def _named(self, number: int, example: Shown) -> str:
        peak = written(example.line.texts[example.line.peak]).strip()
        value = formatting.number(example.activation, 2)
        return f"Example #{number + 1}: “{peak}”, activation {value}"

    def _show_moments(self) -> None:
        for name, tile in self.tiles.items():
            tile.set_value(formatting.number(self.value(name), 3 if name == "logit_std" else 2))

    def _show_histogram(self, lens: Lens) -> None:
        self.histogram.setVisible(lens.counts is not None)
        if lens.counts is None:
            return
        n = int(lens.counts.sum())
        self.histogram.set_bars(
            np.linspace(lens.low, lens.high, len(lens.counts) + 1),
            lens.counts,
            "tokens",
            lambda value: f"{value:.3g}",
            unit="logit",
            note=f"All {formatting.count(n)} tokens of the vocabulary by their relative logit, in "
            f"{len(lens.counts)} bins of equal width; red: below the mean.",
            below_zero=tokens.RED,
        )

    def _on_compute_clicked(self, checked: bool = False) -> None:
        if self.example.value is None:
            return
        example = self._shown[self.example.value]
        library, run, feature = self.services.library, self.dialog.run, self.feature
        self.compute.setEnabled(False)
        self.told.setText("Running the model over its context…")
        activation = float(example.activation or 0.0)
        self.in_background(
            lambda: (
                example,
                logit_change(library, run, feature, example.window, example.position, activation),
            ),
            self._on_computed,
            self._on_compute_failed,
        )

    def _on_computed(self, found: tuple[Shown, LogitChange]) -> None:
        example, change = found
        self.compute.setEnabled(True)
        piece = self.dialog.reading.piece
        show_tokens(self.raised, [(piece(i), i, v) for i, v in change.raised], "logits")
        show_tokens(self.lowered, [(piece(i), i, v) for i, v in change.lowered], "logits")
        self._change.show()
        word = written(example.line.texts[example.line.peak]).strip()
        self.told.setText(
            f"At “{word}” the activation of {formatting.number(change.activation, 3)} changes the "
            "logits of the next token by this much directly (the final norm divides by "
            f"{formatting.number(change.rms, 2)} there, held fixed; n = 1 token)."
        )

    def _on_compute_failed(self, error: Exception) -> None:
        self.compute.setEnabled(True)
        self.told.setText(sentence(error))

    def _on_failed(self, error: Exception) -> None:
        self._problem.addWidget(problem(error))


def show_tokens(bars: BarList, pairs: Any, unit: str) -> None:
    """`pairs`: (text, id, value), strongest first."""
    most = max((abs(value) for _, _, value in pairs), default=1.0) or 1.0
    bars.set_rows(
        [
            BarRow(
                f"“{written(text)}”",
                f"{'+' if value > 0 else '−'}{formatting.number(abs(value), 3)}",
                abs(value) / most,
                f"Token “{written(text)}” (ID {token})\n{value:+.4f} {unit}",
            )
            for text, token, value in pairs
        ]
    )
