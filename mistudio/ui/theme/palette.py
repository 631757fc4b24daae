"""The QPalette: what Qt's own painting (menus, dialogs, native parts) takes its colours from."""

from __future__ import annotations

from PySide6.QtGui import QColor, QPalette

from mistudio.ui.theme import tokens as t

_ROLES = {
    "Window": t.BACKGROUND,
    "WindowText": t.TEXT,
    "Base": t.INPUT,
    "AlternateBase": t.LIST_ROW,
    "Text": t.TEXT,
    "Button": t.RAISED,
    "ButtonText": t.TEXT,
    "BrightText": t.WHITE,
    "ToolTipBase": t.RAISED,
    "ToolTipText": t.TEXT,
    "Highlight": t.SELECTION,
    "HighlightedText": t.TEXT,
    "Link": t.EMERALD,
    "LinkVisited": t.PURPLE,
    "PlaceholderText": t.HELPER,
    "Light": t.RAISED_HOVER,
    "Midlight": t.RAISED,
    "Mid": t.TILE,
    "Dark": t.CARD,
    "Shadow": "#000000",
    "Accent": t.FOCUS,
}


def palette() -> QPalette:
    made = QPalette()
    for name, colour in _ROLES.items():
        role = getattr(QPalette.ColorRole, name, None)  # Accent is newer than Qt 6.5
        if role is not None:
            made.setColor(role, QColor(colour))
    for name in ("WindowText", "Text", "ButtonText", "HighlightedText", "PlaceholderText"):
        role = getattr(QPalette.ColorRole, name)
        made.setColor(QPalette.ColorGroup.Disabled, role, QColor(t.DISABLED))
    made.setColor(QPalette.ColorGroup.Disabled, QPalette.ColorRole.Highlight, QColor(t.RAISED))
    return made
