"""Runs beside each other: which settings differ, whether the comparison is fair, what is best, and
which dictionaries nobody beats in both sparsity and reconstruction.

Plain data in and out; imports neither torch nor Qt.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from mistudio.engine.training.config import Plan, TrainingConfig, option, parse

# --- settings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What a setting was in one run. `auto`: left open, `value` is what it became (None: no number
    can be told). `used` is False where the other choices give it no part."""

    value: Any = None
    auto: bool = False
    used: bool = True


def effective(config: Mapping[str, Any], plan: Plan | None) -> dict[str, Setting]:
    """Every hyper-parameter of the table as the run had it. `plan` is what `derive` made of the
    configuration; without one, what was left open has no value."""
    chosen = parse(dict(config))
    found = {}
    for entry in fields(TrainingConfig):
        value = getattr(chosen, entry.name)
        if not _applies(entry.name, chosen):
            found[entry.name] = Setting(used=False)
        elif value is None:
            found[entry.name] = Setting(_derived(entry.name, plan), auto=True)
        else:
            found[entry.name] = Setting(value)
    if chosen.width is not None:  # decides instead of the factor
        found["expansion"] = Setting(plan.d_sae / plan.d_in if plan else None, auto=True)
    if chosen.steps is not None:  # decides instead of the tokens
        tokens = plan.steps * plan.batch_size if plan else None
        found["tokens"] = Setting(tokens, auto=True)
    return found


def _applies(name: str, config: TrainingConfig) -> bool:
    conditions: Mapping[str, Sequence[Any]] = option(name).get("only", {})
    return all(getattr(config, other) in wanted for other, wanted in conditions.items())


def _derived(name: str, plan: Plan | None) -> Any:
    return getattr(plan, "d_sae" if name == "width" else name, None)


def differing(runs: Sequence[Mapping[str, Setting]]) -> list[str]:
    """The names whose values are not the same in all runs that tell them, in the order in which
    they come. A value that was chosen and the same one that was derived do not differ."""
    names = dict.fromkeys(name for run in runs for name in run)
    return [name for name in names if not _all_alike([run[name] for run in runs if name in run])]


def _all_alike(settings: Sequence[Setting]) -> bool:
    told = [(s.used, s.value, s.auto and s.value is None) for s in settings]
    return all(one == told[0] for one in told)


# --- metrics ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A figure of the final evaluation. `better` is "" where neither direction is; `sample` names
    the metric that tells the size of its sample; `form` is how it is written."""

    name: str
    label: str
    definition: str
    better: Literal["low", "high", ""]
    sample: str = "tokens"
    form: Literal["share", "number", "count"] = "number"
    decimals: int = 3
    unit: str = ""


# Definitions: engine/sae/metrics.py (ReconstructionQuality), loss.py (LossRecovered).
METRICS = (
    Metric("fvu", "FVU", "Fraction of variance unexplained: E‖x − x̂‖² / (E‖x‖² − ‖E x‖²).", "low"),
    Metric("explained_variance", "Explained variance", "1 − FVU.", "high", form="share",
           decimals=1),
    Metric("l0", "L0", "Mean number of active latents per token. Fewer is sparser, not better: "
           "it is a choice.", "", decimals=1),
    Metric("ce_increase", "CE increase", "Cross-entropy with the SAE in place of the activation "
           "less that of the untouched model.", "low", "loss_tokens", unit="nats"),
    Metric("ce_loss_score", "CE loss recovered", "(CE zero − CE SAE) / (CE zero − CE clean).",
           "high", "loss_tokens", "share", 1),
    Metric("kl", "KL divergence", "E KL(p clean ‖ p SAE) over the vocabulary.", "low",
           "loss_tokens", unit="nats"),
    Metric("dead_share", "Dead share", "Share of latents that fired on none of the tokens.", "low",
           form="share", decimals=1),
    Metric("dense_share", "Dense share", "Share of latents that fired on more than 10 % of the "
           "tokens.", "low", form="share", decimals=1),
    Metric("cosine", "Cosine", "Mean cosine of activation and reconstruction.", "high"),
    Metric("l2_ratio", "Norm ratio", "Mean ‖x̂‖ / ‖x‖; 1 is unshrunk.", ""),
    Metric("tokens", "Held-out tokens", "Tokens of held-out text that it was judged on.", "",
           form="count", decimals=0),
    Metric("loss_tokens", "Predictions", "Held-out predictions that the cross-entropies are over.",
           "", form="count", decimals=0),
)  # fmt: skip


def finite(value: Any) -> float | None:
    """A number, or None for what is none (also NaN, infinity and switches)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def best(values: Sequence[float | None], better: Literal["low", "high", ""]) -> frozenset[int]:
    """Where the best values stand; nowhere without a better direction, with fewer than two numbers,
    or where all are the same."""
    numbers = {place: v for place, value in enumerate(values) if (v := finite(value)) is not None}
    if not better or len(numbers) < 2 or len(set(numbers.values())) == 1:
        return frozenset()
    goal = min(numbers.values()) if better == "low" else max(numbers.values())
    return frozenset(place for place, value in numbers.items() if value == goal)


def pareto_front(points: Sequence[tuple[float | None, float | None]]) -> list[int]:
    """Which of (L0, FVU) no other dominates (is at most as large in both, smaller in one), sparsest
    first. Points that lack a number are on no front; equal points share theirs."""
    order = sorted(
        (x, y, place)
        for place, (l0, fvu) in enumerate(points)
        if (x := finite(l0)) is not None and (y := finite(fvu)) is not None
    )
    front: list[int] = []
    lowest, at = math.inf, math.nan
    for x, y, place in order:
        if y < lowest or (y == lowest and x == at):
            front.append(place)
            lowest, at = y, x
    return front


# --- fairness -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """What must be the same for figures to be compared, and why."""

    name: str
    label: str
    why: str


CONDITIONS = (
    Condition("model", "model", "every model has activations of its own"),
    Condition("reads", "hook point", "activations of other places are harder or easier to explain"),
    Condition("writes", "reconstructed hook point", "they reconstruct different activations"),
    Condition("precision", "precision of the model", "rounding changes the activations"),
    Condition("dataset", "dataset", "they are judged on different text"),
    Condition("tokenisation", "tokenisation", "they are judged on different tokens"),
    Condition("context", "context length", "tokens are seen with more or less before them"),
    Condition("tokens", "number of held-out tokens", "the samples differ in size"),
    Condition("loss_tokens", "number of predictions", "the samples of the loss differ in size"),
)
# Where one of these differs, points of a Pareto plot are not joined and no value is the best.
INCOMPARABLE = ("model", "reads", "writes")


def unfair(subjects: Sequence[Mapping[str, Any]]) -> list[Condition]:
    """The conditions that are known to differ between the subjects (name of a condition -> value;
    None or missing: not known)."""
    return [
        condition
        for condition in CONDITIONS
        if len({repr(v) for s in subjects if (v := s.get(condition.name)) is not None}) > 1
    ]


def comparable_groups(subjects: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The subjects in groups of the same model and hook points, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, subject in enumerate(subjects):
        groups.setdefault(tuple(subject.get(name) for name in INCOMPARABLE), []).append(place)
    return list(groups.values())


# --- histories ----------------------------------------------------------------------------------

AXES = ("tokens", "step", "seconds")
CURVES = ("loss", "fvu", "heldout_fvu", "l0", "dead_share", "learning_rate")
DRAWN = 2000  # points of a curve


class History:
    """The metric rows of a run as columns, all of them, by site."""

    def __init__(self, latents: Mapping[str, int] | int = 0) -> None:
        """`latents`: the size of each site's dictionary, of which dead latents are a share."""
        self._latents = latents
        self._columns: dict[str, dict[str, array[float]]] = {}
        self.n_rows = 0

    @property
    def sites(self) -> list[str]:
        return list(self._columns)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows as a run records them; a row without a site is left out."""
        for row in rows:
            self.n_rows += 1
            site = row.get("site")
            if not isinstance(site, str):
                continue
            if site not in self._columns:
                self._columns[site] = {name: array("d") for name in (*AXES, *CURVES)}
            for name, column in self._columns[site].items():
                value = self._value(site, row, name)
                column.append(math.nan if value is None else value)

    def _value(self, site: str, row: Mapping[str, Any], name: str) -> float | None:
        if name == "seconds":  # of training: pauses do not count
            tokens, speed = finite(row.get("tokens")), finite(row.get("tokens_per_second"))
            return tokens / speed if tokens is not None and speed else None
        if name == "dead_share":
            known = self._latents
            latents = known if isinstance(known, int) else known.get(site, 0)
            dead = finite(row.get("dead"))
            return dead / latents if dead is not None and latents else None
        return finite(row.get(name))

    def curve(self, site: str, name: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """x [n] and y [n] of every row that has both."""
        columns = self._columns.get(site)
        if columns is None:
            return np.empty(0), np.empty(0)
        x, y = (np.array(columns[key], dtype=np.float64) for key in (axis, name))
        both = np.isfinite(x) & np.isfinite(y)
        return x[both], y[both]


def thinned(x: np.ndarray, y: np.ndarray, most: int = DRAWN) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` (4 or more) points that look the same: the first, the last, and the lowest and
    the highest of each of equal stretches between."""
    n = len(x)
    if n <= most:
        return x, y
    size = -(-n // ((most - 2) // 2))
    whole = n // size * size
    blocks = y[:whole].reshape(-1, size)
    starts = np.arange(0, whole, size)
    found = [starts + blocks.argmin(1), starts + blocks.argmax(1), [0, n - 1]]
    if whole < n:
        found.append([whole + y[whole:].argmin(), whole + y[whole:].argmax()])
    places = np.unique(np.concatenate(found))
    return x[places], y[places]
