"""A file on the Hub as a file object: from front to back, or here and there. Nothing is stored."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from mistudio.engine.hub.repository import RemoteFile, file_url
from mistudio.engine.hub.session import Body, Cut, Patience, Session
from mistudio.errors import CorruptFile

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

AHEAD = 256 * 1024  # bytes that a small read fetches


class SequentialFile(io.RawIOBase):
    """Read from front to back in one long answer; a broken one is taken up where it ended."""

    def __init__(self, session: Session, revision: str, file: RemoteFile) -> None:
        self._session, self._file = session, file
        self._url = file_url(session, revision, file.name)
        self._size = file.size
        self._body: Body | None = None
        self._rest = memoryview(b"")
        self._received = 0
        self._patience = Patience(session)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        if not self._rest:
            self._rest = memoryview(self._next_piece())
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def _next_piece(self) -> bytes:
        while self._size is None or self._received < self._size:
            try:
                piece = self._session.watched(self._body.next_piece) if self._body else self._open()
                if not piece:
                    if self._size is None:
                        return b""
                    raise Cut("it ended before the file was whole")
            except Cut as exc:
                self._drop()
                self._patience.failed(exc)
                continue
            self._received += len(piece)
            self._patience.progressed(self._received)
            if self._size is not None and self._received > self._size:
                raise CorruptFile(
                    "The Hub sends another file than it lists",
                    f"{self._session.subject}: {self._file.name} is listed with {self._size} "
                    "bytes, and more came.",
                    "Try again; if it stays so, tell the owner of the repository.",
                )
            return piece
        return b""

    def _open(self) -> bytes:
        """The first piece that is new. A server without ranges begins at the start again."""
        self._body = body = self._session.open(self._url, self._received, self._patience)
        if self._size is not None:
            body.require_size(self._size)
        known = self._received - body.start
        while True:
            piece = self._session.watched(body.next_piece)
            if known < len(piece) or not piece:
                return piece[known:]
            known -= len(piece)

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None

    def close(self) -> None:
        if not self.closed:
            self._drop()
        super().close()


class RandomFile(io.RawIOBase):
    """Read here and there, as parquet wants it: each read asks for just its bytes."""

    def __init__(self, session: Session, revision: str, file: RemoteFile) -> None:
        assert file.size is not None, "the list of files has sizes"
        self._session, self._size = session, file.size
        self._url = file_url(session, revision, file.name)
        self._position = 0
        self._kept, self._kept_from = b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def size(self) -> int:
        return self._size

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._position)
        count = left if size is None or size < 0 else min(size, left)
        data = self._range(self._position, self._position + count)
        self._position += count
        return data

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def _range(self, start: int, end: int) -> bytes:
        if start >= end:
            return b""
        if not (self._kept_from <= start and end <= self._kept_from + len(self._kept)):
            # The end of a parquet file is read in small steps backwards.
            low = max(0, min(start, self._size - AHEAD)) if self._size - end < AHEAD else start
            high = min(self._size, max(end, low + AHEAD))
            self._kept = self._session.bytes(self._url, low, high, self._size)
            self._kept_from = low
        data = self._kept[start - self._kept_from : end - self._kept_from]
        if end - start > AHEAD:
            self._kept, self._kept_from = b"", 0  # large ones are read once
        return data
