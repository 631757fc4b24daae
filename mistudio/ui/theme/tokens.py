"""Every colour, size and radius of the window, and which text may stand on which surface.

Colours are opaque: where the design used transparency they are blended already, so that contrast
can be computed (tests/ui/test_contrast.py goes through `TEXT_PAIRS` and `EDGE_PAIRS`).
"""

from __future__ import annotations

# --- surfaces, dark to light
BACKGROUND = "#020617"
NAV = "#060B1D"
CARD = "#080E20"
CARD_HOVER = "#0B1224"
DIALOG = "#0F172A"
LIST_ROW = "#0F1628"
TILE = "#131C2E"
DIALOG_ROW = "#141C2F"
DIALOG_TILE = "#162032"
INPUT = "#0F172A"
RAISED = "#1E293B"
RAISED_HOVER = "#334155"
DIVIDER = "#1E293B"
HANDLE = "#475569"  # of a scroll bar
EDGE = "#64748B"  # input borders: 3:1 against every surface they stand on

# --- text
TEXT = "#F1F5F9"
LABEL = "#CBD5E1"
HELPER = "#94A3B8"
DISABLED = "#64748B"  # WCAG exempts disabled text; it never carries information alone
WHITE = "#FFFFFF"
INK = "#0F172A"  # on yellow

# --- accents: as text, line or icon
EMERALD = "#34D399"
BLUE = "#60A5FA"
PURPLE = "#C084FC"
YELLOW = "#FACC15"
RED = "#F87171"
SLATE = "#CBD5E1"
FOCUS = "#10B981"

# --- fills under white text
PRIMARY = "#047857"
PRIMARY_HOVER = "#065F46"
DANGER = "#B91C1C"
DANGER_HOVER = "#991B1B"
INFO = "#1D4ED8"
INFO_HOVER = "#1E40AF"
PURPLE_FILL = "#7E22CE"
PURPLE_FILL_HOVER = "#6B21A8"
WARNING_HOVER = "#EAB308"
SELECTION = "#064E3B"

# --- badges and notes
BADGE_EMERALD, BADGE_EMERALD_EDGE = "#0A3033", "#0A413D"
BADGE_BLUE, BADGE_BLUE_EDGE = "#12254B", "#173160"
BADGE_YELLOW, BADGE_YELLOW_EDGE = "#352F1B", "#4C3F19"
BADGE_RED, BADGE_RED_EDGE = "#361927", "#4D1E2B"
BADGE_PURPLE, BADGE_PURPLE_EDGE = "#2A1B45", "#3B2560"
BADGE_SLATE, BADGE_SLATE_EDGE = "#1E293B", "#334155"

# A tone is a role that a thing plays; each has a text colour, a badge fill and a badge edge.
TONES: dict[str, tuple[str, str, str]] = {
    "emerald": (EMERALD, BADGE_EMERALD, BADGE_EMERALD_EDGE),
    "blue": (BLUE, BADGE_BLUE, BADGE_BLUE_EDGE),
    "purple": (PURPLE, BADGE_PURPLE, BADGE_PURPLE_EDGE),
    "yellow": (YELLOW, BADGE_YELLOW, BADGE_YELLOW_EDGE),
    "red": (RED, BADGE_RED, BADGE_RED_EDGE),
    "slate": (SLATE, BADGE_SLATE, BADGE_SLATE_EDGE),
}

# Lines of a chart, in the order they are taken; distinct in lightness as well as in hue.
SERIES = (EMERALD, BLUE, "#FBBF24", PURPLE, RED, "#22D3EE", "#F9A8D4", "#A3E635")

# --- sizes in px at 100 %
RADIUS = 8
CARD_PADDING = 24
GAP = 16
COLUMN_WIDTH = 1280
TEXT_SMALL, TEXT_BODY, TEXT_CARD, TEXT_STAT, TEXT_HEADING = 14, 16, 18, 20, 24

_SURFACES = {
    "app": BACKGROUND,
    "nav": NAV,
    "card": CARD,
    "hovered card": CARD_HOVER,
    "dialog": DIALOG,
    "list row": LIST_ROW,
    "tile": TILE,
    "dialog row": DIALOG_ROW,
    "dialog tile": DIALOG_TILE,
    "raised": RAISED,
}

TEXT_PAIRS: list[tuple[str, str, str]] = [
    (f"{name} on {surface}", text, background)
    for surface, background in _SURFACES.items()
    for name, text in {
        "text": TEXT,
        "label": LABEL,
        "helper": HELPER,
        "emerald": EMERALD,
        "blue": BLUE,
        "purple": PURPLE,
        "yellow": YELLOW,
        "red": RED,
    }.items()
] + [
    ("primary button", WHITE, PRIMARY),
    ("primary button, hovered", WHITE, PRIMARY_HOVER),
    ("danger button", WHITE, DANGER),
    ("danger button, hovered", WHITE, DANGER_HOVER),
    ("info button", WHITE, INFO),
    ("info button, hovered", WHITE, INFO_HOVER),
    ("purple button", WHITE, PURPLE_FILL),
    ("purple button, hovered", WHITE, PURPLE_FILL_HOVER),
    ("warning button", INK, YELLOW),
    ("warning button, hovered", INK, WARNING_HOVER),
    ("secondary button", TEXT, RAISED),
    ("secondary button, hovered", TEXT, RAISED_HOVER),
    ("text in an input", TEXT, INPUT),
    ("placeholder in an input", HELPER, INPUT),
    ("selected text", TEXT, SELECTION),
    ("selected layer", WHITE, PRIMARY),
    *((f"{tone} badge", text, fill) for tone, (text, fill, _) in TONES.items()),
    *((f"text on a {tone} note", TEXT, fill) for tone, (_, fill, _) in TONES.items()),
]

# Things that are not text but must be seen: 3:1.
EDGE_PAIRS: list[tuple[str, str, str]] = [
    *(
        (f"input border on {surface}", EDGE, background)
        for surface, background in _SURFACES.items()
    ),
    *((f"focus ring on {surface}", FOCUS, background) for surface, background in _SURFACES.items()),
    *((f"line of a chart {colour}", colour, CARD) for colour in SERIES),
    ("toggle that is off", EDGE, CARD),
    ("toggle that is on", FOCUS, CARD),
]


def luminance(colour: str) -> float:
    """Relative luminance of `#RRGGBB` as WCAG 2.1 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio 1..21 of two opaque colours (WCAG 2.1)."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def blend(over: str, under: str, opacity: float) -> str:
    """`over` at this opacity on `under`, as an opaque colour."""
    mixed = (
        round(int(over[i : i + 2], 16) * opacity + int(under[i : i + 2], 16) * (1 - opacity))
        for i in (1, 3, 5)
    )
    return "#" + "".join(f"{channel:02X}" for channel in mixed)
