"""The errors that miStudio shows to people; everything else is a bug and keeps its traceback."""

from __future__ import annotations

import errno
import re
import sqlite3


class UserError(Exception):
    """Something the user can understand and act on.

    `title` names it, `what` says what happened (with the numbers), `next_step` says what to do.
    Subclasses give the kind; the texts are written where the error is raised.
    """

    retryable = False

    def __init__(self, title: str, what: str = "", next_step: str = "") -> None:
        self.title = title
        self.what = what
        self.next_step = next_step
        super().__init__(" ".join(part for part in (title + ".", what, next_step) if part))


class InvalidInput(UserError):
    """A value the user gave cannot be used; `field` names it where there is a form."""

    def __init__(self, title: str, what: str = "", next_step: str = "", field: str = "") -> None:
        super().__init__(title, what, next_step)
        self.field = field


class NotFound(UserError):
    """A record, file or repository that was named does not exist."""


class UnsupportedModel(UserError):
    """The model's structure or file format is outside what miStudio can read safely."""


class CorruptFile(UserError):
    """A file is not what its name or header says."""


class Incompatible(UserError):
    """Two things do not fit together: an SAE and a model, a library and this version."""


class DiskFull(UserError):
    """Not enough room for what was asked."""

    retryable = True


class OutOfMemory(UserError):
    """The device's memory is too small for what was asked."""

    retryable = True


class Offline(UserError):
    """Something needs a connection that is not there or was not allowed."""

    retryable = True


class AccessDenied(UserError):
    """Somebody else decides who may have it, and has not given it to this account; `field` is the
    form's field where an access token goes."""

    field = "token"


class InUse(UserError):
    """Something else depends on what should be deleted."""


class TrainingDiverged(UserError):
    """The loss became infinite or not a number."""


class Busy(UserError):
    """Another process or job owns what is needed."""

    retryable = True


class ProcessLost(UserError):
    """Another process of the same run has ended, or was never reached."""

    retryable = True


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether an allocation failed, on whichever device: libraries have no common error for it."""
    if isinstance(exc, MemoryError | OutOfMemory) or type(exc).__name__ == "OutOfMemoryError":
        return True
    return isinstance(exc, RuntimeError) and bool(_NO_MEMORY.search(str(exc)))


_NO_MEMORY = re.compile(r"allocate memory|out of memory|bad_alloc|ALLOC_FAILED", re.IGNORECASE)


def explain(exc: BaseException) -> UserError | None:
    """The user-facing form of an exception, or None where it is a bug."""
    if isinstance(exc, UserError):
        return exc
    if isinstance(exc, OSError):
        return _explain_os_error(exc)
    if isinstance(exc, sqlite3.DatabaseError):
        return _explain_sqlite_error(exc)
    if is_out_of_memory(exc):
        return OutOfMemory(
            "Out of memory",
            str(exc).splitlines()[0] if str(exc) else "The device has no memory left.",
            "Use a smaller batch, a smaller dictionary or fewer layers, or close other programs.",
        )
    if type(exc).__name__ == "SafetensorError" and (code := _RUST_OS_ERROR.search(str(exc))):
        return _explain_os_error(OSError(int(code.group(1)), str(exc)))
    return None


# How the safetensors library reports an error of the system.
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# How numpy reports a short write: an OSError without a number.
_NUMPY_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


def _explain_os_error(exc: OSError) -> UserError | None:
    where = f" ({exc.filename})" if exc.filename else ""
    short_write = exc.errno is None and _NUMPY_SHORT_WRITE.search(str(exc))
    if exc.errno in (errno.ENOSPC, errno.EDQUOT) or short_write:
        return DiskFull(
            "The disk is full",
            f"Nothing more could be written{where}; what was finished before is kept.",
            "Free some space or move the library to another disk, then run it again.",
        )
    if exc.errno == errno.EFBIG:
        return DiskFull(
            "A file would become too large",
            f"The system refused to let a file grow further{where}; what was finished before is "
            "kept.",
            "Raise the limit (`ulimit -f`), move the library to a disk that takes large files, or "
            "choose fewer tokens or layers.",
        )
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(
            "No permission",
            f"{exc.strerror}{where}.",
            "Choose a place you may read and write, or change its permissions.",
        )
    if isinstance(exc, FileNotFoundError):
        return NotFound("File not found", f"{exc.strerror}{where}.", "Check the path.")
    if isinstance(exc, IsADirectoryError | NotADirectoryError):
        return InvalidInput("Not the right kind of path", f"{exc.strerror}{where}.", "Check it.")
    if exc.errno == errno.EIO:
        return UserError(
            "The disk cannot be read or written",
            f"{exc.strerror}{where}.",
            "Check the disk, then run it again.",
        )
    return None


def _explain_sqlite_error(exc: sqlite3.DatabaseError) -> UserError | None:
    text = str(exc)
    if "locked" in text or "busy" in text:
        return Busy(
            "The library is in use",
            f"SQLite says: {text}.",
            "Close the other miStudio that uses this library, then try again.",
        )
    if "full" in text:
        return DiskFull(
            "The disk is full", f"SQLite says: {text}.", "Free some space and try again."
        )
    if "disk I/O error" in text:
        return DiskFull(
            "The library's database could not be written",
            f"SQLite says: {text}. The disk may be full, or a file at its size limit.",
            "Free some space or raise the limit (`ulimit -f`), then run it again.",
        )
    if "malformed" in text or "not a database" in text:
        return CorruptFile(
            "The library's database is damaged",
            f"SQLite says: {text}.",
            "Run `mistudio doctor`; restore library.db from a backup.",
        )
    if "readonly" in text or "unable to open" in text:
        return UserError(
            "The library cannot be written",
            f"SQLite says: {text}.",
            "Choose a library folder you may write to (--library DIR).",
        )
    return None
