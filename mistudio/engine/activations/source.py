"""Where training takes its activations from: a running model, or a store on disk. One interface.

All give shuffled batches of raw activations at several hook points, row i of every site being
the same token, and none ever gives a position that does not count.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mistudio.engine.activations.positions import countable, counted
from mistudio.engine.activations.ring import Devices, Layout, RingStream, Rows
from mistudio.engine.activations.stream import Batch, BatchStream, Dropped, State
from mistudio.engine.datasets.tokens import TokenSplit, TokenStore
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.training.distributed import ALONE, World

CALIBRATION_WINDOWS = 16
CALIBRATION_BATCH = 4  # windows of a forward pass: less memory than any pass that follows


class ActivationSource(Protocol):
    """Activations of one model over one token store.

    `medians` are the median norms at the sites, from a calibration sample; they define outliers.

    A stream of batches may be stopped and gone on with, also in another process:

        with source.batches(2048, seed, progress) as stream:
            for batch in stream:
                ...
                save_file(stream.state(), path)
        with source.batches(2048, seed, progress, state=load_file(path)) as stream:
            ...  # bit for bit the batches that the first stream would have given next

    That holds on one machine with one number of threads; another may round the model's sums
    otherwise.
    """

    points: tuple[HookPoint, ...]
    medians: dict[HookPoint, float]

    @property
    def dropped(self) -> Dropped:
        """What became of the positions that were read for training. A running model counts along
        the stream that went furthest: sampling and calibration read the same text again."""
        ...

    def width(self, point: HookPoint) -> int: ...

    def batches(
        self,
        batch_size: int,
        seed: int,
        progress: Progress,
        state: State | None = None,
        world: World = ALONE,
    ) -> BatchStream:
        """Endless shuffled training batches, float32 [batch_size, d] per site.

        Of several processes each gets its rows of the same batches, in order of rank; all call
        this alike, and `progress` must stop all of them at the same place.

        `state` is what `BatchStream.state` gave. Raises `Incompatible` where it does not belong
        to this source. Another `batch_size` than the interrupted stream's is possible: the same
        rows follow, cut otherwise.
        """
        ...

    def heldout(self, batch_size: int, limit: int, progress: Progress) -> Iterator[Batch]:
        """The held-out split in order, at most `limit` tokens; the last batch may be short."""
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """While inside, the source leaves the model alone: for whoever runs or edits it beside a
        stream that works ahead. `heldout` may be used inside, a stream may not."""
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
    norms: dict[HookPoint, list[Tensor]] = {point: [] for point in points}
    for start in range(0, len(chosen), CALIBRATION_BATCH):
        ids = tokens.windows(chosen[start : start + CALIBRATION_BATCH], context)
        captured = model.capture(ids.to(model.device), points)
        mask = countable(ids, tokens.meta.special_ids).to(model.device)
        for point in points:
            norms[point].append(captured[point][mask].float().norm(dim=-1))
    return {point: float(torch.cat(norms[point]).median()) for point in points}


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
        yield capture_batch(model, tokens, points, medians, windows, context)


def capture_batch(
    model: HookedDecoder,
    tokens: TokenSplit,
    points: tuple[HookPoint, ...],
    medians: Mapping[HookPoint, float],
    windows: np.ndarray,
    context: int,
) -> WindowBatch:
    """One forward pass over `windows`."""
    ids = tokens.batch(windows, context).to(model.device)
    captured = model.capture(ids, points)
    mask = counted(ids, captured, medians, tokens.meta.special_ids)
    return WindowBatch(windows, ids, captured, mask)


def kept_rows(batch: WindowBatch, tokens: TokenSplit) -> tuple[dict[HookPoint, Tensor], Dropped]:
    """The positions that count, row i of every site being the same token, and the tally."""
    places = batch.mask.flatten().nonzero().squeeze(1)
    rows = {
        point: values.flatten(0, 1).index_select(0, places)
        for point, values in batch.captured.items()
    }
    special = int((~countable(batch.ids, tokens.meta.special_ids)).sum())
    outliers = batch.ids.numel() - special - len(places)
    return rows, Dropped(special, outliers, len(places))


def rebatched(chunks: Iterable[Rows], batch_size: int, limit: int) -> Iterator[Rows]:
    """The rows of `chunks` in order, cut into batches; at most `limit` rows, the last may be
    short."""
    pending: list[Rows] = []
    have = given = 0
    for rows in chunks:
        pending.append(rows)
        have += len(next(iter(rows.values())))
        while have >= batch_size or (have and given + have >= limit):
            joined = {point: torch.cat([part[point] for part in pending]) for point in pending[0]}
            n = min(batch_size, limit - given, have)
            yield {point: values[:n] for point, values in joined.items()}
            pending = [{point: values[n:] for point, values in joined.items()}]
            have, given = have - n, given + n
            if given >= limit:
                return
    if have:
        yield {point: torch.cat([part[point] for part in pending]) for point in pending[0]}


class _Turns:
    """Who may run a model now: a thread that works ahead, or whoever judges by it meanwhile."""

    def __init__(self) -> None:
        self._wanted, self._held = threading.RLock(), threading.RLock()

    @contextmanager
    def first(self) -> Iterator[None]:
        with self._wanted, self._held:
            yield

    @contextmanager
    def after_others(self) -> Iterator[None]:
        """Lets everyone who waits in `first` go before."""
        with self._wanted:
            pass
        with self._held:
            yield


# One model may serve several sources; a forward pass in one thread must not meet another's hooks.
_all_turns: weakref.WeakKeyDictionary[HookedDecoder, _Turns] = weakref.WeakKeyDictionary()
_all_turns_lock = threading.Lock()


def _turns(model: HookedDecoder) -> _Turns:
    with _all_turns_lock:
        return _all_turns.setdefault(model, _Turns())


class LiveActivations:
    """Activations streamed from the model, shuffled in fills of `buffer_tokens` positions."""

    def __init__(
        self,
        model: HookedDecoder,
        store: TokenStore,
        points: tuple[HookPoint, ...],
        context: int,
        batch_windows: int = 8,
        buffer_tokens: int = 32768,
        device: torch.device | str | None = None,
        overlap: bool | None = None,
    ) -> None:
        """`device` is where batches go, the model's own by default.

        With `overlap` the model runs in a thread beside the training step and a second buffer is
        held: by default on CUDA only. On two CPU cores both already use all of them: 4 blocks of
        width 576 beside 2304 latents gave 1.00 times the tokens per second (median of 6
        alternations) for 13 % more processor time; only with work too small for two cores (2
        blocks, 1152 latents, 512 tokens a pass) it gave 1.20 times.
        """
        store.train.require_windows(context, 8, "Training")
        store.heldout.require_windows(context, 2, "Judging the result")
        self.points = points
        self._model, self._store = model, store
        self._context, self._batch_windows = context, batch_windows
        self._buffer_tokens = buffer_tokens
        on_cuda = model.device.type == "cuda"
        self._devices = Devices(
            model=model.device,
            training=model.device if device is None else torch.device(device),
            overlap=on_cuda if overlap is None else overlap,
        )
        self._turns = _turns(model)
        self._furthest = Dropped()
        self.medians = calibrate_medians(model, store.train, points, context)

    @property
    def dropped(self) -> Dropped:
        return self._furthest

    def width(self, point: HookPoint) -> int:
        return self._model.width(point)

    def batches(
        self,
        batch_size: int,
        seed: int,
        progress: Progress = SILENT,
        state: State | None = None,
        world: World = ALONE,
    ) -> BatchStream:
        return RingStream(
            self._train_rows,
            progress.check,
            self._layout(batch_size),
            self.points,
            seed,
            batch_size,
            self._devices,
            self._note,
            state,
            world,
        )

    def heldout(self, batch_size: int, limit: int, progress: Progress = SILENT) -> Iterator[Batch]:
        order = np.arange(self._store.heldout.n_windows(self._context))
        chunks = (
            self._rows(self._store.heldout, order[start : start + self._batch_windows])[0]
            for start in range(0, len(order), self._batch_windows)
        )
        for rows in rebatched(chunks, batch_size, limit):
            progress.check()
            yield {
                point: values.to(self._devices.training).float() for point, values in rows.items()
            }

    def exclusive(self) -> AbstractContextManager[None]:
        return self._turns.first()

    def _layout(self, batch_size: int) -> Layout:
        """Fills of `buffer_tokens` positions, but of two batches at least."""
        wanted = max(self._buffer_tokens, 2 * batch_size) // self._context
        return Layout(
            n_windows=self._store.train.n_windows(self._context),
            context=self._context,
            batch_windows=self._batch_windows,
            fill_windows=max(wanted, self._batch_windows),
        )

    def _train_rows(self, windows: np.ndarray) -> tuple[Rows, Dropped]:
        return self._rows(self._store.train, windows)

    def _rows(self, tokens: TokenSplit, windows: np.ndarray) -> tuple[Rows, Dropped]:
        """Rows [n, d] per site in the model's precision, and what was left out of them."""
        with self._turns.after_others():
            batch = capture_batch(
                self._model, tokens, self.points, self.medians, windows, self._context
            )
        return kept_rows(batch, tokens)

    def _note(self, counts: Dropped) -> None:
        self._furthest = max(self._furthest, counts, key=lambda dropped: dropped.seen)
