"""The two typefaces that ship with miStudio, and the sizes in which they are used."""

from __future__ import annotations

import logging

from PySide6.QtGui import QFont, QFontDatabase

from mistudio.resources import resource
from mistudio.ui.theme import tokens

log = logging.getLogger(__name__)

SANS = "Inter"
MONO = "JetBrains Mono"

# The static Inter files: the variable one does not answer to QFont.setWeight.
_FILES = (
    "Inter-Regular.otf",
    "Inter-Medium.otf",
    "Inter-SemiBold.otf",
    "Inter-Bold.otf",
    "JetBrainsMono-Regular.ttf",
)
_FALLBACK_SANS = ["Segoe UI", "SF Pro Text", "Noto Sans", "DejaVu Sans", "sans-serif"]
_FALLBACK_MONO = ["Cascadia Mono", "SF Mono", "DejaVu Sans Mono", "monospace"]

_scale = 1.0


def load(scale: float = 1.0) -> None:
    """Register the shipped fonts; the system's are used where a file cannot be read."""
    global _scale
    _scale = scale
    for name in _FILES:
        try:
            path = resource("fonts", name)
        except FileNotFoundError:
            log.warning("The font %s is missing; a system font is used", name)
            continue
        if QFontDatabase.addApplicationFont(str(path)) < 0:
            log.warning("The font %s cannot be read; a system font is used", name)


def px(size: int) -> int:
    """A size at 100 % as pixels at the text size that the user chose."""
    return round(size * _scale)


def sans(size: int = tokens.TEXT_BODY, weight: QFont.Weight = QFont.Weight.Normal) -> QFont:
    font = QFont([SANS, *_FALLBACK_SANS])
    font.setPixelSize(px(size))
    font.setWeight(weight)
    return font


def mono(size: int = tokens.TEXT_SMALL) -> QFont:
    """For tokens, ids and logs."""
    font = QFont([MONO, *_FALLBACK_MONO])
    font.setPixelSize(px(size))
    font.setStyleHint(QFont.StyleHint.Monospace)
    return font
