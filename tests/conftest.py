"""What every test stands on: an environment of its own, and guards that fail a test which leaks,
opens a dialog nobody answers, or calls the network. Qt is imported only for tests that use it."""

from __future__ import annotations

import gc
import ipaddress
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from mistudio.engine import garbage

ROOT = Path(__file__).resolve().parent.parent

# Before anything imports Qt, torch or huggingface_hub: they read these once.
_home = tempfile.TemporaryDirectory(prefix="mistudio-tests-", ignore_cleanup_errors=True)
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ["MISTUDIO_HOME"] = os.path.join(_home.name, "library")
os.environ["HF_HOME"] = os.path.join(_home.name, "huggingface")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["PYTHON_KEYRING_BACKEND"] = "keyring.backends.fail.Keyring"  # not the user's own
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# torch's thread count, also in child processes: all is tiny, and tests run side by side.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as bootstrap.py does, and for the same reason
for _kind in ("CONFIG", "DATA", "CACHE", "STATE"):
    os.environ[f"XDG_{_kind}_HOME"] = os.path.join(_home.name, _kind.lower())


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Let --strict-config pass where pytest-qt is not loaded: engine tests need no Qt."""
    if not pluginmanager.hasplugin("pytest-qt"):
        for name in ("qt_api", "qt_log_level_fail"):
            parser.addini(name, "read by pytest-qt")
        parser.addini("qt_log_ignore", "read by pytest-qt", type="linelist")


def pytest_unconfigure() -> None:
    _home.cleanup()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a library, settings and logs of its own; the path is returned."""
    home = tmp_path / "mistudio_home"
    monkeypatch.setenv("MISTUDIO_HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The app gives torch all cores when it imports the engine; the next test has one again."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


# --- garbage --------------------------------------------------------------------------------------

# As `ui/pauses.Collector` does in the app: a collection in a worker's thread would destroy windows
# of earlier tests there.
gc.disable()


def collect_in_main_thread() -> None:
    if threading.current_thread() is threading.main_thread():
        gc.collect()


garbage.collect_through(collect_in_main_thread)


_imported = 0  # modules when garbage was last set aside


def set_imports_aside() -> None:
    """A collection that looks through torch and transformers takes 0.3 s; there are hundreds."""
    global _imported
    if len(sys.modules) > _imported + 100:
        gc.collect()
        gc.freeze()
        _imported = len(sys.modules)


@pytest.fixture(autouse=True)
def garbage_of_the_main_thread() -> Iterator[None]:
    """Collect between tests what is due by Python's own thresholds."""
    yield
    set_imports_aside()
    counts, thresholds = gc.get_count(), gc.get_threshold()
    due = [generation for generation in range(3) if counts[generation] > thresholds[generation]]
    if due:
        gc.collect(due[-1])


# --- threads --------------------------------------------------------------------------------------

GRACE_SECONDS = 2.0


def _running_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if not t.daemon and t.is_alive()}


@pytest.fixture(autouse=True)
def no_threads_left(no_network: None) -> Iterator[None]:
    """Fail a test that leaves a non-daemon Python thread: it would keep the app from ending."""
    before = _running_threads()
    yield
    left = _running_threads() - before
    deadline = time.monotonic() + GRACE_SECONDS
    for thread in left:
        thread.join(max(0.0, deadline - time.monotonic()))
    left = {thread for thread in left if thread.is_alive()}
    if left:
        pytest.fail(f"left running: {', '.join(sorted(t.name for t in left))}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test tells what its other threads were doing: it may have waited for one of them."""
    report = yield
    if report.failed:
        mine = threading.get_ident()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        others = {ident: frame for ident, frame in sys._current_frames().items() if ident != mine}
        for ident, frame in others.items():
            stack = "".join(traceback.format_stack(frame))
            report.sections.append((f"thread {names.get(ident, ident)}", stack))
    return report


# --- network --------------------------------------------------------------------------------------


class NetworkBlocked(AssertionError):
    """A test tried to leave the machine. Not an OSError, so no retry loop swallows it."""


_network_attempts: list[str] = []
_real_connect = socket.socket.connect
_real_connect_ex = socket.socket.connect_ex
_real_getaddrinfo = socket.getaddrinfo


def _is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host in (None, "", "localhost", "localhost.localdomain", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse_unless_local(family: int, address: Any) -> None:
    if family not in (socket.AF_INET, socket.AF_INET6) or _is_local(address[0]):
        return
    _network_attempts.append(f"{address[0]}:{address[1]}")
    raise NetworkBlocked(f"this test tried to connect to {address[0]}:{address[1]}")


def _guarded_connect(self: socket.socket, address: Any) -> None:
    _refuse_unless_local(self.family, address)
    _real_connect(self, address)


def _guarded_connect_ex(self: socket.socket, address: Any) -> int:
    _refuse_unless_local(self.family, address)
    return _real_connect_ex(self, address)


def _guarded_getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
    if not _is_local(host):
        _refuse_unless_local(socket.AF_INET, (host, port))
    return _real_getaddrinfo(host, port, *args, **kwargs)


socket.socket.connect = _guarded_connect  # type: ignore[method-assign]
socket.socket.connect_ex = _guarded_connect_ex  # type: ignore[method-assign]
socket.getaddrinfo = _guarded_getaddrinfo


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    """Fail a test that tried to leave the machine, also where the attempt's error was caught."""
    _network_attempts.clear()
    yield
    if _network_attempts:
        pytest.fail(f"tried to reach {', '.join(_network_attempts)}", pytrace=False)


# --- dialogs --------------------------------------------------------------------------------------

# Everything that would wait for a person. A subclass's exec() counts under the subclass's own name
# as well as under the names here.
STATIC_DIALOGS = {
    "QMessageBox": ("about", "aboutQt", "critical", "information", "question", "warning"),
    "QFileDialog": (
        "getExistingDirectory",
        "getExistingDirectoryUrl",
        "getOpenFileName",
        "getOpenFileNames",
        "getOpenFileUrl",
        "getOpenFileUrls",
        "getSaveFileName",
        "getSaveFileUrl",
    ),
    "QInputDialog": ("getDouble", "getInt", "getItem", "getMultiLineText", "getText"),
    "QColorDialog": ("getColor",),
    "QFontDialog": ("getFont",),
}
EXEC_DIALOGS = ("QDialog", "QMenu")


class DialogAnswers:
    """The answers a test registered for dialogs: `answer_dialogs("QMessageBox.question", Yes)`.

    The answer is what the call returns, or a function that gets the call's arguments and returns
    it. Answers to the same dialog are used in the order they were registered, one per call.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.unanswered: list[str] = []
        self._answers: dict[str, deque[Any]] = {}

    def __call__(self, name: str, answer: Any) -> None:
        self._answers.setdefault(name, deque()).append(answer)

    def answer(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.asked.append((names[0], args))
        for name in names:
            if self._answers.get(name):
                answer = self._answers[name].popleft()
                return answer(*args, **kwargs) if callable(answer) else answer
        texts = [a for a in args if isinstance(a, str)]
        self.unanswered.append(f"{names[0]}({', '.join(map(repr, texts))})")
        raise AssertionError(f"nobody answers {self.unanswered[-1]}: use answer_dialogs")

    @property
    def unused(self) -> list[str]:
        return [name for name, answers in self._answers.items() if answers]


@pytest.fixture
def answer_dialogs(_dialog_answers: DialogAnswers) -> DialogAnswers:
    """Register what a dialog returns: `answer_dialogs("QFileDialog.getOpenFileName", (path, ""))`.

    Names: "QMessageBox.question" and the like, "MyDialog.exec" for a class of our own,
    "QDialog.exec" for any. An answer that is never asked for fails the test.
    """
    return _dialog_answers


def _uses_qt(request: pytest.FixtureRequest) -> bool:
    return any(name in request.fixturenames for name in ("qapp", "qtbot", "qapp_args"))


@pytest.fixture(autouse=True)
def _dialog_answers(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DialogAnswers]:
    answers = DialogAnswers()
    if not _uses_qt(request):
        yield answers
        return
    from PySide6 import QtWidgets

    # Plain functions only: since PySide6 6.10 a Mock in place of a Qt method can end the process.
    def static_dialog(name: str) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            return answers.answer([name], args, kwargs)

        return ask

    def ask_exec(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = [f"{cls.__name__}.exec" for cls in type(self).__mro__]
        return answers.answer(names, (self, *args), kwargs)

    for class_name, methods in STATIC_DIALOGS.items():
        cls = getattr(QtWidgets, class_name)
        for method in methods:
            if hasattr(cls, method):
                replacement = staticmethod(static_dialog(f"{class_name}.{method}"))
                monkeypatch.setattr(cls, method, replacement)
    for class_name in EXEC_DIALOGS:
        cls = getattr(QtWidgets, class_name)
        monkeypatch.setattr(cls, "exec", ask_exec)
        if "exec_" in vars(cls):
            monkeypatch.setattr(cls, "exec_", ask_exec)

    yield answers
    if answers.unanswered:
        pytest.fail(f"dialogs nobody answered: {', '.join(answers.unanswered)}", pytrace=False)
    if answers.unused:
        pytest.fail(f"answers nobody asked for: {', '.join(answers.unused)}", pytrace=False)


# --- what a Qt test may not leave behind ----------------------------------------------------------


@pytest.fixture(autouse=True)
def no_qt_left(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _dialog_answers: DialogAnswers
) -> Iterator[None]:
    """Fail a test that leaves a QThread or QTimer running or a window open, and say who began it.

    Torn down after qtbot, which closes the widgets it was given; so hand every top-level widget
    to `qtbot.addWidget`.
    """
    if not _uses_qt(request):
        yield
        return
    import shiboken6
    from PySide6.QtCore import QCoreApplication, QEvent, QThread, QTimer
    from PySide6.QtWidgets import QApplication

    started: list[tuple[Any, str]] = []

    def recording(real_start: Callable[..., Any]) -> Callable[..., Any]:
        def start(self: Any, *args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            started.append((self, f"{frame.f_code.co_filename}:{frame.f_lineno}"))
            return real_start(self, *args, **kwargs)

        return start

    monkeypatch.setattr(QThread, "start", recording(QThread.start))
    monkeypatch.setattr(QTimer, "start", recording(QTimer.start))
    windows_before = {id(widget) for widget in QApplication.topLevelWidgets()}

    yield

    def alive(kind: type, running: Callable[[Any], bool]) -> dict[str, Any]:
        return {
            f"{type(thing).__name__} started at {where}": thing
            for thing, where in started
            if isinstance(thing, kind) and shiboken6.isValid(thing) and running(thing)
        }

    def leaks() -> dict[str, Any]:
        QCoreApplication.processEvents()
        QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete.value)
        found = alive(QThread, QThread.isRunning) | alive(QTimer, QTimer.isActive)
        for widget in QApplication.topLevelWidgets():
            new = id(widget) not in windows_before and widget.parent() is None
            if new and shiboken6.isValid(widget) and widget.isVisible():
                found[f"window {type(widget).__name__} {widget.objectName()!r}"] = widget
        return found

    deadline = time.monotonic() + GRACE_SECONDS
    found = leaks()
    if found:
        gc.collect()  # cycles through Python keep windows and their timers alive for a while
    while (found := leaks()) and time.monotonic() < deadline:
        time.sleep(0.02)
    names = sorted(found)
    for thing in found.values():  # so that the next test does not pay for this one
        if isinstance(thing, QThread):
            thing.requestInterruption()
            thing.quit()
            thing.wait(2000)
        elif isinstance(thing, QTimer):
            thing.stop()
        else:
            thing.close()
            thing.deleteLater()
    started.clear()
    if names:
        pytest.fail("left behind: " + "; ".join(names), pytrace=False)
