"""Shuffled batches from a running model: fill a buffer, shuffle it, give all of it away.

A fill is the rows of some windows, taken in random order from the whole split, with the few rows
that the fill before could not make into a batch. Fills are a fixed division of the epoch, so a
place in the stream is (epoch, fill, rows given of the fill) and the rows carried into it.

What resuming costs: the model runs again over the windows of the fill it stopped in, half a
buffer on average (16,000 tokens by default; a second or less on a GPU, half a minute for a small
model on two CPU cores). In return a checkpoint holds less than one batch of rows and not the
buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mistudio.engine.activations.stream import (
    ROW_ORDER,
    WINDOW_ORDER,
    Batch,
    BatchStream,
    Courier,
    Dropped,
    State,
    generator,
    number,
    pack,
    require,
)
from mistudio.engine.models.hooks import HookPoint
from mistudio.errors import Incompatible

Rows = Mapping[HookPoint, Tensor]
Capture = Callable[[np.ndarray], tuple[Rows, Dropped]]
CARRIED = "carried."


@dataclass(frozen=True)
class Layout:
    """How an epoch is divided. `fill_windows` is the most that one fill takes."""

    n_windows: int
    context: int
    batch_windows: int
    fill_windows: int

    @property
    def fills(self) -> int:
        return -(-self.n_windows // self.fill_windows)

    def bounds(self, fill: int) -> tuple[int, int]:
        """Fills differ by one window at most: a small last one would mix few windows."""
        return fill * self.n_windows // self.fills, (fill + 1) * self.n_windows // self.fills

    @property
    def rows(self) -> int:
        """The most rows that the windows of one fill can give."""
        return -(-self.n_windows // self.fills) * self.context


@dataclass(frozen=True)
class Cursor:
    """Where a fill begins: what is carried into it, and what was counted before it."""

    epoch: int
    fill: int
    carried: dict[HookPoint, Tensor]  # [n, d] each, n < batch size
    counts: Dropped


@dataclass(frozen=True)
class Fill:
    """A full buffer. Rows `order[first:end]` are given as batches, the rest is carried on."""

    begin: Cursor
    after: Cursor
    rows: dict[HookPoint, Tensor]
    order: Tensor  # [n] int64
    first: int
    end: int


class Filler:
    """Runs the model over the windows of one fill after another, into memory it owns."""

    def __init__(
        self,
        capture: Capture,
        check: Callable[[], None],
        layout: Layout,
        seed: int,
        batch_size: int,
        spare: int,
    ) -> None:
        self._capture, self._check = capture, check
        self._layout, self._seed, self._batch_size = layout, seed, batch_size
        self._capacity = layout.rows + max(batch_size, spare)
        self._buffers: dict[int, dict[HookPoint, Tensor]] = {}
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def fill(self, begin: Cursor, slot: int, first: int) -> Fill:
        """The fill at `begin` in buffer `slot`, of which `first` rows were given before."""
        layout = self._layout
        start, stop = layout.bounds(begin.fill)
        windows = self._window_order(begin.epoch)[start:stop]
        filled = 0
        counts = Dropped()
        for offset in range(0, len(windows), layout.batch_windows):
            self._check()
            rows, here = self._capture(windows[offset : offset + layout.batch_windows])
            buffer = self._buffer(slot, rows)
            if offset == 0:
                filled = _append(buffer, 0, begin.carried)
            filled = _append(buffer, filled, rows)
            counts += here
        buffer = self._buffers[slot]
        shuffle = generator(self._seed, ROW_ORDER, begin.epoch, begin.fill)
        order = torch.from_numpy(shuffle.permutation(filled))
        if first > filled:
            raise Incompatible(
                "This run cannot go on with these activations",
                f"It had taken {first:,} rows where the text now gives {filled:,}.",
                "The text or the model has changed: start a new run.",
            )
        end = first + (filled - first) // self._batch_size * self._batch_size
        left = order[end:]
        carried = {point: rows.index_select(0, left) for point, rows in buffer.items()}
        last = begin.fill + 1 == layout.fills
        after = Cursor(
            begin.epoch + 1 if last else begin.epoch,
            0 if last else begin.fill + 1,
            carried,
            begin.counts + counts,
        )
        return Fill(begin, after, buffer, order, first, end)

    def _window_order(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            order = np.arange(self._layout.n_windows, dtype=np.int64)
            generator(self._seed, WINDOW_ORDER, epoch).shuffle(order)
            self._order = epoch, order
        return self._order[1]

    def _buffer(self, slot: int, like: Rows) -> dict[HookPoint, Tensor]:
        if slot not in self._buffers:
            # In the model's own precision: half the memory of float32 for most models.
            self._buffers[slot] = {
                point: torch.empty(self._capacity, rows.shape[1], dtype=rows.dtype)
                for point, rows in like.items()
            }
        return self._buffers[slot]


def _append(buffer: Rows, filled: int, rows: Rows) -> int:
    count = 0
    for point, values in rows.items():
        count = len(values)
        buffer[point][filled : filled + count] = values
    return filled + count


class RingStream(BatchStream):
    """The batches of a `Filler`."""

    def __init__(
        self,
        capture: Capture,
        check: Callable[[], None],
        layout: Layout,
        points: tuple[HookPoint, ...],
        seed: int,
        batch_size: int,
        device: torch.device,
        note: Callable[[Dropped], None],
        state: State | None,
    ) -> None:
        """`note` hears the counts up to the end of each fill whose rows begin to be given."""
        self._seed, self._batch_size, self._note = seed, batch_size, note
        cursor, self._given = Cursor(0, 0, {}, Dropped()), 0
        if state is not None:
            layout, cursor, self._given = _resume(state, layout, points, seed)
        self._layout, self._cursor = layout, cursor
        spare = max((len(rows) for rows in cursor.carried.values()), default=0)
        self._filler: Filler | None = Filler(capture, check, layout, seed, batch_size, spare)
        self._fill: Fill | None = None
        self._courier = Courier(device)

    def __next__(self) -> Batch:
        if self._filler is None:
            raise StopIteration
        while self._fill is None or self._given == self._fill.end:
            self._advance(self._filler)
        fill = self._fill
        chosen = fill.order[self._given : self._given + self._batch_size]
        batch = {
            point: self._courier.send(point, rows, chosen) for point, rows in fill.rows.items()
        }
        self._given += self._batch_size
        return batch

    def _advance(self, filler: Filler) -> None:
        if self._fill is not None:
            self._cursor, self._given = self._fill.after, 0
            self._fill = None
        self._fill = filler.fill(self._cursor, 0, self._given)
        self._note(self._fill.after.counts)

    def state(self) -> State:
        cursor, given = self._cursor, self._given
        if self._fill is not None and given == self._fill.end:
            cursor, given = self._fill.after, 0  # the next fill: nothing need be run again
        numbers = pack(
            seed=self._seed,
            windows=self._layout.n_windows,
            context=self._layout.context,
            fill_windows=self._layout.fill_windows,
            epoch=cursor.epoch,
            fill=cursor.fill,
            given=given,
            special=cursor.counts.special,
            outliers=cursor.counts.outliers,
            kept=cursor.counts.kept,
        )
        return numbers | {CARRIED + point.name: rows for point, rows in cursor.carried.items()}

    def close(self) -> None:
        if self._fill is not None and self._given == self._fill.end:
            self._cursor, self._given = self._fill.after, 0
        self._fill = None
        self._filler = None


def _resume(
    state: State, layout: Layout, points: tuple[HookPoint, ...], seed: int
) -> tuple[Layout, Cursor, int]:
    """The layout, cursor and rows given that `state` describes."""
    require(state, "seed", seed, "the seed")
    require(state, "windows", layout.n_windows, "the number of windows")
    require(state, "context", layout.context, "the context length")
    carried = {
        point: state[CARRIED + point.name] for point in points if CARRIED + point.name in state
    }
    names = {name for name in state if name.startswith(CARRIED)}
    if names and names != {CARRIED + point.name for point in points}:
        raise Incompatible(
            "This run cannot go on with these activations",
            "It was interrupted with other hook points.",
            "Resume it with the layers it was started with, or start a new run.",
        )
    counts = Dropped(number(state, "special"), number(state, "outliers"), number(state, "kept"))
    cursor = Cursor(number(state, "epoch"), number(state, "fill"), carried, counts)
    # The division of the epoch is the interrupted stream's, whatever the buffer's size is now.
    return (
        replace(layout, fill_windows=number(state, "fill_windows")),
        cursor,
        number(state, "given"),
    )
