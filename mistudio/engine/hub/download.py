"""Files of a repository onto the disk: resumable, verified, stopped at once when asked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mistudio.engine.hub.refusals import Refused
from mistudio.engine.hub.repository import RemoteFile, check_names, file_url
from mistudio.engine.hub.session import Cut, Patience, Session
from mistudio.errors import CorruptFile

_BLOCK = 1024**2


@dataclass(frozen=True)
class FetchedFile:
    """A verified file. `verified_by` names the hash that the repository listed, or `size`."""

    name: str
    path: Path
    size: int
    sha256: str
    verified_by: str

    def provenance(self) -> dict[str, Any]:
        row = asdict(self)
        row.pop("path")
        return row


def download_files(
    session: Session,
    revision: str,
    files: Sequence[RemoteFile],
    folder: Path,
    phase: str | None = None,
) -> list[FetchedFile]:
    """Fetch the files of a revision (a commit's hash) into `folder`/files, in order.

    A call after a cut connection, a stop or a killed process goes on where the last one was: parts
    lie in `folder`/parts. Every file is checked against the listed size and hash. Raises UserError;
    what is finished stays.
    """
    check_names(files, session.subject)
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    total: int | None = sum(file.size or 0 for file in files)
    if any(file.size is None for file in files):
        total = None
    fetched: list[FetchedFile] = []
    before = received = 0
    for number, file in enumerate(files, start=1):

        def report(done: int, came: int = 0) -> None:
            nonlocal received
            received += came
            session.progress.report(
                before + done,  # noqa: B023 (called only within this round)
                total,
                phase,
                file=file.name,  # noqa: B023
                file_number=number,  # noqa: B023
                files=len(files),
                bytes_done=before + done,  # noqa: B023
                bytes_total=total,
                bytes_received=received,  # over the network, by this call
                waiting="",
            )

        report(0)
        fetched.append(_fetch(session, revision, file, folder, report))
        before += fetched[-1].size
    return fetched


def fetch_bytes(session: Session, revision: str, file: RemoteFile) -> bytes:
    """A small file into memory, checked against the listed size and hash."""
    size = file.size or 0
    data = session.bytes(file_url(session, revision, file.name), 0, size, size)
    sums = _Sums(file)
    sums.add(data)
    _verify(session, file, sums)
    return data


def is_fetched(folder: Path, file: RemoteFile) -> bool:
    """Whether a file lies in the folder, verified."""
    return _finished(folder, file) is not None


def _fetch(
    session: Session,
    revision: str,
    file: RemoteFile,
    folder: Path,
    report: Callable[..., None],
) -> FetchedFile:
    if done := _finished(folder, file):
        report(done.size)
        return done
    part = _part(folder, file)
    resumed = part.exists() and part.stat().st_size > 0
    url = file_url(session, revision, file.name)
    try:
        sums = _receive(session, url, file, part, report)
        _verify(session, file, sums)
    except CorruptFile:
        part.unlink(missing_ok=True)
        if not resumed:
            raise
        # What an earlier process left may be what is wrong: once more, from the start.
        try:
            sums = _receive(session, url, file, part, report)
            _verify(session, file, sums)
        except CorruptFile:
            part.unlink(missing_ok=True)
            raise
    target = folder / "files" / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, target)
    record = {"name": file.name, "size": sums.size, "sha256": sums.sha256}
    mark = _mark(folder, file)
    mark.with_suffix(".new").write_text(json.dumps(record), encoding="utf-8")
    os.replace(mark.with_suffix(".new"), mark)
    return FetchedFile(file.name, target, sums.size, sums.sha256, _verified_by(file))


def _receive(
    session: Session, url: str, file: RemoteFile, part: Path, report: Callable[..., None]
) -> _Sums:
    """Append to the part until the file is whole; its hashes."""
    patience = Patience(session)
    expected = file.size
    with part.open("a+b") as out:
        sums = _read_part(session, file, out)
        if expected is not None and sums.size > expected:
            sums = _begin_again(file, out)
        while expected is None or sums.size < expected:
            try:
                with session.open(url, sums.size, patience) as body:
                    if body.start != sums.size:  # it knows no ranges: all of it once more
                        sums = _begin_again(file, out)
                    if expected is None:
                        expected = body.total
                    else:
                        body.require_size(expected)
                    for piece in body:
                        if expected is not None and sums.size + len(piece) > expected:
                            raise _too_long(session, file.name, expected)
                        out.write(piece)
                        sums.add(piece)
                        patience.progressed(sums.size)
                        report(sums.size, len(piece))
                if expected is None:
                    break
                if sums.size < expected:
                    raise Cut("it ended before the file was whole")
            except Cut as exc:
                out.flush()
                patience.failed(exc)
            except Refused as refused:  # 416: there is no such place in the file
                if sums.size == 0:
                    raise CorruptFile(
                        "The Hub does not send the file",
                        f"{file.name}: it refused every part of it (HTTP {refused.status}).",
                        "Try again later.",
                    ) from None
                sums = _begin_again(file, out)
                patience.failed(Cut("the part from before does not fit"))
        out.flush()
        os.fsync(out.fileno())
    return sums


def _too_long(session: Session, name: str, expected: int) -> CorruptFile:
    return CorruptFile(
        "The Hub sends another file than it lists",
        f"{session.subject}: {name} is listed with {expected} bytes, and more came.",
        "Nothing of it was kept. Try again; if it stays so, tell the owner of the repository.",
    )


class _Sums:
    """Size and hashes of what has come so far."""

    def __init__(self, file: RemoteFile) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._git = None
        if file.git_blob and file.size is not None:
            self._git = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        self._sha256.update(piece)
        if self._git is not None:
            self._git.update(piece)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def git_blob(self) -> str:
        return self._git.hexdigest() if self._git is not None else ""


def _read_part(session: Session, file: RemoteFile, out: Any) -> _Sums:
    """What an earlier call left, hashed again; the file stands at its end then."""
    sums = _Sums(file)
    out.seek(0)
    while block := out.read(_BLOCK):
        session.progress.check()
        sums.add(block)
    return sums


def _begin_again(file: RemoteFile, out: Any) -> _Sums:
    out.seek(0)
    out.truncate()
    return _Sums(file)


def _verify(session: Session, file: RemoteFile, sums: _Sums) -> None:
    listed, got = file.sha256, sums.sha256
    if not listed and len(file.git_blob) == 40 and file.size is not None:
        listed, got = file.git_blob, sums.git_blob
    if listed and listed.lower() != got:
        raise CorruptFile(
            "A downloaded file is damaged",
            f"{session.subject}: {file.name} has the hash {got[:16]}…, the repository lists "
            f"{listed[:16]}….",
            "It was not kept. Try again; if it stays so, the file was changed on the way.",
        )


def _verified_by(file: RemoteFile) -> str:
    if file.sha256:
        return "sha256"
    return "git blob" if len(file.git_blob) == 40 and file.size is not None else "size"


def _key(file: RemoteFile) -> str:
    return hashlib.sha256(file.name.encode()).hexdigest()[:24]


def _part(folder: Path, file: RemoteFile) -> Path:
    return folder / "parts" / f"{_key(file)}.part"


def _mark(folder: Path, file: RemoteFile) -> Path:
    return folder / "parts" / f"{_key(file)}.json"


def _finished(folder: Path, file: RemoteFile) -> FetchedFile | None:
    """The file, where an earlier call has finished and verified it as it is listed now."""
    path = folder / "files" / file.name
    try:
        record = json.loads(_mark(folder, file).read_text(encoding="utf-8"))
        fits = (
            record["name"] == file.name
            and path.stat().st_size == record["size"]
            and file.size in (None, record["size"])
            and file.sha256.lower() in ("", record["sha256"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not fits:
        return None
    return FetchedFile(file.name, path, record["size"], record["sha256"], _verified_by(file))
