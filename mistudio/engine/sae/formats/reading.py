"""Importing: which format a path holds, told by its content, and the dictionaries in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mistudio.engine.sae.formats import (
    dictionary_learning,
    gemma_scope,
    llama_scope,
    openai,
    plain,
    saelens,
    sparsify,
)
from mistudio.engine.sae.formats.common import ImportedSae, not_here, read_torch
from mistudio.errors import Incompatible, InvalidInput, NotFound

IMPORT_FORMATS = (
    saelens.NAME,
    sparsify.NAME,
    gemma_scope.NAME,
    gemma_scope.NAME_2,
    dictionary_learning.NAME,
    openai.NAME,
    llama_scope.NAME,
    plain.NAME,
)
# How far below the given folder SAEs are looked for (Gemma Scope: release/layer/width/l0), and how
# many folders are looked into: a home folder given by mistake must not take minutes.
DEPTH = 5
FOLDERS = 2000

_READERS: dict[str, Callable[[Path], ImportedSae]] = {
    saelens.NAME: saelens.read,
    sparsify.NAME: sparsify.read,
    gemma_scope.NAME: gemma_scope.read,
    gemma_scope.NAME_2: gemma_scope.read_2,
    dictionary_learning.NAME: dictionary_learning.read,
    openai.NAME: openai.read,
    llama_scope.NAME: llama_scope.read,
    plain.NAME: plain.read,
}
_TORCH = (".pt", ".pth")
# What the libraries write beside their weights.
NOT_WEIGHTS = {
    saelens.SPARSITY,
    saelens.WHITENING,
    "activations_store_state.safetensors",
    "trainer_state.pt",
    "state.pt",
}


@dataclass(frozen=True)
class Found:
    """One SAE's folder or file, and the format it is in."""

    path: Path
    format: str

    def read(self) -> ImportedSae:
        return _READERS[self.format](self.path)


def read_sae(path: Path, *, format: str | None = None) -> list[ImportedSae]:
    """Every SAE at or below `path`, a folder or a file, of any known format; all or an error.

    `format` names the one that is expected; anything else is then refused.
    """
    return [found.read() for found in find_saes(path, format=format)]


def find_saes(path: Path, *, format: str | None = None) -> list[Found]:
    """What `read_sae` would read, before its weights are read. Raises NotFound where nothing is,
    Incompatible where it is of another format than `format`."""
    if format is not None and format not in IMPORT_FORMATS:
        raise InvalidInput(
            "Unknown SAE format",
            f"{format!r} is not known.",
            f"Use one of {', '.join(IMPORT_FORMATS)}.",
            field="format",
        )
    path = path.expanduser()
    if not path.exists():
        raise NotFound("There is no such file or folder", f"{path} does not exist.", "Check it.")
    found = list(_at_or_below(path, DEPTH, [FOLDERS]))
    if not found and (path / saelens.CONFIG).is_file():
        raise not_here(path, f"{saelens.WEIGHTS} and no {sparsify.WEIGHTS}")
    if not found:
        raise NotFound(
            "No SAE was found",
            f"{path} holds no SAE in a format that miStudio reads.",
            "Choose a folder from SAELens, sparsify, dictionary_learning or Gemma Scope, or name "
            "the file itself.",
        )
    others = sorted({entry.format for entry in found if entry.format != format})
    if format is not None and others:
        raise Incompatible(
            "This SAE is in another format",
            f"{path} holds {', '.join(others)}, not {format}.",
            "Leave the format out: it is recognised by itself.",
        )
    return found


def _at_or_below(path: Path, depth: int, budget: list[int]) -> Iterator[Found]:
    if path.is_file():
        named = format_of_file(path)
        if named is not None:
            yield Found(path, named)
        return
    budget[0] -= 1
    if depth < 0 or budget[0] < 0:
        return
    named = format_of_folder(path)
    if named is not None:
        yield Found(path, named)
        return
    for entry in sorted(path.iterdir(), key=lambda entry: _natural(entry.name)):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _at_or_below(entry, depth - 1, budget)
        elif entry.is_file() and _is_final(entry):
            yield from _at_or_below(entry, depth, budget)


def _is_final(path: Path) -> bool:
    """Whether to look into a file that was not named: of torch files only those called as the
    libraries call their results. Others are optimisers' and interim states."""
    return (
        path.suffix not in _TORCH
        or path.name == dictionary_learning.WEIGHTS
        or (path.stem.isdigit())
    )


def format_of_folder(folder: Path) -> str | None:
    """The format of the one SAE that this folder is, or None."""
    if saelens.is_saelens(folder):
        return saelens.NAME
    if sparsify.is_sparsify(folder):
        return sparsify.NAME
    if llama_scope.is_llama_scope(folder):
        return llama_scope.NAME
    return None


def format_of_file(path: Path) -> str | None:
    """The format of this file, or None for one that is no SAE by itself."""
    if path.name in (saelens.WEIGHTS, sparsify.WEIGHTS, *NOT_WEIGHTS):
        return None
    if gemma_scope.is_gemma_scope(path):
        return gemma_scope.NAME
    if path.suffix == ".safetensors":
        if plain.is_plain(path):
            return plain.NAME
        return gemma_scope.NAME_2 if gemma_scope.is_gemma_scope_2(path) else None
    if path.suffix not in _TORCH:
        return None
    if path.name == dictionary_learning.WEIGHTS:
        return dictionary_learning.NAME
    state = read_torch(path)
    if openai.is_openai(state):
        return openai.NAME
    if dictionary_learning.is_dictionary_learning(state):
        return dictionary_learning.NAME
    return None


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sorts `layers.10` behind `layers.9`."""
    parts: list[tuple[int, int | str]] = []
    for digits, group in _runs(name):
        parts.append((0, int(group)) if digits else (1, group))
    return tuple(parts)


def _runs(name: str) -> Iterator[tuple[bool, str]]:
    start = 0
    for end in range(1, len(name) + 1):
        if end == len(name) or name[end].isdigit() != name[start].isdigit():
            yield name[start].isdigit(), name[start:end]
            start = end
