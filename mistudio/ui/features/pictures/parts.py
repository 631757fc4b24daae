"""What the three pictures have in common: the legend, the state of what is being made, export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PySide6.QtCore import QRectF, QSize, Qt, Signal
from PySide6.QtGui import QBrush, QColor, QPainter, QPaintEvent, QPen
from PySide6.QtWidgets import (
    QCheckBox,
    QDialog,
    QFileDialog,
    QSizePolicy,
    QStackedLayout,
    QVBoxLayout,
    QWidget,
)

from mistudio import formatting
from mistudio.errors import explain
from mistudio.ui.features.pictures import figures
from mistudio.ui.features.pictures.figures import Figure, Points
from mistudio.ui.features.pictures.scales import NONE, SHADES, Scale
from mistudio.ui.features.pictures.session import Session
from mistudio.ui.theme import fonts, tokens
from mistudio.ui.widgets import (
    Button,
    Choice,
    EmptyState,
    ErrorPanel,
    FormRow,
    IntBox,
    ProgressRow,
    Surface,
    Text,
    clear,
    column,
    row,
)

LEGEND_WIDTH = 208


class Legend(QWidget):
    """The scale of a picture: its title, unit and colours with what they stand for; below, what
    the marks mean. The tooltip gives the definition."""

    def __init__(self, marks: tuple[tuple[str, str], ...] = (), parent: QWidget | None = None):
        """`marks`: ("ring" | "diamond" | "faint" | "hatched", what it means)."""
        super().__init__(parent)
        self.setFixedWidth(fonts.px(LEGEND_WIDTH))
        self.setSizePolicy(QSizePolicy.Policy.Fixed, QSizePolicy.Policy.Expanding)
        self.setAccessibleName("Legend")
        self._scale: Scale | None = None
        self._marks = marks

    def set_scale(self, scale: Scale) -> None:
        self._scale = scale
        self.setToolTip(scale.definition)
        if scale.kind in ("kinds", "steps"):
            told = ", ".join(filter(None, scale.names)) or scale.unit
        else:
            told = " to ".join(text for _, text in scale.ticks(2))
        self.setAccessibleDescription(f"{scale.title}: {told}. {scale.definition}")
        self.update()

    def set_marks(self, marks: tuple[tuple[str, str], ...]) -> None:
        self._marks = marks
        self.update()

    def sizeHint(self) -> QSize:
        return QSize(fonts.px(LEGEND_WIDTH), 320)

    def paintEvent(self, event: QPaintEvent) -> None:
        if self._scale is None:
            return
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        scale, width = self._scale, self.width() - 12
        y = 4.0
        painter.setFont(fonts.sans(tokens.TEXT_SMALL))
        for text, colour in ((scale.title, tokens.TEXT), (scale.unit, tokens.HELPER)):
            if text:
                painter.setPen(QColor(colour))
                flags = Qt.TextFlag.TextWordWrap | Qt.AlignmentFlag.AlignTop
                box = painter.boundingRect(QRectF(6, y, width, 400), int(flags), text)
                painter.drawText(box, int(flags), text)
                y = box.bottom() + 2
        y += 8
        line = painter.fontMetrics().height() + 6
        palette = scale.palette()
        if scale.kind in ("kinds", "steps"):
            for number, name in enumerate(scale.names):
                if name:
                    y = self._swatch(painter, y, line, QColor(scale.colour(number)), name)
        else:
            y = self._bar(painter, scale, y)
        if scale.has_none:
            y = self._swatch(painter, y, line, QColor(int(palette[NONE]) & 0xFFFFFF), scale.none)
        y += 8
        for mark, meaning in self._marks:
            y = self._mark(painter, y, line, mark, meaning)

    def _bar(self, painter: QPainter, scale: Scale, y: float) -> float:
        high, palette = float(fonts.px(160)), scale.palette()
        for shade in range(SHADES):
            part = high / SHADES
            box = QRectF(6, y + high - (shade + 1) * part, 18, part + 0.5)
            painter.fillRect(box, QColor(int(palette[shade]) & 0xFFFFFF))
        line = painter.fontMetrics().height()
        for share, text in scale.ticks():
            at = y + high * (1 - share)
            painter.setPen(QPen(QColor(tokens.HELPER), 1))
            painter.drawLine(24, round(at), 29, round(at))
            painter.setPen(QColor(tokens.LABEL))
            top = min(max(at - line / 2, y - line / 2), y + high - line / 2)
            painter.drawText(QRectF(34, top, self.width() - 36, line), text)
        return y + high + line

    def _swatch(self, painter: QPainter, y: float, line: float, colour: QColor, text: str) -> float:
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(QBrush(colour))
        painter.drawRoundedRect(QRectF(6, y + 4, 14, 14), 3, 3)
        return self._meaning(painter, y, line, text)

    def _mark(self, painter: QPainter, y: float, line: float, mark: str, text: str) -> float:
        painter.setBrush(Qt.BrushStyle.NoBrush)
        middle = QRectF(6, y + 3, 14, 14)
        if mark == "ring":
            painter.setPen(QPen(QColor(tokens.TEXT), 2))
            painter.drawEllipse(middle.adjusted(1, 1, -1, -1))
        elif mark == "diamond":
            painter.setPen(QPen(QColor(tokens.YELLOW), 2))
            painter.save()
            painter.translate(middle.center())
            painter.rotate(45)
            painter.drawRect(QRectF(-5, -5, 10, 10))
            painter.restore()
        elif mark == "hatched":
            painter.setPen(QPen(QColor(tokens.HELPER), 1))
            painter.setBrush(QBrush(QColor(tokens.HELPER), Qt.BrushStyle.BDiagPattern))
            painter.drawRect(middle)
        else:
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(QColor("#2A3648"))
            painter.drawEllipse(middle.adjusted(2, 2, -2, -2))
        return self._meaning(painter, y, line, text)

    def _meaning(self, painter: QPainter, y: float, line: float, text: str) -> float:
        painter.setPen(QColor(tokens.LABEL))
        flags = int(Qt.TextFlag.TextWordWrap | Qt.AlignmentFlag.AlignTop)
        box = painter.boundingRect(QRectF(28, y + 1, self.width() - 34, 200), flags, text)
        painter.drawText(box, flags, text)
        return max(y + line, box.bottom() + 5)


class Place(QWidget):
    """Where a picture stands, or what there is instead: an invitation to make it, how far it is,
    why it could not be made."""

    wanted = Signal()
    cancelled = Signal()

    def __init__(self, picture: QWidget, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.picture = picture
        self._stack = QStackedLayout(self)
        self._stack.addWidget(picture)
        other = QWidget()
        other.setProperty("surface", "clear")
        self._other = column(tokens.GAP, 24)
        other.setLayout(self._other)
        self._stack.addWidget(other)
        self._said: Any = None
        self.progress: ProgressRow | None = None

    def show_picture(self) -> None:
        self._said, self.progress = None, None
        self._stack.setCurrentIndex(0)

    @property
    def shows_picture(self) -> bool:
        return self._stack.currentIndex() == 0

    def show_invitation(
        self, icon: str, sentence: str, action: str, helper: str, error: dict[str, Any] | None
    ) -> None:
        """`action` "" where there is nothing to do here; `error`: the row of one that failed."""
        said = (sentence, action, helper, str(error))
        if not self._begin(said):
            return
        if error is not None:
            self._other.addWidget(ErrorPanel.of_row({**error, "retryable": False}))
        empty = EmptyState(icon, sentence, action, helper)
        empty.action.connect(self.wanted)
        self._other.addWidget(empty)
        self._other.addStretch(1)

    def show_progress(self, title: str, sentence: str, own: bool) -> None:
        """`own`: it can be cancelled here."""
        if not self._begin((title, sentence, own)):
            return
        box = Surface("row", None, 16)
        self.progress = ProgressRow(title)
        cancel = Button("Cancel", "small", "x")
        cancel.clicked.connect(self._on_cancel_clicked)
        cancel.setVisible(own)
        box.add(row(Text(title, "card"), None, cancel), self.progress)
        box.add(Text(sentence, "helper", wrap=True))
        self._other.addWidget(box)
        self._other.addStretch(1)

    def show_error(self, title: str, what: str, next_step: str) -> None:
        if self._begin((title, what, next_step, "error")):
            self._other.addWidget(ErrorPanel(title, what, next_step))
            self._other.addStretch(1)

    def show_busy(self, sentence: str) -> None:
        if self._begin((sentence, "busy")):
            line = Text(sentence, "helper")
            line.setAlignment(Qt.AlignmentFlag.AlignCenter)
            self._other.addWidget(line, 1)

    def _begin(self, said: Any) -> bool:
        """False where that is what stands there."""
        self._stack.setCurrentIndex(1)
        if said == self._said:
            return False
        self._said, self.progress = said, None
        clear(self._other)
        return True

    def _on_cancel_clicked(self, checked: bool = False) -> None:
        self.cancelled.emit()


class ExportDialog(QDialog):
    """In which format and how wide a picture is saved; then where."""

    def __init__(
        self, session: Session, figure: Callable[[bool], Figure], name: str, parent: QWidget
    ) -> None:
        """`figure(as_pixels)` makes it."""
        super().__init__(parent)
        self.setObjectName("export_picture")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setWindowTitle("Save the picture")
        self.setMinimumWidth(fonts.px(460))
        self._session, self._figure, self._name = session, figure, name
        self.format = Choice([("png", "PNG, 300 dots per inch"), ("svg", "SVG, vectors")])
        self.format.setObjectName("format")
        self.width_mm = IntBox(figures.USUAL, figures.NARROWEST, figures.WIDEST, 5, " mm")
        self.width_mm.setObjectName("width")
        self.as_pixels = QCheckBox("Points as one picture (a smaller file)")
        self._told = Text("", "helper", wrap=True)
        save = Button("Save…", "primary", "download")
        save.clicked.connect(self._on_save_clicked)
        self.save_button = save
        cancel = Button("Cancel")
        cancel.clicked.connect(self.reject)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(24, 24, 24, 24)
        layout.setSpacing(tokens.GAP)
        layout.addWidget(Text("Save the picture", "card"))
        layout.addWidget(FormRow("Format", self.format))
        layout.addWidget(
            FormRow("Width", self.width_mm, "A column of a paper is 85 mm, a page 180.")
        )
        layout.addWidget(self.as_pixels)
        layout.addWidget(self._told)
        layout.addLayout(row(None, cancel, save))
        for changed in (self.format.currentIndexChanged, self.width_mm.valueChanged):
            changed.connect(self._show)
        self.as_pixels.toggled.connect(self._show)
        self._show()

    def figure(self) -> Figure:
        return self._figure(self.as_pixels.isChecked() and self.format.value == "svg")

    def _show(self, *_: object) -> None:
        figure, width = self.figure(), self.width_mm.value()
        points = isinstance(figure.body, Points)
        vectors = self.format.value == "svg"
        self.as_pixels.setVisible(points and vectors)
        wide, high = figures.size_of(figure, width)
        if not vectors:
            across = figures.pixels(width)
            text = f"{across:,} x {round(high / wide * across):,} pixels"
        elif isinstance(figure.body, Points) and not figure.as_pixels:
            n = len(figure.body.x)
            size = formatting.size(n * figures.POINT_BYTES)
            text = f"{formatting.count(n)} circles, about {size}"
        else:
            text = "Text and lines as vectors, the coloured part as one picture"
        self._told.setText(f"{text}; white background, with legend and provenance.")

    def _on_save_clicked(self, checked: bool = False) -> None:
        ending = self.format.value
        path, _ = QFileDialog.getSaveFileName(
            self, "Save the picture", f"{self._name}.{ending}", f"{ending.upper()} (*.{ending})"
        )
        if not path:
            return
        target = Path(path)
        if target.suffix.lower() != f".{ending}":
            target = target.with_name(f"{target.name}.{ending}")
        figure, width = self.figure(), self.width_mm.value()
        self.save_button.setEnabled(False)
        self._told.setText("Drawing…")
        self._session.compute(
            lambda: (target, figures.save(figure, target, width)),
            self._on_saved,
            self._on_save_failed,
        )

    def _on_saved(self, saved: tuple[Path, int]) -> None:
        path, size = saved
        self._session.services.toasts.success(f"Saved {path.name} ({formatting.size(size)})")
        self.accept()

    def _on_save_failed(self, error: Exception) -> None:
        self.save_button.setEnabled(True)
        known = explain(error)
        why = known.title if known else getattr(error, "strerror", "") or str(error)
        self._told.setText(f"It could not be written ({why}). Choose another place.")
