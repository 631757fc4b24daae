"""Several processes, one run: each works through its rows of every batch and gradients are added.

`torchrun` or `accelerate launch` start the processes and torch.distributed does the talking. The
first process alone decides, records, saves and judges. The others hold the same weights, but for
the rounding of their devices, and do the same steps.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mistudio.engine.progress import Cancelled, Interrupted, Progress
from mistudio.errors import InvalidInput, ProcessLost, is_out_of_memory

if TYPE_CHECKING:  # most runs are alone, and then nothing here needs torch
    from torch import Tensor
    from torch.distributed import ProcessGroup, Store

Value = TypeVar("Value")

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A step needs all processes at the same time. For anything else the others wait for the first one
# as long as it takes: it may extract for hours, or be paused. That it died they notice at once.
STEP_TIMEOUT = timedelta(minutes=10)
WAIT_TIMEOUT = timedelta(days=365)
# A process that must end lets the first one say why, and save; then its launcher ends them all.
NOTICE_SECONDS = 20
LAST_SECONDS = 60
ROWS = 8  # a process's part of a batch is a multiple of this many rows
_MESSAGE = 120  # bytes of what is told that travel at once


class World(Protocol):
    """The processes of a run. Every method is called by all of them, in the same order.

    Raises ProcessLost where another process has ended.
    """

    rank: int
    size: int

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over processes, written into `tensor`."""
        ...

    def gathered(self, rows: Tensor) -> Tensor:
        """The processes' rows (as many on each) under one another, in order of rank."""
        ...

    def copied(self, tensor: Tensor) -> Tensor:
        """The first process's values, written into `tensor`."""
        ...

    def told(self, value: Value) -> Value:
        """The first process's `value` (JSON: lists come for tuples). Those that wait for it do so
        without a limit."""
        ...

    def leave(self) -> None:
        """The end, when all is done: the first process lets the others go."""
        ...


class _Alone:
    rank = 0
    size = 1

    def add(self, tensor: Tensor) -> Tensor:
        return tensor

    def gathered(self, rows: Tensor) -> Tensor:
        return rows

    def copied(self, tensor: Tensor) -> Tensor:
        return tensor

    def told(self, value: Value) -> Value:
        return value

    def leave(self) -> None:
        pass


ALONE: World = _Alone()


class Processes:
    """A `World` over torch.distributed: NCCL between GPUs, gloo for whatever lies in memory."""

    def __init__(self, rank: int, size: int, store: Store, waiting: ProcessGroup) -> None:
        """`waiting` is the group in which the first process is waited for."""
        self.rank, self.size = rank, size
        self._store = store
        self._waiting: ProcessGroup | None = waiting
        self._dismissed = False

    def add(self, tensor: Tensor) -> Tensor:
        import torch.distributed as dist

        whole = tensor.contiguous()
        with self._talking():
            dist.all_reduce(whole)
        return tensor if whole is tensor else tensor.copy_(whole)

    def gathered(self, rows: Tensor) -> Tensor:
        import torch
        import torch.distributed as dist

        # As bytes: gloo does not know every type.
        mine = rows.contiguous().view(torch.uint8)
        every = mine.new_empty(self.size * len(mine), *mine.shape[1:])
        with self._talking():
            dist.all_gather(list(every.chunk(self.size)), mine)
        return every.view(rows.dtype)

    def copied(self, tensor: Tensor) -> Tensor:
        import torch.distributed as dist

        whole = tensor.contiguous()
        with self._talking():
            dist.broadcast(whole, 0)
        return tensor if whole is tensor else tensor.copy_(whole)

    def told(self, value: Value) -> Value:
        data = json.dumps(value).encode() if self.rank == 0 else b""
        head = self._sent(len(data).to_bytes(8, "little") + data[:_MESSAGE], 8 + _MESSAGE)
        length = int.from_bytes(head[:8], "little")
        text = head[8 : 8 + length]
        if length > _MESSAGE:
            text += self._sent(data[_MESSAGE:], length - _MESSAGE)
        told: Value = json.loads(text)
        return told

    def _sent(self, data: bytes, size: int) -> bytes:
        """The first process's `data`, `size` bytes with zeros behind it."""
        import torch
        import torch.distributed as dist

        buffer = torch.zeros(size, dtype=torch.uint8)
        if data:
            buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with self._talking():
            dist.broadcast(buffer, 0, group=self._waiting)
        return buffer.numpy().tobytes()

    # --- when one of them cannot go on --------------------------------------------------------

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as exc:
            if is_out_of_memory(exc) or not _is_lost(exc):
                raise
            raise ProcessLost(
                "Another process of this run has ended",
                self._reason() if self.rank == 0 else "",
                "Mend what ended it and start the run again. A checkpoint that was written before "
                "can be resumed.",
            ) from exc

    def _reason(self) -> str:
        """What the process that ended said; the first process alone asks."""
        try:
            self._store.set("heard", "yes")
            if self._store.check(["failure"]):
                return self._store.get("failure").decode()
        except RuntimeError:  # the store's owner is gone too
            pass
        return "It did not say why; what it printed may tell."

    def fail(self, reason: str) -> bool:
        """Called by a process that cannot go on and is not the first: tell the first one why and
        give it time to say so, and to save. False where it lives and does not hear."""
        try:
            self._store.set("failure", f"Process {self.rank}: {reason}")
        except RuntimeError:  # the store's owner is gone
            return True
        self._close()  # whoever waits for this process learns of it
        if not self._comes("heard", NOTICE_SECONDS):
            return False
        self.linger()
        return True

    def linger(self) -> None:
        """Wait to be dismissed: the launcher does that when the first process has ended."""
        self._close()
        self._comes("never", LAST_SECONDS)

    def dismiss(self) -> None:
        """The launcher ends the run. Whoever lingers stops; what is at work ends with the first
        process."""
        self._dismissed = True

    def _comes(self, key: str, seconds: float) -> bool:
        """Whether, before time is up, the store holds `key` or there is nothing to wait for."""
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                if self._dismissed or self._store.check([key]):
                    return True
                time.sleep(0.1)
        except RuntimeError:  # the store's owner is gone
            return True
        return False

    def orders(self) -> Iterator[Any]:
        """What the first process tells the others to do (`told`), until it leaves."""
        while (order := self.told(None)) is not None:
            yield order
        self._close()

    def leave(self) -> None:
        self.told(None)
        self._close()

    def _close(self) -> None:
        import torch.distributed as dist

        self._waiting = None  # or its connections would stay open
        if dist.is_initialized():
            dist.destroy_process_group()


_LOST = re.compile(
    r"connection|connect\(\)|closed|reset by peer|broken pipe|time[d ]*out|socket|aborted",
    re.IGNORECASE,
)


def _is_lost(exc: RuntimeError) -> bool:
    """gloo has no type of its own for a peer that is gone."""
    return type(exc).__name__ in ("DistBackendError", "DistNetworkError") or bool(
        _LOST.search(str(exc))
    )


# --- the processes of a launch ------------------------------------------------------------------

_current: World = ALONE


def current() -> World:
    """The processes that this one was started with; `ALONE` before `from_environment`."""
    return _current


def launched() -> bool:
    """Whether a launcher started this process as one of several. Needs no torch."""
    size = os.environ.get("WORLD_SIZE", "")
    return size.isdigit() and int(size) > 1 and all(os.environ.get(name) for name in VARIABLES)


def from_environment() -> World:
    """Meet the processes that the launcher started beside this one; `ALONE` where it started none.

    Every process takes the GPU of its number on its machine. Raises ProcessLost where the others
    do not come, and InvalidInput where a machine has fewer GPUs than processes.
    """
    global _current
    if _current is ALONE and launched():
        # It writes stack traces where a process ends; what matters is said in our own words.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        _current = _meet()
    return _current


def _meet() -> Processes:
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    if on_gpu:
        _take_gpu(int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=STEP_TIMEOUT))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=STEP_TIMEOUT,
        )
        waiting = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    except (RuntimeError, ValueError) as exc:
        raise ProcessLost(
            "The processes of this run did not find one another",
            f"{exc}".splitlines()[0],
            "Start all of them with torchrun or accelerate launch, and see that the machines can "
            "reach one another.",
        ) from exc
    return Processes(rank, size, dist.PrefixStore("mistudio", store), waiting)


def _take_gpu(number: int) -> None:
    import torch

    found = torch.cuda.device_count()
    if number >= found:
        raise InvalidInput(
            "There are more processes than GPUs",
            f"This machine has {found}; process {number + 1} of it finds none.",
            f"Start {found} processes on it (torchrun --nproc-per-node {found}).",
        )
    torch.cuda.set_device(number)


# --- what the engine does with them -------------------------------------------------------------


def own_rows(world: World, n: int) -> slice:
    """This process's rows of a batch of `n`."""
    each = n // world.size
    return slice(world.rank * each, (world.rank + 1) * each)


def check_batch(world: World, batch_size: int) -> None:
    """InvalidInput where a batch cannot be divided so that the result stays the same: thresholds
    are estimated from every 8th row."""
    unit = ROWS * world.size
    if world.size > 1 and batch_size % unit:
        near = max(unit, round(batch_size / unit) * unit)
        raise InvalidInput(
            "The batch cannot be divided among the processes",
            f"{world.size} processes share {batch_size:,} tokens.",
            f"Choose a batch size that is a multiple of {unit}, such as {near:,}.",
            field="batch_size",
        )


def gathered_unevenly(world: World, rows: Tensor, counts: list[int]) -> list[Tensor]:
    """The rows of every process, which has `counts` of them; in order of rank."""
    if world.size == 1:
        return [rows]
    most = max(counts)
    if not most:
        return [rows[:0] for _ in counts]
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    every = world.gathered(padded)
    return [every[rank * most : rank * most + n] for rank, n in enumerate(counts)]


class Together:
    """The first process's progress, whose wishes all processes hear. `check` is called by all of
    them, in the same order; they stop at the same place."""

    def __init__(self, progress: Progress, world: World) -> None:
        self._own, self._world = progress, world

    def check(self) -> None:
        stop: Cancelled | None = None
        try:
            if self._world.rank == 0:
                self._own.check()
        except Cancelled as exc:
            stop = exc
        later = isinstance(stop, Interrupted)
        stopped, later = self._world.told([stop is not None, later])
        if stopped:
            raise stop or (Interrupted if later else Cancelled)

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: Any
    ) -> None:
        self._own.report(done, total, phase, **metrics)


def together(progress: Progress, world: World) -> Progress:
    """`progress` for what all processes of `world` do in step."""
    return progress if world.size == 1 else Together(progress, world)
