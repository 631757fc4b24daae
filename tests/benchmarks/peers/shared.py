"""What both sides read: activations on disk and the order in which their rows are trained on.

Imported in two virtual environments, ours and the peer's, so it needs numpy and torch only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Shards:
    """Arrays that follow each other, read as one [rows, d]."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self._ends[-1]), parts[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: np.ndarray | slice) -> np.ndarray:
        rows = np.arange(len(self))[chosen]
        found = np.empty((len(rows), self.shape[1]), self._parts[0].dtype)
        shards = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(shards):
            here, part = shards == number, self._parts[number]
            found[here] = part[rows[here] - (self._ends[number] - len(part))]
        return found


@dataclass(frozen=True)
class Activations:
    """One hook point of a folder written by `mistudio.engine.activations.store.extract`.

    The arrays hold float16 [rows, d] times `scale`; reading divides by it, so that everyone gets
    raw activations in float32.
    """

    point: str
    width: int
    scale: float
    median: float
    train: np.ndarray | Shards
    heldout: np.ndarray | Shards

    def rows(self, array: np.ndarray | Shards, chosen: np.ndarray | slice) -> torch.Tensor:
        return torch.from_numpy(array[chosen].astype(np.float32)) / self.scale


def open_activations(folder: Path, point: str) -> Activations:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    width = meta["widths"][point]

    def array(split: str) -> np.ndarray | Shards:
        counts = meta.get("shards", {}).get(split)
        places = [(folder / split, meta["tokens"][split])]  # without shards: one flat file
        if counts is not None:
            places = [(folder / split / f"{i:05d}", n) for i, n in enumerate(counts)]
        parts = [
            np.memmap(path / f"{point}.f16", dtype=np.float16, mode="r", shape=(n, width))
            for path, n in places
        ]
        return parts[0] if len(parts) == 1 else Shards(parts)

    return Activations(
        point,
        width,
        meta["scales"][point],
        meta["medians"][point],
        array("train"),
        array("heldout"),
    )


def write_order(path: Path, rows: int, seed: int, wanted: int) -> None:
    """Write at least `wanted` row numbers (int32): one random permutation of `rows` after another.

    Every permutation has a seed of its own, so a longer file begins like a shorter one.
    """
    if path.exists() and path.stat().st_size // 4 >= wanted:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        for epoch in range(-(-wanted // rows)):
            generator = np.random.default_rng([seed, epoch])
            file.write(generator.permutation(rows).astype(np.int32).tobytes())
    temporary.replace(path)


def batches(activations: Activations, order: Path, batch_size: int) -> Iterator[torch.Tensor]:
    """Training batches, float32 [batch_size, d], in the order of the file; ends with the file."""
    rows = np.memmap(order, dtype=np.int32, mode="r")
    for start in range(0, len(rows) - batch_size + 1, batch_size):
        yield activations.rows(activations.train, rows[start : start + batch_size])


def mean_norm(activations: Activations, order: Path, rows: int = 65536) -> float:
    """E||x|| over the first `rows` rows of the run's own order."""
    chosen = np.memmap(order, dtype=np.int32, mode="r")[:rows]
    return float(activations.rows(activations.train, chosen).norm(dim=1).mean())


def planted(d: int, rows: int, *, directions: int = 4096, active: int = 24) -> torch.Tensor:
    """[rows, d] float32: sums of `active` out of `directions` random unit directions, with
    exponential weights, plus an offset and a little noise. The same numbers on both sides."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(directions, d, generator=generator)
    table /= table.norm(dim=1, keepdim=True)
    x = torch.randn(d, generator=generator) + 0.05 * torch.randn(rows, d, generator=generator)
    for _ in range(active):
        chosen = torch.randint(directions, (rows,), generator=generator)
        weights = torch.empty(rows, 1).exponential_(generator=generator)
        x += 4 * weights * table[chosen]
    return x


def pool(job: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """A few batches to go round, on the job's device."""
    rows = planted(job["d"], job["pool"] * job["batch"])
    return rows.to(job["device"]).split(job["batch"])


def extra_memory(step: Callable[[], None], steps: int, device: str) -> dict[str, Any]:
    """Peak bytes beyond what was held before the first of `steps` calls of `step`, which makes
    the trainer: resident memory of the process (Linux), or memory allocated on the GPU."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed must not serve the trainer unseen
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(steps):
        step()
    peak = _resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()
    return {"bytes": peak - before, "before": before}


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def take_turns(step: Callable[[], None], job: dict[str, Any]) -> None:
    """Warm up, then serve timing requests over stdin and stdout, one line each: "go N" runs N
    steps and answers their seconds. Between requests the process waits without computing."""
    clock = _clock(job["device"])
    for _ in range(job["warmup"]):
        step()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        words = line.split()
        if not words or words[0] != "go":
            return
        n = int(words[1])
        began = clock()
        for _ in range(n):
            step()
        print(json.dumps({"seconds": clock() - began, "load": load_average()}), flush=True)


def _clock(device: str) -> Callable[[], float]:
    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    return now


def load_average() -> float:
    """Runnable processes over the last minute: above the threads in use, timings were disturbed."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def serve(actions: dict[str, Callable[[dict[str, Any]], dict[str, Any] | None]]) -> None:
    """Do the one job that the command line holds as JSON; its answer is the last line printed."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    answer = actions[job["do"]](job)
    if answer is not None:
        print(json.dumps(answer | {"load": load_average()}), flush=True)
