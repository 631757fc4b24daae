"""From stored activations back to their text: the exact characters behind a row, and activations
over a stretch of text as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from mistudio.engine.activations.shards import ROW
from mistudio.engine.activations.store import StoredActivations
from mistudio.engine.datasets.documents import Document
from mistudio.engine.datasets.tokens import TokenMeta, TokenSplit
from mistudio.engine.models.hooks import HookPoint
from mistudio.errors import Incompatible, InvalidInput

if TYPE_CHECKING:
    from mistudio.engine.datasets.encoding import Encoder

SHOWN_DIMENSIONS = 32


class Texts(Protocol):
    """The part of `Documents` that is needed."""

    def __getitem__(self, index: int) -> Document: ...


@dataclass(frozen=True)
class Origin:
    """Where a stored row comes from.

    `place` is the token's number in the `document` (of the dataset), `window` and `position` say
    where the model read it. `start` and `end` are characters of `document.text`; they are None
    where only the token is known: no text was given, or it was tokenised in a form of its own (a
    chat format, a text of megabytes).
    """

    split: str
    row: int
    window: int
    position: int
    token: int
    document: int
    place: int
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class Source:
    """What activations were made from: the dataset's documents, the model's (fast) tokenizer, and
    what the token store says of itself."""

    documents: Texts
    tokenizer: Any
    meta: TokenMeta


def trace(stored: StoredActivations, split: str, row: int, source: Source | None = None) -> Origin:
    """The text behind row `row` of every site in `split`; with a `source` to the character.

    The document is tokenised again and must give the stored token at the stored place; raises
    `Incompatible` where it does not. A token that is some bytes of a character spans that
    character.
    """
    rows = stored.rows[split]
    if rows.dtype != ROW:
        raise Incompatible(
            "These activations do not say which text they come from",
            "They were extracted by an earlier version of miStudio.",
            "Extract them again.",
        )
    found = rows[row]
    origin = Origin(split, row, *(int(found[name]) for name in ROW.names or ()))
    if source is None:
        return origin
    span = _characters(origin, source)
    return origin if span is None else replace(origin, start=span[0], end=span[1])


def _characters(origin: Origin, source: Source) -> tuple[int, int] | None:
    """Start and end of a token in its document's text, or None where that is not tokenised as it
    stands."""
    from mistudio.engine.datasets.encoding import Encoder

    encoder = Encoder(source.tokenizer, source.meta.layout, source.meta.bos_id)
    document = source.documents[origin.document]
    stored = encoder.encode([document]).ids.tolist()
    if origin.place >= len(stored) or stored[origin.place] != origin.token:
        raise Incompatible(
            "The text does not fit these activations",
            f"Token {origin.place} of document {origin.document + 1} is not the one they were "
            f"extracted from ({origin.token}): the dataset, its tokenisation or the tokenizer is "
            "another.",
            "Use the ones that the activations were made from, or extract them again.",
        )
    plain = source.tokenizer(
        document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    place = _aligned(stored, plain["input_ids"], origin.place, encoder, source.meta)
    if place is None:
        return None
    start, end = plain["offset_mapping"][place]
    return int(start), int(end)


def _aligned(
    stored: list[int], plain: list[int], place: int, encoder: Encoder, meta: TokenMeta
) -> int | None:
    """The place in the plain text's tokens of the token at `place` of what was stored: those with
    a frame of special tokens, and cut off at one end."""
    before, after = (0, 0) if meta.layout.packed else (len(encoder.prefix), len(encoder.suffix))
    if before and encoder.prefix[0] == meta.bos_id:
        before -= 1  # windows begin with it anew
    body = stored[before : len(stored) - after]
    if not 0 <= place - before < len(body):
        return None
    if plain[: len(body)] == body:
        return place - before
    if plain[-len(body) :] == body:
        return place - before + len(plain) - len(body)
    return None


@dataclass(frozen=True)
class HeatMap:
    """Activations over one window.

    `ids`, `documents` and `places` have one entry a token, -1 where it is not known. `values` are
    [tokens, dimensions] or, where `dimensions` is empty, the norms [tokens]; NaN for a token that
    is not stored (position 0, special tokens, outliers, padding).
    """

    point: str
    window: int
    ids: np.ndarray
    documents: np.ndarray
    places: np.ndarray
    dimensions: np.ndarray
    values: np.ndarray


def heat_map(
    stored: StoredActivations,
    split: str,
    number: int,
    point: HookPoint,
    dimensions: Sequence[int] | None = None,
    tokens: TokenSplit | None = None,
) -> HeatMap:
    """The `number`-th window of a split (see `windows_of`) at `point`, read from the store.

    `dimensions` None: norms; empty: the `SHOWN_DIMENSIONS` that vary most over the extraction.
    `tokens` fills in the ids of tokens that are not stored. Reads the places (18 bytes a row) up
    to that window's block, one block at a time, and the rows of one window. Raises InvalidInput for
    what is not there.
    """
    width = stored.width(point)
    if dimensions is not None and any(not 0 <= one < width for one in dimensions):
        raise InvalidInput(
            "There is no such dimension",
            f"{point.name} has the dimensions 0 to {width - 1}.",
            field="dimensions",
        )
    window, rows = _window(stored, split, number)
    places = stored.rows[split][rows]
    values = stored.read_site(split, point, rows).cpu()
    n = stored.meta.context
    ids, documents, spots = (np.full(n, -1, np.int64) for _ in range(3))
    if tokens is not None:
        ids[:] = tokens.windows([window], n)[0].numpy()
    at = places["position"].astype(np.int64)
    if places.dtype == ROW:
        ids[at], documents[at], spots[at] = (
            places[name] for name in ("token", "document", "place")
        )
    chosen = np.empty(0, np.int64)
    if dimensions is not None:
        chosen = np.asarray(list(dimensions) or _most_varied(stored, point), np.int64)
    shown = values[:, torch.from_numpy(chosen)] if len(chosen) else values.norm(dim=1)
    full = np.full((n, *shown.shape[1:]), np.nan, np.float32)
    full[at] = shown.numpy()
    return HeatMap(point.name, window, ids, documents, spots, chosen, full)


def windows_of(stored: StoredActivations, split: str, block: int) -> np.ndarray:
    """The windows of one block of the store, in the order of the text."""
    first, n = _block(stored, split, block)
    return np.unique(stored.rows[split][first : first + n]["window"])


def _window(stored: StoredActivations, split: str, number: int) -> tuple[int, np.ndarray]:
    """The `number`-th window, block by block and in each in the order of the text, and its rows
    in order of position."""
    left = number
    for block in range(len(stored.meta.blocks[split])):
        if left < 0:
            break
        first, n = _block(stored, split, block)
        places = stored.rows[split][first : first + n]
        windows = np.unique(places["window"])
        if left < len(windows):
            rows = np.flatnonzero(places["window"] == windows[left])
            order = np.argsort(places["position"][rows], kind="stable")
            return int(windows[left]), first + rows[order]
        left -= len(windows)
    raise InvalidInput(
        "There is no such window", f"Window {number} is not in the {split} split.", field="window"
    )


def _block(stored: StoredActivations, split: str, block: int) -> tuple[int, int]:
    """First row and number of rows."""
    sizes = stored.meta.blocks[split]
    return sum(sizes[:block]), sizes[block]


def _most_varied(stored: StoredActivations, point: HookPoint) -> list[int]:
    variance = stored.statistics()[point.name].variance
    return [int(i) for i in np.argsort(-variance, kind="stable")[:SHOWN_DIMENSIONS]]
