"""What there is on the Hub: a search for datasets or models, and what a dataset holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mistudio.engine.hub.access import Access
from mistudio.engine.hub.layout import Config, Layout, Split, resolve
from mistudio.engine.hub.refusals import Subject
from mistudio.engine.hub.repository import check_repository, fetch_record, list_files
from mistudio.engine.hub.session import Session
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import InvalidInput, NotFound

SORTS = ("downloads", "likes", "trendingScore", "lastModified")
_EXPAND = (
    "author", "downloads", "likes", "gated", "private", "tags", "lastModified", "description",
    "mainSize", "usedStorage",
)  # fmt: skip
_EXPAND_MODEL = (
    "author", "downloads", "likes", "gated", "private", "tags", "lastModified", "safetensors",
)  # fmt: skip
_TYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class Found:
    """One row of search results. `bytes` is None where the Hub does not say; `gated` is "", "auto"
    (terms to accept) or "manual" (the owner answers each request)."""

    repository: str
    downloads: int
    likes: int
    bytes: int | None
    gated: str
    private: bool
    licence: str
    description: str
    rows: str  # such as 100K<n<1M, where its tags say so


@dataclass(frozen=True)
class HubDataset:
    """A dataset at one revision (a commit's hash). `problem` says why nothing of it can be read;
    empty where something can."""

    repository: str
    revision: str
    configs: tuple[Config, ...]
    default_config: str | None
    licence: str
    gated: str
    private: bool
    downloads: int
    likes: int
    description: str
    page: str
    problem: str = ""

    def choose(self, config: str | None, split: str | None) -> tuple[Config, tuple[Split, ...]]:
        """The configuration and the splits that a user's choice means (None: the default one, all
        of them); refused with what there is to choose from."""
        if self.problem:
            raise NotFound(
                "Nothing here can be read",
                f"{self.repository}: {self.problem}",
                "Choose another dataset, or another revision of it.",
            )
        names = [entry.name for entry in self.configs]
        name = config or self.default_config
        if name is None:
            raise InvalidInput(
                "Choose a configuration",
                f"{self.repository} has {len(names)}: {_some(names)}.",
                "Give one of these as Config.",
                field="config",
            )
        chosen = next((entry for entry in self.configs if entry.name == name), None)
        if chosen is None:
            raise InvalidInput(
                "No such configuration",
                f"{self.repository} has {_some(names)}; {name!r} is not among them.",
                "Give one of these as Config, or leave it empty.",
                field="config",
            )
        splits = chosen.splits
        if split:
            splits = tuple(entry for entry in splits if entry.name == split)
        if not splits:
            raise InvalidInput(
                "No such split",
                f"{self.repository} ({chosen.name}) has "
                f"{_some([entry.name for entry in chosen.splits])}; {split!r} is not among them.",
                "Give one of these as Split, or leave it empty for all.",
                field="split",
            )
        return chosen, splits


def search_datasets(
    text: str,
    limit: int = 30,
    sort: str = "downloads",
    access: Access | None = None,
    progress: Progress = SILENT,
) -> list[Found]:
    """Datasets whose name holds the text, the most used first; one request."""
    return search("dataset", {"search": text.strip()}, limit, sort, access, progress)


def search(
    kind: str,
    filters: Mapping[str, str],
    limit: int,
    sort: str,
    access: Access | None = None,
    progress: Progress = SILENT,
) -> list[Found]:
    """What of a kind ("dataset", "model") fits the Hub's `filters`; one request."""
    if sort not in SORTS:
        raise InvalidInput("Unknown order", f"{sort!r} is not one of {', '.join(SORTS)}.")
    fields = list(_EXPAND_MODEL if kind == "model" else _EXPAND)
    params = {**filters, "sort": sort, "direction": "-1", "limit": str(limit), "expand": fields}
    with Session(Subject(kind), access, progress) as session:
        rows = session.json(f"/api/{kind}s", params)
        if not isinstance(rows, list):
            raise session.nonsense("a list was expected")
        return [_found(row) for row in rows[:limit] if isinstance(row, dict) and "id" in row]


def dataset_info(
    repository: str,
    revision: str | None = None,
    access: Access | None = None,
    progress: Progress = SILENT,
) -> HubDataset:
    """What a dataset holds: configurations, splits, files with sizes, columns by its card."""
    name = check_repository(repository)
    with Session(Subject("dataset", name), access, progress) as session:
        return inspect(session, revision)


def inspect(session: Session, revision: str | None = None) -> HubDataset:
    """`dataset_info` in a conversation that goes on."""
    record = fetch_record(session, revision)
    card = record.get("cardData")
    card = card if isinstance(card, dict) else {}
    files = list_files(session, record["sha"])
    layout = resolve(files, card)
    return HubDataset(
        repository=session.subject.name,
        revision=record["sha"],
        configs=layout.configs,
        default_config=layout.default,
        licence=licence_of(record),
        gated=gated_of(record),
        private=bool(record.get("private")),
        downloads=int_or_none(record.get("downloads")) or 0,
        likes=int_or_none(record.get("likes")) or 0,
        description=_line(record.get("description")),
        page=session.subject.page(session.access),
        problem="" if layout.configs else _problem([file.name for file in files], layout),
    )


def _problem(names: list[str], layout: Layout) -> str:
    scripts = [name for name in names if name.endswith(".py") and "/" not in name]
    if scripts:
        return (
            f"its data come from a program ({scripts[0]}), and programs of others are never run "
            "here. The Hub often keeps a copy as parquet files: give `refs/convert/parquet` as "
            "the revision."
        )
    data = [
        name for name in names if name.rpartition("/")[2] not in ("README.md", ".gitattributes")
    ]
    if not data:
        return "it holds no files yet."
    return (
        "none of its files is text, JSON, CSV, parquet or arrow; it has "
        f"{_some(sorted({_suffix(name) for name in data}))}."
    )


def _suffix(name: str) -> str:
    last = name.rpartition("/")[2]
    return f".{last.rpartition('.')[2]}" if "." in last else last


def _found(row: Mapping[str, Any]) -> Found:
    size = int_or_none(row.get("mainSize"))
    if size is None:
        size = _weight_bytes(row.get("safetensors"))
    if size is None:
        size = int_or_none(row.get("usedStorage"))
    rows = next((t for t in _tags(row) if t.startswith("size_categories:")), "")
    return Found(
        repository=str(row["id"]),
        downloads=int_or_none(row.get("downloads")) or 0,
        likes=int_or_none(row.get("likes")) or 0,
        bytes=size,
        gated=gated_of(row),
        private=bool(row.get("private")),
        licence=licence_of(row),
        description=_line(row.get("description")),
        rows=rows.partition(":")[2],
    )


def _weight_bytes(told: object) -> int | None:
    """Of a model, from the numbers of each type that the Hub counted in its safetensors files;
    None where it tells none, or one whose size is not known here."""
    counts = told.get("parameters") if isinstance(told, dict) else None
    if not isinstance(counts, dict) or not counts or not counts.keys() <= _TYPE_BYTES.keys():
        return None
    numbers = {kind: int_or_none(count) for kind, count in counts.items()}
    return sum(_TYPE_BYTES[kind] * (count or 0) for kind, count in numbers.items())


def gated_of(row: Mapping[str, Any]) -> str:
    gated = row.get("gated")
    if isinstance(gated, str):
        return gated
    return "auto" if gated else ""


def licence_of(row: Mapping[str, Any]) -> str:
    """By the card, else by the tags; several are named one after the other."""
    card = row.get("cardData")
    value = card.get("license") if isinstance(card, dict) else None
    values = value if isinstance(value, list) else [value] if value else []
    values = values or [t.partition(":")[2] for t in _tags(row) if t.startswith("license:")]
    return ", ".join(str(entry) for entry in values)


def _tags(row: Mapping[str, Any]) -> list[str]:
    tags = row.get("tags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def _line(value: object) -> str:
    return " ".join(str(value).split())[:300] if value else ""


def int_or_none(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more
