"""Activations on disk, read: rows of all shards as one table a site, as an `ActivationSource`.

Layout of a folder: `meta.json`; `statistics.safetensors`; `manifest.json`, what was asked for; and
per split numbered shards (see `shards`). Row i is the same token in every site, and `rows` leads
from any activation back to its text. `extraction` writes it. Stores of earlier versions, where a
split is one flat file a site, are read too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from mistudio.engine.activations import statistics
from mistudio.engine.activations.extraction import (
    FORMAT,
    META,
    ActivationMeta,
    estimate_bytes,
    extract,
    write_activations,
)
from mistudio.engine.activations.shards import (
    EARLIER_ROW,
    RECORD,
    ROW,
    ROWS,
    STORAGE,
    Rows,
    Table,
    check_sums,
    damaged,
    file_name,
    map_rows,
    read_record,
    shard_name,
)
from mistudio.engine.activations.source import TokenRows
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
from mistudio.engine.datasets.tokens import SPLITS
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.training.distributed import ALONE, World, own_rows

__all__ = ["META", "ROW", "ActivationMeta", "StoredActivations", "estimate_bytes", "extract"]
__all__ += ["write_activations"]

READ_BLOCK = 32


class StoredActivations:
    """A finished extraction as an `ActivationSource`."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """`device` is where batches go. Raises `CorruptFile` where the folder is not whole."""
        self.folder = folder
        self.meta = _read_meta(folder)
        self.points = tuple(HookPoint.parse(name) for name in self.meta.points)
        self.medians = {point: self.meta.medians[point.name] for point in self.points}
        self._courier = Courier(torch.device(device))
        self._tables = {
            split: {point: self._open(split, point) for point in self.points} for split in SPLITS
        }
        self.rows = {split: self._open_rows(split) for split in SPLITS}

    def _shards(self, split: str) -> list[tuple[Path, int]]:
        """The folder and the number of rows of each."""
        if self.meta.format == 1:
            return [(self.folder / split, self.meta.tokens[split])]
        return [
            (self.folder / split / shard_name(number), rows)
            for number, rows in enumerate(self.meta.shards[split])
        ]

    def _open(self, split: str, point: HookPoint) -> Table:
        name = file_name(point.name, self.meta.storage)
        shards = self._shards(split)
        paths, counts = [folder / name for folder, _ in shards], [rows for _, rows in shards]
        return Table(paths, counts, self.width(point), STORAGE[self.meta.storage])

    def _open_rows(self, split: str) -> Rows:
        if self.meta.format == 1:
            return Rows([self._earlier_rows(split)])
        return Rows([map_rows(folder / ROWS, n) for folder, n in self._shards(split)])

    def _earlier_rows(self, split: str) -> np.ndarray:
        path = self.folder / split / "rows.npy"
        try:
            rows: np.ndarray = np.load(path, mmap_mode="r")
        except (FileNotFoundError, ValueError, EOFError) as exc:
            raise damaged(path, "It is missing or cut short.") from exc
        if rows.dtype != EARLIER_ROW or rows.shape != (self.meta.tokens[split],):
            raise damaged(path, "It does not belong to the activations beside it.")
        return rows

    def verify(self, progress: Progress = SILENT) -> None:
        """Read everything; CorruptFile where a file is not what was written."""
        for split in SPLITS:
            for folder, _ in self._shards(split) if self.meta.format > 1 else ():
                progress.check()
                record = read_record(folder, self.meta.widths, self.meta.storage)
                if record is None:
                    raise damaged(folder / RECORD, "It does not fit the files beside it.")
                check_sums(folder, record)

    def statistics(self) -> dict[str, statistics.SiteStatistics]:
        """The figures of every site; those by dimension and position only since shards are
        written (FileNotFoundError before)."""
        return statistics.read(self.folder, self.meta.statistics)

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
            rows = self.rows[split][start : start + size]
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

    def read_site(self, split: str, point: HookPoint, rows: np.ndarray) -> torch.Tensor:
        """The given rows of one site, float32 on the device."""
        return self._read(split, point, rows)

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
        meta = ActivationMeta(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as exc:
        raise damaged(path, "It is not a description of activations.") from exc
    if meta.format > FORMAT or meta.storage not in STORAGE:
        raise damaged(path, "It was written by a newer version.")
    return meta
