"""What steering changed, in numbers: four tiles, a table for several texts, warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PySide6.QtCore import Qt, Signal
from PySide6.QtWidgets import QGridLayout, QWidget

from mistudio import formatting
from mistudio.library.records import Generation
from mistudio.ui.steering.request import features_text
from mistudio.ui.steering.units import NOTHING, exists, share, signed, significant
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import Card, Choice, StatTile, Surface, Text

KL_TIP = (
    "Mean of KL(steered ‖ unsteered) over {n} generated tokens: both distributions on the steered "
    "text's own prefix, at temperature 1, in nats."
)
PERPLEXITY_TIP = (
    "Perplexity of the steered text ({n} tokens) minus that of the unsteered text, both under the "
    "unsteered model."
)
SIMILARITY_TIP = (
    "Cosine of the two texts' word counts ({n} steered tokens); 100 % for the same words as often."
)
OVERLAP_TIP = "Words that both texts have, of all words of both ({n} steered tokens; Jaccard)."
DISTINCT_TIP = (
    "Share of the pairs of neighbours among {n} tokens that are different from each other; low "
    "means repetition."
)
REPEATED_TIP = "Share of the runs of four among {n} tokens that stood in the text before."
REACTIVATION_TIP = (
    "Mean activation over the steered text's {n} tokens when the model reads it unsteered: a "
    "text that says what the feature stands for activates it anew, one that only broke does not.\n"
    "Effectiveness, 0 to 1: harmonic mean of that gain in shares of the maximum, distinct-2 and "
    "3 ÷ perplexity ratio, each at most 1 (after AxBench)."
)
# Below these parts of the unsteered text's distinct bigrams a text is called out.
_WEAK, _BROKEN = 0.85, 0.70
_LONG_RUN = 8

DETAILS_TIP = (
    "Median norm: of the layer's activations, where the features act.\n"
    "Perplexity ratio: of the steered text to the unsteered one, both under the unsteered model.\n"
    "Distinct-2: " + DISTINCT_TIP
)
_COLUMNS = (
    ("Text", ""),
    ("KL (nats/token)", KL_TIP),
    ("Perplexity Δ", PERPLEXITY_TIP),
    ("Similarity", SIMILARITY_TIP),
    ("Word Overlap", OVERLAP_TIP),
    ("Distinct-2", DISTINCT_TIP),
    ("Repeated 4-grams", REPEATED_TIP),
)


def perplexity_delta(variant: Mapping[str, Any]) -> float | None:
    after, before = variant.get("perplexity"), variant.get("perplexity_unsteered")
    return None if after is None or before is None else after - before


def repetition_warning(variant: Mapping[str, Any]) -> str:
    """A sentence where the text repeats itself; empty where it does not."""
    now, before = variant.get("distinct_2"), variant.get("distinct_2_unsteered")
    run = variant.get("longest_run") or 0
    if run >= _LONG_RUN:
        return f"It breaks: one token stands {run} times in a row. Use less strength."
    if now is None or before is None or not exists(now) or not before:
        return ""
    told = f"{share(now)} of its token pairs are distinct, {share(before)} of the unsteered text's"
    if now < _BROKEN * before:
        return f"It repeats itself: {told}. Use less strength."
    return f"It repeats itself somewhat: {told}." if now < _WEAK * before else ""


class Measures(Card):
    """Of one steered text at a time; `shown_changed` tells which, where there are several."""

    shown_changed = Signal(int)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__("Comparison Metrics", "git-compare", parent=parent)
        self.which = Choice()
        self.which.setAccessibleName("Text to measure and compare")
        self.which.setMinimumContentsLength(22)
        self.which.currentIndexChanged.connect(self._on_which_changed)
        self.add_to_header(self.which)
        self.tiles = {
            "kl": StatTile("KL Divergence", role="purple", note="nats per token"),
            "perplexity": StatTile("Perplexity Δ", role="emerald", note="of the steered text"),
            "similarity": StatTile("Similarity", role="blue", note="Cosine similarity"),
            "overlap": StatTile("Word Overlap", role="emerald", note="Shared words"),
        }
        tiles = QGridLayout()
        tiles.setSpacing(tokens.GAP)
        for place, tile in enumerate(self.tiles.values()):
            tiles.addWidget(tile, 0, place)
            tiles.setColumnStretch(place, 1)
        self.warning = Text("", "small", "yellow", wrap=True)
        self._cells: dict[tuple[int, int], Text] = {}  # by line and place, the headings in line 0
        self._table_place = QGridLayout()
        self._table_place.setHorizontalSpacing(24)
        self._table_place.setVerticalSpacing(6)
        self.table = Surface("tile", None, 14)
        self.table.add(self._table_place)
        self.details = Text("", "helper", wrap=True)
        self.reactivation = Text("", "helper", wrap=True)
        self.add(tiles, self.warning, self.table, self.reactivation, self.details)
        self.show_generation(None)

    def show_generation(self, generation: Generation | None, names: Sequence[str] = ()) -> None:
        variants = generation.result["variants"] if generation else []
        was_blocked = self.which.blockSignals(True)
        self.which.set_options(list(enumerate(names)))
        self.which.set_value(0)
        self.which.blockSignals(was_blocked)
        self.which.setVisible(len(variants) > 1)
        self._show_table(variants, names)
        self._generation = generation
        self.show_variant(0)

    def show_variant(self, number: int) -> None:
        generation = self._generation
        variant = generation.result["variants"][number] if generation else None
        self._show_tiles(variant or {})
        warning = repetition_warning(variant) if variant else ""
        self.warning.setText(f"⚠ {warning}" if warning else "")
        self.warning.setVisible(bool(warning))
        n = variant["tokens"] if variant else "all"
        self.reactivation.setToolTip(REACTIVATION_TIP.format(n=n))
        self.details.setToolTip(DETAILS_TIP.format(n=n) if variant else "")
        again = _reactivation_text(variant) if variant else ""
        self.reactivation.setText(again)
        self.reactivation.setVisible(bool(again))
        self.say(_details(generation, variant) if generation and variant else "")

    def say(self, text: str) -> None:
        self.details.setText(text)
        self.details.setVisible(bool(text))

    def _on_which_changed(self, index: int) -> None:
        self.show_variant(index)
        self.shown_changed.emit(index)

    def _show_tiles(self, measured: Mapping[str, Any]) -> None:
        n = formatting.count(measured["tokens"]) if measured else "all"
        delta = perplexity_delta(measured)
        worse = delta is not None and delta > 0
        self.tiles["kl"].set_value(
            significant(measured.get("kl_per_token")), tooltip=KL_TIP.format(n=n)
        )
        self.tiles["perplexity"].set_role("red" if worse else "emerald")
        caption = "of the steered text"
        if delta is not None and exists(delta):
            caption = "No change" if delta == 0 else f"{'Higher' if worse else 'Lower'} uncertainty"
        parts = (
            f"\n{significant(measured.get('perplexity'), 4)} − "
            f"{significant(measured.get('perplexity_unsteered'), 4)}"
        )
        self.tiles["perplexity"].set_value(
            signed(delta), caption, PERPLEXITY_TIP.format(n=n) + (parts if measured else "")
        )
        for name, measure, tip in (
            ("similarity", "similarity", SIMILARITY_TIP),
            ("overlap", "word_overlap", OVERLAP_TIP),
        ):
            self.tiles[name].set_value(share(measured.get(measure)), None, tip.format(n=n))

    def _show_table(self, variants: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
        """Cells are made once and then only told what to say: new ones would take longer to style
        than a frame of the window lasts."""
        self.table.setVisible(len(variants) > 1)
        if len(variants) <= 1:
            return
        for place, (heading, tip) in enumerate(_COLUMNS):
            self._put(0, place, heading, tip.format(n="all"))
        for line, (name, variant) in enumerate(zip(names, variants, strict=True), 1):
            values = (
                significant(variant.get("kl_per_token")),
                signed(perplexity_delta(variant)),
                share(variant.get("similarity")),
                share(variant.get("word_overlap")),
                share(variant.get("distinct_2")),
                share(variant.get("repetition_4")),
            )
            warned = repetition_warning(variant)
            self._put(line, 0, f"⚠ {name}" if warned else name, warned)
            for place, value in enumerate(values, 1):
                self._put(line, place, value, _COLUMNS[place][1].format(n=variant["tokens"]))
        for (line, _), cell in self._cells.items():
            cell.setVisible(line <= len(variants))

    def _put(self, line: int, place: int, text: str, tip: str) -> None:
        cell = self._cells.get((line, place))
        if cell is None:
            cell = self._cells[line, place] = Text("", "small" if line else "helper")
            side = Qt.AlignmentFlag.AlignLeft if place == 0 else Qt.AlignmentFlag.AlignRight
            self._table_place.addWidget(cell, line, place, side)
            self._table_place.setColumnStretch(place, 2 if place == 0 else 1)
        cell.setText(text)
        cell.setToolTip(tip)


def _details(generation: Generation, variant: Mapping[str, Any]) -> str:
    """Small print: what was asked, and the measures that have no tile."""
    request, result = generation.request, generation.result
    percent = variant.get("percent_of_norm")
    strength = f"{significant(percent)} %" if percent is not None else NOTHING
    parts = [
        features_text(request),
        f"together {strength} of the layer's median norm",
        f"perplexity ratio {significant(variant.get('perplexity_ratio'))}",
        f"distinct-2 {share(variant.get('distinct_2'))} "
        f"(unsteered {share(variant.get('distinct_2_unsteered'))})",
        f"{formatting.number(result['tokens_per_second'], 0)} tokens/s in {result['precision']}",
    ]
    if not result.get("together", True):
        parts.append("one after another, as memory was short")
    return " • ".join(parts)


def _reactivation_text(variant: Mapping[str, Any]) -> str:
    """How active each feature is where the unsteered model reads the steered text."""
    told = []
    for entry in variant.get("features", ()):
        now = _of_max(entry, "reactivation")
        before = _of_max(entry, "reactivation_unsteered")
        told.append(f"#{entry['feature']} {share(now)} of its max (unsteered {share(before)})")
    if not told:
        return ""
    score = significant(variant.get("effectiveness"), 2)
    return f"Re-activation: {', '.join(told)} • effectiveness {score}"


def _of_max(entry: Mapping[str, Any], name: str) -> float | None:
    value, most = entry.get(name), entry.get("max_activation")
    return value / most if value is not None and most else None
