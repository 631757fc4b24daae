"""What happens with an exception that nobody caught: log it, then tell, with a report to copy.

The hooks may be called in any thread; the dialog is opened by a queued signal in the GUI thread.
"""

from __future__ import annotations

import logging
import platform
import sys
import threading
import traceback
from types import TracebackType

from PySide6.QtCore import QObject, Qt, Signal, qVersion
from PySide6.QtWidgets import QApplication, QDialog, QPlainTextEdit, QVBoxLayout, QWidget

import mistudio
from mistudio.paths import log_folder
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import Button, Text, picture, row

log = logging.getLogger(__name__)


def system_report() -> str:
    """Versions and platform: the first lines of every report."""
    lines = [
        f"miStudio {mistudio.__version__}",
        f"Python {platform.python_version()}, Qt {qVersion()}, {platform.platform()}",
    ]
    torch = sys.modules.get("torch")
    if torch is not None:
        lines.append(f"torch {getattr(torch, '__version__', '?')}")
    return "\n".join(lines)


class CrashDialog(QDialog):
    """Tells that something broke, keeps the report ready to copy, and lets the user go on."""

    def __init__(self, title: str, what: str, report: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setObjectName("crash_dialog")
        self.setWindowTitle("MechInterp Studio")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.resize(720, 460)
        self.report = f"{system_report()}\n\n{report}"
        layout = QVBoxLayout(self)
        layout.setContentsMargins(24, 24, 24, 24)
        layout.setSpacing(16)
        head = row(picture("bug", tokens.RED, 24), Text(title, "card", wrap=True))
        head.setStretch(1, 1)
        layout.addLayout(head)
        layout.addWidget(Text(what, "body", wrap=True))
        text = QPlainTextEdit(self.report)
        text.setReadOnly(True)
        text.setProperty("surface", "log")
        text.setAccessibleName("Report")
        layout.addWidget(text, 1)
        layout.addWidget(
            Text(f"The log is in {log_folder()}", "helper", wrap=True, selectable=True)
        )
        self.copy_button = Button("Copy report", "secondary", "copy")
        self.copy_button.clicked.connect(self._on_copy_clicked)
        close = Button("Close", "primary")
        close.clicked.connect(self.accept)
        close.setDefault(True)
        layout.addLayout(row(None, self.copy_button, close))

    def _on_copy_clicked(self, checked: bool = False) -> None:
        QApplication.clipboard().setText(self.report)
        self.copy_button.setText("Copied")


class CrashReporter(QObject):
    """Holds sys.excepthook and threading.excepthook while it is installed."""

    _caught = Signal(str, str)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._window = parent
        self.dialog: CrashDialog | None = None
        self._more = 0
        self._caught.connect(self._on_caught, Qt.ConnectionType.QueuedConnection)
        self._before = (sys.excepthook, threading.excepthook)

    def install(self) -> None:
        sys.excepthook = self._on_exception
        threading.excepthook = self._on_thread_exception

    def uninstall(self) -> None:
        sys.excepthook, threading.excepthook = self._before

    def show_last_crash(self, text: str) -> None:
        """What the crash log of an earlier start says."""
        self._show(
            "miStudio ended unexpectedly last time",
            "Your library was checked and is fine; jobs that were running are marked as "
            "interrupted and can be run again. Please copy the report and file it as a bug.",
            text,
        )

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if issubclass(kind, KeyboardInterrupt):
            app = QApplication.instance()
            if app:
                app.quit()
            return
        report = "".join(traceback.format_exception(kind, error, trace))
        log.error("Uncaught in %s\n%s", threading.current_thread().name, report)
        self._caught.emit(f"{kind.__name__}: {error}", report)

    def _on_thread_exception(self, args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            self._on_exception(args.exc_type, args.exc_value, args.exc_traceback)

    def _on_caught(self, title: str, report: str) -> None:
        self._show(
            "Something went wrong inside miStudio",
            f"{title}\nYour library is unharmed. You can go on; if something looks odd, start "
            "miStudio again. Please copy the report and file it as a bug.",
            report,
        )

    def _show(self, title: str, what: str, report: str) -> None:
        if self.dialog is not None:  # one dialog at a time: a failing timer would open hundreds
            self._more += 1
            return
        self.dialog = CrashDialog(title, what, report, self._window)
        self.dialog.finished.connect(self._on_dialog_finished)
        self.dialog.open()

    def _on_dialog_finished(self, result: int) -> None:
        self.dialog = None
        if self._more:
            log.warning("%d more errors came while the report was open", self._more)
            self._more = 0
