"""The window as a whole: opening, tabs, shortcuts, state, crash reports, closing."""

from __future__ import annotations

import importlib.util
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PySide6.QtCore import Qt, QTimer
from PySide6.QtGui import QAction
from PySide6.QtWidgets import QApplication, QPushButton, QVBoxLayout, QWidget

from mistudio.library.library import Library
from mistudio.settings import SETTINGS, Settings
from mistudio.ui.actions import COMMANDS
from mistudio.ui.command_palette import CommandPalette, matches
from mistudio.ui.crash import CrashDialog
from mistudio.ui.main_window import TABS, CloseDialog, MainWindow
from mistudio.ui.settings_dialog import SettingsDialog
from mistudio.ui.widgets import ErrorPanel

from .checks import cut_off, nameless, too_small
from .screens import shot
from .small_jobs import Count, CountOnDisk

SIZES = [(1280, 720), (1920, 1080)]


class EmptyPage(QWidget):
    """The page protocol and nothing else: for tests of the window around it."""

    def __init__(self, services: Any) -> None:
        super().__init__()
        self.services = services
        self.context: dict[str, Any] | None = None
        self.state: dict[str, Any] = {}

    def activate(self, **context: Any) -> None:
        self.context = context

    def save_state(self) -> dict[str, Any]:
        return {"note": "kept"}

    def restore_state(self, state: dict[str, Any]) -> None:
        self.state = state


@pytest.fixture
def other_tabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty pages in place of every tab but Datasets."""
    for tab in TABS[1:]:
        module = types.ModuleType(tab.module)
        setattr(module, tab.page, EmptyPage)
        monkeypatch.setitem(sys.modules, tab.module, module)


@pytest.fixture
def open_window(qtbot: Any, themed: QApplication, library: Library) -> Callable[..., MainWindow]:
    def end_jobs(window: MainWindow) -> None:
        """A window that closes while a job runs would ask."""
        for job_id in window.services.jobs.running():
            window.services.jobs.cancel(job_id)
        qtbot.waitUntil(lambda: not window.services.jobs.running())

    def open_it(size: tuple[int, int] = (1280, 720), **options: Any) -> MainWindow:
        window = MainWindow(library, Settings(), **options)
        qtbot.addWidget(window, before_close_func=end_jobs)
        window.resize(*size)
        with qtbot.waitSignal(window.painted):
            window.show()
        window.start()
        return window

    return open_it


@pytest.mark.parametrize("size", SIZES)
def test_window_opens_with_an_empty_library(open_window: Any, size: tuple[int, int]) -> None:
    window = open_window(size)
    shot(window, f"welcome-{size[0]}x{size[1]}")
    assert window.header.state.text() == "Ready"
    assert nameless(window) == []
    assert too_small(window) == []
    assert cut_off(window) == []


@pytest.mark.parametrize("tab", TABS, ids=lambda tab: tab.name)
def test_every_tab_that_exists_builds(open_window: Any, tab: Any) -> None:
    if importlib.util.find_spec(tab.module) is None:
        pytest.skip(f"{tab.module} is not written yet")
    window = open_window()
    window.navigate(tab.name)
    assert window.failed_pages == {}
    shot(window, f"{tab.name}-empty-1280x720")
    assert nameless(window) == []
    assert too_small(window) == []


@pytest.mark.usefixtures("other_tabs")
def test_shortcuts_change_tabs(open_window: Any, qtbot: Any) -> None:
    window = open_window()
    window.activateWindow()
    for number, tab in enumerate(TABS, 1):
        qtbot.keyClick(window, Qt.Key(Qt.Key.Key_0 + number), Qt.KeyboardModifier.ControlModifier)
        assert window.current_tab == tab.name
        assert window.stack.currentWidget().isVisible()
    qtbot.keyClick(window, Qt.Key.Key_J, Qt.KeyboardModifier.ControlModifier)
    assert window.drawer.isVisible()
    qtbot.keyClick(window, Qt.Key.Key_J, Qt.KeyboardModifier.ControlModifier)
    assert not window.drawer.isVisible()


@pytest.mark.usefixtures("other_tabs")
def test_navigation_hands_its_context_to_the_page(open_window: Any) -> None:
    window = open_window()
    assert window.page("features") is None  # built when it is first shown
    window.services.navigate("features", sae_id=7)
    assert window.current_tab == "features"
    assert window.page("features").context == {"sae_id": 7}


@pytest.mark.usefixtures("other_tabs")
def test_window_can_open_on_a_result(open_window: Any) -> None:
    window = open_window(open_on=("steering", {"generation_id": 3}))
    assert window.page("steering").context == {"generation_id": 3}


@pytest.mark.usefixtures("other_tabs")
def test_state_comes_back_at_the_next_start(open_window: Any) -> None:
    first = open_window()
    first.navigate("training")
    first.resize(1300, 800)
    first.drawer.show()
    first.close()
    second = open_window(size=(1300, 800))
    assert second.current_tab == "training"
    assert second.drawer.isVisible()
    second.navigate("training")
    assert second.page("training").state == {"note": "kept"}


def test_page_that_is_missing_says_what_it_must_offer(open_window: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("mistudio.ui.main_window.importlib.import_module", _no_module)
    window = open_window()
    window.navigate("features")
    panel = window.page("features").findChild(ErrorPanel)
    assert "mistudio.ui.features.page" in panel.accessibleName()
    assert "FeaturesPage(services)" in panel.accessibleName()
    assert set(window.failed_pages) == {"features"}
    shot(window, "tab-missing-1280x720")


def _no_module(name: str) -> None:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.usefixtures("other_tabs")
def test_page_that_fails_can_be_tried_again_and_harms_no_other(
    open_window: Any, monkeypatch: Any, qtbot: Any
) -> None:
    broken = sys.modules["mistudio.ui.models.page"]

    def fail(services: Any) -> None:
        raise ZeroDivisionError("a bug in a page")

    monkeypatch.setattr(broken, "ModelsPage", fail)
    window = open_window()
    window.navigate("models")
    panel = window.page("models").findChild(ErrorPanel)
    assert "ZeroDivisionError" in panel.accessibleName()
    window.navigate("training")
    assert window.page("training").context == {}
    monkeypatch.setattr(broken, "ModelsPage", EmptyPage)
    window.navigate("models")
    qtbot.mouseClick(panel.retry_button, Qt.MouseButton.LeftButton)
    assert isinstance(window.page("models"), EmptyPage)
    assert window.failed_pages == {}


# --- jobs -----------------------------------------------------------------------------------------


def test_running_job_shows_in_header_status_bar_and_drawer(open_window: Any, qtbot: Any) -> None:
    window = open_window()
    window.drawer.show()
    job_id = window.services.jobs.submit(Count(10_000))
    qtbot.waitUntil(lambda: window.status.job_bar.value() > 0)
    qtbot.waitUntil(lambda: window.drawer.card(job_id) is not None)
    qtbot.waitUntil(lambda: window.header.state.text() == "Busy: Count to 10000")
    qtbot.waitUntil(lambda: window.drawer.card(job_id).progress.percent_text != "—")
    shot(window, "jobs-running-1280x720")
    card = window.drawer.card(job_id)
    assert card.mapTo(window.drawer, card.rect().topRight()).x() <= window.drawer.width() - 12
    assert cut_off(window.drawer) == []
    assert nameless(window) == []
    qtbot.mouseClick(window.status.stop, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: window.header.state.text() == "Ready")
    qtbot.waitUntil(lambda: not window.drawer.card(job_id).record.active)
    assert not window.status.job.isVisible()


def test_drawer_pauses_resumes_and_cancels(open_window: Any, qtbot: Any, library: Library) -> None:
    window = open_window()
    window.drawer.show()
    job_id = window.services.jobs.submit(Count(10_000))
    qtbot.waitUntil(lambda: bool(window.drawer.card(job_id)))
    qtbot.waitUntil(lambda: window.drawer.card(job_id).record.status == "running")
    card = window.drawer.card(job_id)
    qtbot.mouseClick(card.pause, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: card.pause.text() == "Resume")
    qtbot.mouseClick(card.pause, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: card.pause.text() == "Pause")
    qtbot.mouseClick(card.cancel, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: not window.services.jobs.running())
    assert library.jobs.get(job_id).status == "cancelled"


def test_failed_job_tells_why_and_its_report_can_be_copied(open_window: Any, qtbot: Any) -> None:
    window = open_window()
    window.drawer.show()
    job_id = window.services.jobs.submit(Count(5, fail_at=2, bug=True))
    qtbot.waitUntil(lambda: len(window.services.toasts.toasts) == 1)
    qtbot.waitUntil(lambda: window.drawer.card(job_id).record.status == "failed")
    assert "failed" in window.services.toasts.toasts[0].message
    shot(window, "job-failed-1280x720")
    qtbot.mouseClick(window.drawer.card(job_id).copy, Qt.MouseButton.LeftButton)
    copied = QApplication.clipboard().text()
    assert "ZeroDivisionError" in copied and "miStudio" in copied


def test_interrupted_job_is_offered_again(
    open_window: Any, qtbot: Any, library: Library, monkeypatch: Any
) -> None:
    job_id = library.jobs.submit("count", "Count to 3", "compute", {"to": 3})
    library.jobs.move(job_id, ("queued",), "interrupted")
    kinds = types.ModuleType("mistudio.jobs.kinds")
    kinds.job_from_row = lambda kind, params: Count(**params)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mistudio.jobs.kinds", kinds)
    window = open_window()
    assert "Interrupted" in window.services.toasts.toasts[0].message
    window.drawer.show()
    card = window.drawer.card(job_id)
    qtbot.waitUntil(card.again.isVisible)
    assert not card.pause.isVisible()
    qtbot.mouseClick(card.again, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: library.jobs.count() == 2)
    qtbot.waitUntil(lambda: not window.services.jobs.running())
    assert library.jobs.get(2).status == "finished"


def test_closing_with_a_running_job_asks(
    open_window: Any, qtbot: Any, answer_dialogs: Any, library: Library
) -> None:
    window = open_window()
    job_id = window.services.jobs.submit(Count(100_000))
    other = window.services.jobs.submit(CountOnDisk(100_000))
    qtbot.waitUntil(lambda: len(window.services.jobs.running()) == 2)
    answer_dialogs("CloseDialog.exec", CloseDialog.STAY)
    assert not window.close()
    assert window.isVisible()
    answer_dialogs("CloseDialog.exec", CloseDialog.STOP)
    with qtbot.waitSignal(window.closed) as closed:
        assert window.close()
    assert closed.args == [True]
    assert {library.jobs.get(i).status for i in (job_id, other)} == {"cancelled"}


def test_closing_can_wait_for_the_job(
    open_window: Any, qtbot: Any, answer_dialogs: Any, library: Library
) -> None:
    window = open_window()
    job_id = window.services.jobs.submit(Count(60))
    qtbot.waitUntil(lambda: bool(window.services.jobs.running()))
    answer_dialogs("CloseDialog.exec", CloseDialog.WHEN_DONE)
    with qtbot.waitSignal(window.closed):
        assert not window.close()
    assert library.jobs.get(job_id).status == "finished"


def test_close_dialog_names_the_jobs(qtbot: Any, themed: QApplication) -> None:
    dialog = CloseDialog(["Train on SmolLM2 + Wikipedia, layer 10"])
    qtbot.addWidget(dialog)
    dialog.show()
    shot(dialog, "close-dialog")
    assert nameless(dialog) == [] and cut_off(dialog) == []
    keep = next(b for b in dialog.findChildren(QPushButton) if b.text() == "Keep running")
    assert keep.isDefault()
    dialog.close()


# --- crash reports --------------------------------------------------------------------------------


def test_uncaught_exception_in_any_thread_opens_the_report(open_window: Any, qtbot: Any) -> None:
    window = open_window()
    before = (sys.excepthook, threading.excepthook)
    window.crash.install()
    try:

        def fail() -> None:
            raise RuntimeError("broken in a thread")

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        qtbot.waitUntil(lambda: window.crash.dialog is not None)
        dialog = window.crash.dialog
        assert "broken in a thread" in dialog.report
        shot(dialog, "crash-dialog")
        assert nameless(dialog) == [] and too_small(dialog) == []
        sys.excepthook(ValueError, ValueError("second"), None)
        qtbot.mouseClick(dialog.copy_button, Qt.MouseButton.LeftButton)
        assert "RuntimeError" in QApplication.clipboard().text()
        assert len(window.findChildren(CrashDialog)) == 1
        dialog.close()
        qtbot.waitUntil(lambda: window.crash.dialog is None)
    finally:
        window.crash.uninstall()
    assert (sys.excepthook, threading.excepthook) == before


def test_last_crash_is_shown(open_window: Any) -> None:
    window = open_window()
    window.crash.show_last_crash("Fatal Python error: Segmentation fault")
    assert "Segmentation fault" in window.crash.dialog.report
    window.crash.dialog.close()


# --- palette, settings, welcome -------------------------------------------------------------------


def test_palette_finds_and_runs_a_command(qtbot: Any, themed: QApplication) -> None:
    ran: list[str] = []
    actions = []
    for text in ("Settings…", "Show jobs", "Add the sample dataset"):
        action = QAction(text)
        action.triggered.connect(lambda checked=False, text=text: ran.append(text))
        actions.append(action)
    palette = CommandPalette(actions)
    qtbot.addWidget(palette)
    palette.open()
    assert palette.shown() == ["Settings…", "Show jobs", "Add the sample dataset"]
    qtbot.keyClicks(palette.field, "sample add")
    assert palette.shown() == ["Add the sample dataset"]
    qtbot.keyClick(palette.field, Qt.Key.Key_Return)
    assert ran == ["Add the sample dataset"]
    assert matches("", "anything")


def test_palette_of_the_window(open_window: Any, qtbot: Any) -> None:
    window = open_window()
    window.actions_by_id["palette"].trigger()
    palette = window.findChild(CommandPalette)
    assert len(palette.shown()) == len(COMMANDS) - 1
    shot(palette, "palette")
    assert nameless(palette) == [] and too_small(palette) == []
    qtbot.keyClick(palette.field, Qt.Key.Key_Down)
    qtbot.keyClick(palette.field, Qt.Key.Key_Escape)


def test_settings_dialog_shows_every_setting_and_keeps_changes(
    qtbot: Any, themed: QApplication, tmp_path: Path
) -> None:
    settings = Settings(tmp_path / "settings.json")
    dialog = SettingsDialog(settings)
    qtbot.addWidget(dialog)
    dialog.show()
    assert set(dialog.editors) == {setting.key for setting in SETTINGS if not setting.hidden}
    dialog.editors["text_size"].setValue(125)
    dialog.editors["notify"].click()
    dialog.editors["token_colours"].set_value("safe")
    shot(dialog, "settings")
    assert nameless(dialog) == [] and too_small(dialog) == [] and cut_off(dialog) == []
    again = Settings(tmp_path / "settings.json")
    assert (again.get("text_size"), again.get("notify"), again.get("token_colours")) == (
        125,
        False,
        "safe",
    )
    dialog.close()


def test_welcome_follows_what_the_library_holds(open_window: Any, library: Library) -> None:
    window = open_window()
    welcome = window.stack.currentWidget()
    assert type(welcome).__name__ == "WelcomePage"
    folder = library.new_folder("datasets", "notes")
    library.datasets.add(
        name="notes", source="local", origin="notes.txt", folder=folder,
        documents=1, characters=10, bytes=10,
    )  # fmt: skip
    welcome.refresh()
    assert [r.accessibleName().endswith("done") for r in welcome._rows] == [True] + [False] * 4
    second = open_window()
    assert second.stack.currentWidget() is not second._welcome  # no longer empty


@pytest.mark.usefixtures("other_tabs")
def test_text_at_150_percent_is_not_cut_off(
    qtbot: Any, themed: QApplication, library: Library
) -> None:
    from mistudio.ui import theme

    theme.apply(themed, 1.5)
    try:
        window = MainWindow(library, Settings())
        qtbot.addWidget(window)
        window.resize(1280, 720)
        window.show()
        window.start()
        shot(window, "welcome-150-percent")
        assert cut_off(window.header) == [] and cut_off(window.tabs) == []
        window.close()
    finally:
        theme.apply(themed, 1.0)


def test_no_timer_runs_while_nothing_happens(open_window: Any, qtbot: Any) -> None:
    window = open_window()
    active = [t for t in window.findChildren(QTimer) if t.isActive() and t.interval() < 1000]
    assert active == []


def test_window_holds_a_page_of_any_width(open_window: Any) -> None:
    window = open_window((960, 600))
    place = QWidget()
    place.setLayout(QVBoxLayout())
    assert window.width() <= 1280
    assert window.minimumWidth() <= 960
