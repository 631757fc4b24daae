"""The Ablation tab: what the model loses without the feature, by real forward passes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QGridLayout, QHBoxLayout, QWidget

from mistudio import formatting
from mistudio.jobs.ablation import (
    CONTEXTS,
    CONTROLS,
    KIND,
    MOST_FEATURES,
    SILENT_CONTEXTS,
    ablation_params,
)
from mistudio.jobs.kinds import Ablate
from mistudio.library.jobs import JobRecord
from mistudio.ui.features.dialog.charts import BarList
from mistudio.ui.features.dialog.job_panel import JobPanel, estimate
from mistudio.ui.features.dialog.logit_lens import show_tokens
from mistudio.ui.features.dialog.reading import Shown
from mistudio.ui.features.dialog.strips import LineStrip
from mistudio.ui.features.dialog.tab import FeatureTab, method, problem, scrolled
from mistudio.ui.widgets import Button, Choice, StatTile, Surface, Text, add, clear, column, row
from mistudio.ui.widgets.token_strip import shown as written

MODES = (("zero", "Set it to 0"), ("mean", "Set it to its mean"))
METHOD = (
    "At every token on which the feature is active, its part (activation times decoder direction) "
    "is taken out of the layer's output; everything else, the SAE's own error included, stays. "
    "The same amounts are taken out along random directions of equal length at the same tokens "
    "for comparison. The texts hold the feature's examples, so the numbers say what it does where "
    "it fires, not how often. ± and intervals: 95 %, bootstrap over contexts."
)
SIMILAR = 3.0  # times more or less frequent
LEAST_OTHERS = 5
OTHERS = 10
ZOOM = 8
PLACES = 6

Result = dict[str, Any]


class AblationTab(FeatureTab):
    def build(self) -> None:
        self.mode = Choice(MODES)
        self.mode.setAccessibleName("How it is taken away")
        self.mode.setMinimumContentsLength(16)
        self.mode.currentIndexChanged.connect(self._on_mode_changed)
        self.panel = JobPanel(
            self.services, "Measure", "zap", "ablate", self._is_mine, self._make_job
        )
        self.sentence = Text("", "body", wrap=True)
        self.tiles = {
            "loss": StatTile("Loss where it fires", role="red"),
            "perplexity": StatTile("Perplexity Change", role="purple"),
            "changed": StatTile("Predictions changed", role="yellow"),
            "impact": StatTile("Impact among others", role="emerald"),
        }
        tiles = row(*self.tiles.values(), spacing=12)
        for place in range(len(self.tiles)):
            tiles.setStretch(place, 1)
        self._table = QGridLayout()
        self._table.setHorizontalSpacing(24)
        self._table.setVerticalSpacing(8)
        table = Surface("row", None, 14)
        table.add(self._table)
        self.raised = BarList("Tokens that become more likely", "emerald")
        self.lowered = BarList("Tokens that become less likely", "red")
        sides = QHBoxLayout()
        sides.setSpacing(32)
        for title, bars in (
            ("More likely without it", self.raised),
            ("Less likely without it", self.lowered),
        ):
            part = column(6)
            part.addWidget(Text(title, "label"))
            part.addWidget(bars)
            part.addStretch(1)
            sides.addLayout(part, 1)
        self._sides_note = Text("", "helper", wrap=True)
        self._places = column(8)
        self.compare = Button("Measure others like it", "small", "git-compare")
        self.compare.setToolTip(
            f"Ablates {OTHERS} other features of similar density, so that there is something to "
            "compare with"
        )
        self.compare.clicked.connect(self._on_compare_clicked)
        self._detail = QWidget()
        detail = column(14)
        add(detail, sides, self._sides_note, self._places)
        self._detail.setLayout(detail)
        self._content = QWidget()
        body = column(16)
        body.addWidget(self.sentence)
        body.addLayout(tiles)
        body.addWidget(table)
        body.addWidget(self._detail)
        self._content.setLayout(body)
        self._problem = column(0)
        head = row(Text("Impact of removing this feature on the model's predictions", "small"),
                   None, self.compare, self.mode, spacing=8)  # fmt: skip
        layout = column(0)
        layout.addWidget(scrolled(head, self.panel, self._problem, self._content, method(METHOD)))
        self.setLayout(layout)
        self.result: Result | None = None
        self.services.changes.changed.connect(self._on_changes_changed)

    def show_feature(self) -> None:
        self.result = None
        self._content.hide()
        self.panel.refresh()
        self._read()

    @property
    def params(self) -> dict[str, Any]:
        return ablation_params(self.mode.value)

    def _read(self) -> None:
        clear(self._problem)
        library, run, feature = self.services.library, self.dialog.run, self.feature
        params, reading = self.params, self.dialog.reading
        density = np.asarray(self.dialog.columns.values["density"])

        def read() -> tuple[Result | None, dict[int, Result], list[Shown]]:
            kept = library.feature_analyses.of_run(run.id, KIND)
            own = library.feature_analyses.get(run.id, feature, KIND, params)
            places = own["places"][:PLACES] if own else []
            lines = [reading.context_line(p["window"], p["position"]) for p in places]
            return own, similar(kept, feature, params, density), lines

        self.in_background(read, self._on_read, self._on_failed)

    def _on_read(self, found: tuple[Result | None, dict[int, Result], list[Shown]]) -> None:
        self.result, others, lines = found
        result = self.result
        self._content.setVisible(result is not None)
        self.compare.setVisible(result is not None and not result["silent"])
        if result is None:
            self.panel.set_title("Measure", "primary")
            self.panel.set_estimate(self._estimate(others))
            return
        self.panel.set_title("Measure again", "small")
        seconds = formatting.duration(result["seconds"])
        self.panel.set_estimate(
            f"Measured in {seconds} on {result['contexts']} contexts of {result['context']} tokens "
            f"({str(result['precision']).upper()})."
        )
        self.sentence.setText(sentence_of(result))
        self._show_tiles(result, others)
        self._show_table(result)
        self._detail.setVisible(bool(result["raised"]))
        self._show_tokens(result)
        self._show_places(result, lines)

    def _estimate(self, others: dict[int, Result]) -> str:
        if not self.value("density"):
            return f"It never fired: {SILENT_CONTEXTS} contexts spread over the text are tried."
        what = f"{CONTEXTS} contexts that hold its examples, {CONTROLS} random directions."
        if others:
            times = sorted(float(other["seconds"]) for other in others.values())
            middle = formatting.duration(times[len(times) // 2])
            return f"{what} Others took {middle} here."
        tokens = CONTEXTS * self.dialog.columns.meta.context * (2 + CONTROLS)
        return f"{what} {estimate(self.services.library, self.dialog.run, tokens)}"

    # --- what was measured ----------------------------------------------------------------------

    def _show_tiles(self, result: Result, others: dict[int, Result]) -> None:
        active = result["active"]
        if active is None:
            everywhere = result["everywhere"]
            n = formatting.count(everywhere["tokens"]) if everywhere else "no"
            for name in ("loss", "perplexity", "changed"):
                zero = "0" if everywhere and result["silent"] else "—"
                self.tiles[name].set_value(zero, f"over {n} tokens, exactly" if zero == "0" else "")
            self.tiles["impact"].set_value("—", "nothing to compare")
            return
        own = active["feature"]
        n = f"{formatting.count(own['tokens'])} tokens"
        self.tiles["loss"].set_value(
            signed(own["delta_ce"]["mean"]), f"nats per token {interval(own['delta_ce'])}",
            f"Cross-entropy with the change less that without, mean over {n} in "
            f"{own['contexts']} contexts on which it fires",
        )  # fmt: skip
        before = math.exp(own["ce"])
        after = math.exp(own["ce"] + own["delta_ce"]["mean"])
        self.tiles["perplexity"].set_value(
            signed(after - before, 2),
            f"{formatting.number(before, 1)} to {formatting.number(after, 1)}",
            f"Perplexity of the next token over {n} on which it fires: exp of the mean loss",
        )
        self.tiles["changed"].set_value(
            formatting.percent(own["changed"]["mean"]),
            f"of {n}",
            f"Share of {n} on which another token becomes the most likely next one",
        )
        rank = percentile(result, others)
        self.tiles["impact"].set_value(
            "—" if rank is None else formatting.percent(rank, 0),
            f"{len(others)} similar ones measured",
            f"Share of the other measured features of similar density (within a factor of "
            f"{SIMILAR:g}) whose removal changes predictions less (mean KL on active tokens); "
            f"shown from {LEAST_OTHERS} others on",
        )

    def _show_table(self, result: Result) -> None:
        clear(self._table)
        heads = ("Predictions", "n", "", "Δ loss (nats/token)", "KL (nats/token)", "Changed")
        for place, head in enumerate(heads):
            self._table.addWidget(Text(head, "label"), 0, place)
        line = 1
        for name, title in (
            ("active", "Where it fires"),
            ("following", "Later in the same context"),
        ):
            group = result[name]
            for side, word in (("feature", "this feature"), ("control", "random direction")):
                effect = group[side] if group else None
                first = side == "feature"
                n = formatting.count(effect["tokens"]) if effect else "—"
                self._table.addWidget(Text(title if first else "", "small"), line, 0)
                self._table.addWidget(Text(n if first else "", "mono"), line, 1)
                self._table.addWidget(Text(word, "small" if first else "helper"), line, 2)
                for place, key in enumerate(("delta_ce", "kl", "changed"), 3):
                    told = measured(effect[key], key) if effect else "—"
                    text = Text(told, "mono")
                    text.setAlignment(Qt.AlignmentFlag.AlignLeft)
                    self._table.addWidget(text, line, place)
                line += 1
        everywhere = result["everywhere"]
        self._table.addWidget(Text("All predictions", "small"), line, 0)
        n = formatting.count(everywhere["tokens"]) if everywhere else "—"
        self._table.addWidget(Text(n, "mono"), line, 1)
        self._table.addWidget(Text("this feature", "small"), line, 2)
        for place, key in enumerate(("delta_ce", "kl", "changed"), 3):
            told = measured(everywhere[key], key) if everywhere else "—"
            self._table.addWidget(Text(told, "mono"), line, place)
        self._table.setColumnStretch(3, 1)
        self._table.setColumnStretch(4, 1)
        self._table.setColumnStretch(5, 1)

    def _show_tokens(self, result: Result) -> None:
        piece = self.dialog.reading.piece
        for bars, key in ((self.raised, "raised"), (self.lowered, "lowered")):
            unit = "nats of log-probability"
            show_tokens(bars, [(piece(i), i, value) for i, value in result[key]], unit)
        n = result["active"]["feature"]["tokens"] if result["active"] else 0
        self._sides_note.setText(
            "Change of a token's log-probability as the next token, nats, mean over the "
            f"{formatting.count(n)} predictions made where the feature fires."
        )

    def _show_places(self, result: Result, lines: list[Shown]) -> None:
        clear(self._places)
        if not lines:
            return
        self._places.addWidget(Text("Where its removal changes most", "label"))
        piece = self.dialog.reading.piece
        colours = self.services.settings.get("token_colours")
        for place, shown in zip(result["places"], lines, strict=False):
            box = Surface("row", None, 10)
            said = (
                f"next “{written(piece(place['next']))}”: loss {signed(place['delta_ce'])} nats • "
                f"KL {formatting.number(place['kl'], 3)}"
            )
            before, after = (written(piece(place[key])) for key in ("before", "after"))
            turn = (
                f"most likely next: “{before}” → “{after}”"
                if place["before"] != place["after"]
                else f"most likely next stays “{before}”"
            )
            strip = LineStrip(colours)
            strip.set_line(shown.line, 0.0, ZOOM)
            box.add(row(Text(said, "small"), None, Text(turn, "helper")), strip)
            self._places.addWidget(box)

    # --- slots ----------------------------------------------------------------------------------

    def _on_mode_changed(self, *_: object) -> None:
        if self.feature >= 0:
            self._read()

    def _on_compare_clicked(self, checked: bool = False) -> None:
        density = np.asarray(self.dialog.columns.values["density"])
        kept = self.services.library.feature_analyses.of_run(self.dialog.run.id, KIND)
        measured_already = set(similar(kept, self.feature, self.params, density))
        chosen = like_it(density, self.feature, measured_already)[:OTHERS]
        if chosen:
            self.services.jobs.submit(Ablate(self.dialog.run.id, chosen, **self.params))
            self.compare.setEnabled(False)
            self.compare.setText(f"Measuring {len(chosen)} others…")
        else:
            self.compare.setText("There are no others like it")
            self.compare.setEnabled(False)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table == "feature_analyses" and self.dialog.sae_id in ids and self.feature >= 0:
            self._read()

    def _on_failed(self, error: Exception) -> None:
        self._content.hide()
        self._problem.addWidget(problem(error))

    def _is_mine(self, job: JobRecord) -> bool:
        return bool(
            job.params.get("feature_run_id") == self.dialog.run.id
            and job.params.get("features") == [self.feature]
        )

    def _make_job(self) -> Ablate:
        return Ablate(self.dialog.run.id, [self.feature], **self.params)


def similar(
    kept: dict[int, Result], feature: int, params: dict[str, Any], density: np.ndarray
) -> dict[int, Result]:
    """Results of other features that can be compared: measured alike, and within a factor of
    `SIMILAR` as often active."""
    own = float(density[feature])
    return {
        number: result
        for number, result in kept.items()
        if number != feature
        and result["active"] is not None
        and all(result[name] == params[name] for name in ("mode", "controls"))
        and own / SIMILAR <= float(density[number]) <= own * SIMILAR
    }


def like_it(density: np.ndarray, feature: int, known: set[int]) -> list[int]:
    """Other features of similar density, the most alike first."""
    own = float(density[feature])
    if own <= 0:
        return []
    with np.errstate(divide="ignore"):
        distance = np.abs(np.log(np.asarray(density, np.float64) / own))
    distance[feature] = np.inf
    order = np.argsort(distance, kind="stable")[: MOST_FEATURES + len(known)]
    near = [int(i) for i in order if distance[i] <= math.log(SIMILAR)]
    return [number for number in near if number not in known]


def percentile(result: Result, others: dict[int, Result]) -> float | None:
    """The share of `others` whose mean KL on active tokens is smaller; None for too few."""
    if result["active"] is None or len(others) < LEAST_OTHERS:
        return None
    own = result["active"]["feature"]["kl"]["mean"]
    below = sum(other["active"]["feature"]["kl"]["mean"] < own for other in others.values())
    return float(below) / len(others)


def sentence_of(result: Result) -> str:
    """What was found, in words that anyone understands."""
    active = result["active"]
    if active is None:
        n = result["everywhere"]["tokens"] if result["everywhere"] else 0
        if result["silent"]:
            return (
                "It never fired in the text of its discovery. Removing it on "
                f"{result['contexts']} contexts of that text changes no prediction at all "
                f"({formatting.count(n)} tokens, exactly 0)."
            )
        return "It fired on no token of which the next one is predicted, so there is no effect."
    own, control = active["feature"]["delta_ce"], active["control"]
    effect = float(own["mean"])
    word = "raises" if effect > 0 else "lowers"
    half = _half(own)
    about = f" ± {formatting.number(half, 3)}" if half is not None else ""
    said = (
        f"Removing it {word} the loss by {formatting.number(abs(effect), 3)}{about} nats on the "
        "tokens where it fires"
    )
    if control is None:
        return f"{said}. No random direction was measured beside it."
    other = float(control["delta_ce"]["mean"])
    said += f"; a random direction of the same size changes it by {signed(other)}."
    excess = active["excess_ce"]
    if excess is None or excess["low"] is None:
        return f"{said} One context alone gives no interval."
    if excess["low"] <= 0 <= excess["high"]:
        return f"{said} The difference may be chance (its 95 % interval contains 0)."
    if excess["low"] > 0:
        return f"{said} The model uses this feature there."
    return f"{said} Without it the model predicts these tokens better."


def signed(value: float, decimals: int = 3) -> str:
    if value == 0:
        return "0"
    if abs(value) < 0.5 * 10**-decimals:
        return formatting.number(0.0, decimals)  # a sign would tell what the digits do not
    return f"{'+' if value > 0 else '−'}{formatting.number(abs(value), decimals)}"


def interval(estimate: dict[str, Any]) -> str:
    if estimate["low"] is None:
        return "(one context)"
    return f"({signed(estimate['low'])} to {signed(estimate['high'])})"


def measured(estimate: dict[str, Any], key: str) -> str:
    if key == "changed":
        return formatting.percent(estimate["mean"])
    mean = signed(estimate["mean"]) if key == "delta_ce" else formatting.number(estimate["mean"], 3)
    half = _half(estimate)
    return mean if half is None else f"{mean} ± {formatting.number(half, 3)}"


def _half(estimate: dict[str, Any]) -> float | None:
    if estimate["low"] is None:
        return None
    return float(estimate["high"] - estimate["low"]) / 2
