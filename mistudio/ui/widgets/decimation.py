"""Long curves cut down to what a screen can show, without losing a peak; numpy only.

A curve keeps every point. Beside them it keeps a pyramid: level n says of every block of 2^n points
which is the lowest and which the highest. What is drawn of a range is the two points of each block,
from the level whose blocks are about a pixel column wide, so drawing costs the same for a thousand
points and for a million, and a single point that stands out is always one of the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


class Growing:
    """An array that is appended to in amortised constant time; `view` copies nothing and stays
    valid (what is appended later is not in it)."""

    def __init__(self, dtype: type) -> None:
        self._data: NDArray[Any] = np.empty(64, dtype)
        self.size = 0

    @property
    def view(self) -> NDArray[Any]:
        return self._data[: self.size]

    def extend(self, values: NDArray[Any]) -> None:
        wanted = self.size + len(values)
        if wanted > len(self._data):
            # A new buffer, never a resized one: views of the old one stay as they were.
            grown = np.empty(max(wanted, 2 * len(self._data)), self._data.dtype)
            grown[: self.size] = self.view
            self._data = grown
        self._data[self.size : wanted] = values
        self.size = wanted


class Curve:
    """The points of a curve: values over one or several axes (steps, tokens, seconds) at once.

    Every axis should only rise; where one falls back, that axis is drawn without cutting down.
    """

    def __init__(self, axes: Sequence[str]) -> None:
        self._xs = {axis: Growing(np.float64) for axis in axes}
        self._y = Growing(np.float64)
        self._rising = dict.fromkeys(axes, True)
        # Level n + 1: the places of the lowest and of the highest point in blocks of 2^(n + 1).
        self._levels: list[tuple[Growing, Growing]] = []
        self.low, self.high = np.inf, -np.inf

    def __len__(self) -> int:
        return self._y.size

    @property
    def y(self) -> Floats:
        return self._y.view

    def x(self, axis: str) -> Floats:
        return self._xs[axis].view

    def extend(self, xs: Mapping[str, Iterable[float]], y: Iterable[float]) -> None:
        """Append points; every value must be finite."""
        values = _array(y)
        if not len(values):
            return
        for axis, growing in self._xs.items():
            new = _array(xs[axis])
            last = growing.view[-1:]
            self._rising[axis] &= bool((np.diff(np.concatenate([last, new])) >= 0).all())
            growing.extend(new)
        self._y.extend(values)
        self.low, self.high = min(self.low, values.min()), max(self.high, values.max())
        self._raise_pyramid()

    def _raise_pyramid(self) -> None:
        """Add the blocks that have become whole, on every level."""
        below = len(self)
        level = 0
        while below >= 2:
            if level == len(self._levels):
                self._levels.append((Growing(np.int64), Growing(np.int64)))
            lows, highs = self._levels[level]
            pairs = slice(2 * lows.size, below - below % 2)
            if level == 0:
                low = high = np.arange(pairs.start, pairs.stop)
            else:
                low, high = (part.view[pairs] for part in self._levels[level - 1])
            y = self.y
            lows.extend(np.where(y[low[::2]] <= y[low[1::2]], low[::2], low[1::2]))
            highs.extend(np.where(y[high[::2]] >= y[high[1::2]], high[::2], high[1::2]))
            below, level = lows.size, level + 1

    def shown(
        self, axis: str, columns: int, start: float = -np.inf, stop: float = np.inf
    ) -> tuple[Floats, Floats]:
        """(x, y) of at most 4 `columns` and a few points that look like all points from `start` to
        `stop`, in order; with the neighbours outside, so that lines go on beyond the edge."""
        return self._at(axis, self._places(axis, columns, start, stop))

    def _at(self, axis: str, places: Places | slice) -> tuple[Floats, Floats]:
        return self.x(axis)[places], self.y[places]

    def _places(self, axis: str, columns: int, start: float, stop: float) -> Places | slice:
        if not self._rising[axis]:
            return slice(None)
        x = self.x(axis)
        first = max(0, int(np.searchsorted(x, start)) - 1)
        last = min(len(x), int(np.searchsorted(x, stop, side="right")) + 1)
        level = 0
        while (last - first) >> level > 2 * columns:
            level += 1
        if level < 2:  # two points of every two are all of them
            return slice(first, last)
        lows, highs = (part.view for part in self._levels[level - 1])
        # Whole blocks inside; what is left at both ends counts as a block of its own.
        begin, end = -(-first >> level), min(last >> level, len(lows))
        inner = np.stack([lows[begin:end], highs[begin:end]], axis=1)
        inner.sort(axis=1)
        edges = [(first, begin << level), (end << level, last)]
        before, after = (self._extremes(*edge) for edge in edges)
        return np.concatenate([[first], before, inner.ravel(), after, [last - 1]]).astype(np.int64)

    def _extremes(self, first: int, last: int) -> list[int]:
        """Places of the lowest and the highest of a few points, in order."""
        if last <= first:
            return []
        part = self.y[first:last]
        return sorted((first + int(part.argmin()), first + int(part.argmax())))


def _array(values: Iterable[float]) -> Floats:
    return np.asarray(values if isinstance(values, np.ndarray) else list(values), np.float64)
