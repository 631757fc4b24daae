"""What is likely to end badly, before it starts, in plain sentences with the values that mend it.

Advice is about values that are accepted; what is refused says `config.py`. All of it is computed
from numbers that the form has: nothing is loaded or measured here, and torch is not imported. The
limits stand in one place, below, with where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mistudio.engine.training.config import (
    Plan,
    TrainingConfig,
    default_dead_window,
    default_learning_rate,
    option,
)
from mistudio.engine.training.footprint import RunShape
from mistudio.engine.training.planning import RunPlan, fits, resized

# The learning rate that `derive` gives was measured against a half and twice itself (CONTRIBUTING,
# "Decisions"): twice cost 4 to 20 % of the FVU. Ten times away is beyond everything measured.
RATE_FACTOR = 10.0
# Below four, two tokens that share one meaning share little else: nobody publishes such
# dictionaries (Gao et al. 2024 begin at 8, Anthropic and DeepMind lie at 20 to 150).
LEAST_L0 = 4
USUAL_L0 = 32
# How often a latent of mean frequency fires in the whole run: tokens * k / d_sae. Our measured
# runs of 300 steps (CONTRIBUTING, "Decisions") gave each 4,270 of them and reached an FVU of
# 0.162, 1,200 steps 0.134; a latent a hundred times rarer than the mean, of which there are many,
# still gets 40. With fewer than 500 such a latent is seen five times, an Adam moment's beginning.
LEAST_FIRINGS, GOOD_FIRINGS = 500, 2_000
# A latent of mean frequency stays silent for w tokens with probability exp(-w * k / d_sae) where
# tokens are independent; at ten mean distances a tenth of that frequency still gives 37 %.
WINDOW_DISTANCES = 10
WINDOW_STEPS = 4  # a window of fewer steps counts the batches and not the latent
# Up to four passes over a text are nearly as good as new text for language models (Muennighoff et
# al. 2023); dictionaries learn rare latents by heart as well.
MOST_PASSES = 4
LEAST_PART = 64  # rows; as `step.LEAST_ROWS`: smaller parts save next to nothing
# A window must hold a few and a text some windows (`LiveActivations`).
LEAST_WINDOWS = 8


@dataclass(frozen=True)
class Mend:
    """One click: `field` of the form (of `TrainingConfig`, or "layers" or "source") becomes
    `value`; None leaves it to be derived. `label` is what the click says."""

    field: str
    value: Any
    label: str


@dataclass(frozen=True)
class Advice:
    """`field`: where it stands; `sentence`: what will happen; `mend`: what helps, if one value
    does."""

    field: str
    sentence: str
    mend: Mend | None = None


def advise(plan: Plan, corpus_tokens: int | None = None) -> list[Advice]:
    """What to say of one site's plan; `corpus_tokens` is how long the text is, where known."""
    found = [
        _of_l1(plan),
        _of_learning_rate(plan),
        _of_schedule(plan),
        _of_target(plan),
        _of_length(plan, corpus_tokens),
        _of_text(plan, corpus_tokens),
        _of_dead_window(plan),
        _of_parts(plan),
    ]
    return [advice for advice in found if advice is not None]


# -------------------------------------------------------------------- sparsity

# The price at which a run ends at its target where nobody types one (`objectives.Coefficient`):
# factor * d_in ** power / k. Fitted to 17 runs of 300 and 400 steps, whose steered prices are 0.75
# to 1.6 times the fit at 4x and 8x: the tiny model of the tests (d_in 128, k 8 to 32) and the MLP
# input of SmolLM2's layer 10 (d_in 576, k 32 and 64, 4x). A 2x JumpReLU came to 2.4 times. There
# the steered price was, ReLU: 2.68 (d_in 128, k 8) to 1.65 (576, 32);
# Gated: 3.00 and 2.58; JumpReLU, which is charged by the head: 0.40 and 0.55.
USUAL_L1 = {"standard": (2.2, 0.5), "gated": (2.8, 0.5), "jumprelu": (0.029, 1.0)}
# From those runs: four times the steered price left 0.2 to 0.4 of the wanted latents active, ten
# times 0.02 to 0.2 (FVU of ReLU 0.98, up to 47 % dead after 300 steps), thirty times 0.005 to 0.1;
# a quarter left five times as many active, a tenth ten to twenty times.
L1_AWAY, L1_DEADLY = 4.0, 20.0


def usual_l1(sparsity: str, d_in: int, k: int) -> float | None:
    """About what the price is steered to; None where the objective has none."""
    if sparsity not in USUAL_L1:
        return None
    factor, power = USUAL_L1[sparsity]
    return rounded(factor * d_in**power / k)


def rounded(value: float, digits: int = 1) -> float:
    """To so many significant digits: more would claim to know."""
    return float(f"{value:.{digits}g}")


def _of_l1(plan: Plan) -> Advice | None:
    given, config = plan.config.l1_coefficient, plan.config
    usual = usual_l1(config.sparsity, plan.d_in, plan.k)
    if given is None or usual is None:
        return None
    if given >= L1_DEADLY * usual:
        said = f"L1 of {given:g} would leave most latents dead"
    elif given >= L1_AWAY * usual:
        said = f"L1 of {given:g} would leave far fewer than {plan.k} latents active"
    elif given <= usual / L1_AWAY:
        said = f"L1 of {given:g} would leave far more than {plan.k} latents active"
    else:
        return None
    return Advice(
        "l1_coefficient",
        f"{said}: use about {usual:g}, or leave it open and it is steered to the target.",
        Mend("l1_coefficient", usual, f"Use {usual:g}"),
    )


def _of_target(plan: Plan) -> Advice | None:
    usual = min(USUAL_L0, max(LEAST_L0, plan.d_in // 4))
    mend = Mend("k", usual, f"Use {usual}")
    if plan.k >= plan.d_in:
        return Advice(
            "k",
            f"{plan.k:,} active latents on {plan.d_in:,} dimensions are not sparse: any basis "
            f"could reconstruct as well. {usual} is usual.",
            mend,
        )
    if plan.k < LEAST_L0:
        few = "latent" if plan.k == 1 else "latents"
        return Advice(
            "k",
            f"{plan.k} active {few} per token can say little: much stays unexplained. {usual} "
            "is usual.",
            mend,
        )
    return None


# -------------------------------------------------------------------- learning


def _of_learning_rate(plan: Plan) -> Advice | None:
    given = plan.config.learning_rate
    usual = default_learning_rate(plan.steps, plan.d_in, plan.d_sae)
    if given is None or usual / RATE_FACTOR <= given <= usual * RATE_FACTOR:
        return None
    often = f"{given / usual:,.0f} times" if given > usual else f"1/{usual / given:,.0f} of"
    ends = "training may diverge" if given > usual else "most latents would hardly move"
    value = rounded(usual, 2)
    return Advice(
        "learning_rate",
        f"This is {often} the usual rate for this size: {ends}.",
        Mend("learning_rate", value, f"Use {value:g}"),
    )


def _of_schedule(plan: Plan) -> Advice | None:
    config = plan.config
    if config.warmup_share + config.decay_share <= 1.0:
        return None
    share = rounded(1.0 - config.warmup_share, 2)
    return Advice(
        "decay_share",
        f"Warm-up and decay take {config.warmup_share + config.decay_share:.0%} of the run "
        "together: the learning rate never reaches its peak.",
        Mend("decay_share", min(0.2, share), f"Use {min(0.2, share):g}"),
    )


def _of_length(plan: Plan, corpus_tokens: int | None) -> Advice | None:
    """More tokens for the dictionary or, where the text has no more, a smaller dictionary."""
    tokens = plan.steps * plan.batch_size
    firings = tokens * plan.k / plan.d_sae
    if firings >= LEAST_FIRINGS:
        return None
    said = (
        f"{tokens:,} tokens are few for {plan.d_sae:,} latents: each would fire about "
        f"{firings:,.0f} times, and rare ones hardly at all."
    )
    needed = _round_up(GOOD_FIRINGS * plan.d_sae / plan.k)
    readable = MOST_PASSES * corpus_tokens if corpus_tokens else None
    if readable is not None and needed > readable:
        return _of_small_text(plan, readable)
    field, value = "tokens", needed
    if plan.config.steps is not None:
        field, value = "steps", math.ceil(needed / plan.batch_size)
    mend = None
    if value <= option(field)["maximum"]:
        mend = Mend(field, value, f"Use {value:,}")
    return Advice(field, said, mend)


def _of_small_text(plan: Plan, readable: int) -> Advice:
    most = int(readable * plan.k / LEAST_FIRINGS)
    field = "expansion" if plan.config.width is None else "width"
    said = (
        f"The text is short for {plan.d_sae:,} latents: read {MOST_PASSES} times, it lets about "
        f"{most:,} fire often enough to be learnt."
    )
    least = max(8, 2 * plan.k)
    if field == "width":
        width = most // 8 * 8
        return Advice(field, said, Mend(field, width, f"Use {width:,}") if width >= least else None)
    factor = 2.0 ** math.floor(math.log2(max(most, 1) / plan.d_in))
    fits_range = factor >= option("expansion")["minimum"] and factor * plan.d_in >= least
    mend = Mend(field, factor, f"Use {factor:g}x") if fits_range else None
    return Advice(field, said, mend)


def _round_up(tokens: float) -> int:
    """To two digits."""
    unit = 10 ** max(0, math.floor(math.log10(tokens)) - 1)
    return math.ceil(tokens / unit) * unit


def _of_text(plan: Plan, corpus_tokens: int | None) -> Advice | None:
    if not corpus_tokens:
        return None
    context = plan.config.context
    if corpus_tokens < LEAST_WINDOWS * context:
        fitting = _power_below(corpus_tokens // LEAST_WINDOWS)
        mend = Mend("context", fitting, f"Use {fitting}") if fitting >= 8 else None
        return Advice(
            "context",
            f"The text has {corpus_tokens:,} tokens: too few windows of {context:,} to train on.",
            mend,
        )
    passes = plan.steps * plan.batch_size / corpus_tokens
    if passes <= MOST_PASSES:
        return None
    most = MOST_PASSES * corpus_tokens
    field, value = "tokens", most
    if plan.config.steps is not None:
        field, value = "steps", max(1, most // plan.batch_size)
    mend = None
    if value >= option(field)["minimum"]:
        mend = Mend(field, value, f"Use {value:,} ({MOST_PASSES} passes)")
    return Advice(
        field,
        f"The text has {corpus_tokens:,} tokens and would be read {passes:,.0f} times: rare "
        "latents learn it by heart. More text helps more.",
        mend,
    )


def _power_below(value: int) -> int:
    return 1 << (max(1, value).bit_length() - 1)


# -------------------------------------------------------------------- dead latents and parts


def _of_dead_window(plan: Plan) -> Advice | None:
    given, tokens = plan.config.dead_window, plan.steps * plan.batch_size
    if given is None:
        return None
    auto = default_dead_window(tokens)
    mend = Mend("dead_window", None, f"Use auto ({auto:,})")
    distance = plan.d_sae / plan.k
    if given >= tokens:
        return Advice(
            "dead_window",
            f"The run has {tokens:,} tokens: no latent can be silent for {given:,}, so dead ones "
            "are never found and never helped.",
            mend,
        )
    if given < WINDOW_STEPS * plan.batch_size:
        return Advice(
            "dead_window",
            f"This window is {given / plan.batch_size:.2g} batches of {plan.batch_size:,}: "
            "latents that are well would count as dead.",
            mend,
        )
    if given < WINDOW_DISTANCES * distance:
        return Advice(
            "dead_window",
            f"A latent fires once in {distance:,.0f} tokens on average: with this window, rarer "
            "ones that are well would count as dead.",
            mend,
        )
    return None


def _of_parts(plan: Plan) -> Advice | None:
    parts = plan.config.gradient_accumulation
    most = max(1, plan.batch_size // LEAST_PART)
    if parts <= most:
        return None
    return Advice(
        "gradient_accumulation",
        f"{parts:,} parts of a batch of {plan.batch_size:,} are under {LEAST_PART} tokens each: "
        "slower, and no memory is saved.",
        Mend("gradient_accumulation", most, f"Use {most}"),
    )


# -------------------------------------------------------------------- memory and disk


def advise_memory(run: RunPlan, layers: Sequence[int], sizes: Sequence[float] = ()) -> list[Advice]:
    """What to say where a run does not fit: about its layers, where fewer fit; else about its
    dictionary, where a smaller one fits. `sizes` are the expansion factors to offer, besides
    halves."""
    if run.fits and run.layers >= len(layers):
        return []
    found = []
    if 0 < run.layers < len(layers):
        found.append(_of_layers(run, layers))
    if not run.layers and (advice := _of_width(run.run.first(1), run, sizes)):
        found.append(advice)
    return found


def _of_layers(run: RunPlan, layers: Sequence[int]) -> Advice:
    kept = spread(layers, run.layers)
    if run.fits:  # small devices get no more at a time
        said = f"This device has little memory: at most {run.layers} layers at a time are wise"
    else:
        said = (
            f"With {len(layers)} layers {size(run.memory)} are needed, "
            f"{size(run.machine.memory_free)} are free: at most {run.layers} "
            f"{'layer fits' if run.layers == 1 else 'layers fit'}"
        )
    return Advice("layers", f"{said}.", Mend("layers", kept, f"Keep {run.layers}"))


def spread(layers: Sequence[int], number: int) -> tuple[int, ...]:
    """`number` of these layers, as evenly apart as can be; of one, the middle."""
    chosen = sorted(layers)
    if number <= 1:
        return (chosen[len(chosen) // 2],)
    last = len(chosen) - 1
    return tuple(chosen[round(place * last / (number - 1))] for place in range(number))


def _of_width(one: RunShape, run: RunPlan, sizes: Sequence[float]) -> Advice | None:
    config: TrainingConfig = one.plan.config
    d_in, d_sae = one.plan.d_in, one.plan.d_sae
    widths = {max(8, round(factor * d_in / 8) * 8): factor for factor in sizes}
    halves = [d_sae >> n for n in range(1, 12)]
    fitting = (
        width
        for width in sorted({*widths, *halves}, reverse=True)
        if max(8, one.plan.k + 1) <= width < d_sae and fits(resized(one, width), run.machine)
    )
    width = next(fitting, None)
    if width is None:
        return None
    need = run.memory if run.run.layers == 1 else 0
    said = (
        f"{d_sae:,} latents do not fit into memory"
        + (f" ({size(need)} needed, {size(run.machine.memory_free)} free)" if need else "")
        + f": {width:,} do."
    )
    if config.width is None and (factor := widths.get(width, width / d_in)) >= 0.25:
        return Advice("expansion", said, Mend("expansion", factor, f"Use {factor:g}x"))
    return Advice("width", said, Mend("width", width, f"Use {width:,}"))


def size(n_bytes: float) -> str:
    """Two digits: `14 GB`, `6.1 GB`."""
    value, unit = float(n_bytes), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


# -------------------------------------------------------------------- refused values


def mend_of(name: str, value: Any, config: TrainingConfig, width: int | None) -> Mend | None:
    """What to put in place of a refused value of a field: the nearest limit of a number, the
    default of what cannot be read. `width` is the model's, where one is chosen."""
    limits = option(name)
    default = limits["default"]
    number = _number(value)
    if number is not None and "minimum" in limits:
        low, high = limits["minimum"], limits["maximum"]
        nearest = min(max(number, low), high)
        if name == "width" and nearest <= config.k:
            nearest = 8 * config.k
        if nearest != number:
            if isinstance(low, int) and isinstance(high, int) and _whole(name):
                nearest = int(nearest)
            return Mend(
                name, nearest, f"Use {nearest:,}" if nearest >= 1000 else f"Use {nearest:g}"
            )
        if _whole(name) and number != int(number):
            nearest = min(max(round(number), low), high)
            return Mend(name, nearest, f"Use {nearest:,}")
    if name == "k" and width is not None:
        d_sae = config.width or max(8, round(config.expansion * width / 8) * 8)
        if config.k >= d_sae:
            fitting = min(USUAL_L0, max(1, d_sae // 8))
            return Mend("k", fitting, f"Use {fitting}")
    if name == "skip_rank" and width is not None and config.skip_rank >= width:
        fitting = min(16, max(1, width // 4))
        return Mend("skip_rank", fitting, f"Use {fitting}")
    if default is None:
        return Mend(name, None, "Use auto")
    if isinstance(default, bool | str):
        return Mend(name, default, f"Use {default}")
    shown = f"{default:,}" if isinstance(default, int) else f"{default:g}"
    return Mend(name, default, f"Use {shown}")


def _whole(name: str) -> bool:
    annotation = str(TrainingConfig.__dataclass_fields__[name].type)
    return annotation.startswith("int")


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
