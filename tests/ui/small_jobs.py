"""Jobs small enough to watch: they count, and do as they are told."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from mistudio.engine.progress import Interrupted
from mistudio.errors import InvalidInput
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.library.library import Library


@dataclass(frozen=True)
class Count:
    """Count to `to`, `pause` seconds apart; fails where it is told to."""

    to: int = 5
    pause: float = 0.005
    fail_at: int = -1
    bug: bool = False
    kind: ClassVar[str] = "count"
    lane: ClassVar[str] = "compute"

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("Counting"),)

    def title(self, library: Library) -> str:
        return f"Count to {self.to}"

    def run(self, context: JobContext) -> dict[str, Any]:
        done = 0
        for done in range(1, self.to + 1):
            context.check()
            if context.wants_finish():
                break
            if done == self.fail_at:
                if self.bug:
                    raise ZeroDivisionError("a bug")
                raise InvalidInput("Bad number", f"{done} cannot be counted.", "Count to less.")
            time.sleep(self.pause)
            context.record({"step": done, "loss": 1.0 / done})
            context.report(done, self.to, "Counting", count=done)
        return {"counted": done}


@dataclass(frozen=True)
class CountOnDisk(Count):
    kind: ClassVar[str] = "count_on_disk"
    lane: ClassVar[str] = "disk"


@dataclass(frozen=True)
class CountOn(Count):
    """Keeps how far it was, and counts on from there."""

    kind: ClassVar[str] = "count_on"

    def run(self, context: JobContext) -> dict[str, Any]:
        kept = context.library.checkpoint_folder(context.job_id)
        begun = max((int(f.name.split("-")[1]) for f in kept.glob("step-*")), default=0)
        done = begun
        while done < self.to:
            context.report(done, self.to, "Counting")
            time.sleep(self.pause)
            try:
                context.check()
            except Interrupted:
                (kept / f"step-{done}").mkdir(parents=True)
                raise
            done += 1
        return {"counted": done, "begun": begun}


@dataclass(frozen=True)
class Stubborn:
    """Does not look whether it should stop, until `release` is set."""

    kind: ClassVar[str] = "stubborn"
    lane: ClassVar[str] = "compute"
    release: ClassVar[threading.Event] = threading.Event()

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("Not listening"),)

    def title(self, library: Library) -> str:
        return "Stubborn"

    def run(self, context: JobContext) -> dict[str, Any]:
        self.release.wait(20)
        return {}
