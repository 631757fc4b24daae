"""The text that a discovery looks through, chunk by chunk, with activations at several sites at
once: from a running model, or from activations on disk.

Chunks hold whole windows, are numbered and can be read from any number on, and are the same
whoever reads them: that is what lets an interrupted discovery go on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from mistudio.engine.activations.positions import OUTLIER_MULTIPLE, counted
from mistudio.engine.activations.source import calibrate_medians, capture_windows
from mistudio.engine.activations.store import StoredActivations
from mistudio.engine.datasets.tokens import TokenSplit
from mistudio.engine.features.accumulators import Rows
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import InvalidInput

BATCH_WINDOWS = 8  # of a forward pass
SLICE = 2048  # rows of a chunk of stored activations, or a window more


@dataclass(frozen=True)
class SiteRows:
    """What counts at one site: the tokens, and their activations [n, d]."""

    rows: Rows
    activations: Tensor


Chunk = Mapping[HookPoint, SiteRows]


class Passage(Protocol):
    """`windows` are all that are looked at, ascending; `total` is the number of tokens up to a
    few that may not count; `medians` define outliers."""

    @property
    def tokens(self) -> TokenSplit: ...

    @property
    def context(self) -> int: ...

    @property
    def windows(self) -> np.ndarray: ...

    @property
    def medians(self) -> Mapping[HookPoint, float]: ...

    @property
    def total(self) -> int: ...

    def __len__(self) -> int:
        """How many chunks there are."""
        ...

    def chunks(self, first: int, progress: Progress) -> Iterator[Chunk]:
        """The chunks from number `first` on."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the chunks depend on, the model apart."""
        ...


def choose_windows(
    tokens: TokenSplit, context: int, max_tokens: int, max_documents: int | None = None
) -> np.ndarray:
    """At most `max_tokens` as whole windows, spread evenly over the split or, with
    `max_documents`, over the windows that lie wholly in the dataset's first documents.

    Raises InvalidInput where there is not one window.
    """
    available = tokens.n_windows(context)
    if max_documents is not None:
        available = min(available, tokens.windows_within(max_documents, context))
        if not available:
            raise InvalidInput(
                "Too few documents",
                f"The dataset's first {max_documents:,} documents do not fill one window of "
                f"{context} tokens in the {tokens.name} split.",
                "Allow more documents.",
                field="max_documents",
            )
    if not available:
        tokens.require_windows(context, 1, "Discovery")
    n = max(1, min(available, max_tokens // context))
    return np.unique(np.linspace(0, available - 1, n).astype(np.int64))


class LivePassage:
    """Straight from the model: one forward pass feeds every site. At each site the positions
    count that would count there alone, so that a site's features do not depend on which others
    are looked at."""

    def __init__(
        self,
        model: HookedDecoder,
        tokens: TokenSplit,
        points: tuple[HookPoint, ...],
        windows: np.ndarray,
        context: int,
        batch_windows: int = BATCH_WINDOWS,
        medians: Mapping[HookPoint, float] | None = None,
    ) -> None:
        """`medians` are measured where they are not given."""
        self.tokens, self.context, self.windows = tokens, context, np.unique(windows)
        self.medians = dict(medians or calibrate_medians(model, tokens, points, context))
        self.total = len(self.windows) * context
        self._model, self._points, self._batch_windows = model, points, batch_windows

    def __len__(self) -> int:
        return -(-len(self.windows) // self._batch_windows)

    def chunks(self, first: int, progress: Progress = SILENT) -> Iterator[Chunk]:
        special = self.tokens.meta.special_ids
        for batch in capture_windows(
            self._model,
            self.tokens,
            self._points,
            self.medians,
            self.windows[first * self._batch_windows :],
            self.context,
            self._batch_windows,
            progress,
        ):
            ids = batch.ids.cpu().numpy()
            found = {}
            for point, values in batch.captured.items():
                mask = counted(batch.ids, {point: values}, self.medians, special)
                places = mask.nonzero().cpu().numpy()
                rows = Rows(
                    batch.windows[places[:, 0]].astype(np.int64),
                    places[:, 1],
                    ids[places[:, 0], places[:, 1]],
                )
                found[point] = SiteRows(rows, values[mask])
            yield found

    def identity(self) -> dict[str, Any]:
        return {"from": "model", "batch_windows": self._batch_windows} | _identity(self)


class StoredPassage:
    """From an extraction's training split: what counted at all of its sites at once."""

    def __init__(
        self,
        stored: StoredActivations,
        tokens: TokenSplit,
        points: tuple[HookPoint, ...],
        max_tokens: int,
        max_documents: int | None = None,
    ) -> None:
        """Raises InvalidInput where the limits leave nothing."""
        self.tokens, self.context = tokens, stored.meta.context
        self.medians = {point: stored.medians[point] for point in points}
        self._stored, self._points = stored, points
        below = tokens.n_windows(self.context)
        if max_documents is not None:
            below = min(below, tokens.windows_within(max_documents, self.context))
        self._below = below
        # (start and size of the block in the split, first and last row of the chunk in the block
        # once its rows are in the order of windows)
        self._chunks: list[tuple[int, int, int, int]] = []
        windows, self.total = [], 0
        for start, size in self._blocks():
            if self.total >= max_tokens:
                break
            found = np.sort(stored.rows["train"][start : start + size]["window"].astype(np.int64))
            found = found[: np.searchsorted(found, below)]
            ends = np.append(np.flatnonzero(found[1:] != found[:-1]) + 1, len(found))
            # Whole windows, the last being the one that reaches the limit.
            ends = ends[: np.searchsorted(ends, max_tokens - self.total) + 1]
            first = 0
            while len(found) and first < ends[-1]:
                place = np.searchsorted(ends, first + SLICE, side="right") - 1
                last = int(ends[max(place, np.searchsorted(ends, first, side="right"))])
                self._chunks.append((start, size, first, last))
                first = last
            windows.append(np.unique(found[:first]))
            self.total += first
        self.windows = np.unique(np.concatenate(windows)) if windows else np.empty(0, np.int64)
        if not self._chunks:
            raise InvalidInput(
                "Too few documents",
                "None of the stored activations are of the documents that were asked for.",
                "Allow more documents.",
                field="max_documents",
            )

    def _blocks(self) -> Iterator[tuple[int, int]]:
        start = 0
        for size in self._stored.meta.blocks["train"]:
            yield start, size
            start += size

    def __len__(self) -> int:
        return len(self._chunks)

    def chunks(self, first: int, progress: Progress = SILENT) -> Iterator[Chunk]:
        ordered: tuple[int, np.ndarray, np.ndarray] | None = None
        for start, size, begin, end in self._chunks[first:]:
            progress.check()
            if ordered is None or ordered[0] != start:
                rows = np.array(self._stored.rows["train"][start : start + size])
                ordered = start, rows, np.lexsort((rows["position"], rows["window"]))
            order = ordered[2][begin:end]
            rows = ordered[1][order]
            windows = rows["window"].astype(np.int64)
            positions = rows["position"].astype(np.int64)
            numbers, place = np.unique(windows, return_inverse=True)
            ids = self.tokens.windows(numbers, self.context).numpy()
            found = Rows(windows, positions, ids[place, positions])
            yield {
                point: SiteRows(found, self._stored.read_site("train", point, start + order))
                for point in self._points
            }

    def identity(self) -> dict[str, Any]:
        return {"from": "store", "slice": SLICE, "blocks": len(self._chunks)} | _identity(self)


def _identity(passage: Passage) -> dict[str, Any]:
    meta = passage.tokens.meta
    windows = np.ascontiguousarray(passage.windows, "<i8")
    return {
        "split": passage.tokens.name,
        "context": passage.context,
        "windows": hashlib.sha256(windows.data).hexdigest(),
        "tokenizer": meta.tokenizer_hash,
        "documents": meta.documents_sha256,
        "medians": {point.name: median for point, median in passage.medians.items()},
    }


def exclusions(passage: Passage) -> dict[str, Any]:
    """Which positions never count, as a discovery's description tells it."""
    return {
        "position_0": True,
        "special_ids": [int(token) for token in passage.tokens.meta.special_ids],
        "norm_above_medians": OUTLIER_MULTIPLE,
    }
