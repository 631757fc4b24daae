"""What a model takes of memory at every precision, beside what is free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QGridLayout, QWidget

from mistudio import formatting
from mistudio.ui.widgets import Text

if TYPE_CHECKING:
    from mistudio.engine.models.memory import ModelPlan
    from mistudio.ui.models.candidate import Fit

NAMES = {
    "fp32": "FP32",
    "bf16": "BF16",
    "fp16": "FP16",
    "q8": "Q8 (8-bit)",
    "q4": "Q4 (4-bit)",
    "q2": "Q2 (2-bit)",
}


class PlanTable(QWidget):
    """A line for each precision: weights, memory at the fullest moment, and whether it fits."""

    def __init__(self, fit: Fit, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.lines: dict[str, tuple[str, ...]] = {}
        grid = QGridLayout(self)
        grid.setContentsMargins(0, 4, 0, 4)
        grid.setHorizontalSpacing(32)
        grid.setVerticalSpacing(6)
        for place, title in enumerate(("Precision", "Weights", "Memory in use", "On this device")):
            grid.addWidget(Text(title, "helper"), 0, place, _side(place))
        grid.setColumnStretch(3, 1)
        for line, plan in enumerate(fit.plans, 1):
            verdict, tone = _verdict(fit, plan.precision)
            cells = (
                NAMES[plan.precision],
                formatting.size(plan.weights),
                formatting.size(plan.memory),
                verdict,
            )
            self.lines[plan.precision] = cells
            name = Text(cells[0], "label")
            memory = Text(cells[2], "small")
            memory.setToolTip(_parts(plan))
            for place, label in enumerate(
                (name, Text(cells[1], "small"), memory, Text(verdict, "small", tone))
            ):
                grid.addWidget(label, line, place, _side(place))
        self.setAccessibleName(
            "; ".join(f"{cells[0]}: {cells[2]}, {cells[3]}" for cells in self.lines.values())
        )


def _side(place: int) -> Qt.AlignmentFlag:
    """Numbers stand under each other by their last digit."""
    return Qt.AlignmentFlag.AlignRight if place in (1, 2) else Qt.AlignmentFlag.AlignLeft


def _verdict(fit: Fit, precision: str) -> tuple[str, str]:
    if fit.refused.get(precision):
        return "✗ Does not run on this device", "red"
    if fit.cannot_run(precision):
        return "✗ More than this device has", "red"
    if not fit.plan(precision).fits:
        return "⚠ Too little is free now", "yellow"
    if precision == fit.best:
        return "✓ Fits: what Auto chooses", "emerald"
    return "✓ Fits", "emerald"


def _parts(plan: ModelPlan) -> str:
    """The fullest phase in its parts, for a tooltip."""
    phase = plan.fullest
    lines = [
        f"{part.name}: {formatting.size(part.value)}"
        for part in phase.parts
        if part.place == "device" and part.value >= 1
    ]
    what = "while loading" if phase.name == "load" else "with 8 texts of 128 tokens at a time"
    return "\n".join([f"At its fullest, {what}:", *lines])
