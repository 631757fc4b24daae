"""What an extraction will take: disk and memory from shapes alone, time from a batch that runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mistudio.engine.activations.extraction import Layout, batch_seconds, estimate_bytes
from mistudio.engine.activations.shards import WRITE_ROWS
from mistudio.engine.activations.source import calibrate_medians
from mistudio.engine.datasets.tokens import SPLITS, TokenStore
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.training.cost import ModelShape
from mistudio.engine.training.footprint import RUNTIME

BUFFERS = 2  # one is filled while the other is written
FLOAT, DOUBLE = 4, 8


@dataclass(frozen=True)
class ExtractionPlan:
    """`tokens` are read, of which at most so many rows are stored; `disk` is in bytes and an upper
    bound by the same token. `memory` are the parts of the fullest moment, in bytes, by name.
    `batch_seconds` were measured; None where nothing was run."""

    tokens: int
    windows: int
    batches: int
    shards: int
    disk: int
    memory: dict[str, int]
    batch_seconds: float | None = None

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def seconds(self) -> float | None:
        """The writing runs beside the model and takes no time of its own, unless the disk is
        slower than the model."""
        return None if self.batch_seconds is None else self.batches * self.batch_seconds

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "memory_bytes": self.memory_bytes, "seconds": self.seconds}


def plan_extraction(
    windows: Mapping[str, int],
    context: int,
    batch_windows: int,
    widths: Sequence[int],
    shape: ModelShape,
    batch: float | None = None,
) -> ExtractionPlan:
    """`windows` by split (see `choose_windows`), `widths` of the sites; nothing is loaded."""
    layouts = [Layout(windows[split], context, batch_windows) for split in SPLITS]
    tokens = sum(layout.n_windows for layout in layouts) * context
    return ExtractionPlan(
        tokens=tokens,
        windows=sum(layout.n_windows for layout in layouts),
        batches=sum(-(-layout.n_windows // batch_windows) for layout in layouts),
        shards=sum(layout.n_shards for layout in layouts),
        disk=estimate_bytes(tokens, list(widths)),
        memory=memory_parts(layouts, widths, shape),
        batch_seconds=batch,
    )


def memory_parts(
    layouts: Sequence[Layout], widths: Sequence[int], shape: ModelShape
) -> dict[str, int]:
    """Bytes in memory at the fullest moment of an extraction, with PyTorch itself."""
    batch = layouts[0].batch_windows * layouts[0].context
    block = max(min(layout.block_windows, layout.n_windows) for layout in layouts)
    total, widest = sum(widths), max(widths, default=0)
    # The stream and its normed copies, the MLP's intermediate ones.
    inside = batch * shape.weight_bytes * 4 * (shape.d_model + shape.d_mlp)
    # Rows picked, in float32 and scaled; for the sums in float64, and squared.
    picked = batch * widest * (shape.weight_bytes + 2 * FLOAT + 2 * DOUBLE)
    return {
        "PyTorch": RUNTIME,
        "model": shape.bytes,
        "forward pass": inside,
        # Captured, and what goes into the buffer.
        "captured": batch * total * (shape.weight_bytes + 2) + picked,
        "rows to be written": BUFFERS * block * layouts[0].context * 2 * total
        + WRITE_ROWS * 2 * widest,
    }


def measured_plan(
    model: HookedDecoder,
    store: TokenStore,
    points: tuple[HookPoint, ...],
    orders: Mapping[str, np.ndarray],
    shape: ModelShape,
    *,
    context: int,
    batch_windows: int,
    storage: str,
    progress: Progress = SILENT,
) -> ExtractionPlan:
    """The plan with the time of a batch that is really run, twice after one that warms up, with
    all that an extraction does to it but the writing."""
    windows = {split: len(orders[split]) for split in SPLITS}
    medians = calibrate_medians(model, store.train, points, context)
    batch = batch_seconds(
        model,
        store,
        medians,
        orders["train"][:batch_windows],
        context=context,
        storage=storage,
        progress=progress,
    )
    widths = [model.width(point) for point in points]
    return plan_extraction(windows, context, batch_windows, widths, shape, batch)
