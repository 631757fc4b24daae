"""Which features of a discovery show best what features are: those a rule tells most surely."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mistudio.engine.features.rules import BY_NAME, Vocabulary
from mistudio.engine.features.score import Scores
from mistudio.engine.features.store import FeatureStore

EVERYDAY = 1 / 1000  # of all tokens: words that are commoner make no topic
_WORD = re.compile(r"[^\W\d_]{3,}")


@dataclass(frozen=True)
class Shown:
    """`text` is the rule in words, `words` its alternatives, `family` its kind (`rules.FAMILIES`);
    `accuracy` with the lower end `low` of its interval is balanced accuracy on `contexts` contexts
    that the rule was not made from."""

    text: str
    words: tuple[str, ...]
    family: str
    accuracy: float
    low: float
    contexts: int


def showcase(store: FeatureStore, vocabulary: Vocabulary, n: int = 10) -> list[tuple[int, Shown]]:
    """(feature, what it shows), the most telling first: topics that count as interpretable and
    are not of everyday words, by the lower bound of their accuracy, as a token is the easier thing
    to share; then whatever else has a score. Nothing where the discovery has no scores (it is of
    an earlier version)."""
    scores = Scores.read(store)
    if scores is None:
        return []
    topic = (scores.rules.family == BY_NAME["topic"]) & (scores.rules.members[:, 1] > 0)
    topic &= _commonest_word(store, scores, vocabulary) < EVERYDAY
    low = np.nan_to_num(scores.low, nan=-1.0)
    order = np.lexsort((-low, ~(topic & scores.interpretable)))
    found, tried = [], scores.tried
    for feature in order[~np.isnan(scores.low[order])][:n]:
        rule = scores.rules.rule(int(feature), vocabulary)
        if rule is None:
            continue
        shown = Shown(
            scores.description(int(feature), vocabulary),
            tuple(member.strip() for member in rule.members if member.strip()),
            rule.family,
            float(scores.accuracy[feature]),
            float(scores.low[feature]),
            int(tried[feature]),
        )
        found.append((int(feature), shown))
    return found


def _commonest_word(store: FeatureStore, scores: Scores, vocabulary: Vocabulary) -> np.ndarray:
    """float64 [F]: the share of the text's tokens that are the commonest word of each topic."""
    counts = np.asarray(store.array("token_counts"), np.float64)
    words = vocabulary.word[: len(counts)]
    of_word = np.bincount(words, counts[: len(words)], minlength=len(vocabulary.words))
    of_word[0] = 0.0
    members = np.where((scores.rules.family == BY_NAME["topic"])[:, None], scores.rules.members, 0)
    return of_word[members].max(1) / max(counts.sum(), 1.0)


def uses_of_words(text: str, words: Sequence[str]) -> int:
    """How many words of the text begin like one of `words` (its first five letters, so that
    building counts for builds)."""
    stems = tuple({word[:5].lower() for word in words})
    return sum(word.startswith(stems) for word in _WORD.findall(text.lower()))
