"""What an export reads of a discovery: one feature after the other, so that memory does not grow
with how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from mistudio.engine.features.columns import BANDS, BY_NAME
from mistudio.engine.features.exports.texts import TokenTexts
from mistudio.engine.features.store import NONE, FeatureStore, Histogram

BLOCK = 128  # features that are prepared together
WINDOWS = 2048  # whole windows of text that are kept
TOP, DECILE = "top", "decile"
ALL, KNOWN, NO = "all", "known", "no"  # contexts


@dataclass(frozen=True)
class Label:
    """One of a feature's labels. `source` is "human", "rule", "model" or "imported"."""

    text: str
    source: str
    origin: str = ""


@dataclass(frozen=True)
class OtherScore:
    """How well one can tell where a feature is active, by another scorer than the rule: balanced
    accuracy with its interval on so many contexts."""

    scorer: str
    accuracy: float
    low: float | None
    high: float | None
    active: int
    inactive: int


@dataclass(frozen=True)
class Said:
    """What was said about one feature beside its statistics."""

    label: str = ""
    note: str = ""
    starred: bool = False
    hidden: bool = False
    lists: tuple[str, ...] = ()
    labels: tuple[Label, ...] = ()
    scores: tuple[OtherScore, ...] = ()


@dataclass(frozen=True)
class Origin:
    """What the features are of, as exports name it. `layer` and `hook_point` are where the
    dictionary reads."""

    model: str
    sae: str
    layer: int
    hook_point: str
    dataset: str
    d_model: int = 0
    layers: int = 0
    instruct: bool = False
    version: str = ""


class Context(NamedTuple):
    """Tokens around one on which a feature is active. `ids` and `texts` have equal length; `peak`
    is the index of that token among them, at (`window`, `position`) of the token store. The
    feature is active on the tokens `places`, ascending, as strongly as `numbers` say.
    `group` is `TOP`, or `DECILE` with `decile` 0 (weakest) to 9. Where the activations are not
    `known`, there is that of the peak alone: no others were stored."""

    group: str
    decile: int
    window: int
    position: int
    document: int
    activation: float
    ids: Sequence[int]
    texts: tuple[str, ...]
    places: Sequence[int]
    numbers: Sequence[float]
    peak: int
    known: bool

    @property
    def values(self) -> list[float]:
        """Activations of all tokens, 0 where inactive."""
        values = [0.0] * len(self.ids)
        for place, number in zip(self.places, self.numbers, strict=True):
            values[place] = number
        return values


@dataclass(frozen=True)
class Token:
    """A token of the vocabulary that a feature has to do with."""

    id: int
    text: str


@dataclass(frozen=True)
class Weighed(Token):
    """With its centred logit (logit lens)."""

    logit: float


@dataclass(frozen=True)
class Counted(Token):
    """The feature is active on `count` to `count` + `error` of its `occurrences` in the text."""

    count: int
    occurrences: int
    error: int


@dataclass(frozen=True)
class LogitHistogram:
    """How many tokens of the vocabulary have which logit: bins of equal width."""

    low: float
    high: float
    counts: np.ndarray


@dataclass(frozen=True)
class Feature:
    """One feature in full. `statistics` are the columns of the store by name; None where it has
    no such number. `direction` is its decoder row, where it was asked for."""

    index: int
    statistics: dict[str, float | int | str | None]
    said: Said
    description: str
    top_token: str
    commonest_token: str
    tokens: tuple[Counted, ...]
    promoted: tuple[Weighed, ...]
    suppressed: tuple[Weighed, ...]
    histogram: Histogram
    decile_edges: tuple[float, ...]
    logits: LogitHistogram | None
    neighbours: tuple[tuple[int, float], ...]
    contexts: tuple[Context, ...]
    direction: np.ndarray | None

    @property
    def alive(self) -> bool:
        return bool(self.statistics["n_active"])

    def number(self, name: str) -> float:
        """A statistic as a number; NaN where there is none."""
        value = self.statistics.get(name)
        return float(value) if isinstance(value, int | float) else float("nan")


class WholeWindows(Protocol):
    """Activations of features on whole windows of text, from the model."""

    def of(self, feature: int) -> Mapping[int, tuple[list[int], list[float]]]:
        """window -> (positions ascending, activations), all on which the feature is active."""
        ...


@dataclass
class Material:
    """Everything that exports of one selection read.

    `describe` gives descriptions by rule of some features, "" for none. `directions` gives decoder
    rows float32 [n, d] of some features; None where nobody needs them. With `whole` windows
    examples are whole windows; without, they are what was stored around top examples. At most
    `per_decile` examples of each tenth.
    """

    store: FeatureStore
    tokens: Any
    texts: TokenTexts
    origin: Origin
    features: np.ndarray
    said: Mapping[int, Said] = field(default_factory=dict)
    describe: Callable[[np.ndarray], Sequence[str]] = lambda features: [""] * len(features)
    directions: Callable[[np.ndarray], np.ndarray] | None = None
    whole: WholeWindows | None = None
    per_decile: int = 5

    def __post_init__(self) -> None:
        # Windows are examples of many features: those that were read last are kept.
        self._window = lru_cache(maxsize=WINDOWS)(self._read_window)

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[Feature]:
        return self.each()

    def each(self, contexts: str = ALL) -> Iterator[Feature]:
        """The features in their order, with `ALL` contexts, only those whose activations are
        `KNOWN`, or `NO` ones."""
        for start in range(0, len(self.features), BLOCK):
            block = _Block(self, self.features[start : start + BLOCK], contexts)
            for place in range(len(block.features)):
                yield self._feature(block, place)

    def _feature(self, block: _Block, i: int) -> Feature:
        feature, statistics = int(block.features[i]), block.statistics[i]
        return Feature(
            index=feature,
            statistics=statistics,
            said=self.said.get(feature, Said()),
            description=block.descriptions[i],
            top_token=self._text(statistics.get("top_token")),
            commonest_token=self._text(statistics.get("common_token")),
            tokens=tuple(
                self._counted(token, count, block, i)
                for token, count in block.tokens[i]
                if token != NONE
            ),
            promoted=self._weighed(block.logit_ids[i][0], block.logit_values[i][0]),
            suppressed=self._weighed(block.logit_ids[i][1], block.logit_values[i][1]),
            histogram=self.store.histogram(feature),
            decile_edges=tuple(block.edges[i]),
            logits=block.logits(i),
            neighbours=block.neighbours(i),
            contexts=tuple(self._contexts(block, i)),
            direction=None if block.directions is None else block.directions[i],
        )

    def _counted(self, token: int, count: int, block: _Block, i: int) -> Counted:
        occurrences = int(block.occurrences[token])
        return Counted(token, self.texts[token], count, occurrences, block.errors[i])

    def _text(self, token: object) -> str:
        return self.texts[token] if isinstance(token, int) and token >= 0 else ""

    def _weighed(self, ids: Sequence[int], values: Sequence[float]) -> tuple[Weighed, ...]:
        return tuple(
            Weighed(token, self.texts[token], value)
            for token, value in zip(ids, values, strict=True)
        )

    # --- contexts -------------------------------------------------------------------------------

    def _contexts(self, block: _Block, i: int) -> Iterator[Context]:
        """Top examples strongest first; then examples of each tenth, strongest tenth first."""
        found = self.whole.of(int(block.features[i])) if self.whole is not None else None
        for entry in block.entries[i]:
            ids, texts = self._window(entry.window)
            first, last = 0, len(ids)
            if found is not None:
                places, numbers = _with_peak(found.get(entry.window, ([], [])), entry)
            else:
                radius = self.store.meta.radius
                first, last = max(0, entry.position - radius), entry.position + radius + 1
                if entry.group == TOP:
                    places, numbers = block.span(i, entry, first)
                else:
                    places, numbers = [entry.position - first], [entry.value]
                ids = ids[first:last]
                texts = tuple(self.texts.of(ids))
            yield Context(
                entry.group,
                entry.decile,
                entry.window,
                entry.position,
                entry.document,
                entry.value,
                ids,
                texts,
                places,
                numbers,
                entry.position - first,
                found is not None or entry.group == TOP,
            )

    def _read_window(self, window: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
        ids = tuple(self.tokens.windows([window], self.store.meta.context)[0].tolist())
        return ids, tuple(self.texts.of(ids))


def _with_peak(found: tuple[list[int], list[float]], entry: Entry) -> tuple[list[int], list[float]]:
    """What the discovery found at the peak stands, should the model not find it again: it may have
    read activations that were stored in 16 bits."""
    if entry.position in found[0]:
        return found
    numbers = {**dict(zip(*found, strict=True)), entry.position: entry.value}
    places = sorted(numbers)
    return places, [numbers[place] for place in places]


class Entry(NamedTuple):
    """Where an example is. `number` is its place among those of its group."""

    group: str
    decile: int
    number: int
    window: int
    position: int
    value: float
    document: int


class _Block:
    """What some features have, read together: array by array, not feature by feature."""

    def __init__(self, material: Material, features: np.ndarray, contexts: str) -> None:
        store = material.store
        self.features = features
        self.statistics = statistics_of(store, features)
        self.descriptions = material.describe(features)
        self.tokens = np.array(store.tokens[features]).tolist()
        self.occurrences = store.array("token_counts")
        self.errors = store.array("token_error")[features].tolist()
        self.logit_ids = store.array("logit_ids")[features].tolist()
        self.logit_values = store.array("logit_values")[features].tolist()
        self.edges = store.array("decile_edges")[features].tolist()
        self._logits: tuple[np.ndarray, np.ndarray] | None = None
        if (store.folder / "logit_histogram.npy").exists():
            counts, ranges = store.array("logit_histogram"), store.array("logit_range")
            self._logits = np.array(counts[features]), np.array(ranges[features])
        self._near: tuple[list[Any], list[Any]] | None = None
        if (store.folder / "neighbour_ids.npy").exists():
            ids, cosines = store.array("neighbour_ids"), store.array("neighbour_cosines")
            self._near = ids[features].tolist(), cosines[features].tolist()
        given = material.directions
        self.directions = None if given is None else given(features)
        self.entries: list[list[Entry]] = [[] for _ in features]
        self._spans: np.ndarray | None = None
        if contexts != NO:
            known = contexts == KNOWN and material.whole is None
            self.entries = _entries(material, features, 0 if known else material.per_decile)
            if material.whole is None:
                self._spans = np.array(store.array("top_span")[features], np.float32)
        self._shares = store.meta.format > 1

    def logits(self, i: int) -> LogitHistogram | None:
        if self._logits is None:
            return None
        low, high = self._logits[1][i]
        return LogitHistogram(float(low), float(high), self._logits[0][i])

    def neighbours(self, i: int) -> tuple[tuple[int, float], ...]:
        """(feature, cosine) of the nearest decoder directions, where they were computed."""
        if self._near is None:
            return ()
        pairs = zip(self._near[0][i], self._near[1][i], strict=True)
        return tuple((number, cosine) for number, cosine in pairs if number >= 0)

    def span(self, i: int, entry: Entry, first: int) -> tuple[list[int], list[float]]:
        """(places from token `first` on, activations) around a top example."""
        assert self._spans is not None
        span = self._spans[i, entry.number]
        columns = np.flatnonzero(span)
        radius = len(span) // 2
        places = columns + entry.position - radius - first
        values = span[columns] * np.float32(entry.value) if self._shares else span[columns]
        return places.tolist(), values.tolist()


def _entries(material: Material, features: np.ndarray, per: int) -> list[list[Entry]]:
    """The examples of some features, `per` of each tenth, in the order of `Feature.contexts`."""
    store = material.store
    top = np.array(store.top[features])
    # The strongest tenth comes first.
    spread = np.array(store.deciles[features])[:, ::-1, :per]
    tenths = spread.shape[1]
    joined = np.concatenate([top, spread.reshape(len(features), -1)], axis=1)
    row, column = np.nonzero(joined["value"] > 0)
    chosen = joined[row, column]
    windows, positions = chosen["window"].astype(np.int64), chosen["position"].astype(np.int64)
    found: list[list[Entry]] = [[] for _ in features]
    if not len(row):
        return found
    documents, _ = material.tokens.origins(windows, positions, store.meta.context)
    n_top, width = top.shape[1], spread.shape[2]
    values = chosen["value"].tolist()
    places = zip(windows.tolist(), positions.tolist(), values, documents.tolist(), strict=True)
    for i, place, (window, position, value, document) in zip(
        row.tolist(), column.tolist(), places, strict=True
    ):
        group, decile, number = TOP, -1, place
        if place >= n_top:
            group, (decile, number) = DECILE, divmod(place - n_top, width)
            decile = tenths - 1 - decile
        found[i].append(Entry(group, decile, number, window, position, value, document))
    return found


def statistics_of(
    store: FeatureStore, features: np.ndarray
) -> list[dict[str, float | int | str | None]]:
    """The columns of some features by name, in the order of the table of columns."""
    found: list[dict[str, float | int | str | None]] = [{} for _ in features]
    for name, column in BY_NAME.items():
        if name not in store.columns:
            continue
        values = np.array(store.columns[name][features])
        told: Iterable[float | int | str | None]
        if name == "band":
            told = [BANDS[value] for value in values]
        elif column.dtype.startswith("float"):
            # The shortest decimal number that is this one in 32 bits.
            told = [None if text == "nan" else float(text) for text in values.astype(str)]
        else:
            told = [None if value == column.none else value for value in values.tolist()]
        for row, value in zip(found, told, strict=True):
            row[name] = value
    return found
