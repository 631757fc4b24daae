"""The Correlations tab: which features fire together with this one, and whose directions are
alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mistudio import formatting
from mistudio.engine.features import together
from mistudio.engine.features.together import Neighbour, Sample
from mistudio.jobs.coactivation import TOKENS, others_of
from mistudio.jobs.kinds import CoActivate
from mistudio.library.jobs import JobRecord
from mistudio.ui.features.dialog.charts import BarList, BarRow
from mistudio.ui.features.dialog.job_panel import JobPanel, estimate
from mistudio.ui.features.dialog.tab import FeatureTab, method, problem, scrolled
from mistudio.ui.widgets import Choice, EmptyState, Text, clear, column, row

COSINE = "cosine"
MEASURES = (
    ("phi", "Phi: correlation of firing"),
    ("jaccard", "Jaccard: shared tokens"),
    ("pearson", "Pearson: correlation of activations"),
    (COSINE, "Cosine of decoder directions"),
)
METHODS = {
    "phi": "Phi is the correlation of firing or not firing over all tokens of the sample: 1 where "
    "two features always fire together, 0 where one tells nothing about the other.",
    "jaccard": "The tokens on which both fire, divided by the tokens on which either does.",
    "pearson": "The correlation of the two activations over all tokens of the sample, zeros "
    "included.",
    COSINE: "The cosine of the two decoder directions, compared with those of all other features. "
    "It is of weights, so there is no sample: near 1, the two are duplicates or one was split.",
}


@dataclass(frozen=True)
class Found:
    """What is to be shown: `neighbours` None where they were never counted."""

    measure: str
    neighbours: list[Neighbour] | None
    sample: Sample | None
    fired: int
    labels: dict[int, str]


class CorrelationsTab(FeatureTab):
    def build(self) -> None:
        self.measure = Choice(MEASURES)
        self.measure.setAccessibleName("Measure")
        self.measure.setMinimumContentsLength(30)
        folder = self.dialog.reading.store.folder
        if together.sample_of(folder) is None and (folder / "neighbour_ids.npy").exists():
            self.measure.set_value(COSINE)  # what there is comes first
        self.scope = Choice([(None, "This SAE")])
        self.scope.setAccessibleName("Features of")
        self.scope.setMinimumContentsLength(18)
        self.measure.currentIndexChanged.connect(self._on_choice_changed)
        self.scope.currentIndexChanged.connect(self._on_choice_changed)
        self.note = Text("", "helper", wrap=True)
        self.bars = BarList("Correlated features", "purple", clickable=True, mono=False,
                            label_share=0.6)  # fmt: skip
        self.bars.chosen.connect(self._on_bars_chosen)
        self._empty = column(0)
        self.panel = JobPanel(
            self.services, "Count which features fire together", "activity", "co_activate",
            self._is_mine, self._make_job,
        )  # fmt: skip
        self.panel.ended.connect(self._on_panel_ended)
        self._method = Text("", "small", wrap=True)
        box = method("")
        clear(box.body)
        box.add(self._method)
        lead = Text("Features that often fire together with this one", "small")
        layout = column(0)
        layout.addWidget(
            scrolled(
                row(lead, None, self.measure, self.scope, spacing=8),
                self.note,
                self.panel,
                self._empty,
                self.bars,
                box,
            )
        )
        self.setLayout(layout)
        self._found: Found | None = None
        self.services.changes.changed.connect(self._on_changes_changed)

    def show_feature(self) -> None:
        self.panel.refresh()
        self.panel.setVisible(self.panel.job is not None)  # else when it is known that it is needed
        self.note.setText("Reading…")
        self.bars.set_rows([])
        self._read()

    # --- reading --------------------------------------------------------------------------------

    def _read(self) -> None:
        clear(self._empty)
        measure, other = self.measure.value, self.scope.value
        self._method.setText(METHODS[measure])
        self.scope.setEnabled(measure != COSINE and self.scope.count() > 1)
        reading, feature = self.dialog.reading, self.feature
        reader = self.dialog.presenter.reader
        library, sae_id = self.services.library, other or self.dialog.sae_id

        def read() -> Found:
            notes = library.feature_notes.of_sae(sae_id)
            labels = {number: note.label for number, note in notes.items() if note.label}
            folder = reading.store.folder
            sample = together.sample_of(folder)
            fired = together.fired(folder, feature) if sample else 0
            found: list[Neighbour] | None
            if measure == COSINE:
                found = together.directions(folder, feature)
            else:
                found = together.neighbours(folder, feature, measure, other) if sample else None
            if other is None and reader is not None and found:
                bare = [n.feature for n in found if n.feature not in labels]
                labels.update({r.feature: r.description or "" for r in reader.rows(bare)})
            return Found(measure, found, sample, fired, labels)

        self.in_background(read, self._on_read, self._on_failed)

    def _on_read(self, found: Found) -> None:
        if found.measure != self.measure.value:
            return
        self._found = found
        clear(self._empty)
        counting = found.measure != COSINE
        missing = found.neighbours is None
        self._offer_scopes(found.sample)
        self.panel.setVisible(found.sample is None or self.panel.job is not None)
        if found.sample is None:
            self._tell_cost()
        self.bars.setVisible(bool(found.neighbours))
        if missing:
            self.bars.set_rows([])
            self._tell_missing(counting)
            return
        assert found.neighbours is not None
        self._show_rows(found)
        if not found.neighbours:
            self._empty.addWidget(EmptyState("unlink", self._none_sentence(found)))

    def _tell_missing(self, counting: bool) -> None:
        if not counting:
            self.note.setText("—")
            self._empty.addWidget(
                EmptyState(
                    "unlink",
                    "This discovery has no nearest directions.",
                    helper="It was made by an earlier version: discover the features again.",
                )
            )
            return
        self.note.setText("Which features fire together was not counted yet.")

    def _tell_cost(self) -> None:
        run, library = self.dialog.run, self.services.library
        n = 1 + len(others_of(library, run))
        layers = f" in {n} layers of its run" if n > 1 else ""
        tokens = min(TOKENS, run.tokens)
        self.panel.set_estimate(
            f"The model reads {formatting.count(tokens)} tokens once, for all features{layers}; "
            f"then every pair is counted. {estimate(library, run, tokens)}"
        )

    def _none_sentence(self, found: Found) -> str:
        if found.measure == COSINE or found.sample is None:
            return "No other feature has a direction."
        if not found.fired:
            return (
                f"It fired on none of the {formatting.count(found.sample.tokens)} tokens of the "
                "sample."
            )
        return (
            f"No other feature fires together with it on {found.sample.min_pairs} tokens or more."
        )

    def _show_rows(self, found: Found) -> None:
        assert found.neighbours is not None
        if found.sample is not None and found.measure != COSINE:
            least = found.sample.min_pairs
            self.note.setText(
                f"Over {formatting.count(found.sample.tokens)} tokens of "
                f"{formatting.count(found.sample.contexts)} contexts; this feature fires on "
                f"{formatting.count(found.fired)} of them. Pairs that fire together on fewer than "
                f"{least} tokens are left out."
            )
        else:
            n = formatting.count(len(self.dialog.reading.store))
            self.note.setText(f"The most alike of all {n} decoder directions of this SAE.")
        self.bars.set_rows([self._row(n, found) for n in found.neighbours])

    def _row(self, neighbour: Neighbour, found: Found) -> BarRow:
        label = found.labels.get(neighbour.feature, "")
        both = ""
        if neighbour.together is not None:
            both = f"together on {formatting.count(neighbour.together)} tokens"
        name = dict(MEASURES)[found.measure]
        value = f"{neighbour.value:.3f}".replace("-", "−")
        return BarRow(
            f"#{neighbour.feature} {label}".strip(),
            value,
            abs(neighbour.value),
            f"{name}: {neighbour.value:.4f}" + (f"\nBoth fire {both}" if both else "")
            + "\nClick to open it",
            both,
        )  # fmt: skip

    def _offer_scopes(self, sample: Sample | None) -> None:
        saes = self.services.library.saes
        options: list[tuple[Any, str]] = [(None, "This SAE")]
        others = [saes.find(number) for number in (sample.others if sample else ())]
        layers = [other.layer for other in others if other is not None]
        for other in others:
            if other is not None:
                site = f": {other.hook_point}" if layers.count(other.layer) > 1 else ""
                options.append((other.id, f"Layer {other.layer}{site}"))
        self.scope.set_options(options)
        self.scope.setVisible(len(options) > 1)
        self.scope.setEnabled(self.measure.value != COSINE)

    # --- slots ----------------------------------------------------------------------------------

    def _on_choice_changed(self, *_: object) -> None:
        if self.measure.value == COSINE and self.scope.value is not None:
            self.scope.set_value(None)
        elif self.feature >= 0:
            self._read()

    def _on_bars_chosen(self, number: int) -> None:
        if self._found is None or not self._found.neighbours:
            return
        neighbour = self._found.neighbours[number]
        if neighbour.sae_id is None:
            self.dialog.go_to(neighbour.feature)
        else:
            self.dialog.close()
            self.services.navigate("features", sae_id=neighbour.sae_id, feature=neighbour.feature)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table == "feature_runs" and self.dialog.run.id in ids and self.feature >= 0:
            self._read()

    def _on_panel_ended(self) -> None:
        if self.feature >= 0:
            self._read()

    def _on_failed(self, error: Exception) -> None:
        clear(self._empty)
        self.bars.hide()
        self._empty.addWidget(problem(error))

    def _is_mine(self, job: JobRecord) -> bool:
        return bool(job.params.get("feature_run_id") == self.dialog.run.id)

    def _make_job(self) -> CoActivate:
        return CoActivate(self.dialog.run.id, TOKENS)
