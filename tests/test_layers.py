"""Nothing in engine, library or jobs needs Qt: all of it imports where Qt is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Runs in a fresh interpreter where Qt's packages cannot be found, as on a server without them.
IMPORT_ALL = r"""
import importlib, json, pkgutil, sys, traceback

BLOCKED = {"PySide6", "shiboken6", "pyqtgraph", "superqt", "qtpy", "PyQt5", "PyQt6"}

class NoQt:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"blocked in this test: {name}", name=name)

sys.meta_path.insert(0, NoQt())

names, failures = [], {}
for floor in sys.argv[1:]:
    package = importlib.import_module("mistudio." + floor)
    names.append(package.__name__)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        names.append(module.name)
        try:
            importlib.import_module(module.name)
        except Exception:
            failures[module.name] = traceback.format_exc(limit=-3)
loaded = sorted(BLOCKED & {name.partition(".")[0] for name in sys.modules})
print(json.dumps({"names": names, "failures": failures, "loaded": loaded}))
"""


FLOORS = ("engine", "library", "jobs")


def test_every_module_imports_without_qt() -> None:
    child = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *FLOORS], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    answer = json.loads(child.stdout.splitlines()[-1])
    assert answer["failures"] == {}, "\n".join(answer["failures"].values())
    assert answer["loaded"] == []

    files = [file for floor in FLOORS for file in (ROOT / "mistudio" / floor).rglob("*.py")]
    expected = {
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files
    }
    assert set(answer["names"]) == expected, "a module that nobody imported"
