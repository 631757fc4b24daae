"""The features of one discovery pass, ready to be searched; no widgets, nothing that changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mistudio.errors import Incompatible
from mistudio.library.features import FeatureNote
from mistudio.library.library import Library

RESULTS = 8
_PROMOTED_SHOWN = 3
_PROMOTES, _INSIDE, _NOT_FOUND = (4, 6), 7, 99  # ranks
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


@dataclass(frozen=True, eq=False)
class FeatureIndex:
    """Columns, made once; `len` is the number of features. `tokens` are the texts of all tokens
    that occur; `top` [n] and `promoted` [n, k], strongest first, are places in it."""

    sae_id: int
    run_id: int
    tokens: tuple[str, ...]
    top: np.ndarray
    promoted: np.ndarray
    max_activations: tuple[float, ...]
    has_chat_format: bool
    scores: Mapping[int, float] = field(default_factory=dict)
    """Output scores, of the features that have one."""

    def __len__(self) -> int:
        return len(self.max_activations)

    def item(
        self,
        feature: int,
        notes: Mapping[int, FeatureNote],
        descriptions: Mapping[int, str] | None = None,
    ) -> FeatureItem | None:
        if not 0 <= feature < len(self):
            return None
        note = notes.get(feature)
        promoted = (self.tokens[place] for place in self.promoted[feature])
        return FeatureItem(
            feature,
            note.label if note else "",
            (descriptions or {}).get(feature, ""),
            self.tokens[self.top[feature]],
            tuple(text for text in promoted if text),
            self.max_activations[feature],
        )


def build_index(library: Library, sae_id: int, run_id: int) -> FeatureIndex:
    """Read a discovery pass; imports the tokenizer's library, so never in the GUI thread."""
    from mistudio.engine.features.store import FeatureStore
    from mistudio.engine.models.loading import load_tokenizer

    sae = library.saes.get(sae_id)
    store = FeatureStore(library.path(library.feature_runs.get(run_id).folder))
    tokenizer = load_tokenizer(library.path(library.models.get(sae.model_id).folder))
    ids = np.column_stack([store.columns["top_token"], store.array("logit_ids")[:, 0]])
    known, places = np.unique(ids, return_inverse=True)  # each token is decoded once
    places = places.reshape(ids.shape)
    return FeatureIndex(
        sae_id=sae_id,
        run_id=run_id,
        tokens=tuple(
            str(tokenizer.decode([token])) if token >= 0 else "" for token in known.tolist()
        ),
        top=places[:, 0],
        promoted=places[:, 1:],
        max_activations=tuple(np.asarray(store.columns["max_activation"], dtype=float).tolist()),
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
    """The first of `total` features that a search matches; `note`: what could not be searched;
    `inside`: where it was found of those that do not show it."""

    search: str
    total: int
    features: tuple[int, ...] = ()
    note: str = ""
    inside: Mapping[int, str] = field(default_factory=dict)


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
        return replace(found, note=OLD_DISCOVERY)
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
    rank = np.full(len(index), _NOT_FOUND)
    if wanted.startswith("#") and number.isdigit():
        rank[[f for f in range(len(index)) if str(f).startswith(number)]] = 2
    else:
        same = np.array([text.strip().lower() == wanted for text in index.tokens], dtype=bool)
        within = np.array([wanted in text.lower() for text in index.tokens], dtype=bool)
        rank[[feature for feature in deeper if feature < len(index)]] = _INSIDE
        rank[within[index.promoted].any(1)] = 6
        rank[within[index.top]] = 5
        rank[same[index.promoted].any(1)] = 4
        rank[same[index.top]] = 3
        labels = ((f, note.label.lower()) for f, note in notes.items() if f < len(index))
        rank[[feature for feature, label in labels if label and wanted in label]] = 1
    if number.isdigit() and int(number) < len(index):
        rank[int(number)] = 0
    strongest = np.array(index.max_activations)
    rank[strongest <= 0] = _NOT_FOUND
    total = int((rank < _NOT_FOUND).sum())
    best = np.lexsort((-strongest, rank))[: min(total, RESULTS)]
    inside = {}
    for feature in best.tolist():
        if rank[feature] in _PROMOTES:
            tokens = (index.tokens[place] for place in index.promoted[feature])
            token = min((t for t in tokens if wanted in t.lower()), key=len)
            inside[feature] = f"promotes {_quoted(token)}"
        elif rank[feature] == _INSIDE:
            noted = feature in notes and wanted in notes[feature].note.lower()
            inside[feature] = "in its note" if noted else "in its examples"
    return Found(search, total, tuple(best.tolist()), inside=inside)


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
