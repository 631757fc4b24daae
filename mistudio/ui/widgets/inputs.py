"""Number fields and choices. Use these, not Qt's own: a turn of the wheel over a form scrolls the
form and never changes a value, and the text of a spin box stands where a style sheet cannot put it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from PySide6.QtCore import Qt
from PySide6.QtGui import QPaintEvent, QStandardItemModel, QWheelEvent
from PySide6.QtWidgets import (
    QComboBox,
    QDoubleSpinBox,
    QSpinBox,
    QStyle,
    QStyleOptionComboBox,
    QStylePainter,
    QWidget,
)

_TEXT_LEFT = 11


class IntBox(QSpinBox):
    """A whole number from `low` to `high`."""

    def __init__(
        self,
        value: int = 0,
        low: int = 0,
        high: int = 1_000_000,
        step: int = 1,
        suffix: str = "",
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.lineEdit().setTextMargins(_TEXT_LEFT, 0, 0, 0)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setGroupSeparatorShown(True)
        self.setRange(low, high)
        self.setSingleStep(step)
        self.setSuffix(suffix)
        self.setValue(value)

    def wheelEvent(self, event: QWheelEvent) -> None:
        event.ignore()


class FloatBox(QDoubleSpinBox):
    """A number from `low` to `high` with this many decimals."""

    def __init__(
        self,
        value: float = 0.0,
        low: float = 0.0,
        high: float = 1.0,
        step: float = 0.1,
        decimals: int = 2,
        suffix: str = "",
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.lineEdit().setTextMargins(_TEXT_LEFT, 0, 0, 0)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setDecimals(decimals)
        self.setRange(low, high)
        self.setSingleStep(step)
        self.setSuffix(suffix)
        self.setValue(value)

    def wheelEvent(self, event: QWheelEvent) -> None:
        event.ignore()


class Choice(QComboBox):
    """One of several: `Choice([("topk", "TopK"), ...])`, or plain texts; `value` is the chosen."""

    def __init__(
        self, options: Iterable[tuple[Any, str] | str] = (), parent: QWidget | None = None
    ) -> None:
        super().__init__(parent)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setMinimumContentsLength(8)
        self.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.set_options(options)

    def set_options(self, options: Iterable[tuple[Any, str] | str]) -> None:
        """Replace the options; what was chosen stays chosen where it still exists."""
        chosen = self.value
        was_blocked = self.blockSignals(True)
        self.clear()
        for option in options:
            value, text = option if isinstance(option, tuple) else (option, option)
            self.addItem(text, value)
        self.set_value(chosen)
        self.blockSignals(was_blocked)
        if self.value != chosen:
            self.currentIndexChanged.emit(self.currentIndex())

    @property
    def value(self) -> Any:
        return self.currentData()

    def set_value(self, value: Any) -> bool:
        """Choose an option; False where there is no such one (the first is chosen then)."""
        index = next((i for i in range(self.count()) if self.itemData(i) == value), -1)
        self.setCurrentIndex(index if index >= 0 else (0 if self.count() else -1))
        return index >= 0

    def disable(self, value: Any, reason: str) -> None:
        """Show an option that cannot be chosen here, with the reason as its tooltip."""
        model = self.model()
        assert isinstance(model, QStandardItemModel)
        for index in range(self.count()):
            if self.itemData(index) == value:
                model.item(index).setEnabled(False)
                model.item(index).setToolTip(reason)

    def wheelEvent(self, event: QWheelEvent) -> None:
        event.ignore()

    def paintEvent(self, event: QPaintEvent) -> None:
        """As Qt paints it, but a text that has no room ends in … instead of in half a letter."""
        painter = QStylePainter(self)
        option = QStyleOptionComboBox()
        self.initStyleOption(option)
        painter.drawComplexControl(QStyle.ComplexControl.CC_ComboBox, option)
        room = self.style().subControlRect(
            QStyle.ComplexControl.CC_ComboBox, option, QStyle.SubControl.SC_ComboBoxEditField, self
        )
        option.currentText = option.fontMetrics.elidedText(
            option.currentText, Qt.TextElideMode.ElideRight, room.width() - 4
        )
        painter.drawControl(QStyle.ControlElement.CE_ComboBoxLabel, option)
