"""Jobs on datasets: add text to the library."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio.engine.progress import Progress
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.library.library import Library
from mistudio.resources import resource

if TYPE_CHECKING:
    from mistudio.engine.datasets.documents import Document
    from mistudio.engine.datasets.sources import ReadOptions, Rejected

SAMPLE_NAME = "Wikipedia vital articles"
SAMPLE_FILE = ("sample", "wikipedia_vital_intros.jsonl")
SAMPLE_LICENCE = "CC BY-SA 4.0, text by Wikipedia contributors"


@dataclass(frozen=True)
class AddDataset:
    """A local file or folder becomes a dataset: copied into the library, or, with `keep_in_place`,
    read where it is each time. `encoding` None: found out; the limits None: all of it."""

    path: str
    text_column: str | None = None
    name: str | None = None
    skip_bad_rows: bool = False
    keep_in_place: bool = False
    max_documents: int | None = None
    max_bytes: int | None = None
    encoding: str | None = None

    kind: ClassVar[str] = "add_dataset"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("read"),)

    def title(self, library: Library) -> str:
        return f"Add {self.name or printable(Path(self.path).name)}"

    def run(self, context: JobContext) -> dict[str, Any]:
        from mistudio.engine.datasets.sources import ReadOptions

        options = ReadOptions(
            text_column=self.text_column,
            bad_rows="skip" if self.skip_bad_rows else "refuse",
            max_documents=self.max_documents,
            max_bytes=self.max_bytes,
            encoding=self.encoding,
        )
        add = link_dataset if self.keep_in_place else add_dataset
        dataset_id, rejected = add(
            context.library,
            context.work_folder,
            Path(self.path).expanduser(),
            context,
            name=self.name,
            options=options,
        )
        return {
            "dataset_id": dataset_id,
            "skipped": rejected.rows,
            "skipped_rows": [str(row) for row in rejected.first],
            "rejected": rejected.as_json(),
        }


@dataclass(frozen=True)
class AddSampleDataset:
    """The corpus that ships with miStudio becomes a dataset; once is enough."""

    kind: ClassVar[str] = "add_sample_dataset"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("read"),)

    def title(self, library: Library) -> str:
        return f"Add the sample: {SAMPLE_NAME}"

    def run(self, context: JobContext) -> dict[str, Any]:
        return {"dataset_id": add_sample_dataset(context.library, context.work_folder, context)}


def add_sample_dataset(library: Library, work: Path, progress: Progress) -> int:
    """Id of the sample dataset, added if it is not there yet."""
    for dataset in library.datasets.all("source = 'sample'"):
        return dataset.id
    dataset_id, _ = add_dataset(
        library,
        work,
        resource(*SAMPLE_FILE),
        progress,
        name=SAMPLE_NAME,
        source="sample",
        licence=SAMPLE_LICENCE,
    )
    return dataset_id


def add_dataset(
    library: Library,
    work: Path,
    path: Path,
    progress: Progress,
    *,
    name: str | None = None,
    options: ReadOptions | None = None,
    source: str = "local",
    licence: str = "",
) -> tuple[int, Rejected]:
    """Read, store, then commit. Returns the id and what was left out."""
    from mistudio.engine.datasets.sources import (
        ReadOptions,
        Rejected,
        find_files,
        read_documents,
        stem,
    )

    options, rejected = options or ReadOptions(), Rejected()
    found = find_files(path)
    library.require_space(_estimate(found.bytes, options), f"Adding {printable(path.name)}")
    documents = read_documents(path, options, rejected, progress)
    record = _Record(
        name=name or stem(path),
        source=source,
        origin=printable(path) if source == "local" else path.name,
        provenance={
            "licence": licence,
            "files": len(found.files),
            "source_bytes": found.bytes,
            **options.as_json(),
        },
    )
    return _store(library, work, documents, record, rejected, progress), rejected


def link_dataset(
    library: Library,
    work: Path,
    path: Path,
    progress: Progress,
    *,
    name: str | None = None,
    options: ReadOptions | None = None,
) -> tuple[int, Rejected]:
    """Keep where the text is and what it looks like now; only its first documents are stored."""
    from mistudio.engine.datasets.links import FIRST_DOCUMENTS, link_to
    from mistudio.engine.datasets.sources import ReadOptions, Rejected, read_documents, stem

    options, rejected = options or ReadOptions(), Rejected()
    link = link_to(path, options)
    wanted = options.max_documents
    few = FIRST_DOCUMENTS if wanted is None else min(wanted, FIRST_DOCUMENTS)
    documents = read_documents(path, replace(options, max_documents=few), rejected, progress)
    files, size = link["total"]
    record = _Record(
        name=name or stem(path),
        source="local",
        origin=str(path),
        provenance={"files": files, "source_bytes": size, **options.as_json()},
        link=link,
    )
    return _store(library, work, documents, record, rejected, progress), rejected


@dataclass(frozen=True)
class _Record:
    """What a dataset's row says beside the counts."""

    name: str
    source: str
    origin: str
    provenance: dict[str, Any]
    link: dict[str, Any] = field(default_factory=dict)


def _store(
    library: Library,
    work: Path,
    documents: Iterable[Document],
    record: _Record,
    rejected: Rejected,
    progress: Progress,
) -> int:
    """Write, rename, commit."""
    from mistudio.engine.datasets.documents import write_documents

    folder = work / "dataset"
    written = write_documents(documents, folder, _OnlyCheck(progress))
    name = record.name.strip() or "Text"
    target = library.new_folder("datasets", name)
    with library.commit(folder, target):
        return library.datasets.add(
            name=name,
            source=record.source,
            origin=record.origin,
            folder=target,
            documents=written.documents,
            characters=written.characters,
            bytes=written.bytes,
            link=record.link,
            provenance={
                "sha256": written.sha256,
                "skipped_rows": rejected.rows,
                "rejected": rejected.as_json(),
                **record.provenance,
            },
        )


class _OnlyCheck:
    """The reader tells how far it is, in bytes of the files; the writer only asks whether to
    stop."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def check(self) -> None:
        self._progress.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        pass


def _estimate(source_bytes: int, options: ReadOptions) -> int:
    """Bytes that the documents may take: escapes and offsets included, packed files as they are;
    what grows beyond is stopped when the disk is nearly full."""
    wanted = source_bytes if options.max_bytes is None else min(source_bytes, options.max_bytes)
    return 2 * wanted


def printable(path: Path | str) -> str:
    """A path or name that a record can hold."""
    from mistudio.engine.datasets.sources import shown

    return shown(path)
