"""Tokens as text, byte for byte: where a character is spread over several tokens, the first of them
has it and the others are empty, so that as many texts as tokens join to the text itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mistudio.engine.datasets.tokenizers import piece

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a byte of SentencePiece's fallback


def _byte_alphabet() -> dict[str, int]:
    """Which byte each letter of a byte-level vocabulary stands for (Radford et al. 2019): printable
    Latin-1 characters for themselves, all others in order from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_LETTERS = _byte_alphabet()


class TokenTexts:
    """The texts of a tokenizer's tokens; what was asked for once is kept."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}
        self._parts: dict[int, bytes | None] = {}

    def __getitem__(self, token: int) -> str:
        """One token for itself: bytes that are no whole character are told as `<0xE2>`."""
        text = self._alone.get(token)
        if text is None:
            text = piece(self._tokenizer, token)
            part = self.part(token)
            if part is not None:
                text = _told(part)
            self._alone[token] = text
        return text

    def part(self, token: int) -> bytes | None:
        """The bytes of a token that does not begin or end with a character; None for all others,
        and where the vocabulary does not say which bytes they are."""
        if token not in self._parts:
            self._parts[token] = self._read_part(token)
        return self._parts[token]

    def _read_part(self, token: int) -> bytes | None:
        if "\ufffd" not in self._tokenizer.decode([token]):
            return None
        raw = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(raw, str):
            return None
        if match := _BYTE.fullmatch(raw):
            return bytes([int(match.group(1), 16)])
        if any(letter not in _LETTERS for letter in raw):
            return None
        return bytes(_LETTERS[letter] for letter in raw)

    def of(self, ids: Sequence[int]) -> list[str]:
        """The texts of tokens that follow each other, as many as `ids`."""
        found: list[str] = []
        pending: list[bytes] = []
        for token in ids:
            part = self.part(token)
            if part is None:
                found += map(_told, pending)
                pending = []
                found.append(self[token])
                continue
            pending.append(part)
            if (joined := _whole(b"".join(pending))) is not None:
                found += _shared(joined, pending)
                pending = []
        return found + [_told(part) for part in pending]


def _whole(parts: bytes) -> str | None:
    try:
        return parts.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _shared(text: str, parts: Sequence[bytes]) -> list[str]:
    """Each character to the part that its first byte lies in."""
    owners = [place for place, part in enumerate(parts) for _ in part]
    shares = [""] * len(parts)
    offset = 0
    for character in text:
        shares[owners[offset]] += character
        offset += len(character.encode("utf-8"))
    return shares


def _told(part: bytes) -> str:
    """Bytes as text, those that are no character as `<0xE2>`."""
    text = part.decode("utf-8", "surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)
