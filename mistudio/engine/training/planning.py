"""A training run's plan before it starts: memory, disk and time, and what to do where it does not
fit.

All figures are computed from shapes; nothing is loaded, allocated or measured here, and torch is
not imported, so the window may ask at every change of a form. What the device has free is the
caller's to measure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mistudio.engine.training.config import TrainingConfig, derive
from mistudio.engine.training.cost import (
    FLOAT,
    DeviceSpeed,
    Work,
    deepest,
    encode_cost,
    forward_cost,
    step_cost,
)
from mistudio.engine.training.footprint import (
    CALIBRATION_TOKENS,
    PORTION_TOKENS,
    Machine,
    Part,
    Phase,
    PlannedSite,
    RunShape,
    disk_parts,
    evaluation_tokens,
    extraction_bytes,
    memory_phases,
    needs,
    stored_tokens,
)
from mistudio.errors import OutOfMemory

SMALL_DEVICE = 8 * 1024**3  # bytes; no more than `SMALL_LAYERS` layers at a time up to here
SMALL_LAYERS = 4
EVALUATIONS = 20  # of a run, on its way
# Forward passes of the whole model for one dictionary's loss: a survey, the clean one, with the
# dictionary, with zeros, with the mean; on so many tokens.
LOSS_PASSES, LOSS_TOKENS = 5, 8192
LEAST_STORED = 20_000  # tokens; in smaller portions a model is loaded more than it is used
RESERVE = 0.1  # of what is needed must stay free on top: the figures may be that far off


@dataclass(frozen=True)
class Measured:
    """Speeds of runs with the same shapes, tokens/s; None where there is none.

    `forward`: the model up to the deepest site, its activations handed on; `step`: training of all
    sites together; `overall`: both as they ran, with the judgements on the way. `encode`: one
    finished dictionary on tokens to be judged; `whole`: the whole model with its logits.
    """

    forward: float | None = None
    step: float | None = None
    overall: float | None = None
    encode: float | None = None
    whole: float | None = None


@dataclass(frozen=True)
class RunPlan:
    """What a run needs, and whether that is there.

    `memory` in bytes is the device's at the fullest moment, `host_memory` the main memory beside
    it (0 where they are the same); `disk` in bytes; `seconds` None where no speed is known, with
    `time_basis` "measured", "cost model" or "". `layers` is how many to train at a time: all, or
    as many as fit. `advice` is in plain sentences, empty where there is nothing to say.
    """

    run: RunShape
    machine: Machine
    phases: tuple[Phase, ...]
    disk_parts: tuple[Part, ...]
    time_parts: tuple[Part, ...]
    time_basis: str
    memory: float
    host_memory: float
    disk: float
    seconds: float | None
    fits: bool
    disk_fits: bool
    layers: int
    advice: tuple[str, ...]

    @property
    def fullest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.bytes("device"))

    def require(self) -> None:
        """Raise `OutOfMemory` where the run does not fit into memory."""
        if self.fits:
            return
        raise OutOfMemory(
            "The run does not fit into memory",
            f"It needs {_size(self.memory)} and {_size(self.machine.memory_free)} are free.",
            " ".join(self.advice),
        )


def planned_sites(
    config: TrainingConfig, places: Iterable[tuple[int, str]], width: int
) -> tuple[PlannedSite, ...]:
    """The sites of a run at these (layer, site) of a model of `width` channels. Raises
    InvalidInput as `derive` does."""
    return tuple(PlannedSite(layer, site, derive(config, width)) for layer, site in places)


def plan_run(
    run: RunShape,
    machine: Machine,
    speed: DeviceSpeed | None = None,
    measured: Measured | None = None,
) -> RunPlan:
    """The plan of `run` on `machine`. Time comes from `measured` where it is given, else from the
    cost model with `speed` (`cost.probe_device`), else it is left open."""
    phases = memory_phases(run, machine)
    on_disk = disk_parts(run)
    time_parts, basis = _time(run, speed, measured or Measured())
    memory, host = needs(phases)
    disk = _disk(run)
    layers, advice = _advise(run, machine, memory, host, disk)
    return RunPlan(
        run=run,
        machine=machine,
        phases=phases,
        disk_parts=on_disk,
        time_parts=time_parts,
        time_basis=basis,
        memory=memory,
        host_memory=host,
        disk=disk,
        seconds=sum(part.value for part in time_parts) if time_parts else None,
        fits=_fits(memory, host, machine),
        disk_fits=disk <= machine.disk_free,
        layers=layers,
        advice=tuple(advice),
    )


def fits(run: RunShape, machine: Machine) -> bool:
    """Whether memory is enough, with something in reserve."""
    return _fits(*needs(memory_phases(run, machine)), machine)


def _fits(memory: float, host: float, machine: Machine) -> bool:
    room = 1 + RESERVE
    return memory * room <= machine.memory_free and (
        machine.host_free is None or host * room <= machine.host_free
    )


# -------------------------------------------------------------------- time


def _time(
    run: RunShape, speed: DeviceSpeed | None, measured: Measured
) -> tuple[tuple[Part, ...], str]:
    if measured.overall:
        parts = [Part("training", run.tokens / measured.overall, "seconds", "")]
        judging = _judging_seconds(run, speed, measured, evaluations=0)
        if judging is not None:
            parts.append(Part("judging", judging, "seconds", ""))
        return tuple(parts), "measured"
    # How often a model is loaded again for its next portion is not counted.
    passes = {"extract": stored_tokens(run), "stored": 0}.get(run.source, run.tokens)
    forward = _forward_seconds(run, speed, measured, passes)
    steps = _step_seconds(run, speed, measured)
    if forward is None or steps is None:
        return (), ""
    known = (measured.forward is not None or not passes) + (measured.step is not None)
    basis = ("cost model", "measured and cost model", "measured")[known]
    parts = [
        Part("model", forward, "seconds", ""),
        Part("training", sum(steps), "seconds", "", tuple(steps)),
    ]
    judging = _judging_seconds(run, speed, measured)
    if judging is not None:
        parts.append(Part("judging", judging, "seconds", ""))
    return tuple(part for part in parts if part.value), basis


def _forward_seconds(
    run: RunShape, speed: DeviceSpeed | None, measured: Measured, tokens: int
) -> float | None:
    """Of running the model over `tokens` and handing their activations on."""
    if not tokens:
        return 0.0
    if measured.forward:
        return tokens / measured.forward
    if speed is None:
        return None
    layer, site = deepest([site.deepest for site in run.sites])
    batch = run.capture_tokens
    cost = forward_cost(run.model, layer, site, run.plan.config.context, batch)
    # Captured, picked, put into the buffer and taken out of it: eight times read or written.
    moved = 8.0 * batch * run.model.weight_bytes * sum(site.channels for site in run.sites)
    seconds = cost.seconds(speed) + Work("hand on", moved=moved).seconds(speed)
    return seconds * tokens / batch


def _judging_seconds(
    run: RunShape, speed: DeviceSpeed | None, measured: Measured, evaluations: int = EVALUATIONS
) -> float | None:
    """Calibration, the judgements on the way and at the end, and the loss with each dictionary
    spliced in; None where a part of it is not known."""
    tokens = calibration_tokens(run) + run.heldout_tokens
    seconds: float | None = 0.0
    if run.source == "stream":
        seconds = _forward_seconds(run, speed, measured, tokens)
    tokens += evaluations * evaluation_tokens(run)
    encode, loss = (
        _encode_seconds(run, speed, measured, tokens),
        _loss_seconds(run, speed, measured),
    )
    if seconds is None or encode is None or loss is None:
        return None
    return seconds + encode + LOSS_PASSES * len(run.sites) * loss


def calibration_tokens(run: RunShape) -> int:
    """Training tokens that thresholds are set on at the end (`finish.calibrate`)."""
    if run.plan.config.sparsity not in ("batchtopk", "matryoshka", "jumprelu"):
        return 0
    return min(CALIBRATION_TOKENS, max(8192, run.tokens))


def _encode_seconds(
    run: RunShape, speed: DeviceSpeed | None, measured: Measured, tokens: int
) -> float | None:
    """Of every site's finished dictionary on `tokens`."""
    if measured.encode:
        return len(run.sites) * tokens / measured.encode
    if speed is None:
        return None
    plans = [site.plan for site in run.sites]
    return sum(
        encode_cost(plan.d_in, plan.d_out, plan.d_sae, plan.k, tokens).seconds(speed)
        for plan in plans
    )


def _loss_seconds(run: RunShape, speed: DeviceSpeed | None, measured: Measured) -> float | None:
    """Of one pass of the whole model, for a dictionary's loss."""
    if measured.whole:
        return LOSS_TOKENS / measured.whole
    if speed is None:
        return None
    whole = forward_cost(
        run.model, run.model.n_layers, "resid_pre", run.plan.config.context, LOSS_TOKENS
    )
    products = 2.0 * LOSS_TOKENS * run.model.d_model * run.model.vocab_size
    half = run.model.weight_bytes < FLOAT
    logits = Work("logits", half_flops=products) if half else Work("logits", flops=products)
    return whole.seconds(speed) + logits.seconds(speed)


def _step_seconds(
    run: RunShape, speed: DeviceSpeed | None, measured: Measured
) -> list[float] | None:
    """Per site. Latents that die cost extra for AuxK; the plan counts none."""
    if measured.step:
        each = run.tokens / measured.step / len(run.sites)
        return [each] * len(run.sites)
    if speed is None:
        return None
    return [step_cost(site.plan).seconds(speed) * site.plan.steps for site in run.sites]


# -------------------------------------------------------------------- advice


def _advise(
    run: RunShape, machine: Machine, memory: float, host: float, disk: float
) -> tuple[int, list[str]]:
    """How many layers to train at a time, and what to say."""
    allowed = SMALL_LAYERS if machine.memory_total <= SMALL_DEVICE else run.layers
    layers = _fitting_layers(run, machine, min(allowed, run.layers))
    advice = []
    if layers < run.layers:
        if not layers:
            advice += _where_not_one_fits(run, machine, min(allowed, run.layers))
        elif _fits(memory, host, machine):
            advice.append(
                f"This device has {_size(machine.memory_total)} of memory: train at most "
                f"{_count(allowed)} layers at a time."
            )
        else:
            advice.append(
                f"{_shortage(run, memory, host, machine)}: train {_count(layers)} at a time."
            )
            advice += _or_extract(run, machine, allowed)
    if disk > machine.disk_free:
        advice.append(_disk_advice(run, machine, disk))
    return layers, advice


def _fitting_layers(run: RunShape, machine: Machine, most: int) -> int:
    for layers in range(most, 0, -1):
        if fits(run.first(layers), machine):
            return layers
    return 0


def _shortage(run: RunShape, memory: float, host: float, machine: Machine) -> str:
    count = _count(run.layers).capitalize()
    layers = "layer needs" if run.layers == 1 else "layers need"
    if memory * (1 + RESERVE) > machine.memory_free or machine.host_free is None:
        return (
            f"{count} {layers} {_size(memory)}{_reserve(memory, machine.memory_free)} and "
            f"{_size(machine.memory_free)} are free"
        )
    return (
        f"{count} {layers} {_size(host)} of main memory{_reserve(host, machine.host_free)} and "
        f"{_size(machine.host_free)} are free"
    )


def _reserve(need: float, free: float) -> str:
    return ", a tenth in reserve" if need <= free else ""


def _or_extract(run: RunShape, machine: Machine, allowed: int) -> list[str]:
    """Storing the activations first, where that lets more layers fit."""
    if run.source != "stream" or run.layers > allowed:
        return []
    other = _extracted(run, machine)
    memory, host = needs(memory_phases(other, machine))
    disk = _disk(other)
    if not _fits(memory, host, machine) or disk > machine.disk_free:
        return []
    return [
        f"Or extract first, then train: all {_count(run.layers)} layers then need "
        f"{_size(memory)}, and {_size(disk)} of disk{_in_portions(other)}."
    ]


def _extracted(run: RunShape, machine: Machine) -> RunShape:
    """The run with its activations stored first: all of them or, in turn with the training, as
    many as there is room for."""
    whole = replace(run, source="extract")
    if _disk(whole) <= machine.disk_free:
        return whole
    room = max(LEAST_STORED, _storable(whole, machine))
    return replace(run, source="hybrid", stored_tokens=min(PORTION_TOKENS, room))


def _storable(run: RunShape, machine: Machine) -> int:
    """Tokens for which there is room on the disk beside everything else, whole thousands."""
    per_token = extraction_bytes(1, sum(site.channels for site in run.sites))
    rest = _disk(run) - per_token * stored_tokens(run)
    return int((machine.disk_free - rest) / per_token / (1 + RESERVE)) // 1000 * 1000


def _in_portions(run: RunShape) -> str:
    if run.source != "hybrid":
        return ""
    return f", in portions of {stored_tokens(run):,} tokens"


def _disk(run: RunShape) -> float:
    return sum(part.value for part in disk_parts(run))


def _where_not_one_fits(run: RunShape, machine: Machine, allowed: int) -> list[str]:
    """The smallest change with which one layer fits: another order of work, smaller batches, a
    smaller dictionary, a smaller model."""
    one = run.first(1)
    memory, host = needs(memory_phases(one, machine))
    said = _shortage(one, memory, host, machine)
    other = replace(run, source="extract")
    most = _fitting_layers(other, machine, allowed) if run.source == "stream" else 0
    if not most:
        return [f"{said}. {_smaller(one, machine)}"]
    chosen = _extracted(run.first(most), machine)
    memory, _ = needs(memory_phases(chosen, machine))
    at_a_time = "" if most == run.layers else f", {_count(most)} at a time"
    return [
        f"{said}. Extract first, then train{at_a_time}: the model and its dictionaries are then "
        f"not in memory together; that needs {_size(memory)}, and {_size(_disk(chosen))} of disk"
        f"{_in_portions(chosen)}."
    ]


def _smaller(one: RunShape, machine: Machine) -> str:
    """What to make smaller, in a sentence."""
    weights = one.model.bytes * (1 + RESERVE)
    if weights > machine.memory_free:
        half = (
            f", or load it in half precision ({_size(one.model.parameters * 2)})"
            if one.model.weight_bytes == 4
            else ""
        )
        return f"The model alone needs {_size(one.model.bytes)}: choose a smaller one{half}."
    sources = ("stream", "extract") if one.source == "stream" else (one.source,)
    for width in _halvings(one.plan.d_sae, one.plan.k + 1):
        for batch in _halvings(one.plan.batch_size, 256):
            for source in sources:
                other = resized(replace(one, source=source), width, batch)
                if fits(other, machine):
                    return _change(one, other)
    return "Choose a smaller model, or a device with more memory."


def _halvings(value: int, least: int) -> list[int]:
    found = [value]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return found


def resized(run: RunShape, width: int, batch: int | None = None) -> RunShape:
    """The run with dictionaries of `width` latents, in batches of at most `batch` tokens."""
    sites = tuple(
        replace(
            site,
            plan=replace(
                site.plan,
                batch_size=min(batch or site.plan.batch_size, site.plan.batch_size),
                d_sae=width,
            ),
        )
        for site in run.sites
    )
    return replace(run, sites=sites)


def _change(before: RunShape, after: RunShape) -> str:
    changes = []
    if after.source != before.source:
        changes.append("extract first, then train")
    if after.plan.batch_size < before.plan.batch_size:
        changes.append(f"take batches of {after.plan.batch_size:,} tokens")
    if after.plan.d_sae < before.plan.d_sae:
        changes.append(f"choose {after.plan.d_sae:,} latents instead of {before.plan.d_sae:,}")
    text = " and ".join(changes)
    return f"{text[0].upper()}{text[1:]}."


def _disk_advice(run: RunShape, machine: Machine, disk: float) -> str:
    said = f"The run needs {_size(disk)} of disk and {_size(machine.disk_free)} are free"
    if run.source in ("extract", "hybrid") and (room := _storable(run, machine)) >= LEAST_STORED:
        portion = min(PORTION_TOKENS, room)
        return f"{said}: store the activations in portions of {portion:,} tokens."
    return f"{said}: free some, or choose another folder."


# -------------------------------------------------------------------- as text


def describe(plan: RunPlan) -> list[str]:
    """The plan in short lines, for the command line."""
    fullest = plan.fullest
    lines = [
        f"memory: {_size(plan.memory)} of {_size(plan.machine.memory_free)} free"
        f" ({fullest.name}: {_listed(p for p in fullest.parts if p.place == 'device')})"
    ]
    if plan.host_memory:
        lines.append(f"main memory: {_size(plan.host_memory)}")
    lines.append(
        f"disk: {_size(plan.disk)} of {_size(plan.machine.disk_free)} free"
        f" ({_listed(plan.disk_parts)})"
    )
    if plan.seconds is not None:
        lines.append(
            f"time: about {_duration(plan.seconds)} ({plan.time_basis}: {_listed(plan.time_parts)})"
        )
    return [*lines, *plan.advice]


def _listed(parts: Iterable[Part]) -> str:
    write = {"bytes": _size, "seconds": _duration}
    return ", ".join(
        f"{part.name} {write[part.unit](part.value)}"
        for part in sorted(parts, key=lambda part: -part.value)
        if part.value
    )


# Estimates are told in two digits: more would claim to know. (The engine does not import the
# app's `formatting`, which tells measured figures exactly.)


def _size(n_bytes: float) -> str:
    value, unit = float(n_bytes), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _count(number: int) -> str:
    return _WORDS[number - 1] if 0 < number <= len(_WORDS) else f"{number:,}"
