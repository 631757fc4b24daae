"""SentencePiece `.model` files -> a tokenizer.json of the tokenizers library.

The file is a protocol buffer (sentencepiece_model.proto of google/sentencepiece, version 0.2); its
few fields are read here, so that no further library is needed. What the two libraries do alike is
converted, everything else refused. Words are pieces of text after white space became "▁".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistudio.errors import CorruptFile, UnsupportedModel

UNIGRAM, BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_LARGEST = 64 * 1024**2  # bytes; the largest known ones have 5 MB
_SPACE = "\u2581"


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """The fields that say how text is split."""

    pieces: tuple[Piece, ...]
    algorithm: int
    byte_fallback: bool
    unknown_id: int
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    whitespace_as_suffix: bool


def read_model(path: Path) -> SentencePieceModel:
    """The model in `path`. Raises `CorruptFile` where it is none."""
    if path.stat().st_size > _LARGEST:
        raise _damaged(path, f"it has {path.stat().st_size:,} bytes, more than any tokenizer needs")
    try:
        return _model(path.read_bytes())
    except (ValueError, IndexError, struct.error, TypeError) as exc:
        raise _damaged(path, str(exc)) from exc


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            entry = dict(_fields(value))
            score = struct.unpack("<f", entry[2])[0] if 2 in entry else 0.0
            pieces.append(Piece(entry.get(1, b"").decode(), score, entry.get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("it holds no vocabulary")
    return SentencePieceModel(
        pieces=tuple(pieces),
        algorithm=trainer.get(3, UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        unknown_id=next((i for i, piece in enumerate(pieces) if piece.kind == _UNKNOWN), 0),
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        whitespace_as_suffix=bool(trainer.get(24, 0)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer message: ints for varints, bytes for the rest."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")
        if place + size > len(data):
            raise ValueError("it is cut off")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number in it is too long")


def _damaged(path: Path, why: str) -> CorruptFile:
    return CorruptFile(
        "This is not a SentencePiece model",
        f"{path.name}: {why}.",
        "Choose a tokenizer.json, or download the tokenizer again.",
    )


# --- as a tokenizer ------------------------------------------------------------------------------


def to_tokenizer(model: SentencePieceModel) -> Any:
    """A `tokenizers.Tokenizer` that gives the same ids as SentencePiece does.

    Raises `UnsupportedModel` for word and character models and for suffix white space.
    """
    from tokenizers import AddedToken, Tokenizer

    if model.algorithm not in (UNIGRAM, BPE):
        raise _unsupported("It splits text into words or characters")
    if model.whitespace_as_suffix or not model.escape_whitespaces:
        raise _unsupported("It keeps white space at the end of words")
    tokenizer = Tokenizer(_unigram(model) if model.algorithm == UNIGRAM else _bpe(model))
    tokenizer.normalizer = _normalizer(model)
    if model.algorithm == UNIGRAM:
        from tokenizers import pre_tokenizers

        # The prefix is set by the normalizer, before white space is replaced.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never")
    tokenizer.decoder = _decoder(model)
    special = (_CONTROL, _UNKNOWN)
    tokenizer.add_special_tokens([p.text for p in model.pieces if p.kind in special])
    tokenizer.add_tokens(
        [AddedToken(p.text, normalized=False) for p in model.pieces if p.kind == _USER_DEFINED]
    )
    return tokenizer


def _unsupported(what: str) -> UnsupportedModel:
    return UnsupportedModel(
        "This kind of SentencePiece model is not supported",
        f"{what}, which language models do not do.",
        "Choose a tokenizer.json instead.",
    )


def _unigram(model: SentencePieceModel) -> Any:
    from tokenizers import models

    scores = [(piece.text, piece.score) for piece in model.pieces]
    return models.Unigram(scores, unk_id=model.unknown_id, byte_fallback=model.byte_fallback)


def _bpe(model: SentencePieceModel) -> Any:
    """The merge with the best score first. SentencePiece scores what a merge gives, so every pair
    of pieces that joins to a piece is one, in the order of that piece."""
    from tokenizers import models

    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    mergeable = {piece.text for piece in model.pieces if piece.kind == _NORMAL}
    ranked = []
    for piece in model.pieces:
        if piece.kind != _NORMAL:
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-piece.score, ids[piece.text], ids[left], ids[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    return models.BPE(
        ids,
        merges,
        unk_token=model.pieces[model.unknown_id].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _normalizer(model: SentencePieceModel) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _decoder(model: SentencePieceModel) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(_SPACE, " ")]
    if model.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
