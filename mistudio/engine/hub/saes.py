"""SAEs on the Hub: which of a repository's files are one, what they say of it before it is fetched,
fetching them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mistudio.engine.hub.access import Access
from mistudio.engine.hub.catalogue import Found, gated_of, licence_of, search
from mistudio.engine.hub.download import download_files
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
from mistudio.errors import CorruptFile, NotFound

PHASE = "Downloading the SAE"
_CONFIG_BYTES = 1024**2
_HEADER_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class HubSae:
    """One SAE of a repository: `place` is its folder ("" for the root) or its file, `weights` the
    file of its numbers, `files` all that must be fetched. `format` is what the names tell; the
    content decides when it is read."""

    place: str
    format: str
    weights: RemoteFile
    files: tuple[RemoteFile, ...]

    @property
    def bytes(self) -> int:
        return sum(file.size or 0 for file in self.files)


@dataclass(frozen=True)
class HubSaes:
    """What SAEs a repository has at one revision (a commit's hash). `problem`: why none can be
    read, else empty."""

    repository: str
    revision: str
    saes: tuple[HubSae, ...]
    licence: str
    gated: str
    private: bool
    page: str
    problem: str = ""


@dataclass(frozen=True)
class Peek:
    """What an SAE's files say before its numbers are fetched: the object in its configuration
    (empty without one) and the shapes of its tensors (empty where the format has no header)."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def search_saes(
    text: str, limit: int = 30, access: Access | None = None, progress: Progress = SILENT
) -> list[Found]:
    """Repositories whose name holds `text`, the most downloaded first. The Hub has no kind for
    SAEs, so whether one holds any shows when it is looked into."""
    return search("model", {"search": text.strip()}, limit, "downloads", access, progress)


def sae_repository(
    repository: str,
    revision: str | None = None,
    access: Access | None = None,
    progress: Progress = SILENT,
) -> HubSaes:
    """The SAEs of a repository, told by the names of its files: two requests, no content."""
    name = check_repository(repository)
    with Session(Subject("model", name), access, progress) as session:
        record = fetch_record(session, revision)
        files = list_files(session, record["sha"])
        found = saes_among(files)
        problem = "" if found else "none of its files is an SAE in a format that miStudio reads."
        return HubSaes(
            repository=name,
            revision=record["sha"],
            saes=tuple(found),
            licence=licence_of(record),
            gated=gated_of(record),
            private=bool(record.get("private")),
            page=session.subject.page(session.access),
            problem=problem,
        )


def saes_among(files: Iterable[RemoteFile]) -> list[HubSae]:
    """The SAEs that a list of files holds, in its order; only formats that run nothing."""
    from mistudio.engine.sae.formats import dictionary_learning, gemma_scope, llama_scope, plain
    from mistudio.engine.sae.formats import saelens, sparsify  # isort: skip
    from mistudio.engine.sae.formats.reading import NOT_WEIGHTS

    not_alone = {saelens.WEIGHTS, sparsify.WEIGHTS, *NOT_WEIGHTS}
    by_name = {file.name: file for file in files}
    found: list[HubSae] = []

    def add(place: str, format: str, weights: str, *beside: str) -> None:
        kept = [by_name[name] for name in (weights, *beside) if name in by_name]
        found.append(HubSae(place, format, by_name[weights], tuple(kept)))

    for name in by_name:
        path = PurePosixPath(name)
        folder = "" if str(path.parent) == "." else str(path.parent)

        def near(other: str, folder: str = folder) -> str:
            return f"{folder}/{other}" if folder else other

        if path.name == saelens.WEIGHTS and near(saelens.CONFIG) in by_name:
            beside = (saelens.CONFIG, saelens.SCALER, saelens.WHITENING)
            add(folder, saelens.NAME, name, *map(near, beside))
        elif path.name == sparsify.WEIGHTS and near(sparsify.CONFIG) in by_name:
            add(folder, sparsify.NAME, name, near(sparsify.CONFIG))
        elif name.endswith(llama_scope.WEIGHTS):
            above = folder.rpartition("checkpoints")[0].rstrip("/")
            config = f"{above}/{llama_scope.CONFIG}" if above else llama_scope.CONFIG
            if config in by_name:
                add(above, llama_scope.NAME, name, config)
        elif path.name == dictionary_learning.WEIGHTS:
            add(folder, dictionary_learning.NAME, name, near(dictionary_learning.CONFIG))
        elif path.suffix == ".npz":
            add(name, gemma_scope.NAME, name)
        elif path.suffix == ".safetensors" and path.name not in not_alone:
            if path.name == "params.safetensors":
                add(name, gemma_scope.NAME_2, name, near("config.json"))
            elif not path.name.startswith("model"):  # a language model's weights
                add(name, plain.NAME, name)
    return found


def peek(
    repository: str,
    revision: str,
    sae: HubSae,
    access: Access | None = None,
    progress: Progress = SILENT,
) -> Peek:
    """The configuration and the tensors' shapes: some kilobytes, whatever the SAE's size."""
    with Session(Subject("model", repository), access, progress) as session:
        config: dict[str, Any] = {}
        for file in sae.files:
            if file.name.endswith(".json") and 0 < (file.size or 0) <= _CONFIG_BYTES:
                size = file.size or 0
                data = session.bytes(file_url(session, revision, file.name), 0, size, size)
                config |= _object(data, file.name)
        return Peek(config, _shapes(session, revision, sae.weights))


def _object(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as exc:
        raise CorruptFile(
            "The SAE's configuration is damaged", f"{name}: {exc}.", "Choose another one."
        ) from exc
    return value if isinstance(value, dict) else {}


def _shapes(session: Session, revision: str, file: RemoteFile) -> dict[str, tuple[int, ...]]:
    from mistudio.engine.models.loading import header_length, parse_safetensors_header

    size = file.size or 0
    if not file.name.endswith(".safetensors") or size < 8:
        return {}
    url = file_url(session, revision, file.name)
    data = session.bytes(url, 0, 8, size)
    wanted = min(header_length(data), size)
    if wanted > _HEADER_BYTES:
        return {}
    data += session.bytes(url, 8, wanted, size)
    header = parse_safetensors_header(data, size, file.name)
    return {name: tuple(info.shape) for name, info in header.items()}


def download_saes(
    repository: str,
    revision: str,
    names: Sequence[str],
    folder: Path,
    require_space: Callable[[int, str], None],
    access: Access | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Fetch files of a repository into `folder`, under their own names (some formats say by folders
    where an SAE belongs); returns their provenance. Nothing stays where it fails."""
    with Session(Subject("model", repository), access, progress) as session:
        record = fetch_record(session, revision or None)
        listed = {file.name: file for file in list_files(session, record["sha"])}
        missing = [name for name in names if name not in listed]
        if missing or not names:
            raise NotFound(
                "The repository has no such file",
                f"{repository} lacks {', '.join(missing) or 'the SAE'}.",
                "Look at the repository again and choose one of its SAEs.",
            )
        files = [listed[name] for name in names]
        require_space(3 * sum(file.size or 0 for file in files), f"Downloading {repository}")
        work = folder.with_name(f"{folder.name}.download")
        try:
            fetched = download_files(session, record["sha"], files, work, PHASE)
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.replace(work / "files", folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return {
        "source": f"Hugging Face Hub {repository}",
        "repository": repository,
        "revision": record["sha"],
        "licence": licence_of(record),
        "files": [file.provenance() for file in fetched],
    }
