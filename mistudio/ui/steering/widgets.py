"""Parts of the Steering tab: a feature with its strength, a pane of text, a line of the history."""

from __future__ import annotations

from collections.abc import Sequence

from PySide6.QtCore import QRectF, QSize, Qt, QTimer, Signal
from PySide6.QtGui import (
    QColor,
    QFont,
    QPainter,
    QPaintEvent,
    QPen,
    QTextCharFormat,
    QTextCursor,
    QWheelEvent,
)
from PySide6.QtWidgets import (
    QApplication,
    QSizePolicy,
    QSlider,
    QStyle,
    QStyleOptionSlider,
    QTextEdit,
    QWidget,
)

from mistudio.library.records import Generation
from mistudio.ui.steering.comparison import Run
from mistudio.ui.steering.presenter import (
    STRONGEST,
    FeatureItem,
    coefficient,
    percent_of_norm,
    significant,
)
from mistudio.ui.theme import fonts, set_look, tokens
from mistudio.ui.times import clock_time
from mistudio.ui.widgets import (
    Button,
    ElidedLabel,
    FloatBox,
    IconButton,
    Surface,
    Text,
    column,
    row,
)
from mistudio.ui.widgets.token_strip import heat, ink_on

_STEPS = 100  # slider positions per unit of strength
_SNAP = _STEPS // 10
PANE_HEIGHT, PANE_MOST = 200, 560


class StrengthSlider(QSlider):
    """From -5 to +5 in steps of 0.1; filled from the middle, as 0 is where nothing happens."""

    def __init__(self, name: str, parent: QWidget | None = None) -> None:
        super().__init__(Qt.Orientation.Horizontal, parent)
        self.setRange(round(-STRONGEST * _STEPS), round(STRONGEST * _STEPS))
        self.setSingleStep(_SNAP)
        self.setPageStep(5 * _SNAP)
        self.setAccessibleName(name)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)

    def wheelEvent(self, event: QWheelEvent) -> None:
        event.ignore()

    def paintEvent(self, event: QPaintEvent) -> None:
        option = QStyleOptionSlider()
        self.initStyleOption(option)
        handle = self.style().subControlRect(
            QStyle.ComplexControl.CC_Slider, option, QStyle.SubControl.SC_SliderHandle, self
        )
        x, y = handle.center().x() + 0.5, self.height() / 2
        middle = self.width() / 2
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(QColor(tokens.RAISED_HOVER))
        painter.drawRoundedRect(QRectF(0, y - 3, self.width(), 6), 3, 3)
        painter.setBrush(QColor(tokens.PRIMARY))
        painter.drawRect(QRectF(min(x, middle), y - 3, abs(x - middle), 6))
        painter.setBrush(QColor(tokens.EDGE))
        painter.drawRect(QRectF(middle - 1, y - 7, 2, 14))
        painter.setBrush(QColor(tokens.EMERALD if self.isEnabled() else tokens.EDGE))
        if self.hasFocus():
            painter.setPen(QPen(QColor(tokens.WHITE), 2))
        painter.drawEllipse(QRectF(x - 8, y - 8, 16, 16))


class FeatureCard(Surface):
    """One chosen feature: strength by slider, number or button, in three units at once."""

    strength_changed = Signal(int, float)
    removed = Signal(int)

    def __init__(self, feature: int, strength: float, parent: QWidget | None = None) -> None:
        super().__init__("row", None, 14, parent)
        self.feature = feature
        self._max: float | None = None
        self._median: float | None = None
        self.setAccessibleName(f"Feature {feature}")
        self._text = ElidedLabel("", "small")
        self._text.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Preferred)
        self.remove = IconButton("x", f"Remove feature {feature}", tokens.RED, size=18)
        self.remove.clicked.connect(self._on_remove_clicked)
        head = row(Text(f"#{feature}", "mono", "emerald"), self._text, self.remove)
        head.setStretch(1, 1)
        self.box = FloatBox(strength, -STRONGEST, STRONGEST, 0.1, 2, " × max")
        self.box.setAccessibleName(f"Strength of feature {feature}")
        self.box.setToolTip("In multiples of the largest activation that discovery saw")
        self.box.setFixedWidth(152)
        self.box.valueChanged.connect(self._on_box_value_changed)
        self.units = Text("—", "small", "emerald", wrap=True)
        label = Text("Strength", "label")
        label.setBuddy(self.box)
        numbers = row(label, self.box, 4, self.units)
        numbers.setStretch(3, 1)
        self.slider = StrengthSlider(f"Strength of feature {feature}, slider")
        self.slider.setValue(round(strength * _STEPS))
        self.slider.valueChanged.connect(self._on_slider_value_changed)
        ticks = row(spacing=0)
        for tick, side in (
            ("-5.0 (suppress)", Qt.AlignmentFlag.AlignLeft),
            ("0.0", Qt.AlignmentFlag.AlignHCenter),
            ("+5.0 (amplify)", Qt.AlignmentFlag.AlignRight),
        ):
            text = Text(tick, "helper")
            text.setAlignment(side)
            ticks.addWidget(text, 1)
        buttons = row(spacing=8)
        for name, value in (("Suppress", -2.0), ("Reset", 0.0), ("Amplify", 2.0)):
            button = Button(name, "small", tooltip=f"Strength {value:+.1f}" if value else "0.0")
            button.setAccessibleName(f"{name} feature {feature}")
            button.clicked.connect(lambda checked=False, value=value: self.box.setValue(value))
            buttons.addWidget(button, 1)
        scale = column(2)
        scale.addWidget(self.slider)
        scale.addLayout(ticks)
        self.body.setSpacing(10)
        self.add(head, numbers, scale, buttons)

    @property
    def strength(self) -> float:
        return self.box.value()

    def show_item(self, item: FeatureItem | None, median_norm: float | None) -> None:
        """What is known of the feature; None while that is still read."""
        self._max = item.max_activation if item else None
        self._median = median_norm
        self._text.setText(item.text if item else "Reading…")
        self._show_units()

    def set_strength(self, strength: float) -> None:
        """Show another strength without telling of a change."""
        was_blocked = self.box.blockSignals(True)
        self.box.setValue(strength)
        self.box.blockSignals(was_blocked)
        self._follow_box()

    def _follow_box(self) -> None:
        was_blocked = self.slider.blockSignals(True)
        self.slider.setValue(round(self.box.value() * _STEPS))
        self.slider.blockSignals(was_blocked)
        self.slider.update()
        self._show_units()

    def _show_units(self) -> None:
        if self._max is not None and self._max <= 0:
            self.units.setText("never fired: it cannot steer")
            self.units.set_tone("yellow")
            return
        raw = coefficient(self.strength, self._max)
        percent = percent_of_norm(raw, self._median)
        sign = "+" if raw is not None and raw > 0 else ""
        self.units.setText(f"= {sign}{significant(raw)} raw • {significant(percent)} % of the norm")
        self.units.setToolTip(
            f"Raw coefficient: strength × {significant(self._max, 4)}, the feature's largest "
            "activation. It is added along the feature's direction, whose length is 1.\n"
            f"Norm: {significant(self._median, 4)}, the median length of the layer's activations."
        )

    def _on_box_value_changed(self, value: float) -> None:
        self._follow_box()
        self.strength_changed.emit(self.feature, value)

    def _on_slider_value_changed(self, value: int) -> None:
        self.box.setValue(round(value / _SNAP) * _SNAP / _STEPS)

    def _on_remove_clicked(self, checked: bool = False) -> None:
        self.removed.emit(self.feature)


class FoundRow(Surface):
    """A feature that was found or suggested, with its Add button."""

    chosen = Signal(int)

    def __init__(
        self, feature: int, text: str, there: bool = False, parent: QWidget | None = None
    ) -> None:
        super().__init__("tile", None, 8, parent)
        self.feature = feature
        number = Text(f"#{feature}", "mono", "emerald")
        number.setMinimumWidth(52)
        self.button = Button("Added" if there else "Add", "small", "check" if there else "plus")
        self.button.setEnabled(not there)
        self.button.setAccessibleName(f"Add feature {feature}, {text}")
        self.button.clicked.connect(self._on_button_clicked)
        line = row(number, ElidedLabel(text, "small"), self.button, spacing=8)
        line.setStretch(1, 1)
        self.add(line)

    def _on_button_clicked(self, checked: bool = False) -> None:
        self.chosen.emit(self.feature)


class _GrowingText(QTextEdit):
    """As tall as its text between two limits, so that the page scrolls and not the pane."""

    def __init__(self, name: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setReadOnly(True)
        self.setTabChangesFocus(True)
        self.setAccessibleName(name)
        self.setProperty("surface", "clear")
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setMinimumHeight(PANE_HEIGHT)
        self.document().documentLayout().documentSizeChanged.connect(self._on_size_changed)

    def _on_size_changed(self, *_: object) -> None:
        height = round(self.document().size().height()) + 20
        self.setMinimumHeight(min(max(height, PANE_HEIGHT), PANE_MOST))

    def sizeHint(self) -> QSize:
        return QSize(320, self.minimumHeight())


class TextPane(Surface):
    """One continuation: streaming as plain text, then with its differences marked."""

    def __init__(
        self, title: str, tone: str, accent: bool = False, parent: QWidget | None = None
    ) -> None:
        super().__init__("card", None, 16, parent)
        if accent:
            self.setProperty("accent", "true")
        self._plain = ""
        self.title = title
        self.setAccessibleName(title)
        self.copy = IconButton("copy", f"Copy: {title}", size=18)
        self.copy.clicked.connect(self._on_copy_clicked)
        self._copied = QTimer(self)
        self._copied.setSingleShot(True)
        self._copied.setInterval(1500)
        self._copied.timeout.connect(self._on_copied_timeout)
        dot = Text("●", "small", tone)
        head = row(dot, Text(title, "card"), None, self.copy, spacing=10)
        head.setContentsMargins(8, 0, 4, 0)  # in line with the text below, which has a padding
        self.add(head)
        self.view = _GrowingText(title)
        self.view.setPlaceholderText("No generation yet")
        self.add(self.view)
        self.body.setStretch(1, 1)
        self.caption = Text("", "helper", wrap=True)
        self.caption.setContentsMargins(8, 0, 8, 0)
        self.caption.hide()
        self.add(self.caption)
        self.set_text("")

    @property
    def text(self) -> str:
        return self._plain

    def set_text(self, text: str, placeholder: str = "No generation yet") -> None:
        """Show plain text; while it grows only what is new is drawn."""
        self.view.setPlaceholderText(placeholder)
        if text.startswith(self._plain) and self._plain and not self.caption.isVisible():
            cursor = QTextCursor(self.view.document())
            cursor.movePosition(QTextCursor.MoveOperation.End)
            cursor.insertText(text[len(self._plain) :])
        elif text != self.view.toPlainText() or self.caption.isVisible():
            self.view.setCurrentCharFormat(QTextCharFormat())
            self.view.setPlainText(text)
        self._plain = text
        self.caption.hide()
        self.copy.setEnabled(bool(text))

    def set_runs(
        self,
        text: str,
        parts: Sequence[Run],
        caption: str,
        mark: str,
        shading: Sequence[float] | None = None,
    ) -> None:
        """Show a finished text: what both share in a quiet colour, words of its own underlined,
        and behind each token its `shading` where given (nats)."""
        self.view.clear()
        cursor = QTextCursor(self.view.document())
        cursor.beginEditBlock()
        most = max(shading, default=0.0) if shading else 0.0
        for part in parts:
            cursor.insertText(part.text, _format(part, mark, shading, most))
        cursor.endEditBlock()
        self._plain = text
        self.view.setPlaceholderText("It ended at once: no text")
        self.caption.setText(caption)
        self.caption.setVisible(bool(caption))
        self.copy.setEnabled(bool(text))

    def _on_copy_clicked(self, checked: bool = False) -> None:
        QApplication.clipboard().setText(self._plain)
        self.copy.set_icon("check", f"Copied: {self.title}", tokens.EMERALD)
        self._copied.start()

    def _on_copied_timeout(self) -> None:
        self.copy.set_icon("copy", f"Copy: {self.title}")


def _format(part: Run, mark: str, shading: Sequence[float] | None, most: float) -> QTextCharFormat:
    look = QTextCharFormat()
    colour = tokens.HELPER if part.common else tokens.TEXT
    if part.only_here:
        colour = mark
        look.setFontUnderline(True)
        look.setFontWeight(QFont.Weight.Medium)
    if shading and 0 <= part.token < len(shading):
        value = shading[part.token]
        behind = tokens.blend(tokens.PURPLE, tokens.CARD, heat(value, most))
        look.setBackground(QColor(behind))
        colour = ink_on(behind)
        look.setToolTip(f"Token {part.token + 1}: KL {significant(value)} nats")
    look.setForeground(QColor(colour))
    look.setFont(
        fonts.sans(weight=QFont.Weight.Medium if part.only_here else QFont.Weight.Normal),
        QTextCharFormat.FontPropertiesInheritanceBehavior.FontPropertiesSpecifiedOnly,
    )
    if part.only_here:
        look.setFontUnderline(True)
    return look


def features_text(features: Sequence[Sequence[float]]) -> str:
    """`#12 × +2, #40 × -1.5`."""
    return ", ".join(f"#{int(feature)} × {strength:+g}" for feature, strength in features)


class HistoryRow(Surface):
    """An earlier generation; Open brings back its form and its result."""

    opened = Signal(int)

    def __init__(
        self, generation: Generation, current: bool, parent: QWidget | None = None
    ) -> None:
        super().__init__("tile", None, 10, parent)
        self.generation_id = generation.id
        request, result = generation.request, generation.result
        self.body.setSpacing(2)
        variants = result.get("variants") or [{}]
        what = features_text(request.get("features", []))
        kl = significant(variants[0].get("kl_per_token"))
        texts = column(2)
        texts.addWidget(ElidedLabel(str(request.get("prompt", "")), "small"))
        texts.addWidget(
            ElidedLabel(f"{clock_time(generation.created_at)} • {what} • KL {kl} nats", "helper")
        )
        self.button = Button("Shown" if current else "Open", "small")
        self.button.setEnabled(not current)
        self.button.setAccessibleName(f"Open the generation of {clock_time(generation.created_at)}")
        self.button.clicked.connect(self._on_button_clicked)
        line = row(texts, self.button)
        line.setStretch(0, 1)
        self.add(line)
        if current:
            set_look(self, current="true")

    def _on_button_clicked(self, checked: bool = False) -> None:
        self.opened.emit(self.generation_id)
