"""Files that nobody should be harmed by: what each is, and how adding it must end.

A case gives a path to add and the outcome, with bad rows refused and with bad rows skipped: a list
of texts or a number of documents where it must succeed, words of the refusal where it must not,
ANY where both will do (damage whose effect depends on where it falls).
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zstandard

ANY = None
ONCE = -1  # as the second outcome: it is the same, and trying it again would take seconds
Outcome = list[str] | int | str | None


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[Path], Path]  # writes below an empty folder, returns what to add
    refusing: Outcome
    skipping: Outcome


CASES: dict[str, Case] = {}
_SAME = object()


def case(
    name: str,
    make: Callable[[Path], Path],
    refusing: Outcome,
    skipping: Outcome | object = _SAME,
) -> None:
    assert name not in CASES, name
    if skipping is _SAME:
        skipping = refusing
    CASES[name] = Case(name, make, refusing, skipping)  # type: ignore[arg-type]


def file(
    name: str,
    content: bytes | str,
    refusing: Outcome,
    skipping: Outcome | object = _SAME,
    of: str = "",
) -> None:
    """A case that is one file; `of` tells cases with the same file name apart."""
    data = content.encode() if isinstance(content, str) else content

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data)
        return path

    case(f"{of} ({name})" if of else name, make, refusing, skipping)


def gz(data: bytes) -> bytes:
    return gzip.compress(data, 6)


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data)
