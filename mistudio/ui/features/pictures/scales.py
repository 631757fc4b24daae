"""Values to colours: continuous, diverging and by kind, for a dark screen and for white paper.

All are safe for the common kinds of colour blindness: viridis (van der Walt, Smith), blue against
orange, and the colours of Okabe and Ito.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mistudio import formatting
from mistudio.ui.theme import tokens

SHADES = 64
NONE = 255  # the shade of what has no value
PAPER, PAPER_INK, PAPER_FAINT = "#FFFFFF", "#111827", "#4B5563"

_VIRIDIS = ("#440154", "#472D7B", "#3B528B", "#2C728E", "#21918C", "#28AE80", "#5EC962",
            "#ADDC30", "#FDE725")  # fmt: skip
_KINDS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#3B8BD0", "#D55E00", "#CC79A7", "#A3E635")
_KINDS_ON_PAPER = (
    "#B97F00", "#1F86C4", "#00795A", "#8F8600", "#00508A", "#B34700", "#A94880", "#4D7C0F",
)  # fmt: skip
_DIVERGING = ("#60A5FA", "#1E293B", "#FB923C")
_DIVERGING_ON_PAPER = ("#1D4ED8", "#F1F5F9", "#C2410C")


@dataclass(frozen=True)
class Scale:
    """How values become colours. `kind`: "points" (continuous, on a background that must stay
    visible between them), "cells" (continuous from nothing), "diverging" (around 0), "kinds"
    (0, 1, ... of `names`, in no order), "steps" (as kinds, in order); a legend leaves out names
    that are "". `clipped`: whether there are
    values beyond the ends. `definition` says what the value is and of how much."""

    title: str
    kind: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    clipped: tuple[bool, bool] = (False, False)
    unit: str = ""
    percent: bool = False
    names: tuple[str, ...] = ()
    none: str = "no value"
    has_none: bool = False
    definition: str = ""

    def shades(self, values: np.ndarray) -> np.ndarray:
        """uint8, of the same shape: the place in `palette` of each value, `NONE` where NaN."""
        numbers = np.asarray(values, np.float64)
        found = np.full(numbers.shape, NONE, np.uint8)
        if self.kind in ("kinds", "steps"):
            real = np.isfinite(numbers) & (numbers >= 0)
            found[real] = self._kind_shade(numbers[real].astype(np.int64))
            return found
        with np.errstate(divide="ignore", invalid="ignore"):
            place = np.log(numbers) if self.log else numbers
            low, high = (np.log(self.low), np.log(self.high)) if self.log else (self.low, self.high)
            share = (place - low) / (high - low) if high > low else np.full(place.shape, 0.5)
        real = np.isfinite(numbers) & ~np.isnan(share)
        found[real] = np.clip(np.round(share[real] * (SHADES - 1)), 0, SHADES - 1)
        return found

    def _kind_shade(self, kinds: np.ndarray) -> np.ndarray:
        if self.kind == "steps":
            return kinds * (SHADES - 1) // max(len(self.names) - 1, 1)
        return kinds % len(_KINDS)

    def palette(self, paper: bool = False) -> np.ndarray:
        """uint32 [256], 0xffRRGGBB by shade."""
        none = "#9CA3AF" if paper else "#64748B"
        found = np.full(256, _number(none), np.uint32)
        if self.kind == "kinds":
            colours: Sequence[str] = _KINDS_ON_PAPER if paper else _KINDS
        elif self.kind == "diverging":
            colours = _between(_DIVERGING_ON_PAPER if paper else _DIVERGING, 0.0, 1.0)
        elif self.kind == "cells":
            # Nothing is the ground; something is far from it.
            ground = "#F1F5F9" if paper else tokens.TILE
            stops = tuple(reversed(_VIRIDIS)) if paper else _VIRIDIS
            colours = [ground, *_between(stops, 0.15 if paper else 0.25, 1.0, SHADES - 1)]
        else:
            colours = _between(_VIRIDIS, 0.0, 0.68) if paper else _between(_VIRIDIS, 0.33, 1.0)
        found[: len(colours)] = [_number(colour) for colour in colours]
        return found

    def colour(self, value: float, paper: bool = False) -> str:
        return f"#{int(self.palette(paper)[self.shades(np.array([value]))[0]]) & 0xFFFFFF:06X}"

    def ticks(self, n: int = 5) -> list[tuple[float, str]]:
        """(share of the way from low to high, what stands there)."""
        shares = np.linspace(0, 1, n)
        if self.log:
            values = np.exp(np.log(self.low) + shares * (np.log(self.high) - np.log(self.low)))
        else:
            values = self.low + shares * (self.high - self.low)
        texts = [self.written(value) for value in values]
        if self.clipped[0]:
            texts[0] = f"≤ {texts[0]}"
        if self.clipped[1]:
            texts[-1] = f"≥ {texts[-1]}"
        return list(zip(shares.tolist(), texts, strict=True))

    def written(self, value: float) -> str:
        """A value as people read it; a dash where there is none."""
        if not np.isfinite(value):
            return "—"
        if self.names:
            kind = int(value)
            return self.names[kind] if 0 <= kind < len(self.names) else self.none
        if self.percent and self.kind == "cells":
            return formatting.percent(float(value), 0)
        if self.percent:
            decimals = 4 if 0 < abs(value) < 1e-4 else 2 if abs(value) < 0.1 else 1
            return formatting.percent(float(value), decimals)
        text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        return text.replace("-", "−")


def continuous(
    title: str,
    values: np.ndarray,
    *,
    unit: str = "",
    percent: bool = False,
    definition: str = "",
) -> Scale:
    """A scale from the 1st to the 99th percentile, logarithmic where values spread over more than
    two orders of magnitude; for points."""
    numbers = np.asarray(values, np.float64)
    real = numbers[np.isfinite(numbers)]
    scale = Scale(title, "points", unit=unit, percent=percent, definition=definition)
    scale = replace(scale, has_none=len(real) < len(numbers))
    if not len(real):
        return scale
    low, high = (float(v) for v in np.percentile(real, (1, 99)))
    if high <= low:
        low, high = float(real.min()), float(real.max())
    positive = real[real > 0]
    if len(positive) == len(real) and high / max(low, 1e-300) > 100:
        scale = replace(scale, log=True)
    return replace(
        scale,
        low=low,
        high=high,
        clipped=(bool(real.min() < low), bool(real.max() > high)),
    )


def _between(stops: Sequence[str], start: float, stop: float, n: int = SHADES) -> list[str]:
    places = np.linspace(start, stop, n) * (len(stops) - 1)
    found = []
    for place in places.tolist():
        index = min(int(place), len(stops) - 2)
        found.append(tokens.blend(stops[index + 1], stops[index], place - index))
    return found


def _number(colour: str) -> int:
    return 0xFF000000 | int(colour[1:], 16)
