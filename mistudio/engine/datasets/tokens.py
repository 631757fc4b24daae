"""The token store: packed ids on disk without padding, with document boundaries, in two splits.

`train` is what dictionaries learn from; `heldout` is what they are judged on. A document is in
one of them by the hash of its text, so that an exact duplicate never crosses over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mistudio.engine.datasets.documents import Document, Documents
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import InvalidInput

SPLITS = ("train", "heldout")
META = "meta.json"
LENGTH_EDGES = (0, 100, 200, 400, 600, 800, 1000)


class Tokenizer(Protocol):
    """The part of a Hugging Face fast tokenizer that is used here."""

    def __call__(self, text: list[str], **options: Any) -> Any: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class TokenMeta:
    """What a store holds. `bos_id` starts every window where the model's tokenizer uses one;
    `separator_id` stands between documents; `special_ids` never count in any statistic."""

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


def write_token_store(
    documents: Documents,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    bos_id: int | None,
    separator_id: int | None,
    special_ids: Sequence[int],
    tokenizer_hash: str,
    documents_sha256: str = "",
    heldout_share: float = 0.1,
    progress: Progress = SILENT,
) -> TokenMeta:
    """Tokenise every document into `folder`. Ids are uint16 where the vocabulary allows."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = len(tokenizer)
    dtype = np.uint16 if vocab_size <= 65536 else np.uint32
    writers = {split: _SplitWriter(folder, split, dtype, separator_id) for split in SPLITS}
    statistics = _Statistics(vocab_size)
    done = 0
    try:
        for batch in _batches(documents):
            progress.check()
            texts = [document.text for document in batch]
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for offset, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
                split = "heldout" if _is_heldout(text, heldout_share) else "train"
                array = np.asarray(ids, dtype=dtype)
                writers[split].add(done + offset, array)
                statistics.add(array)
            done += len(batch)
            progress.report(done, len(documents), tokens=statistics.tokens)
    finally:
        for writer in writers.values():
            writer.close()
    meta = TokenMeta(
        vocab_size=vocab_size,
        bos_id=bos_id,
        separator_id=separator_id,
        special_ids=sorted(special_ids),
        tokenizer_hash=tokenizer_hash,
        documents_sha256=documents_sha256,
        heldout_share=heldout_share,
        tokens={split: writer.tokens for split, writer in writers.items()},
        documents={split: writer.documents for split, writer in writers.items()},
        statistics=statistics.summary(),
    )
    (folder / META).write_text(json.dumps(asdict(meta), indent=1), encoding="utf-8")
    return meta


class TokenStore:
    """A finished store, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.meta = TokenMeta(**json.loads((folder / META).read_text(encoding="utf-8")))
        self.train = TokenSplit(folder, "train", self.meta)
        self.heldout = TokenSplit(folder, "heldout", self.meta)

    def split(self, name: str) -> TokenSplit:
        return self.heldout if name == "heldout" else self.train


class TokenSplit:
    """One split as windows of equal length; nothing is padded, the last partial window is left
    out."""

    def __init__(self, folder: Path, split: str, meta: TokenMeta) -> None:
        dtype = np.uint16 if meta.vocab_size <= 65536 else np.uint32
        self.name = split
        self.meta = meta
        path = folder / f"{split}.ids"
        empty = path.stat().st_size == 0
        self._ids = np.empty(0, dtype) if empty else np.memmap(path, dtype=dtype, mode="r")
        self._starts = np.load(folder / f"{split}.starts.npy", mmap_mode="r")
        self._documents = np.load(folder / f"{split}.documents.npy", mmap_mode="r")

    def __len__(self) -> int:
        """Tokens, separators included."""
        return len(self._ids)

    def _stride(self, context: int) -> int:
        """Corpus tokens in a window: one fewer where every window starts with BOS."""
        return context - (self.meta.bos_id is not None)

    def n_windows(self, context: int) -> int:
        return len(self._ids) // self._stride(context)

    def windows(self, indices: Sequence[int] | np.ndarray, context: int) -> torch.Tensor:
        """Ids of the given windows, int64 [len(indices), context]."""
        stride = self._stride(context)
        starts = np.asarray(indices, dtype=np.int64)[:, None] * stride
        body = self._ids[starts + np.arange(stride)].astype(np.int64)
        if self.meta.bos_id is not None:
            body = np.concatenate([np.full((len(body), 1), self.meta.bos_id), body], axis=1)
        return torch.from_numpy(body)

    def document_at(self, window: int, position: int, context: int) -> int:
        """The dataset's document that the token at (window, position) comes from."""
        place = window * self._stride(context) + position - (self.meta.bos_id is not None)
        found = int(np.searchsorted(self._starts, max(place, 0), side="right")) - 1
        return int(self._documents[found])

    def require_windows(self, context: int, needed: int, purpose: str) -> None:
        """Refuse with numbers where the split is too short."""
        have = self.n_windows(context)
        if have < needed:
            raise InvalidInput(
                "Too little text",
                f"{purpose} needs at least {needed} windows of {context} tokens; "
                f"the {self.name} split has {have} ({len(self):,} tokens).",
                "Add a larger dataset, or choose a shorter context.",
            )


class _SplitWriter:
    def __init__(
        self, folder: Path, split: str, dtype: type[np.unsignedinteger[Any]], separator: int | None
    ) -> None:
        self._folder, self._split, self._dtype = folder, split, dtype
        self._separator = separator
        self._file = (folder / f"{split}.ids").open("wb")
        self._starts: list[int] = []
        self._documents: list[int] = []
        self.tokens = 0

    @property
    def documents(self) -> int:
        return len(self._documents)

    def add(self, document: int, ids: np.ndarray) -> None:
        if not len(ids):
            return
        if self._separator is not None and self.tokens:
            self._file.write(np.asarray([self._separator], dtype=self._dtype).tobytes())
            self.tokens += 1
        self._starts.append(self.tokens)
        self._documents.append(document)
        self._file.write(ids.tobytes())
        self.tokens += len(ids)

    def close(self) -> None:
        self._file.close()
        np.save(self._folder / f"{self._split}.starts.npy", np.asarray(self._starts, np.int64))
        np.save(
            self._folder / f"{self._split}.documents.npy", np.asarray(self._documents, np.int64)
        )


class _Statistics:
    """Token counts and document lengths, in one pass and memory of the vocabulary's size."""

    def __init__(self, vocab_size: int) -> None:
        self._counts = np.zeros(vocab_size, np.int64)
        self._lengths: list[int] = []
        self.tokens = 0

    def add(self, ids: np.ndarray) -> None:
        self._counts += np.bincount(ids, minlength=len(self._counts))[: len(self._counts)]
        self._lengths.append(len(ids))
        self.tokens += len(ids)

    def summary(self) -> dict[str, Any]:
        lengths = np.asarray(self._lengths or [0])
        edges = [*LENGTH_EDGES, np.inf]
        histogram, _ = np.histogram(lengths, bins=edges)
        top = np.argsort(-self._counts, kind="stable")[:20]
        top = top[self._counts[top] > 0]
        return {
            "tokens": self.tokens,
            "documents": len(self._lengths),
            "unique_tokens": int((self._counts > 0).sum()),
            "length_min": int(lengths.min()),
            "length_median": float(np.median(lengths)),
            "length_mean": float(lengths.mean()),
            "length_max": int(lengths.max()),
            "length_edges": list(LENGTH_EDGES),
            "length_histogram": histogram.tolist(),
            "top_tokens": [[int(token), int(self._counts[token])] for token in top],
        }


def _is_heldout(text: str, share: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _batches(
    documents: Documents, documents_limit: int = 128, characters_limit: int = 200_000
) -> Iterator[list[Document]]:
    """Batches that take well under 200 ms to tokenise, however long the documents are."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == documents_limit or characters >= characters_limit:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
