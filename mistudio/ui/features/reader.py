"""Reading one discovery away from the GUI thread: the columns of the table, rows with their
tokens, the search. Nothing here knows widgets.

Opening reads numbers only. The tokenizer, the tokens and the documents are opened when the first
text is asked for: the table stands before them.
`FeatureReader` methods run in background threads, one at a time; what they return is plain data
that is never changed again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mistudio.engine.features.store import Example, FeatureMeta, FeatureStore
from mistudio.library.feature_index import FIELDS, FILE, FeatureIndex
from mistudio.library.library import Library
from mistudio.library.records import FeatureRun
from mistudio.ui.features.shown import TOKEN_COLUMNS

CONTEXT = 16  # tokens on each side of the peak that a table row holds


@dataclass(frozen=True)
class Snippet:
    """Tokens around a peak with their activations. `texts` and `activations` have equal length;
    tokens that hold parts of one character stand together."""

    texts: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int


@dataclass(frozen=True)
class RowText:
    """What a table row shows beside the numbers; `description` is "" for a feature without
    examples. `pieces`: the texts of columns that hold tokens."""

    feature: int
    description: str
    evidence: str
    snippet: Snippet
    pieces: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Columns:
    """The table's numbers, in memory: [n_features] each. `meta` tells the sample sizes;
    `histograms` [n_features, 64] stay on disk, None where a discovery has none."""

    meta: FeatureMeta
    values: dict[str, np.ndarray] = field(repr=False)
    histograms: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.meta.n_features

    @property
    def alive(self) -> np.ndarray:
        return self.values["density"] > 0


@dataclass(frozen=True)
class _Text:
    """What it takes to turn places into text."""

    tokens: Any
    tokenizer: Any
    documents: Any | None


class FeatureReader:
    """An opened discovery: the store, the tokens it was made over, the tokenizer, the documents."""

    def __init__(self, library: Library, run: FeatureRun) -> None:
        self._library, self._run = library, run
        self._store = FeatureStore(library.path(run.folder))
        new = self._store.meta.format > 1
        self.columns = Columns(
            self._store.meta,
            {name: np.array(column) for name, column in self._store.columns.items()},
            np.asarray(self._store.histograms) if new else None,
        )
        index = self._store.folder / FILE
        self.indexed = index.exists()
        """Whether descriptions and contexts can be searched."""
        self._index: FeatureIndex | None = None
        self._lock = threading.RLock()
        self._searching = threading.Lock()
        self._opened: _Text | None = None
        self._pieces: dict[int, str] = {}
        self._lower: np.ndarray | None = None

    @classmethod
    def open(cls, library: Library, run: FeatureRun) -> FeatureReader:
        """Milliseconds; the texts come later."""
        return cls(library, run)

    # What the dialog of one feature reads from; seconds where it is not open yet.

    @property
    def store(self) -> FeatureStore:
        return self._store

    @property
    def tokens(self) -> Any:
        return self._text().tokens

    @property
    def tokenizer(self) -> Any:
        return self._text().tokenizer

    @property
    def documents(self) -> Any | None:
        return self._text().documents

    def _text(self) -> _Text:
        with self._lock:
            if self._opened is None:
                from mistudio.engine.datasets.documents import Documents
                from mistudio.engine.models.loading import load_tokenizer
                from mistudio.jobs.features import open_features

                library, run = self._library, self._run
                _, tokens = open_features(library, run)
                model = library.models.get(library.saes.get(run.sae_id).model_id)
                tokenizer = load_tokenizer(library.path(model.folder))
                tokenization = library.tokenizations.get(run.tokenization_id)
                dataset = library.datasets.find(tokenization.dataset_id)
                there = dataset is not None and not dataset.link
                documents = Documents(library.path(dataset.folder)) if there and dataset else None
                self._opened = _Text(tokens, tokenizer, documents)
            return self._opened

    # --- rows -----------------------------------------------------------------------------------

    def rows(self, features: Sequence[int]) -> list[RowText]:
        """Descriptions and strongest examples of some features."""
        with self._lock:
            tokens = self._text().tokens
            found = []
            for feature in features:
                examples = self._store.examples(feature, tokens, 1)
                description, evidence = self._described(feature)
                snippet = self._line(examples[0]) if examples else Snippet((), (), 0)
                found.append(RowText(feature, description, evidence, snippet, self._named(feature)))
            return found

    def _line(self, example: Example) -> Snippet:
        """The tokens around the peak; those of one character stand together."""
        from mistudio.ui.features.dialog.reading import joined

        first = max(0, example.peak - CONTEXT)
        ids = [int(i) for i in example.ids[first : example.peak + CONTEXT + 1]]
        values = [float(a) for a in example.activations[first : example.peak + CONTEXT + 1]]
        texts, starts = joined(ids, self._piece, self.tokenizer.decode)
        ends = [*starts[1:], len(ids)]
        strongest = tuple(max(values[a:b]) for a, b in zip(starts, ends, strict=True))
        peak = sum(start <= example.peak - first for start in starts) - 1
        return Snippet(tuple(texts), strongest, peak)

    def _named(self, feature: int) -> dict[str, str]:
        from mistudio.engine.datasets.tokenizers import piece

        columns = self._store.columns
        return {
            name: piece(self.tokenizer, int(columns[name][feature]))
            for name in TOKEN_COLUMNS
            if name in columns and columns[name][feature] >= 0
        }

    # --- descriptions ---------------------------------------------------------------------------

    def _described(self, feature: int) -> tuple[str, str]:
        """(description, what it rests on); discoveries of earlier versions have none."""
        if not self._store.described:
            return "", "Discover again for a description: this discovery is of an earlier version."
        contexts = int(self._store.array("score_contexts")[feature])
        evidence = f"A rule found in {contexts:,} contexts that activate it." if contexts else ""
        return self._store.description(feature), evidence

    # --- tokens ---------------------------------------------------------------------------------

    def _piece(self, token: int) -> str:
        """A token's text with the blank before it, which decoding alone may drop."""
        text = self._pieces.get(token)
        if text is None:
            from mistudio.ui.features.dialog.reading import piece_of

            text = self._pieces[token] = piece_of(self.tokenizer, token)
        return text

    # --- search ---------------------------------------------------------------------------------

    def search(self, text: str, fields: Sequence[str] = FIELDS) -> np.ndarray:
        """int32: features in whose texts every word of `text` begins some word, ascending. A
        discovery without an index is searched for tokens and promoted tokens that contain it."""
        if not self.indexed:
            return self._search_tokens(text, fields)
        with self._searching:
            if self._index is None:
                self._index = FeatureIndex(self._store.folder / FILE)
            return self._index.search(text, [name for name in fields if name in FIELDS])

    def _search_tokens(self, text: str, fields: Sequence[str]) -> np.ndarray:
        wanted = text.strip().lower()
        with self._lock:
            matching = np.array([wanted in piece for piece in self._lower_vocabulary()], bool)
            top = np.asarray(self._store.columns["top_token"])
            hit = np.zeros(len(self._store), bool)
            if "tokens" in fields:
                hit |= matching[np.maximum(top, 0)] & (top >= 0)
            if "logits" in fields:
                hit |= matching[np.asarray(self._store.array("logit_ids")[:, 0])].any(1)
            return np.flatnonzero(hit).astype(np.int32)

    def _lower_vocabulary(self) -> np.ndarray:
        """Every token's text in lower case, [vocabulary], decoded once."""
        if self._lower is None:
            top, promoted = self._store.columns["top_token"], self._store.array("logit_ids")
            highest = max(int(np.max(top, initial=0)), int(np.max(promoted, initial=0)))
            n = max(len(self.tokenizer), highest + 1)
            self._lower = np.array([self._piece(token).lower() for token in range(n)], object)
        return self._lower
