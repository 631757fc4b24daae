"""Activations on disk: one pass of the model writes every site, token-shuffled, fp16.

Layout of a folder: `meta.json`; per split `<split>/rows.npy` (structured: window, position) and
`<split>/<hook point>.f16`, a flat array [rows, d]. Row i is the same token in every site, and
`rows` leads from any activation back to its text.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mistudio.engine.activations.source import (
    TokenRows,
    WindowBatch,
    calibrate_medians,
    capture_windows,
    kept_rows,
)
from mistudio.engine.activations.stream import (
    BLOCK_ORDER,
    Batch,
    BatchStream,
    Courier,
    Dropped,
    State,
    generator,
    number,
    pack,
    require,
)
from mistudio.engine.datasets.tokens import SPLITS, TokenSplit, TokenStore
from mistudio.engine.models.hooks import HookedDecoder, HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.training.distributed import ALONE, World, own_rows
from mistudio.errors import CorruptFile

META = "meta.json"
ROW = np.dtype([("window", "<u4"), ("position", "<u2")])
# Rows are shuffled in a buffer of this many before they are written, and read back in random
# blocks: a batch then mixes rows of hundreds of windows without random access to every row.
WRITE_BUFFER = 32768
WRITE_ROWS = 4096  # at a time: a shuffled copy of the whole buffer would double the memory
READ_BLOCK = 32
HELDOUT_TOKENS = 24_576


@dataclass(frozen=True)
class ActivationMeta:
    """What the folder holds. `blocks` are the row counts between shuffles: a window never crosses
    one. Values are stored times `scales[site]`, so that fp16 cannot overflow
    (rows beyond 10x the median norm are left out) and keeps its precision; reading undoes it."""

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


def estimate_bytes(n_tokens: int, widths: list[int]) -> int:
    """Disk that an extraction needs."""
    return n_tokens * (2 * sum(widths) + ROW.itemsize)


def extract(
    model: HookedDecoder,
    store: TokenStore,
    points: tuple[HookPoint, ...],
    folder: Path,
    *,
    max_tokens: int,
    context: int = 128,
    batch_windows: int = 8,
    precision: str = "",
    seed: int = 0,
    progress: Progress = SILENT,
) -> ActivationMeta:
    """Write the activations of up to `max_tokens` tokens (both splits, in their proportion)."""
    store.train.require_windows(context, 8, "Extraction")
    store.heldout.require_windows(context, 2, "Judging the result")
    random = np.random.default_rng(seed)
    orders = _orders(store, context, max_tokens, random)
    return write_activations(
        model,
        store,
        calibrate_medians(model, store.train, points, context),
        folder,
        orders,
        random,
        context=context,
        batch_windows=batch_windows,
        precision=precision,
        seed=seed,
        progress=progress,
    )


def write_activations(
    model: HookedDecoder,
    store: TokenStore,
    medians: Mapping[HookPoint, float],
    folder: Path,
    orders: Mapping[str, np.ndarray],
    random: np.random.Generator,
    *,
    context: int,
    batch_windows: int,
    precision: str,
    seed: int,
    progress: Progress,
) -> ActivationMeta:
    """Write the windows in `orders` of each split, at the points of `medians`.

    Memory stays flat in the number of tokens. `meta.json` is written last: a folder without it is
    not whole.
    """
    points = tuple(medians)
    scales = {point: math.sqrt(model.width(point)) / medians[point] for point in points}
    total = sum(len(order) for order in orders.values()) * context
    writer = _Writer(folder, points, random, WRITE_BUFFER + batch_windows * context)
    moments = {point: _Moments(model.width(point)) for point in points}
    seen = 0
    counts = Dropped()
    for split in SPLITS:
        tokens: TokenSplit = store.split(split)
        with writer.split(split):
            for batch in capture_windows(
                model, tokens, points, medians, orders[split], context, batch_windows, progress
            ):
                rows, here = kept_rows(batch, tokens)
                values = {point: rows[point].float().cpu() for point in points}
                writer.add(
                    {point: values[point] * scales[point] for point in points}, places(batch)
                )
                if split == "train":
                    for point in points:
                        moments[point].add(values[point])
                counts += here
                seen += batch.ids.numel()
                progress.report(seen, total, tokens=seen)
    meta = ActivationMeta(
        points=[point.name for point in points],
        widths={point.name: model.width(point) for point in points},
        medians={point.name: medians[point] for point in points},
        scales={point.name: scales[point] for point in points},
        context=context,
        tokens=writer.tokens,
        dropped_special=counts.special,
        dropped_outliers=counts.outliers,
        precision=precision,
        seed=seed,
        blocks=writer.blocks,
        statistics={point.name: moments[point].summary() for point in points},
    )
    (folder / META).write_text(json.dumps(asdict(meta), indent=1), encoding="utf-8")
    return meta


def places(batch: WindowBatch) -> np.ndarray:
    """Window and position of the rows that count, as `rows.npy` holds them."""
    found = batch.mask.nonzero().cpu().numpy()
    rows = np.empty(len(found), ROW)
    rows["window"] = batch.windows[found[:, 0]]
    rows["position"] = found[:, 1]
    return rows


def _orders(
    store: TokenStore, context: int, max_tokens: int, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Which windows to run: a random choice of the training split, the held-out split in order.

    The held-out split gets its share, and where there is enough of it `HELDOUT_TOKENS`, up to a
    quarter of the whole: on fewer tokens rare latents look dead.
    """
    counts = {split: store.split(split).n_windows(context) for split in SPLITS}
    wanted = min(max(10, max_tokens // context), sum(counts.values()))
    share = wanted * counts["heldout"] / sum(counts.values())
    enough = min(HELDOUT_TOKENS / context, wanted / 4)
    n_heldout = min(counts["heldout"], max(2, round(max(share, enough))))
    train = generator.permutation(counts["train"])[: max(8, wanted - n_heldout)]
    return {"train": train, "heldout": np.arange(n_heldout)}


class StoredActivations:
    """A finished extraction as an `ActivationSource`."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """`device` is where batches go. Raises `CorruptFile` where the folder is not whole."""
        self.meta = _read_meta(folder)
        self.points = tuple(HookPoint.parse(name) for name in self.meta.points)
        self.medians = {point: self.meta.medians[point.name] for point in self.points}
        self._courier = Courier(torch.device(device))
        self._tables = {
            split: {point: self._open(folder, split, point) for point in self.points}
            for split in SPLITS
        }
        self.rows = {split: self._open_rows(folder, split) for split in SPLITS}

    def _open(self, folder: Path, split: str, point: HookPoint) -> torch.Tensor:
        shape = (self.meta.tokens[split], self.width(point))
        path = folder / split / f"{point.name}.f16"
        expected = 2 * shape[0] * shape[1]
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise _damaged(path, f"It has {found:,} bytes; {expected:,} were written.")
        if not shape[0]:
            return torch.empty(shape, dtype=torch.float16)
        # Mode c: nothing is written to the file, and torch takes no array that cannot be written.
        return torch.from_numpy(np.memmap(path, np.float16, "c", shape=shape))

    def _open_rows(self, folder: Path, split: str) -> np.ndarray:
        path = folder / split / "rows.npy"
        try:
            rows: np.ndarray = np.load(path, mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError) as exc:
            raise _damaged(path, "It is missing or cut short.") from exc
        if rows.dtype != ROW or rows.shape != (self.meta.tokens[split],):
            raise _damaged(path, "It does not belong to the activations beside it.")
        return rows

    @property
    def dropped(self) -> Dropped:
        kept = sum(self.meta.tokens.values())
        return Dropped(self.meta.dropped_special, self.meta.dropped_outliers, kept)

    def width(self, point: HookPoint) -> int:
        return self.meta.widths[point.name]

    def select(self, points: tuple[HookPoint, ...]) -> StoredActivations:
        """The same store, giving only some of its sites."""
        self.points = points
        return self

    def batches(
        self,
        batch_size: int,
        seed: int,
        progress: Progress = SILENT,
        state: State | None = None,
        world: World = ALONE,
    ) -> BatchStream:
        return _StoredStream(self, batch_size, seed, progress, state, world)

    def heldout(self, batch_size: int, limit: int, progress: Progress = SILENT) -> Iterator[Batch]:
        n = min(limit, self.meta.tokens["heldout"])
        for start in range(0, n, batch_size):
            progress.check()
            yield self.read("heldout", np.arange(start, min(start + batch_size, n)))

    def exclusive(self) -> AbstractContextManager[None]:
        return nullcontext()

    def token_rows(
        self, split: str, point: HookPoint, progress: Progress = SILENT
    ) -> Iterator[TokenRows]:
        """Every stored token once, window by window."""
        start = 0
        for size in self.meta.blocks[split]:
            progress.check()
            rows = np.asarray(self.rows[split][start : start + size])
            order = np.lexsort((rows["position"], rows["window"]))
            yield TokenRows(
                rows["window"][order].astype(np.int64),
                rows["position"][order].astype(np.int64),
                self._read(split, point, start + order),
            )
            start += size

    def read(self, split: str, rows: np.ndarray) -> Batch:
        """The given rows of every site, float32 on the device."""
        return {point: self._read(split, point, rows) for point in self.points}

    def _read(self, split: str, point: HookPoint, rows: np.ndarray) -> torch.Tensor:
        values = self._courier.send(point, self._tables[split][point], torch.from_numpy(rows))
        return values.div_(self.meta.scales[point.name])


class _StoredStream(BatchStream):
    """Epoch after epoch over the stored training rows, in blocks of `READ_BLOCK` rows.

    Every row comes once an epoch. A batch that an epoch's end cuts short goes on in the next, so
    the place is the number of rows given.
    """

    def __init__(
        self,
        store: StoredActivations,
        batch_size: int,
        seed: int,
        progress: Progress,
        state: State | None,
        world: World,
    ) -> None:
        self._store: StoredActivations | None = store
        self._own = own_rows(world, batch_size)
        self._batch_size, self._seed, self._progress = batch_size, seed, progress
        self._total = store.meta.tokens["train"]
        self._epoch = self._place = 0
        self._order: tuple[int, np.ndarray, int] = (-1, np.empty(0, np.uint32), 0)
        if state is not None:
            require(state, "seed", seed, "the seed")
            require(state, "rows", self._total, "the number of stored tokens")
            self._epoch, self._place = number(state, "epoch"), number(state, "place")

    def __next__(self) -> Batch:
        if self._store is None:
            raise StopIteration
        self._progress.check()
        parts = []
        wanted = self._batch_size
        while wanted:
            take = min(wanted, self._total - self._place)
            parts.append(self._rows(self._epoch, self._place, self._place + take))
            wanted -= take
            self._place += take
            if self._place == self._total:
                self._epoch, self._place = self._epoch + 1, 0
        return self._store.read("train", np.concatenate(parts)[self._own])

    def state(self) -> State:
        return pack(seed=self._seed, rows=self._total, epoch=self._epoch, place=self._place)

    def close(self) -> None:
        self._store = None

    def _rows(self, epoch: int, first: int, stop: int) -> np.ndarray:
        """The rows at places `first` to `stop` of an epoch."""
        if self._order[0] != epoch:
            # The one thing that grows with the store: 1 byte for 8 rows.
            order = np.arange(-(-self._total // READ_BLOCK), dtype=np.uint32)
            generator(self._seed, BLOCK_ORDER, epoch).shuffle(order)
            self._order = epoch, order, int(np.argmax(order == len(order) - 1))
        _, order, short = self._order
        places = np.arange(first, stop)
        # The store's last block may be short: behind it, everything lies that much earlier.
        missing = len(order) * READ_BLOCK - self._total
        places[places >= (short + 1) * READ_BLOCK - missing] += missing
        return order[places // READ_BLOCK].astype(np.int64) * READ_BLOCK + places % READ_BLOCK


def _read_meta(folder: Path) -> ActivationMeta:
    path = folder / META
    try:
        return ActivationMeta(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as exc:
        raise _damaged(path, "It is not a description of activations.") from exc


def _damaged(path: Path, what: str) -> CorruptFile:
    return CorruptFile(
        "These activations are damaged", f"{path}: {what}", "Delete them and extract them again."
    )


class _Writer:
    """Collects rows of all sites, shuffles them together, appends them to the files."""

    def __init__(
        self,
        folder: Path,
        points: tuple[HookPoint, ...],
        random: np.random.Generator,
        capacity: int,
    ) -> None:
        """`capacity`: rows that a buffer holds, `WRITE_BUFFER` and one forward pass's."""
        self._folder, self._points, self._random = folder, points, random
        self._capacity = capacity
        self._values: dict[HookPoint, torch.Tensor] = {}
        self._rows = np.empty(capacity, ROW)
        self._filled = 0
        self._files: dict[HookPoint, BinaryIO] = {}
        self.tokens: dict[str, int] = {}
        self.blocks: dict[str, list[int]] = {}

    @contextmanager
    def split(self, split: str) -> Iterator[None]:
        """Everything added inside belongs to `split`."""
        folder = self._folder / split
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "rows.part"
        self._split, self.blocks[split] = split, []
        with ExitStack() as files:
            self._rows_file = files.enter_context(part.open("wb"))
            for point in self._points:
                path = folder / f"{point.name}.f16"
                self._files[point] = files.enter_context(path.open("wb"))
            yield
            self._flush()
        self.tokens[split] = sum(self.blocks[split])
        _as_npy(part, folder / "rows.npy", self.tokens[split])

    def add(self, values: Mapping[HookPoint, torch.Tensor], rows: np.ndarray) -> None:
        """`values` float32 [n, d] per site in the unit of the file; `rows` [n] of `ROW`."""
        end = self._filled + len(rows)
        for point, found in values.items():
            if point not in self._values:
                shape = (self._capacity, found.shape[1])
                self._values[point] = torch.empty(shape, dtype=torch.float16)
            self._values[point][self._filled : end] = found
        self._rows[self._filled : end] = rows
        self._filled = end
        if self._filled >= WRITE_BUFFER:
            self._flush()

    def _flush(self) -> None:
        n, self._filled = self._filled, 0
        if not n:
            return
        # The held-out split stays in reading order, so that a share of it is whole documents.
        order = self._random.permutation(n) if self._split == "train" else np.arange(n)
        for start in range(0, n, WRITE_ROWS):
            chosen = order[start : start + WRITE_ROWS]
            for point, file in self._files.items():
                file.write(self._values[point].numpy()[chosen].data)
            self._rows_file.write(self._rows[chosen].tobytes())
        self.blocks[self._split].append(n)


def _as_npy(part: Path, target: Path, n: int) -> None:
    """The raw rows in `part` become a .npy file, whose head must come first and say how many."""
    header = {"descr": ROW.descr, "fortran_order": False, "shape": (n,)}
    with part.open("rb") as rows, target.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        shutil.copyfileobj(rows, file)
    part.unlink()


class _Moments:
    """Mean norm and per-dimension variance of a site, float64, streamed."""

    def __init__(self, width: int) -> None:
        self._n = 0
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._squares = torch.zeros(width, dtype=torch.float64)
        self._norms = 0.0

    def add(self, values: torch.Tensor) -> None:
        wide = values.double()
        self._n += len(wide)
        self._sum += wide.sum(0)
        self._squares += wide.square().sum(0)
        self._norms += float(wide.norm(dim=1).sum())

    def summary(self) -> dict[str, float]:
        n = max(self._n, 1)
        variance = self._squares / n - (self._sum / n).square()
        return {
            "tokens": self._n,
            "mean_norm": self._norms / n,
            "total_variance": float(variance.sum()),
            "largest_dimension_share": float(variance.max() / variance.sum().clamp_min(1e-30)),
        }
