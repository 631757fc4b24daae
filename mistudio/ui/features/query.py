"""What the feature table shows and in which order, as plain data; and the order itself, from numpy
columns. Nothing here knows Qt.

An order is an int32 array of feature numbers. Sorted orders of all features are kept, so that a
filter is one mask and one gather over an order that is there already.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mistudio.engine.features.columns import BANDS, BY_NAME

FIELDS = ("label", "note", "description", "tokens", "logits", "context")
HIDDEN = ("without", "with", "only")
GIVEN = "given"  # the order of a subset, e.g. strongest on a text first
KEPT_ORDERS = 12


@dataclass(frozen=True)
class Range:
    """Features whose column lies between `low` and `high`, both included; None: no such bound.
    Features without a number are left out."""

    column: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Query:
    """What is shown. `hidden` is one of `HIDDEN`; `bands` are names of `columns.BANDS`, none for
    all; `list_id` 0 is no list; `sort` is the name of a column, or `GIVEN`."""

    ranges: tuple[Range, ...] = ()
    bands: tuple[str, ...] = ()
    alive: bool = True
    starred: bool = False
    labelled: bool = False
    hidden: str = "without"
    list_id: int = 0
    search: str = ""
    fields: tuple[str, ...] = FIELDS
    sort: str = "density"
    descending: bool = True

    def range_of(self, column: str) -> Range | None:
        return next((one for one in self.ranges if one.column == column), None)

    def with_range(self, wanted: Range) -> Query:
        """With this range in place of another one on the same column; at its place, or last. A
        range without bounds is taken away."""
        kept = [one for one in self.ranges if one.column != wanted.column]
        if wanted.low is not None or wanted.high is not None:
            place = next(
                (i for i, one in enumerate(self.ranges) if one.column == wanted.column), len(kept)
            )
            kept.insert(place, wanted)
        return replace(self, ranges=tuple(kept))

    def without_range(self, column: str) -> Query:
        return self.with_range(Range(column))

    def to_dict(self) -> dict[str, Any]:
        """As JSON would give it back."""
        values = asdict(self)
        lists = {name: list(values[name]) for name in ("ranges", "bands", "fields")}
        return {**values, **lists}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Query:
        """From what `to_dict` gave; what is missing, or of another version, is as at first."""
        found: dict[str, Any] = {}
        for name in ("alive", "starred", "labelled", "descending"):
            if isinstance(values.get(name), bool):
                found[name] = values[name]
        if values.get("hidden") in HIDDEN:
            found["hidden"] = values["hidden"]
        for name in ("sort", "search"):
            if isinstance(values.get(name), str):
                found[name] = values[name]
        if isinstance(values.get("list_id"), int):
            found["list_id"] = values["list_id"]
        if bands := _known(values.get("bands"), BANDS):
            found["bands"] = bands
        if fields := _known(values.get("fields"), FIELDS):
            found["fields"] = fields
        ranges = values.get("ranges")
        if isinstance(ranges, list | tuple):
            found["ranges"] = tuple(one for one in map(_range, ranges) if one is not None)
        return cls(**found)


def _known(values: Any, names: Iterable[str]) -> tuple[str, ...]:
    given = values if isinstance(values, list | tuple) else ()
    return tuple(name for name in names if name in given)


def _range(values: Any) -> Range | None:
    if not isinstance(values, Mapping) or not isinstance(values.get("column"), str):
        return None
    low, high = values.get("low"), values.get("high")
    if not all(bound is None or isinstance(bound, int | float) for bound in (low, high)):
        return None
    return Range(values["column"], low, high)


@dataclass(frozen=True)
class Marks:
    """What is known of features beside the columns: bool [n] each, None where it does not limit.
    `found` is what the search brought, `listed` the members of the chosen list; `subset` int32
    in an order of its own; `by_name` int32: the labelled features by their labels."""

    starred: np.ndarray | None = None
    labelled: np.ndarray | None = None
    hidden: np.ndarray | None = None
    found: np.ndarray | None = None
    listed: np.ndarray | None = None
    subset: np.ndarray | None = None
    by_name: np.ndarray | None = None


class Orders:
    """Orders of all features by any column, and masks of filters."""

    def __init__(self, columns: Mapping[str, np.ndarray], n: int) -> None:
        """`columns`: [n] each."""
        self._columns, self._n = columns, n
        self._orders: OrderedDict[tuple[str, bool], np.ndarray] = OrderedDict()

    def arrange(self, query: Query, marks: Marks) -> np.ndarray:
        """int32: the features that pass, in order."""
        kept = self.mask(query, marks)
        if query.sort == GIVEN and marks.subset is not None:
            return marks.subset[kept[marks.subset]]
        order = self._order(query, marks)
        return order[kept[order]]

    def mask(self, query: Query, marks: Marks) -> np.ndarray:
        """Bool [n]"""
        kept = np.ones(self._n, bool)
        if query.alive and "density" in self._columns:
            kept &= self._columns["density"] > 0
        for one in query.ranges:
            if one.column in self._columns:
                kept &= self._within(one)
        if query.bands and "band" in self._columns:
            allowed = np.isin(np.arange(len(BANDS)), [BANDS.index(band) for band in query.bands])
            kept &= allowed[np.minimum(self._columns["band"], len(BANDS) - 1)]
        if query.starred:
            kept &= _or_none(marks.starred, self._n)
        if query.labelled:
            kept &= _or_none(marks.labelled, self._n)
        if query.hidden == "only":
            kept &= _or_none(marks.hidden, self._n)
        elif query.hidden == "without" and marks.hidden is not None:
            kept &= ~marks.hidden
        for limit in (marks.found, marks.listed):
            if limit is not None:
                kept &= limit
        if marks.subset is not None:
            inside = np.zeros(self._n, bool)
            inside[marks.subset] = True
            kept &= inside
        return kept

    def _within(self, one: Range) -> np.ndarray:
        values = self._columns[one.column]
        kept = self._has_number(one.column)
        kind = values.dtype.type if values.dtype.kind == "f" else float
        if one.low is not None:
            kept = kept & (values >= kind(one.low))
        if one.high is not None:
            kept = kept & (values <= kind(one.high))
        return kept

    def _has_number(self, name: str) -> np.ndarray:
        values, known = self._columns[name], BY_NAME.get(name)
        if values.dtype.kind == "f":
            return ~np.isnan(values)
        if known is not None and known.none is not None:
            return values != known.none
        return np.ones(self._n, bool)

    # --- orders ---------------------------------------------------------------------------------

    def _order(self, query: Query, marks: Marks) -> np.ndarray:
        if query.sort == "label":
            return _by_name(marks.by_name, self._n, query.descending)
        if query.sort == "star":
            return _marked_first(marks.starred, self._n, query.descending)
        return self.by_column(query.sort, query.descending)

    def by_column(self, name: str, descending: bool) -> np.ndarray:
        """int32 [n]: all features by a column, those without a number last, equal ones by their
        own number; by that alone where there is no such column."""
        key = (name, descending)
        if key not in self._orders:
            self._orders[key] = self._sorted(name, descending)
            while len(self._orders) > KEPT_ORDERS:
                self._orders.popitem(last=False)
        self._orders.move_to_end(key)
        return self._orders[key]

    def _sorted(self, name: str, descending: bool) -> np.ndarray:
        if name not in self._columns:
            forward = np.arange(self._n, dtype=np.int32)
            return forward[::-1].copy() if descending and name == "id" else forward
        has = self._has_number(name)
        numbered = np.flatnonzero(has).astype(np.int32)
        order = sorted_by(self._columns[name][numbered], numbered, descending)
        return np.concatenate([order, np.flatnonzero(~has).astype(np.int32)])


def sorted_by(values: np.ndarray, numbers: np.ndarray, descending: bool) -> np.ndarray:
    """int32: `numbers` (ascending, not negative) by their values, equal ones by themselves.

    Value and number are sorted as one 64-bit key: numpy sorts those several times faster than it
    finds a stable order.
    """
    if values.dtype == np.float32:
        bits = (values + np.float32(0)).view(np.uint32)  # -0 is 0
        negative = (bits >> 31).astype(bool)
        keys = np.where(negative, ~bits, bits | np.uint32(1 << 31))
    elif values.dtype.kind in "iu" and len(values) and 0 <= values.min() <= values.max() < 1 << 32:
        keys = values.astype(np.uint32)
    else:
        signed = values.astype(np.int64) if values.dtype.kind in "iu" else values
        return numbers[np.argsort(-signed if descending else signed, kind="stable")]
    keys = ~keys if descending else keys
    packed = np.sort((keys.astype(np.uint64) << np.uint64(32)) | numbers.astype(np.uint64))
    return packed.astype(np.uint32).view(np.int32)


def _or_none(mask: np.ndarray | None, n: int) -> np.ndarray:
    return np.zeros(n, bool) if mask is None else mask


def _by_name(named: np.ndarray | None, n: int, descending: bool) -> np.ndarray:
    """Named features by their names, then the others by number."""
    first = np.empty(0, np.int32) if named is None else named
    others = np.ones(n, bool)
    others[first] = False
    ordered = first[::-1] if descending else first
    return np.concatenate([ordered, np.flatnonzero(others).astype(np.int32)])


def _marked_first(mask: np.ndarray | None, n: int, descending: bool) -> np.ndarray:
    marked = _or_none(mask, n)
    first, then = (marked, ~marked) if descending else (~marked, marked)
    return np.concatenate([np.flatnonzero(part).astype(np.int32) for part in (first, then)])
