"""The intruder test: of five excerpts the feature is active in four; which one is the odd one out?

Who finds it has understood what the feature is about, without any description (Chang et al. 2009,
"Reading Tea Leaves"; for features of dictionaries: arXiv 2507.08473). Guessing finds one in five.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from mistudio.engine.features.excerpts import Excerpt
from mistudio.engine.features.score import ACTIVE, HARD, RANDOM
from mistudio.engine.features.store import DECILES
from mistudio.errors import InvalidInput

ACTIVATING, SHOWN = 4, 5
CHANCE = 1 / SHOWN
TRIALS, LEAST = 10, 5


@dataclass(frozen=True)
class Trial:
    """Five excerpts in the order in which they are shown; the feature is active in all but number
    `intruder`, in those of tenth `decile` of its activations (0: the weakest)."""

    excerpts: tuple[Excerpt, ...]
    intruder: int
    decile: int


@dataclass(frozen=True)
class Found:
    """How many of `trials` intruders were found. `low`, `high`: the exact 95 % interval of the
    accuracy (Clopper and Pearson 1934). `by_chance`: how probable as many or more are by
    guessing."""

    right: int
    trials: int
    low: float
    high: float
    by_chance: float

    @property
    def accuracy(self) -> float:
        return self.right / self.trials


def trials(excerpts: Sequence[Excerpt], seed: int = 0, wanted: int = TRIALS) -> list[Trial]:
    """One trial for each tenth of the activations in turn, in random order; no excerpt comes
    twice. Intruders are contexts drawn at random and ones that contain a token the feature likes,
    by turns. InvalidInput where there are too few examples for `LEAST` trials."""
    draw = np.random.default_rng(seed)
    by_decile = [
        _shuffled(draw, [e for e in excerpts if e.kind == ACTIVE and e.decile == tenth])
        for tenth in range(DECILES)
    ]
    silent = {
        kind: _shuffled(draw, [e for e in excerpts if e.kind == kind]) for kind in (RANDOM, HARD)
    }
    made: list[Trial] = []
    tenths = draw.permutation(DECILES)
    for turn in range(2 * DECILES):
        decile = int(tenths[turn % DECILES])
        four = _of_different_documents(by_decile[decile])
        kind = HARD if len(made) % 2 and silent[HARD] else RANDOM
        if len(made) == wanted or not (silent[kind] or silent[HARD]):
            break
        if len(four) < ACTIVATING:
            continue
        odd = (silent[kind] or silent[HARD]).pop()
        for excerpt in four:
            by_decile[decile].remove(excerpt)
        place = int(draw.integers(SHOWN))
        made.append(Trial((*four[:place], odd, *four[place:]), place, decile))
    if len(made) < min(LEAST, wanted):
        raise InvalidInput(
            "Too few examples for this test",
            f"It takes four examples of one strength and an inactive context {LEAST} times; this "
            f"feature's suffice {len(made)} times.",
            "Discover the features on more text, or choose a feature that is active more often.",
            field="feature",
        )
    return made


def _shuffled(draw: np.random.Generator, found: list[Excerpt]) -> list[Excerpt]:
    return [found[i] for i in draw.permutation(len(found))]


def _of_different_documents(pool: Sequence[Excerpt]) -> list[Excerpt]:
    """The next four, of different documents as far as there are such."""
    first: dict[int, Excerpt] = {}
    for excerpt in pool:
        first.setdefault(excerpt.document, excerpt)
    chosen = list(first.values())[:ACTIVATING]
    rest = [e for e in pool if not any(e is c for c in chosen)]
    return chosen + rest[: ACTIVATING - len(chosen)]


def judged(right: int, n: int) -> Found:
    """Of `right` found intruders of n."""
    low, high = exact_interval(right, n)
    return Found(right, n, low, high, _at_least(right, n, CHANCE))


def exact_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Of a share of which k of n were seen: all shares for which neither as few nor as many are
    improbable (Clopper and Pearson 1934)."""
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else _where(lambda p: _at_least(k, n, p), tail)
    high = 1.0 if k == n else _where(lambda p: -_at_most(k, n, p), -tail)
    return low, high


def _where(rising: Callable[[float], float], value: float) -> float:
    """The place in [0, 1] at which a rising function takes a value, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2


def _at_least(k: int, n: int, p: float) -> float:
    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def _at_most(k: int, n: int, p: float) -> float:
    return sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
