"""Shuffled batches from a running model: fill a buffer, shuffle it, give all of it away.

A fill is the rows of some windows, taken in random order from the whole split, with the few rows
that the fill before could not make into a batch. Fills are a fixed division of the epoch, so a
place in the stream is (epoch, fill, rows given of the fill) and the rows carried into it.

What resuming costs: the model runs again over all windows of the fill it stopped in (32,768
tokens by default), also over those whose rows were given before. In return a checkpoint holds less
than one batch of rows and not the buffer: of width 768 in float16 at most 3 MB a site for batches
of 2,048, where the buffer has 50 MB.

With overlap, a thread fills one of two buffers while the other is given away. Batches are the same
with and without it.

Several processes share the windows of a fill: each runs the model over its own and they exchange
the rows, so that all hold the buffer that one process would fill. They do so in turn with the
training step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

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
from mistudio.engine.training.distributed import ALONE, World, gathered_unevenly, own_rows
from mistudio.errors import Incompatible, InvalidInput

Rows = Mapping[HookPoint, Tensor]
Capture = Callable[[np.ndarray], tuple[Rows, Dropped]]
CARRIED = "carried."
RING = 2
# A producer that waits for a free buffer looks this often whether the program has ended.
IDLE_SECONDS = 0.5


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
class Devices:
    """Where the model runs, where batches go, and whether both work at once."""

    model: torch.device
    training: torch.device
    overlap: bool

    @property
    def pinned(self) -> bool:
        """Page-locked memory, which a CUDA device copies to and from by itself."""
        return self.training.type == "cuda"


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
    slot: int


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
        devices: Devices,
        world: World,
    ) -> None:
        """`spare` is how many rows may be carried in where that is more than a batch."""
        self._capture, self._check, self._devices = capture, check, devices
        self._world = world
        self._layout, self._seed, self._batch_size = layout, seed, batch_size
        self._capacity = layout.rows + max(batch_size, spare)
        self._buffers: dict[int, dict[HookPoint, Tensor]] = {}
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def fill(
        self, begin: Cursor, slot: int, first: int, stopped: Callable[[], bool] = lambda: False
    ) -> Fill:
        """The fill at `begin` in buffer `slot`, of which `first` rows were given before.

        Raises `Stopped` soon after `stopped` turns true.
        """
        buffer, filled, counts = self._load(begin, slot, stopped)
        if first > filled:
            raise Incompatible(
                "This run cannot go on with these activations",
                f"It had taken {first:,} rows where the text now gives {filled:,}.",
                "The text or the model has changed: start a new run.",
            )
        shuffle = generator(self._seed, ROW_ORDER, begin.epoch, begin.fill)
        order = torch.from_numpy(shuffle.permutation(filled))
        end = first + (filled - first) // self._batch_size * self._batch_size
        left = order[end:]
        last = begin.fill + 1 == self._layout.fills
        after = Cursor(
            epoch=begin.epoch + 1 if last else begin.epoch,
            fill=0 if last else begin.fill + 1,
            carried={point: rows.index_select(0, left) for point, rows in buffer.items()},
            counts=begin.counts + counts,
        )
        if after.epoch and not after.counts.kept:
            raise InvalidInput(
                "Nothing to learn from",
                "The text holds only special tokens and outliers.",
                "Choose another dataset.",
            )
        return Fill(begin, after, buffer, order, first, end, slot)

    def _load(
        self, begin: Cursor, slot: int, stopped: Callable[[], bool]
    ) -> tuple[dict[HookPoint, Tensor], int, Dropped]:
        """Run the model over the fill's windows. The buffer, its rows, what was left out."""
        start, stop = self._layout.bounds(begin.fill)
        windows = self._window_order(begin.epoch)[start:stop]
        step = self._layout.batch_windows
        passes = [windows[first : first + step] for first in range(0, len(windows), step)]
        filled = 0
        counts = Dropped()
        for first in range(0, len(passes), self._world.size):
            self._check()  # waits here while the job is paused
            if stopped():
                raise Stopped
            for rows, here in self._captured(passes[first : first + self._world.size]):
                buffer = self._buffer(slot, rows)
                if not counts.seen:
                    filled = _append(buffer, 0, begin.carried)
                filled = _append(buffer, filled, rows)
                counts += here
        if self._devices.model.type == "cuda":  # until the copies from the device have arrived
            torch.cuda.current_stream(self._devices.model).synchronize()
        return self._buffers[slot], filled, counts

    def _captured(self, passes: list[np.ndarray]) -> list[tuple[Rows, Dropped]]:
        """What one forward pass of each process gives; `passes` may be fewer than processes."""
        world = self._world
        idle = world.rank >= len(passes)
        rows, here = self._capture(passes[0 if idle else world.rank])
        if world.size == 1:
            return [(rows, here)]
        if idle:  # it knows what rows look like, and gives none
            rows, here = {point: values[:0] for point, values in rows.items()}, Dropped()
        device = next(iter(rows.values())).device
        mine = torch.tensor([[here.special, here.outliers, here.kept]], device=device)
        tallies = [Dropped(*tally) for tally in world.gathered(mine).tolist()]
        kept = [tally.kept for tally in tallies]
        every = {point: gathered_unevenly(world, rows[point], kept) for point in rows}
        return [
            ({point: parts[rank] for point, parts in every.items()}, tallies[rank])
            for rank in range(len(passes))
        ]

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
                point: torch.empty(
                    self._capacity, rows.shape[1], dtype=rows.dtype, pin_memory=self._devices.pinned
                )
                for point, rows in like.items()
            }
        return self._buffers[slot]


def _append(buffer: Rows, filled: int, rows: Rows) -> int:
    count = 0
    for point, values in rows.items():
        count = len(values)
        # Does not block where the rows come from a CUDA device into pinned memory.
        buffer[point][filled : filled + count].copy_(values, non_blocking=True)
    return filled + count


class Stopped(Exception):
    """The stream was closed while its next fill was being made."""


class Producer:
    """A thread that makes fill after fill, one buffer ahead of whoever takes them.

    It knows nothing of the stream that owns it, so that a stream that is dropped is collected and
    takes the thread with it. An error ends the thread and is raised by `take`, after the fills
    that were made before it.
    """

    def __init__(self, filler: Filler, begin: Cursor, first: int, device: torch.device) -> None:
        """`device` is the model's; on CUDA it works in a stream of its own."""
        self._ready: SimpleQueue[Fill | BaseException] = SimpleQueue()
        self._free: SimpleQueue[int] = SimpleQueue()
        self._stop = threading.Event()
        for slot in range(RING):
            self._free.put(slot)
        self._thread = threading.Thread(
            target=_produce,
            args=(filler, begin, first, device, self._free, self._ready, self._stop),
            name="activations",
        )
        self._thread.start()

    def take(self) -> Fill:
        """The next fill; waits for it."""
        made = self._ready.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def release(self, fill: Fill) -> None:
        """The fill's memory may be used again."""
        self._free.put(fill.slot)

    def stop(self, wait: bool) -> None:
        """End the thread: within one forward pass, or when the job is no longer paused."""
        self._stop.set()
        self._free.put(-1)
        if wait and self._thread is not threading.current_thread():
            self._thread.join()


def _produce(
    filler: Filler,
    begin: Cursor,
    first: int,
    device: torch.device,
    free: SimpleQueue[int],
    ready: SimpleQueue[Fill | BaseException],
    stop: threading.Event,
) -> None:
    try:
        with _own_stream(device):
            while (slot := _next_slot(free)) is not None and not stop.is_set():
                fill = filler.fill(begin, slot, first, stop.is_set)
                ready.put(fill)
                begin, first = fill.after, 0
    except Stopped:
        pass
    except BaseException as exc:
        ready.put(exc)


def _next_slot(free: SimpleQueue[int]) -> int | None:
    """Waits for a buffer; None where the program ends without having closed its stream."""
    while True:
        try:
            return free.get(timeout=IDLE_SECONDS)
        except Empty:
            if not threading.main_thread().is_alive():
                return None


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    """The model's kernels run beside the training step's and not in one queue with them."""
    if device.type != "cuda":
        return nullcontext()
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # what loaded the model is done first
    return torch.cuda.stream(stream)


class RingStream(BatchStream):
    """The batches of a `Filler`, with or without a `Producer` between."""

    def __init__(
        self,
        capture: Capture,
        check: Callable[[], None],
        layout: Layout,
        points: tuple[HookPoint, ...],
        seed: int,
        batch_size: int,
        devices: Devices,
        note: Callable[[Dropped], None],
        state: State | None,
        world: World = ALONE,
    ) -> None:
        """`note` hears the counts up to the end of each fill whose rows begin to be given."""
        if world.size > 1:  # who talks to the others does so from one thread
            devices = replace(devices, overlap=False)
        self._own = own_rows(world, batch_size)
        self._producer: Producer | None = None
        self._seed, self._batch_size, self._note = seed, batch_size, note
        cursor, self._given = Cursor(0, 0, {}, Dropped()), 0
        if state is not None:
            layout, cursor, self._given = _resume(state, layout, points, seed)
        self._layout, self._cursor, self._devices = layout, cursor, devices
        spare = max((len(rows) for rows in cursor.carried.values()), default=0)
        self._filler: Filler | None = Filler(
            capture, check, layout, seed, batch_size, spare, devices, world
        )
        self._fill: Fill | None = None
        self._courier = Courier(devices.training)

    def __next__(self) -> Batch:
        if self._filler is None:
            raise StopIteration
        while self._fill is None or self._given == self._fill.end:
            self._advance(self._filler)
        fill = self._fill
        chosen = fill.order[self._given : self._given + self._batch_size][self._own]
        batch = {
            point: self._courier.send(point, rows, chosen) for point, rows in fill.rows.items()
        }
        self._given += self._batch_size
        return batch

    def _advance(self, filler: Filler) -> None:
        self._leave()
        try:
            self._fill = self._next(filler)
        except BaseException:
            self.close()  # an error in the producer is told once; its thread has ended
            raise
        self._note(self._fill.after.counts)

    def _next(self, filler: Filler) -> Fill:
        if not self._devices.overlap:
            return filler.fill(self._cursor, 0, self._given)
        if self._producer is None:
            self._producer = Producer(filler, self._cursor, self._given, self._devices.model)
        return self._producer.take()

    def _leave(self) -> None:
        """Be done with a fill that is given away."""
        fill, self._fill = self._fill, None
        if fill is None:
            return
        if self._given == fill.end:
            self._cursor, self._given = fill.after, 0
        if self._producer is not None:
            self._producer.release(fill)

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
        self._leave()
        self._filler = None
        self._stop(wait=True)

    def __del__(self) -> None:
        # Whoever merely drops a stream does not wait for its thread.
        self._stop(wait=False)

    def _stop(self, wait: bool) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.stop(wait)


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
