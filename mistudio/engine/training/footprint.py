"""What a training run takes of memory and disk, computed from shapes alone.

Nothing is loaded, allocated or measured here, and torch is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from mistudio.engine.training.checkpoints import most_kept
from mistudio.engine.training.config import Plan
from mistudio.engine.training.cost import (
    CHUNK_CELLS,
    DENSE_SHARE,
    ENTRY_BUDGET,
    FLOAT,
    INDEX,
    ModelShape,
    chunk_rows,
    most_entries,
    part_rows,
    threshold_rows,
)

RETAINED = 32 * 1024**2  # bytes; freed blocks up to this size may stay with the process
MOMENTS = ("ranks", "selects", "learns", "auxk", "moves")
# As in `run.py`, `finish.py`, `activations/ring.py` and `sae/loss.py`; a test holds them together.
SAMPLE_TOKENS = 32768
EVALUATION_TOKENS = 8192
EVALUATION_BYTES = 512 * 1024**2
CALIBRATION_TOKENS = 65_536
RING = 2
LOGIT_CELLS = 64 * 1024**2
PORTION_TOKENS = 1_000_000  # stored at a time where model and training take turns
DEAD_SHARE = 0.1  # of the latents, for which AuxK needs copies
# Resident once torch and transformers are imported (measured on Linux, torch 2.13, CPU build).
RUNTIME = 345 * 1024**2
# Bytes per learnt number that an optimiser keeps beside it.
MOMENT_BYTES = {"adam": 8, "adamw": 8, "sgd": 4, "adam8bit": 2}


# -------------------------------------------------------------------- what is planned


@dataclass(frozen=True)
class PlannedSite:
    """One dictionary of the run: where it reads (`site` of block `layer`) and its plan."""

    layer: int
    site: str
    plan: Plan

    @property
    def name(self) -> str:
        return f"layer {self.layer} {self.site}"

    @property
    def is_transcoder(self) -> bool:
        return self.plan.config.wiring in ("transcoder", "skip_transcoder")

    @property
    def deepest(self) -> tuple[int, str]:
        """The last place of the model that must run for it."""
        return self.layer, "mlp_out" if self.is_transcoder else self.site

    @property
    def channels(self) -> int:
        """Captured per token."""
        return self.plan.d_in + (self.plan.d_out if self.is_transcoder else 0)


@dataclass(frozen=True)
class RunShape:
    """Everything about a run that its plan depends on.

    `source`: "stream" runs the model beside the training; "extract" first stores all activations
    and frees the model before the training; "hybrid" does so in portions, in turn with the
    training; "stored" finds them on disk. `stored_tokens` is how many are on disk at a time, with
    the held-out ones; by default all, or a portion of a million.
    """

    model: ModelShape
    sites: tuple[PlannedSite, ...]
    source: str = "stream"
    stored_tokens: int | None = None
    batch_windows: int = 8
    buffer_tokens: int = 32768
    heldout_tokens: int = 65536

    @property
    def plan(self) -> Plan:
        """Batch size, steps and context are the same for all sites."""
        return self.sites[0].plan

    @property
    def tokens(self) -> int:
        return self.plan.steps * self.plan.batch_size

    @property
    def capture_tokens(self) -> int:
        """Of one forward pass."""
        return self.batch_windows * self.plan.config.context

    @property
    def layers(self) -> int:
        return len({site.layer for site in self.sites})

    def first(self, layers: int) -> RunShape:
        """The same run with the sites of its first `layers` layers only."""
        kept = sorted({site.layer for site in self.sites})[:layers]
        return replace(self, sites=tuple(site for site in self.sites if site.layer in kept))


@dataclass(frozen=True)
class Machine:
    """What the caller measured: bytes in all and free, of the device that trains and of the disk.

    `host_free`: main memory that is free, where the device has memory of its own (an NVIDIA
    card); None where they are the same (CPU, Jetson, Apple). `ready`: torch was loaded when the
    memory was measured, so that its own need is not counted again.
    """

    memory_total: int
    memory_free: int
    disk_free: int
    host_free: int | None = None
    ready: bool = True


@dataclass(frozen=True)
class Part:
    """One figure of a plan. `value` is in `unit` ("bytes" or "seconds"); `per_site` divides it
    among the sites, where it is theirs. `place`: "device", "host" or "disk" for bytes."""

    name: str
    value: float
    unit: str = "bytes"
    place: str = "device"
    per_site: tuple[float, ...] = ()


@dataclass(frozen=True)
class Phase:
    """A stretch of the run, and everything that is in memory at its fullest moment."""

    name: str
    parts: tuple[Part, ...]

    def bytes(self, place: str) -> float:
        return sum(part.value for part in self.parts if part.place == place)


# -------------------------------------------------------------------- memory


@dataclass(frozen=True)
class SiteMemory:
    """Bytes of one dictionary in training. The first three stay for the whole run; of the others
    one site's exist at a time."""

    parameters: float
    moments: float
    counters: float
    gradients: float
    pre_activations: float
    sparse: float
    rows: float

    @property
    def lasting(self) -> float:
        return self.parameters + self.moments + self.counters

    @property
    def passing(self) -> float:
        return self.gradients + self.pre_activations + self.sparse + self.rows


@lru_cache(maxsize=64)  # a plan asks for the same site's many times over
def site_memory(plan: Plan) -> SiteMemory:
    """What `SiteTrainer.step` allocates, at the beginning of a run, when most entries are active.

    A step never needs all of it together. But freed memory is not always given back: the C
    library keeps blocks of up to 32 MB, CUDA's allocator its segments. So small blocks add up
    over the moments of a step, large ones count in the moment that has most of them.
    """
    config = plan.config
    n, d, o = plan.batch_size, plan.d_in, plan.d_out
    learnt = _learnt(plan)
    fixed = d + (d * o if config.wiring == "skip_sae" and config.skip == "principal" else 0)
    working = _fullest(_blocks(plan))
    return SiteMemory(
        parameters=FLOAT * (learnt + float(fixed)),
        moments=float(MOMENT_BYTES[config.optimizer] * learnt),
        counters=float(plan.d_sae * (INDEX + 2 * FLOAT)),
        gradients=working["gradients"],
        pre_activations=working["pre-activations"],
        sparse=working["sparse"],
        # u, centred; the error by part and joined, its scaled copy; the target if it is another
        rows=FLOAT * n * (2.0 * d + (3 if config.wiring == "sae" else 4) * o),
    )


@dataclass(frozen=True)
class _Block:
    """`count` allocations of `bytes` each that exist in some of a step's moments."""

    part: str
    bytes: float
    moments: tuple[str, ...]
    count: int = 1


def _fullest(blocks: Sequence[_Block]) -> dict[str, float]:
    """Bytes by part: all small blocks, and the large ones of the moment that has most."""
    large = [block for block in blocks if block.bytes > RETAINED]

    def total(moment: str) -> float:
        return sum(block.bytes * block.count for block in large if moment in block.moments)

    fullest = max(MOMENTS, key=total)
    found = dict.fromkeys(("gradients", "pre-activations", "sparse"), 0.0)
    for block in blocks:
        if block.bytes <= RETAINED or fullest in block.moments:
            found[block.part] += block.bytes * block.count
    return found


def _blocks(plan: Plan) -> list[_Block]:
    """The allocations of a step, by the moments (`MOMENTS`) in which they exist: it ranks a part
    of the cells for the threshold, selects entries, learns from them, helps the dead by AuxK and
    moves the weights."""
    config = plan.config
    n, d, o, m = plan.batch_size, plan.d_in, plan.d_out, plan.d_sae
    rows, seen = chunk_rows(plan), threshold_rows(plan)
    cells, here = float(rows) * m, most_entries(plan) * rows
    # Chunks gather until their part is whole or its entries exceed the budget; then their
    # gradient is taken.
    chunks = min(ceil(part_rows(plan) / rows), int(ENTRY_BUDGET // here) + 1)
    several = chunks * rows < n
    held = min(chunks * here, most_entries(plan) * n)
    cell = 2 if config.mixed_precision else FLOAT
    twice = 2 if several or config.sparsity == "matryoshka" else 1
    learning = ("learns", "auxk", "moves")
    blocks = [
        _Block("pre-activations", cells * cell, ("ranks", "selects")),
        # Rows for the threshold that are more than a chunk; (value, index) pairs of their cells.
        _Block("pre-activations", float(seen) * m * cell if seen > rows else 0.0, ("ranks",)),
        _Block("pre-activations", float(seen) * m * 2 * INDEX, ("ranks",)),
        _Block("pre-activations", 0.0 if config.sparsity == "topk" else cells, ("selects",)),
        _Block("gradients", float(FLOAT * m * d), learning, twice),
        _Block("gradients", float(FLOAT * m * o), learning, twice),
        # The decoder gradient's part along its own rows.
        _Block("gradients", float(FLOAT * m * o), ("moves",)),
        *_entry_blocks(plan, held, here, chunks, several),
        *_aux_blocks(plan),
    ]
    if config.mixed_precision:
        blocks.append(_Block("pre-activations", 2.0 * m * d, ("ranks", "selects")))
    return blocks


def _entry_blocks(plan: Plan, held: float, here: float, chunks: int, several: bool) -> list[_Block]:
    """Entries and what is made of them: 16 bytes of place, 4 each of value and pre-activation."""
    always = ("selects", "learns")
    places, number = 2.0 * INDEX, float(FLOAT)
    blocks = [
        _Block("sparse", held * places, always),
        _Block("sparse", held * number, always, 2),
    ]
    if chunks > 1:  # joined from those of the chunks
        blocks.append(_Block("sparse", here * places, always, chunks))
        blocks.append(_Block("sparse", here * number, always, 2 * chunks))
    if several:  # the generator holds a chunk's entries while it selects the next one's
        blocks.append(_Block("sparse", here * places, ("selects",)))
        blocks.append(_Block("sparse", here * number, ("selects",), 2))
    # What the objective computes on the way, entry by entry.
    activating = {"gated": 4, "jumprelu": 2}.get(plan.config.sparsity, 1)
    blocks.append(_Block("sparse", here * number, ("selects",), activating))
    temporary = {"gated": 7, "jumprelu": 6, "standard": 2}.get(plan.config.sparsity, 1)
    blocks.append(_Block("sparse", held * number, ("learns",), temporary))
    rows = min(plan.batch_size, chunks * chunk_rows(plan))
    if held > DENSE_SHARE * rows * plan.d_sae:
        blocks.append(_Block("sparse", float(FLOAT * rows * plan.d_sae), ("learns",)))
    else:  # grouped by latent: sorted keys, their order, rows in it, bags; values in it
        blocks.append(_Block("sparse", held * INDEX, ("learns",), 5))
        blocks.append(_Block("sparse", held * number, ("learns",), 3))
    return blocks


def _aux_blocks(plan: Plan) -> list[_Block]:
    """Four code matrices of a chunk, the dead latents' rows and their gradients."""
    if not plan.config.auxk:
        return []
    dead = DEAD_SHARE * plan.d_sae
    cells = min(plan.batch_size * dead, CHUNK_CELLS / 4)
    blocks = [
        _Block("pre-activations", FLOAT * cells, ("auxk",), 4),
        _Block("gradients", FLOAT * dead * plan.d_in, ("auxk",), 2),
        _Block("gradients", FLOAT * dead * plan.d_out, ("auxk",), 2),
    ]
    # They come where pre-activations were; only what is larger than those is new.
    return [block for block in blocks if block.bytes > RETAINED]


def _learnt(plan: Plan) -> int:
    """Numbers that the optimiser moves."""
    d, o, m = plan.d_in, plan.d_out, plan.d_sae
    extra = {"jumprelu": m, "gated": 2 * m}.get(plan.config.sparsity, 0)
    skip = d * o if plan.config.wiring == "skip_transcoder" else 0
    return m * (d + o) + m + o + extra + skip


def forward_bytes(run: RunShape) -> float:
    """Activations at the fullest moment of a captured batch: the stream, its normed copies, the
    MLP's intermediate ones, and what is captured and picked from it."""
    captured = run.capture_tokens * sum(site.channels for site in run.sites)
    return _inside_bytes(run) + 2.0 * captured * run.model.weight_bytes


def _inside_bytes(run: RunShape) -> float:
    model = run.model
    return float(run.capture_tokens * model.weight_bytes * 4 * (model.d_model + model.d_mlp))


def memory_phases(run: RunShape, machine: Machine) -> tuple[Phase, ...]:
    """What is in memory in each stretch of the run."""
    host = "device" if machine.host_free is None else "host"
    sites = [site_memory(site.plan) for site in run.sites]
    base = [] if machine.ready else [Part("PyTorch", RUNTIME, place=host)]
    weights = Part("model", run.model.bytes)
    forward = Part("forward pass", forward_bytes(run))
    parameters = _per_site("SAE parameters", [site.parameters for site in sites])
    lasting = [
        parameters,
        _per_site("optimiser moments", [site.moments for site in sites]),
        _per_site("counters", [site.counters for site in sites]),
    ]
    source = base
    if run.source == "stream":
        source = [*base, weights, forward, Part("activation buffers", _ring_bytes(run), place=host)]
    phases = [
        Phase("prepare", (*source, parameters, *_sample_parts(run))),
        Phase("train", (*source, *lasting, *_learning_parts(run, sites, host))),
        Phase("finish", (*source, parameters, *_finishing_parts(run, sites, host))),
        Phase("evaluate", (*base, weights, parameters, *_loss_parts(run))),
    ]
    if run.source in ("extract", "hybrid"):
        writing = Part("rows to be written", _row_bytes(run, run.buffer_tokens, 4), place=host)
        # In portions, the dictionaries wait in memory while the model runs again.
        beside = lasting if run.source == "hybrid" else []
        phases.insert(0, Phase("extract", (*base, weights, forward, writing, *beside)))
    return tuple(phases)


def _per_site(name: str, values: Sequence[float]) -> Part:
    return Part(name, sum(values), per_site=tuple(values))


def _row_bytes(run: RunShape, tokens: int, size: int = FLOAT) -> float:
    """Rows of every site's input, and output where it is another."""
    return float(tokens * size * sum(site.channels for site in run.sites))


def _ring_bytes(run: RunShape) -> float:
    """Shuffling buffers in main memory, in the model's precision; while one is given away the
    next is filled."""
    rows = max(run.buffer_tokens, 2 * run.plan.batch_size) + run.plan.batch_size
    return RING * _row_bytes(run, rows, run.model.weight_bytes)


def _sample_tokens(run: RunShape) -> int:
    wanted = min(SAMPLE_TOKENS, max(2048, run.tokens // 4))
    return ceil(wanted / run.plan.batch_size) * run.plan.batch_size


# Rows scaled, and two copies for the median; twice as wide for what is solved in float64. Measured
# on 32,768 rows of 768 channels: 2.8, 5.8 and 6.6 for the first, second and last.
_SAMPLE_COPIES = {"sae": 3, "skip_sae": 6, "transcoder": 4, "skip_transcoder": 7}


def _sample_parts(run: RunShape) -> list[Part]:
    """The first batches, joined for the statistics; the copies that those take of one site's."""
    rows = _sample_tokens(run)
    widest = max(max(site.plan.d_in, site.plan.d_out) for site in run.sites)
    copies = _SAMPLE_COPIES[run.plan.config.wiring]
    return [
        Part("first batches, twice", 2 * _row_bytes(run, rows)),
        Part("their statistics", float(copies * FLOAT * rows * widest)),
    ]


def _learning_parts(run: RunShape, sites: Sequence[SiteMemory], host: str) -> list[Part]:
    """The site with the most of what passes; batches of all."""
    most = max(sites, key=lambda site: site.passing)
    return [
        Part("gradients", most.gradients),
        Part("pre-activations of a chunk", most.pre_activations),
        Part("sparse working set", most.sparse),
        Part("rows of a step", most.rows),
        Part("batches", _row_bytes(run, _sample_tokens(run) + run.plan.batch_size)),
        Part("held-out rows", _row_bytes(run, evaluation_tokens(run)), place=host),
    ]


def evaluation_tokens(run: RunShape) -> int:
    """Held-out tokens that are kept and judged on the way."""
    row = _row_bytes(run, 1)
    return min(EVALUATION_TOKENS, max(512, run.tokens // 64), int(EVALUATION_BYTES // row))


def _finishing_parts(run: RunShape, sites: Sequence[SiteMemory], host: str) -> list[Part]:
    """Calibrating: pre-activations of a chunk, their distance to the threshold and a mask, and
    those that may be chosen; the dictionary that is folded is there twice."""
    cells = max(min(2048 * site.plan.d_sae, CHUNK_CELLS) for site in run.sites)
    kept = sum(4.0 * FLOAT * CALIBRATION_TOKENS * site.plan.k for site in run.sites)
    return [
        Part("pre-activations of a chunk", (2 * FLOAT + 1.0) * cells),
        Part("distances to the threshold", kept, place=host),
        Part("folded copy", max(site.parameters for site in sites)),
    ]


def _loss_parts(run: RunShape) -> list[Part]:
    """The whole model with a dictionary spliced in: two sets of logits, the clean ones and the
    others, whose logarithms are taken in small pieces."""
    cells = min(run.capture_tokens * run.model.vocab_size, LOGIT_CELLS)
    return [
        Part("forward pass", _inside_bytes(run)),
        Part("logits", 2.0 * run.model.weight_bytes * cells),
    ]


def needs(phases: Sequence[Phase]) -> tuple[float, float]:
    """Bytes of the device and of the main memory beside it, each at its fullest moment."""
    return (
        max(phase.bytes("device") for phase in phases),
        max(phase.bytes("host") for phase in phases),
    )


# -------------------------------------------------------------------- disk


def extraction_bytes(tokens: int, channels: int) -> int:
    """Stored activations: two bytes a value, and 18 a row that say where it comes from: window
    (4), position (2), token id, document and place in it (4 each)."""
    return tokens * (2 * channels + 18)


def checkpoint_bytes(plan: Plan) -> float:
    """One dictionary in one checkpoint: parameters, moments, and when each latent last fired."""
    memory = site_memory(plan)
    return memory.parameters + memory.moments + INDEX * plan.d_sae


def export_bytes(plan: Plan) -> float:
    """One finished dictionary with the frequencies of its latents, float32."""
    d, o, m = plan.d_in, plan.d_out, plan.d_sae
    skip = d * o if "skip" in plan.config.wiring else 0
    # encoder, decoder, both biases, a threshold per latent, frequencies
    return float(FLOAT * (m * (d + o) + 3 * m + o + skip))


def disk_parts(run: RunShape) -> tuple[Part, ...]:
    checkpoints = [checkpoint_bytes(site.plan) for site in run.sites]
    kept = most_kept(sum(checkpoints))
    exports = [export_bytes(site.plan) for site in run.sites]
    parts = []
    if run.source in ("extract", "hybrid"):
        stored = stored_tokens(run)
        whole = extraction_bytes(stored, sum(site.channels for site in run.sites))
        shares = tuple(2.0 * stored * site.channels for site in run.sites)
        parts.append(Part("stored activations", whole, place="disk", per_site=shares))
    for name, factor, amounts in (
        ("checkpoints (best and newest)", kept, checkpoints),
        ("checkpoint being written", 1, checkpoints),
        ("finished SAEs", 1, exports),
    ):
        shares = tuple(factor * amount for amount in amounts)
        parts.append(Part(name, sum(shares), place="disk", per_site=shares))
    return tuple(parts)


def stored_tokens(run: RunShape) -> int:
    """Tokens whose activations are on disk at a time."""
    if run.stored_tokens is not None:
        return run.stored_tokens
    return min(run.tokens, PORTION_TOKENS) if run.source == "hybrid" else run.tokens
