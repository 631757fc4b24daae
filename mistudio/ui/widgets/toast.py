"""Short messages at the window's lower right; errors stay until they are closed."""

from __future__ import annotations

from collections.abc import Callable

from PySide6.QtCore import QEvent, QObject, Qt, QTimer
from PySide6.QtGui import QAccessible, QAccessibleEvent, QEnterEvent, QKeyEvent
from PySide6.QtWidgets import QFrame, QWidget

from mistudio.errors import UserError
from mistudio.ui.theme import tokens
from mistudio.ui.widgets.buttons import Button, IconButton
from mistudio.ui.widgets.containers import column, picture, row
from mistudio.ui.widgets.text import Text

_KINDS = {
    "info": ("info", tokens.BLUE),
    "success": ("circle-check", tokens.EMERALD),
    "warning": ("triangle-alert", tokens.YELLOW),
    "error": ("circle-alert", tokens.RED),
}
_SHOWN = 4  # older ones make room


class Toast(QFrame):
    """One message. The mouse over it holds it; Esc or the cross closes it."""

    def __init__(
        self,
        area: ToastArea,
        kind: str,
        title: str,
        text: str,
        action: tuple[str, Callable[[], None]] | None,
        seconds: float,
    ) -> None:
        super().__init__(area.window_widget)
        self.setProperty("surface", "toast")
        self.setAttribute(Qt.WidgetAttribute.WA_ShowWithoutActivating)
        self.setFixedWidth(400)
        self.kind, self._area, self._action = kind, area, action
        self.message = f"{title}. {text}".strip(". ") if text else title
        icon, colour = _KINDS[kind]
        texts = column(4)
        texts.addWidget(Text(title, "body", wrap=True))
        if text:
            texts.addWidget(Text(text, "small", wrap=True))
        if action:
            button = Button(action[0], "link")
            button.clicked.connect(self._on_action_clicked)
            texts.addLayout(row(button, None))
        close = IconButton("x", "Close message", size=16)
        close.clicked.connect(self._on_close_clicked)
        line = row(picture(icon, colour, 20), texts, close)
        line.setStretch(1, 1)
        for index in (0, 2):
            line.setAlignment(line.itemAt(index).widget(), Qt.AlignmentFlag.AlignTop)
        line.setContentsMargins(14, 12, 10, 12)
        self.setLayout(line)
        self.setAccessibleName(f"{kind}: {self.message}")
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.timeout.connect(self.dismiss)
        if seconds:
            self._timer.start(round(seconds * 1000))

    def dismiss(self) -> None:
        self._area.remove(self)

    def enterEvent(self, event: QEnterEvent) -> None:
        self._timer.setProperty("left", self._timer.remainingTime())
        self._timer.stop()
        super().enterEvent(event)

    def leaveEvent(self, event: QEvent) -> None:
        left = self._timer.property("left")
        if left is not None and left >= 0:
            self._timer.start(max(left, 1500))
        super().leaveEvent(event)

    def keyPressEvent(self, event: QKeyEvent) -> None:
        if event.key() == Qt.Key.Key_Escape:
            self.dismiss()
        else:
            super().keyPressEvent(event)

    def _on_close_clicked(self, checked: bool = False) -> None:
        self.dismiss()

    def _on_action_clicked(self, checked: bool = False) -> None:
        assert self._action
        self.dismiss()
        self._action[1]()


class ToastArea(QObject):
    """Stacks toasts over a window; the newest lies lowest."""

    def __init__(self, window_widget: QWidget, seconds: float = 5.0) -> None:
        super().__init__(window_widget)
        self.window_widget = window_widget
        self._seconds = seconds
        self._toasts: list[Toast] = []
        self.anchor = window_widget  # toasts stand at its lower right corner
        window_widget.installEventFilter(self)

    @property
    def toasts(self) -> list[Toast]:
        return list(self._toasts)

    def info(
        self, title: str, text: str = "", action: tuple[str, Callable[[], None]] | None = None
    ) -> Toast:
        return self.show("info", title, text, action)

    def success(
        self, title: str, text: str = "", action: tuple[str, Callable[[], None]] | None = None
    ) -> Toast:
        return self.show("success", title, text, action)

    def warning(
        self, title: str, text: str = "", action: tuple[str, Callable[[], None]] | None = None
    ) -> Toast:
        return self.show("warning", title, text, action)

    def error(
        self,
        error: UserError | str,
        text: str = "",
        action: tuple[str, Callable[[], None]] | None = None,
    ) -> Toast:
        """A known error in its own words, or a title and a text. Stays until closed."""
        if isinstance(error, UserError):
            return self.show(
                "error", error.title, f"{error.what} {error.next_step}".strip(), action, 0
            )
        return self.show("error", error, text, action, 0)

    def show(
        self,
        kind: str,
        title: str,
        text: str = "",
        action: tuple[str, Callable[[], None]] | None = None,
        seconds: float | None = None,
    ) -> Toast:
        """`seconds` 0: stays until it is closed."""
        toast = Toast(
            self, kind, title, text, action, self._seconds if seconds is None else seconds
        )
        self._toasts.append(toast)
        while len(self._toasts) > _SHOWN:
            self.remove(self._toasts[0])
        toast.show()
        self._place()
        QAccessible.updateAccessibility(QAccessibleEvent(toast, QAccessible.Event.Alert))
        return toast

    def remove(self, toast: Toast) -> None:
        if toast in self._toasts:
            self._toasts.remove(toast)
            toast.hide()
            toast.deleteLater()
            self._place()

    def _place(self) -> None:
        corner = self.anchor.mapTo(self.window_widget, self.anchor.rect().bottomRight())
        bottom, right = corner.y() - 16, corner.x() - 24
        for toast in reversed(self._toasts):
            height = max(toast.heightForWidth(toast.width()), toast.sizeHint().height())
            toast.resize(toast.width(), height)
            bottom -= height
            toast.move(right - toast.width(), bottom)
            toast.raise_()
            bottom -= 8

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        if event.type() == QEvent.Type.Resize and self._toasts:
            self._place()
        return super().eventFilter(watched, event)
