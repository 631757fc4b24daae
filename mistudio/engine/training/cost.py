"""What a step and a forward pass cost, counted from what the code does; seconds on a device from
rates that a short probe measures.

Importing this needs no torch: the window may ask for a cost at any time. Only `probe_device` and
`shape_of_decoder` use it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import NormalDist, median
from typing import TYPE_CHECKING, Any

from mistudio.engine.training.config import Plan

if TYPE_CHECKING:
    from mistudio.engine.models.hooks import HookedDecoder
    from mistudio.engine.models.loading import ModelSummary

FLOAT = 4  # bytes; training is in float32
INDEX = 8  # bytes; torch's indices
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


# -------------------------------------------------------------------- models


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder in channels, heads and tokens; parameters are counts.

    `block_parameters` is the mean over blocks, of which `mlp_parameters` belong to the MLP.
    `weight_bytes` is per number that the model computes with; `stored_bytes` is what all weights
    take where they are quantised, else None.
    """

    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    parameters: int
    block_parameters: int
    mlp_parameters: int
    weight_bytes: int
    stored_bytes: int | None = None

    @property
    def gated_mlp(self) -> bool:
        return self.mlp_parameters > 2.5 * self.d_model * self.d_mlp

    @property
    def bytes(self) -> int:
        """Of the weights of the whole model: that is what is loaded."""
        if self.stored_bytes is not None:
            return self.stored_bytes
        return self.parameters * self.weight_bytes

    def parameters_up_to(self, layer: int, site: str) -> int:
        """Parameters of the blocks, and of the part of the last one, that run before `site`."""
        whole, attention, mlp = _parts_before(layer, site)
        before_mlp = self.block_parameters - self.mlp_parameters
        return whole * self.block_parameters + attention * before_mlp + mlp * self.mlp_parameters


def model_shape(summary: ModelSummary, weight_bytes: int) -> ModelShape:
    """The shape of a model folder from its summary alone (`loading.describe`); loads nothing.

    Parameters outside the blocks are taken to be the embeddings, tied or not: position tables and
    the like (GPT-2: 0.6 %) count as blocks. A mixture of experts counts all of its experts: its
    memory is right and its time too long.
    """
    embeddings = summary.vocab_size * summary.d_model * (1 if summary.tied_embeddings else 2)
    block = max(0, summary.parameters - embeddings) // max(summary.n_layers, 1)
    heads = max(summary.n_heads, 1)
    return ModelShape(
        n_layers=summary.n_layers,
        d_model=summary.d_model,
        d_mlp=summary.d_mlp,
        n_heads=heads,
        n_kv_heads=summary.n_kv_heads or heads,
        vocab_size=summary.vocab_size,
        parameters=summary.parameters,
        block_parameters=block,
        mlp_parameters=_mlp_parameters(
            block, summary.d_model, summary.d_mlp, heads, summary.n_kv_heads or heads
        ),
        weight_bytes=weight_bytes,
    )


def shape_of_decoder(decoder: HookedDecoder) -> ModelShape:
    """The shape of a loaded model; its parameters are counted."""
    from mistudio.engine.models.hooks import HookPoint
    from mistudio.engine.models.quantise import parameter_count, precision_of

    config: Any = decoder.model.config
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    d_model = decoder.d_model
    heads = int(getattr(text, "num_attention_heads", 0) or 1)
    d_mlp = (
        getattr(text, "intermediate_size", None)
        or getattr(text, "ffn_dim", None)
        or getattr(text, "n_inner", None)
        or 4 * d_model
    )
    in_blocks = 0
    for layer in range(decoder.n_layers):
        path = decoder.module_path(HookPoint("resid_pre", layer))
        in_blocks += parameter_count(decoder.model.get_submodule(path))
    block = in_blocks // decoder.n_layers
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    return ModelShape(
        n_layers=decoder.n_layers,
        d_model=d_model,
        d_mlp=int(d_mlp),
        n_heads=heads,
        n_kv_heads=kv_heads,
        vocab_size=decoder.vocab_size,
        parameters=parameter_count(decoder.model),
        block_parameters=block,
        mlp_parameters=_mlp_parameters(block, d_model, int(d_mlp), heads, kv_heads),
        weight_bytes=decoder.dtype.itemsize,
        stored_bytes=sum(p.numel() * p.element_size() for p in decoder.model.parameters())
        if precision_of(decoder.model).startswith("q")
        else None,
    )


def _mlp_parameters(block: int, d_model: int, d_mlp: int, heads: int, kv_heads: int) -> int:
    """Two matrices or, gated, three: whichever leaves what an attention of these heads needs."""
    attention = 2 * d_model * d_model + 2 * d_model * d_model * kv_heads // heads
    return min(
        (count * d_model * d_mlp for count in (2, 3)),
        key=lambda mlp: abs(block - mlp - attention),
    )


def _parts_before(layer: int, site: str) -> tuple[int, int, int]:
    """(whole blocks, 1 if the attention of the next runs, 1 if its MLP does) before `site`.

    Everything behind the deepest site is left out (`HookedDecoder.capture`).
    """
    return {
        "resid_pre": (layer, 0, 0),
        "attn_out": (layer, 1, 0),
        "mlp_in": (layer, 1, 0),
        "mlp_out": (layer, 1, 1),
        "resid_post": (layer + 1, 0, 0),
    }[site]


def deepest(places: Iterable[tuple[int, str]]) -> tuple[int, str]:
    """The (layer, site) behind which nothing need run."""

    def blocks(place: tuple[int, str]) -> tuple[int, int]:
        whole, attention, mlp = _parts_before(*place)
        return whole, attention + mlp

    return max(places, key=blocks)


# -------------------------------------------------------------------- devices


@dataclass(frozen=True)
class DeviceSpeed:
    """What a device reaches in the kinds of work that training is made of; all per second.

    `gemm_flops`: a matrix product in float32; `half_flops`: one in bf16 or fp16;
    `attention_flops`: the two products of causal attention; `bandwidth`, `half_bandwidth`: bytes
    read and written by element-wise work on float32 and on 16-bit numbers (which a CPU converts,
    and gains nothing); `gather`: bytes of a table's rows summed by index (`embedding_bag`);
    `scan`, `rank`, `top`: cells compared with a threshold and collected, ranked in one flat
    top-k, ranked row by row; `sort`: keys. `launch` is the seconds that a small operation takes
    on all threads; where `queued`, operations run behind the program's back, and only the longer
    of the two counts.
    """

    name: str
    gemm_flops: float
    half_flops: float
    attention_flops: float
    bandwidth: float
    half_bandwidth: float
    gather: float
    scan: float
    rank: float
    top: float
    sort: float
    launch: float
    queued: bool = False


@dataclass(frozen=True)
class Work:
    """One line of what is done, and how much of each kind of work it is.

    `flops` are those of dense matrix products, `sparse_flops` those of gathered rows (their time
    is that of `gathered`); bytes (`half_moved`: of 16-bit numbers) and cells as in `DeviceSpeed`;
    `launches` is operations begun.
    """

    name: str
    flops: float = 0.0
    half_flops: float = 0.0
    attention_flops: float = 0.0
    sparse_flops: float = 0.0
    moved: float = 0.0
    half_moved: float = 0.0
    gathered: float = 0.0
    scanned: float = 0.0
    ranked: float = 0.0
    topped: float = 0.0
    sorted: float = 0.0
    launches: float = 0.0

    def times(self, factor: float) -> Work:
        amounts: dict[str, Any] = {
            name: value * factor for name, value in vars(self).items() if name != "name"
        }
        return replace(self, **amounts)

    def seconds(self, speed: DeviceSpeed) -> float:
        """Of the device's work; launches are the program's."""
        return (
            self.flops / speed.gemm_flops
            + self.half_flops / speed.half_flops
            + self.attention_flops / speed.attention_flops
            + self.moved / speed.bandwidth
            + self.half_moved / speed.half_bandwidth
            + self.gathered / speed.gather
            + self.scanned / speed.scan
            + self.ranked / speed.rank
            + self.topped / speed.top
            + self.sorted / speed.sort
        )


@dataclass(frozen=True)
class Cost:
    """Lines of work that follow one another."""

    lines: tuple[Work, ...]

    @property
    def flops(self) -> float:
        """Of dense matrix products."""
        return sum(line.flops + line.half_flops + line.attention_flops for line in self.lines)

    @property
    def sparse_flops(self) -> float:
        return sum(line.sparse_flops for line in self.lines)

    @property
    def bytes_moved(self) -> float:
        """Read and written, gathered rows included; matrix products' operands are not."""
        return sum(line.moved + line.half_moved + line.gathered for line in self.lines)

    def seconds(self, speed: DeviceSpeed) -> float:
        device = sum(line.seconds(speed) for line in self.lines)
        program = sum(line.launches for line in self.lines) * speed.launch
        return max(device, program) if speed.queued else device + program


# -------------------------------------------------------------------- a step

# As in `step.py` and `sae/dictionary.py`, which need torch; a test holds them together.
CHUNK_CELLS = 16 * 1024**2
ENTRY_BUDGET = 4 * 1024**2
DENSE_SHARE = 0.08
AUX_EVERY = 4
K_AUX = 256
JUMPRELU_MARGIN = 0.25  # how far below its threshold an entry still matters, as a share of it

# Passes over a parameter that an optimiser makes: reads and writes of the weight, its gradient
# and its moments, in units of 4 bytes.
_OPTIMISER_PASSES = {"adam": 7.0, "adamw": 7.0, "sgd": 5.0, "adam8bit": 4.0}
# Operations begun in one step, for every part of the batch and for every chunk of pre-activations
# (counted on real ones).
_STEP_LAUNCHES, _PART_LAUNCHES, _CHUNK_LAUNCHES = 40, 29, 14
NESTED = 5  # widths of a Matryoshka dictionary


def part_rows(plan: Plan) -> int:
    """Rows of the batch whose gradient is taken at once, where entries are few."""
    return math.ceil(plan.batch_size / max(1, plan.config.gradient_accumulation))


def chunk_rows(plan: Plan) -> int:
    """Rows of the batch whose pre-activations exist at the same time."""
    return min(part_rows(plan), max(1, CHUNK_CELLS // plan.d_sae))


def threshold_rows(plan: Plan) -> int:
    """Rows that a batch's threshold is estimated from: an eighth, or what a chunk can hold."""
    if plan.config.sparsity not in ("batchtopk", "matryoshka"):
        return 0
    n = plan.batch_size
    stride = 2 ** min(3, max(1, n // 64).bit_length() - 1)
    while n * plan.d_sae > stride * CHUNK_CELLS:
        stride *= 2
    return math.ceil(n / stride)


def mean_entries(plan: Plan) -> float:
    """Entries of a token that the step works on, mean over the run: k, up to four times as many
    while k is annealed, and for JumpReLU also those just below the threshold (for normally
    distributed pre-activations, which they nearly are)."""
    start = max(plan.k, min(4 * plan.k, plan.d_sae // 2))
    k = plan.k + plan.config.anneal_share * (start - plan.k) / 2
    return _with_margin(plan, k)


def most_entries(plan: Plan) -> float:
    """Entries of a token at the beginning of the run, when there are most.

    ReLU and Gated start with biases of zero: half of all latents are active.
    """
    if plan.config.sparsity in ("standard", "gated"):
        return plan.d_sae / 2
    start = min(4 * plan.k, plan.d_sae // 2) if plan.config.anneal_share > 0 else plan.k
    return _with_margin(plan, max(plan.k, start))


def _with_margin(plan: Plan, k: float) -> float:
    if plan.config.sparsity != "jumprelu":
        return k
    share = min(max(k / plan.d_sae, 1e-9), 0.5)
    normal = NormalDist()
    return plan.d_sae * (1 - normal.cdf(normal.inv_cdf(1 - share) * (1 - JUMPRELU_MARGIN)))


def step_cost(plan: Plan, dead: int = 0) -> Cost:
    """One step of one dictionary, line by line as `SiteTrainer.step` does it, `dead` latents
    being dead.

    Letters as in the comments: n tokens, d and o channels in and out, m latents, e entries. An
    operand counts once per operation that reads or writes it.
    """
    config = plan.config
    n, d, o, m = plan.batch_size, plan.d_in, plan.d_out, plan.d_sae
    e = mean_entries(plan) * n
    cells = float(n) * m
    rows = chunk_rows(plan)
    chunks, parts = math.ceil(n / rows), math.ceil(n / part_rows(plan))
    dense = e > DENSE_SHARE * cells
    cell = 2 if config.mixed_precision else FLOAT
    lines = [
        # u = x * scale, the rows for the threshold first, centred = u - centre: reads and writes
        Work("scale and centre", moved=(6 if threshold_rows(plan) else 4) * n * d * FLOAT),
        *_wiring_lines(plan),
        *_encoder_lines(plan, cells, cell),
        *_selection_lines(plan, cells, cell),
        # pre[rows, latents], its clamp, which are active, which latents fired: about 80 bytes
        # an entry, indices being eight
        Work("collect entries", moved=80.0 * e),
        *_product_lines(e, n, d, o, m, dense),
        *_objective_lines(config.sparsity, e, n, o, m, dense),
        # + b_dec, - target, * factor, column sum, joined: 12 times [n, o]
        Work("error", moved=12.0 * n * o * FLOAT),
        # gradient of the encoder's bias through the centre: a matrix-vector product for each part
        Work(
            "bias gradients",
            flops=2.0 * m * d * parts,
            moved=float(FLOAT * m * d * parts) + 20.0 * e,
        ),
        # the gradients of every further part: written, added
        Work("add parts", moved=4.0 * FLOAT * (parts - 1) * m * (d + o)),
        # decoder part along its own rows (7 times [m, o]), norms and clipping (3 times both)
        Work("project and clip", moved=FLOAT * (7.0 * m * o + 3.0 * m * (d + o))),
        Work("optimiser", moved=FLOAT * _OPTIMISER_PASSES[config.optimizer] * m * (d + o)),
        Work("unit rows", moved=FLOAT * 3.0 * m * o),
        Work(
            "counters",
            moved=40.0 * m,
            launches=_STEP_LAUNCHES + _CHUNK_LAUNCHES * chunks + _PART_LAUNCHES * parts,
        ),
    ]
    if config.auxk and dead:
        lines.append(_aux_line(plan, dead).times(1 / AUX_EVERY))
    return Cost(tuple(lines))


def encode_cost(d_in: int, d_out: int, d_sae: int, k: int, tokens: int) -> Cost:
    """A finished dictionary on `tokens`: pre-activations, selection, reconstruction."""
    cells = float(tokens) * d_sae
    e = float(tokens) * k
    return Cost(
        (
            Work("encode", flops=2 * cells * d_in, moved=cells * FLOAT, scanned=cells),
            Work("decode", sparse_flops=2 * e * d_out, gathered=e * d_out * FLOAT),
        )
    )


def _wiring_lines(plan: Plan) -> list[Work]:
    n, d, o = plan.batch_size, plan.d_in, plan.d_out
    wiring = plan.config.wiring
    if wiring == "sae":
        return []
    lines = [Work("target", moved=3.0 * n * o * FLOAT)]
    if wiring == "skip_transcoder" or (wiring == "skip_sae" and plan.config.skip == "principal"):
        lines.append(Work("skip", flops=2.0 * n * d * o))
    if wiring == "skip_transcoder":  # its gradient, and the optimiser's passes over it
        lines.append(Work("skip gradient", flops=2.0 * n * d * o, moved=14.0 * d * o * FLOAT))
    return lines


def _encoder_lines(plan: Plan, cells: float, cell: int) -> list[Work]:
    """[n, d] @ [d, m]: 2ndm operations; the result is written once."""
    d, m = plan.d_in, plan.d_sae
    seen = threshold_rows(plan)
    if seen > chunk_rows(plan):  # chunks are smaller: these rows have a product of their own
        cells += float(seen) * m
    if not plan.config.mixed_precision:
        return [Work("encode", flops=2.0 * cells * d, moved=cells * cell)]
    # Encoder and rows are written in 16 bits; entries that these propose are computed again, and
    # those kept are copied (about 150 bytes each, indices being eight).
    e = mean_entries(plan) * plan.batch_size
    written = 6.0 * d * (m + plan.batch_size)
    return [
        Work("encode", half_flops=2.0 * cells * d, moved=cells * cell + written),
        Work("entries exactly", sparse_flops=2 * e * d, gathered=e * d * FLOAT, moved=150.0 * e),
    ]


def _selection_lines(plan: Plan, cells: float, cell: int) -> list[Work]:
    sparsity = plan.config.sparsity
    if sparsity == "topk":
        return [Work("select", topped=cells)]
    # compare with the threshold, find the entries above it
    lines = [Work("select", scanned=cells * cell / FLOAT)]
    if seen := threshold_rows(plan):  # one flat top-k over their cells
        lines.append(Work("threshold", ranked=float(seen) * plan.d_sae))
    return lines


def _product_lines(e: float, n: int, d: int, o: int, m: int, dense: bool) -> list[Work]:
    """Decode, the entries' gradients, the sums over the batch by latent."""
    if dense:
        return [
            # z @ W_dec, g @ W_dec^T, z^T @ g, dz^T @ centred; three dense code matrices
            Work(
                "dense products",
                flops=2.0 * n * m * (3 * o + d),
                moved=FLOAT * (5.0 * n * m + m * (d + o)),
            )
        ]
    return [
        # one row of [m, o] read and added for every entry; [n, o] written
        Work("decode", sparse_flops=2 * e * o, gathered=e * o * FLOAT, moved=n * o * FLOAT),
        # g[row] . W_dec[latent] for every entry
        Work("entry gradients", sparse_flops=2 * e * o, gathered=e * o * FLOAT, moved=20.0 * e),
        Work("group by latent", sorted=e, moved=60.0 * e),
        # one row of [n, d] and one of [n, o] for every entry; [m, d] and [m, o] written
        Work(
            "weight gradients",
            sparse_flops=2 * e * (d + o),
            gathered=e * (d + o) * FLOAT,
            moved=m * (d + o) * FLOAT + 40.0 * e,
        ),
    ]


def _objective_lines(sparsity: str, e: float, n: int, o: int, m: int, dense: bool) -> list[Work]:
    """What some objectives do beyond the plain reconstruction loss."""
    if sparsity == "matryoshka":  # errors and gradients of every nested width
        return [Work("nested widths", moved=16.0 * NESTED * n * o * FLOAT, launches=32 * NESTED)]
    if sparsity != "gated":
        return []
    if dense:  # the gate's own reconstruction and its gradient
        return [Work("gate", flops=4.0 * n * m * o, moved=FLOAT * 4.0 * n * m, launches=30)]
    return [
        Work(
            "gate",
            sparse_flops=4 * e * o,
            gathered=2 * e * o * FLOAT,
            moved=60.0 * e + 6.0 * n * o * FLOAT,
            launches=30,
        )
    ]


def _aux_line(plan: Plan, dead: int) -> Work:
    n, d, o = plan.batch_size, plan.d_in, plan.d_out
    cells = float(n) * dead
    return Work(
        "auxk",  # five products over the dead latents; a top-k; ten passes over [n, dead]
        flops=2.0 * cells * (2 * d + 3 * o),
        topped=cells,
        moved=FLOAT * (10 * cells + 6.0 * dead * (d + o)),
        launches=30,
    )


# -------------------------------------------------------------------- a forward pass

# Element-wise passes of a decoder block in transformers, in channels per token, outside and inside
# the MLP: counted on Llama (norms spelt out, rotary embeddings) and on GPT-2 (norms in one
# operation, but the MLP's activation in eight).
_GATED_PASSES, _PLAIN_PASSES = (48, 5), (22, 17)
_GATED_LAUNCHES, _PLAIN_LAUNCHES, _FORWARD_LAUNCHES = 40, 20, 20


def forward_cost(
    shape: ModelShape, layer: int, site: str, context: int = 128, tokens: int = 1024
) -> Cost:
    """One captured batch of `tokens` in windows of `context`, up to `site` of `layer`.

    Two operations per parameter and token, and 4 * context * d_model per token and layer for the
    attention's two products. Neither embedding nor unembedding is a product here: nothing behind
    the deepest site runs.
    """
    whole, attention, mlp = _parts_before(layer, site)
    blocks = whole + (attention + mlp) / 2
    flops = 2.0 * shape.parameters_up_to(layer, site) * tokens
    attend = 4.0 * context * shape.d_model * (whole + attention) * tokens
    outside, inside = _GATED_PASSES if shape.gated_mlp else _PLAIN_PASSES
    channels = outside * shape.d_model + inside * shape.d_mlp
    launches = _GATED_LAUNCHES if shape.gated_mlp else _PLAIN_LAUNCHES
    moved = blocks * channels * tokens * shape.weight_bytes
    begun = _FORWARD_LAUNCHES + launches * blocks
    if shape.weight_bytes == FLOAT:
        products = Work("matrix products", flops=flops)
        rest = Work("element by element", moved=moved, launches=begun)
    else:
        products = Work("matrix products", half_flops=flops)
        rest = Work("element by element", half_moved=moved, launches=begun)
    return Cost((products, Work("attention", attention_flops=attend), rest))


# -------------------------------------------------------------------- measuring a device

_PROBE_SECONDS = 0.05  # per kind of work


def probe_device(device: str = "cpu") -> DeviceSpeed:
    """Measure `device` with one small example of every kind of work, in under a second.

    The median of repeated runs: other programs slow training as they slow the probe. Imports
    torch.
    """
    import torch

    from mistudio.engine.models.loading import resolve_precision

    place = torch.device(device)
    queued = place.type != "cpu"
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type

    def wait() -> None:
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        elif place.type == "mps":
            torch.mps.synchronize()

    def seconds(work: Callable[[], object]) -> float:
        return _median_seconds(work, wait)

    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(place)

    n, d, m, k = 1024, 768, 2048, 32
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
        resolve_precision("auto", device), torch.bfloat16
    )
    with torch.inference_mode():
        x, table, bias = normal(n, d), normal(m, d), normal(m)
        gemm = seconds(lambda: torch.addmm(bias, x, table.T))
        low_x, low_table = x.to(half), table.to(half)
        half_gemm = seconds(lambda: low_x @ low_table.T)
        pre = torch.addmm(bias, x, table.T)
        level = float(pre.flatten()[: 1 << 18].topk((1 << 18) * k // m).values.min())
        scan = seconds(lambda: (pre > level).nonzero(as_tuple=True))
        part = pre[::8]
        rank = seconds(lambda: part.flatten().topk(len(part) * k, sorted=False))
        top = seconds(lambda: pre.topk(k, dim=1, sorted=False))
        picked = pre.topk(k, dim=1, sorted=False)
        latents, weights = picked.indices.flatten(), picked.values.flatten()
        offsets = torch.arange(0, len(latents), k, device=place)
        gather = seconds(
            lambda: torch.nn.functional.embedding_bag(
                latents, table, offsets, per_sample_weights=weights, mode="sum"
            )
        )
        sort = seconds(lambda: torch.sort(latents, stable=True))
        a, b, c = (torch.full((1 << 23,), 1.5, device=place) for _ in range(3))
        triad = seconds(lambda: torch.add(a, b, alpha=0.5, out=c))
        half_a, half_b, half_c = a.to(half), b.to(half), c.to(half)
        half_triad = seconds(lambda: torch.add(half_a, half_b, alpha=0.5, out=half_c))
        heads = normal(8, 8, 128, 64)
        attend = seconds(
            lambda: torch.nn.functional.scaled_dot_product_attention(
                heads, heads, heads, is_causal=True
            )
        )
        # Just large enough for all threads, whose waking is most of what it takes.
        small = normal(1 << 16)
        launch = seconds(lambda: [small.mul_(-1.0) for _ in range(20)]) / 20
    return DeviceSpeed(
        name=name,
        gemm_flops=2.0 * n * d * m / gemm,
        half_flops=2.0 * n * d * m / half_gemm,
        attention_flops=4.0 * 128 * heads.numel() / attend,
        bandwidth=3.0 * a.numel() * FLOAT / triad,
        half_bandwidth=3.0 * a.numel() * 2 / half_triad,
        gather=len(latents) * d * FLOAT / gather,
        scan=pre.numel() / scan,
        rank=part.numel() / rank,
        top=pre.numel() / top,
        sort=len(latents) / sort,
        launch=launch,
        queued=queued,
    )


def _median_seconds(work: Callable[[], object], wait: Callable[[], None]) -> float:
    work()
    wait()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < _PROBE_SECONDS:
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return median(times)


# -------------------------------------------------------------------- machines not measured


@dataclass(frozen=True)
class PublishedMachine:
    """Peaks as their maker gives them, per second: fp16 tensor cores (dense, summed in float32
    where that is slower), float32 without tensor cores, bytes of memory."""

    name: str
    tensor_flops: float
    float_flops: float
    bandwidth: float


# Orin Nano: half of the dense INT8 rate (20 and 33 TOPS), 1024 cores at 625 and 1020 MHz.
PUBLISHED = (
    PublishedMachine("Jetson Orin Nano 8 GB, 15 W", 10e12, 1.28e12, 68e9),
    PublishedMachine("Jetson Orin Nano 8 GB, Super", 17e12, 2.09e12, 102e9),
    PublishedMachine("RTX 3060 12 GB", 25e12, 12.7e12, 360e9),
)
GPT2_SMALL = ModelShape(
    n_layers=12,
    d_model=768,
    d_mlp=3072,
    n_heads=12,
    n_kv_heads=12,
    vocab_size=50257,
    parameters=124_439_808,
    block_parameters=7_087_872,
    mlp_parameters=2 * 768 * 3072,
    weight_bytes=2,
)
# Of the arithmetic peaks. The two EPYC cores that this was developed on reach 0.6 of theirs in
# large products (141 of the 237 GFLOP/s that 3.7 GHz would give) and half of that in a whole
# forward pass, whose element-wise work is counted apart here.
UTILISATION = (0.25, 0.40, 0.60)
BANDWIDTH_SHARE = 0.7  # of the memory's peak, for work that streams
# Bytes that pass through memory for one cell or key, from how CUDA does it: a comparison, its
# counts and its write; eight-bit radix passes over values; over values and indices.
_SCAN_BYTES, _RANK_BYTES, _SORT_BYTES = 8, 24, 256
_LAUNCH = 20e-6  # seconds; eager PyTorch on a slow core, where it is hidden behind the work


def published_speed(machine: PublishedMachine, utilisation: float) -> DeviceSpeed:
    """What a machine that nobody measured would do at that share of its published arithmetic
    peaks. A computation, not a measurement."""
    bandwidth = BANDWIDTH_SHARE * machine.bandwidth
    return DeviceSpeed(
        name=machine.name,
        gemm_flops=utilisation * machine.float_flops,
        half_flops=utilisation * machine.tensor_flops,
        attention_flops=utilisation * machine.tensor_flops,
        bandwidth=bandwidth,
        half_bandwidth=bandwidth,
        gather=bandwidth,  # rows are whole: a kilobyte or more
        scan=bandwidth / _SCAN_BYTES,
        rank=bandwidth / _RANK_BYTES,
        top=bandwidth / _RANK_BYTES,
        sort=bandwidth / _SORT_BYTES,
        launch=_LAUNCH,
        queued=True,
    )
