"""What a model's files must pass before they are kept: every number finite, bytes as promised, a
tokenizer whose ids the model has.

Files are read piece by piece: memory stays at a few megabytes however large they are.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mistudio.engine.models.loading import (
    TensorInfo,
    is_parameter,
    load_tokenizer,
    read_safetensors_header,
    special_ids,
    weight_files,
)
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import CorruptFile, Incompatible

if TYPE_CHECKING:
    import numpy as np

_PIECE = 8 * 1024**2  # bytes; a multiple of every number's size
# Unsigned type of the same width, and the bits of the exponent: all set in infinities and NaN.
_EXPONENTS = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}


@dataclass(frozen=True)
class CheckedFile:
    """A file as it lies in the folder."""

    name: str
    bytes: int
    sha256: str


def check_weights(folder: Path, progress: Progress = SILENT) -> tuple[CheckedFile, ...]:
    """Read every weight file of a model folder once: its SHA-256, and `CorruptFile` where a number
    is NaN or infinite. Buffers that the model does not read (old files' masks) may be infinite."""
    files = weight_files(folder)
    total = sum(path.stat().st_size for path in files)
    done = 0
    checked = []
    for path in files:
        checked.append(_check_file(path, done, total, progress))
        done += checked[-1].bytes
    return tuple(checked)


def _check_file(path: Path, before: int, total: int, progress: Progress) -> CheckedFile:
    tensors = read_safetensors_header(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        start = file.read(8)
        digest.update(start)
        digest.update(file.read(struct.unpack("<Q", start)[0]))
        done = file.tell()
        # The header's entries lie one behind the other, without gaps.
        for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
            bad = 0
            left = info.bytes
            while left:
                progress.check()
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise CorruptFile("The model's weights are damaged", f"{path.name} ends early.")
                digest.update(piece)
                bad += _not_finite(piece, info, name)
                left -= len(piece)
                done += len(piece)
                progress.report(before + done, total, "Checking the model")
            if bad:
                raise CorruptFile(
                    "The model's weights are damaged",
                    f"In {path.name}, {bad:,} numbers of the tensor {name} are not finite (NaN or "
                    "infinite): every prediction would be NaN.",
                    "Download the model again, or choose another version of it.",
                )
    return CheckedFile(path.name, path.stat().st_size, digest.hexdigest())


def _not_finite(piece: bytes, info: TensorInfo, name: str) -> int:
    import numpy as np

    if info.dtype not in _EXPONENTS or not is_parameter(name, info):
        return 0
    kind, mask = _EXPONENTS[info.dtype]
    bits: np.ndarray = np.frombuffer(piece, dtype=kind)
    exponent = bits.dtype.type(mask)
    return int(np.count_nonzero((bits & exponent) == exponent))


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Raise `Incompatible` where the tokenizer gives ids that a model of `vocab_size` embeddings
    does not have. Special tokens beyond it are let pass: Gemma 3's text models ship the marker of
    the image models that they have no row for. Raises `CorruptFile` where it cannot be read."""
    tokenizer = load_tokenizer(folder)
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    known = special_ids(tokenizer)
    beyond = sorted(i for i in vocabulary.values() if i >= vocab_size and i not in known)
    if beyond:
        raise Incompatible(
            "The tokenizer does not match the model",
            f"The model has embeddings for {vocab_size:,} tokens, but the tokenizer knows "
            f"{len(beyond):,} beyond them (up to number {beyond[-1]:,}).",
            "Use the tokenizer that came with this model, or download the model again.",
        )


def verify(
    folder: Path, promised: Mapping[str, tuple[int, str]], found: tuple[CheckedFile, ...]
) -> None:
    """Raise `CorruptFile` where a checked file is not of the (size, SHA-256) that was promised; an
    empty sum means that none is known."""
    for file in found:
        size, sha256 = promised.get(file.name, (file.bytes, ""))
        if file.bytes != size or (sha256 and sha256 != file.sha256):
            raise CorruptFile(
                "A file is not what was promised",
                f"{file.name} in {folder.name} has {file.bytes:,} bytes and SHA-256 "
                f"{file.sha256[:16]}..., expected {size:,} and {sha256[:16] or 'any'}...",
                "Fetch it again.",
            )
