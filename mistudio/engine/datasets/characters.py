"""Which class a character belongs to, by the Unicode data that comes with Python.

Letters are told apart by script, which their Unicode names begin with; everything else by general
category. https://www.unicode.org/reports/tr44/#General_Category_Values
"""

from __future__ import annotations

import sys
import unicodedata
from functools import lru_cache

import numpy as np

# First words of the names of letters -> script. What is not here counts as "Other letters".
_SCRIPTS = {
    "LATIN": "Latin",
    "FULLWIDTH": "Latin",
    "GREEK": "Greek",
    "CYRILLIC": "Cyrillic",
    "ARMENIAN": "Armenian",
    "HEBREW": "Hebrew",
    "ARABIC": "Arabic",
    "DEVANAGARI": "Devanagari",
    "BENGALI": "Bengali",
    "TAMIL": "Tamil",
    "TELUGU": "Telugu",
    "THAI": "Thai",
    "GEORGIAN": "Georgian",
    "HANGUL": "Hangul",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
    "HALFWIDTH": "Kana",
    "CJK": "Han",
    "IDEOGRAPHIC": "Han",
}
CLASSES = (
    *(f"{script} letters" for script in dict.fromkeys(_SCRIPTS.values())),
    "Other letters",
    "Combining marks",
    "Digits",
    "Punctuation",
    "Whitespace",
    "Emoji",
    "Symbols",
    "Control characters",
    "Unassigned or private",
)
_NUMBER = {name: i for i, name in enumerate(CLASSES)}


def classify(character: str) -> str:
    """The class of one character."""
    category = unicodedata.category(character)
    if character.isspace():
        return "Whitespace"
    if category.startswith("L"):
        first = unicodedata.name(character, "").partition(" ")[0].partition("-")[0]
        script = _SCRIPTS.get(first)
        return f"{script} letters" if script else "Other letters"
    if category.startswith("M"):
        return "Combining marks"
    if category == "Nd":
        return "Digits"
    if category.startswith("P"):
        return "Punctuation"
    if category in ("So", "Sk") and _in_emoji_blocks(ord(character)):
        return "Emoji"
    if category.startswith(("S", "N")):
        return "Symbols"
    # Format characters join emoji and letters; they are control characters to the eye as well.
    if category in ("Cc", "Cf"):
        return "Control characters"
    return "Symbols" if category.startswith("Z") else "Unassigned or private"


def _in_emoji_blocks(code: int) -> bool:
    """Miscellaneous Symbols, Dingbats, and the pictographs above U+1F000."""
    return 0x2600 <= code <= 0x27BF or 0x1F000 <= code <= 0x1FAFF


def count_classes(text: str) -> np.ndarray:
    """int64 [len(CLASSES)]: how many characters of the text belong to each class."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return np.bincount(_table()[codes], minlength=len(CLASSES)).astype(np.int64)


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """uint8 [all code points]; takes about a second once."""
    table = np.full(sys.maxunicode + 1, _NUMBER["Unassigned or private"], np.uint8)
    # Unassigned planes and the ideographs, which are told by range, need no look at each name.
    for code in (*range(0x323B0), *range(0xE0000, 0xE01F0)):
        table[code] = _NUMBER[classify(chr(code))]
    return table
