"""What a feature's top examples share, by rule, and which features show it best. No language model.

A description states its evidence; a better score is the work of the interpretability measures.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mistudio.engine.features.store import Example, FeatureStore

_WORD = re.compile(r"[^\W\d_]{3,}")
COMMON_WORD = 0.02  # share of stretches of text above which a word says little (his, from, for)
NEAR = 12  # tokens on each side of the peak that are looked at for shared words


@dataclass(frozen=True)
class Description:
    """`kind` is "token" (the strongest token is nearly always the same), "words" (the contexts
    share words) or "mixed"; `share` is the part of the `n` examples that show it; `words` are the
    shared words or tokens themselves; `focus` is the part that the foremost of them stands in."""

    kind: str
    text: str
    share: float
    n: int
    words: tuple[str, ...]
    focus: float


def background(tokens: Any, tokenizer: Any, context: int, windows: int = 200) -> Counter[str]:
    """In how many of some evenly spread stretches of text each word occurs (for comparison)."""
    total = tokens.n_windows(context)
    chosen = np.unique(np.linspace(0, total - 1, min(windows, total)).astype(np.int64))
    counts: Counter[str] = Counter()
    for ids in tokens.windows(chosen, context).numpy():
        for start in range(0, len(ids), 2 * NEAR + 1):
            stretch = ids[start : start + 2 * NEAR + 1]
            counts.update(_words(tokenizer.decode(stretch, skip_special_tokens=True)))
            counts[""] += 1
    return counts


def describe(
    examples: Sequence[Example], tokenizer: Any, common: Counter[str]
) -> Description | None:
    """What the examples share; None for a feature without examples."""
    n = len(examples)
    if not n:
        return None
    peaks = Counter(
        tokenizer.decode([int(example.ids[example.peak])]).strip().lower() for example in examples
    )
    token, times = peaks.most_common(1)[0]
    if times / n >= 0.7:
        return Description("token", f'"{token}"', times / n, n, (token,), times / n)
    shared = _shared_words(examples, tokenizer, common)
    if shared:
        words, share, focus = shared
        return Description("words", ", ".join(words), share, n, words, focus)
    tokens = tuple(token for token, _ in peaks.most_common(3))
    text = ", ".join(f'"{token}"' for token in tokens)
    return Description("mixed", text, times / n, n, tokens, times / n)


def _shared_words(
    examples: Sequence[Example], tokenizer: Any, common: Counter[str]
) -> tuple[tuple[str, ...], float, float] | None:
    """Words that many examples contain and ordinary text seldom does (log-likelihood ratio), with
    the share of examples that contain one of them, and that contain the foremost."""
    contexts = []
    for example in examples:
        near = example.ids[max(0, example.peak - NEAR) : example.peak + NEAR + 1]
        contexts.append(_words(tokenizer.decode(near, skip_special_tokens=True)))
    counts = Counter(word for context in contexts for word in context)
    n, base = len(contexts), max(common[""], 1)
    scored = []
    for word, times in counts.items():
        expected = (common[word] + 0.5) / (base + 1)
        rate = times / n
        if times >= 3 and expected < COMMON_WORD and rate > 3 * expected:
            scored.append((times * math.log(rate / expected), word))
    words = tuple(word for _, word in sorted(scored, reverse=True)[:4])
    if not words:
        return None
    share = sum(any(word in context for word in words) for context in contexts) / n
    return words, share, counts[words[0]] / n


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}


def showcase(
    store: FeatureStore, tokens: Any, tokenizer: Any, n: int = 10, candidates: int = 300
) -> list[tuple[int, Description]]:
    """Features whose examples visibly share something, most telling first.

    Looked at: features with all their examples that fire on 0.02 % to 1 % of tokens, the
    strongest `candidates` relative to their own mean. Features of whole contexts come before
    features of a single token, as a token is the easier thing to share.
    """
    density = np.asarray(store.columns["density"])
    peakedness = np.asarray(store.columns["max_activation"]) / np.maximum(
        np.asarray(store.columns["mean_activation"]), 1e-9
    )
    full = np.asarray([store.n_examples(i) >= min(10, store.meta.top_k) for i in range(len(store))])
    eligible = np.flatnonzero(full & (density > 2e-4) & (density < 1e-2))
    eligible = eligible[np.argsort(-peakedness[eligible])][:candidates]
    common = background(tokens, tokenizer, store.meta.context)
    described = [
        (int(feature), description)
        for feature in eligible
        if (description := describe(store.examples(int(feature), tokens), tokenizer, common))
    ]
    return sorted(described, key=_tellingness)[:n]


def _tellingness(item: tuple[int, Description]) -> tuple[int, float]:
    description = item[1]
    rank = {"words": 0, "token": 1, "mixed": 2}[description.kind]
    return (rank, -(description.share + description.focus))


def search(store: FeatureStore, tokenizer: Any, text: str, features: Iterable[int]) -> list[int]:
    """Features among `features` whose top token or promoted tokens contain the text."""
    wanted = text.strip().lower()
    found = []
    for feature in features:
        ids = [int(store.columns["top_token"][feature]), *(t for t, _ in store.promoted(feature))]
        if any(i >= 0 and wanted in tokenizer.decode([i]).lower() for i in ids):
            found.append(feature)
    return found


def uses_of_words(text: str, words: Sequence[str]) -> int:
    """How many words of the text begin like one of `words` (its first five letters, so that
    building counts for builds)."""
    stems = tuple({word[:5].lower() for word in words})
    return sum(word.startswith(stems) for word in _WORD.findall(text.lower()))
