"""The head of a GGUF file, walked once within bounds before the `gguf` library reads it.

The library makes several objects of every entry and believes every count: a file of a few megabytes
could take all memory, and a nested list all of the stack.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from mistudio.errors import CorruptFile

MAX_KEYS = 4_096  # real files have some forty
MAX_TENSORS = 65_536
MAX_ENTRIES = 4_000_000  # of all lists: a vocabulary of 262,144 takes three and its merges
MAX_TEXT = 16 * 1024**2  # bytes
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type
_STRING, _ARRAY = 8, 9


class _Fault(Exception):
    """Why the head cannot be read."""


def check_gguf_header(path: Path) -> None:
    """Raise `CorruptFile` where the file is no GGUF, ends within its head, or counts beyond what
    any model has."""
    with path.open("rb", buffering=1 << 20) as file:
        try:
            _walk(file, path.stat().st_size)
        except _Fault as fault:
            raise CorruptFile(
                "The model file is damaged",
                f"{path.name} is not readable as GGUF: {fault}.",
                "Fetch it again.",
            ) from None


def _walk(file: BinaryIO, size: int) -> None:
    if file.read(4) != _MAGIC:
        raise _Fault("it does not begin with the letters GGUF")
    (version,) = _unpack(file, "<I")
    if version not in _VERSIONS:
        raise _Fault(f"its version is {version:,}; 2 and 3 are read")
    tensors, keys = _unpack(file, "<QQ")
    for what, found, most in (("tensors", tensors, MAX_TENSORS), ("entries", keys, MAX_KEYS)):
        if found > most:
            raise _Fault(f"it promises {found:,} {what}, beyond the {most:,} that are read")
    left = MAX_ENTRIES
    for _ in range(keys):
        _skip_text(file, size)
        left = _skip_value(file, size, _unpack(file, "<I")[0], left)
    for _ in range(tensors):
        _skip_text(file, size)
        (dimensions,) = _unpack(file, "<I")
        if dimensions > 4:
            raise _Fault(f"a tensor has {dimensions:,} dimensions")
        *_, offset = _unpack(file, f"<{dimensions}QIQ")
        if offset > size:
            raise _Fault("a tensor lies beyond its end")


def _skip_value(file: BinaryIO, size: int, kind: int, left: int) -> int:
    """How many entries of lists may still come."""
    if kind == _STRING:
        _skip_text(file, size)
    elif kind == _ARRAY:
        inner, count = _unpack(file, "<IQ")
        if count > left:
            raise _Fault(f"a list promises {count:,} entries, beyond the {MAX_ENTRIES:,} in all")
        left -= count
        if inner == _STRING:
            for _ in range(count):
                _skip_text(file, size)
        else:
            _skip(file, size, count * _size_of(inner))
    else:
        _skip(file, size, _size_of(kind))
    return left


def _size_of(kind: int) -> int:
    if kind not in _SIZES:
        raise _Fault(f"it has values of an unknown type ({kind:,}) or lists in lists")
    return _SIZES[kind]


def _skip_text(file: BinaryIO, size: int) -> None:
    (length,) = _unpack(file, "<Q")
    if length > MAX_TEXT:
        raise _Fault(f"a text promises {length:,} bytes")
    _skip(file, size, length)


def _skip(file: BinaryIO, size: int, count: int) -> None:
    # Short steps are read, as seeking would throw the buffer away.
    if count > 4096:
        file.seek(count, 1)
    elif len(file.read(count)) < count:
        raise _Fault("it ends early")
    if count > 4096 and file.tell() > size:
        raise _Fault("it ends early")


def _unpack(file: BinaryIO, layout: str) -> tuple[int, ...]:
    count = struct.calcsize(layout)
    data = file.read(count)
    if len(data) < count:
        raise _Fault("it ends early")
    return struct.unpack(layout, data)
