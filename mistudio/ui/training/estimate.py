"""What a training would need before it starts, in words: steps, memory, disk, time, advice.

The figures come from `engine.training.planning`, which computes them from shapes; this module
brings what is known here of the model and the computer, and imports no torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mistudio import formatting
from mistudio.engine.models.loading import ModelSummary
from mistudio.engine.training.config import Plan
from mistudio.engine.training.cost import WEIGHT_BYTES, DeviceSpeed, model_shape
from mistudio.engine.training.footprint import Machine, PlannedSite, RunShape
from mistudio.engine.training.planning import Measured, RunPlan, describe, plan_run

if TYPE_CHECKING:
    from mistudio.ui.training.form import Form

# `mistudio.jobs.sources.PHASE_TOKENS`, written out: that module is slow to import.
PORTION = 1_000_000
# The form's sources -> the plan's.
RUN_SOURCES = {"auto": "stream", "extract": "extract", "hybrid": "hybrid"}


@dataclass(frozen=True)
class Computer:
    """What a training runs on. `precision` is what its model is loaded in; `no_8bit` says why 8-bit
    optimisers cannot run, "" where they can or where nobody has looked yet."""

    machine: Machine
    precision: str = "fp32"
    no_8bit: str = ""


UNKNOWN = Measured()


@dataclass(frozen=True)
class Corpus:
    """How long the dataset is in this model's tokens: what is trained on, what is held out; None
    where it is not tokenised yet."""

    train: int | None = None
    heldout: int | None = None


@dataclass(frozen=True)
class Pace:
    """How fast a training goes, and how that is known: `basis` is "measured" (two seconds of it),
    "earlier run" (the same sizes) or "computed" (from what the device does in a second).

    `tokens_per_second` is that of model and training together, None where it is computed; `spread`
    is how far repeats were apart, relative; `at` is when, in seconds of `time.time`.
    """

    basis: str
    measured: Measured = UNKNOWN
    device: DeviceSpeed | None = None
    tokens_per_second: float | None = None
    spread: float = 0.0
    at: float | None = None


@dataclass(frozen=True)
class Estimate:
    """`work`, `needs` and `time` are lines to show, `advice` sentences for where something is
    short, `details` the parts of the figures for whoever asks. `run` is the engine's plan behind
    them; `pace` what the time was told from."""

    work: str = ""
    needs: str = ""
    time: str = ""
    advice: tuple[str, ...] = ()
    details: tuple[str, ...] = ()
    run: RunPlan | None = None
    pace: Pace | None = None

    @property
    def measured(self) -> bool:
        """Whether something of these sizes has run, so that a measurement would add little."""
        return self.pace is not None and self.pace.basis != "computed"


NOTHING = Estimate()


def estimate(
    form: Form,
    plan: Plan,
    corpus: Corpus,
    pace: Pace | None,
    computer: Computer | None,
) -> Estimate:
    """Of a form without errors, whose every site has `plan`."""
    run = planned_run(form, plan, corpus, pace, computer) if computer else None
    return Estimate(
        work=_work(form, plan, corpus.train),
        needs=_needs(run),
        time=_time(run, pace),
        advice=run.advice if run else (),
        details=tuple(describe(run)) if run else (),
        run=run,
        pace=pace,
    )


def planned_run(
    form: Form, plan: Plan, corpus: Corpus, pace: Pace | None, computer: Computer
) -> RunPlan | None:
    """None where the model's row does not say enough about it (one of an older version)."""
    assert form.model is not None
    try:
        summary = ModelSummary(**form.model.summary)
    except TypeError:
        return None
    source = "stored" if form.extraction else RUN_SOURCES[form.source]
    site = "mlp_in" if form.is_transcoder else form.site
    run = RunShape(
        model_shape(summary, WEIGHT_BYTES[computer.precision]),
        tuple(PlannedSite(layer, site, plan) for layer in form.layers),
        source=source,
        stored_tokens=None if source == "stream" else _stored_tokens(form, plan, corpus.train),
    )
    if corpus.heldout:
        run = replace(run, heldout_tokens=corpus.heldout)
    pace = pace or Pace("")
    return plan_run(run, computer.machine, pace.device, pace.measured)


def _stored_tokens(form: Form, plan: Plan, corpus_tokens: int | None) -> int:
    """At a time; a text that is read more than once is stored once."""
    wanted = plan.steps * plan.batch_size
    whole = min(wanted, corpus_tokens or wanted)
    return min(whole, PORTION) if form.source == "hybrid" else whole


def _work(form: Form, plan: Plan, corpus_tokens: int | None) -> str:
    sites = len(form.layers)
    parts = [
        f"{formatting.count(plan.d_sae)} latents on {formatting.count(plan.d_in)} dimensions"
        + (f" at each of {sites} layers" if sites > 1 else ""),
        f"{formatting.count(plan.steps)} steps of {formatting.count(plan.batch_size)} tokens",
        f"learning rate {rate(plan.learning_rate)}",
    ]
    if corpus_tokens:
        passes = plan.steps * plan.batch_size / corpus_tokens
        parts.append(f"{passes:.1f} passes over the text" if passes > 1 else "less than one pass")
    return " • ".join(parts)


def _needs(run: RunPlan | None) -> str:
    if run is None:
        return ""
    machine = run.machine
    kind = "memory" if machine.host_free is None else "GPU memory"
    parts = [f"About {_size(run.memory)} of {kind} ({_size(machine.memory_free)} free)"]
    if machine.host_free is not None:
        parts.append(f"{_size(run.host_memory)} of main memory ({_size(machine.host_free)} free)")
    parts.append(f"{_size(run.disk)} of disk ({_size(machine.disk_free)} free)")
    return " • ".join(parts)


# The estimate is never closer than this, however even the measurement was: two seconds do not see
# what else the computer will do.
LEAST_SPREAD = 0.15


def _time(run: RunPlan | None, pace: Pace | None) -> str:
    """How long, and how that is known: `About 11 min ± 2 min`."""
    if run is None or run.seconds is None or pace is None:
        return "Time: not measured yet"
    told = rough_duration(run.seconds)
    if pace.basis == "computed":
        return f"Roughly {told}"
    more = run.seconds * max(LEAST_SPREAD, pace.spread)
    return f"About {told} ± {rough_duration(more)}"


def method(pace: Pace | None, now: float | None = None) -> str:
    """How the time is known: `Measured 12 s ago: 1,480 tokens/s`."""
    if pace is None:
        return ""
    if pace.basis == "computed":
        return "Computed from this device's speed"
    speed = f"{formatting.count(pace.tokens_per_second or 0)} tokens/s"
    if pace.basis == "earlier run":
        return f"From an earlier run of this size: {speed}"
    return f"Measured {_ago((now or time.time()) - (pace.at or 0))}: {speed}"


def _ago(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s ago"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min ago"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.0f} h ago"
    return f"{seconds / 86400:.0f} days ago"


def _size(n_bytes: float) -> str:
    return formatting.size(rough(n_bytes))


def rate(value: float) -> str:
    """A learning rate: `3e-4`, `3.3e-4`."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def rough(n_bytes: float) -> float:
    """An estimate to two digits: more would claim to know."""
    unit = 1.0
    while n_bytes / unit >= 1024:
        unit *= 1024
    value = n_bytes / unit
    return unit * (round(value) if value >= 10 else round(value, 1))


def rough_duration(seconds: float) -> str:
    """An estimate: whole minutes from ten minutes on."""
    if seconds < 600:
        return formatting.duration(seconds)
    return formatting.duration(60 * round(seconds / 60)).removesuffix(" 00 s")
