"""What the Steering tab shows and does; no widgets, so tests need no window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PySide6.QtCore import QObject, Signal

from mistudio.errors import UserError, explain
from mistudio.jobs.presets import Binding
from mistudio.library.features import FeatureNote
from mistudio.library.jobs import JobRecord
from mistudio.library.records import Generation, Template
from mistudio.library.steering import Calibration
from mistudio.ui.services import Services
from mistudio.ui.steering import presets
from mistudio.ui.steering.calibrating import Calibrating, calibrating
from mistudio.ui.steering.directions import Directions, length, read_directions
from mistudio.ui.steering.earlier import Earlier, earlier_generations
from mistudio.ui.steering.feature_index import (
    Descriptions,
    FeatureIndex,
    FeatureItem,
    Found,
    Suggestion,
    build_index,
    describe,
    find,
    output_scores,
    suggestions,
)
from mistudio.ui.steering.prompt_tokens import PromptTokens, read_tokens
from mistudio.ui.steering.request import Chosen, Form, to_job
from mistudio.ui.steering.sources import Source, sources
from mistudio.ui.steering.units import NEW_STRENGTH, coefficient, percent_of_norm

HISTORY = 20


class SteeringPresenter(QObject):
    """Which SAE, which features at which strength, the generation that runs, the earlier ones.

    What is selected belongs to a model: SAEs of other layers add to it, another model has its own.
    """

    sources_changed = Signal()
    source_changed = Signal()
    index_changed = Signal()
    index_failed = Signal(object)
    found = Signal(object)
    suggestions_changed = Signal()
    selection_changed = Signal()
    calibrations_changed = Signal()
    exported = Signal(object, object)
    """the files that were written; sentences on where they say less than was done here"""
    job_failed = Signal(object)
    """the error in the row of a job that found something out"""
    tokens_read = Signal(object)
    tokens_failed = Signal(object)
    history_changed = Signal()
    started = Signal(int)
    ended = Signal(str, object)
    """status, the job's row"""

    def __init__(self, services: Services, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._services = services
        self._sources = sources(services.library)
        self.sae_id: int | None = self._sources[0].sae.id if self._sources else None
        self._indexes: dict[int, FeatureIndex] = {}
        self._notes: dict[int, dict[int, FeatureNote]] = {}
        self._descriptions: dict[int, dict[int, str]] = {}
        self._describing: set[tuple[int, int]] = set()
        self._loading: set[tuple[int, int]] = set()
        self.suggested: tuple[Suggestion, ...] = ()
        self._suggested_for: tuple[int, int] | None = None
        self._selections: dict[int, list[Chosen]] = {}  # by model
        self._search: str | None = None
        self._searching = False
        self._calibrations: dict[int, dict[tuple[int, str], Calibration]] = {}
        self._calibrating: dict[int, Chosen] = {}  # by job
        self._tried: dict[int, dict[int, list[dict[str, Any]]]] = {}  # by job, then sign
        self._directions: dict[int, Directions] = {}  # by SAE
        self._measuring: set[tuple[int, int]] = set()
        self._norms: dict[int, dict[int, float]] = {}  # by model, then layer
        self._medians: dict[int, float] = {}  # by SAE
        self._earlier: dict[int, Earlier] = {}  # by generation; none ever changes
        self._scoring: int | None = None
        self._exporting: set[int] = set()
        self.job_id: int | None = None
        services.changes.changed.connect(self._on_changes_changed)
        services.jobs.job_finished.connect(self._on_jobs_job_finished)

    # --- the source -----------------------------------------------------------------------------

    def sources(self) -> list[Source]:
        return self._sources

    def source_of(self, sae_id: int | None) -> Source | None:
        return next((s for s in self._sources if s.sae.id == sae_id), None)

    @property
    def source(self) -> Source | None:
        return self.source_of(self.sae_id)

    @property
    def index(self) -> FeatureIndex | None:
        """The features of the source; None while they are read."""
        return self._index_of(self.source)

    def _index_of(self, source: Source | None) -> FeatureIndex | None:
        found = self._indexes.get(source.sae.id) if source else None
        return found if found and source and found.run_id == source.run_id else None

    def choose(self, sae_id: int | None) -> None:
        """Take the features of another SAE; unknown ones are ignored."""
        if sae_id == self.sae_id or self.source_of(sae_id) is None:
            return
        self.sae_id = sae_id
        self._show_source()

    def load(self) -> None:
        """Read the features of the source and of what is selected, in the background;
        `index_changed` tells of each."""
        wanted = [self.sae_id, *(chosen.sae_id for chosen in self.selected)]
        for sae_id in dict.fromkeys(wanted):
            source = self.source_of(sae_id)
            if source is not None and self._index_of(source) is None:
                self._read(source)
        self._learn_of_selected()

    def _read(self, source: Source) -> None:
        wanted = (source.sae.id, source.run_id)
        if wanted in self._loading:
            return
        self._loading.add(wanted)
        library = self._services.library
        self._notes[source.sae.id] = library.feature_notes.of_sae(source.sae.id)
        self._services.background.run(
            lambda: build_index(library, *wanted), self._on_index_built, self._on_index_failed
        )

    def _on_index_built(self, index: FeatureIndex) -> None:
        self._loading.discard((index.sae_id, index.run_id))
        self._indexes[index.sae_id] = index
        self._learn_of_selected()
        self.index_changed.emit()
        self._next_search()

    def _on_index_failed(self, error: Exception) -> None:
        self._loading.clear()
        self._measuring.clear()
        self.index_failed.emit(problem_of(error))

    def _show_source(self) -> None:
        self._search = None
        self.suggested, self._suggested_for = (), None
        self.source_changed.emit()
        self.selection_changed.emit()
        self.history_changed.emit()
        self.load()

    def suggest(self) -> None:
        """Look for features worth a try, once for each source; `suggestions_changed` tells when."""
        if self.index is None:
            return
        wanted = (self.index.sae_id, self.index.run_id)
        if wanted == self._suggested_for:
            return
        self._suggested_for, self.suggested = wanted, ()
        library, index = self._services.library, self.index
        self._services.background.run(
            lambda: (wanted, suggestions(library, index)), self._on_suggested
        )

    def _on_suggested(self, result: tuple[tuple[int, int], tuple[Suggestion, ...]]) -> None:
        if result[0] == self._suggested_for:
            self.suggested = result[1]
            self.suggestions_changed.emit()

    # --- what features are about ----------------------------------------------------------------

    def item(self, feature: int, sae_id: int | None = None) -> FeatureItem | None:
        """What is known of a feature (of the source); None while its SAE is still read."""
        wanted = self.sae_id if sae_id is None else sae_id
        index = self._index_of(self.source_of(wanted))
        if index is None:
            return None
        notes = self._notes.get(index.sae_id, {})
        return index.item(feature, notes, self._descriptions.get(index.sae_id))

    def _learn_of_selected(self) -> None:
        for sae_id in {chosen.sae_id for chosen in self.selected}:
            features = [c.feature for c in self.selected if c.sae_id == sae_id]
            self._describe(sae_id, features)
            self._measure(sae_id, features)

    def _measure(self, sae_id: int, features: Sequence[int]) -> None:
        """Read the directions that are not known yet; `index_changed` tells."""
        known = self._directions[sae_id].rows if sae_id in self._directions else {}
        missing = [f for f in features if f not in known and (sae_id, f) not in self._measuring]
        if missing:
            self._measuring.update((sae_id, feature) for feature in missing)
            library = self._services.library
            self._services.background.run(
                lambda: read_directions(library, sae_id, missing),
                self._on_directions_read,
                self._on_index_failed,
            )

    def _on_directions_read(self, found: Directions) -> None:
        known = self._directions.setdefault(found.sae_id, found)
        known.rows.update(found.rows)
        self._measuring -= {(found.sae_id, feature) for feature in found.rows}
        self.index_changed.emit()

    def _describe(self, sae_id: int, features: Sequence[int]) -> None:
        """Ask the rules for what has no label and was not asked for; `index_changed` tells."""
        index = self._index_of(self.source_of(sae_id))
        if index is None:
            return
        known, notes = self._descriptions.get(sae_id, {}), self._notes.get(sae_id, {})
        missing = [
            feature
            for feature in features
            if feature not in known
            and (sae_id, feature) not in self._describing
            and not (feature in notes and notes[feature].label)
            and 0 <= feature < len(index)
        ]
        if not missing:
            return
        self._describing.update((sae_id, feature) for feature in missing)
        library, run_id = self._services.library, index.run_id
        self._services.background.run(
            lambda: describe(library, sae_id, run_id, missing), self._on_described
        )

    def _on_described(self, result: Descriptions) -> None:
        self._descriptions.setdefault(result.sae_id, {}).update(result.texts)
        self._describing -= {(result.sae_id, feature) for feature in result.texts}
        self.index_changed.emit()

    # --- search ---------------------------------------------------------------------------------

    def search(self, text: str) -> None:
        """Look for features in the background; `found` brings the newest search's matches."""
        self._search = text
        self._next_search()

    def _next_search(self) -> None:
        index = self.index
        if self._search is None or self._searching or index is None:
            return
        text, self._search = self._search, None
        if not text.strip():
            self.found.emit(Found("", 0))
            return
        self._searching = True
        library, notes = self._services.library, dict(self._notes.get(index.sae_id, {}))
        self._services.background.run(
            lambda: find(library, index, notes, text), self._on_searched, self._on_search_failed
        )

    def _on_searched(self, found: Found) -> None:
        self._searching = False
        if self._search is not None:
            self._next_search()
            return
        if self.sae_id is not None:
            self._describe(self.sae_id, found.features)
        self.found.emit(found)

    def _on_search_failed(self, error: Exception) -> None:
        self._searching = False
        self.index_failed.emit(problem_of(error))

    # --- selected features ----------------------------------------------------------------------

    @property
    def _model_id(self) -> int:
        source = self.source
        return source.sae.model_id if source else 0

    @property
    def selected(self) -> list[Chosen]:
        """In the order they were added."""
        return list(self._selections.get(self._model_id, []))

    def is_selected(self, feature: int) -> bool:
        """Whether a feature of the source is."""
        return any(c.key == (self.sae_id, feature) for c in self.selected)

    def add(self, feature: int, strength: float = NEW_STRENGTH) -> None:
        """Select a feature of the source; one that is selected already keeps its strength."""
        if self.sae_id is None or self.is_selected(feature):
            return
        chosen = Chosen(self.sae_id, feature).at(strength)
        self._selections.setdefault(self._model_id, []).append(chosen)
        self._learn_of_selected()
        self.selection_changed.emit()

    def remove(self, sae_id: int, feature: int) -> None:
        kept = [c for c in self.selected if c.key != (sae_id, feature)]
        self._selections[self._model_id] = kept
        self.selection_changed.emit()

    def set_strength(self, sae_id: int, feature: int, strength: float) -> None:
        self._replace(sae_id, feature, lambda c: c.at(strength))

    def set_method(self, sae_id: int, feature: int, method: str) -> None:
        self._replace(sae_id, feature, lambda c: Chosen(c.sae_id, c.feature, c.strength, method))

    def _replace(self, sae_id: int, feature: int, change: Callable[[Chosen], Chosen]) -> None:
        found = self.selected
        self._selections[self._model_id] = [
            change(c) if c.key == (sae_id, feature) else c for c in found
        ]

    def set_selected(self, chosen: Sequence[Chosen]) -> None:
        """Replace all; features of SAEs that are gone are left out. Goes to the first one's SAE
        where none is of the SAE that is shown."""
        known = [c for c in chosen if self.source_of(c.sae_id) is not None]
        if known and all(c.sae_id != self.sae_id for c in known):
            self.sae_id = known[0].sae_id
            self._selections[self._model_id] = known
            self._show_source()
            return
        self._selections[self._model_id] = known
        self._learn_of_selected()
        self.selection_changed.emit()
        self.load()

    # --- which steer ------------------------------------------------------------------------------

    def score(self, feature: int, sae_id: int | None = None) -> float | None:
        """The output score of a feature (of the source); None where it has none yet."""
        index = self._index_of(self.source_of(self.sae_id if sae_id is None else sae_id))
        return index.scores.get(feature) if index else None

    @property
    def has_scores(self) -> bool:
        return self.index is not None and bool(self.index.scores)

    @property
    def is_scoring(self) -> bool:
        return self._scoring is not None

    def score_features(self) -> None:
        """Queue the scoring of all features of the source; `index_changed` tells when it is
        there."""
        from mistudio.jobs.kinds import ScoreOutputs

        if self.sae_id is not None and not self.is_scoring:
            self._scoring = self._services.jobs.submit(ScoreOutputs(self.sae_id))
            self.suggestions_changed.emit()

    def _on_scores_read(self, result: tuple[int, int, dict[int, float]]) -> None:
        sae_id, run_id, scores = result
        index = self._indexes.get(sae_id)
        if index is not None and index.run_id == run_id:
            self._indexes[sae_id] = replace(index, scores=scores)
            if sae_id == self.sae_id:
                self._suggested_for = None
            self.index_changed.emit()

    # --- how strong -----------------------------------------------------------------------------

    def percent(self) -> float | None:
        """What is added in % of the norm at the SAE; None where that is not the sum of added
        features of one SAE, or not known yet."""
        found = {c.sae_id for c in self.selected}
        if len(found) != 1 or any(c.method != "add" for c in self.selected):
            return None
        (sae_id,) = found
        median = self.median_norm(sae_id)
        added = self._length(sae_id, {c.feature: c.strength for c in self.selected})
        return percent_of_norm(added, median)

    def median_norm(self, sae_id: int) -> float | None:
        """Of the activations that the SAE's features are added to: its training measured it, or
        the first generation."""
        source = self.source_of(sae_id)
        return (source.median_norm if source else None) or self._medians.get(sae_id)

    def unit_length(self, sae_id: int, feature: int) -> float | None:
        """How long raw coefficient 1 of a feature is."""
        directions = self._directions.get(sae_id)
        if directions is None or feature not in directions.rows:
            return None
        return length(directions.rows[feature], directions.normalised, self.median_norm(sae_id))

    def _length(self, sae_id: int, strengths: Mapping[int, float]) -> float | None:
        """Of the sum of features; None while one of them is still read."""
        directions, total = self._directions.get(sae_id), None
        for feature, strength in strengths.items():
            item = self.item(feature, sae_id)
            raw = coefficient(strength, item.max_activation if item else None)
            if raw is None or directions is None or feature not in directions.rows:
                return None
            part = raw * directions.rows[feature]
            total = part if total is None else total + part
        if directions is None or total is None:
            return None
        return length(total, directions.normalised, self.median_norm(sae_id))

    def norms(self) -> dict[int, float]:
        """The median norms of the residual stream after blocks, as far as runs or generations
        measured them."""
        trained = {
            source.sae.layer: source.median_norm
            for source in reversed(self._sources)
            if source.sae.model_id == self._model_id
            and source.sae.hook_point.endswith("hook_resid_post")
            and source.median_norm
        }
        return self._norms.get(self._model_id, {}) | trained

    def calibration(self, sae_id: int, feature: int, method: str) -> Calibration | None:
        if sae_id not in self._calibrations:
            self._calibrations[sae_id] = self._services.library.calibrations.of_sae(sae_id)
        return self._calibrations[sae_id].get((feature, method))

    def calibrating(self, sae_id: int, feature: int) -> Calibrating | None:
        """How far the calibration of a feature is, where one runs or waits."""
        for job_id, chosen in self._calibrating.items():
            if chosen.key == (sae_id, feature):
                snapshot = self._services.jobs.snapshot(job_id)
                known = self._tried.setdefault(job_id, {})
                waits_for = "" if snapshot else self.waiting_for(job_id)
                return calibrating(chosen, snapshot, known, waits_for)
        return None

    @property
    def is_calibrating(self) -> bool:
        return bool(self._calibrating)

    def calibrate(self, sae_id: int, feature: int) -> None:
        """Queue the measurement of a selected feature with its method; `calibrations_changed`
        tells when it is there."""
        from mistudio.jobs.kinds import Calibrate

        chosen = next((c for c in self.selected if c.key == (sae_id, feature)), None)
        if chosen is None or any(c.key == chosen.key for c in self._calibrating.values()):
            return
        job = Calibrate(sae_id, [feature], chosen.method, suppress=chosen.strength < 0)
        self._calibrating[self._services.jobs.submit(job)] = chosen
        self.calibrations_changed.emit()

    def stop_calibrating(self, sae_id: int, feature: int) -> None:
        for job_id, chosen in list(self._calibrating.items()):
            if chosen.key == (sae_id, feature):
                self._services.jobs.cancel(job_id)

    # --- generation -----------------------------------------------------------------------------

    @property
    def has_chat_format(self) -> bool:
        return self.index is None or self.index.has_chat_format

    def reason(self, form: Form) -> str:
        """Why nothing can be generated; empty where it can."""
        if self.source is None:
            return "No features to steer with yet."
        if not self.selected:
            return "Add at least one feature."
        if not form.prompt.strip():
            return "Enter a prompt."
        if form.scope == "chosen" and not form.positions:
            return "Choose the prompt tokens to steer, under Advanced."
        return "" if form.layers is None else self._reason_against_layers(form.layers)

    def warning(self, form: Form) -> str:
        """What a generation would be wasted on; empty where there is nothing to say."""
        still = all(c.method == "add" and c.strength == 0 for c in self.selected)
        if still or not any(form.scales):
            return "With a coefficient of 0 both texts will be the same."
        return ""

    def _reason_against_layers(self, layers: Sequence[int]) -> str:
        used = {c.sae_id for c in self.selected}
        source = self.source_of(next(iter(used)))
        if not layers:
            return "Choose at least one intervention layer, under Advanced."
        if len(used) > 1 or any(c.method != "add" for c in self.selected):
            return "One vector at several layers needs added features of one SAE (see Advanced)."
        if source is None or not source.in_residual_stream:
            return "One vector at several layers needs an SAE of the residual stream."
        return ""

    def generate(self, form: Form) -> int:
        """Queue a comparison; `ended` tells what came of it."""
        assert self.sae_id is not None
        self.job_id = self._services.jobs.submit(to_job(form, self.selected, self.sae_id))
        self.started.emit(self.job_id)
        return self.job_id

    def stop(self) -> None:
        if self.job_id is not None:
            self._services.jobs.cancel(self.job_id)

    def texts(self) -> list[str]:
        """The continuations so far: unsteered, then as asked."""
        snapshot = self._services.jobs.snapshot(self.job_id) if self.job_id is not None else None
        return list(snapshot.metrics.get("texts", ())) if snapshot else []

    def waiting_for(self, job_id: int | None) -> str:
        """The job that a queued one waits for."""
        if job_id is None or self._services.library.jobs.get(job_id).status != "queued":
            return ""
        running = [self._services.library.jobs.get(i) for i in self._services.jobs.running()]
        return next((job.title for job in running if job.lane == "compute"), "")

    def _on_jobs_job_finished(self, job_id: int, status: str) -> None:
        if job_id == self.job_id:
            record: JobRecord = self._services.library.jobs.get(job_id)
            self.job_id = None
            self.ended.emit(status, record)
        elif self._calibrating.pop(job_id, None) is not None:
            self._tried.pop(job_id, None)
            if status == "failed":
                error = self._services.library.jobs.get(job_id).error
                self.job_failed.emit(error)
            self.calibrations_changed.emit()
        elif job_id in self._exporting:
            self._exporting.discard(job_id)
            record = self._services.library.jobs.get(job_id)
            if status == "finished":
                self.exported.emit(record.result["files"], record.result.get("notes", []))
            elif status == "failed":
                self.job_failed.emit(record.error)
        elif job_id == self._scoring:
            self._scoring = None
            if status == "failed":
                self.job_failed.emit(self._services.library.jobs.get(job_id).error)
            self.suggestions_changed.emit()

    def read_tokens(self, prompt: str, chat: bool) -> None:
        """Tell the prompt's tokens by `tokens_read`."""
        if not prompt.strip() or self.source is None:
            self.tokens_read.emit(PromptTokens(prompt, chat, 0))
            return
        library, model_id = self._services.library, self._model_id
        self._services.background.run(
            lambda: read_tokens(library, model_id, prompt, chat),
            self._on_tokens_read,
            self._on_tokens_failed,
        )

    def _on_tokens_read(self, tokens: PromptTokens) -> None:
        self.tokens_read.emit(tokens)

    def _on_tokens_failed(self, error: Exception) -> None:
        self.tokens_failed.emit(problem_of(error))

    def export_vector(self, form: Form, kind: str, path: Path) -> None:
        """Queue writing what is selected as a file for others; `exported` tells when it is
        there."""
        from mistudio.jobs.kinds import ExportVector

        assert self.sae_id is not None
        request = asdict(to_job(form, self.selected, self.sae_id))
        scale = form.scales[0] if len(form.scales) == 1 else 1.0
        job = ExportVector(request, str(path), kind, scale)
        self._exporting.add(self._services.jobs.submit(job))

    # --- presets --------------------------------------------------------------------------------

    def preset(self, form: Form) -> dict[str, Any]:
        """What a preset of this moment holds; InvalidInput where no feature is selected."""
        known = {source.sae.id: source for source in self._sources}
        return presets.to_config(self._services.library, form, self.selected, known)

    def load_preset(self, template: Template) -> tuple[Form, Binding, bool]:
        """Select the features of a preset; its form, how it is bound, whether it was taken."""
        chosen, binding = presets.chosen_of(self._services.library, template.config, self.sae_id)
        if chosen:
            self.set_selected(chosen)
        return presets.form_of(template.config), binding, bool(chosen)

    # --- history --------------------------------------------------------------------------------

    def history(self) -> list[Earlier]:
        """The newest generations with the model's SAEs."""
        found = self._services.library.rows(
            "SELECT g.id FROM generations g JOIN saes s ON s.id = g.sae_id "
            f"WHERE s.model_id = ? ORDER BY g.id DESC LIMIT {HISTORY}",
            (self._model_id,),
        )
        ids = [row["id"] for row in found]
        new = [i for i in ids if i not in self._earlier]
        kept = {i: earlier for i, earlier in self._earlier.items() if i in set(ids)}
        self._earlier = kept | {e.id: e for e in earlier_generations(self._services.library, new)}
        known = self._norms.setdefault(self._model_id, {})
        for earlier in (self._earlier[i] for i in ids if i in self._earlier):
            for layer, norm in earlier.layer_norms.items():
                known.setdefault(layer, norm)
            if earlier.median_norm:
                self._medians.setdefault(earlier.sae_id, earlier.median_norm)
        return [self._earlier[i] for i in ids if i in self._earlier]

    def generation(self, generation_id: int) -> Generation | None:
        return self._services.library.generations.find(generation_id)

    def of_this_model(self, generation: Generation) -> bool:
        source = self.source_of(generation.sae_id)
        return source is not None and source.sae.model_id == self._model_id

    def export_history(self, path: Path, done: Callable[[Any], None]) -> None:
        """Write all generations with the model; `done` gets how many, `index_failed` an error."""
        from mistudio.jobs.generation_files import write_generations

        library, model_id = self._services.library, self._model_id
        self._services.background.run(
            lambda: (write_generations(library, model_id, path), path), done, self._on_index_failed
        )

    # --- changes and state ----------------------------------------------------------------------

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table in ("saes", "feature_runs", "trainings", "models", "datasets"):
            self._refresh_sources()
        elif table == "feature_notes":
            for sae_id in ids & self._notes.keys():
                self._notes[sae_id] = self._services.library.feature_notes.of_sae(sae_id)
            self.index_changed.emit()
        elif table == "feature_calibrations":
            for sae_id in ids:
                self._calibrations.pop(sae_id, None)
            self.calibrations_changed.emit()
        elif table == "feature_analyses":
            for index in [self._indexes[i] for i in ids & self._indexes.keys()]:
                self._read_scores(index.sae_id, index.run_id)
        elif table == "generations":
            self.history_changed.emit()

    def _read_scores(self, sae_id: int, run_id: int) -> None:
        library = self._services.library
        self._services.background.run(
            lambda: (sae_id, run_id, output_scores(library, run_id)), self._on_scores_read
        )

    def _refresh_sources(self) -> None:
        before, self._sources = self.source, sources(self._services.library)
        if self.source is None:
            self.sae_id = self._sources[0].sae.id if self._sources else None
        for model_id, chosen in self._selections.items():
            known = [c for c in chosen if self.source_of(c.sae_id) is not None]
            self._selections[model_id] = known
        self.sources_changed.emit()
        if self.source != before:
            self._show_source()
        else:
            self.selection_changed.emit()

    def save_state(self) -> dict[str, Any]:
        return {
            "sae_id": self.sae_id,
            "selections": [c.as_list() for chosen in self._selections.values() for c in chosen],
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        entries = state.get("selections")
        for entry in entries if isinstance(entries, list) else []:
            chosen = Chosen.read(entry)
            source = self.source_of(chosen.sae_id) if chosen else None
            if chosen and source and chosen.feature < source.sae.d_sae:
                kept = self._selections.setdefault(source.sae.model_id, [])
                if all(chosen.key != c.key for c in kept):
                    kept.append(chosen)
        if self.source_of(state.get("sae_id")) is not None:
            self.sae_id = state["sae_id"]
        self._show_source()


def problem_of(error: Exception) -> UserError:
    """An error for a panel: known ones in their words, a bug with its name."""
    return explain(error) or UserError(
        "Something went wrong inside miStudio",
        f"{type(error).__name__}: {error}",
        "Please report it.",
    )
