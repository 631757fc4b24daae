"""How a running job is told to pause, stop or finish early; how it tells how far it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mistudio.engine.progress import Cancelled, Interrupted, RolledBack
from mistudio.engine.training.checkpoints import AutoSave


class Control:
    """The user's wishes, readable from the job's thread and settable from any other."""

    def __init__(self) -> None:
        self._cancel = threading.Event()
        self._interrupt = threading.Event()
        self._finish = threading.Event()
        self._save = threading.Event()
        self._go = threading.Event()
        self._go.set()
        self._step: int | None = None  # to go back to
        self._arrives_paused = self._saves_paused = False
        self._under_way = False  # from the wish to go back until it stands there
        self.auto_save: AutoSave | None = None

    def cancel(self) -> None:
        """Stop and throw away what is unfinished."""
        self._cancel.set()
        self._go.set()

    def interrupt(self) -> None:
        """Stop, but keep what is needed to go on later: the application quits."""
        self._interrupt.set()
        self._go.set()

    def finish_early(self) -> None:
        """Stop soon and keep what there is (training, generation)."""
        self._finish.set()
        self._go.set()

    def save_now(self) -> None:
        """Write a checkpoint soon (training). One that is paused takes a step for it: only
        between two steps is there something whole to save."""
        self._save.set()
        if self.paused:
            self._saves_paused = True
            self._go.set()

    def save_every(self, auto: AutoSave) -> None:
        """From now on save by itself so often (training)."""
        self.auto_save = auto

    def roll_back(self, step: int) -> None:
        """Go back to the checkpoint of this step and pause there (training)."""
        self._step, self._under_way = step, True
        self._go.set()

    def pause(self) -> None:
        if not (self._cancel.is_set() or self._interrupt.is_set() or self._finish.is_set()):
            self._go.clear()

    def resume(self) -> None:
        self._arrives_paused = self._saves_paused = False
        self._go.set()

    def accept_roll_back(self) -> int | None:
        """The job hears of the wish: `check` raises no more. The step; None where there was no
        such wish."""
        step, self._step = self._step, None
        self._arrives_paused = step is not None
        return step

    def arrive(self) -> None:
        """The job stands where it went back to: pause, where nobody resumed it meanwhile."""
        self._under_way = self._step is not None
        if self._arrives_paused:
            self._arrives_paused = False
            self.pause()

    @property
    def paused(self) -> bool:
        return not self._go.is_set()

    @property
    def going_back(self) -> bool:
        """Whether the job was told to go back and does not stand there yet."""
        return self._under_way

    @property
    def wants_finish(self) -> bool:
        return self._finish.is_set()

    @property
    def cancelled(self) -> bool:
        return self._cancel.is_set()

    def wants_save(self) -> bool:
        """Whether `save_now` was asked for since this was last asked."""
        wanted = self._save.is_set()
        self._save.clear()
        if wanted and self._saves_paused:
            self._saves_paused = False
            self.pause()
        return wanted

    def check(self) -> float:
        """Raise Cancelled if stopped, Interrupted if that is only for now, RolledBack if it is to
        go back, wait while paused. Returns the seconds spent waiting."""
        self._raise_if_over()
        if self._go.is_set():
            return 0.0
        began = time.monotonic()
        self._go.wait()
        self._raise_if_over()
        return time.monotonic() - began

    def _raise_if_over(self) -> None:
        if self._cancel.is_set():
            raise Cancelled
        if self._interrupt.is_set():
            raise Interrupted
        if self._step is not None:
            raise RolledBack


@dataclass(frozen=True)
class SaveReport:
    """What became of a checkpoint that was asked for. `number` counts them from 1; `problem` says
    why it could not be written, "" where it was."""

    number: int
    step: int
    bytes: int
    problem: str = ""


@dataclass(frozen=True)
class Phase:
    """A named part of a job; `weight` is its share of the time, in any unit."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Snapshot:
    """Where a job stands. `remaining` is in seconds, None until it can be estimated; `notes` are
    all sentences the job has told so far, with the metric `note`."""

    job_id: int
    phase: str
    done: float
    total: float | None
    fraction: float
    elapsed: float
    remaining: float | None
    metrics: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Meter:
    """Turns `report` calls into snapshots: overall fraction, elapsed and remaining time."""

    def __init__(self, job_id: int, phases: tuple[Phase, ...], clock: Callable[[], float]) -> None:
        self._job_id = job_id
        self._phases = phases or (Phase("", 1.0),)
        self._clock = clock
        self._began = clock()
        self._idle = 0.0
        self._lock = threading.Lock()
        self._phase = self._phases[0].name
        self._phase_began = self._began
        self._phase_idle = 0.0
        self._done = 0.0
        self._total: float | None = None
        self._metrics: dict[str, Any] = {}
        self._notes: tuple[str, ...] = ()

    def add_idle(self, seconds: float) -> None:
        """Time spent paused does not count towards speed."""
        with self._lock:
            self._idle += seconds
            self._phase_idle += seconds

    def report(
        self, done: float, total: float | None, phase: str | None, metrics: dict[str, Any]
    ) -> None:
        with self._lock:
            if phase is not None and phase != self._phase:
                self._phase = phase
                self._phase_began = self._clock()
                self._phase_idle = 0.0
                self._total = None
                self._metrics = {}
            self._done = done
            if total is not None:
                self._total = total
            self._metrics.update(metrics)
            if note := self._metrics.pop("note", ""):
                self._notes = (*self._notes, str(note))

    def snapshot(self) -> Snapshot:
        with self._lock:
            now = self._clock()
            share = min(self._done / self._total, 1.0) if self._total else 0.0
            weights = [phase.weight for phase in self._phases]
            index = next(
                (i for i, phase in enumerate(self._phases) if phase.name == self._phase), 0
            )
            whole = sum(weights) or 1.0
            fraction = (sum(weights[:index]) + weights[index] * share) / whole
            return Snapshot(
                job_id=self._job_id,
                phase=self._phase,
                done=self._done,
                total=self._total,
                fraction=min(fraction, 1.0),
                elapsed=now - self._began - self._idle,
                remaining=self._remaining(now, share, weights, index),
                metrics=dict(self._metrics),
                notes=self._notes,
            )

    def _remaining(
        self, now: float, share: float, weights: list[float], index: int
    ) -> float | None:
        """This phase by its own measured speed; later phases by their weight, in the same unit."""
        spent = now - self._phase_began - self._phase_idle
        if share < 0.005 or spent < 0.5:
            return None
        here = spent * (1.0 - share) / share
        per_weight = (spent / share) / weights[index] if weights[index] else 0.0
        return here + per_weight * sum(weights[index + 1 :])
