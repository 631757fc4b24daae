"""How far a download is, in bytes, and how fast it goes now."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from mistudio import formatting

WINDOW = 5.0  # seconds over which the speed is told
_LEAST = 0.7  # seconds before a speed is told at all
_WHAT = "Download: "  # the time that is left of the whole job stands beside it


class Transfer:
    """Looks at a job's metrics now and then. The speed is that of the bytes that really came
    (what an earlier try had left does not count) in the last seconds: it falls to zero where
    nothing comes any more."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, float]] = deque()

    def text(self, metrics: Mapping[str, Any], running: bool = True) -> str:
        """`Download: 412 MB of 1.2 GB, 38 MB/s, 21 s left`; empty where nothing is downloaded. One
        that is paused or waits for the Hub has no speed; why it waits is said."""
        done, total = metrics.get("bytes_done"), metrics.get("bytes_total")
        waiting = str(metrics.get("waiting") or "")
        if done is None:
            self._seen.clear()
            return ""
        if not running or waiting or (total and done >= total):
            self._seen.clear()
            amount = _WHAT + formatting.transfer(done, total)
            return f"{amount} • {waiting}" if waiting and running else amount
        return _WHAT + formatting.transfer(
            done, total, self._speed(float(metrics["bytes_received"]))
        )

    def _speed(self, received: float) -> float | None:
        """Bytes per second; None until enough was seen."""
        now = self._clock()
        if self._seen and received < self._seen[-1][1]:  # begun anew
            self._seen.clear()
        self._seen.append((now, received))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW:
            self._seen.popleft()
        began, before = self._seen[0]
        if now - began < _LEAST or not received:
            return None
        return (received - before) / (now - began)
