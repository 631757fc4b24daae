"""A dataset from the Hugging Face Hub: downloaded whole, its first part, or a link to it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio.errors import Busy, InvalidInput
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.library.library import Library

if TYPE_CHECKING:
    from mistudio.engine.datasets.documents import Document, WrittenDocuments
    from mistudio.engine.datasets.sources import ReadOptions, Rejected
    from mistudio.engine.hub import Config, HubDataset, Session, Split

DOWNLOADS = "downloads"
KEPT_DAYS = 7.0  # a download that nobody goes on with
# Bytes of documents for each byte of a packed file; the card says better where it says anything.
UNPACKED = 3.0


@dataclass(frozen=True)
class DownloadDataset:
    """A dataset on the Hub becomes one here. `config`, `split`, `revision` None: the default one,
    all, the newest. With a limit only as much is fetched as is needed; without `store` the
    documents stay on the Hub and are read there each time (the first thousand are kept to look at).

    The access token is no part of it: see `mistudio.credentials`.
    """

    repository: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    text_column: str | None = None
    name: str | None = None
    skip_bad_rows: bool = False
    max_documents: int | None = None
    max_bytes: int | None = None
    store: bool = True

    kind: ClassVar[str] = "download_dataset"
    lane: ClassVar[str] = "disk"

    @property
    def phases(self) -> tuple[Phase, ...]:
        if self.whole:
            return (Phase("look", 1), Phase("download", 70), Phase("read", 29))
        return (Phase("look", 5), Phase("read", 95))

    @property
    def whole(self) -> bool:
        return self.store and self.max_documents is None and self.max_bytes is None

    def title(self, library: Library) -> str:
        return f"{'Download' if self.store else 'Link'} {self.repository}"

    def run(self, context: JobContext) -> dict[str, Any]:
        from mistudio.credentials import access_for
        from mistudio.engine.datasets.sources import ReadOptions, Rejected
        from mistudio.engine.hub import Session, Subject, check_repository, inspect

        for name, value in (("max_documents", self.max_documents), ("max_bytes", self.max_bytes)):
            if value is not None and value < 1:
                raise InvalidInput("The limit is too small", "It must be 1 or more.", field=name)
        options = ReadOptions(
            text_column=self.text_column or None,
            bad_rows="skip" if self.skip_bad_rows else "refuse",
            max_documents=self.max_documents,
            max_bytes=self.max_bytes,
        )
        repository = check_repository(self.repository)
        rejected = Rejected()
        with Session(Subject("dataset", repository), access_for(repository), context) as session:
            context.report(0, None, "look")
            dataset = inspect(session, self.revision or None)
            config, splits = dataset.choose(self.config or None, self.split or None)
            work = _Work(context, session, dataset, config, splits, options, rejected)
            if self.whole:
                written, more = work.download()
            else:
                written, more = work.read_there(self.store)
        dataset_id = self._commit(context, dataset, config, splits, options, written, more)
        if self.whole:
            shutil.rmtree(download_folder(context.library, dataset), ignore_errors=True)
        return {
            "dataset_id": dataset_id,
            "repository": repository,
            "revision": dataset.revision,
            "documents": written.documents,
            "skipped": rejected.rows,
            "skipped_rows": [str(row) for row in rejected.first],
            "rejected": rejected.as_json(),
        }

    def _commit(
        self,
        context: JobContext,
        dataset: HubDataset,
        config: Config,
        splits: tuple[Split, ...],
        options: ReadOptions,
        written: WrittenDocuments,
        more: dict[str, Any],
    ) -> int:
        library = context.library
        name = (self.name or "").strip() or PurePosixPath(dataset.repository).name
        link = {}
        if not self.store:
            link = {
                "kind": "hub",
                "repository": dataset.repository,
                "revision": dataset.revision,
                "config": config.name,
                "split": self.split or None,
                "options": options.as_json(),
            }
        target = library.new_folder("datasets", name)
        with library.commit(context.work_folder / "dataset", target):
            return library.datasets.add(
                name=name,
                source="hub",
                origin=dataset.repository,
                folder=target,
                documents=written.documents,
                characters=written.characters,
                bytes=written.bytes,
                link=link,
                provenance={
                    "sha256": written.sha256,
                    "licence": dataset.licence,
                    "repository": dataset.repository,
                    "revision": dataset.revision,
                    "config": config.name,
                    "split": self.split or "",
                    "page": dataset.page,
                    "files": sum(len(split.files) for split in splits),
                    "source_bytes": sum(split.bytes for split in splits),
                    **options.as_json(),
                    **more,
                },
            )


@dataclass(frozen=True)
class _Work:
    """One download, with what it works on."""

    context: JobContext
    session: Session
    dataset: HubDataset
    config: Config
    splits: tuple[Split, ...]
    options: ReadOptions
    rejected: Rejected

    def download(self) -> tuple[WrittenDocuments, dict[str, Any]]:
        """Every file, then every row of them."""
        from mistudio.engine.hub import download_files, read_fetched
        from mistudio.engine.hub.download import is_fetched

        library, files = self.context.library, [f for s in self.splits for f in s.files]
        clear_old_downloads(library)
        folder = download_folder(library, self.dataset)
        missing = sum(file.size or 0 for file in files if not is_fetched(folder, file))
        library.require_space(missing + self._documents_bytes(), f"Downloading {self.dataset.page}")
        with _only_one(folder):
            fetched = download_files(self.session, self.dataset.revision, files, folder, "download")
            total = sum(file.size for file in fetched)
            self.context.report(0, total, "read", rows=0)
            rows = _Rows(self.context, total, sum(split.rows or 0 for split in self.splits))
            paths = {file.name: file.path for file in fetched}
            documents = read_fetched(self.splits, paths, self.options, self.rejected, rows)
            written = self._write(rows.counted(documents))
        return written, {
            "source_files": [file.provenance() for file in fetched],
            **self._rejected(),
        }

    def read_there(self, store: bool) -> tuple[WrittenDocuments, dict[str, Any]]:
        """As much as is wanted, read on the Hub; of a link, the first documents."""
        from mistudio.engine.datasets.documents import limited
        from mistudio.engine.datasets.links import FIRST_DOCUMENTS
        from mistudio.engine.hub import read_splits

        options = self.options
        if not store:
            few = min(options.max_documents or FIRST_DOCUMENTS, FIRST_DOCUMENTS)
            options = replace(options, max_documents=few)
        if options.max_bytes is not None:
            self.context.library.require_space(2 * options.max_bytes, "Keeping this much text")
        self.context.report(0, options.max_documents or options.max_bytes, "read", rows=0)
        documents = read_splits(
            self.session,
            self.dataset.revision,
            self.splits,
            options,
            self.rejected,
            self.context.work_folder / "segments",
        )
        taken = _Taken(self.context, options)
        with contextlib.closing(documents):
            written = self._write(taken.counted(limited(documents, options.limit)))
        listed = [
            {"name": file.name, "size": file.size, "sha256": file.sha256, "verified_by": ""}
            for split in self.splits
            for file in split.files
        ]
        return written, {"source_files": listed[:1000], **self._rejected()}

    def _write(self, documents: Iterable[Document]) -> WrittenDocuments:
        from mistudio.engine.datasets.documents import write_documents

        folder = self.context.work_folder / "dataset"
        shutil.rmtree(folder, ignore_errors=True)
        return write_documents(documents, folder, _OnlyCheck(self.context))

    def _rejected(self) -> dict[str, Any]:
        return {"skipped_rows": self.rejected.rows, "rejected": self.rejected.as_json()}

    def _documents_bytes(self) -> int:
        """About what the documents will take."""
        from mistudio.engine.datasets.sources import kind_of

        if self.config.dataset_bytes and len(self.splits) == len(self.config.splits):
            return int(1.1 * self.config.dataset_bytes)
        size = 0.0
        for split in self.splits:
            for file in split.files:
                format, packed = kind_of(PurePosixPath(file.name)) or ("", "")
                dense = packed or format == ".parquet"
                size += (file.size or 0) * (UNPACKED if dense else 1.1)
        return int(size)


class _Rows:
    """Progress of reading downloaded files: bytes for the bar, rows beside it."""

    def __init__(self, context: JobContext, total: int, rows_total: int) -> None:
        self._context, self._total, self._rows_total = context, total, rows_total
        self._rows = 0

    def check(self) -> None:
        self._context.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        told = {"rows_total": self._rows_total} if self._rows_total else {}
        self._context.report(done, self._total, "read", rows=self._rows, **told)

    def counted(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            self._rows += 1
            yield document
        self.report(self._total)


class _Taken:
    """Progress towards a limit of documents or bytes, whichever is nearer."""

    def __init__(self, context: JobContext, options: ReadOptions) -> None:
        self._context, self._options = context, options

    def counted(self, documents: Iterable[Document]) -> Iterator[Document]:
        rows = size = 0
        limits = self._options
        for document in documents:
            rows += 1
            size += len(document.text.encode("utf-8", "replace"))
            share = max(
                rows / limits.max_documents if limits.max_documents else 0.0,
                size / limits.max_bytes if limits.max_bytes else 0.0,
            )
            if rows % 32 == 1:
                self._context.report(share, 1.0, "read", rows=rows, bytes_done=size)
            yield document
        self._context.report(1.0, 1.0, "read", rows=rows, bytes_done=size)


class _OnlyCheck:
    """The reader tells how far it is; the writer only asks whether to stop."""

    def __init__(self, context: JobContext) -> None:
        self._context = context

    def check(self) -> None:
        self._context.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        pass


def download_folder(library: Library, dataset: HubDataset) -> Path:
    """Where a dataset's files lie until they are read: it outlives the process, so that a download
    goes on after a restart."""
    key = hashlib.sha256(f"{dataset.page}@{dataset.revision}".encode()).hexdigest()[:12]
    slug = "".join(c if c.isalnum() else "-" for c in dataset.repository.lower())[:40]
    return library.root / DOWNLOADS / f"{slug}-{key}"


def clear_old_downloads(library: Library) -> None:
    """Remove downloads that nobody has gone on with for a week."""
    folder = library.root / DOWNLOADS
    if not folder.is_dir():
        return
    horizon = time.time() - KEPT_DAYS * 86400
    for entry in folder.iterdir():
        if not entry.is_dir():
            continue
        with contextlib.suppress(OSError, Busy):
            newest = max((p.stat().st_mtime for p in entry.rglob("*")), default=0.0)
            if newest < horizon:
                with _only_one(entry):
                    shutil.rmtree(entry, ignore_errors=True)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Two downloads into one folder would write into each other's parts."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(os.fspath(folder) + ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as exc:
        raise Busy(
            "This dataset is being downloaded already",
            "Another job, or another miStudio, downloads the same one.",
            "Wait for it to end.",
        ) from exc
    try:
        yield
    finally:
        lock.release()
        Path(os.fspath(folder) + ".lock").unlink(missing_ok=True)
