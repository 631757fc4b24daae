"""The token store: ids on disk without padding, with document boundaries, in two splits.

`train` is what dictionaries learn from; `heldout` is what they are judged on. A document is in
one of them by the hash of its text, so that an exact duplicate never crosses over. Padding is
made when windows are read, never stored; `token_writer` writes stores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mistudio.engine.datasets.token_settings import TokenSettings
from mistudio.errors import InvalidInput

SPLITS = ("train", "heldout")
META = "meta.json"
COUNTS = "counts.npy"  # int64 [vocab_size], how often each id occurs in the documents
LENGTH_EDGES = (0, 100, 200, 400, 600, 800, 1000)


@dataclass(frozen=True)
class TokenMeta:
    """What a store holds. `bos_id` starts every window where the model's tokenizer uses one;
    `separator_id` stands between documents; `pad_id` fills windows up; `special_ids`, which
    include it, never count in any statistic. `settings` are a `TokenSettings.key`; stores of
    earlier versions have none and are packed."""

    vocab_size: int
    bos_id: int | None
    separator_id: int | None
    special_ids: list[int]
    tokenizer_hash: str
    documents_sha256: str
    heldout_share: float
    tokens: dict[str, int]
    documents: dict[str, int]
    statistics: dict[str, Any]
    pad_id: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> TokenSettings:
        return TokenSettings.from_dict({"heldout_share": self.heldout_share, **self.settings})


def id_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """Two bytes an id where the vocabulary allows, else four."""
    return np.uint16 if vocab_size <= 65536 else np.uint32


class TokenStore:
    """A finished store, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.meta = TokenMeta(**json.loads((folder / META).read_text(encoding="utf-8")))
        self.train = TokenSplit(folder, "train", self.meta)
        self.heldout = TokenSplit(folder, "heldout", self.meta)

    def split(self, name: str) -> TokenSplit:
        return self.heldout if name == "heldout" else self.train


class TokenSplit:
    """One split as windows of equal length.

    Packed, windows follow each other over all documents and the last partial one is left out.
    Otherwise every window lies in one document: a document that is longer goes on in further
    windows, and its last part is padded on the right or, where nothing is padded, left out.
    """

    def __init__(self, folder: Path, split: str, meta: TokenMeta) -> None:
        self.name = split
        self.meta = meta
        self._layout = meta.layout
        dtype = id_type(meta.vocab_size)
        path = folder / f"{split}.ids"
        empty = path.stat().st_size == 0
        self._ids = np.empty(0, dtype) if empty else np.memmap(path, dtype=dtype, mode="r")
        self._starts = np.load(folder / f"{split}.starts.npy", mmap_mode="r")
        self._documents = np.load(folder / f"{split}.documents.npy", mmap_mode="r")
        self._first_windows: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Tokens, separators included, padding not."""
        return len(self._ids)

    def chunks(self, size: int = 1 << 20) -> Iterator[np.ndarray]:
        """All ids in order, `size` at a time; separators included, padding and BOS not."""
        for start in range(0, len(self._ids), size):
            yield np.asarray(self._ids[start : start + size])

    def _stride(self, context: int) -> int:
        """Corpus tokens in a window: one fewer where every window starts with BOS."""
        return context - (self.meta.bos_id is not None)

    def n_windows(self, context: int) -> int:
        if self._layout.packed:
            return len(self._ids) // self._stride(context)
        return int(self._windows_before(context)[-1])

    def windows(self, indices: Sequence[int] | np.ndarray, context: int) -> torch.Tensor:
        """Ids of the given windows, int64 [len(indices), context]."""
        stride = self._stride(context)
        if self._layout.packed:
            starts = np.asarray(indices, dtype=np.int64)[:, None] * stride
            body = self._ids[starts + np.arange(stride)].astype(np.int64)
        else:
            starts, lengths = self._places(indices, context)
            columns = np.arange(stride)
            real = columns < lengths[:, None]
            body = np.full(real.shape, self._pad(), np.int64)
            body[real] = self._ids[(starts[:, None] + columns)[real]]
        if self.meta.bos_id is not None:
            body = np.concatenate([np.full((len(body), 1), self.meta.bos_id), body], axis=1)
        return torch.from_numpy(body)

    def batch(self, indices: Sequence[int] | np.ndarray, context: int) -> torch.Tensor:
        """The windows as one pass of a model takes them: int64 [len(indices), width], where width
        is `context`, or for the padding "longest" the longest of these windows."""
        ids = self.windows(indices, context)
        if self._layout.padding != "longest" or not len(ids):
            return ids
        width = int(self._places(indices, context)[1].max()) + (self.meta.bos_id is not None)
        return ids[:, :width]

    def attention_mask(self, indices: Sequence[int] | np.ndarray, context: int) -> torch.Tensor:
        """Bool [len(indices), context]: text, not padding.

        Raises InvalidInput where the tokenisation was made without attention masks.
        """
        if not self._layout.attention_mask:
            raise InvalidInput(
                "This tokenisation has no attention masks",
                "It was made with the attention mask turned off.",
                "Tokenise the dataset with it turned on.",
            )
        if self._layout.packed:
            return torch.ones(len(indices), context, dtype=torch.bool)
        lengths = self._places(indices, context)[1] + (self.meta.bos_id is not None)
        return torch.from_numpy(np.arange(context) < lengths[:, None])

    def document_at(self, window: int, position: int, context: int) -> int:
        """The dataset's document that the token at (window, position) comes from."""
        if self._layout.packed:
            place = window * self._stride(context) + position - (self.meta.bos_id is not None)
            found = int(np.searchsorted(self._starts, max(place, 0), side="right")) - 1
        else:
            before = self._windows_before(context)
            found = int(np.searchsorted(before, window, side="right")) - 1
        return int(self._documents[found])

    def origins(
        self, windows: np.ndarray, positions: np.ndarray, context: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(document, place in it) of the tokens at (window, position), int64 [n] each.

        The place counts the document's own stored tokens from 0. A separator behind a document
        has the place after its last token; a window's BOS, which no text gave, has place -1 or,
        inside a document, that of the token before it.
        """
        numbers = np.asarray(windows, dtype=np.int64)
        if self._layout.packed:
            starts = numbers * self._stride(context)
        else:
            starts = self._places(numbers, context)[0]
        bos = self.meta.bos_id is not None
        places = starts + np.asarray(positions, dtype=np.int64) - bos
        # By the first token after BOS, which belongs to the same document.
        inside = np.maximum(places, starts)
        found = np.searchsorted(self._starts, inside, side="right") - 1
        return self._documents[found].astype(np.int64), places - self._starts[found]

    def windows_within(self, documents: int, context: int) -> int:
        """How many windows, from the first on, lie wholly in the dataset's first documents."""
        n = int(np.searchsorted(self._documents, documents))
        if not self._layout.packed:
            return int(self._windows_before(context)[n])
        end = int(self._starts[n]) if n < len(self._starts) else len(self._ids)
        return min(end // self._stride(context), self.n_windows(context))

    def require_windows(self, context: int, needed: int, purpose: str) -> None:
        """Refuse with numbers where the split is too short, or cannot be cut in such windows."""
        self._check_context(context)
        have = self.n_windows(context)
        if have < needed:
            whole = ""
            if self._layout.padding == "none":
                whole = " Only documents that fill a whole window are used: nothing is padded."
            raise InvalidInput(
                "Too little text",
                f"{purpose} needs at least {needed} windows of {context} tokens; "
                f"the {self.name} split has {have} ({len(self):,} tokens).{whole}",
                "Add a larger dataset, or choose a shorter context.",
            )
        if self._layout.padded and len(self) <= len(self._starts):
            raise InvalidInput(
                "The documents are too short",
                f"{purpose} leaves out the first token of every window, and the documents of the "
                f"{self.name} split have one token each.",
                "Use the packed tokenisation, which joins documents.",
            )

    # --- windows of single documents ----------------------------------------------------------

    def _check_context(self, context: int) -> None:
        if self._layout.truncates and context > self._layout.max_length:
            raise InvalidInput(
                "The context is longer than this tokenisation's windows",
                f"{context} tokens were asked for; documents were cut off at "
                f"{self._layout.max_length} when they were tokenised.",
                "Choose a shorter context, or tokenise the dataset with a greater maximum length.",
                field="context_size",
            )

    def _pad(self) -> int:
        return 0 if self.meta.pad_id is None else self.meta.pad_id

    def _windows_before(self, context: int) -> np.ndarray:
        """int64 [documents + 1]: how many windows the documents before each one have."""
        self._check_context(context)
        if self._first_windows is None or self._first_windows[0] != context:
            stride = self._stride(context)
            if stride < 1:
                raise InvalidInput(
                    "The context is too short",
                    f"{context} tokens leave no room beside the token that starts every window.",
                    field="context_size",
                )
            lengths = np.diff(self._starts, append=len(self._ids))
            counts = lengths // stride
            if self._layout.padded:
                counts = -(-lengths // stride)
            before = np.zeros(len(counts) + 1, np.int64)
            np.cumsum(counts, out=before[1:])
            self._first_windows = (context, before)
        return self._first_windows[1]

    def _places(
        self, indices: Sequence[int] | np.ndarray, context: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(where each window begins in the ids, how many of its tokens are text), BOS apart."""
        stride = self._stride(context)
        windows = np.asarray(indices, dtype=np.int64)
        before = self._windows_before(context)
        if len(windows) and (windows.min() < 0 or windows.max() >= before[-1]):
            raise IndexError(f"windows {windows.min()} to {windows.max()} of {before[-1]}")
        documents = np.searchsorted(before, windows, side="right") - 1
        starts = self._starts[documents] + (windows - before[documents]) * stride
        following = np.minimum(documents + 1, len(self._starts) - 1)
        ends = np.where(documents + 1 < len(self._starts), self._starts[following], len(self._ids))
        return starts, np.minimum(ends - starts, stride)
