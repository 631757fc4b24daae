"""The pictures of the README: the real window on a demo's library, drawn offscreen.

python3 run.py demo --no-window --library DIR
.venv/bin/python packaging/screenshots.py DIR packaging/screenshots
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
SIZE = (1280, 800)
TALL = 1320  # the steering page to its metrics


def main(library_folder: Path, target: Path) -> int:
    from mistudio import bootstrap

    bootstrap.prepare()
    library_folder, target = library_folder.resolve(), target.resolve()
    with tempfile.TemporaryDirectory() as home:
        os.environ["MISTUDIO_HOME"] = home  # settings and window state of nobody
        return _draw(library_folder, target)


def _draw(library_folder: Path, target: Path) -> int:
    from PySide6.QtWidgets import QApplication

    from mistudio.library.library import Library
    from mistudio.settings import Settings
    from mistudio.ui import theme
    from mistudio.ui.device import find_device
    from mistudio.ui.main_window import MainWindow

    app = QApplication(["mistudio"])
    theme.apply(app, 1.0)
    library = Library(library_folder)
    sae = library.saes.all()[0]
    window = MainWindow(None, Settings(), None)
    window.resize(*SIZE)
    window.show()
    window.open_library(library)
    window.start()
    window.set_device(find_device(0))
    target.mkdir(parents=True, exist_ok=True)
    visits = {
        "datasets": {},
        "models": {},
        "training": {"training_id": sae.training_id},
        "features": {"sae_id": sae.id},
        "steering": {"sae_id": sae.id},
    }
    for tab, context in visits.items():
        window.navigate(tab, **context)
        if tab == "features":
            window.page(tab).presenter.table.set_sort("score", True)
        if tab == "steering":
            window.resize(SIZE[0], TALL)
            _settle(3.0)
            window.page(tab).reopen(library.generations.of_sae(sae.id)[0].id)
        _settle(5.0)
        window.grab().save(str(target / f"{tab}.png"))
        print(target / f"{tab}.png")
    window.close()
    _settle(0.5)
    library.close()
    return 0


def _settle(seconds: float) -> None:
    """Let background reads arrive and layouts come to rest."""
    from PySide6.QtWidgets import QApplication

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        QApplication.processEvents()
        time.sleep(0.01)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print(__doc__)
        sys.exit(2)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
