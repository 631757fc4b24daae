"""Where training takes its activations from: a running model, or a store on disk. One interface.

Both give shuffled batches of raw activations at several hook points, row i of every site being
the same token, and neither ever gives a position that does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mistudio.engine.activations.positions import countable, counted, median_norm
from mistudio.engine.datasets.tokens import TokenSplit, TokenStore
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress

Batch = Mapping[HookPoint, Tensor]
CALIBRATION_WINDOWS = 16


class ActivationSource(Protocol):
    """Activations of one model over one token store.

    `medians` are the median norms at the sites, from a calibration sample; they define outliers.
    """

    points: tuple[HookPoint, ...]
    medians: dict[HookPoint, float]
    dropped_outliers: int

    def width(self, point: HookPoint) -> int: ...

    def batches(self, batch_size: int, seed: int, progress: Progress) -> Iterator[Batch]:
        """Endless shuffled training batches, float32 [batch_size, d] per site."""
        ...

    def heldout(self, batch_size: int, limit: int, progress: Progress) -> Iterator[Batch]:
        """The held-out split in order, at most `limit` tokens; the last batch may be short."""
        ...


@dataclass(frozen=True)
class WindowBatch:
    """A forward pass's worth of tokens and what was captured on them."""

    windows: np.ndarray  # [batch] window numbers in the split
    ids: Tensor  # [batch, seq]
    captured: dict[HookPoint, Tensor]  # [batch, seq, d]
    mask: Tensor  # [batch, seq] bool: the positions that count


@dataclass(frozen=True)
class TokenRows:
    """Activations with the places they come from, sorted by window; windows are whole."""

    windows: np.ndarray  # [n] int64
    positions: np.ndarray  # [n] int64
    activations: Tensor  # [n, d] float32


def token_rows(
    model: HookedDecoder,
    tokens: TokenSplit,
    point: HookPoint,
    median: float,
    order: np.ndarray,
    context: int,
    batch_windows: int = 8,
    progress: Progress = SILENT,
) -> Iterator[TokenRows]:
    """Activations of the windows in `order`, straight from the model."""
    for batch in capture_windows(
        model, tokens, (point,), {point: median}, order, context, batch_windows, progress
    ):
        places = batch.mask.nonzero().cpu().numpy()
        yield TokenRows(
            batch.windows[places[:, 0]].astype(np.int64),
            places[:, 1],
            batch.captured[point][batch.mask].float(),
        )


def calibrate_medians(
    model: HookedDecoder, tokens: TokenSplit, points: tuple[HookPoint, ...], context: int
) -> dict[HookPoint, float]:
    """Median norm per site on windows spread over the split."""
    total = tokens.n_windows(context)
    chosen = np.unique(np.linspace(0, total - 1, min(CALIBRATION_WINDOWS, total)).astype(np.int64))
    ids = tokens.windows(chosen, context)
    captured = model.capture(ids.to(model.device), points)
    mask = countable(ids, tokens.meta.special_ids).to(model.device)
    return {point: median_norm(captured[point], mask) for point in points}


def capture_windows(
    model: HookedDecoder,
    tokens: TokenSplit,
    points: tuple[HookPoint, ...],
    medians: Mapping[HookPoint, float],
    order: np.ndarray,
    context: int,
    batch_windows: int,
    progress: Progress,
) -> Iterator[WindowBatch]:
    """Run the model over the windows in `order`; one forward pass feeds every site."""
    for start in range(0, len(order), batch_windows):
        progress.check()
        windows = order[start : start + batch_windows]
        ids = tokens.windows(windows, context).to(model.device)
        captured = model.capture(ids, points)
        mask = counted(ids, captured, medians, tokens.meta.special_ids)
        yield WindowBatch(windows, ids, captured, mask)


class LiveActivations:
    """Activations streamed from the model, mixed in a buffer of `buffer_tokens` rows."""

    def __init__(
        self,
        model: HookedDecoder,
        store: TokenStore,
        points: tuple[HookPoint, ...],
        context: int,
        batch_windows: int = 8,
        buffer_tokens: int = 32768,
    ) -> None:
        store.train.require_windows(context, 8, "Training")
        store.heldout.require_windows(context, 2, "Judging the result")
        self.points = points
        self.dropped_outliers = 0
        self._model, self._store = model, store
        self._context, self._batch_windows = context, batch_windows
        self._buffer_tokens = buffer_tokens
        self.medians = calibrate_medians(model, store.train, points, context)

    def width(self, point: HookPoint) -> int:
        return self._model.width(point)

    def batches(self, batch_size: int, seed: int, progress: Progress = SILENT) -> Iterator[Batch]:
        generator = np.random.default_rng(seed)
        size = max(self._buffer_tokens, 2 * batch_size)
        mixer = _Mixer(size, batch_size, {point: self.width(point) for point in self.points})
        while True:
            order = generator.permutation(self._store.train.n_windows(self._context))
            for rows in self._rows(self._store.train, order, progress):
                yield from mixer.add(rows, generator)

    def heldout(self, batch_size: int, limit: int, progress: Progress = SILENT) -> Iterator[Batch]:
        order = np.arange(self._store.heldout.n_windows(self._context))
        given = 0
        for rows in self._rows(self._store.heldout, order, progress):
            n = min(len(rows[self.points[0]]), limit - given)
            for start in range(0, n, batch_size):
                yield {point: rows[point][start : min(start + batch_size, n)] for point in rows}
            given += n
            if given >= limit:
                return

    def _rows(
        self, tokens: TokenSplit, order: np.ndarray, progress: Progress
    ) -> Iterator[dict[HookPoint, Tensor]]:
        special = tokens.meta.special_ids
        for batch in capture_windows(
            self._model,
            tokens,
            self.points,
            self.medians,
            order,
            self._context,
            self._batch_windows,
            progress,
        ):
            self.dropped_outliers += int((countable(batch.ids, special) & ~batch.mask).sum())
            yield {point: batch.captured[point][batch.mask].float() for point in self.points}


class _Mixer:
    """A shuffling buffer: filled in order, given away at random once it is full.

    Each time the buffer is full it is permuted and half of it leaves as batches, so that a batch
    holds rows from many windows (neighbouring tokens are strongly correlated).
    """

    def __init__(self, size: int, batch_size: int, widths: Mapping[HookPoint, int]) -> None:
        self._batch_size = batch_size
        self._size = size
        self._rows: dict[HookPoint, Tensor] = {}
        self._widths = widths
        self._filled = 0

    def add(self, rows: Batch, generator: np.random.Generator) -> Iterator[dict[HookPoint, Tensor]]:
        n = len(next(iter(rows.values())))
        offset = 0
        while offset < n:
            if not self._rows:
                self._rows = {
                    point: torch.empty(self._size, width, device=rows[point].device)
                    for point, width in self._widths.items()
                }
            take = min(n - offset, self._size - self._filled)
            for point, buffer in self._rows.items():
                buffer[self._filled : self._filled + take] = rows[point][offset : offset + take]
            self._filled += take
            offset += take
            if self._filled == self._size:
                yield from self._give(generator)

    def _give(self, generator: np.random.Generator) -> Iterator[dict[HookPoint, Tensor]]:
        order = torch.from_numpy(generator.permutation(self._size))
        given = (self._size // 2 // self._batch_size) * self._batch_size
        for start in range(0, given, self._batch_size):
            chosen = order[start : start + self._batch_size]
            yield {point: buffer[chosen] for point, buffer in self._rows.items()}
        kept = order[given:]
        for buffer in self._rows.values():
            buffer[: len(kept)] = buffer[kept]
        self._filled = len(kept)
