"""The window: header, tabs, job drawer, status bar, menus, and a close that asks about jobs.

It paints before the library is there: what imports the library (and with it NumPy) is imported by
`open_library`, which takes half of the time to the first paint away.
"""

from __future__ import annotations

import importlib
import json
import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import QByteArray, QEvent, QSettings, QSize, Qt, QTimer, QUrl, Signal
from PySide6.QtGui import QCloseEvent, QDesktopServices, QGuiApplication, QPaintEvent
from PySide6.QtWidgets import (
    QDialog,
    QFrame,
    QMainWindow,
    QMessageBox,
    QStackedWidget,
    QSystemTrayIcon,
    QTabBar,
    QVBoxLayout,
    QWidget,
)

import mistudio
from mistudio import formatting
from mistudio.paths import config_folder, log_folder
from mistudio.settings import Settings
from mistudio.ui.actions import COMMANDS, MENUS, make_actions
from mistudio.ui.crash import CrashReporter, system_report
from mistudio.ui.theme import icons, tokens
from mistudio.ui.times import seconds_between
from mistudio.ui.widgets import (
    Button,
    ColumnPage,
    ElidedLabel,
    ErrorPanel,
    Text,
    ToastArea,
    column,
    picture,
    row,
)

if TYPE_CHECKING:
    from mistudio.library.library import Library
    from mistudio.ui.device import DeviceInfo
    from mistudio.ui.services import Services
    from mistudio.ui.welcome import WelcomePage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tab:
    """A tab and where its page comes from: `module` offers a class `page`."""

    name: str
    title: str
    module: str
    page: str


TABS: tuple[Tab, ...] = tuple(
    Tab(name, name.capitalize(), f"mistudio.ui.{name}.page", f"{name.capitalize()}Page")
    for name in ("datasets", "models", "training", "features", "steering")
)


class Header(QFrame):
    """The product's name at the left; what the engine does and on what device at the right."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setProperty("surface", "header")
        names = column(0)
        names.addWidget(Text("MechInterp Studio", "title"))
        names.addWidget(Text("Edge AI Feature Discovery Platform", "helper"))
        self._dot = picture("circle-dot", tokens.EMERALD, 16)
        self.state = ElidedLabel("Ready", "small", "emerald")
        self.device = Text("", "helper")
        line = row(
            picture("cpu", tokens.EMERALD, 32), names, None, self._dot, self.state, 8, self.device
        )
        line.setContentsMargins(24, 12, 24, 12)
        self.setLayout(line)

    def show_state(self, busy_with: str) -> None:
        """`busy_with` names the running job; empty where nothing runs."""
        text = f"Busy: {busy_with}" if busy_with else "Ready"
        if text == self.state.text():
            return
        tone, colour = ("yellow", tokens.YELLOW) if busy_with else ("emerald", tokens.EMERALD)
        name = "activity" if busy_with else "circle-dot"
        self._dot.setPixmap(icons.pixmap(name, colour, 16, 2.0))
        self.state.setText(text)
        self.state.set_tone(tone)
        self.state.setAccessibleName(f"Engine: {text}")


class CloseDialog(QDialog):
    """Jobs run: go on, quit when they have ended, or stop them and quit."""

    STAY, WHEN_DONE, STOP = 0, 1, 2

    def __init__(self, titles: list[str], parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setWindowTitle("Jobs are running")
        self.setMinimumWidth(520)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(24, 24, 24, 24)
        layout.setSpacing(16)
        head = row(picture("activity", tokens.YELLOW, 24), Text("Jobs are running", "card"), None)
        layout.addLayout(head)
        for title in titles[:6]:
            layout.addWidget(Text(f"• {title}", "body", wrap=True))
        layout.addWidget(
            Text(
                "Stopped trainings, extractions and tokenisations go on where they were (Go On, "
                "after the next start), and a download that is run again takes up what it has. "
                "Other work begins anew.",
                "helper",
                wrap=True,
            )
        )
        buttons = row(None)
        for text, variant, answer in (
            ("Stop and quit", "danger", self.STOP),
            ("Quit when done", "secondary", self.WHEN_DONE),
            ("Keep running", "primary", self.STAY),
        ):
            button = Button(text, variant)
            button.clicked.connect(lambda checked=False, answer=answer: self.done(answer))
            buttons.addWidget(button)
        button.setDefault(True)
        button.setFocus()
        layout.addLayout(buttons)


class MainWindow(QMainWindow):
    """Owns the services and the pages.

    Without a library it is a frame that can be painted; `open_library` and then `start` fill it.
    """

    painted = Signal()
    closed = Signal(bool)
    """The window has closed; False where a thread still runs and the process must be left hard."""

    def __init__(
        self,
        library: Library | None,
        settings: Settings,
        open_on: tuple[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.setObjectName("main_window")
        self.setWindowTitle("MechInterp Studio")
        self.setWindowIcon(icons.icon("cpu", tokens.EMERALD))
        self._settings = settings
        self._open_on = open_on
        self._painted = self._started = self._closing = False
        self._services: Services | None = None
        self._pages: dict[str, QWidget] = {}
        self.failed_pages: dict[str, BaseException] = {}
        self._store = QSettings(str(config_folder() / "window.ini"), QSettings.Format.IniFormat)
        self.crash = CrashReporter(self)
        self._build_frame()
        self._restore_geometry()
        if library is not None:
            self.open_library(library)

    @property
    def services(self) -> Services:
        assert self._services is not None, "the library has not been opened yet"
        return self._services

    # --- building -------------------------------------------------------------------------------

    def _build_frame(self) -> None:
        self.actions_by_id = make_actions(self, self._handler)
        menus = {title: self.menuBar().addMenu(title) for title in MENUS}
        for command in COMMANDS:
            if command.separator:
                menus[command.menu].addSeparator()
            menus[command.menu].addAction(self.actions_by_id[command.id])
        self.actions_by_id["full_screen"].setCheckable(True)

        self.header = Header()
        self.tabs = QTabBar()
        self.tabs.setObjectName("tabs")
        self.tabs.setAccessibleName("Tabs")
        self.tabs.setExpanding(False)
        self.tabs.setDrawBase(False)
        for tab in TABS:
            self.tabs.addTab(tab.title)
        self.tabs.currentChanged.connect(self._on_tabs_current_changed)
        self.tabs.tabBarClicked.connect(self._on_tabs_clicked)
        nav = QFrame()
        nav.setProperty("surface", "nav")
        self.jobs_button = Button("Jobs", "link", "list-checks", "Running and past jobs (Ctrl+J)")
        self.jobs_button.clicked.connect(self.actions_by_id["jobs"].trigger)
        line = row(self.tabs, None, self.jobs_button)
        line.setContentsMargins(24, 4, 24, 0)
        nav.setLayout(line)

        self.stack = QStackedWidget()
        self._places = {tab.name: self._make_place() for tab in TABS}
        self._welcome: WelcomePage | None = None
        middle = QWidget()
        inside = column(0)
        inside.addWidget(self.header)
        inside.addWidget(nav)
        inside.addWidget(self.stack, 1)
        middle.setLayout(inside)
        self.setCentralWidget(middle)
        self.statusBar().showMessage("Opening the library…")

    def open_library(self, library: Library) -> None:
        """Make the services, the job list and the status bar."""
        from mistudio.ui.bridge import Background, ChangeNotifier, JobManager
        from mistudio.ui.job_drawer import JobDrawer
        from mistudio.ui.services import Services
        from mistudio.ui.status_bar import StatusBar

        changes = ChangeNotifier(library, self)
        toasts = ToastArea(self)
        toasts.anchor = self.stack
        self._services = Services(
            library=library,
            jobs=JobManager(library, changes, self),
            changes=changes,
            background=Background(library, self),
            settings=self._settings,
            toasts=toasts,
            navigate=self.navigate,
        )
        self.drawer = JobDrawer(self.services, self)
        self.addDockWidget(Qt.DockWidgetArea.RightDockWidgetArea, self.drawer)
        self.drawer.hide()
        self.status = StatusBar(self.services, self)
        self.setStatusBar(self.status)
        state = self._store.value("state")
        if isinstance(state, QByteArray):
            self.restoreState(state)
        self.services.jobs.job_changed.connect(self._on_jobs_job_changed)
        self.services.jobs.job_finished.connect(self._on_jobs_job_finished)

    def _make_place(self) -> QWidget:
        place = QWidget()
        place.setProperty("surface", "page")
        place.setLayout(column(0))
        self.stack.addWidget(place)
        return place

    def _handler(self, command_id: str) -> Callable[[], None]:
        """What an action does; `triggered` hands over `checked`, which no command takes."""

        def handle(checked: bool = False) -> None:
            if self._services is None and command_id != "quit":
                return  # the library is being opened
            if command_id.startswith("show_"):
                self.navigate(command_id.removeprefix("show_"))
            else:
                getattr(self, f"_on_{command_id}")()

        return handle

    def paintEvent(self, event: QPaintEvent) -> None:
        super().paintEvent(event)
        if not self._painted:
            self._painted = True
            QTimer.singleShot(0, self.painted.emit)

    def start(self) -> None:
        """Fill the window: the current page, the memory display, messages about what was found."""
        from mistudio.ui.welcome import steps_done

        if self._started:
            return
        self._started = True
        library = self.services.library
        if self._open_on:
            name, context = self._open_on
            self.navigate(name, **context)
        elif not any(steps_done(library)) and not library.jobs.active():
            self.show_welcome()
        else:
            self._show_tab(self.current_tab)
        self.setFocus()  # of no control: the first Tab goes to the first one
        self.status.start()
        self._show_engine_state()
        interrupted = library.jobs.all("status = 'interrupted'")
        recent = [job for job in interrupted if not self._store.value(f"told/{job.id}")]
        if recent:
            for job in recent:
                self._store.setValue(f"told/{job.id}", 1)
            titles = ", ".join(job.title for job in recent[:3])
            self.services.toasts.warning(
                "Interrupted at the last exit", titles, ("Show jobs", self._show_jobs)
            )
        if self.services.settings.problem:
            self.services.toasts.warning(
                "The settings file could not be read",
                f"{self.services.settings.problem}. It is kept as settings.json.bak.",
            )

    # --- pages ----------------------------------------------------------------------------------

    @property
    def current_tab(self) -> str:
        return TABS[self.tabs.currentIndex()].name

    def navigate(self, tab_name: str, **context: Any) -> None:
        """Show a tab and tell its page what to open."""
        index = next(i for i, tab in enumerate(TABS) if tab.name == tab_name)
        self.tabs.blockSignals(True)
        self.tabs.setCurrentIndex(index)
        self.tabs.blockSignals(False)
        self._show_tab(tab_name, **context)

    def page(self, tab_name: str) -> QWidget | None:
        """A tab's page where it has been built."""
        return self._pages.get(tab_name)

    def _show_tab(self, tab_name: str, **context: Any) -> None:
        self.stack.setCurrentWidget(self._places[tab_name])
        if not self._started:
            return
        if tab_name not in self._pages:
            self._build_page(next(tab for tab in TABS if tab.name == tab_name))
        page = self._pages[tab_name]
        if tab_name not in self.failed_pages:
            page.activate(**context)

    def _build_page(self, tab: Tab) -> None:
        """Import and make a page; where that fails the tab says why and the window lives on."""
        page: QWidget
        self.failed_pages.pop(tab.name, None)
        try:
            page = getattr(importlib.import_module(tab.module), tab.page)(self.services)
            page.restore_state(self._stored_state(tab.name))
        except Exception as exc:
            log.exception("The %s tab cannot be built", tab.title)
            self.failed_pages[tab.name] = exc
            page = self._failed_page(tab, exc)
        self._pages[tab.name] = page
        self._places[tab.name].layout().addWidget(page)

    def _failed_page(self, tab: Tab, exc: Exception) -> QWidget:
        page = ColumnPage()
        if isinstance(exc, ModuleNotFoundError) and exc.name and exc.name in tab.module:
            what = f"There is no module {tab.module}. It must offer a class {tab.page}(services)."
        else:
            what = f"{type(exc).__name__}: {exc}"
        panel = ErrorPanel(
            f"The {tab.title} tab cannot be shown",
            what,
            "The other tabs work. Please copy the report and file it as a bug.",
            retryable=True,
            report=f"{system_report()}\n\n{''.join(traceback.format_exception(exc))}",
        )
        panel.retry.connect(lambda: self._rebuild(tab))
        page.add(panel)
        page.body.addStretch(1)
        return page

    def _rebuild(self, tab: Tab) -> None:
        old = self._pages.pop(tab.name)
        old.hide()
        old.deleteLater()
        self._show_tab(tab.name)

    def show_welcome(self) -> None:
        from mistudio.ui.welcome import WelcomePage

        if self._welcome is None:
            self._welcome = WelcomePage(self.services)
            self.stack.addWidget(self._welcome)
        self._welcome.refresh()
        self.stack.setCurrentWidget(self._welcome)

    def _on_tabs_current_changed(self, index: int) -> None:
        self._show_tab(TABS[index].name)

    def _on_tabs_clicked(self, index: int) -> None:
        """A click on the tab that is current already leaves the welcome page."""
        if index == self.tabs.currentIndex() and self.stack.currentWidget() is self._welcome:
            self._show_tab(TABS[index].name)

    # --- commands -------------------------------------------------------------------------------

    def _on_add_file(self) -> None:
        self.navigate("datasets", add=True)

    def _on_add_sample(self) -> None:
        self.navigate("datasets", add_sample=True)

    def _on_open_library_folder(self) -> None:
        QDesktopServices.openUrl(QUrl.fromLocalFile(str(self.services.library.root)))

    def _on_open_log_folder(self) -> None:
        QDesktopServices.openUrl(QUrl.fromLocalFile(str(log_folder())))

    def _on_settings(self) -> None:
        from mistudio.ui.settings_dialog import SettingsDialog

        SettingsDialog(self.services.settings, self, self.services.background).open()

    def _on_jobs(self) -> None:
        self.drawer.setVisible(not self.drawer.isVisible())

    def _show_jobs(self) -> None:
        self.drawer.show()

    def _on_palette(self) -> None:
        from mistudio.ui.command_palette import CommandPalette

        commands = [action for name, action in self.actions_by_id.items() if name != "palette"]
        palette = CommandPalette(commands, self)
        middle = self.geometry().center()
        palette.open()
        palette.move(middle.x() - palette.width() // 2, self.geometry().top() + 96)

    def _on_full_screen(self) -> None:
        if self.isFullScreen():
            self.showNormal()
        else:
            self.showFullScreen()
        self.actions_by_id["full_screen"].setChecked(self.isFullScreen())

    def _on_welcome(self) -> None:
        self.show_welcome()

    def _on_about(self) -> None:
        QMessageBox.about(
            self,
            "About MechInterp Studio",
            f"MechInterp Studio {mistudio.__version__}\n\nLook inside a language model, on your "
            "own machine.\n\nFonts: Inter and JetBrains Mono (SIL OFL 1.1). "
            "Icons: Lucide (ISC).\n\n"
            f"{system_report()}",
        )

    def _on_quit(self) -> None:
        self.close()

    # --- jobs and device ------------------------------------------------------------------------

    def set_device(self, device: DeviceInfo) -> None:
        self.header.device.setText(device.name)
        self.header.device.setToolTip(device.detail)
        self.status.set_device(device)

    def _show_engine_state(self) -> None:
        running = self.services.jobs.running()
        title = self.services.library.jobs.get(running[0]).title if running else ""
        self.header.show_state(title)
        active = len(self.services.jobs.active())
        self.jobs_button.setText(f"Jobs ({active})" if active else "Jobs")

    def _on_jobs_job_changed(self, job_id: int) -> None:
        self._show_engine_state()

    def _on_jobs_job_finished(self, job_id: int, status: str) -> None:
        self._show_engine_state()
        record = self.services.library.jobs.get(job_id)
        show = ("Show jobs", self._show_jobs)
        if status == "failed":
            error = record.error
            self.services.toasts.error(
                f"{record.title} failed",
                f"{error.get('title', '')}. {error.get('what', '')}".strip(". "),
                show,
            )
        elif status == "finished" and record.kind != "steer":  # its result is in sight already
            self.services.toasts.success(f"{record.title}", "Finished")
        elif status == "interrupted":
            self.services.toasts.warning(f"{record.title}", "Was interrupted", show)
        took = seconds_between(record.started_at, record.ended_at) or 0.0
        settings = self.services.settings
        if (
            settings.get("notify")
            and took >= settings.get("notify_after")
            and status != "cancelled"
        ):
            self._notify(record.title, f"{status.capitalize()} after {formatting.duration(took)}")

    def _notify(self, title: str, text: str) -> None:
        """A system notification, where there is such a thing and the window is not in use."""
        if self.isActiveWindow() or not QSystemTrayIcon.isSystemTrayAvailable():
            return
        tray = QSystemTrayIcon(self.windowIcon(), self)
        tray.show()
        tray.showMessage(title, text)
        QTimer.singleShot(10_000, tray, tray.deleteLater)

    # --- state and the end ----------------------------------------------------------------------

    def _stored_state(self, tab_name: str) -> dict[str, Any]:
        try:
            state = json.loads(str(self._store.value(f"pages/{tab_name}", "{}")))
        except ValueError:
            return {}
        return state if isinstance(state, dict) else {}

    def _restore_geometry(self) -> None:
        screen = QGuiApplication.primaryScreen().availableGeometry().size()
        self.setMinimumSize(QSize(960, 600).boundedTo(screen))
        self.resize(QSize(1440, 900).boundedTo(screen))
        geometry = self._store.value("geometry")
        if isinstance(geometry, QByteArray):
            self.restoreGeometry(geometry)
        name = str(self._store.value("tab", "datasets"))
        index = next((i for i, tab in enumerate(TABS) if tab.name == name), 0)
        self.tabs.setCurrentIndex(index)

    def save_state(self) -> None:
        self._store.setValue("geometry", self.saveGeometry())
        self._store.setValue("state", self.saveState())
        self._store.setValue("tab", self.current_tab)
        for name, page in self._pages.items():
            if name not in self.failed_pages:
                try:
                    self._store.setValue(f"pages/{name}", json.dumps(page.save_state()))
                except Exception:
                    log.exception("The state of the %s tab cannot be kept", name)
        self._store.sync()

    def closeEvent(self, event: QCloseEvent) -> None:
        if self._closing:
            event.accept()
            return
        if self._services is None:
            self._closing = True
            event.accept()
            self.closed.emit(True)
            return
        running = self.services.jobs.running()
        if running:
            titles = [self.services.library.jobs.get(job_id).title for job_id in running]
            answer = CloseDialog(titles, self).exec()
            if answer == CloseDialog.STAY:
                event.ignore()
                return
            if answer == CloseDialog.WHEN_DONE and not self.services.jobs.shutdown(
                keep_running=True
            ):
                event.ignore()
                self.services.jobs.idle.connect(self.close)
                self.services.toasts.info(
                    "Closing when the jobs have ended", "No new work is taken."
                )
                self.showMinimized()
                return
        self._closing = True
        self.setEnabled(False)
        self.header.show_state("stopping…" if running else "")
        self.save_state()
        self.status.close_down()
        clean = self.services.jobs.shutdown() and self.services.background.wait(5)
        self.services.changes.close()
        event.accept()
        self.closed.emit(clean)

    def changeEvent(self, event: QEvent) -> None:
        super().changeEvent(event)
        if event.type() == QEvent.Type.WindowStateChange:
            self.actions_by_id["full_screen"].setChecked(self.isFullScreen())
