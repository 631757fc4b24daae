"""Activations of all features on a sample of windows, kept beside a discovery by feature: what
pictures of chosen features are made of without a model.

    sample/windows.npy     i32 [w], windows of the token store, in order
    sample/first.npy       i64 [w + 1]: the tokens first[i] to first[i + 1] are those of window i
    sample/positions.npy   u16 [tokens], where in its window each token stands; only those count
    sample/starts.npy      i64 [F + 1]: the entries of feature f are starts[f] to starts[f + 1]
    sample/rows.npy        i32 [entries], the token of each, ascending within a feature
    sample/values.npy      f32 [entries], its activation
    sample/sample.json     what it is of; written last
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csc_array, csr_array, vstack

from mistudio.engine.activations.source import capture_windows
from mistudio.engine.datasets.tokens import TokenSplit
from mistudio.engine.features.coactivation import PairMatrix, as_csr, pair_matrix
from mistudio.engine.features.store import add_arrays
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.site import Site

FOLDER, META = "sample", "sample.json"
ENTRY_BYTES = 8
ARRAYS = ("windows", "first", "positions", "starts", "rows", "values")
BATCH = 8  # windows of a forward pass


@dataclass(frozen=True)
class CodeSample:
    """See the module; the arrays may be memory-mapped. `context` is a window's length."""

    context: int
    windows: np.ndarray
    first: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    rows: np.ndarray
    values: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return len(self.positions)

    @property
    def n_features(self) -> int:
        return len(self.starts) - 1

    def of(self, features: Sequence[int] | np.ndarray) -> csr_array:
        """Activations float32 [tokens, len(features)]; reads these features' entries alone."""
        chosen = np.asarray(features, np.int64)
        if not self.n_features:
            return csr_array((0, len(chosen)), dtype=np.float32)
        begins, ends = np.asarray(self.starts[chosen]), np.asarray(self.starts[chosen + 1])
        spans = list(zip(begins.tolist(), ends.tolist(), strict=True))
        empty_rows, empty_values = np.empty(0, np.int32), np.empty(0, np.float32)
        table = csc_array(
            (
                np.concatenate([empty_values, *(self.values[a:b] for a, b in spans)]),
                np.concatenate([empty_rows, *(self.rows[a:b] for a, b in spans)]),
                np.concatenate([[0], np.cumsum(ends - begins)]),
            ),
            shape=(self.tokens, len(chosen)),
        )
        return csr_array(table)

    def pairs(
        self, metric: str, features: Sequence[int], directions: np.ndarray | None = None
    ) -> PairMatrix:
        """`pair_matrix` of these features on the sample; for "cosine" their decoder `directions`
        [len(features), d]. Raises InvalidInput as that does."""
        import torch

        chosen = list(dict.fromkeys(int(feature) for feature in features))
        rows = None if directions is None else torch.from_numpy(directions)
        found = pair_matrix(metric, range(len(chosen)), self.of(chosen), rows)
        return PairMatrix(
            metric, tuple(chosen), found.values, found.together, found.order, found.tokens
        )

    def strongest(self, features: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(float32 [len(features), w], int32 of the same shape): each feature's strongest
        activation in each window, 0 where it has none, and where it stands, -1 there."""
        shape = (len(features), len(self.windows))
        peaks, places = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
        for i, feature in enumerate(np.asarray(features, np.int64).tolist()):
            begin, end = int(self.starts[feature]), int(self.starts[feature + 1])
            if begin == end:
                continue
            rows, values = np.asarray(self.rows[begin:end]), np.asarray(self.values[begin:end])
            window = np.searchsorted(self.first, rows, side="right") - 1
            order = np.lexsort((-rows, values, window))  # the last of a window: strongest, earliest
            rows, values, window = rows[order], values[order], window[order]
            last = np.flatnonzero(np.append(window[1:] != window[:-1], True))
            peaks[i, window[last]] = values[last]
            places[i, window[last]] = self.positions[rows[last]]
        return peaks, places


_NOTHING = np.empty(0, np.int64)
EMPTY = CodeSample(0, _NOTHING, np.zeros(1, np.int64), _NOTHING, np.zeros(1, np.int64), _NOTHING,
                   np.empty(0, np.float32))  # fmt: skip
"""Of no tokens and no features: directions can be compared all the same."""


def take_sample(
    model: HookedDecoder,
    tokens: TokenSplit,
    dictionary: Dictionary,
    site: Site,
    medians: Mapping[HookPoint, float],
    context: int,
    *,
    max_tokens: int = 200_000,
    progress: Progress = SILENT,
) -> CodeSample:
    """Activations on windows spread evenly over `tokens`; at most `max_tokens` positions."""
    tokens.require_windows(context, 1, "Sampling activations")
    available = tokens.n_windows(context)
    wanted = max(1, min(available, max_tokens // context))
    order = np.unique(np.linspace(0, available - 1, wanted).astype(np.int64))
    parts, counts, positions = [], [], []
    for batch in capture_windows(
        model, tokens, tuple(site.points), medians, order, context, BATCH, progress
    ):
        rows = batch.captured[site.input][batch.mask].float().to(dictionary.device)
        parts.append(as_csr(dictionary.encode(rows)))
        mask = batch.mask.cpu().numpy()
        counts.append(mask.sum(axis=1))
        positions.append(np.nonzero(mask)[1])
        progress.report(
            sum(len(part) for part in counts), len(order), phase="sample"
        )  # windows, not tokens
    by_feature = csc_array(vstack(parts, format="csc"))
    by_feature.sort_indices()
    by_feature.eliminate_zeros()
    return CodeSample(
        context,
        order.astype(np.int32),
        np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64),
        np.concatenate(positions).astype(np.uint16),
        by_feature.indptr.astype(np.int64),
        by_feature.indices.astype(np.int32),
        by_feature.data.astype(np.float32),
    )


def save_sample(folder: Path, sample: CodeSample) -> None:
    """Keep it in a discovery's folder, in place of an older one."""
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    (place / META).unlink(missing_ok=True)
    values = {key: value for key, value in vars(sample).items() if key in ARRAYS}
    add_arrays(place, values)
    part = place / f"{META}.part"
    with part.open("w", encoding="utf-8") as file:
        json.dump(asdict(_Meta(sample.context, len(sample.windows), sample.tokens)), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, place / META)


def load_sample(folder: Path) -> CodeSample | None:
    """The sample of a discovery; None where there is none, or none that is whole."""
    place = folder / FOLDER
    try:
        meta = _Meta(**json.loads((place / META).read_text(encoding="utf-8")))
        arrays = {
            name: np.load(place / f"{name}.npy", mmap_mode=None if name == "first" else "r")
            for name in ARRAYS
        }
    except (OSError, ValueError, TypeError):
        return None
    sample = CodeSample(meta.context, **arrays)
    whole = (
        len(sample.windows) == meta.windows
        and len(sample.first) == meta.windows + 1
        and len(sample.positions) == meta.tokens
        and int(sample.starts[-1]) == len(sample.rows) == len(sample.values)
    )
    return sample if whole else None


@dataclass(frozen=True)
class _Meta:
    context: int
    windows: int
    tokens: int
