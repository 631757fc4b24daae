"""Laying out a map in a process of its own, and both ends of the pipe to it.

umap-learn's compiled steps and HDBSCAN hold Python's lock for as long as they run, up to seconds:
in a thread of the window's process they would freeze it. A process can also be ended at once.

What goes over the pipe is lines of JSON. The process tells how far it is and then waits for an
answer before it goes on: so a paused job pauses it, and where nobody answers any more it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

import mistudio
from mistudio.engine.features.layout import MapSettings
from mistudio.engine.progress import Cancelled, Progress
from mistudio.errors import OutOfMemory, ProcessLost

INPUT, OUTPUT, ERRORS = "layout-input.npz", "layout-output.npz", "layout-errors.txt"
TOLD_EVERY = 0.1  # seconds
LOOKED_EVERY = 0.1  # seconds: how soon a cancelled job hears of it
PARTS = {"layout": (0.0, 0.95), "groups": (0.95, 1.0)}


def lay_out_apart(
    neighbours: np.ndarray,
    distances: np.ndarray,
    start: np.ndarray,
    settings: MapSettings,
    folder: Path,
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """(positions float32 [n, 2], groups int32 [n]); see `layout.lay_out`, `groups_of_map`.

    `folder` is for files between the two. Raises ProcessLost where the process ends without a
    result, OutOfMemory where it runs short of memory; it never outlives the call.
    """
    np.savez(folder / INPUT, neighbours=neighbours, distances=distances, start=start)
    with (folder / ERRORS).open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "mistudio.jobs.map_process", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environment(),
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    assert process.stdin is not None and process.stdout is not None
    reader = _Reader(process.stdout)
    try:
        _send(process.stdin, asdict(settings))
        _attend(reader, process.stdin, progress)
    finally:
        # Ended already where all went well; else it must not go on.
        process.kill()
        process.wait()
        reader.join()
        for pipe in (process.stdin, process.stdout):
            _close(pipe)
    if reader.failure:
        raise _error(reader.failure)
    if not (folder / OUTPUT).exists():
        raise ProcessLost(
            "The process that lays out the map ended by itself",
            _last_line(folder / ERRORS) or "It left no message.",
            "Try again; where it happens again, close other programs first: memory may be short.",
        )
    with np.load(folder / OUTPUT, allow_pickle=False) as found:
        return found["positions"], found["groups"]


class _Reader(threading.Thread):
    """Reads lines as they come; `lines` ends with None. `failure` is what the process told."""

    def __init__(self, pipe: IO[bytes]) -> None:
        super().__init__(name="map-process-reader", daemon=True)
        self._pipe = pipe
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.failure: dict[str, Any] | None = None
        self.start()

    def run(self) -> None:
        for line in self._pipe:
            self.lines.put(json.loads(line))
        self.lines.put(None)


def _attend(reader: _Reader, answers: IO[bytes], progress: Progress) -> None:
    """Hand on how far it is until it has ended; `progress` may stop it or let it wait."""
    while True:
        progress.check()
        try:
            told = reader.lines.get(timeout=LOOKED_EVERY)
        except queue.Empty:
            continue
        if told is None:
            return
        if "failure" in told:
            reader.failure = told
            continue
        progress.check()
        if not told.get("done"):
            progress.report(told["at"], told["of"], phase=told["phase"])
        _send(answers, {})


def _send(pipe: IO[bytes], message: dict[str, Any]) -> None:
    # Where it has ended, what it said before tells why.
    with contextlib.suppress(OSError):
        pipe.write(json.dumps(message).encode() + b"\n")
        pipe.flush()


def _close(pipe: IO[bytes]) -> None:
    # What was still to be written to an ended process is no matter.
    with contextlib.suppress(OSError):
        pipe.close()


def _environment() -> dict[str, str]:
    """The same package as here, wherever this one was imported from; one thread."""
    here = str(Path(mistudio.__file__).resolve().parents[1])
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)}


def _error(failure: dict[str, Any]) -> Exception:
    if failure["failure"] == "MemoryError":
        return OutOfMemory(
            "Not enough memory",
            "Laying out the map needs more than is free.",
            "Close other programs, or try again when nothing else runs.",
        )
    return RuntimeError(f"The process that lays out the map failed:\n{failure['traceback']}")


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


# --- the other end --------------------------------------------------------------------------------


class _Teller:
    """The engine's `Progress` at the other end: tells over the pipe, waits for the answer."""

    def __init__(self, out: IO[bytes], answers: IO[bytes]) -> None:
        self._out, self._answers = out, answers
        self._phase, self._total, self._told = "layout", 1.0, 0.0

    def check(self) -> None:
        pass

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        new = phase is not None and phase != self._phase
        self._phase = phase or self._phase
        self._total = self._total if total is None else total
        now = time.monotonic()
        if new or now - self._told >= TOLD_EVERY:
            self._told = now
            self.tell({"phase": self._phase, "at": done, "of": self._total})

    def tell(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message).encode() + b"\n")
        self._out.flush()
        if not self._answers.readline():
            raise Cancelled  # nobody is there any more


def main(arguments: Sequence[str]) -> int:
    """Lay out what lies in the folder; settings come first over the pipe."""
    # What libraries print goes to the errors; the pipe is ours alone.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    answers = sys.stdin.buffer
    teller = _Teller(out, answers)
    try:
        _work(Path(arguments[0]), MapSettings(**json.loads(answers.readline())), teller)
        teller.tell({"done": True})
    except Cancelled:
        return 1
    except BaseException as exc:
        told = {"failure": type(exc).__name__, "traceback": traceback.format_exc()}
        out.write(json.dumps(told).encode() + b"\n")
        out.flush()
        return 1
    return 0


def _work(folder: Path, settings: MapSettings, progress: Progress) -> None:
    from mistudio.engine.features.clustering import groups_of_map
    from mistudio.engine.features.layout import lay_out

    with np.load(folder / INPUT, allow_pickle=False) as given:
        positions = lay_out(
            given["neighbours"], given["distances"], given["start"], settings, progress
        )
    progress.report(0, 1, phase="groups")
    groups = groups_of_map(positions, settings.min_cluster)
    part = folder / f"part-{OUTPUT}"
    np.savez(part, positions=positions, groups=groups)
    os.replace(part, folder / OUTPUT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
