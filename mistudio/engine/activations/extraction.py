"""From a model and text to stored activations: one forward pass a batch for all sites, shard by
shard, in a way that goes on where a killed process stopped.

The windows of a split come in one random order (the held-out split in its own), cut into blocks
of about `WRITE_BUFFER` tokens whose rows are shuffled together, and blocks into shards. All of it
follows from the seed and the numbers of windows, so a shard is the same whoever writes it when.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mistudio.engine.activations import statistics
from mistudio.engine.activations.positions import OUTLIER_MULTIPLE, countable
from mistudio.engine.activations.shards import (
    PART,
    ROW,
    STORAGE,
    SUMS,
    ShardRecord,
    ShardWriter,
    read_record,
    shard_name,
)
from mistudio.engine.activations.source import calibrate_medians
from mistudio.engine.activations.stream import ROW_ORDER, WINDOW_ORDER, Dropped, generator
from mistudio.engine.datasets.tokens import SPLITS, TokenSplit, TokenStore
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import Incompatible, InvalidInput, UserError

META, MANIFEST = "meta.json", "manifest.json"
FORMAT = 2
# Rows are shuffled in a buffer of this many before they are written, and read back in random
# blocks: a batch then mixes rows of hundreds of windows without random access to every row.
WRITE_BUFFER = 32768
# A shard is one block where that makes no more than this many in a split, else as many blocks as
# it takes: what a crash costs is a block or less than a hundredth of the work.
MOST_SHARDS = 128
HELDOUT_TOKENS = 24_576
TRAIN_WINDOWS, HELDOUT_WINDOWS = 8, 2  # at least


@dataclass(frozen=True)
class ActivationMeta:
    """What the folder holds. `blocks` are the row counts between shuffles: a window never crosses
    one. Values are stored times `scales[site]`, so that fp16 cannot overflow (rows beyond 10x the
    median norm are left out) and keeps its precision; reading undoes it. Scales are powers of two,
    so that they round nothing; bf16, which has fp32's range, needs none and has 1."""

    points: list[str]
    widths: dict[str, int]
    medians: dict[str, float]
    scales: dict[str, float]
    context: int
    tokens: dict[str, int]
    dropped_special: int
    dropped_outliers: int
    precision: str
    seed: int
    blocks: dict[str, list[int]]
    statistics: dict[str, Any]
    format: int = 1  # 1: a split is one flat file a site; 2: shards
    storage: str = "fp16"
    shards: dict[str, list[int]] = field(default_factory=dict)  # rows of each
    batch_windows: int = 0
    limits: dict[str, Any] = field(default_factory=dict)
    definitions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """How the windows of one split are cut: `n_windows` into blocks, blocks into shards."""

    n_windows: int
    context: int
    batch_windows: int

    @property
    def block_windows(self) -> int:
        """Whole forward passes, so that those are the same wherever an extraction goes on."""
        return max(1, WRITE_BUFFER // self.context // self.batch_windows) * self.batch_windows

    @property
    def shard_windows(self) -> int:
        blocks = -(-self.n_windows // self.block_windows)
        return max(1, -(-blocks // MOST_SHARDS)) * self.block_windows

    @property
    def n_shards(self) -> int:
        return -(-self.n_windows // self.shard_windows)

    def shard(self, number: int) -> range:
        """The places in the order of windows that a shard holds."""
        first = number * self.shard_windows
        return range(first, min(first + self.shard_windows, self.n_windows))


def estimate_bytes(n_tokens: int, widths: list[int]) -> int:
    """Disk that an extraction needs; both precisions take two bytes."""
    return n_tokens * (2 * sum(widths) + ROW.itemsize)


def extract(
    model: HookedDecoder,
    store: TokenStore,
    points: tuple[HookPoint, ...],
    folder: Path,
    *,
    max_tokens: int | None,
    max_samples: int | None = None,
    context: int = 128,
    batch_windows: int = 8,
    precision: str = "",
    storage: str = "fp16",
    seed: int = 0,
    progress: Progress = SILENT,
) -> ActivationMeta:
    """Write the activations of the text that the limits leave (see `choose_windows`).

    Where `folder` holds what a call with the same arguments left unfinished, its whole shards are
    kept and the result is, byte for byte, that of one call; what another call left is dropped.
    """
    check_storage(storage)
    if batch_windows < 1:
        raise InvalidInput(
            "The batch size is too small", "It must be 1 or more.", field="batch_windows"
        )
    for point in points:
        model.check_point(point)
    limits = {"max_tokens": max_tokens, "max_samples": max_samples}
    orders = choose_windows(store, context, max_tokens, max_samples, seed)
    asked = _identity(store, points, context, batch_windows, precision, storage, seed) | limits
    medians = _medians_of(folder, asked, points)
    if medians is None:
        medians = calibrate_medians(model, store.train, points, context)
    return write_activations(
        model,
        store,
        medians,
        folder,
        orders,
        context=context,
        batch_windows=batch_windows,
        precision=precision,
        storage=storage,
        seed=seed,
        limits=limits,
        progress=progress,
    )


def check_storage(storage: str) -> None:
    if storage not in STORAGE:
        raise InvalidInput(
            "Unknown precision of stored activations",
            f"{storage!r} is not one of {', '.join(STORAGE)}.",
            field="storage",
        )


def choose_windows(
    store: TokenStore,
    context: int,
    max_tokens: int | None,
    max_samples: int | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Which windows to run: a random choice of the training split, the held-out split in order.

    `max_samples` keeps to the windows that lie wholly in the dataset's first documents;
    `max_tokens` then to so many tokens in all. The held-out split gets its share, and where there
    is enough of it `HELDOUT_TOKENS`, up to a quarter of the whole: on fewer tokens rare latents
    look dead. Raises InvalidInput where too little is left.
    """
    store.train.require_windows(context, TRAIN_WINDOWS, "Extraction")
    store.heldout.require_windows(context, HELDOUT_WINDOWS, "Judging the result")
    counts = {split: store.split(split).n_windows(context) for split in SPLITS}
    if max_samples is not None:
        counts = {s: store.split(s).windows_within(max_samples, context) for s in SPLITS}
        _require_samples(counts, max_samples, context)
    total = sum(counts.values())
    least = TRAIN_WINDOWS + HELDOUT_WINDOWS
    wanted = total if max_tokens is None else min(max(least, max_tokens // context), total)
    share = wanted * counts["heldout"] / total
    enough = min(HELDOUT_TOKENS / context, wanted / 4)
    n_heldout = min(counts["heldout"], max(HELDOUT_WINDOWS, round(max(share, enough))))
    # The one thing that grows with the dataset: 4 bytes a window.
    train = np.arange(counts["train"], dtype=np.uint32)
    generator(seed, WINDOW_ORDER).shuffle(train)
    n_train = max(TRAIN_WINDOWS, wanted - n_heldout)
    return {"train": train[:n_train], "heldout": np.arange(n_heldout, dtype=np.uint32)}


def _require_samples(counts: Mapping[str, int], samples: int, context: int) -> None:
    for split, needed in (("train", TRAIN_WINDOWS), ("heldout", HELDOUT_WINDOWS)):
        if counts[split] < needed:
            raise InvalidInput(
                "Too few samples",
                f"The dataset's first {samples:,} documents give {counts[split]} whole windows of "
                f"{context} tokens in the {split} split; at least {needed} are needed.",
                "Allow more samples, or choose a shorter context.",
                field="max_samples",
            )


def write_activations(
    model: HookedDecoder,
    store: TokenStore,
    medians: Mapping[HookPoint, float],
    folder: Path,
    orders: Mapping[str, np.ndarray],
    *,
    context: int,
    batch_windows: int,
    precision: str,
    seed: int,
    progress: Progress,
    storage: str = "fp16",
    limits: Mapping[str, Any] | None = None,
) -> ActivationMeta:
    """Write the windows in `orders` of each split, at the points of `medians`.

    Memory stays flat in the number of tokens. `meta.json` is written last: a folder without it is
    not whole.
    """
    points = tuple(medians)
    _require_numbers(medians)
    identity = _identity(store, points, context, batch_windows, precision, storage, seed)
    identity |= dict(limits or {})
    _take_up(folder, identity, medians)
    layouts = {s: Layout(len(orders[s]), context, batch_windows) for s in SPLITS}
    work = _Extraction(model, store, dict(medians), folder, layouts, storage, seed, progress)
    with work:
        for split in SPLITS:
            for number in range(layouts[split].n_shards):
                work.shard(split, number, orders[split])
        work.settle()
    meta = _meta(work, identity, limits)
    write_json(folder / META, asdict(meta))
    return meta


def _require_numbers(medians: Mapping[HookPoint, float]) -> None:
    for point, median in medians.items():
        if not math.isfinite(median) or median <= 0:
            raise not_finite(point)


def not_finite(point: HookPoint) -> UserError:
    return Incompatible(
        "The model's activations are no numbers",
        f"At {point.name} they are infinite, undefined or all zero.",
        "Its precision may be too narrow for it: load it as bf16 or fp32. If that does not help, "
        "its weights are damaged.",
    )


def scale_of(storage: str, width: int, median: float) -> float:
    """What values are multiplied by before they are stored: the power of two that brings rows of
    the median norm nearest to a root mean square of 1. No stored row is longer than
    `OUTLIER_MULTIPLE` medians, so in fp16 no value exceeds 10 sqrt(2 width): it cannot overflow
    (65,504) below a width of 20 million."""
    if storage == "bf16":
        return 1.0
    return 2.0 ** round(math.log2(math.sqrt(width) / median))


# -------------------------------------------------------------------- what was begun


def _identity(
    store: TokenStore,
    points: tuple[HookPoint, ...],
    context: int,
    batch_windows: int,
    precision: str,
    storage: str,
    seed: int,
) -> dict[str, Any]:
    """All that shards depend on, the model apart: whoever goes on brings the same one."""
    meta = store.train.meta
    return {
        "format": FORMAT,
        "points": [point.name for point in points],
        "context": context,
        "batch_windows": batch_windows,
        "write_buffer": WRITE_BUFFER,
        "most_shards": MOST_SHARDS,
        "precision": precision,
        "storage": storage,
        "seed": seed,
        "tokenizer": meta.tokenizer_hash,
        "documents": meta.documents_sha256,
        "tokens": dict(meta.tokens),
    }


def _medians_of(
    folder: Path, identity: dict[str, Any], points: tuple[HookPoint, ...]
) -> dict[HookPoint, float] | None:
    """Those that an unfinished call with this identity measured."""
    manifest = _manifest(folder)
    if manifest is None or manifest.get("identity") != identity:
        return None
    return {point: float(manifest["medians"][point.name]) for point in points}


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "medians" in found else None


def _take_up(folder: Path, identity: dict[str, Any], medians: Mapping[HookPoint, float]) -> None:
    """Keep what belongs to this extraction, drop what does not."""
    wanted = {
        "identity": identity,
        "medians": {point.name: median for point, median in medians.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    if _manifest(folder) != json.loads(json.dumps(wanted)):
        for split in SPLITS:
            shutil.rmtree(folder / split, ignore_errors=True)
        (folder / META).unlink(missing_ok=True)
        write_json(folder / MANIFEST, wanted)
    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)
        for part in (folder / split).glob(f"*{PART}"):
            shutil.rmtree(part, ignore_errors=True)


def unfinished(folder: Path) -> bool:
    """Whether an extraction was begun in `folder` and has something to go on from."""
    return _manifest(folder) is not None and any(folder.glob("*/[0-9]*"))


def write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + PART)
    with part.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _meta(
    work: _Extraction, identity: Mapping[str, Any], limits: Mapping[str, Any] | None
) -> ActivationMeta:
    sums = [work.folder_of("train", i) / SUMS for i in range(len(work.records["train"]))]
    context = work.layouts["train"].context
    found = statistics.gathered(sums, work.widths, context)
    statistics.write(work.folder, found)
    everything = [record for split in SPLITS for record in work.records[split]]
    return ActivationMeta(
        points=list(work.widths),
        widths=work.widths,
        medians={point.name: median for point, median in work.medians.items()},
        scales=work.scales,
        context=context,
        tokens={s: sum(record.rows for record in work.records[s]) for s in SPLITS},
        dropped_special=sum(record.special for record in everything),
        dropped_outliers=sum(record.outliers for record in everything),
        precision=identity["precision"],
        seed=identity["seed"],
        blocks={s: [n for record in work.records[s] for n in record.blocks] for s in SPLITS},
        statistics={point: site.summary for point, site in found.items()},
        format=FORMAT,
        storage=work.storage,
        shards={s: [record.rows for record in work.records[s]] for s in SPLITS},
        batch_windows=identity["batch_windows"],
        limits=dict(limits or {}),
        definitions=statistics.DEFINITIONS,
    )


# -------------------------------------------------------------------- the work itself


@dataclass(frozen=True)
class SiteBatch:
    """One site's part of a forward pass: `rows` [n, d] as the model gave them, `stored` as they
    are written; of all its tokens, [batch, seq], the `norms` and which are `beyond` the limit."""

    rows: Tensor
    stored: Tensor
    norms: Tensor
    beyond: Tensor


@dataclass(frozen=True)
class ReducedBatch:
    """A forward pass and which of its tokens are kept: `places` [n] of `ROW`, row i of all sites
    being the same token. `read` are the tokens that are no padding, `may_count` those that are
    neither special nor at position 0, [batch, seq]."""

    sites: dict[str, SiteBatch]
    places: np.ndarray
    read: Tensor
    may_count: Tensor


def reduce_batch(
    model: HookedDecoder,
    tokens: TokenSplit,
    medians: Mapping[HookPoint, float],
    windows: np.ndarray,
    context: int,
    storage: str,
) -> ReducedBatch:
    """Run the model over `windows`. Raises `Incompatible` where it gives no numbers."""
    ids = tokens.batch(windows, context).to(model.device)
    captured = model.capture(ids, medians)
    may_count = countable(ids, tokens.meta.special_ids)
    mask = may_count.clone()
    norms, beyond = {}, {}
    for point, values in captured.items():
        norms[point] = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
        if not bool((norms[point].isfinite() | ~may_count).all()):
            raise not_finite(point)
        beyond[point] = may_count & (norms[point] > OUTLIER_MULTIPLE * medians[point])
        mask &= ~beyond[point]
    places = mask.flatten().nonzero().squeeze(1)
    sites = {}
    for point, values in captured.items():
        rows = values.flatten(0, 1).index_select(0, places)
        scale = scale_of(storage, rows.shape[1], medians[point])
        stored = (rows if scale == 1.0 else rows.float() * scale).to(STORAGE[storage])
        sites[point.name] = SiteBatch(rows, stored, norms[point], beyond[point])
    pad = tokens.meta.pad_id
    read = torch.ones_like(may_count) if pad is None else ids != pad
    return ReducedBatch(sites, origins(tokens, windows, ids, places, context), read, may_count)


class _Buffer:
    """Memory for the rows of a block."""

    def __init__(self, widths: Mapping[str, int], capacity: int, dtype: torch.dtype) -> None:
        self.values = {
            point: torch.empty((capacity, width), dtype=dtype) for point, width in widths.items()
        }
        self.rows = np.empty(capacity, ROW)
        self.filled = 0
        self.busy: Future[Any] | None = None

    def add(self, values: Mapping[str, Tensor], rows: np.ndarray) -> None:
        """`values` [n, d] on any device, in the unit of the file; `rows` [n] of `ROW`."""
        end = self.filled + len(rows)
        for point, found in values.items():
            self.values[point][self.filled : end].copy_(found)
        self.rows[self.filled : end] = rows
        self.filled = end


class _Extraction:
    """Runs the model and hands full buffers to a thread that shuffles and writes them, so that
    the disk does not hold up the model. Two buffers: one is filled while the other is written."""

    def __init__(
        self,
        model: HookedDecoder,
        store: TokenStore,
        medians: dict[HookPoint, float],
        folder: Path,
        layouts: Mapping[str, Layout],
        storage: str,
        seed: int,
        progress: Progress,
    ) -> None:
        self.model, self.store, self.medians = model, store, medians
        self.folder, self.layouts, self.storage = folder, layouts, storage
        self.widths = {point.name: model.width(point) for point in medians}
        self.scales = {
            point.name: scale_of(storage, self.widths[point.name], median)
            for point, median in medians.items()
        }
        self.records: dict[str, list[ShardRecord]] = {split: [] for split in SPLITS}
        self._seed, self._progress = seed, progress
        self._seen = 0
        self._total = sum(layout.n_windows * layout.context for layout in layouts.values())
        self._buffers: list[_Buffer] = []
        self._writers: list[ShardWriter] = []  # the last ones; some may not be done
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-activations")
        self._pending: list[Future[Any]] = []
        self._broken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown(wait=True)  # what was handed over is worth keeping: at most a block
        for writer in self._writers:
            writer.discard()

    def folder_of(self, split: str, number: int) -> Path:
        return self.folder / split / shard_name(number)

    def shard(self, split: str, number: int, order: np.ndarray) -> None:
        """Write one shard, where it is not there already."""
        layout = self.layouts[split]
        places = layout.shard(number)
        folder = self.folder_of(split, number)
        record = read_record(folder, self.widths, self.storage)
        if record is not None and record.windows == len(places):
            self.settle()  # the shards before it, so that the records are in order
            self.records[split].append(record)
            self._advance(len(places) * layout.context)
            return
        shutil.rmtree(folder, ignore_errors=True)
        writer = ShardWriter(folder, list(self.widths), self.storage)
        self._writers = [*self._writers[-2:], writer]
        device = self.model.device
        sums = {
            point: statistics.SiteSums(width, layout.context, device)
            for point, width in self.widths.items()
        }
        counts = Dropped()
        for first in range(places.start, places.stop, layout.block_windows):
            last = min(first + layout.block_windows, places.stop)
            buffer = self._free_buffer()
            for start in range(first, last, layout.batch_windows):
                self._progress.check()
                windows = order[start : min(start + layout.batch_windows, last)]
                counts += self._batch(split, windows, buffer, sums)
                self._advance(len(windows) * layout.context)
            rows = self._row_order(split, first // layout.block_windows, buffer.filled)
            buffer.busy = self._hand_over(writer.append, buffer.values, buffer.rows, rows)
        tensors = {k: v for point, site in sums.items() for k, v in site.tensors(point).items()}
        self._hand_over(self._finish, writer, split, tensors, len(places), counts)

    def settle(self) -> None:
        """Wait until all that was handed over is on the disk."""
        while self._pending:
            self._pending.pop(0).result()

    def _batch(
        self,
        split: str,
        windows: np.ndarray,
        buffer: _Buffer,
        sums: Mapping[str, statistics.SiteSums],
    ) -> Dropped:
        """One forward pass: what counts goes into the buffer and the sums."""
        context = self.layouts[split].context
        tokens = self.store.split(split)
        batch = reduce_batch(self.model, tokens, self.medians, windows, context, self.storage)
        for point, site in batch.sites.items():
            sums[point].add(site.rows, site.norms, batch.read, batch.may_count, site.beyond)
        buffer.add({point: site.stored for point, site in batch.sites.items()}, batch.places)
        special = int((~batch.may_count).sum())
        kept = len(batch.places)
        return Dropped(special, batch.may_count.numel() - special - kept, kept)

    def _free_buffer(self) -> _Buffer:
        """The buffer that was handed over longest ago, written by now, and empty."""
        if not self._buffers:
            n = max(min(one.block_windows, one.n_windows) for one in self.layouts.values())
            capacity = n * self.layouts["train"].context
            dtype = STORAGE[self.storage]
            self._buffers = [_Buffer(self.widths, capacity, dtype) for _ in range(2)]
        self._buffers.reverse()
        buffer = self._buffers[0]
        if buffer.busy is not None:
            buffer.busy.result()
        self._raise_failures()
        buffer.busy, buffer.filled = None, 0
        return buffer

    def _hand_over(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """To the thread, which does one thing after another, and nothing more once one has
        failed: a shard that lacks a block must not get its name."""

        def unless_broken() -> None:
            if self._broken:
                return
            try:
                work(*arguments)
            except BaseException:
                self._broken = True
                raise

        future = self._thread.submit(unless_broken)
        self._pending.append(future)
        return future

    def _raise_failures(self) -> None:
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()

    def _finish(
        self,
        writer: ShardWriter,
        split: str,
        sums: Mapping[str, Tensor],
        windows: int,
        counts: Dropped,
    ) -> None:
        record = writer.finish(sums, windows, counts.special, counts.outliers)
        self.records[split].append(record)

    def _row_order(self, split: str, block: int, n: int) -> np.ndarray:
        """The held-out split stays in reading order, so that a share of it is whole documents."""
        if split != "train":
            return np.arange(n)
        return generator(self._seed, ROW_ORDER, block).permutation(n)

    def _advance(self, tokens: int) -> None:
        self._seen += tokens
        self._progress.report(self._seen, self._total, tokens=self._seen)


def batch_seconds(
    model: HookedDecoder,
    store: TokenStore,
    medians: Mapping[HookPoint, float],
    windows: np.ndarray,
    *,
    context: int,
    storage: str,
    times: int = 2,
    progress: Progress = SILENT,
) -> float:
    """Seconds that a batch over these windows of the training split takes, the writing apart: the
    median of `times`, after one that warms up."""
    took = []
    for _ in range(times + 1):
        progress.check()
        began = time.perf_counter()
        batch = reduce_batch(model, store.train, medians, windows, context, storage)
        for site in batch.sites.values():
            site.stored.cpu()
        took.append(time.perf_counter() - began)
    return float(np.median(took[1:]))


def origins(
    tokens: TokenSplit, windows: np.ndarray, ids: Tensor, places: Tensor, context: int
) -> np.ndarray:
    """`ROW`s of the tokens at `places` (into the flattened `ids` [batch, seq]) of `windows`."""
    where = places.cpu().numpy()
    rows = np.empty(len(where), ROW)
    seq = ids.shape[1]
    rows["window"] = windows[where // seq]
    rows["position"] = where % seq
    rows["token"] = ids.flatten()[places].cpu().numpy()
    rows["document"], rows["place"] = tokens.origins(rows["window"], rows["position"], context)
    return rows
