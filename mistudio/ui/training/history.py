"""What the rows of a training say: columns for the charts, lines for the log, the newest of each
site, how fast it goes. No widgets and no Qt, so that a long history can be read in a thread."""

from __future__ import annotations

import colorsys
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistudio import formatting
from mistudio.ui.theme import tokens
from mistudio.ui.training.form import SITES, point_parts

LOG_LINES = 400  # shown; the file keeps everything
RECENT_SECONDS = 15.0  # whose speed counts as now

Row = Mapping[str, Any]
Floats = NDArray[np.float64]

# Over what curves can run, and what can be drawn over it (keys of a row with its `derived`).
PLACES = ("step", "tokens", "seconds")
VALUES = ("loss", "explained_variance", "l0", "dead", "learning_rate", "tokens_per_second")


@dataclass(frozen=True)
class History:
    """Rows of a training, taken apart.

    `columns`: for each site its `PLACES` and `VALUES` as arrays of one length (NaN where a row has
    none); `lines`: the newest of the log; `densities`: the newest of each site, with its `step`.
    """

    n_rows: int
    columns: Mapping[str, Mapping[str, Floats]] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    densities: Mapping[str, Row] = field(default_factory=dict)


def history(rows: Sequence[Row], several: bool, latents: int | None = None) -> History:
    """`several`: the log names the sites; `latents` of one site, None where not known."""
    by_site: dict[str, list[Row]] = {}
    densities: dict[str, Row] = {}
    for row in rows:
        by_site.setdefault(row["site"], []).append(row)
        if found := row.get("density"):
            densities[row["site"]] = {**found, "step": row["step"] + 1}
    columns = {site: _columns(own) for site, own in by_site.items()}
    lines = tuple(log_line(row, several, latents) for row in rows[-LOG_LINES:])
    return History(len(rows), columns, lines, densities)


def _columns(rows: Sequence[Row]) -> dict[str, Floats]:
    def column(key: str) -> Floats:
        values = (row.get(key) for row in rows)
        return np.array([math.nan if v is None else float(v) for v in values])

    found = {key: column(key) for key in ("step", "tokens", "tokens_per_second")}
    found |= {key: column(key) for key in VALUES if key not in ("explained_variance", *found)}
    found["explained_variance"] = 1.0 - column("fvu")
    with np.errstate(divide="ignore", invalid="ignore"):
        found["seconds"] = found["tokens"] / found["tokens_per_second"]
    return found


def explained_variance(row: Row) -> float | None:
    """Of the row's batch: 1 - FVU."""
    return None if row.get("fvu") is None else 1.0 - row["fvu"]


def averages(rows: Sequence[Row], key: str) -> float | None:
    """Mean over the sites of each one's newest value; None where there is none."""
    newest = {row["site"]: row[key] for row in rows if row.get(key) is not None}
    values = [value for value in newest.values() if math.isfinite(value)]
    return sum(values) / len(values) if values else None


class Throughput:
    """Tokens per second over the last `RECENT_SECONDS` of training, and what that leaves to do.

    A row's seconds are its tokens over its mean speed; pauses are in neither.
    """

    def __init__(self) -> None:
        self._places: deque[tuple[float, float]] = deque([(0.0, 0.0)])

    def add(self, row: Row) -> None:
        tokens, mean = row.get("tokens"), row.get("tokens_per_second")
        if not tokens or not mean:
            return
        if tokens <= self._places[-1][0]:  # another site's row of the same step, or rolled back
            if tokens < self._places[-1][0]:
                self._places.clear()
                self._places.append((tokens, tokens / mean))
            return
        self._places.append((tokens, tokens / mean))
        while len(self._places) > 2 and self.seconds - self._places[1][1] >= RECENT_SECONDS:
            self._places.popleft()

    @property
    def tokens(self) -> float:
        return self._places[-1][0]

    @property
    def seconds(self) -> float:
        """Of training so far."""
        return self._places[-1][1]

    @property
    def window(self) -> float:
        """Seconds that `rate` is measured over."""
        return self.seconds - self._places[0][1]

    @property
    def rate(self) -> float | None:
        tokens = self.tokens - self._places[0][0]
        return tokens / self.window if self.window > 0 and tokens > 0 else None

    def remaining(self, tokens: float) -> float | None:
        """Seconds until `tokens` have been learnt from, at this speed."""
        return max(0.0, tokens - self.tokens) / self.rate if self.rate else None


# --- words and colours ----------------------------------------------------------------------------


def site_label(name: str) -> str:
    """`L10` for the usual site, `L10 MLP output` for another."""
    site, layer = point_parts(name)
    return f"L{layer}" if site == "resid_post" else f"L{layer} {SITES.get(site, site)}"


def layer_label(name: str) -> str:
    """`Layer 10`, where `L0` would read as the number of active latents."""
    return f"Layer {site_label(name)[1:]}"


def log_line(row: Row, several: bool = False, latents: int | None = None) -> str:
    """`[12:34:56] Step 1,234, layer 10: loss=0.3421, L0=52.3, dead=143/8,192, 3,279 tokens/s`."""
    at = row.get("time")
    clock = time.strftime("[%H:%M:%S] ", time.localtime(at)) if at else ""
    where = f", {layer_label(row['site']).replace('L', 'l', 1)}" if several else ""
    of = f"/{formatting.count(latents)}" if latents else ""
    parts = [
        f"loss={_number(row, 'loss', 4)}",
        f"L0={_number(row, 'l0', 1)}",
        f"dead={_number(row, 'dead', 0)}{of}",
        f"{_number(row, 'tokens_per_second', 0)} tokens/s",
    ]
    if (heldout := row.get("heldout_fvu")) is not None:
        parts.append(f"held-out FVU={formatting.number(heldout, 4)}")
    return f"{clock}Step {formatting.count(row['step'] + 1)}{where}: {', '.join(parts)}"


def note_line(note: str, at: float | None = None) -> str:
    clock = time.strftime("[%H:%M:%S] ", time.localtime(at)) if at else ""
    return f"{clock}Note: {note}"


def _number(row: Row, key: str, decimals: int) -> str:
    return formatting.number(row.get(key), decimals)


def colours(count: int) -> list[str]:
    """A colour for each of so many curves: the theme's, or where those do not do, as many hues
    from green over blue to red, as the layers go from the first to the last."""
    if count <= len(tokens.SERIES):
        return list(tokens.SERIES[:count])
    found = []
    for number in range(count):
        hue = (0.42 + 0.58 * number / (count - 1)) % 1.0
        rgb = colorsys.hls_to_rgb(hue, 0.62 + 0.08 * (number % 2), 0.75)
        found.append("#" + "".join(f"{round(255 * channel):02X}" for channel in rgb))
    return found
