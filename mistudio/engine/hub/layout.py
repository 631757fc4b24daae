"""Which files of a repository are which configuration and split.

The rules are those of `datasets.load_dataset`: `configs` in the dataset card, else patterns in the
names of files and folders. Its own tables are used on the list of names, so that no request is
needed; `tests/engine/hub/test_hub_layout.py` compares the two.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from mistudio.engine.datasets.files.listing import kind_of
from mistudio.engine.hub.repository import RemoteFile

DEFAULT_CONFIG = "default"
_TEXT = (".txt", ".md")
# In case of a draw.
_PREFERENCE = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".md")
# What `datasets` reads with one and the same reader.
_FAMILIES = {".jsonl": ".json", ".tsv": ".csv", ".md": ".txt"}


@dataclass(frozen=True)
class Split:
    """`rows` as the dataset card says; None where it does not."""

    name: str
    files: tuple[RemoteFile, ...]
    rows: int | None = None

    @property
    def bytes(self) -> int:
        return sum(file.size or 0 for file in self.files)


@dataclass(frozen=True)
class Config:
    """`columns` are (name, type) as the dataset card says, in its words; empty where it does not.
    `dataset_bytes`: what the rows take in memory, by the card."""

    name: str
    splits: tuple[Split, ...]
    columns: tuple[tuple[str, str], ...] = ()
    dataset_bytes: int | None = None

    @property
    def bytes(self) -> int:
        return sum(split.bytes for split in self.splits)


@dataclass(frozen=True)
class Layout:
    """`default` is None where one of several configurations has to be chosen."""

    configs: tuple[Config, ...]
    default: str | None


def resolve(files: Sequence[RemoteFile], card: Mapping[str, Any]) -> Layout:
    """The configurations of a repository, with the files that we can read."""
    by_name = {file.name: file for file in files}
    infos = _infos(card)
    configs = []
    declared = _declared(card)
    for name, entry in declared.items():
        patterns = _patterns(entry, list(by_name))
        configs.append(_config(name, patterns, by_name, infos.get(name, {})))
    if not declared:
        patterns = _guessed(list(by_name))
        told = next(iter(infos.values())) if len(infos) == 1 else infos.get(DEFAULT_CONFIG, {})
        configs.append(_config(DEFAULT_CONFIG, patterns, by_name, told))
    configs = [config for config in configs if config.splits]
    names = [config.name for config in configs]
    default = names[0] if len(names) == 1 else None
    for name, entry in declared.items():
        if name in names and (entry.get("default") is True or (not default and name == "default")):
            default = name
    return Layout(tuple(configs), default)


def _declared(card: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    entries = card.get("configs")
    if not isinstance(entries, list):
        return {}
    return {
        str(entry["config_name"]): entry
        for entry in entries
        if isinstance(entry, dict) and "config_name" in entry
    }


def _infos(card: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`dataset_info` by configuration: features, splits with their numbers of rows."""
    info = card.get("dataset_info")
    entries = info if isinstance(info, list) else [info]
    return {
        str(entry.get("config_name") or DEFAULT_CONFIG): entry
        for entry in entries
        if isinstance(entry, dict)
    }


def _config(
    name: str,
    patterns: Mapping[str, list[str]],
    by_name: Mapping[str, RemoteFile],
    info: Mapping[str, Any],
) -> Config:
    told = {
        str(entry.get("name")): entry
        for entry in _list(info.get("splits"))
        if isinstance(entry, dict)
    }
    splits = []
    for split, wanted in patterns.items():
        names = list(dict.fromkeys(n for pattern in wanted for n in _matching(pattern, by_name)))
        readable = _one_kind(names)
        if readable:
            rows = told.get(split, {}).get("num_examples")
            splits.append(
                Split(
                    split,
                    tuple(by_name[file] for file in readable),
                    rows if isinstance(rows, int) else None,
                )
            )
    columns = tuple(
        (str(entry.get("name")), _type(entry))
        for entry in _list(info.get("features"))
        if isinstance(entry, dict)
    )
    size = info.get("dataset_size")
    return Config(name, tuple(splits), columns, size if isinstance(size, int) else None)


def _patterns(entry: Mapping[str, Any], names: list[str]) -> dict[str, list[str]]:
    """Split -> patterns of a configuration of the card."""
    from datasets.data_files import sanitize_patterns

    base = str(entry.get("data_dir") or "").strip("/")
    data_files = entry.get("data_files")
    if data_files is None:
        inside = [n.removeprefix(f"{base}/") for n in names if not base or n.startswith(f"{base}/")]
        found = _guessed(inside)
    else:
        try:
            found = sanitize_patterns(data_files)
        except (ValueError, TypeError):
            return {}
    return {
        split: [f"{base}/{pattern}" if base else str(pattern) for pattern in patterns]
        for split, patterns in found.items()
    }


def _guessed(names: list[str]) -> dict[str, list[str]]:
    """Split -> patterns, from the names alone."""
    from datasets.data_files import _get_data_files_patterns

    try:
        found: dict[Any, list[str]] = _get_data_files_patterns(
            lambda pattern: _matching(pattern, names)
        )
    except (FileNotFoundError, ValueError):
        return {}
    return {str(split): patterns for split, patterns in found.items()}


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern means; hidden ones and those about the data only if it says so."""
    from datasets.data_files import FILES_TO_IGNORE
    from fsspec.utils import glob_translate  # type: ignore[import-untyped]

    # An address of this repository's own files may stand in a card.
    pattern = re.sub(r"^hf://datasets/[^/]+/[^/]+/", "", pattern).removeprefix("./")
    expression = re.compile(glob_translate(pattern))
    ignored = set(FILES_TO_IGNORE) - {PurePosixPath(pattern).name}
    hidden = _hidden(pattern)
    return [
        name
        for name in sorted(names)
        if expression.match(name)
        and PurePosixPath(name).name not in ignored
        and _hidden(name) == hidden
    ]


def _hidden(path: str) -> tuple[int, int]:
    """How many parts begin with a dot, and how many folders with two underscores."""
    parts = PurePosixPath(path).parts
    return (
        sum(part.startswith(".") and set(part) != {"."} for part in parts),
        sum(part.startswith("__") for part in parts[:-1]),
    )


def _one_kind(names: list[str]) -> list[str]:
    """The readable files of the kind that most are of: a licence beside the data is no data."""
    kinds = {name: kind[0] for name in names if (kind := kind_of(PurePosixPath(name)))}
    if not kinds:
        return []
    counted = Counter(_FAMILIES.get(kind, kind) for kind in kinds.values())
    most = max(
        counted, key=lambda kind: (kind not in _TEXT, counted[kind], -_PREFERENCE.index(kind))
    )
    return [name for name, kind in kinds.items() if _FAMILIES.get(kind, kind) == most]


def _type(feature: Mapping[str, Any]) -> str:
    """A column's type in the card's words, such as `string` or `list of struct`."""
    for key in ("dtype",):
        value = feature.get(key)
        if isinstance(value, str):
            return value
        if isinstance(value, dict):
            return next(iter(value), "")
    for key in ("list", "sequence", "struct"):
        if key in feature:
            inner = feature[key]
            word = "struct" if key == "struct" else "list"
            return f"{word} of {inner}" if isinstance(inner, str) and word == "list" else word
    return ""


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
