"""What discovery gathers while activations stream by: one object per question, each with arrays of
a size that is known beforehand, so that memory does not grow with the text.

All of them give the same result however the stream is cut into chunks, as long as a chunk holds
whole windows and their order is the same: counts are exact, sums are added in the order of the
stream, examples are chosen by a total order, samples by a hash of the place. What they hold is
saved and restored as plain arrays (`state`, `restore`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch

from mistudio.engine.features.store import BINS, BINS_PER_OCTAVE

Shapes = dict[str, tuple[tuple[int, ...], str]]
Arrays = dict[str, np.ndarray]

FINER = 4  # bins gathered for one that is stored: quantiles are read from these
FINE_BINS = BINS * FINER
SAMPLE = 240  # of it, each tenth has 24 on average and fewer than 10 once in 4,000
COUNTERS = 64  # tokens a feature that are counted at a time
POOL = 8192  # windows that negatives are drawn from
PENDING = 4_000_000  # (feature, token) pairs that are gathered before they are counted: 32 MB
BLOCK = 4096  # features that are worked on at a time where that takes memory


@dataclass(frozen=True)
class Size:
    """What the arrays' sizes follow from. `pool` is at most `POOL` windows."""

    features: int
    context: int
    top_k: int
    radius: int
    pool: int
    vocabulary: int


@dataclass(frozen=True)
class Rows:
    """The tokens of a chunk that count, in the order of the stream, windows whole: int64 [n]."""

    windows: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray

    @cached_property
    def ordinal(self) -> np.ndarray:
        """Which of the chunk's windows each row is in, from 0."""
        new = np.zeros(len(self.windows), np.int64)
        new[1:] = self.windows[1:] != self.windows[:-1]
        return np.cumsum(new)

    @cached_property
    def sizes(self) -> np.ndarray:
        """How many rows each of the chunk's windows has."""
        return np.bincount(self.ordinal)


class Entries:
    """The active (token, feature) pairs of a chunk, sorted by feature, window and position. A
    group is the entries of one feature in one window."""

    def __init__(self, row: np.ndarray, feature: np.ndarray, value: np.ndarray, rows: Rows) -> None:
        """`row`, `feature` int64 and `value` float32 [n], sorted by row."""
        # The place in the input keeps the order of rows, so one sort of one number does.
        bits = max(len(row) - 1, 1).bit_length()
        keys = (feature << bits) | np.arange(len(row))
        keys.sort()
        order = keys & ((1 << bits) - 1)
        self.feature = keys >> bits
        self.row, self.value = row[order], value[order]
        self.rows = rows
        self.window = rows.windows[self.row]
        self.position = rows.positions[self.row]
        new = np.ones(len(order), bool)
        new[1:] = (self.feature[1:] != self.feature[:-1]) | (self.window[1:] != self.window[:-1])
        self.new_group = new
        self.starts = np.flatnonzero(new)
        self.group = np.cumsum(new) - 1
        self.sizes = np.diff(np.append(self.starts, len(order)))

    def __len__(self) -> int:
        return len(self.value)

    @cached_property
    def exact(self) -> np.ndarray:
        """The activations in double precision."""
        return self.value.astype(np.float64)

    @cached_property
    def peaks(self) -> np.ndarray:
        """Index of the strongest entry of every group; the earliest position wins ties."""
        if not len(self):
            return np.empty(0, np.int64)
        highest = np.maximum.reduceat(self.value, self.starts)
        candidates = np.flatnonzero(self.value == highest[self.group])
        first = np.ones(len(candidates), bool)
        first[1:] = self.group[candidates[1:]] != self.group[candidates[:-1]]
        return candidates[first]


class Part:
    """An accumulator: named arrays, whose shapes follow from the size alone."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.arrays = {n: np.zeros(shape, kind) for n, (shape, kind) in self.shapes(size).items()}

    @staticmethod
    def shapes(size: Size) -> Shapes:
        raise NotImplementedError

    @classmethod
    def bytes(cls, size: Size) -> int:
        return sum(
            prod(shape) * np.dtype(kind).itemsize for shape, kind in cls.shapes(size).values()
        )

    def state(self) -> Arrays:
        return dict(self.arrays)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Raises ValueError where the state is of another size."""
        for name, array in self.arrays.items():
            if state[name].shape != array.shape or state[name].dtype != array.dtype:
                raise ValueError(f"{name} is {state[name].shape}, not {array.shape}")
            array[...] = state[name]


class Totals(Part):
    """Counts, power sums in double precision, runs."""

    @staticmethod
    def shapes(size: Size) -> Shapes:
        n = (size.features,)
        counts = ("n_active", "n_contexts", "context_tokens", "runs")
        sums = ("sum1", "sum2", "sum3", "sum4")
        return {
            **dict.fromkeys(counts, (n, "i8")),
            **dict.fromkeys(sums, (n, "f8")),
            "max": (n, "f4"),
            "min": (n, "f4"),
            "passed": ((2,), "i8"),  # tokens, contexts
        }

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.arrays["min"][...] = np.inf

    def add(self, entries: Entries) -> None:
        a, feature, value = self.arrays, entries.feature, entries.exact
        a["passed"] += (len(entries.rows.windows), len(entries.rows.sizes))
        a["n_active"] += np.bincount(feature, minlength=self.size.features)
        first = feature[entries.starts]
        a["n_contexts"] += np.bincount(first, minlength=self.size.features)
        in_window = entries.rows.sizes[entries.rows.ordinal[entries.row[entries.starts]]]
        np.add.at(a["context_tokens"], first, in_window)
        follows = np.zeros(len(entries), bool)
        follows[1:] = entries.position[1:] == entries.position[:-1] + 1
        begins = feature[entries.new_group | ~follows]
        a["runs"] += np.bincount(begins, minlength=self.size.features)
        # Added one by one in the order of the stream: sums of chunks would round otherwise.
        power = value
        for name in ("sum1", "sum2", "sum3", "sum4"):
            np.add.at(a[name], feature, power)
            power = power * value
        np.maximum.at(a["max"], feature, entries.value)
        np.minimum.at(a["min"], feature, entries.value)

    @property
    def tokens(self) -> int:
        return int(self.arrays["passed"][0])

    @property
    def contexts(self) -> int:
        return int(self.arrays["passed"][1])


class Histograms(Part):
    """Counts in bins of a sixteenth of an octave, 16 octaves down from each feature's maximum;
    what is weaker is counted in the lowest.

    Bin edges are the powers 2^(i / 16), the same for all features; only which 256 of them a
    feature has follows its maximum, always whole quarters of an octave. Moving them up adds the
    lowest bins together, so the end does not depend on the order in which values came.
    """

    UNUSED = -32768

    @staticmethod
    def shapes(size: Size) -> Shapes:
        return {"counts": ((size.features, FINE_BINS), "u4"), "top": ((size.features,), "i2")}

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.arrays["top"][...] = self.UNUSED

    def add(self, entries: Entries) -> None:
        if not len(entries):
            return
        fine = np.floor(np.log2(entries.exact) * (BINS_PER_OCTAVE * FINER)).astype(np.int64)
        counts, top = self.arrays["counts"], self.arrays["top"]
        highest = top.copy()
        np.maximum.at(highest, entries.feature, (fine // FINER).astype(np.int16))
        grown = np.flatnonzero((highest > top) & (top != self.UNUSED))
        for start in range(0, len(grown), BLOCK):
            self._shift(grown[start : start + BLOCK], highest)
        top[...] = highest
        place = fine - (top[entries.feature].astype(np.int64) - (BINS - 1)) * FINER
        flat = entries.feature * FINE_BINS + np.maximum(place, 0)
        np.add.at(counts.reshape(-1), flat, np.uint32(1))

    def _shift(self, features: np.ndarray, highest: np.ndarray) -> None:
        counts, top = self.arrays["counts"], self.arrays["top"]
        by = (highest[features].astype(np.int64) - top[features]) * FINER
        old = counts[features]
        source = np.arange(FINE_BINS) + by[:, None]
        moved = np.take_along_axis(old, np.minimum(source, FINE_BINS - 1), axis=1)
        moved[source >= FINE_BINS] = 0
        lowest = np.cumsum(old, axis=1, dtype=np.uint32)
        last = np.minimum(by, FINE_BINS - 1)[:, None]
        moved[:, 0] = np.take_along_axis(lowest, last, axis=1)[:, 0]
        counts[features] = moved

    def stored(self) -> np.ndarray:
        """uint32 [F, BINS]"""
        fine: np.ndarray = self.arrays["counts"]
        return fine.reshape(-1, BINS, FINER).sum(2, dtype=np.uint32)

    def quantiles(self, shares: np.ndarray) -> np.ndarray:
        """float64 [F, shares]: interpolated within a bin as if it were filled evenly in the
        logarithm; NaN for features that never fired."""
        n = self.size.features
        found = np.full((n, len(shares)), np.nan)
        for start in range(0, n, BLOCK):
            counts = self.arrays["counts"][start : start + BLOCK]
            upto = np.cumsum(counts, axis=1, dtype=np.int64)
            total = upto[:, -1]
            low = (self.arrays["top"][start : start + BLOCK].astype(np.int64) - (BINS - 1)) * FINER
            fired = total > 0
            for i, share in enumerate(shares):
                rank = share * total
                place = np.minimum((upto < rank[:, None]).sum(1), FINE_BINS - 1)
                inside = np.take_along_axis(counts, place[:, None], 1)[:, 0].astype(np.int64)
                before = np.take_along_axis(upto, place[:, None], 1)[:, 0] - inside
                part = (rank - before) / np.maximum(inside, 1)
                exponent = (low + place + part) / (BINS_PER_OCTAVE * FINER)
                found[start : start + BLOCK, i][fired] = np.exp2(exponent[fired])
        return found


def runs_of(sorted_values: np.ndarray) -> np.ndarray:
    """For each element of a sorted array, how many equal ones come before it."""
    if not len(sorted_values):
        return np.empty(0, np.int64)
    new = np.ones(len(sorted_values), bool)
    new[1:] = sorted_values[1:] != sorted_values[:-1]
    starts = np.flatnonzero(new)
    return np.arange(len(sorted_values)) - starts[np.cumsum(new) - 1]


class Pool(Part):
    """Some entries of every feature, more than are wanted: when a feature's places are full, all
    but the best are dropped. What cannot be among the best any more never gets in, so that adding
    costs next to nothing once a feature has fired often."""

    def wanted(self) -> int:
        raise NotImplementedError

    def insert(self, entries: Entries, chosen: np.ndarray) -> None:
        """Put the entries numbered `chosen`, which are sorted by feature, in free places."""
        used, capacity = self.arrays["used"], self.arrays["value"].shape[1]
        while len(chosen):
            feature = entries.feature[chosen]
            slot = used[feature].astype(np.int64) + runs_of(feature)
            fits = slot < capacity
            self.place(entries, chosen[fits], feature[fits], slot[fits])
            used += np.bincount(feature[fits], minlength=len(used)).astype(used.dtype)
            full = feature[~fits]
            if not len(full):
                return
            self.compact(full[runs_of(full) == 0])
            chosen = chosen[~fits]
            chosen = chosen[self.may_enter(entries, chosen)]

    def place(
        self, entries: Entries, chosen: np.ndarray, feature: np.ndarray, slot: np.ndarray
    ) -> None:
        self.arrays["window"][feature, slot] = entries.window[chosen]
        self.arrays["position"][feature, slot] = entries.position[chosen]
        self.arrays["value"][feature, slot] = entries.value[chosen]

    def may_enter(self, entries: Entries, chosen: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def compact(self, features: np.ndarray) -> None:
        """Keep the best `wanted` of each of these features."""
        for start in range(0, len(features), BLOCK):
            self._compact(features[start : start + BLOCK])

    def _compact(self, features: np.ndarray) -> None:
        raise NotImplementedError

    def _keep(self, features: np.ndarray, order: np.ndarray) -> None:
        """Keep the places `order` [n, wanted] of the features, in this order."""
        wanted = self.wanted()
        for name in ("window", "position", "value"):
            self.arrays[name][features, :wanted] = self.arrays[name][features[:, None], order]
            self.arrays[name][features, wanted:] = 0
        self.arrays["used"][features] = np.minimum(self.arrays["used"][features], wanted)


class TopExamples(Pool):
    """The `top_k` strongest entries of every feature, ties going to the earlier window and
    position, with the activations around them as shares of their own."""

    def __init__(self, size: Size, one_per_context: bool) -> None:
        super().__init__(size)
        self._one_per_context = one_per_context

    @staticmethod
    def shapes(size: Size) -> Shapes:
        places = (size.features, size.top_k + max(8, size.top_k // 2))
        return {
            "window": (places, "u4"),
            "position": (places, "u2"),
            "value": (places, "f4"),
            "span": ((*places, 2 * size.radius + 1), "f2"),
            "used": ((size.features,), "u2"),
            "least": ((size.features,), "f4"),
        }

    def wanted(self) -> int:
        return self.size.top_k

    def add(self, entries: Entries) -> None:
        chosen = entries.peaks if self._one_per_context else np.arange(len(entries))
        self.insert(entries, chosen[self.may_enter(entries, chosen)])

    def may_enter(self, entries: Entries, chosen: np.ndarray) -> np.ndarray:
        # As strong as the weakest may win by its place.
        entering: np.ndarray = (
            entries.value[chosen] >= self.arrays["least"][entries.feature[chosen]]
        )
        return entering

    def place(
        self, entries: Entries, chosen: np.ndarray, feature: np.ndarray, slot: np.ndarray
    ) -> None:
        super().place(entries, chosen, feature, slot)
        self.arrays["span"][feature, slot] = self._spans(entries, chosen)

    def _spans(self, entries: Entries, chosen: np.ndarray) -> np.ndarray:
        """Activations around each entry divided by its own, [n, 2 * radius + 1], zero where
        inactive."""
        radius = self.size.radius
        spans = np.zeros((len(chosen), 2 * radius + 1), np.float16)
        group = entries.group[chosen]
        sizes = entries.sizes[group]
        owner = np.repeat(np.arange(len(chosen)), sizes)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        entry = entries.starts[group][owner] + within
        column = entries.position[entry] - entries.position[chosen][owner] + radius
        inside = (column >= 0) & (column <= 2 * radius)
        entry, owner = entry[inside], owner[inside]
        share = entries.value[entry] / entries.value[chosen][owner]
        spans[owner, column[inside]] = np.minimum(share, 60_000)  # float16 ends at 65,504
        return spans

    def _compact(self, features: np.ndarray) -> None:
        a, k = self.arrays, self.wanted()
        order = np.lexsort(
            (a["position"][features], a["window"][features], -a["value"][features]), axis=-1
        )[:, :k]
        a["span"][features, :k] = a["span"][features[:, None], order]
        a["span"][features, k:] = 0
        self._keep(features, order)
        a["least"][features] = a["value"][features, k - 1]


class Sample(Pool):
    """`SAMPLE` active tokens of every feature, each as likely as any other: those with the lowest
    hash of feature and place. Nothing depends on when they came."""

    def __init__(self, size: Size, seed: int) -> None:
        super().__init__(size)
        self._seed = seed
        self.arrays["limit"][...] = np.iinfo(np.uint64).max

    @staticmethod
    def shapes(size: Size) -> Shapes:
        places = (size.features, SAMPLE + SAMPLE // 2)
        return {
            "window": (places, "u4"),
            "position": (places, "u2"),
            "value": (places, "f4"),
            "used": ((size.features,), "u2"),
            "limit": ((size.features,), "u8"),
        }

    def wanted(self) -> int:
        return SAMPLE

    def add(self, entries: Entries) -> None:
        chosen = np.arange(len(entries))
        self.insert(entries, chosen[self.may_enter(entries, chosen)])

    def may_enter(self, entries: Entries, chosen: np.ndarray) -> np.ndarray:
        feature = entries.feature[chosen]
        rank = priority(self._seed, feature, entries.window[chosen], entries.position[chosen])
        entering: np.ndarray = rank <= self.arrays["limit"][feature]
        return entering

    def _compact(self, features: np.ndarray) -> None:
        rank = self.ranks(features)
        order = np.argpartition(rank, SAMPLE - 1, axis=1)[:, :SAMPLE]
        self._keep(features, order)
        self.arrays["limit"][features] = np.take_along_axis(rank, order, axis=1).max(1)

    def ranks(self, features: np.ndarray) -> np.ndarray:
        """uint64 [n, places]; empty places come last."""
        a = self.arrays
        rank = priority(
            self._seed,
            features[:, None],
            a["window"][features].astype(np.int64),
            a["position"][features].astype(np.int64),
        )
        rank[a["value"][features] == 0] = np.iinfo(np.uint64).max
        return rank


def priority(
    seed: int, feature: np.ndarray | int, window: np.ndarray, position: np.ndarray | int = 0
) -> np.ndarray:
    """A hash of a feature's token, uint64, that no other token of the same feature has: the
    finaliser of SplitMix64 (Steele et al. 2014), which is one to one, twice."""
    place = (window.astype(np.uint64) << np.uint64(16)) | np.asarray(position).astype(np.uint64)
    start = np.uint64((seed * _GOLDEN + 1) % 2**64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        return _mixed(place + _mixed(np.atleast_1d(feature).astype(np.uint64) + start))


_GOLDEN = 0x9E3779B97F4A7C15


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TokenCounts(Part):
    """On which tokens a feature is active, and how often.

    Pairs are gathered and counted in lots that end at the first window with which there are
    `PENDING` of them; after each lot a feature keeps its `COUNTERS` commonest tokens. A count is
    never too high, and too low by at most `error`: the sum of the highest count dropped after each
    lot (0: exact).
    """

    @staticmethod
    def shapes(size: Size) -> Shapes:
        table = (size.features, COUNTERS)
        return {
            "token": (table, "u4"),
            "count": (table, "u4"),
            "error": ((size.features,), "u4"),
            "occurrences": ((size.vocabulary,), "i8"),
        }

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self._pending: list[np.ndarray] = []
        self._gathered = 0

    def state(self) -> Arrays:
        pending = np.concatenate(self._pending) if self._pending else np.empty(0, np.int64)
        return {**self.arrays, "pending": pending}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        super().restore(state)
        self._pending = [np.asarray(state["pending"], np.int64)]
        self._gathered = len(state["pending"])

    def add(self, entries: Entries) -> None:
        rows = entries.rows
        self.arrays["occurrences"] += np.bincount(rows.tokens, minlength=self.size.vocabulary)
        if not len(entries):
            return
        pairs = (entries.feature << 32) | rows.tokens[entries.row]
        window = rows.ordinal[entries.row]
        upto = np.cumsum(np.bincount(window, minlength=len(rows.sizes)))
        first = 0
        while first < len(upto):
            before = int(upto[first - 1]) if first else 0
            # The window with which the lot is full, were this chunk long enough.
            last = int(np.searchsorted(upto, before + PENDING - self._gathered))
            inside = (window >= first) & (window <= last)
            self._pending.append(pairs if inside.all() else pairs[inside])
            self._gathered += len(self._pending[-1])
            if self._gathered >= PENDING:
                self.count()
            first = last + 1

    def count(self) -> None:
        """Count what is gathered."""
        if not self._pending:
            return
        pairs = np.concatenate(self._pending)
        self._pending, self._gathered = [], 0
        pairs.sort()
        edges = np.arange(0, self.size.features + BLOCK, BLOCK)
        places = np.searchsorted(pairs, edges << 32)
        for start, first, last in zip(edges, places, places[1:], strict=False):
            if last > first:
                self._merge(int(start), pairs[first:last])

    def _merge(self, start: int, pairs: np.ndarray) -> None:
        """Add sorted pairs of the features from `start` on to their counters."""
        token = self.arrays["token"][start : start + BLOCK]
        count = self.arrays["count"][start : start + BLOCK]
        feature = np.broadcast_to(np.arange(start, start + len(token))[:, None], token.shape)
        kept = count > 0
        keys = np.concatenate([(feature[kept] << 32) | token[kept], *_counted(pairs)[:1]])
        counts = np.concatenate([count[kept].astype(np.int64), *_counted(pairs)[1:]])
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        first = np.flatnonzero(runs_of(keys) == 0)
        keys, counts = keys[first], np.add.reduceat(counts, first)
        # Commonest first; of equally common tokens the lower id.
        order = np.argsort(((keys >> 32) << 32) | (0xFFFFFFFF - counts), kind="stable")
        keys, counts = keys[order], counts[order]
        owner = (keys >> 32) - start
        rank = runs_of(owner)
        dropped = rank == COUNTERS
        self.arrays["error"][start + owner[dropped]] += counts[dropped].astype(np.uint32)
        stays = rank < COUNTERS
        token[...] = 0
        count[...] = 0
        token[owner[stays], rank[stays]] = keys[stays] & 0xFFFFFFFF
        count[owner[stays], rank[stays]] = counts[stays]


def _counted(sorted_keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each key once, and how often it is there."""
    first = np.flatnonzero(runs_of(sorted_keys) == 0)
    return sorted_keys[first], np.diff(np.append(first, len(sorted_keys)))


class Activity(Part):
    """In which windows of a pool every feature fires: one bit each. Negatives are drawn from it."""

    def __init__(self, size: Size, pool: np.ndarray) -> None:
        """`pool` are window numbers, ascending."""
        super().__init__(size)
        self.pool = pool

    @staticmethod
    def shapes(size: Size) -> Shapes:
        return {
            "bits": ((size.features, -(-size.pool // 8)), "u1"),
            "counted": ((size.pool, size.context), "?"),  # which of its tokens count
        }

    def add(self, entries: Entries) -> None:
        rows = entries.rows
        place = self.places(rows.windows)
        inside = place >= 0
        self.arrays["counted"][place[inside], rows.positions[inside]] = True
        first = entries.row[entries.starts]
        found = place[first]
        inside = found >= 0
        bits, found = self.arrays["bits"], found[inside]
        flat = entries.feature[entries.starts][inside] * bits.shape[1] + (found >> 3)
        # A pair comes once in a pass, so adding a bit sets it.
        np.add.at(bits.reshape(-1), flat, (1 << (found & 7)).astype(np.uint8))

    def places(self, windows: np.ndarray) -> np.ndarray:
        """Each window's number in the pool, -1 where it is not in it."""
        if not len(self.pool):
            return np.full(len(windows), -1, np.int64)
        found = np.minimum(np.searchsorted(self.pool, windows), len(self.pool) - 1)
        return np.where(self.pool[found] == windows, found, -1)

    def fires(self, features: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Bool, by broadcasting: whether each feature fires in each place of the pool."""
        byte = self.arrays["bits"][features, places >> 3]
        return (byte >> (places & 7).astype(np.uint8)) & 1 == 1


class Collector:
    """Everything that is gathered about one dictionary's features."""

    def __init__(
        self, size: Size, *, pool: np.ndarray, seed: int = 0, one_per_context: bool = True
    ) -> None:
        self.size, self.seed = size, seed
        self.totals = Totals(size)
        self.histograms = Histograms(size)
        self.top = TopExamples(size, one_per_context)
        self.sample = Sample(size, seed)
        self.tokens = TokenCounts(size)
        self.activity = Activity(size, pool)
        self.parts: dict[str, Part] = {
            "totals": self.totals,
            "histograms": self.histograms,
            "top": self.top,
            "sample": self.sample,
            "tokens": self.tokens,
            "activity": self.activity,
        }

    def add(self, codes: Any, rows: Rows) -> None:
        """`codes` are the `Codes` of the rows."""
        if not len(rows.windows):
            return
        entries = Entries(
            codes.rows.cpu().numpy(),
            codes.latents.cpu().numpy(),
            codes.values.to("cpu", torch.float32).numpy(),
            rows,
        )
        self.totals.add(entries)
        self.histograms.add(entries)
        self.top.add(entries)
        self.sample.add(entries)
        self.tokens.add(entries)
        self.activity.add(entries)

    def state(self) -> Arrays:
        return {
            f"{part}.{name}": array
            for part, held in self.parts.items()
            for name, array in held.state().items()
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        for part, held in self.parts.items():
            prefix = f"{part}."
            held.restore(
                {n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)}
            )


def collector_bytes(size: Size) -> int:
    """What a `Collector` holds, the gathered pairs included."""
    parts: tuple[type[Part], ...] = (
        Totals,
        Histograms,
        TopExamples,
        Sample,
        TokenCounts,
        Activity,
    )
    return sum(part.bytes(size) for part in parts) + 8 * PENDING
