"""A stream of training batches that knows its place, and how a batch reaches the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from mistudio.engine.activations.shards import Table
from mistudio.engine.models.hooks import HookPoint
from mistudio.errors import Incompatible

Batch = Mapping[HookPoint, Tensor]
State = dict[str, Tensor]

# Which random numbers a seed gives: each use has its own, so that a place can be reached again
# without drawing all that came before it.
WINDOW_ORDER, ROW_ORDER, BLOCK_ORDER, PHASE = 1, 2, 3, 4


@dataclass(frozen=True)
class Dropped:
    """Positions by what became of them.

    `special`: position 0 and special tokens; `outliers`: beyond the norm limit at some site;
    `kept`: all others, the rows that are given.
    """

    special: int = 0
    outliers: int = 0
    kept: int = 0

    @property
    def seen(self) -> int:
        return self.special + self.outliers + self.kept

    def __add__(self, other: Dropped) -> Dropped:
        return Dropped(
            self.special + other.special, self.outliers + other.outliers, self.kept + other.kept
        )


class BatchStream(Iterator[Batch], ABC):
    """Endless training batches: float32 [batch_size, d] per site, on the training device.

    Also a context manager: leave it, or call `close`, to free its buffers and its thread. A
    stream is used from one thread.
    """

    @abstractmethod
    def __next__(self) -> Batch: ...

    @abstractmethod
    def state(self) -> State:
        """The place after the batch last returned: plain CPU tensors, fit for safetensors.

        Cheap; they are never written to afterwards, so they may be kept.
        """

    def close(self) -> None:
        """Free what the stream holds. It gives nothing more, but still knows its place."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def generator(seed: int, *key: int) -> np.random.Generator:
    """The random numbers of one use (`key`) under `seed`."""
    return np.random.default_rng([seed, *key])


def pack(**numbers: int) -> State:
    """Numbers as a stream's state."""
    return {name: torch.tensor(number, dtype=torch.int64) for name, number in numbers.items()}


def number(state: State, name: str) -> int:
    """One number of a state; `Incompatible` where it is another kind of source's."""
    if name not in state:
        raise Incompatible(
            "This run cannot go on with these activations",
            "It was interrupted while it read its activations from another kind of source.",
            "Resume it with the settings it was started with, or start a new run.",
        )
    return int(state[name])


def require(state: State, name: str, value: int, what: str) -> None:
    """Refuse a state whose number `name` is not `value`: its batches cannot be given again."""
    found = number(state, name)
    if found != value:
        raise Incompatible(
            "This run cannot go on with these activations",
            f"When it was interrupted, {what} was {found:,}; now it is {value:,}.",
            "Resume it with the text, the model and the settings it was started with, or start a "
            "new run.",
        )


class Courier:
    """Picks rows of a table in host memory and brings them to the device as float32.

    On CUDA they travel in the table's own precision through two pinned staging areas per site, so
    that the copy runs beside the training step of the batch before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stages: dict[HookPoint, list[_Stage]] = {}
        self._sent: dict[HookPoint, int] = {}

    def send(self, point: HookPoint, table: Tensor | Table, rows: Tensor) -> Tensor:
        """float32 [len(rows), d] on the device; never shares memory with `table`."""
        if self._device.type != "cuda":
            return pick(table, rows).to(self._device).float()
        turn = self._sent.get(point, 0)
        self._sent[point] = turn + 1
        stages = self._stages.setdefault(point, [_Stage(), _Stage()])
        return stages[turn % 2].send(table, rows, self._device)


def pick(table: Tensor | Table, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """The given rows of a table, in its own precision."""
    if isinstance(table, Table):
        return table.pick(rows, out)
    return torch.index_select(table, 0, rows, out=out)


class _Stage:
    """Pinned memory for one batch of one site on its way to a CUDA device."""

    def __init__(self) -> None:
        self._rows = torch.empty(0, 0)
        self._gone: torch.cuda.Event | None = None

    def send(self, table: Tensor | Table, rows: Tensor, device: torch.device) -> Tensor:
        if self._gone is not None:
            self._gone.synchronize()  # the copy of two batches ago has left this memory
        if self._rows.dtype != table.dtype or len(self._rows) < len(rows):
            shape = (len(rows), table.shape[1])
            self._rows = torch.empty(shape, dtype=table.dtype, pin_memory=True)
        stage = self._rows[: len(rows)]
        pick(table, rows, stage)
        arrived = stage.to(device, non_blocking=True)
        self._gone = torch.cuda.Event()
        self._gone.record(torch.cuda.current_stream(device))
        return arrived.float()
