"""Progress and tables on a terminal; plain lines where there is none."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from mistudio import formatting
from mistudio.jobs.control import Snapshot

BAR = 28
PLAIN_LINE_SECONDS = 5.0
_SHOWN: dict[str, tuple[str, Callable[[Any], str]]] = {
    "loss": ("loss", lambda v: formatting.number(v, 4)),
    "l0": ("L0", lambda v: formatting.number(v, 1)),
    "dead": ("dead", formatting.count),
    "tokens_per_second": ("tokens/s", formatting.count),
    "precision": ("precision", str),
}


class ProgressLines:
    """One line a phase: bar, share, time left. Rewritten in place on a terminal; elsewhere a new
    line now and then, so that a log stays readable."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._phase: str | None = None
        self._phase_began = 0.0
        self._printed_at = 0.0
        self._last: Snapshot | None = None
        self._told = 0  # notes that were shown

    def show(self, snapshot: Snapshot) -> None:
        now = time.monotonic()
        if snapshot.phase != self._phase:
            self.finish_phase()
            self._phase, self._phase_began = snapshot.phase, now
            self._printed_at = now if not self._live else 0.0
        self._last = snapshot
        for note in snapshot.notes[self._told :]:
            self._write(("\r" + note.ljust(self._width()) if self._live else note) + "\n")
        self._told = len(snapshot.notes)
        if self._live:
            self._write("\r" + self._line(snapshot).ljust(self._width())[: self._width()])
        elif now - self._printed_at >= PLAIN_LINE_SECONDS:
            self._printed_at = now
            self._write(self._line(snapshot) + "\n")

    def finish_phase(self) -> None:
        """Close the running phase's line with the time it took."""
        if self._phase is None or self._last is None:
            return
        took = formatting.duration(time.monotonic() - self._phase_began)
        line = f"{self._phase:<11} [{'#' * BAR}] 100 %  took {took}"
        self._write(("\r" + line.ljust(self._width()) if self._live else line) + "\n")
        self._phase = self._last = None

    def break_off(self) -> None:
        """Leave the line as it is (after a stop or an error)."""
        if self._live and self._phase is not None:
            self._write("\n")
        self._phase = self._last = None

    def _line(self, snapshot: Snapshot) -> str:
        share = min(snapshot.done / snapshot.total, 1.0) if snapshot.total else 0.0
        filled = round(BAR * share)
        bar = "#" * filled + "." * (BAR - filled)
        left = (
            "estimating"
            if snapshot.remaining is None
            else (f"about {formatting.duration(snapshot.remaining)} left in all")
        )
        facts = [
            f"{label} {render(snapshot.metrics[name])}"
            for name, (label, render) in _SHOWN.items()
            if name in snapshot.metrics
        ]
        return f"{snapshot.phase:<11} [{bar}] {share * 100:3.0f} %  {left}  {'  '.join(facts)}"

    def _width(self) -> int:
        return shutil.get_terminal_size().columns - 1

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as aligned text; `columns` maps a key to its heading. Numbers go to the right."""
    cells = [[str(row.get(key, "")) for key in columns] for row in rows]
    widths = [
        max(len(heading), *(len(line[i]) for line in cells)) if cells else len(heading)
        for i, heading in enumerate(columns.values())
    ]
    right = [
        bool(rows) and all(isinstance(row.get(key), int | float) for row in rows) for key in columns
    ]

    def join(line: Sequence[str]) -> str:
        return "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()

    return "\n".join([join(list(columns.values())), *map(join, cells)])
