"""transformers is imported in one place, so that two threads may ask for it at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[3] / "mistudio"

RACE = """
import sys, threading, time
folder = sys.argv[1]
failed = []

def first():
    try:
        import mistudio.engine.activations.store
    except BaseException as exc:
        failed.append(exc)

def second():
    from pathlib import Path
    try:
        from mistudio.engine.models import loading
        loading.check_folder(Path(folder))
        loading.load_tokenizer(Path(folder))
    except BaseException as exc:
        failed.append(exc)

threads = [threading.Thread(target=first), threading.Thread(target=second)]
threads[0].start()
time.sleep(float(sys.argv[2]))
threads[1].start()
for thread in threads:
    thread.join()
sys.exit(repr(failed) if failed else 0)
"""


def test_only_one_module_imports_transformers() -> None:
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "transformers" in imported(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert importers == {"engine/models/hf.py"}


def imported(tree: ast.Module) -> set[str]:
    """Top-level names of the packages that a module imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def test_two_threads_may_be_the_first_to_need_it(tiny_folder: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", RACE, str(tiny_folder), "0.5"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=PACKAGE.parent,
    )
    assert child.returncode == 0, child.stderr[-2000:]
