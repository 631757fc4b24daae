"""How the window looks: colours, fonts, icons and one style sheet."""

from __future__ import annotations

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QApplication, QWidget

from mistudio.ui.theme import fonts
from mistudio.ui.theme.palette import palette
from mistudio.ui.theme.style import style_sheet


def apply(app: QApplication, text_scale: float = 1.0) -> None:
    """Fusion, then the palette, then the style sheet for shapes; `text_scale` 1.0 is 100 %."""
    hints = app.styleHints()
    if hasattr(hints, "setColorScheme"):  # native title bars follow (Qt 6.8)
        hints.setColorScheme(Qt.ColorScheme.Dark)
    app.setStyle("Fusion")
    app.setPalette(palette())
    fonts.load(text_scale)
    app.setFont(fonts.sans())
    app.setStyleSheet(style_sheet())


def set_look(widget: QWidget, **properties: object) -> None:
    """Set properties that the style sheet asks for (variant, role, tone, surface) at run time."""
    for name, value in properties.items():
        widget.setProperty(name, value)
    style = widget.style()
    style.unpolish(widget)
    style.polish(widget)
    widget.update()
