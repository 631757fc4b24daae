"""Checkpoints of a run: all it needs to go on as if it had never been interrupted.

    step-00001234/                 appears whole, by one rename
        run.json                   the settings, how far it was, and what each file must be
        source.safetensors         the place in the stream of activations
        <site>/state.safetensors   weights, moments, schedule, random numbers, dead counters

The best one and the last two are kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mistudio.errors import CorruptFile

FORMAT = 1
RUN, SOURCE, STATE = "run.json", "source.safetensors", "state.safetensors"
KEPT = 2  # the last ones, beside the best
UNFINISHED = ".unfinished-"  # what is being written or deleted begins so

_NAME = re.compile(r"step-(\d+)")
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint. `step` is the number of steps done; `run` is what `save` was given."""

    folder: Path
    step: int
    run: dict[str, Any]

    @property
    def score(self) -> float | None:
        """What the best one is chosen by, lower is better; None where it cannot be compared."""
        value = self.run.get("score")
        return None if value is None else float(value)

    @property
    def bytes(self) -> int:
        return sum(int(size) for size, _ in self.run["files"].values())

    def source(self) -> dict[str, Tensor]:
        return load_file(self.folder / SOURCE)

    def site(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / name / STATE)


def save(
    folder: Path,
    step: int,
    sites: Iterable[tuple[str, Mapping[str, Tensor]]],
    source: Mapping[str, Tensor],
    run: Mapping[str, Any],
) -> Checkpoint:
    """Write a checkpoint, then drop those that need not be kept.

    One site's tensors are taken at a time, and none is copied in main memory. Raises OSError
    where the disk is full; the others then are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{step:08d}"
    partial, target = folder / (UNFINISHED + name), folder / name
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        files = {SOURCE: _write_tensors(partial / SOURCE, source)}
        for site, tensors in sites:
            (partial / site).mkdir()
            files[f"{site}/{STATE}"] = _write_tensors(partial / site / STATE, tensors)
            _flush_folder(partial / site)
        record = {"format": FORMAT, "step": step, "files": files, **run}
        _write_text(partial / RUN, json.dumps({**record, "crc32": _checksum(record)}, indent=1))
        _flush_folder(partial)
        _drop(target)  # a damaged one that was passed over
        os.replace(partial, target)
        _flush_folder(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _retain(folder)
    return Checkpoint(target, step, json.loads(json.dumps(record)))


def load(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, every byte checked. Raises CorruptFile where it is damaged."""
    run = _read_run(folder)
    for name, (size, checksum) in run["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise _damaged(folder, f"{name} has {found:,} of {size:,} bytes.")
        if _file_checksum(path) != checksum:
            raise _damaged(folder, f"{name} has changed since it was written.")
    return Checkpoint(folder, run["step"], run)


def listing(folder: Path) -> list[Checkpoint]:
    """All that can be read, newest first. Only `load` looks at their tensors."""
    found = []
    for path in _folders(folder):
        try:
            run = _read_run(path)
        except CorruptFile:
            continue
        found.append(Checkpoint(path, run["step"], run))
    return found


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and a sentence for every newer one that is damaged."""
    notes: list[str] = []
    for path in _folders(folder):
        try:
            return load(path), notes
        except CorruptFile as exc:
            notes.append(f"{exc.title}: {exc.what} An older one is used.")
    if notes:
        notes[-1] = notes[-1].replace("An older one is used.", "There is no older one.")
    return None, notes


def best(folder: Path) -> Checkpoint | None:
    """The one with the lowest score; None where none has one."""
    return _best(listing(folder))


def rewind(folder: Path, step: int) -> None:
    """Remove those of more than `step` steps, so that the run goes on from there."""
    for checkpoint in listing(folder):
        if checkpoint.step > step:
            _drop(checkpoint.folder)


def clean(folder: Path) -> None:
    """Remove what an interrupted save or deletion left."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _best(found: list[Checkpoint]) -> Checkpoint | None:
    scored = [(c.score, -c.step, c) for c in found if c.score is not None]
    return min(scored, key=lambda entry: entry[:2])[2] if scored else None


def _retain(folder: Path) -> None:
    found = listing(folder)
    chosen = {checkpoint.step for checkpoint in found[:KEPT]}
    if (favourite := _best(found)) is not None:
        chosen.add(favourite.step)
    for checkpoint in found:
        if checkpoint.step not in chosen:
            _drop(checkpoint.folder)


def _drop(folder: Path) -> None:
    """Renamed first: one that is half deleted is no checkpoint."""
    if folder.exists():
        going = folder.with_name(f"{UNFINISHED}gone-{folder.name}")
        shutil.rmtree(going, ignore_errors=True)
        os.replace(folder, going)
        shutil.rmtree(going, ignore_errors=True)


def _folders(folder: Path) -> list[Path]:
    """Newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _is_step(path))]
    return [path for _, path in sorted(found, reverse=True)]


def _is_step(path: Path) -> re.Match[str] | None:
    return _NAME.fullmatch(path.name) if path.is_dir() else None


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
        checksum = run.pop("crc32")
    except (OSError, ValueError, KeyError, AttributeError) as exc:
        raise _damaged(folder, f"{RUN} cannot be read.") from exc
    if checksum != _checksum(run):
        raise _damaged(folder, f"{RUN} has changed since it was written.")
    if run["format"] != FORMAT:
        raise _damaged(folder, f"It has format {run['format']}; this version reads {FORMAT}.")
    return dict(run)


def _damaged(folder: Path, what: str) -> CorruptFile:
    return CorruptFile(
        f"The checkpoint {folder.name} cannot be used", what, "Resume from an older one."
    )


def _checksum(run: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(run, sort_keys=True).encode())


# --- files --------------------------------------------------------------------------------------


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """A safetensors file, flushed to disk; its size and checksum.

    The library's own writer holds a copy of everything that it writes; here one tensor at a time
    comes to main memory, and none is copied that lies there.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
    checksum = 0
    with path.open("wb") as file:
        for block in _blocks(text, tensors):
            file.write(block)
            checksum = zlib.crc32(block, checksum)
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + end, checksum


def _blocks(header: bytes, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors.values():
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        array: Any = flat.view(torch.uint8).numpy()
        yield memoryview(array)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _file_checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(4 * 1024**2):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders for fsync
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
