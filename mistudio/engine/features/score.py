"""How well one can tell where a feature is active from a short description of it: the
interpretability score, on contexts that the description was not made from.

Contexts are split by document: the rule of each feature (`rules`) is fitted on those of one half
of all documents and tried on those of the other. Tried on are active contexts from every tenth of
the feature's activations, and contexts without any activation, half of them drawn at random, half
containing one of the tokens that the feature is most often active on. The measure is balanced
accuracy, so that saying "never" or "always" gets 0.5; what the rules of other features get on the
same contexts is the null that is taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from mistudio.engine.datasets.tokens import TokenSplit
from mistudio.engine.features.accumulators import priority
from mistudio.engine.features.columns import LEAST_CONTEXTS
from mistudio.engine.features.rules import (
    NOTHING,
    WEAK,
    Rules,
    Vocabulary,
    balanced_accuracy,
    fit,
    visible,
    word_shares,
)
from mistudio.engine.features.store import DECILES, NONE, FeatureStore
from mistudio.engine.progress import SILENT, Progress

EMPTY, ACTIVE, STRONGEST, RANDOM, HARD = range(5)
WIDTH, BEFORE = 32, 23  # tokens of a context, and of these before its strongest one
LEAST_TRIED = 5  # of active and of inactive ones, on either side of the split
NULLS = 200  # pairs of a rule and another feature's contexts
DRAWS = 1000  # of the bootstrap
INTERPRETABLE = 0.70  # lower bound of balanced accuracy
BLOCK = 512  # features at a time
OUTSTANDING = 6.0  # logit gap from which on a description names the tokens that are promoted
NAMED = 3  # tokens in a description that are no rule


@dataclass(frozen=True)
class Contexts:
    """Contexts of n features, m each (short lists end with `EMPTY` ones).

    `ids` int32 [W, n, m]: tokens, `NOTHING` for what does not count or belongs to another document.
    `first` int32 [n, m]: position of the first in its window of text. `peak` int16 [n, m]: place
    of the strongest token of an active context (of an inactive one, any). `kind` uint8 [n, m]:
    `ACTIVE`, drawn from tenth `decile` int8 [n, m]; `STRONGEST`, one of the top examples, which
    is only fitted on; `RANDOM` or `HARD`, in whose whole window of text the feature is nowhere
    active. Active ones lie in different windows of text, number `window` int64 [n, m]. `document`
    int64 [n, m].
    """

    ids: np.ndarray
    first: np.ndarray
    peak: np.ndarray
    kind: np.ndarray
    decile: np.ndarray
    document: np.ndarray
    window: np.ndarray

    @property
    def n(self) -> int:
        return len(self.kind)


@dataclass(frozen=True)
class Score:
    """Of one feature.

    `score` = clip(2 (accuracy - 0.5), 0, 1), where `accuracy` is balanced accuracy on `active`
    and `inactive` contexts, less what the null exceeds 0.5 by; `low` and `high` are its 95 %
    interval. `percentile` is the share of the null's accuracies below it, in %. `by_decile` is
    the accuracy with the active contexts of one tenth only, weakest first, NaN where it has none.
    """

    score: float
    accuracy: float
    low: float
    high: float
    percentile: float
    active: int
    inactive: int
    by_decile: tuple[float, ...]


def score_of(accuracy: float, chance: float = 0.5) -> float:
    """What an accuracy, the null's excess over chance taken off, is worth: 0 at chance, 1 where
    it is never wrong."""
    return min(max((accuracy - chance) / (1 - chance), 0.0), 1.0)


@dataclass(frozen=True)
class Evidence:
    """What one scorer found for a feature: `accuracy` and its interval, less what the same
    scorer's null exceeds `chance` by."""

    scorer: str
    accuracy: float
    low: float
    high: float
    chance: float = 0.5

    @property
    def score(self) -> float:
        return score_of(self.accuracy, self.chance)


def best(found: Iterable[Evidence]) -> Evidence | None:
    """The scorer that tells the feature best, each counted against its own null only; None where
    none has a score."""
    known = [one for one in found if not np.isnan(one.accuracy)]
    return max(known, key=lambda one: one.score, default=None)


@dataclass(frozen=True)
class Scores:
    """Of n features: float64 [n] each, NaN where there is no score (fewer than 20 activating
    contexts, or too few on one side of the split); `active` and `inactive` int32, contexts that
    were tried; `contexts` int32, activating ones in all; `by_decile` [n, 10]. `null` is the mean
    accuracy of `nulls` pairs of a rule and another feature's contexts (0.5 where there are
    none)."""

    rules: Rules
    contexts: np.ndarray
    accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray
    percentile: np.ndarray
    active: np.ndarray
    inactive: np.ndarray
    by_decile: np.ndarray
    null: float
    nulls: int

    def __len__(self) -> int:
        return len(self.accuracy)

    @property
    def score(self) -> np.ndarray:
        """float64 [n]"""
        return np.clip(2 * (self.accuracy - 0.5), 0.0, 1.0)

    @property
    def interpretable(self) -> np.ndarray:
        """Bool [n]: the lower bound of the accuracy is 0.70 at least."""
        return self.low >= INTERPRETABLE

    @property
    def tried(self) -> np.ndarray:
        """int32 [n]: contexts that the accuracy is of; 0 where there is none."""
        return np.where(np.isnan(self.accuracy), 0, self.active + self.inactive).astype(np.int32)

    @cached_property
    def unclear(self) -> np.ndarray:
        """Bool [n]: there is a rule, but it fails where it is tried (or, where it could not be
        tried, fits badly)."""
        right = np.where(np.isnan(self.accuracy), self.rules.fit, self.accuracy)
        return (self.rules.family >= 0) & ~(right >= WEAK)

    def columns(self) -> dict[str, np.ndarray]:
        """For `store.add_columns`: `columns.SCORES`, of all features of a store."""
        return {
            "score": self.score,
            "score_accuracy": self.accuracy,
            "score_low": self.low,
            "score_high": self.high,
            "score_percentile": self.percentile,
            "score_contexts": self.tried,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """For `store.add_arrays`; `Scores.read` gives them back."""
        found = {
            f"score_{part.name}": np.asarray(getattr(self, part.name))
            for part in fields(Scores)
            if part.name != "rules"
        }
        rules = {f"rule_{part.name}": getattr(self.rules, part.name) for part in fields(Rules)}
        return found | rules

    @classmethod
    def read(cls, store: FeatureStore) -> Scores | None:
        """The scores of all features that were added to a discovery; None where there are none."""
        names = [f"score_{part.name}" for part in fields(Scores) if part.name != "rules"]
        names += [f"rule_{part.name}" for part in fields(Rules)]
        if not all((store.folder / f"{name}.npy").exists() for name in names):
            return None
        rules = Rules(*(np.array(store.array(f"rule_{part.name}")) for part in fields(Rules)))
        found: dict[str, Any] = {
            part.name: np.array(store.array(f"score_{part.name}"))
            for part in fields(Scores)
            if part.name != "rules"
        }
        found |= {"null": float(found["null"]), "nulls": int(found["nulls"])}
        return cls(rules=rules, **found)

    def of(self, i: int) -> Score | None:
        if np.isnan(self.accuracy[i]):
            return None
        return Score(
            float(self.score[i]),
            float(self.accuracy[i]),
            float(self.low[i]),
            float(self.high[i]),
            float(self.percentile[i]),
            int(self.active[i]),
            int(self.inactive[i]),
            tuple(float(x) for x in self.by_decile[i]),
        )

    def description(self, i: int, vocabulary: Vocabulary) -> str:
        """The rule in words. A rule that fails where it is tried (or, where it could not be
        tried, fits badly) is called unclear."""
        if not self.contexts[i]:
            return "Never active in this text"
        rule = self.rules.rule(i, vocabulary)
        if rule is None:
            return "Active in nearly every context"
        text = f"no clear pattern; nearest: {rule.text}" if self.unclear[i] else rule.text
        return text[0].upper() + text[1:]


def score_contexts(vocabulary: Vocabulary, blocks: Iterable[Contexts], seed: int = 0) -> Scores:
    """Fit and try the rules of all features of `blocks`, in order."""
    parts: list[Scores] = []
    nulls: list[np.ndarray] = []
    for block in blocks:
        part, null = _score_block(vocabulary, block, seed + len(parts))
        parts.append(part)
        nulls.append(null)
    null = np.sort(np.concatenate(nulls))
    excess = max(float(null.mean()) - 0.5, 0.0) if len(null) else 0.0
    joined = _joined(parts)
    known = ~np.isnan(joined.accuracy)
    percentile = np.full(len(joined), np.nan)
    if len(null):
        below = np.searchsorted(null, joined.accuracy[known], side="left")
        percentile[known] = 100.0 * below / len(null)
    return replace(
        joined,
        accuracy=joined.accuracy - excess,
        low=joined.low - excess,
        high=joined.high - excess,
        by_decile=joined.by_decile - excess,
        percentile=percentile,
        null=float(null.mean()) if len(null) else 0.5,
        nulls=len(null),
    )


def score_store(
    store: FeatureStore,
    tokens: TokenSplit,
    vocabulary: Vocabulary,
    features: Sequence[int] | np.ndarray | None = None,
    progress: Progress = SILENT,
) -> Scores:
    """Of some features of a discovery (all by default), in their order."""
    chosen = np.arange(len(store)) if features is None else np.asarray(features, np.int64)

    def blocks() -> Iterator[Contexts]:
        for start in range(0, len(chosen), BLOCK):
            progress.check()
            yield stored_contexts(store, tokens, chosen[start : start + BLOCK])
            progress.report(min(start + BLOCK, len(chosen)), len(chosen), phase="scores")

    return score_contexts(vocabulary, blocks(), store.meta.seed)


def rule_descriptions(
    store: FeatureStore,
    scores: Scores,
    vocabulary: Vocabulary,
    features: Iterable[int] | None = None,
) -> Iterator[str]:
    """A description of every feature of a discovery in turn, or of some `features`, `scores` being
    of all of them: its rule in words. Of those without a pattern it says also which tokens they
    promote, where they promote few of all; of those that are active nearly everywhere, where they
    are most often."""
    gap = np.asarray(store.columns.get("logit_top_gap", np.zeros(len(store))))
    promotes = scores.unclear & (gap >= OUTSTANDING)
    dense = (scores.rules.family < 0) & (scores.contexts > 0)
    for i in range(len(scores)) if features is None else features:
        text = scores.description(i, vocabulary)
        if dense[i]:
            liked = [entry.token for entry in store.token_counts(i)[:NAMED]]
            text += f", most often on {_quoted(liked, vocabulary)}"
        elif promotes[i]:
            liked = [token for token, _ in store.promoted(i)[:NAMED]]
            text += f"; promotes {_quoted(liked, vocabulary)}"
        yield text


def _quoted(tokens: Iterable[int], vocabulary: Vocabulary) -> str:
    return ", ".join(f'"{visible(vocabulary.texts[token])}"' for token in tokens)


def tried(document: np.ndarray) -> np.ndarray:
    """Bool: contexts of these documents are tried on, those of all others are fitted on.

    By a hash, the same for every feature, so that no document is ever on both sides.
    """
    return (priority(0, 0, document) & np.uint64(1)).astype(bool)


def stored_contexts(store: FeatureStore, tokens: TokenSplit, features: np.ndarray) -> Contexts:
    """Contexts of some features of a discovery: the examples of each tenth, the top examples and
    both kinds of windows without activation."""
    n, context = len(features), store.meta.context
    deciles, top = np.array(store.deciles[features]), np.array(store.top[features])
    inactive, hard = np.array(store.inactive[features]), np.array(store.hard[features])
    per = deciles.shape[2]
    kinds = [
        np.where(deciles["value"].reshape(n, -1) > 0, ACTIVE, EMPTY),
        np.where(top["value"] > 0, STRONGEST, EMPTY),
        np.where(inactive != NONE, RANDOM, EMPTY),
        np.where(hard["window"] != NONE, HARD, EMPTY),
    ]
    kind = np.concatenate(kinds, axis=1).astype(np.uint8)
    n_active = DECILES * per + top.shape[1]
    windows = np.concatenate(
        [deciles["window"].reshape(n, -1), top["window"], inactive, hard["window"]], axis=1
    )
    _once_a_window(kind[:, :n_active], windows[:, :n_active], per)
    window = np.where(kind == EMPTY, 0, windows).astype(np.int64)
    positions = [
        deciles["position"].reshape(n, -1),
        top["position"],
        np.zeros_like(inactive),
        hard["position"],
    ]
    position = np.concatenate(positions, axis=1).astype(np.int64)
    decile = np.full(kind.shape, -1, np.int8)
    decile[:, : DECILES * per] = np.repeat(np.arange(DECILES), per)
    text = _Text(tokens, window, context)
    draw = kind == RANDOM
    position[draw] = text.any_place(window, features)[draw]
    again = kind == HARD
    position[again] = text.same_token(window, position, features, again)
    ids, first, document = text.around(window, position)
    ids[:, kind == EMPTY] = NOTHING
    peak = (position - first).astype(np.int16)
    return Contexts(ids, first.astype(np.int32), peak, kind, decile, document, window)


def _once_a_window(kind: np.ndarray, window: np.ndarray, per: int) -> None:
    """Leave one of the active contexts [n, m] that lie in one window of text, whichever tenth it
    was drawn from: two of them are hardly two observations."""
    # Tenths take turns, so that none is preferred; the top examples come last.
    turns = np.arange(DECILES * per).reshape(DECILES, per).T.ravel()
    turns = np.append(np.roll(turns, 7), np.arange(DECILES * per, kind.shape[1]))
    key = np.where(kind == EMPTY, -1, window.astype(np.int64))[:, turns]
    order = np.argsort(key, axis=1, kind="stable")
    key = np.take_along_axis(key, order, axis=1)
    again = np.zeros(key.shape, bool)
    again[:, 1:] = key[:, 1:] == key[:, :-1]
    row, column = np.nonzero(again)
    kind[row, turns[order[row, column]]] = EMPTY


class _Text:
    """The tokens of some windows, each read once."""

    def __init__(self, tokens: TokenSplit, windows: np.ndarray, context: int) -> None:
        self._tokens, self._context = tokens, context
        numbers, place = np.unique(windows, return_inverse=True)
        self._place = place.reshape(windows.shape)
        ids = tokens.windows(numbers, context).numpy().astype(np.int32)
        counts = ~np.isin(ids, np.asarray(tokens.meta.special_ids, np.int64))
        counts[:, 0] = False
        self._counts = counts
        self._ids = np.where(counts, ids, NOTHING).astype(np.int32)

    def any_place(self, window: np.ndarray, features: np.ndarray) -> np.ndarray:
        """int64, of `window`'s shape [n, m]: a position that counts, the same each time."""
        order = np.argsort(~self._counts, axis=1, kind="stable")
        lot = priority(0, features[:, None], window)
        number = np.maximum(self._counts.sum(1), 1).astype(np.uint64)[self._place]
        return order[self._place, (lot % number).astype(np.int64)].astype(np.int64)

    def same_token(
        self, window: np.ndarray, position: np.ndarray, features: np.ndarray, chosen: np.ndarray
    ) -> np.ndarray:
        """int64 [chosen]: a place in the window with the token that stands at `position`, any of
        them. A store names the first; were that kept, where contexts lie would tell the hard
        ones from all others."""
        text = self._ids[self._place[chosen]]
        there = text == text[np.arange(len(text)), position[chosen]][:, None]
        lot = priority(0, features[:, None], window, 1)[chosen]
        number = (lot % np.maximum(there.sum(1), 1).astype(np.uint64)).astype(np.int64)
        return (there.cumsum(1) > number[:, None]).argmax(1)

    def around(
        self, window: np.ndarray, position: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids int32 [W, n, m], position of the first, document) of the text around places; what
        belongs to another document than the place itself is `NOTHING`."""
        width = min(WIDTH, self._context - 1)
        first = np.clip(position - BEFORE, 1, self._context - width)
        ids = np.stack([self._ids[self._place, first + w] for w in range(width)])
        document, begun = self._origins(window, position)
        lowest = np.maximum(position - begun - first, 0)
        highest = self._last_of_document(window, first, position - first, width, document)
        for w in range(width):
            ids[w][(w < lowest) | (w > highest)] = NOTHING
        return ids, first, document

    def _last_of_document(
        self,
        window: np.ndarray,
        first: np.ndarray,
        peak: np.ndarray,
        width: int,
        document: np.ndarray,
    ) -> np.ndarray:
        """The last of `width` tokens, counted from `first`, in the document of the one at `peak`:
        documents follow each other, so by bisection."""
        highest = np.full(window.shape, width - 1)
        over = self._origins(window, first + width - 1)[0] != document
        window, first, document = window[over], first[over], document[over]
        inside, outside = peak[over], highest[over]
        while (outside - inside > 1).any():
            middle = (inside + outside) // 2
            own = self._origins(window, first + middle)[0] == document
            inside, outside = np.where(own, middle, inside), np.where(own, outside, middle)
        highest[over] = inside
        return highest

    def _origins(self, window: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        document, place = self._tokens.origins(window.ravel(), position.ravel(), self._context)
        return document.reshape(window.shape), place.reshape(window.shape)


def _score_block(vocabulary: Vocabulary, block: Contexts, seed: int) -> tuple[Scores, np.ndarray]:
    """(scores before the null is taken off, the null's accuracies)."""
    test = tried(block.document)
    is_active, is_inactive = block.kind == ACTIVE, (block.kind == RANDOM) | (block.kind == HARD)
    fitted_active = (is_active | (block.kind == STRONGEST)) & ~test
    fitted_inactive = is_inactive & ~test
    tried_active, tried_inactive = is_active & test, is_inactive & test
    everything = is_active | (block.kind == STRONGEST)
    enough = (everything.sum(1) >= LEAST_CONTEXTS) & np.all(
        [
            mask.sum(1) >= LEAST_TRIED
            for mask in (fitted_active, fitted_inactive, tried_active, tried_inactive)
        ],
        axis=0,
    )
    # What cannot be scored is described from all there is.
    fitted_active = np.where(enough[:, None], fitted_active, everything)
    fitted_inactive = np.where(enough[:, None], fitted_inactive, is_inactive)
    shares = word_shares(vocabulary, block.ids, (block.kind == RANDOM) & ~test)
    background = (shares[:-1] + 0.5) / (shares[-1] + 1)
    rules = fit(
        vocabulary,
        block.ids,
        block.first,
        block.peak,
        fitted_active,
        fitted_inactive,
        background,
    )
    hit = rules.matches(vocabulary, block.ids, block.first)
    accuracy = balanced_accuracy(hit, tried_active, tried_inactive)
    accuracy[~enough] = np.nan
    low, high = interval(hit, tried_active, tried_inactive, seed)
    by_decile = np.stack(
        [
            balanced_accuracy(hit, tried_active & (block.decile == d), tried_inactive)
            for d in range(DECILES)
        ],
        axis=1,
    )
    scores = Scores(
        rules=rules,
        contexts=everything.sum(1).astype(np.int32),
        accuracy=accuracy,
        low=np.where(enough, low, np.nan),
        high=np.where(enough, high, np.nan),
        percentile=np.full(block.n, np.nan),
        active=tried_active.sum(1).astype(np.int32),
        inactive=tried_inactive.sum(1).astype(np.int32),
        by_decile=np.where(enough[:, None], by_decile, np.nan),
        null=0.5,
        nulls=0,
    )
    return scores, _null(vocabulary, block, rules, enough, tried_active, tried_inactive, seed)


def _null(
    vocabulary: Vocabulary,
    block: Contexts,
    rules: Rules,
    enough: np.ndarray,
    active: np.ndarray,
    inactive: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Accuracies of rules on the contexts of another feature each, `NULLS` of them or as many
    pairs as there are."""
    scored = np.random.default_rng(seed).permutation(np.flatnonzero(enough))
    if len(scored) < 2:
        return np.empty(0)
    found: list[np.ndarray] = []
    rounds = min(-(-NULLS // len(scored)), len(scored) - 1)
    own = _rows(rules, scored)
    for shift in range(1, rounds + 1):
        other = np.roll(scored, shift)
        hit = own.matches(vocabulary, block.ids[:, other], block.first[other])
        found.append(balanced_accuracy(hit, active[other], inactive[other]))
    return np.concatenate(found)


def interval(
    hit: np.ndarray, active: np.ndarray, inactive: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of balanced accuracy by a bootstrap over contexts, active and inactive ones
    drawn apart.

    Drawing n outcomes of which k are right is a binomial draw. To each k half a right and half a
    wrong one are added: otherwise ten right answers of ten would leave no doubt at all.
    """
    generator = np.random.default_rng(seed)
    total = np.zeros((DRAWS, len(hit)), np.float32)
    for right, among in ((hit, active), (~hit, inactive)):
        # Many features have the same counts: their draws are made once.
        n, k = np.maximum(among.sum(1), 1), (right & among).sum(1)
        pairs, which = np.unique(np.stack([n, k]), axis=1, return_inverse=True)
        drawn = generator.binomial(
            pairs[0], (pairs[1] + 0.5) / (pairs[0] + 1), size=(DRAWS, pairs.shape[1])
        )
        total += (drawn / pairs[0] / 2).astype(np.float32)[:, which.reshape(-1)]
    low, high = np.percentile(total, [2.5, 97.5], axis=0)
    return low.astype(np.float64), high.astype(np.float64)


def _rows(rules: Rules, rows: np.ndarray) -> Rules:
    return Rules(*(getattr(rules, part.name)[rows] for part in fields(Rules)))


def _joined(parts: Sequence[Scores]) -> Scores:
    def column(read: Callable[[Scores], np.ndarray]) -> np.ndarray:
        return np.concatenate([read(part) for part in parts])

    rules = Rules(
        *(np.concatenate([getattr(part.rules, f.name) for part in parts]) for f in fields(Rules))
    )
    return Scores(
        rules=rules,
        contexts=column(lambda s: s.contexts),
        accuracy=column(lambda s: s.accuracy),
        low=column(lambda s: s.low),
        high=column(lambda s: s.high),
        percentile=column(lambda s: s.percentile),
        active=column(lambda s: s.active),
        inactive=column(lambda s: s.inactive),
        by_decile=column(lambda s: s.by_decile),
        null=0.5,
        nulls=0,
    )
