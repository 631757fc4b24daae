"""Documents of a dataset on the Hub without downloading it.

A file is taken in segments that are files of their own (some MB of whole lines, some thousand rows
of parquet), and each is read as any local file is: one reader for all. Only the segment at hand
lies on the disk.
"""

from __future__ import annotations

import gzip
import io
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from mistudio.engine.hub.access import Access
from mistudio.engine.hub.catalogue import inspect
from mistudio.engine.hub.download import download_files
from mistudio.engine.hub.layout import Split
from mistudio.engine.hub.refusals import Subject
from mistudio.engine.hub.remote_files import RandomFile, SequentialFile
from mistudio.engine.hub.repository import RemoteFile, check_names, check_repository
from mistudio.engine.hub.session import Session
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import CorruptFile, DiskFull, InvalidInput, UserError

if TYPE_CHECKING:
    from mistudio.engine.datasets.documents import Document
    from mistudio.engine.datasets.sources import ReadOptions, Rejected

FIRST_SEGMENT = 256 * 1024  # bytes of lines; each further one is four times as large
LARGEST_SEGMENT = 16 * 1024**2
LONGEST_LINE = 64 * 1024**2
ROWS = 2_000  # of parquet and arrow in a segment


@dataclass(frozen=True)
class Segment:
    """`before`: rows (or lines) of the file that come before it."""

    path: Path
    before: int = 0


def stream_documents(
    link: Mapping[str, Any],
    options: ReadOptions | None = None,
    progress: Progress = SILENT,
    *,
    access: Access | None = None,
    rejected: Rejected | None = None,
    scratch: Path | None = None,
) -> Iterator[Document]:
    """Documents of `link` ({"repository", "revision", "config", "split"}; empty: the default ones),
    split after split, up to the limits of `options` (by default the link's own).

    Connections that break are taken up where they ended. `scratch` is where the segment at hand
    lies. Raises UserError, and what `progress.check` raises within 200 ms.
    """
    from mistudio.engine.datasets.documents import limited
    from mistudio.engine.datasets.sources import ReadOptions

    if options is None:
        options = ReadOptions.from_json(dict(link.get("options") or {}))
    repository = check_repository(str(link["repository"]))
    with Session(Subject("dataset", repository), access, _Quiet(progress)) as session:
        dataset = inspect(session, link.get("revision") or None)
        _, splits = dataset.choose(link.get("config") or None, link.get("split") or None)
        yield from limited(
            read_splits(session, dataset.revision, splits, options, rejected, scratch),
            options.limit,
        )


def read_splits(
    session: Session,
    revision: str,
    splits: Iterable[Split],
    options: ReadOptions,
    rejected: Rejected | None = None,
    scratch: Path | None = None,
) -> Generator[Document, None, None]:
    """Every document of the splits' files; the limits of `options` are the caller's to keep."""
    splits = tuple(splits)
    check_names([file for split in splits for file in split.files], session.subject)
    options = replace(options, max_documents=None, max_bytes=None)
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix="mistudio-hub-", dir=scratch, ignore_cleanup_errors=True
    ) as temporary:
        folder = Path(temporary)
        wanted = Wanted(options)
        for split in splits:
            for file in split.files:
                wanted.begin_file()
                for document in _read_file(session, revision, file, folder, wanted, rejected):
                    yield replace(document, split=split.name)


def read_fetched(
    splits: Iterable[Split],
    paths: Mapping[str, Path],
    options: ReadOptions,
    rejected: Rejected | None = None,
    progress: Progress = SILENT,
) -> Iterator[Document]:
    """The same from downloaded files (name -> path). The progress counts bytes on disk."""
    from mistudio.engine.datasets.sources import read_documents

    wanted = Wanted(replace(options, max_documents=None, max_bytes=None))
    before = 0
    for split in splits:
        for file in split.files:
            path = paths[file.name]
            size = path.stat().st_size
            if size:
                wanted.begin_file()
                chosen = wanted.choose(path)
                part = _Part(progress, before)
                for document in read_documents(path, chosen, rejected, part):
                    yield replace(document, split=split.name)
            before += size


def _read_file(
    session: Session,
    revision: str,
    file: RemoteFile,
    folder: Path,
    wanted: Wanted,
    rejected: Rejected | None,
) -> Iterator[Document]:
    from mistudio.engine.datasets.sources import Rejected, read_documents

    if file.size == 0:
        return
    for segment in _segments(session, revision, file, folder, wanted):
        chosen = wanted.choose(segment.path)
        own = Rejected()
        try:
            yield from read_documents(segment.path, chosen, own, _Quiet(session.progress))
        except (InvalidInput, CorruptFile) as exc:
            if segment.before:
                raise _moved(exc, f"Counted from line or row {segment.before:,} of it.") from exc
            raise
        finally:
            segment.path.unlink(missing_ok=True)
        if rejected is not None:
            _add(rejected, own, file.name, segment.before)


def _moved(exc: InvalidInput | CorruptFile, where: str) -> UserError:
    what = f"{exc.what} {where}"
    if isinstance(exc, InvalidInput):
        return InvalidInput(exc.title, what, exc.next_step, exc.field)
    return CorruptFile(exc.title, what, exc.next_step)


def _add(to: Rejected, own: Rejected, name: str, before: int) -> None:
    """A segment's bad rows, by the lines of the whole file."""
    for row in own.first:
        to.add(replace(row, file=name, line=row.line + before if row.line else 0))
    to.rows += own.rows - sum(1 for row in own.first if row.line)
    to.files += own.files - sum(1 for row in own.first if not row.line)
    to.replaced += own.replaced
    to.encodings.update(own.encodings)


class Wanted:
    """How files are read: the text column that the first one shows holds for all of them, the
    encoding of a file's beginning for all of that file."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = options
        self.columns: set[str] | None = None  # those that are needed; None: all
        self._encoding = options.encoding
        self._chosen = False

    def begin_file(self) -> None:
        self.options = replace(self.options, encoding=self._encoding)
        self._chosen = False

    def choose(self, first: Path) -> ReadOptions:
        """The options for a file, of which `first` is the beginning."""
        from mistudio.engine.datasets.sources import describe

        if self._chosen:
            return self.options
        self._chosen = True
        preview = describe(first, self.options)
        column = self.options.text_column or preview.text_column
        if not preview.chat and column:
            self.options = replace(self.options, text_column=column)
            self.columns = {column, "title", "topic"}
        if preview.encoding and self.options.encoding is None:
            self.options = replace(self.options, encoding=preview.encoding)
        return self.options


def _segments(
    session: Session, revision: str, file: RemoteFile, folder: Path, wanted: Wanted
) -> Iterator[Segment]:
    from mistudio.engine.datasets.files.listing import kind_of

    kind = kind_of(PurePosixPath(file.name))
    format, compression = kind or ("", "")
    name = PurePosixPath(file.name).name
    if format in (".parquet", ".arrow") and not compression:
        tables = _parquet_tables if format == ".parquet" else _arrow_tables
        with RandomFile(session, revision, file) as remote:
            yield from _table_segments(tables(remote, wanted), folder / f"{name}.parquet")
        return
    if format not in (".jsonl", ".txt", ".md", ".csv", ".tsv"):
        yield from _whole(session, revision, file, folder)
        return
    plain = name.removesuffix(PurePosixPath(name).suffix) if compression else name
    with SequentialFile(session, revision, file) as remote:
        head = io.BufferedReader(remote, 1 << 20)
        try:
            stream = _unpacked(head, compression)
            first = stream.read(4)
        except Exception as exc:
            _explain_damage(file, exc)
            raise
        if first[:2] in (b"\xff\xfe", b"\xfe\xff"):  # UTF-16: a byte is no character
            remote.close()
            yield from _whole(session, revision, file, folder)
            return
        cut = _records if format in (".csv", ".tsv") else _lines
        try:
            yield from cut(stream, first, folder / plain)
        except Exception as exc:
            _explain_damage(file, exc)
            raise


def _explain_damage(file: RemoteFile, exc: Exception) -> None:
    """What unpacking found wrong, as a sentence."""
    if type(exc).__name__ in ("EOFError", "BadGzipFile", "ZstdError", "error"):  # error: zlib's
        raise CorruptFile(
            "A file of the dataset is damaged",
            f"{file.name} cannot be unpacked: {exc}.",
            "Choose another file or split, or tell the owner of the repository.",
        ) from exc


def _whole(session: Session, revision: str, file: RemoteFile, folder: Path) -> Iterator[Segment]:
    """A kind of file that cannot be read in pieces is fetched, read and removed."""
    place = folder / "whole"
    free = shutil.disk_usage(folder).free
    if free < 1.1 * (file.size or 0):
        raise DiskFull(
            "Not enough disk space",
            f"{file.name} cannot be read in pieces: {(file.size or 0) / 1e9:.1f} GB are fetched "
            f"for it, and {free / 1e9:.1f} GB are free.",
            "Free some space, or choose another split.",
        )
    try:
        yield Segment(download_files(session, revision, [file], place)[0].path)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _unpacked(stream: BinaryIO, compression: str) -> BinaryIO:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=stream)  # type: ignore[return-value]
    if compression == ".zst":
        import zstandard

        reader = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
        return io.BufferedReader(reader, 1 << 20)
    return stream


def _lines(stream: BinaryIO, first: bytes, path: Path) -> Iterator[Segment]:
    """Segments of whole lines."""
    yield from _cut(stream, first, path, lambda data: data.rfind(b"\n") + 1, b"")


def _records(stream: BinaryIO, first: bytes, path: Path) -> Iterator[Segment]:
    """Segments of whole rows of a table, each with the heading: a line break within quotation
    marks ends no row."""

    def last_end(data: bytes) -> int:
        end = len(data)
        inside = data.count(b'"') % 2 == 1
        while (at := data.rfind(b"\n", 0, end)) >= 0:
            if data.count(b'"', at, end) % 2:
                inside = not inside
            if not inside:
                return at + 1
            end = at
        return 0

    buffered = first
    heading = b""
    while not heading:
        piece = stream.read(64 * 1024)
        buffered += piece
        for at in _line_ends(buffered):
            if buffered.count(b'"', 0, at) % 2 == 0:
                heading = buffered[:at]
                break
        if not piece or len(buffered) > LONGEST_LINE:
            break
    yield from _cut(stream, buffered, path, last_end, heading)


def _line_ends(data: bytes) -> Iterator[int]:
    at = data.find(b"\n")
    while at >= 0:
        yield at + 1
        at = data.find(b"\n", at + 1)


def _cut(
    stream: BinaryIO, first: bytes, path: Path, last_end: Callable[[bytes], int], heading: bytes
) -> Iterator[Segment]:
    """`last_end(data)` is where the last whole row of the data ends; 0 where none does."""
    size, before, number = FIRST_SEGMENT, 0, 0
    rest = first
    while True:
        data = rest + _read(stream, max(size - len(rest), 64 * 1024))
        ended = len(data) == len(rest)
        end = len(data) if ended else last_end(data)
        if not ended and end == 0 and len(data) < LONGEST_LINE:
            rest, size = data, size + len(data)
            continue
        end = end or len(data)
        block, rest = data[:end], data[end:]
        if block.strip():
            lines = block.count(b"\n")
            if number and heading:
                path.write_bytes(heading + block)
                yield Segment(path, before - heading.count(b"\n"))
            else:
                path.write_bytes(block)
                yield Segment(path, before)
            before += lines
            number += 1
        if ended:
            return
        size = min(size * 4, LARGEST_SEGMENT)


def _read(stream: BinaryIO, size: int) -> bytes:
    parts, got = [], 0
    while got < size and (piece := stream.read(size - got)):
        parts.append(piece)
        got += len(piece)
    return b"".join(parts)


def _table_segments(tables: Iterable[Any], path: Path) -> Iterator[Segment]:
    import pyarrow.parquet as pq

    before = 0
    for table in tables:
        if table.num_rows:
            pq.write_table(table, path, compression="lz4")
            yield Segment(path, before)
        before += table.num_rows


def _parquet_tables(remote: RandomFile, wanted: Wanted) -> Iterator[Any]:
    """Tables of some rows. Only the columns that are needed are fetched, once that is known."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _arrow_faults():
        file = pq.ParquetFile(remote, pre_buffer=False)
        names = list(file.schema_arrow.names)
    for group in range(file.num_row_groups):
        columns = None
        if wanted.columns is not None:
            columns = [name for name in names if name in wanted.columns] or None
        batches = file.iter_batches(ROWS, row_groups=[group], columns=columns, use_threads=False)
        while True:
            with _arrow_faults():
                batch = next(batches, None)
            if batch is None:
                break
            yield pa.Table.from_batches([batch])


def _arrow_tables(remote: RandomFile, wanted: Wanted) -> Iterator[Any]:
    import pyarrow as pa

    with _arrow_faults():
        magic = remote.read(6)
        remote.seek(0)
        if magic == b"ARROW1":
            file = pa.ipc.open_file(remote)
            count = file.num_record_batches
            batches = (file.get_batch(number) for number in range(count))
        else:
            batches = iter(pa.ipc.open_stream(remote))
    while True:
        with _arrow_faults():
            batch = next(batches, None)
        if batch is None:
            return
        for start in range(0, batch.num_rows, ROWS):
            yield pa.Table.from_batches([batch.slice(start, ROWS)])


class _arrow_faults:
    """pyarrow's complaints about a file as a sentence."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        import pyarrow as pa

        if isinstance(exc, pa.ArrowException) or type(exc) is OSError:
            raise CorruptFile(
                "A file of the dataset is damaged",
                f"It cannot be read as a table: {' '.join(str(exc).split())[:200]}.",
                "Choose another split, or tell the owner of the repository.",
            ) from exc


class _Quiet:
    """Stops and says why it waits, but leaves the bar to who takes the documents."""

    def __init__(self, outer: Progress) -> None:
        self._outer = outer

    def check(self) -> None:
        self._outer.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        tell = getattr(self._outer, "tell", None)  # a job's progress has it
        if tell is not None and metrics.get("waiting"):
            tell(str(metrics["waiting"]))


class _Part:
    """Progress of one file among others."""

    def __init__(self, outer: Progress, before: int) -> None:
        self._outer, self._before = outer, before

    def check(self) -> None:
        self._outer.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        self._outer.report(self._before + done, None, None, **metrics)
