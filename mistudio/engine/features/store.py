"""The feature store: what one discovery found about every feature of one dictionary, as arrays of
fixed stride that are opened without being read.

    run.json              `FeatureMeta`; written last, so a folder without it is not whole
    columns/<name>.npy    [F], one statistic each (see `columns.py` for what they mean)
    top.npy               [F, top_k] `ENTRY`, strongest first: the exact top examples
    top_span.npy          f16 [F, top_k, 2 radius + 1]: activations around each, as shares of it
    deciles.npy           [F, 10, 10] `ENTRY`: examples of each tenth of the active tokens, weakest
                          tenth first; a uniform sample, in no meaningful order
    decile_edges.npy      f32 [F, 11]
    inactive.npy          u32 [F, 50]: random windows without any activation
    hard.npy              [F, 50] `PLACE`: windows without any activation although they contain one
                          of the feature's five commonest tokens, which stands at that position
    histogram.npy         u32 [F, 64], histogram_top.npy i16 [F]: see `Histogram`
    tokens.npy            [F, 16] `TOKEN`: its commonest tokens, token_error.npy u32 [F]
    descriptions.txt      what the rules say of each feature, UTF-8, one after another;
                          descriptions.npy i64 [F + 1]: where each begins
    token_counts.npy      u32 [vocabulary]: how often each token id counted in this pass
    logit_ids.npy         i32 [F, 2, 20], logit_values.npy f32 [F, 2, 20]: promoted and suppressed
    logit_histogram.npy   i32 [F, 50], logit_range.npy f32 [F, 2]: logits of all tokens, in bins of
                          equal width between the lowest and the highest. Where the logit lens does
                          not apply, these two are missing and the two above are [F, 2, 0].

Discoveries of earlier versions have 5 examples of each tenth and 25 windows of either kind.

An entry whose value is 0, a window or token `NONE` is an empty place; full places come first.

Token ids are not copied here: (window, position) leads to the token store, `tokens.windows([w],
meta.context)`. Activations are kept only around top examples (2 kB a feature, so that tables and
dialogs draw without a model); those of any other window come from `live.window_activations`.

Reading: `FeatureStore(folder)`. Whole arrays for work over all features are its properties `top`,
`deciles`, `inactive`, `hard`, `histograms`, `tokens`; the methods of the same things for one
feature give plain objects. Analyses add statistics with `add_columns` and their own arrays with
`add_arrays`, read by `array(name)`.

Discoveries of the first format open too: with their seven columns, their examples and logits;
what they lack is refused with `Incompatible` ("discover again").
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from mistudio.engine.features.columns import BY_NAME, DISCOVERY
from mistudio.errors import CorruptFile, Incompatible

META, COLUMN_FOLDER = "run.json", "columns"
DESCRIPTIONS = "descriptions"
FORMAT = 2
ENTRY = np.dtype([("window", "<u4"), ("position", "<u2"), ("value", "<f4")])
PLACE = np.dtype([("window", "<u4"), ("position", "<u2")])
TOKEN = np.dtype([("token", "<u4"), ("count", "<u4")])
NONE = 0xFFFFFFFF
DECILES, PER_DECILE = 10, 10
NEGATIVES = 50  # of each kind
BINS, BINS_PER_OCTAVE = 64, 4
TOKENS = 16

EARLIER_META = "meta.json"
EARLIER_COLUMNS = (
    "density",
    "context_density",
    "max_activation",
    "mean_activation",
    "std_activation",
    "top_token_share",
    "top_token",
)


@dataclass(frozen=True)
class FeatureMeta:
    """What was passed over. `tokens` and `contexts` are the sample sizes of every statistic.

    `radius` is how many activations are kept on each side of a top example. `provenance` says of
    what it was made: model, SAE, dataset and tokenizer by their hashes, which version wrote it.
    `exclusions` says which positions did not count.
    """

    n_features: int
    tokens: int
    contexts: int
    context: int
    split: str
    top_k: int
    radius: int
    hook_point: str
    statistics: dict[str, Any] = field(default_factory=dict)
    format: int = 1
    one_per_context: bool = True
    seed: int = 0
    median_norm: float = 0.0
    exclusions: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """A top example: the tokens around its strongest one.

    `ids` and `activations` have equal length; `peak` is the index of the strongest token;
    `window` and `position` say where it stands in the token store.
    """

    window: int
    position: int
    activation: float
    ids: np.ndarray
    activations: np.ndarray
    peak: int


@dataclass(frozen=True)
class Occurrence:
    """A token on which a feature is active, by its place in the token store."""

    window: int
    position: int
    activation: float


@dataclass(frozen=True)
class Histogram:
    """How often a feature took which activation: `counts[i]` active tokens lie in
    [edges[i], edges[i + 1]); edges are `BINS_PER_OCTAVE` to a doubling. What is weaker than the
    lowest edge (65,536 times weaker than the maximum) is counted in the lowest bin."""

    edges: np.ndarray  # float64 [BINS + 1]
    counts: np.ndarray  # int64 [BINS]


@dataclass(frozen=True)
class TokenCount:
    """A token on which a feature is active: on `count` of its `occurrences` in the text. The true
    count is at least `count` and at most `count + error` (0: exact)."""

    token: int
    count: int
    occurrences: int
    error: int


def write_store(
    folder: Path,
    meta: FeatureMeta,
    columns: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Write a discovery; `run.json` comes last."""
    (folder / COLUMN_FOLDER).mkdir(parents=True, exist_ok=True)
    for name, column in columns.items():
        np.save(folder / COLUMN_FOLDER / f"{name}.npy", column.astype(BY_NAME[name].dtype))
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / META).write_text(json.dumps(asdict(meta), indent=1), encoding="utf-8")


def add_columns(folder: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Add or replace statistics [n_features] of a finished discovery; each is named in
    `columns.TABLE` (KeyError else), and appears whole or not at all."""
    (folder / COLUMN_FOLDER).mkdir(exist_ok=True)
    for name, column in columns.items():
        _save(folder / COLUMN_FOLDER / f"{name}.npy", column.astype(BY_NAME[name].dtype))


def add_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Add or replace arrays of a finished discovery, each whole or not at all."""
    for name, array in arrays.items():
        _save(folder / f"{name}.npy", array)


def add_descriptions(folder: Path, texts: Iterable[str]) -> None:
    """Keep what the rules say of each feature, in order."""
    encoded = [text.encode("utf-8", "replace") for text in texts]
    part = folder / f"{DESCRIPTIONS}.txt.part"
    with part.open("wb") as file:
        file.writelines(encoded)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / f"{DESCRIPTIONS}.txt")
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    add_arrays(folder, {DESCRIPTIONS: ends})  # last: without it there are none


def _save(path: Path, array: np.ndarray) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class FeatureStore:
    """A finished discovery. `columns` holds the statistics there are, by name, [n_features] each;
    features that never fired have density 0, max 0 and top_token -1.

    Raises `CorruptFile` where the folder is not whole, `Incompatible` where a newer version wrote
    it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays: dict[str, np.ndarray] = {}
        self._texts: bytes | None = None
        self.meta = _read_meta(folder)
        if self.meta.format == 1:
            self.columns = {name: self.array(name) for name in EARLIER_COLUMNS}
            self.top = _earlier_top(self)
        else:
            self.columns = {
                path.stem: _open(path)
                for path in sorted((folder / COLUMN_FOLDER).glob("*.npy"))
                if path.stem in BY_NAME
            }
            for column in DISCOVERY:
                if column.name not in self.columns:
                    raise damaged(folder / COLUMN_FOLDER / f"{column.name}.npy")
            self.top = self.array("top")
        self._spans = self.array("top_span")

    def __len__(self) -> int:
        return self.meta.n_features

    @property
    def folder(self) -> Path:
        return self._folder

    # --- all features at once -------------------------------------------------------------------

    def array(self, name: str) -> np.ndarray:
        """Any array of the folder, memory-mapped when it is first asked for. `Incompatible` where
        a discovery of an earlier version has none."""
        if name not in self._arrays:
            path = self._folder / f"{name}.npy"
            if not path.exists() and self.meta.format < FORMAT:
                raise Incompatible(
                    "This discovery was made by an earlier version",
                    f"It has no {name.replace('_', ' ')}.",
                    "Discover the features of this SAE again.",
                )
            self._arrays[name] = _open(path)
        return self._arrays[name]

    @property
    def alive(self) -> np.ndarray:
        """Bool [n_features]: fired at least once."""
        return np.asarray(self.columns["density"]) > 0

    @property
    def deciles(self) -> np.ndarray:
        """`ENTRY` [n_features, 10, per decile]"""
        return self.array("deciles")

    @property
    def inactive(self) -> np.ndarray:
        """uint32 [n_features, windows]"""
        return self.array("inactive")

    @property
    def hard(self) -> np.ndarray:
        """`PLACE` [n_features, places]"""
        return self.array("hard")

    @property
    def histograms(self) -> np.ndarray:
        """uint32 [n_features, 64]"""
        return self.array("histogram")

    @property
    def tokens(self) -> np.ndarray:
        """`TOKEN` [n_features, 16], the commonest first"""
        return self.array("tokens")

    # --- one feature ----------------------------------------------------------------------------

    def n_examples(self, feature: int) -> int:
        return int((self.top["value"][feature] > 0).sum())

    def examples(self, feature: int, tokens: Any, limit: int | None = None) -> list[Example]:
        """Top examples, strongest first. `tokens` is the `TokenSplit` that was passed over."""
        n = self.n_examples(feature)
        n = n if limit is None else min(n, limit)
        if n == 0:
            return []
        context, radius = self.meta.context, self.meta.radius
        entries = np.array(self.top[feature, :n])
        ids = tokens.windows(entries["window"].astype(np.int64), context).numpy()
        found = []
        for i, entry in enumerate(entries):
            position = int(entry["position"])
            first, last = max(0, position - radius), min(context, position + radius + 1)
            span = np.asarray(self._spans[feature, i], dtype=np.float32)
            # Kept as shares of the example's own; the first format kept them as they were.
            span = span * entry["value"] if self.meta.format > 1 else span
            offset = first - (position - radius)
            found.append(
                Example(
                    window=int(entry["window"]),
                    position=position,
                    activation=float(entry["value"]),
                    ids=ids[i, first:last],
                    activations=span[offset : offset + last - first],
                    peak=position - first,
                )
            )
        return found

    def decile_examples(self, feature: int) -> list[list[Occurrence]]:
        """Ten lists, the weakest tenth of its activations first, at most `PER_DECILE` of each."""
        return [
            [
                Occurrence(int(entry["window"]), int(entry["position"]), float(entry["value"]))
                for entry in tenth
                if entry["value"] > 0
            ]
            for tenth in np.array(self.deciles[feature])
        ]

    def decile_edges(self, feature: int) -> np.ndarray:
        """float32 [11]: tenth i holds the activations in [edges[i], edges[i + 1]), the last one
        the maximum too. NaN for a feature that never fired."""
        return np.array(self.array("decile_edges")[feature])

    def inactive_windows(self, feature: int) -> list[int]:
        """Windows in which it is active nowhere, drawn at random."""
        return [int(window) for window in np.array(self.inactive[feature]) if window != NONE]

    def hard_negatives(self, feature: int) -> list[tuple[int, int]]:
        """(window, position): in the window it is active nowhere, although one of its five
        commonest tokens stands at the position."""
        return [
            (int(place["window"]), int(place["position"]))
            for place in np.array(self.hard[feature])
            if place["window"] != NONE
        ]

    def histogram(self, feature: int) -> Histogram:
        top = int(self.array("histogram_top")[feature])
        exponents = np.arange(top - BINS + 1, top + 2) / BINS_PER_OCTAVE
        return Histogram(2.0**exponents, np.array(self.histograms[feature], dtype=np.int64))

    def token_counts(self, feature: int) -> list[TokenCount]:
        """The tokens on which it is active most often, commonest first."""
        error = int(self.array("token_error")[feature])
        occurrences = self.array("token_counts")
        return [
            TokenCount(
                int(entry["token"]), int(entry["count"]), int(occurrences[entry["token"]]), error
            )
            for entry in np.array(self.tokens[feature])
            if entry["token"] != NONE
        ]

    @property
    def described(self) -> bool:
        """Whether the descriptions were kept; discoveries of earlier versions have none."""
        return (self._folder / f"{DESCRIPTIONS}.npy").exists()

    def description(self, feature: int) -> str:
        """What the rules say of it; "" for a feature that never fired."""
        start, end = np.asarray(self.array(DESCRIPTIONS)[feature : feature + 2]).tolist()
        if self._texts is None:
            path = self._folder / f"{DESCRIPTIONS}.txt"
            try:
                self._texts = path.read_bytes()
            except OSError as exc:
                raise damaged(path) from exc
        return self._texts[start:end].decode("utf-8", "replace")

    def promoted(self, feature: int) -> list[tuple[int, float]]:
        """Logit lens: (token id, centred logit) of the tokens it promotes most, strongest first."""
        return self._logits(feature, 0)

    def suppressed(self, feature: int) -> list[tuple[int, float]]:
        """Logit lens: the tokens it suppresses most, strongest first."""
        return self._logits(feature, 1)

    def _logits(self, feature: int, side: int) -> list[tuple[int, float]]:
        ids, values = self.array("logit_ids"), self.array("logit_values")
        pairs = zip(ids[feature, side], values[feature, side], strict=True)
        return [(int(i), float(v)) for i, v in pairs]


def _read_meta(folder: Path) -> FeatureMeta:
    path = folder / META
    if not path.exists() and (folder / EARLIER_META).exists():
        path = folder / EARLIER_META
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format", 1) > FORMAT:
            raise Incompatible(
                "This discovery was made by a newer version",
                f"Its format is {values['format']}; this version knows up to {FORMAT}.",
                "Update miStudio, or discover the features of this SAE again.",
            )
        known = {entry.name for entry in fields(FeatureMeta)}
        return FeatureMeta(**{name: v for name, v in values.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError) as exc:
        raise damaged(path) from exc


def _open(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as exc:
        raise damaged(path) from exc
    return array


def damaged(path: Path) -> CorruptFile:
    return CorruptFile(
        "The features are damaged",
        f"{path} is missing or not what was written.",
        "Discover the features of this SAE again.",
    )


def _earlier_top(store: FeatureStore) -> np.ndarray:
    """The first format had three arrays."""
    values = store.array("top_value")
    top = np.zeros(values.shape, ENTRY)
    top["value"] = values
    top["window"], top["position"] = store.array("top_window"), store.array("top_position")
    return top
