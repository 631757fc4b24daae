"""Text of known words on which features of known causes fire: what a scorer must find out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mistudio.engine.features.rules import NOTHING, Vocabulary
from mistudio.engine.features.score import ACTIVE, HARD, RANDOM, Contexts

WIDTH, TEXT = 24, 96  # tokens of a context; of a document
PLAIN = [f" {a}{b}{c}" for a in "bdfglm" for b in "aeiou" for c in ("n", "rk", "lt", "st", "v")]
STARTING = [f" inter{c}" for c in ("nal", "val", "rupt", "face", "est", "lude")]
ENDING = [f" {c}ology" for c in ("the", "bi", "ge", "zo", "psych", "tech")]
NUMBERS = [f" {n}" for n in ("7", "12", "345", "98", "23456")]
YEARS = [f" {n}" for n in range(1900, 1908)]
RUSSIAN = [" слово", " город", " вода", " книга", " дом", " лес", " река", " поле", " море"]
CASES = [" York", "york", " YORK", " Paris", " paris"]
TOPIC = [" orbit", " rocket", " comet", " lunar", " probe"]
OTHERS = [" of", ",", ".", "\n", " New"]
TEXTS = PLAIN + STARTING + ENDING + NUMBERS + YEARS + RUSSIAN + CASES + TOPIC + OTHERS
ID = {text: i for i, text in enumerate(TEXTS)}

Fires = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def vocabulary() -> Vocabulary:
    return Vocabulary(TEXTS)


def documents(n: int, seed: int = 0) -> np.ndarray:
    """int64 [n, TEXT]: words by chance, commoner and rarer ones; every fourth document is about
    the topic, every fifth holds Russian words."""
    generator = np.random.default_rng(seed)
    everyday = [i for i, text in enumerate(TEXTS) if text not in TOPIC + RUSSIAN]
    weight = generator.gamma(8.0, size=len(everyday))
    weight[[everyday.index(ID[t]) for t in (" of", ",", " New", " York")]] *= 3
    text = generator.choice(everyday, (n, TEXT), p=weight / weight.sum())
    pairs = np.argwhere(generator.random((n, TEXT - 1)) < 0.01)
    text[pairs[:, 0], pairs[:, 1]] = ID[" New"]
    text[pairs[:, 0], pairs[:, 1] + 1] = ID[" York"]
    for i in range(n):
        if i % 4 == 0:
            at = generator.random(TEXT) < 0.15
            text[i, at] = generator.choice([ID[t] for t in TOPIC], at.sum())
        if i % 5 == 0:
            at = generator.random(TEXT) < 0.3
            text[i, at] = generator.choice([ID[t] for t in RUSSIAN], at.sum())
    return text


def among(*texts: str) -> Fires:
    wanted = [ID[text] for text in texts]
    return lambda text, _: np.isin(text, wanted)


def behind(first: str, second: str | None = None) -> Fires:
    """After `first`; with `second`, on that word only."""

    def fires(text: np.ndarray, _: np.random.Generator) -> np.ndarray:
        found = np.zeros(text.shape, bool)
        found[:, 1:] = text[:, :-1] == ID[first]
        return found if second is None else found & (text == ID[second])

    return fires


def ahead(following: str) -> Fires:
    def fires(text: np.ndarray, _: np.random.Generator) -> np.ndarray:
        found = np.zeros(text.shape, bool)
        found[:, :-1] = text[:, 1:] == ID[following]
        return found

    return fires


def crowded(least: int, *texts: str) -> Fires:
    """On these words, where so many of them stand in one stretch of text."""

    def fires(text: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        found = among(*texts)(text, generator)
        parts = found.reshape(len(text), -1, WIDTH)
        return (parts & (parts.sum(2, keepdims=True) >= least)).reshape(text.shape)

    return fires


def about_topic(text: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Anywhere in documents of the topic, on whatever token."""
    on = np.arange(len(text)) % 4 == 0
    return on[:, None] & (generator.random(text.shape) < 0.3)


def at_random(text: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return generator.random(text.shape) < 0.01


def at_start(text: np.ndarray, _: np.random.Generator) -> np.ndarray:
    places = np.arange(text.shape[1])
    return np.broadcast_to((places >= 4) & (places < 8), text.shape)


def contexts(fires: list[Fires], text: np.ndarray, per_kind: int = 40, seed: int = 1) -> Contexts:
    """Contexts cut out of the documents: around tokens on which a feature fires, and from those
    without any, half around the token on which it fires most often elsewhere."""
    generator = np.random.default_rng(seed)
    n, m = len(fires), 4 * per_kind
    ids = np.full((WIDTH, n, m), NOTHING, np.int32)
    first = np.zeros((n, m), np.int32)
    peak = np.zeros((n, m), np.int16)
    kind = np.zeros((n, m), np.uint8)
    decile = np.full((n, m), -1, np.int8)
    document = np.zeros((n, m), np.int64)
    window = np.zeros((n, m), np.int64)
    starts = np.arange(0, TEXT, WIDTH)
    for f, fire in enumerate(fires):
        on = fire(text, generator)
        by_part = on.reshape(len(text), len(starts), WIDTH)
        lit = np.argwhere(by_part.any(2))
        dark = np.argwhere(~by_part.any(2))
        generator.shuffle(lit)
        generator.shuffle(dark)
        tokens, times = np.unique(text[on], return_counts=True)
        favourite = set(tokens[np.argsort(-times)][:5].tolist())
        parts = text.reshape(len(text), len(starts), WIDTH)
        hard = [d for d in dark if favourite & set(parts[tuple(d)].tolist())]
        chosen = [(ACTIVE, place) for place in lit[: 2 * per_kind]]
        chosen += [(RANDOM, place) for place in dark[:per_kind]]
        chosen += [(HARD, place) for place in hard[:per_kind]]
        for j, (sort, (d, part)) in enumerate(chosen):
            ids[:, f, j] = parts[d, part]
            first[f, j], document[f, j], kind[f, j] = starts[part], d, sort
            window[f, j] = d * len(starts) + part
            if sort == ACTIVE:
                peak[f, j] = generator.choice(np.flatnonzero(by_part[d, part]))
                decile[f, j] = j % 10
    return Contexts(ids, first, peak, kind, decile, document, window)
