"""Showing a step's own progress as one part of a larger job."""

from __future__ import annotations

from collections.abc import Mapping

from mistudio.engine.progress import Progress

SCALE = 1000.0


class Stage:
    """A `Progress` that maps the phases of an engine function onto a share of one phase.

    `parts` maps an inner phase to its (start, end) in 0..1; inner phases it does not name keep
    the last place reached. What the inner phase is called travels as the metric `detail`.
    """

    def __init__(
        self, outer: Progress, phase: str, parts: Mapping[str, tuple[float, float]] | None = None
    ) -> None:
        self._outer, self._phase, self._parts = outer, phase, parts
        self._inner = ""
        self._total: float | None = None
        self._reached = 0.0
        outer.report(0, SCALE, phase=phase, detail="")

    def check(self) -> None:
        self._outer.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        if phase is not None and phase != self._inner:
            self._inner, self._total = phase, None
        if total is not None:
            self._total = total
        share = min(done / self._total, 1.0) if self._total else 0.0
        if self._parts is None:
            place = share
        elif self._inner in self._parts:
            start, end = self._parts[self._inner]
            place = start + (end - start) * share
        else:
            place = self._reached
        # The bar never runs backwards.
        self._reached = max(self._reached, place)
        self._outer.report(
            self._reached * SCALE, SCALE, phase=self._phase, detail=self._inner, **metrics
        )


class Within:
    """Progress of item `number` of `count` equal ones."""

    def __init__(self, outer: Progress, number: int, count: int) -> None:
        self._outer, self._number, self._count = outer, number, count

    def check(self) -> None:
        self._outer.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        share = done / total if total else 0.0
        self._outer.report(self._number + share, self._count, phase, **metrics)
