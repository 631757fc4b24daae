"""What the dialog of one feature shows, read in background threads as plain data that is never
changed again. Nothing here knows widgets."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from mistudio.engine.features.store import Histogram
from mistudio.errors import Incompatible
from mistudio.library.library import Library
from mistudio.library.records import FeatureRun

MOST_JOINED = 4  # tokens of one character: no UTF-8 character has more bytes
BROKEN = "\ufffd"
UNKNOWN = float("nan")


@dataclass(frozen=True)
class Line:
    """A window of text as people read it, in spans of whole characters: nearly always a token
    each, several where they share a character.

    `ids`: of each span's tokens. `activations` is the largest of each span's, NaN where it is not
    known. `places` [spans + 1]: the position in the window where each begins, and the end.
    `peak`: the span that the line is shown for; -1 where there is none.
    """

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    activations: tuple[float, ...]
    places: tuple[int, ...]
    peak: int

    def around(self, tokens: int) -> tuple[int, int]:
        """(first, last) spans that reach `tokens` tokens to each side of the peak, or of the
        middle where there is none; all for 0."""
        if not tokens or not self.texts:
            return 0, len(self.texts)
        middle = self.peak if self.peak >= 0 else len(self.texts) // 2
        first = np.searchsorted(self.places, self.places[middle] - tokens, side="left")
        last = np.searchsorted(self.places, self.places[middle + 1] + tokens, side="right") - 1
        return int(first), int(min(last, len(self.texts)))

    def text(self, tokens: int = 0, mark: bool = False) -> str:
        """As it stands in the corpus; with `mark` the peak in «»."""
        first, last = self.around(tokens)
        parts = list(self.texts[first:last])
        if mark and self.peak >= 0:
            parts[self.peak - first] = f"«{parts[self.peak - first]}»"
        return "".join(parts)


@dataclass(frozen=True)
class Shown:
    """One window with where it comes from. `activation` is the one it is shown for; None where the
    feature is not active in it. `whole`: all activations of the window are known."""

    window: int
    position: int
    activation: float | None
    source: str
    line: Line
    whole: bool


@dataclass(frozen=True)
class Tenth:
    """Examples of one tenth of a feature's activations, 1 the weakest; `low` to `high`."""

    number: int
    low: float
    high: float
    examples: tuple[Shown, ...]


@dataclass(frozen=True)
class CommonToken:
    """A token on which a feature is active: `count` times of its `occurrences` in the text; the
    true count may be higher by `error`."""

    text: str
    id: int
    count: int
    occurrences: int
    error: int


@dataclass(frozen=True)
class Overview:
    """`histogram` and `tokens` are None where an earlier version's discovery has none."""

    feature: int
    examples: tuple[Shown, ...]
    histogram: Histogram | None
    tokens: tuple[CommonToken, ...] | None


@dataclass(frozen=True)
class Lens:
    """(token text, id, centred logit), strongest first; `counts` [bins] of the vocabulary's tokens
    by logit between `low` and `high`, None where there is no histogram."""

    feature: int
    promoted: tuple[tuple[str, int, float], ...]
    suppressed: tuple[tuple[str, int, float], ...]
    counts: np.ndarray | None
    low: float
    high: float


_readings: weakref.WeakKeyDictionary[Any, Reading] = weakref.WeakKeyDictionary()


class Reading:
    """Reads one opened discovery; from any thread."""

    def __init__(self, library: Library, run: FeatureRun, reader: Any) -> None:
        """`reader` is the table's `FeatureReader` of the same run: what it opened is used."""
        self.library, self.run = library, run
        self.store = reader.store
        self._reader = weakref.proxy(reader)
        self._pieces: dict[int, str] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, library: Library, run: FeatureRun, reader: Any) -> Reading:
        """The one of this reader: what one dialog has read of tokens the next one knows."""
        if reader not in _readings:
            _readings[reader] = cls(library, run, reader)
        return _readings[reader]

    # Opened when first asked for, in a background thread; seconds where the table has not done so.

    @cached_property
    def _tokens(self) -> Any:
        return self._reader.tokens

    @cached_property
    def _tokenizer(self) -> Any:
        return self._reader.tokenizer

    @cached_property
    def _documents(self) -> Any:
        return self._reader.documents

    # --- tokens ---------------------------------------------------------------------------------

    def piece(self, token: int) -> str:
        """A token by itself; one that is a part of a character in its own spelling."""
        from mistudio.engine.datasets.tokenizers import piece

        text = self._decoded(token)
        return piece(self._tokenizer, token) if BROKEN in text or not text else text

    def _decoded(self, token: int) -> str:
        """A token's text with the blank before it, which decoding alone may drop."""
        text = self._pieces.get(token)
        if text is None:
            with self._lock:
                text = self._pieces[token] = piece_of(self._tokenizer, token)
        return text

    def line(self, ids: Sequence[int], activations: Sequence[float], position: int) -> Line:
        """`position` of the peak among `ids`; -1 for none."""
        texts, starts = joined(ids, self._decoded, self._decode)
        ends = [*starts[1:], len(ids)]
        values = [_largest(activations[a:b]) for a, b in zip(starts, ends, strict=True)]
        peak = int(np.searchsorted(starts, position, side="right")) - 1 if position >= 0 else -1
        return Line(
            tuple(texts),
            tuple(tuple(int(i) for i in ids[a:b]) for a, b in zip(starts, ends, strict=True)),
            tuple(values),
            (*starts, len(ids)),
            peak,
        )

    def _decode(self, ids: Sequence[int]) -> str:
        with self._lock:
            return str(self._tokenizer.decode(list(ids)))

    # --- examples -------------------------------------------------------------------------------

    def overview(self, feature: int, limit: int = 20) -> Overview:
        return Overview(
            feature,
            self.top(feature, 0, limit),
            self._or_none(lambda: self.store.histogram(feature)),
            self._or_none(lambda: self._common(feature)),
        )

    def top(self, feature: int, first: int, last: int) -> tuple[Shown, ...]:
        """The strongest examples from `first` to `last` as whole windows; activations are kept
        for `meta.radius` tokens to each side of the peak."""
        examples = self.store.examples(feature, self._tokens, last)[first:]
        if not examples:
            return ()
        ids = self._windows([example.window for example in examples])
        found = []
        for example, whole in zip(examples, ids, strict=True):
            values = np.full(len(whole), UNKNOWN, np.float32)
            start = example.position - example.peak
            values[start : start + len(example.activations)] = example.activations
            values[example.position] = example.activation
            found.append(
                self._shown(example.window, example.position, example.activation, whole, values)
            )
        return tuple(found)

    def tenths(self, feature: int) -> tuple[Tenth, ...]:
        """Strongest first. Only each example's own activation is stored."""
        edges = self.store.decile_edges(feature)
        found = []
        for number, examples in enumerate(self.store.decile_examples(feature), 1):
            if examples:
                ids = self._windows([example.window for example in examples])
                shown = [
                    self._one(e.window, e.position, e.activation, whole)
                    for e, whole in zip(examples, ids, strict=True)
                ]
                low, high = float(edges[number - 1]), float(edges[number])
                found.append(Tenth(number, low, high, tuple(shown)))
        return tuple(reversed(found))

    def silent(self, feature: int) -> tuple[tuple[Shown, ...], tuple[Shown, ...]]:
        """(where one of its commonest tokens stands, random text): it is active nowhere in them."""
        hard = self.store.hard_negatives(feature)
        random = self.store.inactive_windows(feature)
        return (
            tuple(
                self._shown(window, position, None, whole, np.zeros(len(whole)))
                for (window, position), whole in zip(
                    hard, self._windows([window for window, _ in hard]), strict=True
                )
            ),
            tuple(
                self._shown(window, -1, None, whole, np.zeros(len(whole)))
                for window, whole in zip(random, self._windows(random), strict=True)
            ),
        )

    def measured(self, feature: int, shown: Sequence[Shown]) -> tuple[Shown, ...]:
        """The same with all activations of their windows, from the model. Raises `Busy`."""
        from mistudio.jobs.feature_windows import read_windows

        found = read_windows(self.library, self.run, feature, [one.window for one in shown])
        return tuple(
            replace(
                one,
                line=self.line(
                    [token for ids in one.line.ids for token in ids], values, one.position
                ),
                whole=True,
            )
            for one, values in zip(shown, found.values, strict=True)
        )

    def can_measure(self) -> bool:
        from mistudio.jobs.feature_windows import device_is_free

        return device_is_free(self.library, self.run)

    def _one(self, window: int, position: int, activation: float, ids: np.ndarray) -> Shown:
        values = np.full(len(ids), UNKNOWN, np.float32)
        values[position] = activation
        return self._shown(window, position, activation, ids, values)

    def _shown(
        self,
        window: int,
        position: int,
        activation: float | None,
        ids: np.ndarray,
        values: np.ndarray,
    ) -> Shown:
        line = self.line(ids.tolist(), values.tolist(), position)
        at = max(position, 0) if position >= 0 else len(ids) // 2
        source = self.source(window, at)
        return Shown(window, position, activation, source, line, not np.isnan(values).any())

    def source(self, window: int, position: int) -> str:
        """The document's title, or its number from 1."""
        number = self._tokens.document_at(window, position, self.store.meta.context)
        title = self._documents[number].title if self._documents is not None else ""
        return title or f"document {number + 1:,}"

    def context_line(self, window: int, position: int) -> Shown:
        """A window of the text with one token marked and no activations."""
        ids = self._windows([window])[0]
        return self._shown(window, position, None, ids, np.full(len(ids), UNKNOWN))

    def _windows(self, windows: Sequence[int]) -> np.ndarray:
        if not len(windows):
            return np.empty((0, self.store.meta.context), np.int64)
        found: np.ndarray = self._tokens.windows(
            np.asarray(windows, np.int64), self.store.meta.context
        ).numpy()
        return found

    # --- numbers --------------------------------------------------------------------------------

    def _common(self, feature: int) -> tuple[CommonToken, ...]:
        return tuple(
            CommonToken(self.piece(t.token), t.token, t.count, t.occurrences, t.error)
            for t in self.store.token_counts(feature)
        )

    def lens(self, feature: int) -> Lens:
        def named(pairs: Sequence[tuple[int, float]]) -> tuple[tuple[str, int, float], ...]:
            return tuple((self.piece(token), token, value) for token, value in pairs)

        counts, low, high = None, UNKNOWN, UNKNOWN
        if (self.store.folder / "logit_histogram.npy").exists():
            counts = np.array(self.store.array("logit_histogram")[feature], np.int64)
            low, high = (float(v) for v in self.store.array("logit_range")[feature])
        return Lens(
            feature,
            named(self.store.promoted(feature)),
            named(self.store.suppressed(feature)),
            counts,
            low,
            high,
        )

    @staticmethod
    def _or_none(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Incompatible:
            return None


def piece_of(tokenizer: Any, token: int) -> str:
    text = str(tokenizer.decode([token]))
    raw = tokenizer.convert_ids_to_tokens(token)
    if isinstance(raw, str) and raw.startswith("▁") and not text.startswith(" "):
        text = f" {text}"
    return text


def joined(
    ids: Sequence[int], piece: Callable[[int], str], decode: Callable[[Sequence[int]], str]
) -> tuple[list[str], list[int]]:
    """(texts, where each begins among `ids`): tokens that hold only a part of a character stand
    together with the others of it. Bytes that make no character stay as they are decoded."""
    texts, starts = [], []
    at = 0
    while at < len(ids):
        text, width = piece(int(ids[at])), 1
        if BROKEN in text:
            for more in range(2, min(MOST_JOINED, len(ids) - at) + 1):
                together = decode([int(i) for i in ids[at : at + more]])
                if BROKEN not in together:
                    text, width = together, more
                    break
        texts.append(text)
        starts.append(at)
        at += width
    return texts, starts


def _largest(values: Sequence[float]) -> float:
    known = [value for value in values if value == value]
    return max(known) if known else UNKNOWN
