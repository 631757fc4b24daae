"""The guards of conftest.py: a test that leaks, asks a dialog or calls out does fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

OFFENDERS = """
import contextlib, os, socket, threading, time
import pytest

def test_clean(own_home):
    assert os.environ["MISTUDIO_HOME"] == str(own_home)
    server = socket.create_server(("127.0.0.1", 0))
    socket.create_connection(server.getsockname()).close()
    server.close()

def test_network():
    with contextlib.suppress(AssertionError):
        socket.create_connection(("192.0.2.1", 80), timeout=1)

def test_name_lookup():
    with contextlib.suppress(AssertionError):
        socket.create_connection(("example.com", 80), timeout=1)

def test_thread():
    threading.Thread(target=time.sleep, args=(1.5,), name="straggler").start()
"""

QT_OFFENDERS = """
import contextlib, time
import pytest
from PySide6.QtCore import QThread, QTimer
from PySide6.QtWidgets import QDialog, QMessageBox, QWidget

class OwnDialog(QDialog):
    pass

class Worker(QThread):
    def run(self):
        time.sleep(1.5)

kept = []

def test_clean(qtbot, answer_dialogs):
    answer_dialogs("QMessageBox.question", 5)
    answer_dialogs("OwnDialog.exec", lambda dialog: 7)
    assert QMessageBox.question(None, "Title", "Text") == 5
    assert OwnDialog().exec() == 7
    widget = QWidget()
    qtbot.addWidget(widget)
    widget.show()
    timer = QTimer(widget)
    timer.start(5)

def test_dialog(qtbot):
    with contextlib.suppress(AssertionError):
        QMessageBox.question(None, "Title", "Really?")

def test_unused_answer(qtbot, answer_dialogs):
    answer_dialogs("QDialog.exec", 1)

def test_timer(qtbot):
    kept.append(QTimer())
    kept[-1].start(5)

def test_window(qtbot):
    kept.append(QWidget())
    kept[-1].show()

def test_qthread(qtbot):
    kept.append(Worker())
    kept[-1].start()

def test_next_one_is_clean(qtbot):
    pass
"""


def outcome(tmp_path: Path, source: str) -> str:
    guards = (HERE / "conftest.py").read_text(encoding="utf-8")
    hasty = guards.replace("GRACE_SECONDS = 2.0", "GRACE_SECONDS = 0.3")
    assert hasty != guards
    (tmp_path / "conftest.py").write_text(hasty, encoding="utf-8")
    (tmp_path / "test_offenders.py").write_text(source)
    options = ["-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    options += ["--basetemp", str(tmp_path / "temporary")]  # it would tidy up after other runs
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path), "-p", "no:cacheprovider"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    return child.stdout + child.stderr


def test_calling_out_or_leaving_a_thread_fails_the_test(tmp_path: Path) -> None:
    text = outcome(tmp_path, OFFENDERS)
    assert "4 passed, 3 errors" in text, text
    assert "tried to reach 192.0.2.1:80" in text
    assert "tried to reach example.com:80" in text
    assert "left running: straggler" in text
    assert " thread straggler " in text, "what it was doing"


def test_qt_leaks_and_unanswered_dialogs_fail_the_test(tmp_path: Path) -> None:
    pytest.importorskip("PySide6")
    text = outcome(tmp_path, QT_OFFENDERS)
    assert "7 passed, 5 errors" in text, text
    assert "dialogs nobody answered: QMessageBox.question('Title', 'Really?')" in text
    assert "answers nobody asked for: QDialog.exec" in text
    assert "QTimer started at" in text
    assert "window QWidget" in text
    assert "Worker started at" in text
