"""What measurements mean, in plain words: a light for each quality of a finished dictionary, and a
warning about a run that is clearly failing.

The limits are conventions, not laws: about what published dictionaries of residual streams reach at
an L0 of 30 to 100. They are told with every verdict.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

Level = Literal["good", "fair", "poor"]

# (good up to, fair up to) where less is better.
FVU_LIMITS = (0.25, 0.5)
DEAD_LIMITS = (0.01, 0.1)
L0_LIMITS = (0.1, 0.5)  # |L0 / target - 1|
CE_LIMITS = (0.95, 0.8)  # (good from, fair from) of the loss recovered

# A run is judged once it has had the time to learn something.
EARLIEST_STEP, EARLIEST_SHARE = 50, 0.1
RECENT = 5  # rows whose median counts as now


@dataclass(frozen=True)
class Light:
    """One quality: `level`, the measured `value`, `why` with its limits, and what would help
    (empty where nothing needs to)."""

    name: str
    level: Level
    value: float
    why: str
    remedy: str = ""


def lights(metrics: Mapping[str, Any], k: float, config: Mapping[str, Any]) -> list[Light]:
    """A light for each of FVU, L0, dead share and loss recovered that was measured.

    `metrics`: of the final evaluation (`engine.sae.metrics`, `engine.sae.loss`); `k`: the target
    L0, 0 where there is none; `config`: the training's options, empty for an imported SAE.
    """
    found = [
        _fvu(metrics.get("fvu"), config),
        _l0(metrics.get("l0"), k),
        _dead(metrics.get("dead_share"), config),
        _recovered(metrics.get("ce_loss_score"), metrics.get("fvu")),
    ]
    return [light for light in found if light is not None]


def _level(value: float, limits: tuple[float, float]) -> Level:
    return "good" if value <= limits[0] else "fair" if value <= limits[1] else "poor"


def _fvu(value: float | None, config: Mapping[str, Any]) -> Light | None:
    if value is None:
        return None
    level = _level(value, FVU_LIMITS)
    why = f"{value:.0%} of the variance is not explained (good: up to {FVU_LIMITS[0]:.0%})."
    remedy = ""
    if level != "good":
        remedy = "Train on more tokens first; then try more latents or a higher target L0."
        if value >= 1:
            remedy = "It is worse than the mean activation: lower the learning rate."
        elif config.get("l1_coefficient"):
            remedy = "Lower the L1 coefficient, or leave it open so that it is steered."
    return Light("FVU", level, value, why, remedy)


def _l0(value: float | None, k: float) -> Light | None:
    if value is None or not k:
        return None
    off = value / k - 1
    level = _level(abs(off), L0_LIMITS)
    side = "above" if off > 0 else "below"
    why = (
        f"{value:.1f} latents are active per token, {abs(off):.0%} {side} the target of {k:g} "
        f"(good: within {L0_LIMITS[0]:.0%})."
    )
    remedy = ""
    if level != "good":
        remedy = (
            "Train longer so that the sparsity settles, or raise the L1 coefficient."
            if off > 0
            else "Lower the L1 coefficient, or leave it open so that it is steered to the target."
        )
    return Light("L0", level, value, why, remedy)


def _dead(value: float | None, config: Mapping[str, Any]) -> Light | None:
    if value is None:
        return None
    level = _level(value, DEAD_LIMITS)
    why = f"{value:.1%} of the latents never fired (good: up to {DEAD_LIMITS[0]:.0%})."
    remedy = ""
    if level != "good":
        care = config.get("auxk", True) and config.get("revive", True)
        remedy = "Choose fewer latents or train on more text."
        if not care:
            remedy = "Switch the care for dead latents on (AuxK and re-initialisation)."
        elif config.get("learning_rate"):
            remedy = "Leave the learning rate open: a rate too low or too high kills latents."
    return Light("Dead share", level, value, why, remedy)


def _recovered(value: float | None, fvu: float | None) -> Light | None:
    if value is None:
        return None
    level = _level(-value, (-CE_LIMITS[0], -CE_LIMITS[1]))
    why = f"{value:.1%} of the model's loss is recovered (good: {CE_LIMITS[0]:.0%} and more)."
    remedy = ""
    if level != "good":
        remedy = "Improve the FVU first: more tokens, more latents or a higher target L0."
        if fvu is not None and fvu <= FVU_LIMITS[0]:
            remedy = (
                "The variance is explained and yet the model suffers: what it needs here lies in "
                "small directions. Raise the target L0 or choose another layer."
            )
    return Light("CE loss recovered", level, value, why, remedy)


@dataclass(frozen=True)
class FailingRun:
    """A run that will not give a usable dictionary: what is seen, and what to change."""

    site: str
    why: str
    remedy: str


class Watch:
    """Looks at the measurements of one site as they come and says where the run is clearly failing.

    `steps`, `d_sae`, `k`: of its plan; `priced`: sparsity by a price (L1, JumpReLU, Gated) instead
    of a fixed number of active latents.
    """

    def __init__(self, site: str, steps: int, d_sae: int, k: float, priced: bool) -> None:
        self._site, self._steps, self._d_sae, self._k = site, steps, d_sae, k
        self._priced = priced
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=RECENT)
        self._count = 0
        self._best = math.inf  # of the medians of `RECENT` rows that follow one another

    def add(self, rows: Iterable[Mapping[str, Any]]) -> FailingRun | None:
        """Rows with step, fvu, l0, dead, oldest first; what is to be said after the last one."""
        for row in rows:
            self._recent.append(row)
            self._count += 1
            if self._count % RECENT == 0:
                self._best = min(self._best, self._now("fvu"))
        if self._count < 2 * RECENT:
            return None
        return self._judged(self._recent[-1]["step"])

    def _now(self, key: str) -> float:
        return median(row[key] for row in self._recent)

    def _judged(self, step: int) -> FailingRun | None:
        if step < max(EARLIEST_STEP, EARLIEST_SHARE * self._steps):
            return None
        fvu, l0, dead = self._now("fvu"), self._now("l0"), self._now("dead") / self._d_sae
        slower = "Stop and lower the learning rate, or leave it open."
        if not fvu < 1:
            why = (
                f"After {step:,} steps the reconstruction is worse than the mean activation "
                f"(FVU {fvu:.2f})."
            )
            return FailingRun(self._site, why, slower)
        if fvu > 1.5 * self._best and fvu > FVU_LIMITS[1]:
            why = f"The FVU rises: it was {self._best:.2f} and is {fvu:.2f} now."
            return FailingRun(self._site, why, slower)
        if dead > 0.5 and step >= 0.25 * self._steps:
            return FailingRun(
                self._site,
                f"{dead:.0%} of the latents are dead.",
                "Stop, choose fewer latents and switch the care for dead latents on.",
            )
        if self._priced and l0 > 10 * self._k and step >= 0.5 * self._steps:
            return FailingRun(
                self._site,
                f"{l0:.0f} latents are active per token; the target is {self._k:g}.",
                "Stop and raise the L1 coefficient, or leave it open so that it is steered.",
            )
        return None
