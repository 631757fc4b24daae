"""Before the window: the environment, crash logs, and refusals that say what to do."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mistudio import bootstrap


def test_the_users_own_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "0")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    bootstrap.prepare()
    assert os.environ["HF_HUB_DISABLE_XET"] == "0"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_bootstrap_imports_nothing_but_the_standard_library() -> None:
    code = "import sys, mistudio.bootstrap; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert not {"PySide6", "torch", "numpy", "platformdirs", "sqlite_utils"} & set(loaded)


def test_missing_qt_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_qt(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("PySide6"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="PySide6")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_qt)
    with pytest.raises(bootstrap.CannotStart, match=r"python3 run\.py"):
        bootstrap.check_dependencies()


def test_missing_system_library_names_the_apt_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_egl(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("PySide6"):
            raise ImportError("libEGL.so.1: cannot open shared object file")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_egl)
    with pytest.raises(bootstrap.CannotStart) as refused:
        bootstrap.check_dependencies()
    assert "libEGL.so.1" in str(refused.value) and "apt-get install" in str(refused.value)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="X11 and Wayland are Linux's")
def test_no_screen_is_said_before_qt_would_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QT_QPA_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(bootstrap.CannotStart, match="no screen"):
        bootstrap.check_dependencies()


def test_a_clean_exit_leaves_no_crash_log(tmp_path: Path) -> None:
    log = bootstrap.CrashLog(tmp_path)
    log.open()
    assert list(tmp_path.iterdir())
    log.close()
    assert not list(tmp_path.iterdir())


def test_a_crash_is_told_at_the_next_start_and_only_once(tmp_path: Path) -> None:
    code = (
        "import sys, ctypes; from pathlib import Path; from mistudio.bootstrap import CrashLog\n"
        "CrashLog(Path(sys.argv[1])).open(); ctypes.string_at(0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert done.returncode != 0
    log = bootstrap.CrashLog(tmp_path)
    assert "Segmentation fault" in log.take_last()
    assert log.take_last() == ""


def test_the_log_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f"crash-{os.getppid()}.log"
    other.write_text("still running")
    assert bootstrap.CrashLog(tmp_path).take_last() == ""
    assert other.exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="X11 is Linux's")
def test_a_missing_x11_library_is_named_before_qt_would_end_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("QT_QPA_PLATFORM", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(bootstrap, "X11_LIBRARIES", ("libc.so.6", "libxcb-nowhere.so.1"))
    with pytest.raises(bootstrap.CannotStart) as refused:
        bootstrap.check_dependencies()
    assert "libxcb-nowhere.so.1" in str(refused.value) and "libc.so.6" not in str(refused.value)
    assert "apt-get install" in str(refused.value)
