"""The one table of hyper-parameters: it makes the form, the checks, the help and the command line.

Fields left at None are derived from the others; `derive` says what they become and why.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any

from mistudio.errors import InvalidInput


def _option(default: Any, label: str, help: str, **limits: Any) -> Any:
    return field(default=default, metadata={"label": label, "help": help, **limits})


@dataclass(frozen=True)
class TrainingConfig:
    """What a training run is told. Five choices matter (model, dataset, layers, dictionary size,
    target L0); the rest has defaults."""

    sparsity: str = _option(
        "batchtopk",
        "Sparsity",
        "How active latents are chosen. BatchTopK gives every token as many as it needs, with "
        "the target on average; TopK gives every token the same number; Matryoshka nests small "
        "dictionaries in the large one; JumpReLU, ReLU + L1 and Gated learn a threshold or pay "
        "for activity, steered to the target.",
        choices=("batchtopk", "topk", "matryoshka", "jumprelu", "standard", "gated"),
        essential=True,
    )
    wiring: str = _option(
        "sae",
        "Encoder type",
        "What is reconstructed: the activation itself (autoencoder), the activation beyond a "
        "fixed linear part of it (skip autoencoder), or the MLP's output from its input "
        "(transcoder), if wished beside a learnt linear map (skip transcoder).",
        choices=("sae", "skip_sae", "transcoder", "skip_transcoder"),
    )
    skip: str = _option(
        "principal",
        "Skip",
        "What the skip of a skip autoencoder passes on: the leading principal directions, or a "
        "fixed share of everything.",
        choices=("principal", "fixed"),
        only={"wiring": ("skip_sae",)},
    )
    skip_rank: int = _option(
        16,
        "Skip directions",
        "Principal directions that bypass the dictionary.",
        minimum=1,
        maximum=1024,
        only={"wiring": ("skip_sae",), "skip": ("principal",)},
    )
    skip_share: float = _option(
        0.2,
        "Skip share",
        "Share of the activation that bypasses the dictionary. At 1 nothing would be left to "
        "learn.",
        minimum=0.0,
        maximum=0.95,
        only={"wiring": ("skip_sae",), "skip": ("fixed",)},
    )
    expansion: float = _option(
        8.0,
        "Expansion factor",
        "Dictionary size as a multiple of the activation's width. More latents split concepts "
        "more finely and need more text.",
        minimum=0.25,
        maximum=256,
        choices_hint=(4, 8, 16, 32),
        essential=True,
    )
    k: int = _option(
        32,
        "Target L0",
        "Mean number of active latents per token. Fewer is easier to read and reconstructs less.",
        minimum=1,
        maximum=4096,
        essential=True,
    )
    tokens: int = _option(
        2_000_000,
        "Training tokens",
        "Tokens to learn from, counting repeats where the text is shorter.",
        minimum=1_000,
        maximum=100_000_000_000,
        essential=True,
    )
    width: int | None = _option(
        None,
        "Dictionary size",
        "Number of latents, where it should not be a multiple of the activation's width.",
        minimum=8,
        maximum=2**22,
        unit="latents",
    )
    steps: int | None = _option(
        None,
        "Steps",
        "Length of the run in steps instead of tokens.",
        minimum=1,
        maximum=100_000_000,
    )
    batch_size: int | None = _option(
        None, "Batch size", "Tokens per step.", minimum=64, maximum=65536, unit="tokens"
    )
    learning_rate: float | None = _option(
        None, "Learning rate", "Peak rate of the optimiser.", minimum=1e-6, maximum=1e-1
    )
    l1_coefficient: float | None = _option(
        None,
        "L1 coefficient",
        "Price of activity, in units where inputs have norm sqrt(width). Left open it is steered "
        "so that the target L0 is met.",
        minimum=0.0,
        maximum=1e4,
        only={"sparsity": ("standard", "gated", "jumprelu")},
    )
    optimizer: str = _option(
        "adam",
        "Optimiser",
        "Adam suits dictionaries; AdamW also shrinks weights; SGD has momentum 0.9; 8-bit Adam "
        "keeps its moments in a quarter of the memory (NVIDIA GPUs).",
        choices=("adam", "adamw", "sgd", "adam8bit"),
    )
    weight_decay: float = _option(
        0.01,
        "Weight decay",
        "How much AdamW shrinks the encoder and the biases, per unit of learning rate.",
        minimum=0.0,
        maximum=1.0,
        only={"optimizer": ("adamw",)},
    )
    schedule: str = _option(
        "constant",
        "Schedule",
        "How the learning rate goes between warm-up and final decay: constant, or falling to a "
        "tenth (linear, exponential) or to nothing (cosine).",
        choices=("constant", "linear", "cosine", "exponential"),
    )
    warmup_share: float = _option(
        0.05,
        "Warm-up",
        "Share of the steps over which the learning rate rises.",
        minimum=0.0,
        maximum=0.5,
    )
    decay_share: float = _option(
        0.2,
        "Decay",
        "Share of the steps, at the end, over which the learning rate falls to 0.",
        minimum=0.0,
        maximum=1.0,
    )
    anneal_share: float = _option(
        0.05,
        "Sparsity warm-up",
        "Share of the steps over which the active latents fall from four times the target to it; "
        "it keeps latents from dying early.",
        minimum=0.0,
        maximum=0.9,
    )
    auxk: bool = _option(
        True,
        "AuxK",
        "Dead latents learn to explain what the living ones leave over (Gao et al. 2024).",
    )
    revive: bool = _option(
        True,
        "Re-initialise dead latents",
        "At 10, 25, 40 and 55 % of the run, dead latents restart on the worst explained tokens; "
        "not while the learning rate decays.",
    )
    mixed_precision: bool = _option(
        False,
        "Mixed precision",
        "The encoder's product in bfloat16; weights, values and gradients stay in float32.",
    )
    gradient_accumulation: int = _option(
        1,
        "Gradient accumulation",
        "A batch is worked through in this many parts: less memory, the same result.",
        minimum=1,
        maximum=1024,
    )
    dead_window: int | None = _option(
        None,
        "Dead window",
        "A latent that has not fired for this many tokens counts as dead.",
        minimum=1_000,
        maximum=100_000_000,
        unit="tokens",
    )
    context: int = _option(
        128, "Context length", "Tokens per window.", minimum=8, maximum=8192, unit="tokens"
    )
    autosave_steps: int | None = _option(
        None,
        "Save every (steps)",
        "A checkpoint after every so many steps, beside those by time.",
        minimum=1,
        maximum=1_000_000,
        unit="steps",
    )
    autosave_minutes: float = _option(
        5.0,
        "Save every (minutes)",
        "A checkpoint after every so many minutes; 0 for none.",
        minimum=0.0,
        maximum=1440,
        unit="minutes",
    )
    seed: int = _option(0, "Seed", "The same seed gives the same run.", minimum=0, maximum=2**31)


@dataclass(frozen=True)
class Plan:
    """A configuration with every value filled in for one site."""

    config: TrainingConfig
    d_in: int
    d_out: int
    d_sae: int
    k: int
    batch_size: int
    steps: int
    learning_rate: float
    dead_window: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def option(name: str) -> dict[str, Any]:
    """The table's entry for a field: label, help, limits, default."""
    for entry in fields(TrainingConfig):
        if entry.name == name:
            return {
                "default": entry.default if entry.default is not MISSING else None,
                **entry.metadata,
            }
    raise KeyError(name)


def problems(config: TrainingConfig) -> dict[str, str]:
    """Field -> what is wrong with it, in a sentence; empty where all is well."""
    found = {}
    for entry in fields(config):
        value, limits = getattr(config, entry.name), entry.metadata
        label = limits["label"]
        if value is None:
            if "None" not in str(entry.type):
                found[entry.name] = f"{label} cannot be left open."
            continue
        whole = str(entry.type).startswith("int")
        if str(entry.type).startswith("bool") and not isinstance(value, bool):
            found[entry.name] = f"{label} must be on or off."
        elif "minimum" in limits and (
            isinstance(value, bool) or not isinstance(value, int if whole else int | float)
        ):
            found[entry.name] = f"{label} must be a {'whole ' if whole else ''}number."
        elif "choices" in limits and value not in limits["choices"]:
            found[entry.name] = f"{label} must be one of {', '.join(map(str, limits['choices']))}."
        elif "minimum" in limits and not limits["minimum"] <= value <= limits["maximum"]:
            found[entry.name] = (
                f"{label} must be between {limits['minimum']:g} and {limits['maximum']:g}; "
                f"it is {_shown(value)}."
            )
    return found


def _shown(value: float) -> str:
    try:
        return f"{value:g}"
    except OverflowError:  # a whole number that no float holds
        return "far outside"


def parse(values: dict[str, Any]) -> TrainingConfig:
    """A checked configuration from names and values (text is converted to the field's type)."""
    known = {entry.name: entry for entry in fields(TrainingConfig)}
    converted = {}
    for name, value in _without_ghosts(values).items():
        if name not in known:
            raise InvalidInput(
                "Unknown training option",
                f"There is no option {name!r}.",
                f"The options are: {', '.join(known)}.",
                field=name,
            )
        converted[name] = _convert(name, str(known[name].type), value)
    config = replace(TrainingConfig(), **converted)
    wrong = problems(config)
    if wrong:
        name, sentence = next(iter(wrong.items()))
        raise InvalidInput("A training option is out of range", sentence, field=name)
    return config


def _without_ghosts(values: dict[str, Any]) -> dict[str, Any]:
    """Ghost gradients are obsolete (no peer has them any more): the switch of that name means
    today's care for dead latents, AuxK and re-initialisation."""
    if "ghost_gradients" not in values:
        return values
    rest = {name: value for name, value in values.items() if name != "ghost_gradients"}
    given = values["ghost_gradients"]
    wanted = _SWITCH.get(given.lower()) if isinstance(given, str) else given
    if not isinstance(wanted, bool):
        raise InvalidInput(
            "A training option cannot be read",
            f"Ghost gradients (ghost_gradients) got {given!r}.",
            "It takes true or false.",
            field="ghost_gradients",
        )
    return {"auxk": wanted, "revive": wanted, **rest}


_SWITCH = {
    **dict.fromkeys(("true", "on", "1", "yes"), True),
    **dict.fromkeys(("false", "off", "0", "no"), False),
}


def _convert(name: str, kind: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lower() in ("auto", "none") and "None" in kind:
        return None
    try:
        if kind.startswith("bool"):
            return _SWITCH[value.lower()]
        if kind.startswith("int"):
            number = float(value)
            if number != int(number):
                raise ValueError
            return int(number)
        if kind.startswith("float"):
            return float(value)
    except (ValueError, KeyError, OverflowError) as exc:
        raise InvalidInput(
            "A training option cannot be read",
            f"{option(name)['label']} ({name}) got {value!r}.",
            f"It takes {_takes(kind)}.",
            field=name,
        ) from exc
    return value


def _takes(kind: str) -> str:
    if kind.startswith("bool"):
        return "true or false"
    return "a whole number" if kind.startswith("int") else "a number"


def derive(config: TrainingConfig, d_in: int, d_out: int | None = None) -> Plan:
    """Fill in what was left open, for inputs of width `d_in` and targets of width `d_out` (the
    same where not given)."""
    d_sae = config.width or max(8, round(config.expansion * d_in / 8) * 8)
    if config.k >= d_sae:
        raise InvalidInput(
            "The target L0 is too large",
            f"{config.k} of {d_sae} latents would be active on every token.",
            f"Choose a target below {d_sae}; 32 is usual.",
            field="k",
        )
    if config.wiring == "skip_sae" and config.skip == "principal" and config.skip_rank >= d_in:
        raise InvalidInput(
            "The skip leaves nothing to learn",
            f"{config.skip_rank} of {d_in} directions would bypass the dictionary.",
            f"Choose fewer than {d_in}; 16 is usual.",
            field="skip_rank",
        )
    batch_size = config.batch_size or (2048 if _tokens(config, 2048) >= 200_000 else 512)
    steps = config.steps or max(1, config.tokens // batch_size)
    return Plan(
        config=config,
        d_in=d_in,
        d_out=d_out or d_in,
        d_sae=d_sae,
        k=config.k,
        batch_size=batch_size,
        steps=steps,
        learning_rate=config.learning_rate or default_learning_rate(steps, d_in, d_sae),
        dead_window=config.dead_window or default_dead_window(steps * batch_size),
    )


def _tokens(config: TrainingConfig, batch_size: int) -> int:
    return config.steps * batch_size if config.steps else config.tokens


def default_learning_rate(steps: int, d_in: int, d_sae: int) -> float:
    """3e-3 for 4,608 latents on 576 dimensions and up to 1,200 steps; measured there, at a quarter
    and at twice the latents, and at 300 and 1,200 steps (CONTRIBUTING, "Decisions").

    An Adam step moves every coordinate by the rate, a row of d by rate * sqrt(d). Wider
    dictionaries want lower rates (Gao et al. 2024: 1 / sqrt(d_sae)); so do much longer runs.
    """
    shape = math.sqrt(576 / d_in) * math.sqrt(4608 / d_sae)
    length = min(1.0, (1200 / steps) ** 0.25)
    return min(6e-3, max(1e-4, 3e-3 * shape * length))


def default_dead_window(tokens: int) -> int:
    """5 % of the run, between 50 thousand and 10 million tokens: it must fit into the run."""
    return int(min(10_000_000, max(50_000, math.ceil(0.05 * tokens))))
