"""The files of stored activations: what a shard is, how one is written whole or not at all, how
many are read as one table.

A shard is a folder:

    rows.bin                          `ROW`s: which token of which text each row is
    blocks.3.hook_resid_post.f16      [rows, d], flat; .bf16 where stored so
    sums.safetensors                  what the statistics are made of
    shard.json                        number of rows, blocks, what was left out, CRC-32 of each file

It is written under a name ending in `.part`, flushed to the disk and renamed, so that a shard that
has its name is whole, whenever the process or the power ended.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mistudio.errors import CorruptFile

# `document` is the dataset's number of the document, `place` the token's number in it.
ROW = np.dtype(
    [
        ("window", "<u4"),
        ("position", "<u2"),
        ("token", "<u4"),
        ("document", "<u4"),
        ("place", "<u4"),
    ]
)
EARLIER_ROW = np.dtype([("window", "<u4"), ("position", "<u2")])
STORAGE = {"fp16": torch.float16, "bf16": torch.bfloat16}
SUFFIX = {"fp16": "f16", "bf16": "bf16"}
ROWS, SUMS, RECORD, PART = "rows.bin", "sums.safetensors", "shard.json", ".part"
WRITE_ROWS = 4096  # at a time: a shuffled copy of a whole block would double the memory


@dataclass(frozen=True)
class ShardRecord:
    """What a shard holds. `blocks` are the row counts between shuffles, `windows` how many windows
    were read for it, `special` and `outliers` how many of their positions were left out."""

    rows: int
    blocks: list[int]
    windows: int
    special: int
    outliers: int
    files: dict[str, int]  # name -> CRC-32


def file_name(point: str, storage: str) -> str:
    return f"{point}.{SUFFIX[storage]}"


def shard_name(number: int) -> str:
    return f"{number:05d}"


class ShardWriter:
    """One shard on its way to the disk."""

    def __init__(self, folder: Path, points: Sequence[str], storage: str) -> None:
        """Raises OSError, as everything here does, where the disk does not take it."""
        self._folder, self._points, self._storage = folder, points, storage
        self._part = folder.with_name(folder.name + PART)
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)
        self._files: dict[str, BinaryIO] = {}
        self._sums: dict[str, int] = {}
        for name in (ROWS, *(file_name(point, storage) for point in points)):
            self._files[name] = (self._part / name).open("wb")
            self._sums[name] = 0
        self._blocks: list[int] = []

    def append(self, values: Mapping[str, Tensor], rows: np.ndarray, order: np.ndarray) -> None:
        """A block: `values` [n, d] by site in the unit and precision of the file, and `rows` [n]
        of `ROW`, both written in `order`."""
        for start in range(0, len(order), WRITE_ROWS):
            chosen = order[start : start + WRITE_ROWS]
            for point in self._points:
                # numpy knows no bfloat16: the bits are what is written.
                bits = values[point].view(torch.int16).numpy()
                self._write(file_name(point, self._storage), bits[chosen].data.cast("B"))
            self._write(ROWS, rows[chosen].tobytes())
        self._blocks.append(len(order))

    def finish(
        self, sums: Mapping[str, Tensor], windows: int, special: int, outliers: int
    ) -> ShardRecord:
        """Flush, name: from here on the shard is there."""
        from safetensors.torch import save_file

        save_file(dict(sums), self._part / SUMS)
        self._sums[SUMS] = zlib.crc32((self._part / SUMS).read_bytes())
        record = ShardRecord(
            sum(self._blocks), self._blocks, windows, special, outliers, self._sums
        )
        (self._part / RECORD).write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.close()
        for name in (SUMS, RECORD):
            flush(self._part / name)
        flush(self._part)
        os.replace(self._part, self._folder)
        flush(self._folder.parent)
        return record

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def discard(self) -> None:
        """Leave nothing of an unfinished shard."""
        self.close()
        shutil.rmtree(self._part, ignore_errors=True)

    def _write(self, name: str, data: Any) -> None:
        self._files[name].write(data)
        self._sums[name] = zlib.crc32(data, self._sums[name])


def flush(path: Path) -> None:
    """fsync a file, or a folder where the system can."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_record(folder: Path, widths: Mapping[str, int], storage: str) -> ShardRecord | None:
    """The record of a whole shard; None where there is none, or a file is not as long as it
    says."""
    try:
        record = ShardRecord(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
        sizes = {ROWS: record.rows * ROW.itemsize}
        for point, width in widths.items():
            sizes[file_name(point, storage)] = 2 * record.rows * width
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
        whole = whole and (folder / SUMS).is_file() and set(record.files) == {*sizes, SUMS}
    except (OSError, ValueError, TypeError):
        return None
    return record if whole else None


def check_sums(folder: Path, record: ShardRecord) -> None:
    """Read every file of a shard; CorruptFile where one is not what was written."""
    for name, expected in record.files.items():
        found = 0
        with (folder / name).open("rb") as file:
            while data := file.read(8 * 1024**2):
                found = zlib.crc32(data, found)
        if found != expected:
            raise damaged(folder / name, "Its content has changed since it was written.")


def damaged(path: Path, what: str) -> CorruptFile:
    return CorruptFile(
        "These activations are damaged", f"{path}: {what}", "Delete them and extract them again."
    )


# -------------------------------------------------------------------- reading


class Table:
    """A site's rows over all shards of a split, mapped: [rows, width] of `dtype`."""

    def __init__(
        self, paths: Sequence[Path], counts: Sequence[int], width: int, dtype: torch.dtype
    ) -> None:
        """Raises `CorruptFile` where a file is not as long as its rows."""
        self.dtype, self.shape = dtype, (sum(counts), width)
        self._parts = [
            _mapped(path, n * width, dtype).view(n, width)
            for path, n in zip(paths, counts, strict=True)
        ]
        self._ends = torch.as_tensor(np.cumsum(counts, dtype=np.int64))

    def __len__(self) -> int:
        return self.shape[0]

    def pick(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """The given rows (int64 [n]), [n, width]."""
        if out is None:
            out = torch.empty((len(rows), self.shape[1]), dtype=self.dtype)
        if len(self._parts) == 1:
            return torch.index_select(self._parts[0], 0, rows, out=out)
        shards = torch.bucketize(rows, self._ends, right=True)
        for number in torch.unique(shards).tolist():
            here = (shards == number).nonzero().squeeze(1)
            first = int(self._ends[number]) - len(self._parts[number])
            out.index_copy_(0, here, self._parts[number].index_select(0, rows[here] - first))
        return out


class Rows:
    """The places of all rows of a split as one array of `ROW`, mapped shard by shard."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = list(parts) or [np.empty(0, ROW)]
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.dtype = self._parts[0].dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, key: Any) -> Any:
        """As of an array: a column by its name, one row, a slice, or rows by their numbers. What
        it gives is a copy."""
        if isinstance(key, str):
            return np.concatenate([part[key] for part in self._parts])
        if isinstance(key, slice):
            return self._take(np.arange(*key.indices(len(self))))
        if isinstance(key, int | np.integer):
            return self._take(np.asarray([range(len(self))[int(key)]]))[0]
        return self._take(np.asarray(key))

    def _take(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty(len(rows), self.dtype)
        shards = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(shards):
            here = shards == number
            part = self._parts[number]
            found[here] = part[rows[here] - (self._ends[number] - len(part))]
        return found


def map_rows(path: Path, n: int) -> np.ndarray:
    """The `ROW`s of a shard. Raises `CorruptFile` where the file is not as long as they are."""
    return _mapped(path, n * ROW.itemsize, torch.uint8).numpy().view(ROW)


def _mapped(path: Path, elements: int, dtype: torch.dtype) -> Tensor:
    """A file as a flat tensor; nothing that is written to the tensor reaches the file.

    By torch and not by numpy, whose maps keep their files open: there may be thousands.
    """
    expected = elements * dtype.itemsize
    found = -1
    with suppress(OSError):
        found = path.stat().st_size
    if found != expected:
        said = f"It has {found:,} bytes" if found >= 0 else "It is missing"
        raise damaged(path, f"{said}; {expected:,} were written.")
    if not elements:
        return torch.empty(0, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=elements, dtype=dtype)
