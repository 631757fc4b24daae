"""The dialog that shows a model's own program, through the form, with real clicks and keys."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import own_models
import pytest
from hub_server import HubServer
from own_models import write_own_model
from PySide6.QtCore import Qt
from PySide6.QtGui import QTextCursor
from PySide6.QtWidgets import QApplication

from mistudio import credentials
from mistudio.engine.hub import access, session
from mistudio.engine.models import custom_code
from mistudio.engine.models.custom_code import CodeFile, OwnCode
from mistudio.library.library import Library
from mistudio.ui.models.consent import CHECK, ConsentDialog
from mistudio.ui.models.page import ModelsPage
from mistudio.ui.services import Services

from .checks import cut_off, nameless, too_small
from .screens import shot


@pytest.fixture(scope="module", autouse=True)
def libraries_imported() -> None:
    """On a busy computer that takes longer than a window is waited for."""
    from mistudio.engine.models.architecture import read_architecture

    read_architecture(own_models.TOKENIZER)


@pytest.fixture(autouse=True)
def nothing_imported() -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.startswith(custom_code._PACKAGE)]:
        del sys.modules[name]
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, custom_code._Finder)]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


@pytest.fixture
def folder(tmp_path: Path, marker: Path) -> Path:
    return write_own_model(tmp_path / "own-lm", marker)


@pytest.fixture
def page(
    qtbot: Any, library: Library, services_of: Callable[[Library], Services], request: Any
) -> ModelsPage:
    page = ModelsPage(services_of(library))
    qtbot.addWidget(page)
    page.resize(*getattr(request, "param", (1280, 720)))
    page.show()
    return page


def click(qtbot: Any, button: Any) -> None:
    assert button.isEnabled()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def opened(qtbot: Any, page: ModelsPage, source: object) -> ConsentDialog:
    page.form.source.setText(str(source))
    click(qtbot, page.form.add_button)
    qtbot.waitUntil(lambda: page.form.findChild(ConsentDialog) is not None)
    dialog = page.form.findChild(ConsentDialog)
    assert dialog is not None
    qtbot.waitUntil(dialog.isVisible)
    return dialog


def closed(qtbot: Any, page: ModelsPage) -> None:
    qtbot.waitUntil(lambda: page.form.findChild(ConsentDialog) is None)


@pytest.mark.parametrize("page", [(1280, 720), (1920, 1080)], indirect=True)
def test_it_shows_what_would_run_and_cancel_is_the_default(
    qtbot: Any, page: ModelsPage, library: Library, folder: Path, marker: Path
) -> None:
    dialog = opened(qtbot, page, folder)
    assert "brings its own program" in page.form.code_note.text()
    cells = dialog.files.model()
    for line, name in enumerate(own_models.CODE):
        shown = [cells.index(line, c).data() for c in range(3)]
        file = dialog.code.files[line]
        assert shown == [name, f"{file.bytes:,}", file.sha256]
        dialog.files.selectRow(line)
        assert dialog.source.toPlainText() == (folder / name).read_text()
    assert str(folder) in dialog.about.text()
    assert dialog.source.isReadOnly() and not dialog.consent.isEnabled()
    assert dialog.cancel.isDefault() and not dialog.consent.autoDefault()
    assert nameless(dialog) == [] and too_small(dialog) == [] and cut_off(dialog) == []
    shot(dialog, f"models-consent-{page.width()}")
    shot(page, f"models-own-program-{page.width()}")
    qtbot.keyClick(dialog, Qt.Key.Key_Return)
    closed(qtbot, page)
    assert library.jobs.count() == 0 and not marker.exists()
    assert page.form.source.text() == str(folder)


def test_it_takes_a_tick_and_a_click(
    qtbot: Any, page: ModelsPage, library: Library, folder: Path, marker: Path
) -> None:
    dialog = opened(qtbot, page, folder)
    page.form.precision.set_value("fp32")
    qtbot.mouseClick(dialog.consent, Qt.MouseButton.LeftButton)
    assert dialog.isVisible() and library.jobs.count() == 0
    assert dialog.agreed.text() == CHECK
    dialog.agreed.setFocus()
    qtbot.keyClick(dialog.agreed, Qt.Key.Key_Space)
    assert dialog.consent.isEnabled()
    qtbot.keyClick(dialog.agreed, Qt.Key.Key_Space)
    assert not dialog.consent.isEnabled()
    qtbot.keyClick(dialog.agreed, Qt.Key.Key_Space)
    click(qtbot, dialog.consent)
    qtbot.waitUntil(lambda: library.models.count() == 1)
    model = library.models.all()[0]
    assert set(model.provenance["code"]["files"]) == set(own_models.CODE) and marker.exists()
    assert page.form.source.text() == ""


def test_a_ticked_box_and_enter_still_cancel(
    qtbot: Any, page: ModelsPage, library: Library, folder: Path
) -> None:
    dialog = opened(qtbot, page, folder)
    dialog.agreed.setChecked(True)
    qtbot.keyClick(dialog.agreed, Qt.Key.Key_Return)
    closed(qtbot, page)
    dialog = opened(qtbot, page, folder)
    dialog.agreed.setChecked(True)
    qtbot.keyClick(dialog, Qt.Key.Key_Escape)
    closed(qtbot, page)
    assert library.jobs.count() == 0


def test_search_goes_through_all_files_and_around(
    qtbot: Any, page: ModelsPage, folder: Path
) -> None:
    dialog = opened(qtbot, page, folder)
    dialog.wanted.setText("silu")
    qtbot.keyClick(dialog.wanted, Qt.Key.Key_Return)
    assert dialog.isVisible() and dialog.files.currentIndex().row() == 2
    assert dialog.source.textCursor().selectedText() == "silu"
    dialog.wanted.setText("OwnConfig")
    for expected in (0, 1):
        dialog.source.moveCursor(QTextCursor.MoveOperation.End)
        click(qtbot, dialog.next)
        assert dialog.files.currentIndex().row() == expected
    dialog.wanted.setText("not in there")
    click(qtbot, dialog.next)
    assert dialog.found.text() == "Not found"
    dialog.reject()
    closed(qtbot, page)


def test_every_control_is_reached_by_tab(qtbot: Any, page: ModelsPage, folder: Path) -> None:
    dialog = opened(qtbot, page, folder)
    dialog.agreed.setChecked(True)
    dialog.activateWindow()
    dialog.cancel.setFocus()
    reached = set()
    for _ in range(12):
        focus = QApplication.focusWidget()
        reached.add(focus)
        qtbot.keyClick(focus, Qt.Key.Key_Tab)
    wanted = (dialog.files, dialog.wanted, dialog.next, dialog.source, dialog.agreed)
    assert {*wanted, dialog.cancel, dialog.consent} <= reached
    dialog.reject()
    closed(qtbot, page)


def test_from_the_hub_nothing_but_the_program_is_fetched_before(
    qtbot: Any, page: ModelsPage, library: Library, folder: Path, marker: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in (*access._OFFLINE_VARIABLES, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(session, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(access, "_provider", credentials.access_for)
    monkeypatch.setattr(credentials, "_typed", {})
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        repo = hub.add("ada/own-lm", {f.name: f.read_bytes() for f in folder.iterdir()}, "model")
        dialog = opened(qtbot, page, "ada/own-lm")
        assert repo.sha in dialog.about.text() and "ada/own-lm" in dialog.about.text()
        assert all(asked for asked in hub.ranges("model.safetensors"))  # pieces of the header
        assert hub.ranges("tokenizer.json") == [] and not marker.exists()
        assert not list(library.root.rglob("*.py"))
        shot(dialog, "models-consent-hub")
        dialog.agreed.setChecked(True)
        click(qtbot, dialog.consent)
        qtbot.waitUntil(lambda: library.models.count() == 1)
    assert library.models.all()[0].provenance["code"]["revision"] == repo.sha


def test_long_lines_are_wrapped_and_text_is_shown_as_text(qtbot: Any, themed: Any) -> None:
    """Nothing hides behind the right edge, and no markup of the file's is followed."""
    text = "x = 1" + " " * 4000 + "; import os\n# <b>bold</b>\n"
    files = tuple(CodeFile(f"part{n}.py", len(text), "0" * 64, text) for n in range(20))
    dialog = ConsentDialog("own", OwnCode({"AutoModelForCausalLM": "part0.X"}, files, "here"))
    qtbot.addWidget(dialog)
    dialog.resize(1000, 640)
    dialog.show()
    assert dialog.source.toPlainText() == text
    assert dialog.source.horizontalScrollBar().maximum() == 0
    assert dialog.files.height() < 220 and dialog.source.height() > 120
    assert cut_off(dialog) == [] and nameless(dialog) == []
    shot(dialog, "models-consent-many")
