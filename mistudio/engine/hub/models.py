"""Models on the Hub: search, what one of them is, which of its files are needed, fetching them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistudio.engine.hub.access import Access
from mistudio.engine.hub.catalogue import Found, gated_of, int_or_none, licence_of, search
from mistudio.engine.hub.download import download_files, fetch_bytes
from mistudio.engine.hub.refusals import Subject
from mistudio.engine.hub.repository import (
    RemoteFile,
    check_repository,
    fetch_record,
    file_url,
    list_files,
)
from mistudio.engine.hub.session import Session
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import CorruptFile, UnsupportedModel

if TYPE_CHECKING:
    from mistudio.engine.models.custom_code import Consent, OwnCode
    from mistudio.engine.models.loading import TensorInfo

_WANTED = re.compile(
    r"(model.*\.safetensors|model\.safetensors\.index\.json|config\.json|generation_config\.json|"
    r"tokenizer.*|special_tokens_map\.json|vocab\.json|merges\.txt|chat_template\.jinja|.*\.model)"
)
PHASE = "Downloading the model"
_CONFIG_BYTES = 4 * 1024**2
_HEADER_BYTES = 32 * 1024**2
_HEADERS = 4  # weight files whose headers are read; a model of more files is told by its config
_OWN_HEADERS = 48  # of a model that brings its own program: its config alone tells too little


@dataclass(frozen=True)
class HubModel:
    """A model before it is downloaded: `config` is its config.json, `bytes` what would be fetched.

    `parameters`, `dtypes` (most numbers first) and `tensors` are from the headers of the weight
    files, None and empty where they are too many to ask for. `problem`: why it cannot be used, else
    empty.
    """

    repository: str
    revision: str
    config: bytes
    bytes: int
    weight_bytes: int
    parameters: int | None
    dtypes: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]
    licence: str
    gated: str
    private: bool
    downloads: int
    likes: int
    page: str
    problem: str = ""


def search_models(
    text: str,
    limit: int = 30,
    sort: str = "downloads",
    access: Access | None = None,
    progress: Progress = SILENT,
) -> list[Found]:
    """Models that write text, have safetensors weights and hold `text` in their name."""
    filters = {"search": text.strip(), "filter": "safetensors", "pipeline_tag": "text-generation"}
    return search("model", filters, limit, sort, access, progress)


def model_info(
    repository: str,
    revision: str | None = None,
    access: Access | None = None,
    progress: Progress = SILENT,
) -> HubModel:
    """What a model is, by its record, its config.json and the headers of its weight files: some
    kilobytes, whatever its size."""
    name = check_repository(repository)
    with Session(Subject("model", name), access, progress) as session:
        record = fetch_record(session, revision)
        files = [f for f in list_files(session, record["sha"]) if _WANTED.fullmatch(f.name)]
        weights = [file for file in files if file.name.endswith(".safetensors")]
        config = _config(session, record["sha"], files)
        most = _OWN_HEADERS if b'"auto_map"' in config else _HEADERS
        tensors = _headers(session, record["sha"], weights if len(weights) <= most else [])
        counted = _counted(tensors)
        if not weights:
            problem = "it has no safetensors weights, only formats that can run code when opened."
        else:
            problem = "" if config else "it has no config.json, so it is no transformers model."
        return HubModel(
            repository=name,
            revision=record["sha"],
            config=config,
            bytes=sum(file.size or 0 for file in files),
            weight_bytes=sum(file.size or 0 for file in weights),
            parameters=sum(counted.values()) if counted else None,
            dtypes=tuple(sorted(counted, key=lambda kind: -counted[kind])),
            tensors=tensors,
            licence=licence_of(record),
            gated=gated_of(record),
            private=bool(record.get("private")),
            downloads=int_or_none(record.get("downloads")) or 0,
            likes=int_or_none(record.get("likes")) or 0,
            page=session.subject.page(session.access),
            problem=problem,
        )


def _config(session: Session, revision: str, files: list[RemoteFile]) -> bytes:
    """config.json, empty where there is none."""
    file = next((file for file in files if file.name == "config.json"), None)
    if file is None or not file.size:
        return b""
    if file.size > _CONFIG_BYTES:
        raise CorruptFile(
            "The model's configuration is damaged",
            f"config.json has {file.size:,} bytes.",
            "Choose another model.",
        )
    return session.bytes(file_url(session, revision, file.name), 0, file.size, file.size)


def _headers(session: Session, revision: str, weights: list[RemoteFile]) -> dict[str, TensorInfo]:
    """The tensors in the headers of the weight files."""
    from mistudio.engine.models.loading import header_length, parse_safetensors_header

    found: dict[str, TensorInfo] = {}
    for file in weights:
        url, size = file_url(session, revision, file.name), file.size or 0
        data = session.bytes(url, 0, min(8, size), size)
        if len(data) == 8 and (wanted := min(header_length(data), size)) <= _HEADER_BYTES:
            data += session.bytes(url, 8, wanted, size)
        found |= parse_safetensors_header(data, size, file.name)
    return found


def _counted(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Numbers of each type."""
    from math import prod

    counted: dict[str, int] = {}
    for info in tensors.values():
        counted[info.dtype] = counted.get(info.dtype, 0) + prod(info.shape)
    return counted


def model_code(
    repository: str,
    revision: str | None = None,
    access: Access | None = None,
    progress: Progress = SILENT,
) -> OwnCode:
    """The Python files that a model of the Hub would run, at one commit, to be looked at: they are
    held in memory and written nowhere. Raises `UnsupportedModel` as `custom_code.gather`."""
    from mistudio.engine.models.custom_code import MAX_FILE, gather, too_large
    from mistudio.engine.models.loading import parse_config

    name = check_repository(repository)
    with Session(Subject("model", name), access, progress) as session:
        sha = fetch_record(session, revision)["sha"]
        files = {file.name: file for file in list_files(session, sha)}

        def read(wanted: str) -> bytes:
            file = files.get(wanted)
            if file is None:
                raise FileNotFoundError(wanted)
            if file.size is None or file.size > MAX_FILE:
                raise too_large(wanted)
            return fetch_bytes(session, sha, file)

        raw = parse_config(_config(session, sha, list(files.values())))
        return gather(raw, read, name, sha)


def download_model(
    repository: str,
    folder: Path,
    require_space: Callable[[int, str], None],
    progress: Progress = SILENT,
    access: Access | None = None,
    consent: Consent | None = None,
) -> dict[str, Any]:
    """Fetch a model's safetensors, configuration and tokenizer; returns its provenance.

    Repositories with only pickled weights are refused before anything is fetched. Python files are
    fetched only where they were consented to, at the commit at which they were shown.
    """
    with Session(Subject("model", repository), access, progress) as session:
        record = fetch_record(session, consent.revision if consent else None)
        program = consent.files if consent else {}
        files = [
            f
            for f in list_files(session, record["sha"])
            if _WANTED.fullmatch(f.name) or f.name in program
        ]
        if not any(file.name.endswith(".safetensors") for file in files):
            raise UnsupportedModel(
                "This repository has no safetensors weights",
                f"{repository} offers only formats that can run code when they are opened.",
                "Choose a repository with model.safetensors (many have a converted branch).",
            )
        require_space(sum(file.size or 0 for file in files), f"Downloading {repository}")
        work = folder / ".download"
        try:
            fetched = download_files(session, record["sha"], files, work, PHASE)
            for file in fetched:
                os.replace(file.path, folder / file.name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    card = record.get("cardData")
    return {
        "source": f"Hugging Face Hub {repository}",
        "revision": record["sha"],
        "licence": card.get("license", "") if isinstance(card, dict) else "",
        "files": [file.provenance() for file in fetched],
    }
