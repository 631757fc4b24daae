"""The features of one discovery pass, ready to be searched; no widgets, nothing that changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mistudio.errors import Incompatible
from mistudio.library.features import FeatureNote
from mistudio.library.library import Library

RESULTS = 8
_PROMOTED_SHOWN = 3
_BY_INDEX = 7  # rank of what only the index of descriptions and examples knows
OLD_DISCOVERY = (
    "Descriptions and examples are not searched: an earlier version made this discovery. "
    "Discover the features again to search them too."
)


@dataclass(frozen=True)
class FeatureItem:
    """A feature as rows show it: its label, what a rule says, or the tokens that tell most."""

    feature: int
    label: str
    description: str
    top_token: str
    promoted: tuple[str, ...]
    max_activation: float

    @property
    def text(self) -> str:
        if self.label or self.description:
            return self.label or self.description
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
    """Plain Python, made once; `len` is the number of features."""

    sae_id: int
    run_id: int
    top_tokens: tuple[str, ...]
    promoted: tuple[tuple[str, ...], ...]
    max_activations: tuple[float, ...]
    has_chat_format: bool
    scores: Mapping[int, float] = field(default_factory=dict)
    """Output scores, of the features that have one."""

    def __len__(self) -> int:
        return len(self.top_tokens)

    def item(
        self,
        feature: int,
        notes: Mapping[int, FeatureNote],
        descriptions: Mapping[int, str] | None = None,
    ) -> FeatureItem | None:
        if not 0 <= feature < len(self):
            return None
        note = notes.get(feature)
        return FeatureItem(
            feature,
            note.label if note else "",
            (descriptions or {}).get(feature, ""),
            self.top_tokens[feature],
            self.promoted[feature],
            self.max_activations[feature],
        )


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
        scores=output_scores(library, run_id),
    )


def output_scores(library: Library, run_id: int) -> dict[int, float]:
    """A row of the library for each scored feature: for background threads."""
    found = library.feature_analyses.of_run(run_id, "output_score")
    return {feature: float(result["score"]) for feature, result in found.items()}


# --- search ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The first of `total` features that a search matches; `note`: what could not be searched."""

    search: str
    total: int
    features: tuple[int, ...] = ()
    note: str = ""


def find(
    library: Library, index: FeatureIndex, notes: Mapping[int, FeatureNote], search: str
) -> Found:
    """Everywhere: numbers, labels and tokens first, then descriptions, notes and examples."""
    from mistudio.jobs.features import search_features

    if search.strip().lower().removeprefix("#").isdigit():
        return search_index(index, notes, search)
    run = library.feature_runs.get(index.run_id)
    try:
        deeper = [int(feature) for feature in search_features(library, run, search)]
    except Incompatible:
        found = search_index(index, notes, search)
        return Found(search, found.total, found.features, OLD_DISCOVERY)
    return search_index(index, notes, search, deeper)


def search_index(
    index: FeatureIndex,
    notes: Mapping[int, FeatureNote],
    search: str,
    deeper: Sequence[int] = (),
) -> Found:
    """By `#id`, then label, then the token it fires on, then the tokens it promotes, then those
    that are in `deeper`. Features that never fired cannot steer and are left out."""
    wanted = search.strip().lower()
    number = wanted.removeprefix("#")
    also = frozenset(deeper)
    ranked: list[tuple[int, float, int]] = []
    for feature, top in enumerate(index.top_tokens):
        strongest = index.max_activations[feature]
        if strongest <= 0:
            continue
        label = notes[feature].label.lower() if feature in notes else ""
        rank = _rank(wanted, number, feature, label, top, index.promoted[feature])
        if rank is None and feature in also:
            rank = _BY_INDEX
        if rank is not None:
            ranked.append((rank, -strongest, feature))
    ranked.sort()
    return Found(search, len(ranked), tuple(feature for *_, feature in ranked[:RESULTS]))


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


# --- what features are about ----------------------------------------------------------------------


@dataclass(frozen=True)
class Descriptions:
    """What rules say of some features of an SAE; "" where they say nothing."""

    sae_id: int
    texts: dict[int, str] = field(default_factory=dict)


def describe(library: Library, sae_id: int, run_id: int, features: Sequence[int]) -> Descriptions:
    """Reads examples and the tokenizer: for background threads."""
    from mistudio.jobs.features import describe_features

    run = library.feature_runs.get(run_id)
    texts = describe_features(library, run, features)
    return Descriptions(sae_id, dict(zip(features, texts, strict=True)))


@dataclass(frozen=True)
class Suggestion:
    """A feature worth a try, with what its strongest examples have in common."""

    feature: int
    text: str


def suggestions(library: Library, index: FeatureIndex) -> tuple[Suggestion, ...]:
    """The best output scores, where there are any; else features that a rule tells most
    surely. Takes a second or two of background."""
    run = library.feature_runs.get(index.run_id)
    if index.scores:
        best = sorted(index.scores, key=lambda feature: -index.scores[feature])[:RESULTS]
        texts = describe(library, index.sae_id, run.id, best).texts
        notes = library.feature_notes.of_sae(index.sae_id)
        items = [(feature, index.item(feature, notes, texts)) for feature in best]
        return tuple(Suggestion(feature, item.text) for feature, item in items if item)
    from mistudio.engine.features.rules import Vocabulary
    from mistudio.engine.features.showcase import showcase
    from mistudio.engine.models.loading import load_tokenizer
    from mistudio.jobs.features import open_features

    store, tokens = open_features(library, run)
    model = library.models.get(library.saes.get(index.sae_id).model_id)
    tokenizer = load_tokenizer(library.path(model.folder))
    vocabulary = Vocabulary.of(tokenizer, max(tokens.meta.vocab_size, len(tokenizer)))
    return tuple(
        Suggestion(
            feature,
            f"{found.text} • right in {round(100 * found.accuracy)}% of {found.contexts} contexts",
        )
        for feature, found in showcase(store, vocabulary, RESULTS)
    )
