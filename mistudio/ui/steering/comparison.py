"""Two texts side by side: where each token lies, where they part, which words only one has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_WORD = re.compile(r"[\w']+")


@dataclass(frozen=True)
class Run:
    """A stretch of text with one look. `common`: before the texts part; `only_here`: part of a
    word that the other text does not have; `token`: index of the token it belongs to, -1 none."""

    text: str
    common: bool
    only_here: bool
    token: int


def token_spans(text: str, pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Start and end in `text` of each token.

    Decoded one by one, tokens may lose the space before them, and parts of one character come as
    �: a token that is not found lies between its neighbours.
    """
    spans: list[tuple[int, int]] = []
    waiting = 0  # tokens not found since `place`
    place = 0
    for piece in pieces:
        found = -1
        if piece and "\ufffd" not in piece:
            found = text.find(piece, place, place + len(piece) + 8 * (waiting + 1))
        if found < 0:
            waiting += 1
            spans.append((place, place))
            continue
        if waiting:  # the first of them stands for the stretch, the others are empty
            first = len(spans) - waiting
            spans[first] = (place, found)
            spans[first + 1 :] = [(found, found)] * (waiting - 1)
            waiting = 0
        spans.append((found, found + len(piece)))
        place = found + len(piece)
    if waiting:
        spans[len(spans) - waiting] = (place, len(text))
        spans[len(spans) - waiting + 1 :] = [(len(text), len(text))] * (waiting - 1)
    return spans


def only_in(text: str, other: str) -> list[tuple[int, int]]:
    """Places of the words of `text` that `other` does not have, whatever their case."""
    known = {word.lower() for word in _WORD.findall(other)}
    return [m.span() for m in _WORD.finditer(text) if m.group().lower() not in known]


def runs(text: str, other: str, pieces: Sequence[str], first_difference: int | None) -> list[Run]:
    """The text cut where its look changes. `first_difference` is the index of the first token
    that is not the same in both, None where all are."""
    spans = token_spans(text, pieces)
    if first_difference is None:
        parting = len(text)
    else:
        parting = spans[first_difference][0] if first_difference < len(spans) else len(text)
    changed = only_in(text, other)
    edges = {0, len(text), parting}
    edges.update(edge for span in (*spans, *changed) for edge in span)
    cuts = sorted(edges)
    found = []
    token = word = 0
    for start, end in pairwise(cuts):
        while token < len(spans) and spans[token][1] <= start:
            token += 1
        while word < len(changed) and changed[word][1] <= start:
            word += 1
        inside = token < len(spans) and spans[token][0] <= start
        only_here = word < len(changed) and changed[word][0] <= start
        found.append(Run(text[start:end], end <= parting, only_here, token if inside else -1))
    return found
