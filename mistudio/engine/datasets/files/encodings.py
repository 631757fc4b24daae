"""Which characters a file's bytes stand for. Marks and structure decide before statistics do."""

from __future__ import annotations

import codecs
import re
import threading
from dataclasses import dataclass

from mistudio.engine.datasets.files.opening import Reading, open_bytes
from mistudio.errors import InvalidInput

HEAD = 1 << 16
# A head of pure ASCII says nothing: the first other bytes are looked for this far.
LOOK_FOR_OTHERS = 8 * 1024**2
# What is asked of charset-normalizer: encodings that people's files really have. Of all that
# Python knows, short texts too often fit one that nobody uses.
_LEGACY = (
    "cp1252", "cp1250", "cp1251", "koi8_r", "cp866", "gb18030", "big5", "shift_jis", "euc_jp",
    "cp949", "cp1253", "cp1254", "cp1255", "cp1256", "iso8859_2", "mac_roman", "cp437", "cp850",
)  # fmt: skip
_WESTERN = ("cp1252", "cp1250", "cp1254", "mac_roman", "cp850")
_NAMES = {
    "utf-8": "UTF-8",
    "utf-8-sig": "UTF-8 with a mark",
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16 (little-endian)",
    "utf-16-be": "UTF-16 (big-endian)",
    "utf-32": "UTF-32",
    "utf-32-le": "UTF-32 (little-endian)",
    "utf-32-be": "UTF-32 (big-endian)",
}
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
# What stands in for a sequence of bytes that is no character, until it is counted: halves of
# surrogate pairs, which no decoder gives.
MARKS = re.compile("[\udc00-\udcff]")
MARKING = "mistudio-mark"


@dataclass(frozen=True)
class Encoding:
    """`codec` as Python calls it; `guessed`: by statistics, so it may be wrong."""

    codec: str
    guessed: bool = False

    def __str__(self) -> str:
        name = _NAMES.get(self.codec) or self.codec.replace("cp125", "Windows-125")
        return f"{name} (guessed)" if self.guessed else name


def detect(reading: Reading) -> Encoding:
    """The encoding of a file: the user's choice, else what its first bytes say. InvalidInput where
    it is no text."""
    if reading.options.encoding is not None:
        encoding: Encoding | None = Encoding(_known(reading.options.encoding))
    else:
        sample = _sample(reading)
        encoding = of_bytes(sample)
        if encoding is None:
            raise _not_text(reading.file.name, sample)
    assert encoding is not None
    reading.codec = encoding.codec
    return encoding


def of_bytes(sample: bytes) -> Encoding | None:
    """The encoding of a text's first bytes; None where they are no text."""
    for mark, codec in _BOMS:
        if sample.startswith(mark):
            return Encoding(codec)
    text = _decoded(sample, "utf-8")
    if text is not None and _is_text(text):
        return Encoding("utf-8")
    if b"\0" in sample:
        wide = _wide(sample)
        return Encoding(wide) if wide else None
    if text is not None:
        return None
    if _is_damaged_utf8(sample):
        return Encoding("utf-8")
    guess = _by_statistics(sample)
    return Encoding(guess, guessed=True) if guess else None


def _sample(reading: Reading) -> bytes:
    """The first bytes; where those are ASCII, the first ones that hold something else."""
    with open_bytes(reading) as stream:
        first = stream.read(HEAD)
        piece, read = first, len(first)
        while piece.isascii() and b"\0" not in piece and read < LOOK_FOR_OTHERS:
            piece = stream.read(HEAD)
            if not piece:
                return first
            read += len(piece)
    return first if piece.isascii() else piece


def _decoded(sample: bytes, codec: str) -> str | None:
    """The text, where the bytes are valid; the end may be cut off inside a character."""
    try:
        return codecs.getincrementaldecoder(codec)("strict").decode(sample, False)
    except UnicodeDecodeError:
        return None


def _is_text(text: str) -> bool:
    """A few control characters, NULs among them, do happen in texts."""
    return len(_CONTROL.findall(text)) <= 0.02 * len(text) + 1


def _is_damaged_utf8(sample: bytes) -> bool:
    """Whether far more characters are valid UTF-8 than are not; in no other encoding do texts
    look so by chance."""
    text = sample.decode("utf-8", MARKING)
    marks = len(MARKS.findall(text))
    return len(re.findall(r"[^\x00-\x7f]", text)) - marks > 2 * marks and _is_text(text)


def _wide(sample: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark, told by where the zero bytes stand."""
    zeros = [sample[place::4].count(0) for place in range(4)]
    quarter = len(sample) // 4
    if quarter and zeros[3] == quarter > zeros[0] and zeros[2] > zeros[0]:
        candidates = ["utf-32-le"]
    elif quarter and zeros[0] == quarter > zeros[3] and zeros[1] > zeros[3]:
        candidates = ["utf-32-be"]
    else:
        even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
        candidates = ["utf-16-le"] if odd > 8 * even else ["utf-16-be"] if even > 8 * odd else []
    for codec in candidates:
        text = _decoded(sample, codec)
        if text and len(_CONTROL.findall(text)) <= 0.02 * len(text):
            return codec
    return None


def _by_statistics(sample: bytes) -> str | None:
    from charset_normalizer import from_bytes

    isolated = _looks_western(sample)
    matches = from_bytes(sample, cp_isolation=list(_WESTERN if isolated else _LEGACY))
    best = matches.best()
    if best is None or not _is_text(str(best)):
        return None
    western = _decoded(sample, "cp1252") if isolated else None
    for match in matches:
        # Of what fits about as well, by far the most frequent.
        as_good = match.chaos <= best.chaos + 0.02 and match.coherence >= best.coherence - 0.01
        if as_good and str(match) == western:
            return "cp1252"
    return best.encoding


def _looks_western(sample: bytes) -> bool:
    """Few bytes beyond ASCII, alone or in twos: accents, not an alphabet of its own."""
    runs = re.findall(rb"[\x80-\xff]+", sample)
    beyond = sum(map(len, runs))
    alone = sum(len(run) <= 2 for run in runs)
    return beyond < 0.25 * len(sample) and alone >= 0.8 * len(runs)


def _known(name: str) -> str:
    try:
        info = codecs.lookup(name)
        "a".encode(info.name)  # codecs such as `hex` are none of text
    except (LookupError, TypeError, ValueError) as exc:
        raise InvalidInput(
            "No such encoding",
            f"{name!r} is not the name of a text encoding.",
            "Use a name such as utf-8, cp1252 or shift_jis.",
            field="encoding",
        ) from exc
    return info.name


def _not_text(name: str, sample: bytes) -> InvalidInput:
    if sample[:2] == b"\x1f\x8b" or sample[:4] == b"\x28\xb5\x2f\xfd":
        what, step = "is packed, whatever its name says", "Add .gz or .zst to its name."
    elif sample[:4] == b"PK\x03\x04":
        what, step = "is a zip archive (as Office files are)", "Save it as text, or unpack it."
    elif sample[:4] == b"PAR1":
        what, step = "is a Parquet file", "Rename it to end in .parquet."
    else:
        what = "holds zero bytes or others that no text has, as binary files do"
        step = "Choose a text file."
    return InvalidInput("This is not a text file", f"{name} {what}.", step)


# --- bytes that are no character ------------------------------------------------------------------

_thread = threading.local()


def marks_made() -> int:
    """How many sequences this thread has marked so far."""
    return getattr(_thread, "marks", 0)


def _mark(exc: UnicodeError) -> tuple[str, int]:
    assert isinstance(exc, UnicodeDecodeError)
    _thread.marks = marks_made() + 1
    return chr(0xDC00 + exc.object[exc.start]), exc.end


codecs.register_error(MARKING, _mark)
