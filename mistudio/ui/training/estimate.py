"""What a training would need before it starts, in words: steps, memory, disk, time, advice.

The figures come from `engine.training.planning`, which computes them from shapes; this module
brings what is known here of the model and the computer, and imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistudio import formatting
from mistudio.engine.models.loading import ModelSummary
from mistudio.engine.training.config import Plan
from mistudio.engine.training.cost import WEIGHT_BYTES, model_shape
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


@dataclass(frozen=True)
class Estimate:
    """`work` and `needs` are lines to show, `advice` sentences for where something is short,
    `details` the parts of the figures for whoever asks."""

    work: str = ""
    needs: str = ""
    advice: tuple[str, ...] = ()
    details: tuple[str, ...] = ()


NOTHING = Estimate()


def estimate(
    form: Form,
    plan: Plan,
    corpus_tokens: int | None,
    speed: float | None,
    computer: Computer | None,
) -> Estimate:
    """Of a form without errors, whose every site has `plan`."""
    run = planned_run(form, plan, corpus_tokens, speed, computer) if computer else None
    return Estimate(
        work=_work(form, plan, corpus_tokens),
        needs=_needs(plan, speed, run),
        advice=run.advice if run else (),
        details=tuple(describe(run)) if run else (),
    )


def planned_run(
    form: Form, plan: Plan, corpus_tokens: int | None, speed: float | None, computer: Computer
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
        stored_tokens=None if source == "stream" else _stored_tokens(form, plan, corpus_tokens),
    )
    return plan_run(run, computer.machine, measured=Measured(overall=speed))


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


def _needs(plan: Plan, speed: float | None, run: RunPlan | None) -> str:
    parts = []
    if run:
        machine = run.machine
        kind = "memory" if machine.host_free is None else "GPU memory"
        parts.append(f"About {_size(run.memory)} of {kind} ({_size(machine.memory_free)} free)")
        if machine.host_free is not None:
            free = _size(machine.host_free)
            parts.append(f"{_size(run.host_memory)} of main memory ({free} free)")
        parts.append(f"{_size(run.disk)} of disk")
    if speed:
        took = rough_duration(plan.steps * plan.batch_size / speed)
        parts.append(f"about {took} at the speed of the last run with this model")
    return " • ".join(parts)


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
