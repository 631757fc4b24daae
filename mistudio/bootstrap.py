"""Before Qt and torch are imported: a crash log, the environment, and readable refusals.

Imports only the standard library, so that it works where a dependency is missing.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import faulthandler
import os
import sys
from pathlib import Path
from typing import TextIO

ENVIRONMENT = {
    # OpenMP threads that wait by spinning take the cores from the window and from other programs:
    # on two cores beside one other busy process, training ran 3 to 6 times slower for it.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",  # forked tokenizer threads deadlock beside Qt's
    "HF_HUB_DISABLE_XET": "1",  # Xet transfers cannot be cancelled
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}

APT_LINE = (
    "apt-get update && apt-get install -y --no-install-recommends libglib2.0-0 libegl1 libgl1 "
    "libdbus-1-3 libfontconfig1 libxkbcommon0 libxcb-cursor0 libxcb-icccm4 libxcb-keysyms1 "
    "libxcb-shape0 libxcb-xkb1 libxkbcommon-x11-0"
)

# What Qt's X11 plugin loads beyond what every X11 program has.
X11_LIBRARIES = (
    "libxcb-cursor.so.0",
    "libxcb-icccm.so.4",
    "libxcb-keysyms.so.1",
    "libxcb-shape.so.0",
    "libxcb-xkb.so.1",
    "libxkbcommon-x11.so.0",
    "libxcb-image.so.0",
    "libxcb-render-util.so.0",
)


class CannotStart(Exception):
    """The window cannot open here; the text says why and what to do."""


def prepare() -> None:
    """Set the environment that libraries read when they are imported; the user's own wins."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def check_dependencies() -> None:
    """CannotStart with the command to run where Qt, one of its libraries or a screen is missing."""
    _check_screen()
    try:
        import PySide6.QtSvg
        import PySide6.QtWidgets  # noqa: F401
    except ModuleNotFoundError as exc:
        raise CannotStart(
            f"The Python package {exc.name} is missing.\n"
            "Run `python3 run.py` in the project's folder: it installs everything that is needed."
        ) from exc
    except ImportError as exc:  # a shared library of the system
        raise CannotStart(
            f"Qt cannot be loaded: {exc}.\n"
            f"On Debian and Ubuntu this installs what it needs (as root):\n  {APT_LINE}"
        ) from exc


def _check_screen() -> None:
    """Qt ends the process where its X11 plugin cannot be loaded, so look before."""
    if not sys.platform.startswith("linux"):
        return
    platform = os.environ.get("QT_QPA_PLATFORM", "")
    if platform and not platform.startswith("xcb"):
        return
    has_x11, has_wayland = "DISPLAY" in os.environ, "WAYLAND_DISPLAY" in os.environ
    if not has_x11 and not has_wayland:
        raise CannotStart(
            "There is no screen to open a window on (neither DISPLAY nor WAYLAND_DISPLAY is set).\n"
            "Start it in a graphical session, or use the command line: `mistudio --help`."
        )
    if has_x11 and not has_wayland:
        missing = [name for name in X11_LIBRARIES if not _loads(name)]
        if missing:
            raise CannotStart(
                f"Qt cannot open a window: {', '.join(missing)} cannot be loaded.\n"
                f"On Debian and Ubuntu this installs what it needs (as root):\n  {APT_LINE}"
            )


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


class CrashLog:
    """Where the interpreter writes the stacks of all threads when the process dies.

    One file for each process; it is removed at a clean exit, so what a dead process left behind
    tells of a crash (or, where it is empty, of a kill).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / f"crash-{os.getpid()}.log"
        self._file: TextIO | None = None

    def open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8")
        faulthandler.enable(self._file, all_threads=True)

    def take_last(self) -> str:
        """The newest crash of an earlier process, or nothing; old files are cleared away."""
        last = ""
        for path in sorted(self._folder.glob("crash-*.log"), key=lambda path: path.stat().st_mtime):
            if path == self._path or _is_alive(path):
                continue
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            last = text or last
            path.unlink(missing_ok=True)
        return last

    def close(self) -> None:
        """The exit is clean: nothing is left behind."""
        faulthandler.disable()
        if self._file:
            self._file.close()
            self._file = None
        self._path.unlink(missing_ok=True)


def _is_alive(path: Path) -> bool:
    try:
        pid = int(path.stem.removeprefix("crash-"))
    except ValueError:
        return False
    if os.name == "nt":  # os.kill would end the process there
        import psutil

        return psutil.pid_exists(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
