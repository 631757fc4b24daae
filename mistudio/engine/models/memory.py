"""What a model takes of a device's memory at each precision, before it is fetched or loaded.

Weights are exact: from the tree of modules, whose shapes are known without numbers. The rest is
counted from shapes, as for training (`training.footprint`, which this builds on), and a test holds
it against measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mistudio.engine.models.architecture import FLOAT_BYTES, Architecture
from mistudio.engine.models.loading import QUANTISED, resolve_precision
from mistudio.engine.training.cost import FLOAT, ModelShape
from mistudio.engine.training.footprint import Machine, Part, Phase
from mistudio.errors import OutOfMemory

# Resident once torch and transformers are imported and a model's classes with them (measured on
# Linux, torch 2.13, CPU build).
RUNTIME = 385 * 1024**2
RESERVE = 0.1  # of what is needed must stay free on top, as for training
# What quantising one piece of a matrix takes: about seven arrays of its size (`quantise`).
SOLVING = 7 * FLOAT * (1 << 18)
# Best first. Two bits are never chosen for anybody: they break small models.
ORDER = ("fp32", "bf16", "fp16", "q8", "q4")
ALL = (*ORDER, "q2")


@dataclass(frozen=True)
class Use:
    """What the model is to do at a time: `batch` texts of `context` tokens through all layers and
    to logits, or, where not `logits`, to activations only; `kept` tokens of each stay in the KV
    cache (generation)."""

    batch: int = 8
    context: int = 128
    kept: int = 0
    logits: bool = True

    @property
    def tokens(self) -> int:
        return self.batch * self.context


@dataclass(frozen=True)
class ModelPlan:
    """The memory of one precision. `memory` in bytes is that of the fullest phase; `weights` are
    part of it. `compute` is the precision of the products. `resident` counts also the pages of the
    file that is being read, which the system takes back when something else needs them: it is what
    a process list shows at most."""

    precision: str
    compute: str
    weights: int
    phases: tuple[Phase, ...]
    memory: float
    resident: float
    free: int
    fits: bool

    @property
    def fullest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.bytes("device"))

    def require(self, advice: str = "") -> None:
        """Raise `OutOfMemory` where the model does not fit."""
        if self.fits:
            return
        raise OutOfMemory(
            "The model does not fit into memory",
            f"At {self.precision.upper()} it needs {_size(self.memory)}, with a tenth in reserve, "
            f"and {_size(self.free)} are free.",
            advice or "Choose a lower precision or a smaller model, or close other programs.",
        )


def plan_model(
    architecture: Architecture,
    precision: str,
    machine: Machine,
    use: Use | None = None,
    *,
    device: str = "cpu",
    training: float = 0.0,
    file_bytes: int | None = None,
) -> ModelPlan:
    """The plan of loading `architecture` at `precision` ("fp32" to "q2") and using it.

    `file_bytes` are those of the weight files; by default two for each parameter.
    `training` are the bytes that dictionaries take beside it (`footprint.memory_phases` without
    its model, or `beside`).
    """
    use = use or Use()
    compute = resolve_precision("auto", device) if precision in QUANTISED else precision
    weights = architecture.weight_bytes(precision, compute)
    base = [] if machine.ready or device != "cpu" else [Part("PyTorch", RUNTIME)]
    held = Part("weights", weights)
    work = [
        Part("activations", _activations(architecture, use, compute)),
        Part("logits", _logits(architecture, use, compute)),
        Part("KV cache", kv_cache_bytes(architecture, use, compute)),
        Part("a matrix widened", _widened(architecture, precision, compute, device)),
        Part("dictionaries in training", training),
    ]
    read = 2 * architecture.parameters if file_bytes is None else file_bytes
    mapped = Part("file being read", read, place="cache")
    solving = Part("quantising", _quantising(architecture, precision))
    phases = (
        Phase("load", (*base, held, *((solving,) if solving.value else ()), mapped)),
        Phase("use", (*base, held, *(part for part in work if part.value))),
    )
    memory = max(phase.bytes("device") for phase in phases)
    resident = max(phase.bytes("device") + phase.bytes("cache") for phase in phases)
    free = machine.memory_free
    fits = memory * (1 + RESERVE) <= free
    return ModelPlan(precision, compute, weights, phases, memory, resident, free, fits)


def plan_all(
    architecture: Architecture,
    machine: Machine,
    use: Use | None = None,
    *,
    device: str = "cpu",
    training: float = 0.0,
) -> tuple[ModelPlan, ...]:
    """A plan for every precision, best first."""
    return tuple(
        plan_model(architecture, precision, machine, use, device=device, training=training)
        for precision in ALL
    )


def best_fit(
    architecture: Architecture,
    machine: Machine,
    use: Use | None = None,
    *,
    device: str = "cpu",
    training: float = 0.0,
) -> ModelPlan:
    """What "auto" means: the precision that is fastest on the device at no loss where it fits, else
    the first below it that does. Where none does, the plan of Q4, which does not fit."""
    natural = resolve_precision("auto", device)
    half = "fp16" if natural == "fp16" else "bf16"
    order = dict.fromkeys((natural, half, "q8", "q4"))
    plans = [
        plan_model(architecture, precision, machine, use, device=device, training=training)
        for precision in order
    ]
    return next((plan for plan in plans if plan.fits), plans[-1])


def shape_of(architecture: Architecture, plan: ModelPlan) -> ModelShape:
    """For the plans of trainings (`training.planning`)."""
    blocks = architecture.blocks
    return ModelShape(
        n_layers=architecture.n_layers,
        d_model=architecture.d_model,
        d_mlp=architecture.d_mlp,
        n_heads=max(architecture.n_heads, 1),
        n_kv_heads=max(architecture.n_kv_heads, 1),
        vocab_size=architecture.vocab_size,
        parameters=architecture.parameters,
        block_parameters=sum(block.parameters for block in blocks) // len(blocks),
        mlp_parameters=sum(block.mlp for block in blocks) // len(blocks),
        weight_bytes=FLOAT_BYTES[plan.compute],
        stored_bytes=plan.weights,
    )


def kv_cache_bytes(architecture: Architecture, use: Use, compute: str) -> int:
    """Keys and values of `use.kept` tokens of every text in every layer."""
    width = 2 * architecture.n_kv_heads * architecture.head_dim
    return use.batch * use.kept * architecture.n_layers * width * FLOAT_BYTES[compute]


def _activations(architecture: Architecture, use: Use, compute: str) -> int:
    """At the fullest moment of a block: the stream and its normed copies, the MLP's intermediate
    values (as `footprint.forward_bytes`)."""
    wide = 4 * (architecture.d_model + architecture.d_mlp)
    return use.tokens * wide * FLOAT_BYTES[compute]


def _logits(architecture: Architecture, use: Use, compute: str) -> int:
    return use.tokens * architecture.vocab_size * FLOAT_BYTES[compute] if use.logits else 0


def _widened(architecture: Architecture, precision: str, compute: str, device: str) -> int:
    """A quantised matrix as numbers for the moment of its product, in the precision of the product.
    At two bits also a copy, since groups lie along the output."""
    if precision not in QUANTISED:
        return 0
    if precision != "q2":
        return architecture.largest_matrix * FLOAT_BYTES[compute]
    wide = FLOAT if device == "cpu" else 2
    same = compute == ("fp32" if device == "cpu" else "fp16")
    copy = max(0 if same else FLOAT_BYTES[compute], wide)
    return architecture.largest_matrix * (wide + copy)


def _quantising(architecture: Architecture, precision: str) -> int:
    """One matrix as it was read, and what solving for a piece of it takes."""
    if precision not in QUANTISED or not architecture.largest_matrix:
        return 0
    piece = min(SOLVING, 7 * FLOAT * architecture.largest_matrix)
    return architecture.largest_matrix * FLOAT + piece


def beside(phases: Sequence[Phase]) -> float:
    """What a training adds on the device to the model and its forward pass, at its fullest."""
    apart = ("model", "forward pass", "PyTorch")
    return max(
        sum(part.value for part in phase.parts if part.place == "device" and part.name not in apart)
        for phase in phases
    )


def _size(n_bytes: float) -> str:
    value = float(n_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1024
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
