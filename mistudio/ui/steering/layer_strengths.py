"""One vector at several layers: how much of it each layer gets, as bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PySide6.QtCore import QRectF, QSize, Qt
from PySide6.QtGui import QColor, QPainter, QPaintEvent
from PySide6.QtWidgets import QSizePolicy, QWidget

from mistudio.ui.steering.units import NOTHING, significant
from mistudio.ui.theme import fonts, tokens

_LINE = 22


@dataclass(frozen=True)
class LayerShare:
    """`raw` is the length of what is added after the block; None where that layer's norm has not
    been measured yet."""

    layer: int
    raw: float | None


def shares(
    layers: Sequence[int], percent: float | None, norms: dict[int, float]
) -> list[LayerShare]:
    """The vector's `percent` of the first site's norm, at each layer's own norm and divided by the
    root of their number (as the job does it)."""
    if percent is None:
        return [LayerShare(layer, None) for layer in layers]
    part = percent / 100 / max(len(layers), 1) ** 0.5
    return [LayerShare(layer, part * norms[layer] if layer in norms else None) for layer in layers]


class LayerStrengths(QWidget):
    """A bar for each chosen layer."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._shares: list[LayerShare] = []
        self._font = fonts.sans(tokens.TEXT_SMALL)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setToolTip(
            "The length of what is added after each block: the same share of each layer's median "
            "norm, divided by the root of their number. Norms are measured by the first "
            "generation that needs them; an em dash stands until then."
        )

    @property
    def shown(self) -> list[LayerShare]:
        return list(self._shares)

    def show_shares(self, found: list[LayerShare]) -> None:
        self._shares = found
        told = ", ".join(f"layer {s.layer}: {significant(s.raw)}" for s in found)
        self.setAccessibleName(f"Raw strength by layer: {told}")
        self.setFixedHeight(max(_LINE * len(found), 1))
        self.update()

    def sizeHint(self) -> QSize:
        return QSize(200, max(_LINE * len(self._shares), 1))

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        painter.setFont(self._font)
        most = max((s.raw or 0.0 for s in self._shares), default=0.0)
        for place, one in enumerate(self._shares):
            top = place * _LINE
            painter.setPen(QColor(tokens.LABEL))
            name = QRectF(0, top, 40, _LINE)
            painter.drawText(name, Qt.AlignmentFlag.AlignVCenter, f"L{one.layer}")
            room = self.width() - 44 - 72
            if one.raw is not None and most > 0:
                painter.setPen(Qt.PenStyle.NoPen)
                painter.setBrush(QColor(tokens.PRIMARY))
                painter.drawRoundedRect(QRectF(44, top + 6, room * one.raw / most, 10), 3, 3)
            painter.setPen(QColor(tokens.TEXT if one.raw is not None else tokens.HELPER))
            painter.drawText(
                QRectF(self.width() - 68, top, 68, _LINE),
                Qt.AlignmentFlag.AlignVCenter | Qt.AlignmentFlag.AlignRight,
                significant(one.raw) if one.raw is not None else NOTHING,
            )
