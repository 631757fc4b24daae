"""A feature that steers: its strength in three units, its method, and how far one can trust it."""

from __future__ import annotations

from PySide6.QtCore import QRectF, Qt, Signal
from PySide6.QtGui import QColor, QPainter, QPaintEvent, QPen, QWheelEvent
from PySide6.QtWidgets import QSizePolicy, QSlider, QStyle, QStyleOptionSlider, QWidget

from mistudio.library.steering import Calibration
from mistudio.ui.steering.calibrating import (
    ZONES,
    Calibrating,
    range_text,
    range_tip,
    recommended,
)
from mistudio.ui.steering.feature_index import FeatureItem
from mistudio.ui.steering.request import CALIBRATED, FACTORS, METHODS, Chosen
from mistudio.ui.steering.units import (
    NOTHING,
    STRONGEST,
    coefficient,
    percent_of_norm,
    significant,
)
from mistudio.ui.theme import tokens
from mistudio.ui.widgets import (
    Badge,
    Button,
    Choice,
    ElidedLabel,
    FloatBox,
    IconButton,
    Surface,
    Text,
    column,
    row,
)

SCORE_TIP = (
    "How likely the feature makes its own tokens when it is amplified tenfold, 0 to 1: their "
    "largest probability × (1 − best rank ÷ vocabulary), after one prompt. Features with a high "
    "score steer best (Arad et al. 2025)."
)
CALIBRATE_TIP = (
    "Tries this feature at rising strengths on neutral prompts and measures where the text changes "
    "and where it breaks; also at falling ones where its coefficient is below 0. Takes seconds to "
    "minutes."
)
NOT_CALIBRATED = "Its strengths are no multiples of the maximum: they are not calibrated."
# What Suppress, Reset and Amplify set, and what stands below the slider.
_QUICK = (("Suppress", -2.0), ("Reset", 0.0), ("Amplify", 2.0))
_QUICK_FACTORS = (("Suppress", 0.0), ("Reset", 1.0), ("Amplify", 2.0))
_TICKS = ("-5.0 (suppress)", "0.0", "+5.0 (amplify)")
_TICKS_FACTORS = ("-5.0 (opposite)", "0.0 (none)", "+5.0 (amplify)")
_STEPS = 100  # slider positions per unit of strength
_SNAP = _STEPS // 10
_ZONE_COLOURS = {"green": tokens.EMERALD, "amber": tokens.YELLOW, "red": tokens.RED}
_ZONE_HEIGHTS = {"green": 2, "amber": 4, "red": 6}


class StrengthSlider(QSlider):
    """From -5 to +5 in steps of 0.1; filled from where nothing happens: the middle, or 1 for a
    factor. Below it run the zones of a calibration: the higher the band, the riskier."""

    def __init__(self, name: str, parent: QWidget | None = None) -> None:
        super().__init__(Qt.Orientation.Horizontal, parent)
        self.zones: list[tuple[float, float, str]] = []
        self.neutral = 0.0
        self.setRange(round(-STRONGEST * _STEPS), round(STRONGEST * _STEPS))
        self.setSingleStep(_SNAP)
        self.setPageStep(5 * _SNAP)
        self.setFixedHeight(26)
        self.setAccessibleName(name)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)

    def set_zones(self, zones: list[tuple[float, float, str]]) -> None:
        """Stretches (from, to, zone)."""
        self.zones = zones
        self.update()

    def wheelEvent(self, event: QWheelEvent) -> None:
        event.ignore()

    def _place(self, strength: float) -> float:
        """Where the handle's middle is at a strength."""
        return 8 + (strength + STRONGEST) / (2 * STRONGEST) * (self.width() - 16)

    def paintEvent(self, event: QPaintEvent) -> None:
        option = QStyleOptionSlider()
        self.initStyleOption(option)
        handle = self.style().subControlRect(
            QStyle.ComplexControl.CC_Slider, option, QStyle.SubControl.SC_SliderHandle, self
        )
        x, y = handle.center().x() + 0.5, 9.0
        middle = self._place(self.neutral)
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        painter.setPen(Qt.PenStyle.NoPen)
        for start, end, zone in self.zones:
            painter.setBrush(QColor(_ZONE_COLOURS[zone]))
            left, height = self._place(start), _ZONE_HEIGHTS[zone]
            painter.drawRect(
                QRectF(left, self.height() - height, self._place(end) - left - 1, height)
            )
        painter.setBrush(QColor(tokens.RAISED_HOVER))
        painter.drawRoundedRect(QRectF(0, y - 3, self.width(), 6), 3, 3)
        if self.isEnabled():
            painter.setBrush(QColor(tokens.PRIMARY))
            painter.drawRect(QRectF(min(x, middle), y - 3, abs(x - middle), 6))
        painter.setBrush(QColor(tokens.EDGE))
        painter.drawRect(QRectF(middle - 1, y - 7, 2, 14))
        painter.setBrush(QColor(tokens.EMERALD if self.isEnabled() else tokens.EDGE))
        if self.hasFocus():
            painter.setPen(QPen(QColor(tokens.WHITE), 2))
        painter.drawEllipse(QRectF(x - 8, y - 8, 16, 16))


class FeatureCard(Surface):
    """One chosen feature: strength by slider, number or button; under More its method, and what
    its calibration found."""

    strength_changed = Signal(int, int, float)
    method_changed = Signal(int, int, str)
    removed = Signal(int, int)
    calibrate_wanted = Signal(int, int)
    stop_wanted = Signal(int, int)

    def __init__(self, chosen: Chosen, parent: QWidget | None = None) -> None:
        super().__init__("row", None, 14, parent)
        self.key = chosen.key
        self.feature = feature = chosen.feature
        self._max: float | None = None
        self._median: float | None = None
        self._length: float | None = None
        self._calibration: Calibration | None = None
        self._running: Calibrating | None = None
        self.setAccessibleName(f"Feature {feature}")
        self._add_head()
        self._add_strength(chosen.strength)
        self._add_more()
        self.body.setSpacing(10)
        self.set_chosen(chosen)

    def _add_head(self) -> None:
        feature = self.feature
        self._text = ElidedLabel("", "small")
        self._text.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Preferred)
        self.badge = Badge("", "", "slate")
        self.badge.hide()
        self.remove = IconButton("x", f"Remove feature {feature}", tokens.RED, size=18)
        self.remove.clicked.connect(self._on_remove_clicked)
        head = row(Text(f"#{feature}", "mono", "emerald"), self._text, self.badge, self.remove)
        head.setStretch(1, 1)
        self.add(head)

    def _add_strength(self, strength: float) -> None:
        feature = self.feature
        self.box = FloatBox(strength, -STRONGEST, STRONGEST, 0.1, 2, " × max")
        self.box.setAccessibleName(f"Coefficient of feature {feature}")
        self.box.setFixedWidth(152)
        self.box.valueChanged.connect(self._on_box_value_changed)
        self.units = Text(NOTHING, "small", "emerald", wrap=True)
        label = Text("Coefficient", "label")
        label.setBuddy(self.box)
        numbers = row(label, self.box, self.units)
        numbers.setStretch(2, 1)
        self.slider = StrengthSlider(f"Coefficient of feature {feature}, slider")
        self.slider.setValue(round(strength * _STEPS))
        self.slider.valueChanged.connect(self._on_slider_value_changed)
        ticks = row(spacing=0)
        self.ticks = [Text(tick, "helper") for tick in _TICKS]
        sides = (
            Qt.AlignmentFlag.AlignLeft,
            Qt.AlignmentFlag.AlignHCenter,
            Qt.AlignmentFlag.AlignRight,
        )
        for text, side in zip(self.ticks, sides, strict=True):
            text.setAlignment(side)
            ticks.addWidget(text, 1)
        scale = column(2)
        scale.addWidget(self.slider)
        scale.addLayout(ticks)
        self.quick: list[Button] = []
        buttons = row(spacing=8)
        for place, (name, _) in enumerate(_QUICK):
            button = Button(name, "small")
            button.setAccessibleName(f"{name} feature {feature}")
            button.clicked.connect(lambda checked=False, place=place: self._on_quick(place))
            self.quick.append(button)
            buttons.addWidget(button, 1)
        self.best = Button("Calibrate", "small")
        self.best.clicked.connect(self._on_best_clicked)
        buttons.addWidget(self.best)
        self.more = Button("More", "small", "chevron-down")
        self.more.setCheckable(True)
        self.more.setAccessibleName(f"Method and calibration of feature {feature}")
        self.more.toggled.connect(self._on_more_toggled)
        buttons.addWidget(self.more)
        self.add(numbers, scale, buttons)

    def _add_more(self) -> None:
        feature = self.feature
        self.method = Choice([(key, name) for key, (name, _) in METHODS.items()])
        self.method.setAccessibleName(f"Method for feature {feature}")
        for place, (_, meaning) in enumerate(METHODS.values()):
            self.method.setItemData(place, meaning, Qt.ItemDataRole.ToolTipRole)
        self.method.currentIndexChanged.connect(self._on_method_changed)
        label = Text("Method", "label")
        label.setBuddy(self.method)
        self.meaning = Text("", "helper", wrap=True)
        self.calibrate = Button("Calibrate", "small", "gauge")
        self.calibrate.clicked.connect(self._on_calibrate_clicked)
        self.range = Text("", "helper", wrap=True)
        self.score = Text("", "helper", wrap=True)
        method = row(label, self.method)
        method.setStretch(1, 1)
        ways = row(self.score, self.calibrate)
        ways.setStretch(0, 1)
        self.details = QWidget()
        self.details.setProperty("surface", "clear")
        below = column(8)
        below.addLayout(method)
        below.addWidget(self.meaning)
        below.addWidget(self.range)
        below.addLayout(ways)
        self.details.setLayout(below)
        self.details.hide()
        self.add(self.details)

    # --- showing --------------------------------------------------------------------------------

    @property
    def strength(self) -> float:
        return self.box.value()

    def show_item(
        self,
        item: FeatureItem | None,
        median_norm: float | None,
        length: float | None,
        where: str = "",
    ) -> None:
        """What is known of the feature, its layer's norm and the length of its direction; None
        while that is still read. `where`: its layer, where it is not of the SAE that is shown."""
        self._max = item.max_activation if item else None
        self._median, self._length = median_norm, length
        text = item.text if item else "Reading…"
        self._text.setText(f"{where} • {text}" if where else text)
        self._show_units()

    def show_calibration(
        self,
        calibration: Calibration | None,
        running: Calibrating | None = None,
        score: float | None = None,
    ) -> None:
        """What is known of the strengths with the chosen method, None: nothing yet; what one that
        runs has found so far; and how well the feature steers at all."""
        self._calibration, self._running = calibration, running
        measured = (calibration.curve.get("output_score") or {}) if calibration else {}
        known = measured.get("score") if score is None else score
        self.score.setText(f"Output score: {significant(known, 2)}")
        self.score.setToolTip(SCORE_TIP)
        self._show_running()

    def show_running(self, running: Calibrating | None) -> None:
        """What the calibration that runs has found since."""
        if running != self._running:
            self._running = running
            self._show_running()

    def _show_running(self) -> None:
        running, calibration = self._running, self._calibration
        feature = self.feature
        can_be = self.method.value in CALIBRATED
        told = range_text(calibration) if can_be else NOT_CALIBRATED
        self.range.setText(running.text if running else told)
        if running:
            self.calibrate.setText("Stop")
            self.calibrate.set_icon("square")
            self.calibrate.setAccessibleName(f"Stop calibrating feature {feature}")
            self.calibrate.setToolTip("Stops the calibration; what was known before stays.")
        else:
            self.calibrate.setText("Calibrate again" if calibration else "Calibrate")
            self.calibrate.set_icon("gauge")
            self.calibrate.setAccessibleName(f"Calibrate feature {feature}")
            self.calibrate.setToolTip(CALIBRATE_TIP)
        self.calibrate.setEnabled(running is not None or can_be)
        zones = self._zones
        self.slider.set_zones(zones.zones() if zones else [])
        self._show_zone()

    def _show_best(self) -> None:
        """One click finds the recommended strength, one more sets it."""
        best = recommended(self._calibration, self.strength)
        possible = self.method.value in CALIBRATED and self._running is None
        self.best.setVisible(possible)
        self.best.setEnabled(self._calibration is None or best != 0)
        if self._calibration is None:
            self.best.setText("Calibrate")
            self.best.setToolTip(CALIBRATE_TIP)
            self.best.setAccessibleName(f"Find the recommended strength of feature {self.feature}")
        else:
            self.best.setText("Recommended")
            found = f"Coefficient {best:+g}, as the calibration found"
            self.best.setToolTip(found if best else range_text(self._calibration))
            self.best.setAccessibleName(f"Recommended strength of feature {self.feature}")

    @property
    def _zones(self) -> Calibration | None:
        """Of the chosen method: those that are being measured, else those that were."""
        running = self._running
        if running is not None and running.method == self.method.value:
            return running.so_far
        return self._calibration

    def set_chosen(self, chosen: Chosen) -> None:
        """Show another strength or method without telling of a change."""
        for widget, change in (
            (self.box, lambda: self.box.setValue(chosen.strength)),
            (self.method, lambda: self.method.set_value(chosen.method)),
        ):
            was_blocked = widget.blockSignals(True)
            change()
            widget.blockSignals(was_blocked)
        if chosen.method != "add":
            self.more.setChecked(True)
        self._show_method()
        self._follow_box()

    def _show_method(self) -> None:
        method = str(self.method.value)
        self.meaning.setText(METHODS[method][1])
        uses = method != "ablate"
        for widget in (self.box, self.slider, *self.quick):
            widget.setEnabled(uses)
        for button, (_, value) in zip(self.quick, self._quick_values, strict=True):
            button.setToolTip(f"Coefficient {value:+.1f}" if value else "Coefficient 0.0")
        self.slider.neutral = self._quick_values[1][1]
        self.slider.update()
        ticks = _TICKS_FACTORS if method in FACTORS else _TICKS
        for text, tick in zip(self.ticks, ticks, strict=True):
            text.setText(tick)
        self.box.setSuffix(" ×" if method in FACTORS else " × max")
        self.box.setToolTip(
            "A factor: 1 leaves everything as it is"
            if method in FACTORS
            else "In multiples of the largest activation that discovery saw"
        )

    def _follow_box(self) -> None:
        was_blocked = self.slider.blockSignals(True)
        self.slider.setValue(round(self.box.value() * _STEPS))
        self.slider.blockSignals(was_blocked)
        self.slider.update()
        self._show_units()
        self._show_zone()

    def _show_units(self) -> None:
        method = self.method.value
        self.units.set_tone("emerald")
        if self._max is not None and self._max <= 0:
            self.units.setText("never fired: it cannot steer")
            self.units.set_tone("yellow")
            return
        if method == "ablate":
            self.units.setText("taken away wherever it is active")
            return
        if method in FACTORS:
            self.units.setText("of what is there • 1 changes nothing")
            return
        raw = coefficient(self.strength, self._max)
        known = None if raw is None or self._length is None else raw * self._length
        percent = percent_of_norm(known, self._median)
        sign = "+" if raw is not None and raw > 0 else ""
        self.units.setText(f"= {sign}{significant(raw)} raw • {significant(percent)} % of the norm")
        self.units.setToolTip(
            f"Raw coefficient: strength × {significant(self._max, 4)}, the feature's largest "
            "activation. It acts along the feature's direction, whose length is "
            f"{significant(self._length)}.\n"
            f"Norm: {significant(self._median, 4)}, the median length of the layer's activations."
        )

    def _show_zone(self) -> None:
        """The zone of the strength as a word beside the name; nothing where it is not known."""
        self.range.setToolTip(range_tip(self._calibration, self.strength))
        self._show_best()
        if self._running is not None:
            self.badge.set_status("running", f"Calibrating {self._running.percent} %", "blue")
            self.badge.setToolTip(self._running.text)
            self.badge.show()
            return
        zone = self._calibration.zone(self.strength) if self._calibration else None
        self.badge.setVisible(zone is not None)
        if zone is not None:
            word, tone, meaning = ZONES[zone]
            self.badge.set_status(zone, word, tone)
            self.badge.setToolTip(f"At this strength {meaning}, as the calibration measured.")

    # --- what the user does ---------------------------------------------------------------------

    def _on_box_value_changed(self, value: float) -> None:
        self._follow_box()
        self.strength_changed.emit(*self.key, value)

    def _on_slider_value_changed(self, value: int) -> None:
        self.box.setValue(round(value / _SNAP) * _SNAP / _STEPS)

    def _on_method_changed(self, index: int) -> None:
        self._show_method()
        self._show_units()
        self.method_changed.emit(*self.key, self.method.value)

    def _on_more_toggled(self, checked: bool) -> None:
        self.details.setVisible(checked)
        self.more.setText("Less" if checked else "More")
        self.more.set_icon("chevron-up" if checked else "chevron-down")

    @property
    def _quick_values(self) -> tuple[tuple[str, float], ...]:
        return _QUICK_FACTORS if self.method.value in FACTORS else _QUICK

    def _on_quick(self, place: int) -> None:
        self.box.setValue(self._quick_values[place][1])

    def _on_best_clicked(self, checked: bool = False) -> None:
        if self._calibration is None:
            self.calibrate_wanted.emit(*self.key)
        else:
            self.box.setValue(recommended(self._calibration, self.strength))

    def _on_calibrate_clicked(self, checked: bool = False) -> None:
        (self.stop_wanted if self._running else self.calibrate_wanted).emit(*self.key)

    def _on_remove_clicked(self, checked: bool = False) -> None:
        self.removed.emit(*self.key)
