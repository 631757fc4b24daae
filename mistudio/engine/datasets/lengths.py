"""Many whole numbers in little memory: exact totals, and a histogram that quantiles come from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

EXACT = 65_536  # below this every value has a place of its own
_PER_OCTAVE = 64  # above, a value is known to about 1 %
_PLACES = EXACT + _PER_OCTAVE * 32


class Lengths:
    """Lengths of documents, however many: half a megabyte."""

    def __init__(self, state: np.ndarray | None = None) -> None:
        """`state` is what `state()` gave."""
        self._counts = np.zeros(_PLACES, np.int64)
        self.count = self.total = self.largest = 0
        self._smallest = -1
        if state is not None:
            self.count, self.total, self._smallest, self.largest = map(int, state[:4])
            self._counts[:] = state[4:]

    def state(self) -> np.ndarray:
        """int64 array from which an equal object can be made."""
        return np.concatenate(
            [[self.count, self.total, self._smallest, self.largest], self._counts]
        ).astype(np.int64)

    @property
    def smallest(self) -> int:
        return max(0, self._smallest)

    def add(self, values: np.ndarray) -> None:
        if not len(values):
            return
        self.count += len(values)
        self.total += int(values.sum())
        self.largest = max(self.largest, int(values.max()))
        least = int(values.min())
        self._smallest = least if self._smallest < 0 else min(self._smallest, least)
        self._counts += np.bincount(_place(values), minlength=_PLACES)

    def median(self) -> float:
        """The middle value, of an even number the mean of both; exact below `EXACT`, else within
        1 %."""
        if not self.count:
            return 0.0
        sums = np.cumsum(self._counts)
        middle = np.searchsorted(sums, [(self.count + 1) // 2, self.count // 2 + 1])
        return float(np.mean([_value(int(place)) for place in middle]))

    def quantile(self, share: float) -> float:
        """The smallest value that at least this share of all do not exceed; as exact as
        `median`."""
        if not self.count:
            return 0.0
        rank = max(1, int(np.ceil(share * self.count)))
        return _value(int(np.searchsorted(np.cumsum(self._counts), rank)))

    def histogram(self, edges: Sequence[int]) -> list[int]:
        """How many values lie in [edge, next edge), the last without end. Edges below `EXACT`."""
        sums = np.concatenate([[0], np.cumsum(self._counts)])
        bounds = [*(int(sums[edge]) for edge in edges), self.count]
        return [high - low for low, high in pairwise(bounds)]

    def at_least(self, value: int) -> int:
        """How many are `value` or more; `value` below `EXACT`."""
        return self.count - int(self._counts[:value].sum())

    def bars(self, n: int = 24) -> list[tuple[int, int, int]]:
        """For a chart: (from, below, how many), bounds about evenly spaced on a log axis."""
        top = max(2, self.largest + 1)
        edges = np.unique(np.geomspace(max(1, self.smallest), top, n + 1).round().astype(np.int64))
        edges[0], edges[-1] = self.smallest, top
        sums = np.concatenate([[0], np.cumsum(self._counts)])
        below = [int(sums[_place(np.asarray([edge]))[0]]) for edge in edges[:-1]]
        below.append(self.count)
        return [
            (int(edges[i]), int(edges[i + 1]), below[i + 1] - below[i])
            for i in range(len(edges) - 1)
        ]


def _place(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.int64)
    high = values >= EXACT
    if not high.any():
        return values
    octaves = np.log2(np.maximum(values, EXACT) / EXACT) * _PER_OCTAVE
    return np.where(high, np.minimum(EXACT + octaves.astype(np.int64), _PLACES - 1), values)


def _value(place: int) -> float:
    if place < EXACT:
        return float(place)
    return float(EXACT * 2.0 ** ((place - EXACT + 0.5) / _PER_OCTAVE))
