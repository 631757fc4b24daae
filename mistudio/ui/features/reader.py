"""Reading one discovery pass away from the GUI thread: the columns of the table, rows with their
tokens, one feature in detail, the search. Nothing here knows widgets.

`FeatureReader` methods run in background threads, one at a time; what they return is plain data
that is never changed again.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mistudio.engine.features.describe import background, describe
from mistudio.engine.features.store import Example, FeatureMeta, FeatureStore
from mistudio.library.library import Library
from mistudio.library.records import FeatureRun

DESCRIBED = 10  # examples that an automatic description looks at
CONTEXT = 16  # tokens on each side of the peak that a table row holds


@dataclass(frozen=True)
class Snippet:
    """Tokens around a peak with their activations. `texts` and `activations` have equal length."""

    texts: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int


@dataclass(frozen=True)
class RowText:
    """What a table row shows beside the numbers; `description` is "" for a feature without
    examples."""

    feature: int
    description: str
    evidence: str
    snippet: Snippet


@dataclass(frozen=True)
class DetailExample:
    """One stored example as the dialog shows it."""

    snippet: Snippet
    ids: tuple[int, ...]
    activation: float
    document: int
    title: str


@dataclass(frozen=True)
class Details:
    """One feature in full. `promoted`, `suppressed`: (token text, centred logit)."""

    feature: int
    description: str
    evidence: str
    examples: tuple[DetailExample, ...]
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Columns:
    """The table's numbers, in memory: float32 [n_features] each. `meta` tells the sample sizes."""

    meta: FeatureMeta
    values: dict[str, np.ndarray] = field(repr=False)

    def __len__(self) -> int:
        return self.meta.n_features

    @property
    def alive(self) -> np.ndarray:
        return self.values["density"] > 0


class FeatureReader:
    """An opened pass: the store, the tokens it was made over, the tokenizer, the documents."""

    def __init__(
        self,
        store: FeatureStore,
        promoted: np.ndarray,
        tokens: Any,
        tokenizer: Any,
        documents: Any | None,
    ) -> None:
        """`promoted` [n_features, n]: ids of the tokens that each feature promotes most."""
        self.columns = Columns(
            store.meta, {name: np.array(column) for name, column in store.columns.items()}
        )
        self._store, self._promoted, self._tokens = store, promoted, tokens
        self._tokenizer, self._documents = tokenizer, documents
        self._lock = threading.Lock()
        self._pieces: dict[int, str] = {}
        self._vocabulary: np.ndarray | None = None
        self._common: Counter[str] | None = None

    @classmethod
    def open(cls, library: Library, run: FeatureRun) -> FeatureReader:
        """Open everything that a pass needs; seconds where the tokenizer is not loaded yet."""
        from mistudio.engine.datasets.documents import Documents
        from mistudio.engine.models.loading import load_tokenizer
        from mistudio.jobs.features import open_features

        store, tokens = open_features(library, run)
        promoted = np.load(library.path(run.folder) / "logit_ids.npy", mmap_mode="r")[:, 0]
        model = library.models.get(library.saes.get(run.sae_id).model_id)
        tokenizer = load_tokenizer(library.path(model.folder))
        dataset = library.datasets.find(library.tokenizations.get(run.tokenization_id).dataset_id)
        documents = Documents(library.path(dataset.folder)) if dataset else None
        return cls(store, promoted, tokens, tokenizer, documents)

    # What the dialog of one feature reads from.

    @property
    def store(self) -> FeatureStore:
        return self._store

    @property
    def tokens(self) -> Any:
        return self._tokens

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def documents(self) -> Any | None:
        return self._documents

    # --- rows -----------------------------------------------------------------------------------

    def rows(self, features: Sequence[int]) -> list[RowText]:
        """Descriptions and strongest examples of some features."""
        with self._lock:
            found = []
            for feature in features:
                examples = self._store.examples(feature, self._tokens, DESCRIBED)
                description, evidence = self._describe(examples)
                snippet = self._snippet(examples[0], CONTEXT) if examples else Snippet((), (), 0)
                found.append(RowText(feature, description, evidence, snippet))
            return found

    def details(self, feature: int) -> Details:
        """Everything that is stored of one feature."""
        with self._lock:
            examples = self._store.examples(feature, self._tokens)
            description, evidence = self._describe(examples[:DESCRIBED])
            return Details(
                feature,
                description,
                evidence,
                tuple(self._detail(example) for example in examples),
                self._logits(self._store.promoted(feature)),
                self._logits(self._store.suppressed(feature)),
            )

    def _detail(self, example: Example) -> DetailExample:
        number = self._tokens.document_at(
            example.window, example.position, self._store.meta.context
        )
        title = self._documents[number].title if self._documents is not None else ""
        return DetailExample(
            self._snippet(example, len(example.ids)),
            tuple(int(i) for i in example.ids),
            example.activation,
            number,
            title,
        )

    def _snippet(self, example: Example, around: int) -> Snippet:
        first, last = max(0, example.peak - around), example.peak + around + 1
        return Snippet(
            tuple(self._piece(int(i)) for i in example.ids[first:last]),
            tuple(float(a) for a in example.activations[first:last]),
            example.peak - first,
        )

    def _logits(self, pairs: list[tuple[int, float]]) -> tuple[tuple[str, float], ...]:
        return tuple((self._piece(token), value) for token, value in pairs)

    def _describe(self, examples: Sequence[Example]) -> tuple[str, str]:
        if not examples:
            return "", ""
        if self._common is None:
            self._common = background(self._tokens, self._tokenizer, self._store.meta.context)
        found = describe(examples, self._tokenizer, self._common)
        if found is None:
            return "", ""
        kind = {
            "token": "the strongest token is the same",
            "words": "the contexts share words",
            "mixed": "no single token or word; the most common is shown first",
        }[found.kind]
        return found.text, f"{kind}: {found.share:.0%} of the top {found.n} examples"

    # --- tokens ---------------------------------------------------------------------------------

    def _piece(self, token: int) -> str:
        """A token's text with the blank before it, which decoding alone may drop."""
        text = self._pieces.get(token)
        if text is None:
            text = self._tokenizer.decode([token])
            raw = self._tokenizer.convert_ids_to_tokens(token)
            if isinstance(raw, str) and raw.startswith("▁") and not text.startswith(" "):
                text = f" {text}"
            self._pieces[token] = text
        return text

    def _lower_vocabulary(self) -> np.ndarray:
        """Every token's text in lower case, [vocabulary], decoded once."""
        if self._vocabulary is None:
            top = self._store.columns["top_token"]
            highest = max(int(np.max(top, initial=0)), int(np.max(self._promoted, initial=0)))
            n = max(len(self._tokenizer), highest + 1)
            self._vocabulary = np.array([self._piece(token).lower() for token in range(n)], object)
        return self._vocabulary

    def search(self, text: str) -> np.ndarray:
        """Bool [n_features]: the top token or one of the promoted tokens contains the text."""
        wanted = text.strip().lower()
        with self._lock:
            matching = np.array([wanted in piece for piece in self._lower_vocabulary()], bool)
            top = self._store.columns["top_token"]
            hit = matching[np.maximum(top, 0)] & (np.asarray(top) >= 0)
            return hit | matching[self._promoted].any(1)
