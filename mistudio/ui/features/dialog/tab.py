"""What the tabs of the dialog share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import QObject
from PySide6.QtWidgets import QLayout, QWidget

from mistudio import formatting
from mistudio.errors import explain
from mistudio.ui.widgets import ErrorPanel, Surface, Text, add, column, scrolling

if TYPE_CHECKING:
    from mistudio.ui.features.dialog.dialog import FeatureDialog


class FeatureTab(QWidget):
    """Built when it is first looked at; then it follows the dialog's feature while it is shown."""

    def __init__(self, dialog: FeatureDialog) -> None:
        super().__init__()
        self.dialog = dialog
        self.services = dialog.services
        self.feature = -1
        self._is_built = False

    def look_at(self, feature: int) -> None:
        changed = feature != self.feature
        self.feature = feature
        if changed:
            self.read()
        if not self._is_built:
            self._is_built = True
            self.build()
        if changed:
            self.show_feature()

    def read(self) -> None:
        """Start what is read in the background before anything is built: both take a while."""

    def build(self) -> None:
        raise NotImplementedError

    def show_feature(self) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        """Save what was typed and not saved yet."""

    def in_background(
        self,
        read: Callable[[], Any],
        then: Callable[[Any], None],
        or_else: Callable[[Exception], None],
    ) -> None:
        """`then` and `or_else` are called for the feature that is shown by then only."""
        call = _Answer(self, self.feature, then, or_else)
        self.services.background.run(read, call.deliver, call.fail)

    def value(self, name: str) -> float | None:
        return self.dialog.value(name)

    def sample(self) -> str:
        """`1,234,567 tokens in 9,876 contexts`"""
        meta = self.dialog.columns.meta
        return (
            f"{formatting.count(meta.tokens)} tokens in {formatting.count(meta.contexts)} contexts"
        )


class _Answer(QObject):
    """Carries one background result with the feature it is about."""

    def __init__(
        self,
        tab: FeatureTab,
        feature: int,
        then: Callable[[Any], None],
        or_else: Callable[[Exception], None],
    ) -> None:
        super().__init__(tab)
        self._tab, self._feature, self._then, self._or_else = tab, feature, then, or_else

    def deliver(self, result: Any) -> None:
        if self._tab.feature == self._feature:
            self._then(result)
        self.deleteLater()

    def fail(self, error: Exception) -> None:
        if self._tab.feature == self._feature:
            self._or_else(error)
        self.deleteLater()


def problem(error: Exception) -> ErrorPanel:
    known = explain(error)
    if known is not None:
        return ErrorPanel.of_error(known)
    return ErrorPanel("This cannot be shown", f"{type(error).__name__}: {error}")


def sentence(error: Exception) -> str:
    """The same in one line, for where something else is shown already."""
    known = explain(error)
    if known is None:
        return f"Something went wrong: {type(error).__name__}: {error}"
    return f"{known.title}. {known.what} {known.next_step}".strip()


def scrolled(*items: QWidget | QLayout, margins: int = 24) -> QWidget:
    """A column of these that scrolls up and down."""
    inner = QWidget()
    body = column(14, margins)
    add(body, *items)
    body.addStretch(1)
    inner.setLayout(body)
    return scrolling(inner)


def method(text: str) -> Surface:
    """How the numbers of a tab came about."""
    box = Surface("note", "slate", 12)
    box.add(Text(text, "small", wrap=True))
    return box
