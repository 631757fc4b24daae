"""What holds for every widget: a name for those that cannot see it, and text that can be read."""

from __future__ import annotations

from PySide6.QtGui import QAccessible, QFontInfo
from PySide6.QtWidgets import (
    QAbstractButton,
    QAbstractItemView,
    QAbstractSlider,
    QAbstractSpinBox,
    QComboBox,
    QHeaderView,
    QLabel,
    QLineEdit,
    QPlainTextEdit,
    QProgressBar,
    QScrollBar,
    QTabBar,
    QTextEdit,
    QWidget,
)

INTERACTIVE = (
    QAbstractButton,
    QAbstractItemView,
    QAbstractSlider,
    QAbstractSpinBox,
    QComboBox,
    QLineEdit,
    QPlainTextEdit,
    QProgressBar,
    QTabBar,
    QTextEdit,
)


def _is_part_of_another(widget: QWidget) -> bool:
    """Qt's own inner parts (a spin box's field, a tab bar's arrows, a combo's list)."""
    parent = widget.parentWidget()
    if parent is not None and isinstance(parent.parentWidget(), QComboBox):
        return True  # the list that a combo box opens
    name = widget.objectName()
    return (
        isinstance(widget, QScrollBar | QHeaderView)
        or name.startswith("qt_")
        or isinstance(parent, QAbstractSpinBox | QTabBar | QComboBox | QLineEdit)
        or type(widget).__name__ == "QComboBoxListView"
        or (isinstance(widget, QTabBar) and name == "qt_tabwidget_tabbar")
    )


def nameless(root: QWidget) -> list[str]:
    """Interactive widgets without an accessible name, as `Class (object name) in Parent`."""
    found = []
    for widget in root.findChildren(QWidget):
        if not isinstance(widget, INTERACTIVE) or _is_part_of_another(widget):
            continue
        interface = QAccessible.queryAccessibleInterface(widget)
        text = interface.text(QAccessible.Text.Name) if interface else widget.accessibleName()
        if not text.strip():
            found.append(
                f"{type(widget).__name__} ({widget.objectName()}) in "
                f"{type(widget.parentWidget()).__name__}"
            )
    return found


def too_small(root: QWidget, pixels: int = 14) -> list[str]:
    """Visible texts in a font below `pixels`."""
    kinds = (
        QLabel,
        QAbstractButton,
        QComboBox,
        QLineEdit,
        QTabBar,
        QPlainTextEdit,
        QAbstractItemView,
    )
    found = []
    for widget in root.findChildren(QWidget):
        if isinstance(widget, kinds) and widget.isVisible():
            size = QFontInfo(widget.font()).pixelSize()
            if size < pixels:
                found.append(f"{type(widget).__name__}: {size} px")
    return found


def cut_off(root: QWidget) -> list[str]:
    """Labels and buttons whose text needs more room than they have (elided labels may)."""
    found = []
    for widget in root.findChildren(QWidget):
        if not widget.isVisible() or type(widget).__name__ == "ElidedLabel":
            continue
        if isinstance(widget, QLabel) and widget.text() and not widget.wordWrap():
            need = widget.fontMetrics().horizontalAdvance(widget.text())
            if need > widget.contentsRect().width() + 1:
                found.append(f"label {widget.text()!r}: {need} > {widget.contentsRect().width()}")
        elif (
            isinstance(widget, QAbstractButton)
            and widget.text()
            and widget.sizeHint().width() > widget.width() + 1
        ):
            found.append(f"button {widget.text()!r}")
    return found


def squeezed(root: QWidget) -> list[str]:
    """Texts that wrap and have too little height, and fields and choices whose text, or what it
    says where they are empty, is wider than they are."""
    found = []
    for widget in root.findChildren(QWidget):
        if not widget.isVisible():
            continue
        if isinstance(widget, QLabel) and widget.wordWrap() and widget.text():
            need, room = widget.heightForWidth(widget.width()), widget.height()
        elif isinstance(widget, QLineEdit) and not isinstance(widget.parent(), QComboBox):
            text = widget.text() or widget.placeholderText()
            need, room = widget.fontMetrics().horizontalAdvance(text), widget.width() - 12
        elif isinstance(widget, QComboBox) and not widget.isEditable():
            need = widget.fontMetrics().horizontalAdvance(widget.currentText())
            room = widget.width() - 30  # its frame and arrow
        else:
            continue
        if need > room + 1:
            said = getattr(widget, "text", getattr(widget, "currentText", str))()
            found.append(f"{type(widget).__name__} {said!r}: {need} > {room}")
    return found
