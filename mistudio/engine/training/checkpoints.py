"""Checkpoints of a run: all it needs to go on as if it had never been interrupted.

    step-00001234/                 appears whole, by one rename
        run.json                   the settings, how far it was, and what each file must be
        source.safetensors         the place in the stream of activations
        <site>/state.safetensors   weights, moments, schedule, random numbers, dead counters
        kept                       empty; there where a person saved it or went back to it

Those with `kept` stay until they are deleted. Of the others the best one and the newest two stay,
and up to five where they are small. Only reading and writing tensors needs torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistudio.errors import CorruptFile, NotFound

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
RUN, SOURCE, STATE = "run.json", "source.safetensors", "state.safetensors"
MARK = "kept"
KEPT = 2  # the newest ones, beside the best
MOST = 5  # with the best, where all of them together are small:
MOST_BYTES = 1024**3
UNFINISHED = ".unfinished-"  # what is being written or deleted begins so

_NAME = re.compile(r"step-(\d+)")
_TYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


@dataclass(frozen=True)
class AutoSave:
    """How often a run saves by itself: every so many steps (None: not by steps), every so many
    minutes (0: not by time)."""

    steps: int | None
    minutes: float


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint. `step` is the number of steps done; `run` is what `save` was given;
    `kept` says that it stays until it is deleted."""

    folder: Path
    step: int
    run: dict[str, Any]
    kept: bool = False

    @property
    def score(self) -> float | None:
        """What the best one is chosen by, lower is better; None where it cannot be compared."""
        value = self.run.get("score")
        return None if value is None else float(value)

    @property
    def bytes(self) -> int:
        return sum(int(size) for size, _ in self.run["files"].values())

    @property
    def at(self) -> str | None:
        """When it was written: ISO 8601, UTC. None in those of older versions."""
        return self.run.get("at")

    @property
    def loss(self) -> float | None:
        """Of its last batch, mean over the sites."""
        found = [row["loss"] for row in self.run.get("metrics", {}).values()]
        return sum(found) / len(found) if found else None

    @property
    def fvu(self) -> float | None:
        """On held-out tokens, mean over the sites."""
        found = [row.get("fvu") for row in self.run.get("heldout", {}).values()]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known else None

    def source(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / SOURCE)

    def site(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / name / STATE)


def save(
    folder: Path,
    step: int,
    sites: Iterable[tuple[str, Mapping[str, Tensor]]],
    source: Mapping[str, Tensor],
    run: Mapping[str, Any],
    kept: bool = False,
) -> Checkpoint:
    """Write a checkpoint (`kept`: one that stays), then drop those that need not be kept.

    One site's tensors are taken at a time, and none is copied in main memory. Raises OSError
    where the disk is full; the others then are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = _name(step)
    partial, target = folder / (UNFINISHED + name), folder / name
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        files = {SOURCE: _write_tensors(partial / SOURCE, source)}
        for site, tensors in sites:
            (partial / site).mkdir()
            files[f"{site}/{STATE}"] = _write_tensors(partial / site / STATE, tensors)
            _flush_folder(partial / site)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"format": FORMAT, "step": step, "at": at, "files": files, **run}
        _write_text(partial / RUN, json.dumps({**record, "crc32": _checksum(record)}, indent=1))
        if kept:
            (partial / MARK).touch()
        _flush_folder(partial)
        _drop(target)  # a damaged one that was passed over
        os.replace(partial, target)
        _flush_folder(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _retain(folder)
    return Checkpoint(target, step, json.loads(json.dumps(record)), kept)


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
    return Checkpoint(folder, run["step"], run, (folder / MARK).exists())


def listing(folder: Path) -> list[Checkpoint]:
    """All that can be read, newest first. Only `load` looks at their tensors."""
    found = []
    for path in _folders(folder):
        try:
            run = _read_run(path)
        except CorruptFile:
            continue
        found.append(Checkpoint(path, run["step"], run, (path / MARK).exists()))
    return found


def pick(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of `step` to go back to: it stays from now on, and every byte is checked.

    Raises NotFound where there is none, CorruptFile where it is damaged.
    """
    path = folder / _name(step)
    if not path.is_dir():
        raise _missing(folder, step)
    with suppress(OSError):  # where the disk is full it may still be gone back to
        (path / MARK).touch()
        _flush_folder(path)
    return load(path)


def delete(folder: Path, step: int) -> None:
    """Remove one. NotFound where there is none."""
    if not (folder / _name(step)).is_dir():
        raise _missing(folder, step)
    _drop(folder / _name(step))


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
    """Remove those of more than `step` steps, damaged ones too, so that the run goes on from
    there. The newest goes first: cut off in between, the run goes on from a later step.

    NotFound, and nothing removed, where there is none of that step.
    """
    if not (folder / _name(step)).is_dir():
        raise _missing(folder, step)
    for path in _folders(folder):
        if _step(path) > step:
            _drop(path)


def clean(folder: Path) -> None:
    """Remove what an interrupted save or deletion left."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _best(found: list[Checkpoint]) -> Checkpoint | None:
    scored = [(c.score, -c.step, c) for c in found if c.score is not None]
    return min(scored, key=lambda entry: entry[:2])[2] if scored else None


def most_kept(each: float) -> int:
    """How many checkpoints of so many bytes stay at most, beside those that a person saved."""
    return max(KEPT + 1, min(MOST, int(MOST_BYTES / max(each, 1.0))))


def _retain(folder: Path) -> None:
    found = [checkpoint for checkpoint in listing(folder) if not checkpoint.kept]
    chosen = {checkpoint.step for checkpoint in found[:KEPT]}
    if (favourite := _best(listing(folder))) is not None:
        chosen.add(favourite.step)
    for checkpoint in found:
        if checkpoint.step in chosen:
            continue
        if len(chosen) < most_kept(checkpoint.bytes):
            chosen.add(checkpoint.step)
        else:
            _drop(checkpoint.folder)


def _drop(folder: Path) -> None:
    """Renamed first: one that is half deleted is no checkpoint. Another thread may be quicker."""
    going = folder.with_name(f"{UNFINISHED}gone-{folder.name}")
    shutil.rmtree(going, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.replace(folder, going)
        _flush_folder(folder.parent)
    shutil.rmtree(going, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _missing(folder: Path, step: int) -> NotFound:
    steps = ", ".join(f"{_step(path):,}" for path in _folders(folder)) or "none"
    return NotFound(
        "There is no such checkpoint",
        f"Of step {step:,} nothing is kept; there are: {steps}.",
        "Choose one that is there.",
    )


def _folders(folder: Path) -> list[Path]:
    """Newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step, reverse=True)


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
            "dtype": _TYPES[str(tensor.dtype)],
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
    import torch

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
