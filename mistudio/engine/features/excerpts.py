"""The contexts that a feature is scored on, one by one and as text: what people and language
models are shown of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mistudio.engine.datasets.tokenizers import piece
from mistudio.engine.datasets.tokens import TokenSplit
from mistudio.engine.features.rules import NOTHING
from mistudio.engine.features.score import ACTIVE, EMPTY, STRONGEST, stored_contexts, tried
from mistudio.engine.features.store import FeatureStore

Windows = Callable[[np.ndarray], np.ndarray]
"""Activations float32 [n, context] of one feature in windows of text [n]."""


@dataclass(frozen=True, eq=False)
class Excerpt:
    """Consecutive tokens `ids` int64 [w] of one document, from position `first` of window `window`
    on. `kind` is one of score's (`ACTIVE`,
    `STRONGEST`, `RANDOM`, `HARD`), `decile` that of the activation it was drawn for (-1: none),
    `peak` the place of that token in `ids`. `tried`: its document is of the half on which
    descriptions are tried, not made. `activations` float32 [w], 0 where the feature is not active;
    empty where they were not asked for (`with_activations`)."""

    ids: np.ndarray
    first: int
    peak: int
    kind: int
    decile: int
    document: int
    window: int
    tried: bool
    activations: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def is_active(self) -> bool:
        return self.kind in (ACTIVE, STRONGEST)


def excerpts(store: FeatureStore, tokens: TokenSplit, feature: int) -> list[Excerpt]:
    """All contexts that a discovery keeps of a feature, of at most 32 tokens each."""
    found = stored_contexts(store, tokens, np.array([feature]))
    test = tried(found.document[0])
    made = []
    for i in np.flatnonzero(found.kind[0] != EMPTY):
        first, peak = int(found.first[0, i]), int(found.peak[0, i])
        low, high = _around(found.ids[:, 0, i] != NOTHING, peak)
        made.append(
            Excerpt(
                ids=found.ids[low:high, 0, i].astype(np.int64),
                first=first + low,
                peak=peak - low,
                kind=int(found.kind[0, i]),
                decile=int(found.decile[0, i]),
                document=int(found.document[0, i]),
                window=int(found.window[0, i]),
                tried=bool(test[i]),
            )
        )
    return made


def with_activations(
    excerpts: Sequence[Excerpt], chosen: Sequence[Excerpt], activations: Windows
) -> list[Excerpt]:
    """The excerpts with the activations of those `chosen`, read at once; of the others that are
    inactive they are known to be 0."""
    wanted = {id(e) for e in chosen if e.is_active}
    windows = np.unique([e.window for e in excerpts if id(e) in wanted]).astype(np.int64)
    values = activations(windows) if len(windows) else np.empty((0, 0), np.float32)
    found = []
    for e in excerpts:
        if id(e) in wanted:
            row = values[np.searchsorted(windows, e.window)]
            e = replace(e, activations=row[e.first : e.first + len(e.ids)])
        elif not e.is_active:
            e = replace(e, activations=np.zeros(len(e.ids), np.float32))
        found.append(e)
    return found


def _around(there: np.ndarray, place: int) -> tuple[int, int]:
    """The longest stretch [low, high) without a gap around a place."""
    gaps = np.flatnonzero(~there)
    before, after = gaps[gaps < place], gaps[gaps > place]
    low = int(before[-1]) + 1 if len(before) else 0
    high = int(after[0]) if len(after) else len(there)
    return low, high


def pieces(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Each token's share of the text; a character that several tokens make up stands at the last
    of them. Joined they are the text as it is written; of a character that is cut off at either
    end nothing is shown."""
    numbers, shown, found = [int(i) for i in ids], "", []
    for end in range(1, len(numbers) + 1):
        # What is not a whole character yet is left to the token that completes it.
        text = tokenizer.decode(numbers[:end], clean_up_tokenization_spaces=False)
        whole = text.rstrip("\ufffd")
        if not whole.startswith(shown):  # a tokenizer that spells by what follows
            return [piece(tokenizer, number) for number in numbers]
        found.append(whole[len(shown) :])
        shown = whole
    return [part.replace("\ufffd", "") for part in found]
