"""What a model's files must pass before they are kept: every number finite, bytes as promised, a
tokenizer whose ids the model has.

Files are read piece by piece: memory stays at a few megabytes however large they are.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistudio.engine.models import custom_code
from mistudio.engine.models.loading import (
    MODEL_FILES,
    TensorInfo,
    is_parameter,
    load_config,
    load_tokenizer,
    quiet_transformers,
    read_config,
    read_headers,
    read_safetensors_header,
    special_ids,
    weight_files,
)
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import CorruptFile, Incompatible, UnsupportedModel

if TYPE_CHECKING:
    import numpy as np

    from mistudio.engine.models.architecture import Architecture
    from mistudio.engine.models.custom_code import Consent

TEXT_LIMIT = 128 * 1024**2  # bytes; the largest tokenizers (262,144 entries) have 35 MB
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


def check_sizes(folder: Path) -> None:
    """Raise `CorruptFile` where a file that is read whole is far larger than any model's."""
    for path in folder.iterdir():
        apart = path.suffix == ".safetensors" or not path.is_file()
        if not apart and path.suffix in MODEL_FILES and path.stat().st_size > TEXT_LIMIT:
            raise CorruptFile(
                "A file of the model is far too long",
                f"{path.name} has {path.stat().st_size:,} bytes, beyond the {TEXT_LIMIT:,} that "
                "are read.",
                "Download the model again.",
            )


def check_tensors(folder: Path, made: Architecture, consent: Consent | None = None) -> None:
    """Load the model as `load_model` would, but with the shapes of the files' tensors alone: raise
    `CorruptFile` where one is missing or of another shape than the configuration asks for,
    `UnsupportedModel` where transformers cannot load it here. No numbers are read; takes no memory
    to speak of."""
    import torch

    from mistudio.engine.models.hf import AutoModelForCausalLM

    headers = read_headers(folder)
    held = sum(info.bytes for info in headers.values())
    # What is missing would be made up in memory: where it is most of it, that is said before.
    smallest = 1 / 8 if "quantization_config" in read_config(folder) else 1  # bytes of a number
    if made.parameters * smallest > held:
        raise CorruptFile(
            "The model's weights are incomplete",
            f"config.json asks for {made.parameters:,} numbers, the files have {held:,} bytes.",
            "Download the model again.",
        )
    reader: Any = AutoModelForCausalLM
    if consent is not None:
        program = custom_code.load_classes(folder, consent)
        reader, config = program.model, program.config
    else:
        config = load_config(folder)
        reader = reader._model_mapping[type(config)]
    shapes = {name: _shape_only(info) for name, info in headers.items()}
    try:
        with quiet_transformers():
            _, found = reader.from_pretrained(
                None,
                config=config,
                state_dict=shapes,
                dtype=torch.bfloat16,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as exc:  # as many kinds as there are formats and architectures
        raise UnsupportedModel(
            "The model cannot be loaded here",
            f"transformers says: {' '.join(str(exc).split())[:300]}",
            "Choose another version of the model (its unquantised one, if this one is quantised).",
        ) from exc
    _refuse_misfits(found)


def _refuse_misfits(found: dict[str, Any]) -> None:
    other = sorted(found["mismatched_keys"], key=str)
    if other:
        name, in_file, wanted = other[0]
        raise CorruptFile(
            "The model's weights do not fit its configuration",
            f"{len(other):,} tensors have another shape than config.json asks for; {name} is "
            f"{_size(in_file)} instead of {_size(wanted)}.",
            "Download the model again.",
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise CorruptFile(
            "The model's weights are incomplete",
            f"{len(missing):,} tensors are missing, the first is {missing[0]}.",
            "Download the model again.",
        )


def _size(shape: Sequence[int]) -> str:
    return " x ".join(f"{n:,}" for n in shape) or "one number"


@cache
def _shape_class() -> Any:
    """A tensor without numbers that stays so when it is moved to a device."""
    import torch

    class Shape(torch.Tensor):
        def to(self, *_args: Any, dtype: Any = None, **_kwargs: Any) -> Any:
            return super().to(dtype=dtype) if dtype is not None else self

    return Shape


def _shape_only(info: TensorInfo) -> Any:
    import torch

    kinds = {"F16": torch.float16, "BF16": torch.bfloat16}
    kind = kinds.get(info.dtype, torch.float32 if info.dtype[0] in "FB" else torch.int32)
    return torch.empty(info.shape, dtype=kind, device="meta").as_subclass(_shape_class())


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Raise `Incompatible` where the tokenizer gives ids that a model of `vocab_size` embeddings
    does not have. Special tokens beyond it are let pass: Gemma 3's text models ship the marker of
    the image models that they have no row for. Raises `CorruptFile` where it cannot be read or is
    far too large."""
    check_sizes(folder)
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
