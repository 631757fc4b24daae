"""Starting and ending the application, each time as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mistudio import app, bootstrap

ROOT = Path(__file__).resolve().parents[2]
START = "import sys; from mistudio.app import main; code = main([]); {after}sys.exit(code)"


def start(home: Path, after: str = "", **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START.format(after=after)],
        env={**os.environ, "MISTUDIO_HOME": str(home), "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A window that has opened (its library is locked and it listens)."""
    process = start(tmp_path / "home")
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_first_paint_comes_before_torch_and_nothing_is_printed(tmp_path: Path) -> None:
    target = tmp_path / "paint.txt"
    process = start(
        tmp_path / "home",
        after="print(*[m for m in ('torch', 'transformers', 'pyqtgraph') if m in sys.modules]); ",
        MISTUDIO_FIRST_PAINT_FILE=str(target),
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.strip() == ""
    assert [line for line in err.splitlines() if "does not support" not in line] == []
    assert 0 < float(target.read_text()) < 30_000
    assert list((tmp_path / "home" / "logs").glob("crash-*")) == []


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is POSIX")
def test_second_start_calls_the_first_and_ctrl_c_ends_it(
    running: subprocess.Popen[str], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    wait_until(lambda: list((home / "logs").glob("crash-*")) and (home / "library.db").exists())
    time.sleep(1.0)  # until it listens
    second = start(home)
    assert second.wait(timeout=30) == 0
    second.communicate()
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=30) == 0
    assert list((home / "logs").glob("crash-*")) == []


def test_pyside_that_loses_references_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    app.check_signals()
    counts = iter([500, 436])
    monkeypatch.setattr("mistudio.app.sys.getrefcount", lambda thing: next(counts))
    with pytest.raises(bootstrap.CannotStart, match="PySide6"):
        app.check_signals()


def test_library_that_cannot_open_is_refused_in_words(
    qapp: Any, themed: Any, tmp_path: Path, answer_dialogs: Any
) -> None:
    file = tmp_path / "not-a-folder"
    file.write_text("x")
    texts: list[str] = []

    def read(dialog: Any) -> int:
        from mistudio.ui.widgets import ErrorPanel

        texts.append(dialog.findChild(ErrorPanel).accessibleName())
        return 0

    answer_dialogs("QDialog.exec", read)
    code = app._show(qapp, file, None, None, bootstrap.CrashLog(tmp_path), app.Instance(file))
    assert code == 1
    assert "must be a folder" in texts[0] and "--library" in texts[0]
