"""Starting the window: one instance for each library, the first paint, then torch in a thread."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistudio import bootstrap
from mistudio.paths import default_library, log_folder

if TYPE_CHECKING:
    from PySide6.QtNetwork import QLocalServer

    from mistudio.ui.main_window import MainWindow

log = logging.getLogger(__name__)

OpenOn = tuple[str, dict[str, Any]]


def main(argv: list[str] | None = None, open_on: OpenOn | None = None) -> int:
    """Run the window until it is closed; `open_on` is a tab's name and what to show there."""
    parser = argparse.ArgumentParser(prog="mistudio", description="MechInterp Studio")
    parser.add_argument("--library", type=Path, metavar="DIR", help="the library to open")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)

    bootstrap.prepare()
    crash_log = bootstrap.CrashLog(log_folder())
    try:
        bootstrap.check_dependencies()
        check_signals()
    except bootstrap.CannotStart as exc:
        print(exc, file=sys.stderr)
        return 1
    crash_log.open()
    try:
        return _run(arguments.library, open_on, crash_log)
    finally:
        crash_log.close()


def check_signals() -> None:
    """CannotStart where this PySide6 loses references (6.12.0 on Python before 3.12): the process
    would die after some 570 emitted signals."""
    from PySide6.QtCore import QObject, Signal

    class Probe(QObject):
        emitted = Signal(bool)

    probe = Probe()
    before = sys.getrefcount(True)
    for _ in range(64):
        probe.emitted.emit(True)
    if sys.getrefcount(True) < before - 32:
        import PySide6

        raise bootstrap.CannotStart(
            f"PySide6 {PySide6.__version__} does not work with Python "
            f"{sys.version_info.major}.{sys.version_info.minor}: it would end the program after a "
            "few minutes.\nRun `python3 run.py` in the project's folder, which installs one that "
            "does (PySide6-Essentials 6.11.3)."
        )


def _run(library_folder: Path | None, open_on: OpenOn | None, crash_log: bootstrap.CrashLog) -> int:
    from PySide6.QtWidgets import QApplication

    from mistudio import logs
    from mistudio.settings import Settings
    from mistudio.ui import theme

    if not logging.getLogger().handlers:  # `mistudio demo` has set the log up before it comes here
        logs.set_up()
    app = QApplication.instance() or QApplication(["mistudio"])
    assert isinstance(app, QApplication)
    app.setApplicationName("miStudio")
    app.setApplicationDisplayName("MechInterp Studio")
    app.setDesktopFileName("io.mistudio.MiStudio")
    settings = Settings()
    theme.apply(app, settings.get("text_size") / 100)

    root = library_folder or _library_folder(settings)
    instance = Instance(root)
    if not instance.acquire():
        if instance.activate_other():
            return 0
        _refuse(
            "This library is open already",
            f"Another miStudio uses {root}, and it does not answer.",
            "Close it first, or open another library with --library DIR.",
        )
        return 1
    try:
        return _show(app, root, settings, open_on, crash_log, instance)
    finally:
        instance.release()


def _show(
    app: Any,
    root: Path,
    settings: Any,
    open_on: OpenOn | None,
    crash_log: bootstrap.CrashLog,
    instance: Instance,
) -> int:
    from PySide6.QtCore import QTimer

    from mistudio.ui.main_window import MainWindow
    from mistudio.ui.pauses import Collector

    collector = Collector()
    window = MainWindow(None, settings, open_on)
    window.crash.install()
    starter = make_starter(window, root, crash_log)
    instance.listen(starter.raise_window)
    window.show()

    # Ctrl-C: Python handles a signal only between its own instructions, so give it some.
    signal.signal(signal.SIGINT, lambda *_: window.close())
    heartbeat = QTimer()
    heartbeat.timeout.connect(lambda: None)
    heartbeat.start(200)
    code = int(app.exec())
    heartbeat.stop()
    window.crash.uninstall()
    if not starter.clean:  # a thread that does not stop: Python must not tear it down
        crash_log.close()
        os._exit(0)
    starter.close_library()
    collector.stop()
    return code or starter.code


def make_starter(window: MainWindow, root: Path, crash_log: bootstrap.CrashLog) -> Any:
    """What follows the first paint: the library is opened, then torch is imported, in a thread."""
    from PySide6.QtCore import QObject

    from mistudio.ui.background import Background

    class Starter(QObject):
        def __init__(self) -> None:
            super().__init__(window)
            self.clean = True
            self.code = 0
            self._library: Any = None
            self._background = Background(parent=self)
            window.painted.connect(self.on_painted)
            window.closed.connect(self.on_closed)

        def on_painted(self) -> None:
            if target := os.environ.get("MISTUDIO_FIRST_PAINT_FILE"):
                paint = milliseconds_since_process_start()
                Path(target).write_text(f"{paint:.0f}\n", encoding="utf-8")
                window.close()
                return
            self._background.run(lambda: open_library(root), self.on_opened, self.on_refused)

        def on_opened(self, library: Any) -> None:
            from mistudio.ui.device import find_device

            self._library = library
            if not window.isVisible():
                return
            window.open_library(library)
            window.start()
            threads = window.services.settings.get("threads")
            window.services.background.run(lambda: find_device(threads), window.set_device)
            if last := crash_log.take_last():
                window.crash.show_last_crash(last)

        def on_refused(self, error: Exception) -> None:
            from mistudio.errors import explain

            self.code = 1
            known = explain(error)
            if known is None:
                log.error("The library cannot be opened", exc_info=error)
                what, step = f"{type(error).__name__}: {error}", f"The log is in {log_folder()}."
                _refuse("The library cannot be opened", what, step)
            else:
                _refuse(known.title, known.what, known.next_step)
            window.close()

        def on_closed(self, clean: bool) -> None:
            self.clean = self._background.wait(10) and clean

        def raise_window(self) -> None:
            if window.isMinimized():
                window.showNormal()
            window.raise_()
            window.activateWindow()

        def close_library(self) -> None:
            if self._library is not None:
                self._library.close()

    return Starter()


def open_library(root: Path) -> Any:
    """In a thread: the import alone takes a fifth of a second. What the window needs next is
    imported here too, so that it does not stand still for it."""
    from mistudio.library.library import Library

    library = Library(root)
    for module in ("bridge", "job_drawer", "services", "status_bar", "welcome", "datasets.page"):
        importlib.import_module(f"mistudio.ui.{module}")
    library.close()
    return library


def milliseconds_since_process_start() -> float:
    if sys.platform.startswith("linux"):
        # psutil's create_time rests on a boot time in whole seconds: wrong by up to one second.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return (time.clock_gettime(time.CLOCK_BOOTTIME) - started) * 1000
    import psutil

    return (time.time() - psutil.Process().create_time()) * 1000


def _library_folder(settings: Any) -> Path:
    chosen = settings.get("library")
    if chosen and not os.environ.get("MISTUDIO_HOME"):
        return Path(chosen)
    return default_library()


def _refuse(title: str, what: str, next_step: str) -> None:
    from mistudio.ui.widgets import Button, ErrorPanel, column, row  # isort: skip
    from PySide6.QtWidgets import QDialog

    dialog = QDialog()
    dialog.setWindowTitle("MechInterp Studio")
    dialog.setMinimumWidth(520)
    layout = column(16, 24)
    layout.addWidget(ErrorPanel(title, what, next_step))
    close = Button("Close", "primary")
    close.clicked.connect(dialog.accept)
    layout.addLayout(row(None, close))
    dialog.setLayout(layout)
    dialog.exec()


class Instance:
    """One window for each library: a lock file, and a local socket to call the other one."""

    def __init__(self, root: Path) -> None:
        from PySide6.QtCore import QDir, QLockFile

        key = hashlib.sha256(str(root.expanduser().resolve()).encode()).hexdigest()[:16]
        self._name = f"mistudio-{key}"
        self._lock = QLockFile(QDir.temp().filePath(f"{self._name}.lock"))
        self._lock.setStaleLockTime(0)  # never stale by age; a dead owner is noticed all the same
        self._server: QLocalServer | None = None
        self._raise: Any = None

    def acquire(self) -> bool:
        return bool(self._lock.tryLock(100))

    def activate_other(self) -> bool:
        """Ask the window that has this library to come to the front; False without an answer."""
        from PySide6.QtNetwork import QLocalSocket

        socket = QLocalSocket()
        socket.connectToServer(self._name)
        if not socket.waitForConnected(1000):
            return False
        socket.disconnectFromServer()
        return True

    def listen(self, raise_window: Any) -> None:
        from PySide6.QtNetwork import QLocalServer

        QLocalServer.removeServer(self._name)  # left by a crash; the lock says nobody listens
        self._raise = raise_window
        self._server = QLocalServer()
        self._server.setSocketOptions(QLocalServer.SocketOption.UserAccessOption)
        self._server.newConnection.connect(self._on_server_new_connection)
        self._server.listen(self._name)

    def release(self) -> None:
        if self._server:
            self._server.close()
            self._server = None
        self._lock.unlock()

    def _on_server_new_connection(self) -> None:
        if self._server and (socket := self._server.nextPendingConnection()):
            socket.disconnected.connect(socket.deleteLater)
        self._raise()
