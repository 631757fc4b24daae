"""The bytes of a file: opened without waiting for anybody, unpacked within bounds, read whole."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import stat
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from mistudio.engine.datasets.documents import ROOM_TO_KEEP
from mistudio.engine.datasets.files.listing import SourceFile
from mistudio.engine.datasets.files.options import (
    DEFAULTS,
    BadRow,
    ReadOptions,
    Rejected,
    megabytes,
)
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import CorruptFile, DiskFull, InvalidInput, NotFound, UserError

CHUNK = 1 << 18
# Text packs by 2 to 30; a file that unpacks to more than this many times its size, and to a
# size that hurts, was made to fill a disk.
MAX_RATIO = 250
RATIO_MATTERS_FROM = 16 * 1024**2
# The most that is read at once: a batch of an Arrow file is in memory as a whole.
MAX_BLOCK = 1024**3


@dataclass
class Reading:
    """One file being read: how, who watches, and what is left out of it."""

    file: SourceFile
    options: ReadOptions = DEFAULTS
    rejected: Rejected = field(default_factory=Rejected)
    progress: Progress = SILENT
    done_before: int = 0  # bytes of the files before this one, for the progress
    total: int | None = None
    codec: str = ""  # of its encoding, once that is known; empty for formats without
    column: str | None = None  # the one that the text is taken from, once it is chosen

    def at(self, position: int) -> None:
        """Tell how far the file is read, in bytes on disk; raise where the user has stopped."""
        self.progress.check()
        self.progress.report(self.done_before + position, self.total)

    @property
    def has_lines(self) -> bool:
        return self.file.format not in (".json", ".parquet", ".arrow")

    def reject(self, line: int, fault: str, title: str = "A row has no text") -> None:
        """Count a row that cannot be read, or refuse the file for it, as the user chose.

        `fault` is what follows on the place: `column 3: …`.
        """
        if self.options.skips:
            self.rejected.add(BadRow(self.file.name, line, fault))
            return
        kind = InvalidInput if title == "A row has no text" else CorruptFile
        step = "let bad rows be skipped (--skip-bad-rows)."
        if kind is InvalidInput:
            raise InvalidInput(
                title,
                f"{self.file.name}, {'row at line' if self.has_lines else 'row'} {line}: {fault}",
                f"Choose the text column (--text-column), or {step}",
                field="text_column",
            )
        raise CorruptFile(
            title,
            f"{self.file.name}, {'line' if self.has_lines else 'row'} {line}: {fault}",
            f"Mend it, or add the file again and {step}",
        )


@contextmanager
def open_bytes(reading: Reading) -> Iterator[BinaryIO]:
    """The file's content, unpacked, as a stream that can only be read on."""
    with _open_packed(reading) as raw, _reporting(reading):
        match reading.file.compression:
            case ".gz":
                inner: Any = gzip.GzipFile(fileobj=raw, mode="rb")
            case ".zst":
                inner = _unzstd(raw)
            case _:
                inner = None
        if inner is None:
            source: io.RawIOBase = raw
        else:
            source = _Unpacked(inner, raw, reading.file.name)
        yield cast(BinaryIO, io.BufferedReader(source, CHUNK))


@contextmanager
def open_seekable(reading: Reading) -> Iterator[BinaryIO]:
    """The file's content as a stream in which one can go back: packed files are unpacked into a
    temporary file without a name, within what the disk has room for."""
    if not reading.file.compression:
        with _open_packed(reading) as raw, _reporting(reading):
            yield cast(BinaryIO, raw)
        return
    with tempfile.TemporaryFile() as spool:
        with open_bytes(reading) as stream:
            written = 0
            while chunk := stream.read(1 << 20):
                _require_room(written)
                written += spool.write(chunk)
        spool.seek(0)
        with _reporting(reading):
            yield cast(BinaryIO, spool)


def head(reading: Reading, size: int) -> bytes:
    """The first bytes of the unpacked content."""
    with open_bytes(reading) as stream:
        return stream.read(size)


@contextmanager
def _open_packed(reading: Reading) -> Iterator[_Watched]:
    descriptor = _descriptor(reading.file)
    with open(descriptor, "rb", 0) as file:
        yield _Watched(file, reading)


def _descriptor(file: SourceFile) -> int:
    """Opened so that it cannot hang: what became a pipe since it was listed does not block."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(file.path, flags | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError as exc:
        raise NotFound(
            "A file has vanished",
            f"{file.name} was there a moment ago and is gone.",
            "Put it back, or choose the folder again.",
        ) from exc
    except OSError as exc:
        raise UserError(
            "No permission" if isinstance(exc, PermissionError) else "The file cannot be opened",
            f"{file.name}: {exc.strerror or exc}.",
            "Choose a file that you may read, or change its permissions.",
        ) from exc
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidInput("This is not a file", f"{file.name} is a pipe, a socket or a device.")
    return descriptor


class _Watched(io.RawIOBase):
    """The file itself: tells the progress, and refuses what changes while it is read."""

    def __init__(self, file: Any, reading: Reading) -> None:
        self._file = file
        self._reading = reading
        self._thread = threading.get_ident()
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = self._file.seek(offset, whence)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        if threading.get_ident() == self._thread:  # pyarrow may read in threads of its own
            self._reading.at(self.position)
        n = self._file.readinto(buffer) or 0
        self.position += n
        if n == 0 or self.position > self._reading.file.size:
            self._require_unchanged()
        return n

    def read(self, size: int = -1) -> bytes:
        """At most what is left: damaged files ask for exabytes."""
        left = max(self._reading.file.size - self.position, 0) + 1
        size = left if size is None or size < 0 else min(size, left)
        if size > MAX_BLOCK:
            raise InvalidInput(
                "The file cannot be read in parts",
                f"{self._reading.file.name} asks for {megabytes(size)} at once; the most is "
                f"{megabytes(MAX_BLOCK)}.",
                "Write it again in smaller batches (1,000 rows, say).",
            )
        return super().read(size) or b""

    def _require_unchanged(self) -> None:
        status = os.fstat(self._file.fileno())
        file = self._reading.file
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            raise UserError(
                "A file changed while it was read",
                f"{file.name} had {file.size:,} bytes and now has {status.st_size:,}.",
                "Wait until the program that writes it is done, then add it again.",
            )


class _Unpacked(io.RawIOBase):
    """Decompressed bytes; refuses what unpacks beyond all measure."""

    def __init__(self, inner: Any, raw: _Watched, name: str) -> None:
        self._inner, self._raw, self._name = inner, raw, name
        self._out = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # Between two reads of the packed file lie up to 1,000 times as many bytes.
        self._raw._reading.at(self._raw.position)
        data = self._inner.read(min(len(buffer), CHUNK))
        buffer[: len(data)] = data
        self._out += len(data)
        require_ratio(self._name, self._raw.position, self._out)
        return len(data)


def require_ratio(name: str, packed: int, unpacked: int) -> None:
    """Refuse what holds far more than its size."""
    if unpacked > max(RATIO_MATTERS_FROM, MAX_RATIO * packed):
        raise CorruptFile(
            "The file unpacks to far too much",
            f"{name}: {megabytes(packed)} of it already gave {megabytes(unpacked)}, more than "
            f"{MAX_RATIO} times as much; text packs by 2 to 30.",
            "Get the file again from where it comes, or unpack it yourself and look at it.",
        )


def _unzstd(raw: _Watched) -> Any:
    """pyarrow's reader says where a frame is cut off, which zstandard's passes over in silence;
    its window is bounded (128 MB)."""
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")


@contextmanager
def _reporting(reading: Reading) -> Iterator[None]:
    """Errors of the unpackers in words."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise damaged(reading.file, exc) from exc
    except OSError as exc:
        if exc.errno is None:  # pyarrow's
            raise damaged(reading.file, exc) from exc
        raise


def damaged(file: SourceFile, exc: Exception) -> CorruptFile:
    reason = str(exc).splitlines()[0].rstrip(".") if str(exc) else type(exc).__name__
    return CorruptFile(
        "The file is damaged or incomplete",
        f"{file.name}: {reason}.",
        "Get the file again from where it comes; a download may have been cut off.",
    )


def _require_room(written: int) -> None:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < ROOM_TO_KEEP:
        raise DiskFull(
            "Not enough disk space to unpack the file",
            f"{megabytes(written)} of it are unpacked and {megabytes(free)} are left.",
            "Free some space, or unpack the file on another disk.",
        )
