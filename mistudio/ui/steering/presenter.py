"""What the Steering tab shows and does; no widgets, so tests need no window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PySide6.QtCore import QObject, Signal

from mistudio import formatting
from mistudio.errors import UserError, explain
from mistudio.library.library import Library
from mistudio.library.features import FeatureNote
from mistudio.library.records import Generation, Sae
from mistudio.ui.services import Services
from mistudio.ui.times import clock_time
from mistudio.ui.training.form import encoder_of, encoder_title

STRONGEST = 5.0
NEW_STRENGTH = 2.0  # of a feature that another tab sends here
RESULTS = 8
HISTORY = 20
_PROMOTED_SHOWN = 3

_SITE_MEANINGS = {
    "hook_resid_pre": "residual stream before the block",
    "hook_resid_post": "residual stream after the block",
    "mlp.hook_in": "input of the MLP",
    "hook_mlp_out": "output of the MLP",
    "hook_attn_out": "output of attention",
}


# --- sources of features --------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """An SAE whose features are known, as the combo box names it."""

    sae: Sae
    run_id: int
    title: str
    model: str
    model_layers: int
    median_norm: float | None

    @property
    def layer_text(self) -> str:
        """`Layer 12 of 0 to 29 • residual stream after the block`."""
        suffix = self.sae.hook_point.split(".", 2)[-1]
        where = _SITE_MEANINGS.get(suffix, suffix)
        return f"Layer {self.sae.layer} of 0 to {self.model_layers - 1} • {where}"


def sources(library: Library) -> list[Source]:
    """Every SAE with a discovery pass, those of the newest training first."""
    newest: dict[int, int] = {}
    for run in library.feature_runs.all():
        newest.setdefault(run.sae_id, run.id)
    found = []
    for sae in library.saes.all():
        if sae.id in newest:
            found.append(_source(library, sae, newest[sae.id]))
    return found


def _source(library: Library, sae: Sae, run_id: int) -> Source:
    model = library.models.get(sae.model_id)
    training = library.trainings.find(sae.training_id) if sae.training_id else None
    encoder = encoder_title(sae.architecture, sae.wiring)
    dataset, started, siblings = "", sae.created_at, 1
    if training is not None:
        encoder = encoder_of(training.config)
        record = library.datasets.find(training.dataset_id)
        dataset = record.name if record else ""
        job = library.jobs.find(training.job_id) if training.job_id else None
        started = (job.started_at if job else None) or training.created_at
        siblings = len(library.saes.of_training(training.id))
    parts = [encoder, model.name]
    parts += [dataset] if dataset else []
    parts += [f"layer {sae.layer}"] if siblings > 1 else []
    parts.append(f"Started {clock_time(started)}")
    median = sae.metrics.get("median_norm")
    return Source(
        sae=sae,
        run_id=run_id,
        title=" • ".join(parts),
        model=model.name,
        model_layers=model.n_layers,
        median_norm=float(median) if median else None,
    )


# --- features of one source -----------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureItem:
    """A feature as rows show it: its label, or the tokens that tell most of it."""

    feature: int
    label: str
    top_token: str
    promoted: tuple[str, ...]
    max_activation: float

    @property
    def text(self) -> str:
        if self.label:
            return self.label
        promoted = ", ".join(_quoted(token) for token in self.promoted[:_PROMOTED_SHOWN])
        fires = f"fires on {_quoted(self.top_token)}" if self.top_token else ""
        return " • ".join(
            part for part in (fires, f"promotes {promoted}" if promoted else "") if part
        )


def _quoted(token: str) -> str:
    shown = token.strip().replace("\n", "↵")
    return f"“{shown}”" if shown else f"“{token.replace(chr(10), '↵').replace(' ', '␣')}”"


@dataclass(frozen=True)
class FeatureIndex:
    """The features of one discovery pass, ready to be searched; plain Python, made once."""

    sae_id: int
    run_id: int
    top_tokens: tuple[str, ...]
    promoted: tuple[tuple[str, ...], ...]
    max_activations: tuple[float, ...]
    has_chat_format: bool

    def __len__(self) -> int:
        return len(self.top_tokens)

    def item(self, feature: int, notes: dict[int, FeatureNote]) -> FeatureItem | None:
        if not 0 <= feature < len(self):
            return None
        note = notes.get(feature)
        return FeatureItem(
            feature,
            note.label if note else "",
            self.top_tokens[feature],
            self.promoted[feature],
            self.max_activations[feature],
        )


@dataclass(frozen=True)
class Found:
    """The first of `total` features that a search matches."""

    search: str
    total: int
    items: tuple[FeatureItem, ...]


def build_index(library: Library, sae_id: int, run_id: int) -> FeatureIndex:
    """Read a discovery pass; imports the tokenizer's library, so never in the GUI thread."""
    from mistudio.engine.features.store import FeatureStore
    from mistudio.engine.models.loading import load_tokenizer

    sae = library.saes.get(sae_id)
    store = FeatureStore(library.path(library.feature_runs.get(run_id).folder))
    tokenizer = load_tokenizer(library.path(library.models.get(sae.model_id).folder))
    known: dict[int, str] = {-1: ""}

    def text(token: int) -> str:
        if token not in known:
            known[token] = str(tokenizer.decode([token]))
        return known[token]

    return FeatureIndex(
        sae_id=sae_id,
        run_id=run_id,
        top_tokens=tuple(text(int(token)) for token in store.columns["top_token"]),
        promoted=tuple(
            tuple(text(token) for token, _ in store.promoted(feature))
            for feature in range(len(store))
        ),
        max_activations=tuple(float(value) for value in store.columns["max_activation"]),
        has_chat_format=bool(getattr(tokenizer, "chat_template", None)),
    )


@dataclass(frozen=True)
class Suggestion:
    """A feature worth a try, with what its strongest examples have in common."""

    feature: int
    text: str


def suggestions(library: Library, sae_id: int, run_id: int) -> tuple[Suggestion, ...]:
    """Features whose examples visibly share something; takes a second or two of background."""
    from mistudio.engine.features.describe import showcase
    from mistudio.engine.models.loading import load_tokenizer
    from mistudio.jobs.features import open_features

    store, texts = open_features(library, library.feature_runs.get(run_id))
    model = library.models.get(library.saes.get(sae_id).model_id)
    tokenizer = load_tokenizer(library.path(model.folder))
    return tuple(
        Suggestion(
            feature, f"{found.text} • in {round(found.share * found.n)} of {found.n} examples"
        )
        for feature, found in showcase(store, texts, tokenizer, RESULTS, candidates=100)
    )


def search_index(index: FeatureIndex, notes: dict[int, FeatureNote], search: str) -> Found:
    """By `#id`, then label, then the token it fires on, then the tokens it promotes. Features
    that never fired cannot steer and are left out."""
    wanted = search.strip().lower()
    number = wanted.removeprefix("#")
    ranked: list[tuple[int, float, int]] = []
    for feature, top in enumerate(index.top_tokens):
        strongest = index.max_activations[feature]
        if strongest <= 0:
            continue
        label = notes[feature].label.lower() if feature in notes else ""
        rank = _rank(wanted, number, feature, label, top, index.promoted[feature])
        if rank is not None:
            ranked.append((rank, -strongest, feature))
    ranked.sort()
    items = tuple(
        item for *_, feature in ranked[:RESULTS] if (item := index.item(feature, notes)) is not None
    )
    return Found(search, len(ranked), items)


def _rank(
    wanted: str, number: str, feature: int, label: str, top: str, promoted: Sequence[str]
) -> int | None:
    """How well a feature matches, 0 best; None where it does not."""
    if number.isdigit():
        if feature == int(number):
            return 0
        if wanted.startswith("#"):
            return 2 if str(feature).startswith(number) else None
    if label and wanted in label:
        return 1
    token = top.strip().lower()
    if token == wanted:
        return 3
    if any(text.strip().lower() == wanted for text in promoted):
        return 4
    if wanted in token:
        return 5
    if any(wanted in text.lower() for text in promoted):
        return 6
    return None


# --- units of strength ----------------------------------------------------------------------------


def coefficient(strength: float, max_activation: float | None) -> float | None:
    """What is added along the feature's unit direction."""
    return None if max_activation is None else strength * max_activation


def percent_of_norm(raw: float | None, median_norm: float | None) -> float | None:
    """|coefficient| in % of the layer's median norm; a decoder row has length 1."""
    if raw is None or not median_norm:
        return None
    return 100.0 * abs(raw) / median_norm


def significant(value: float | None, digits: int = 3) -> str:
    """Three significant digits, never in scientific notation; an em dash where there is none."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return "—"
    if value == 0:
        return "0"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if whole:
        return formatting.number(value, max(0, digits - whole))
    if abs(value) < 0.0001:
        return f"{'-' if value < 0 else ''}<0.0001"
    return f"{value:.{digits}g}" if abs(value) >= 0.001 else f"{value:.4f}"


def signed(value: float | None) -> str:
    """`+2.30`, `-0.41`; no decimals where they would mean nothing."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return "—"
    return f"{value:+,.{2 if abs(value) < 1000 else 0}f}"


def share(value: float | None) -> str:
    return "—" if value is None or value != value else formatting.percent(value)


# --- the page's state -----------------------------------------------------------------------------


@dataclass
class Form:
    """What a generation is asked for, apart from the features."""

    prompt: str = ""
    temperature: float = 0.7
    max_tokens: int = 60
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False


class SteeringPresenter(QObject):
    """Which SAE, which features at which strength, the generation that runs, the earlier ones."""

    sources_changed = Signal()
    source_changed = Signal()
    index_changed = Signal()
    index_failed = Signal(object)
    found = Signal(object)
    suggestions_changed = Signal()
    selection_changed = Signal()
    history_changed = Signal()
    started = Signal(int)
    ended = Signal(str, object)
    """status, the job's row"""

    def __init__(self, services: Services, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._services = services
        self._sources = sources(services.library)
        self.sae_id: int | None = self._sources[0].sae.id if self._sources else None
        self.index: FeatureIndex | None = None
        self.suggested: tuple[Suggestion, ...] = ()
        self._suggested_for: tuple[int, int] | None = None
        self._notes: dict[int, FeatureNote] = {}
        self._selections: dict[int, dict[int, float]] = {}
        self._search: str | None = None
        self._searching = False
        self._loading: tuple[int, int] | None = None
        self.job_id: int | None = None
        services.changes.changed.connect(self._on_changes_changed)
        services.jobs.job_finished.connect(self._on_jobs_job_finished)

    # --- the source -----------------------------------------------------------------------------

    def sources(self) -> list[Source]:
        return self._sources

    @property
    def source(self) -> Source | None:
        return next((s for s in self._sources if s.sae.id == self.sae_id), None)

    def choose(self, sae_id: int | None) -> None:
        """Take the features of another SAE; unknown ones are ignored."""
        if sae_id == self.sae_id or not any(s.sae.id == sae_id for s in self._sources):
            return
        self.sae_id = sae_id
        self._show_source()

    def load(self) -> None:
        """Read the source's features in the background; `index_changed` tells when."""
        source = self.source
        if source is None:
            return
        wanted = (source.sae.id, source.run_id)
        there = self.index is not None and (self.index.sae_id, self.index.run_id) == wanted
        if there or self._loading == wanted:
            return
        self._loading = wanted
        self.index = None
        self._notes = self._services.library.feature_notes.of_sae(source.sae.id)
        library = self._services.library
        self._services.background.run(
            lambda: build_index(library, *wanted), self._on_index_built, self._on_index_failed
        )

    def _on_index_built(self, index: FeatureIndex) -> None:
        if (index.sae_id, index.run_id) != self._loading:
            return  # another source was chosen meanwhile
        self._loading = None
        self.index = index
        self.index_changed.emit()
        self._next_search()

    def _on_index_failed(self, error: Exception) -> None:
        self._loading = None
        self.index_failed.emit(problem_of(error))

    def _show_source(self) -> None:
        self.index = None
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
        library = self._services.library
        self._services.background.run(
            lambda: (wanted, suggestions(library, *wanted)), self._on_suggested
        )

    def _on_suggested(self, result: tuple[tuple[int, int], tuple[Suggestion, ...]]) -> None:
        if result[0] == self._suggested_for:
            self.suggested = result[1]
            self.suggestions_changed.emit()

    # --- search ---------------------------------------------------------------------------------

    def search(self, text: str) -> None:
        """Look for features in the background; `found` brings the newest search's matches."""
        self._search = text
        self._next_search()

    def _next_search(self) -> None:
        if self._search is None or self._searching or self.index is None:
            return
        text, self._search = self._search, None
        if not text.strip():
            self.found.emit(Found("", 0, ()))
            return
        self._searching = True
        index, notes = self.index, dict(self._notes)
        self._services.background.run(
            lambda: search_index(index, notes, text), self._on_searched, self._on_search_failed
        )

    def _on_searched(self, found: Found) -> None:
        self._searching = False
        if self._search is None:
            self.found.emit(found)
        else:
            self._next_search()

    def _on_search_failed(self, error: Exception) -> None:
        self._searching = False
        self.index_failed.emit(problem_of(error))

    # --- selected features ----------------------------------------------------------------------

    @property
    def selected(self) -> dict[int, float]:
        """Feature -> strength, in the order they were added."""
        return dict(self._selections.get(self.sae_id or 0, {}))

    def item(self, feature: int) -> FeatureItem | None:
        """What is known of a feature; None while the source is still read."""
        return self.index.item(feature, self._notes) if self.index else None

    def add(self, feature: int, strength: float = NEW_STRENGTH) -> None:
        """Select a feature; one that is selected already keeps its strength."""
        if self.sae_id is None:
            return
        self._selections.setdefault(self.sae_id, {}).setdefault(feature, strength)
        self.selection_changed.emit()

    def remove(self, feature: int) -> None:
        self._selections.get(self.sae_id or 0, {}).pop(feature, None)
        self.selection_changed.emit()

    def set_strength(self, feature: int, strength: float) -> None:
        chosen = self._selections.get(self.sae_id or 0, {})
        if feature in chosen:
            chosen[feature] = min(max(strength, -STRONGEST), STRONGEST)

    def set_selected(self, features: Sequence[Sequence[float]]) -> None:
        if self.sae_id is not None:
            self._selections[self.sae_id] = {int(f): float(s) for f, s in features}
            self.selection_changed.emit()

    # --- generation -----------------------------------------------------------------------------

    def reason(self, prompt: str) -> str:
        """Why nothing can be generated; empty where it can."""
        if self.source is None:
            return "No features to steer with yet."
        if not self.selected:
            return "Add at least one feature."
        if not prompt.strip():
            return "Enter a prompt."
        return ""

    def generate(self, form: Form) -> int:
        """Queue a comparison; `ended` tells what came of it."""
        from mistudio.jobs.kinds import Steer

        assert self.sae_id is not None
        chat = form.chat and (self.index is None or self.index.has_chat_format)
        self.job_id = self._services.jobs.submit(
            Steer(
                sae_id=self.sae_id,
                features=[[feature, strength] for feature, strength in self.selected.items()],
                prompt=form.prompt,
                temperature=form.temperature,
                top_p=form.top_p,
                max_new_tokens=form.max_tokens,
                seed=form.seed,
                chat=chat,
            )
        )
        self.started.emit(self.job_id)
        return self.job_id

    def stop(self) -> None:
        if self.job_id is not None:
            self._services.jobs.cancel(self.job_id)

    def texts(self) -> list[str]:
        """The continuations so far: unsteered, steered."""
        snapshot = self._services.jobs.snapshot(self.job_id) if self.job_id is not None else None
        return list(snapshot.metrics.get("texts", ())) if snapshot else []

    def waiting_for(self) -> str:
        """The job that a queued generation waits for."""
        if self.job_id is None or self._services.library.jobs.get(self.job_id).status != "queued":
            return ""
        running = [self._services.library.jobs.get(i) for i in self._services.jobs.running()]
        return next((job.title for job in running if job.lane == "compute"), "")

    def _on_jobs_job_finished(self, job_id: int, status: str) -> None:
        if job_id == self.job_id:
            record = self._services.library.jobs.get(job_id)
            self.job_id = None
            self.ended.emit(status, record)

    # --- history --------------------------------------------------------------------------------

    def history(self) -> list[Generation]:
        """The newest generations with this SAE."""
        if self.sae_id is None:
            return []
        return self._services.library.generations.all(
            f"sae_id = ? AND id IN (SELECT id FROM generations WHERE sae_id = ? "
            f"ORDER BY id DESC LIMIT {HISTORY})",
            (self.sae_id, self.sae_id),
        )

    def generation(self, generation_id: int) -> Generation | None:
        return self._services.library.generations.find(generation_id)

    # --- changes and state ----------------------------------------------------------------------

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table in ("saes", "feature_runs", "trainings", "models", "datasets"):
            self._refresh_sources()
        elif table == "feature_notes" and self.sae_id in ids:
            self._notes = self._services.library.feature_notes.of_sae(self.sae_id)
            self.index_changed.emit()
        elif table == "generations":
            self.history_changed.emit()

    def _refresh_sources(self) -> None:
        before, self._sources = self.source, sources(self._services.library)
        if self.source is None:
            self.sae_id = self._sources[0].sae.id if self._sources else None
        self.sources_changed.emit()
        if self.source != before:
            self._show_source()

    def save_state(self) -> dict[str, Any]:
        return {
            "sae_id": self.sae_id,
            "selections": {
                str(sae_id): [[feature, strength] for feature, strength in chosen.items()]
                for sae_id, chosen in self._selections.items()
                if chosen
            },
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        known = {source.sae.id: source.sae for source in self._sources}
        selections = state.get("selections")
        for key, chosen in (selections if isinstance(selections, dict) else {}).items():
            sae = known.get(int(key)) if str(key).isdigit() else None
            if sae is None:
                continue
            self._selections[sae.id] = {
                int(feature): min(max(float(strength), -STRONGEST), STRONGEST)
                for feature, strength in chosen
                if 0 <= int(feature) < sae.d_sae
            }
        if state.get("sae_id") in known:
            self.sae_id = state["sae_id"]
        self._show_source()


def problem_of(error: Exception) -> UserError:
    """An error for a panel: known ones in their words, a bug with its name."""
    return explain(error) or UserError(
        "Something went wrong inside miStudio",
        f"{type(error).__name__}: {error}",
        "Please report it.",
    )
