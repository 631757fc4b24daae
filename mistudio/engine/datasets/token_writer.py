"""Writing a token store: one pass over the documents in flat memory, stoppable, resumable.

Ids and the index of documents are appended to files. Every few seconds what is written is flushed
and a small state beside it says how far it goes; a later pass with the same inputs goes on there.
"""

from __future__ import annotations

import io
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np

from mistudio.engine.datasets.documents import Document
from mistudio.engine.datasets.encoding import Encoded, Encoder, batches, encode_all, utf8
from mistudio.engine.datasets.lengths import Lengths
from mistudio.engine.datasets.token_settings import TokenSettings
from mistudio.engine.datasets.tokens import (
    COUNTS,
    LENGTH_EDGES,
    META,
    SPLITS,
    TokenMeta,
    TokenStore,
    id_type,
)
from mistudio.engine.progress import SILENT, Interrupted, Progress
from mistudio.errors import InvalidInput

STATE = "resume.npz"
FLUSH_SECONDS = 10.0


def write_token_store(
    documents: Iterable[Document],
    tokenizer: Any,
    folder: Path,
    *,
    bos_id: int | None,
    separator_id: int | None,
    special_ids: Sequence[int],
    tokenizer_hash: str,
    documents_sha256: str = "",
    pad_id: int | None = None,
    settings: TokenSettings = TokenSettings(),  # noqa: B008 (frozen)
    place: Callable[[], tuple[float, float | None]] | None = None,
    progress: Progress = SILENT,
) -> TokenMeta:
    """Tokenise every document into `folder`. Ids are uint16 where the vocabulary allows;
    `documents` can be read through more than once.

    Where `folder` holds what an interrupted call with the same arguments left, it goes on from
    there; if the documents are not the same as far as that goes, it begins anew and says so with
    the metric `note`. `place` says how far documents are read (bytes done, of how many) where
    they come from elsewhere; stored ones say so themselves. Raises InvalidInput where no document
    has a token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(tokenizer, settings, bos_id)
    vocab_size = vocabulary_size(tokenizer)
    identity = {
        "tokenizer": tokenizer_hash,
        "documents": documents_sha256,
        "settings": settings.key(),
        "ids": [bos_id, separator_id, pad_id],
        "vocabulary": vocab_size,
    }
    writer = _Writer(folder, vocab_size, separator_id if settings.packed else None, settings)
    try:
        rest = _go_on(writer, documents, identity, progress)
        writer.open()
        _write(writer, rest, encoder, identity, place or _stored(writer, documents), progress)
    except Interrupted:
        writer.save(identity)
        raise
    finally:
        writer.close()
    if not sum(writer.tokens.values()):
        raise InvalidInput(
            "No tokens",
            "Not one document has a token under this tokenizer.",
            "Choose another tokenizer, or look at the documents.",
        )
    if pad_id is not None and settings.padded:
        special_ids = [*special_ids, pad_id]
    meta = TokenMeta(
        vocab_size=vocab_size,
        bos_id=bos_id,
        separator_id=separator_id if settings.packed else None,
        special_ids=sorted(set(special_ids)),
        tokenizer_hash=tokenizer_hash,
        documents_sha256=documents_sha256,
        heldout_share=settings.heldout_share,
        tokens=dict(writer.tokens),
        documents=dict(writer.documents),
        statistics=writer.statistics(special_ids),
        pad_id=pad_id if settings.padded else None,
        settings=settings.key(),
    )
    np.save(folder / COUNTS, writer.counts)
    (folder / META).write_text(json.dumps(asdict(meta), indent=1), encoding="utf-8")
    (folder / STATE).unlink(missing_ok=True)
    return meta


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id: vocabularies may have holes, and more ids than entries."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def _write(
    writer: _Writer,
    rest: Iterable[Document],
    encoder: Encoder,
    identity: dict[str, Any],
    place: Callable[[], tuple[float, float | None]],
    progress: Progress,
) -> None:
    flushed = time.monotonic()
    for batch in encode_all(rest, encoder, progress):
        writer.add(batch)
        done, total = place()
        progress.report(done, total, documents=writer.read, tokens=sum(writer.tokens.values()))
        if time.monotonic() - flushed > FLUSH_SECONDS:
            writer.save(identity)
            flushed = time.monotonic()


def _stored(writer: _Writer, documents: Any) -> Callable[[], tuple[float, float | None]]:
    """Bytes done and in all of stored documents, whose number tells the share; of others only
    the bytes of text that have passed are known."""

    def place() -> tuple[float, float | None]:
        if not hasattr(documents, "__len__"):
            return writer.bytes, None
        total = int(getattr(documents, "bytes", 0)) or len(documents)
        return total * writer.read / max(1, len(documents)), total

    return place


def _go_on(
    writer: _Writer, documents: Iterable[Document], identity: dict[str, Any], progress: Progress
) -> Iterator[Document]:
    """The documents after those that an earlier call has done, which are read again only to see
    that they are the same."""
    rest = iter(documents)
    if not writer.load(identity):
        return rest
    done, texts = writer.read, writer.texts
    progress.report(0, None, note=f"Going on after {done:,} documents that are tokenised already.")
    seen = again = 0
    for batch in batches(islice(rest, done), progress.check):
        again = zlib.crc32(b"".join([_digest(document) for document in batch]), again)
        seen += len(batch)
        progress.check()
    if (seen, again) == (done, texts):
        return rest
    progress.report(0, None, note="The documents have changed: their tokenisation begins anew.")
    writer.forget()
    return iter(documents)


def _digest(document: Document) -> bytes:
    from hashlib import blake2b

    return blake2b(utf8(document.text), digest_size=8).digest()


class _Writer:
    """The files of both splits and what is counted on the way; memory of the vocabulary's size."""

    def __init__(
        self, folder: Path, vocab_size: int, separator: int | None, settings: TokenSettings
    ) -> None:
        self._folder, self._separator = folder, separator
        self._vocab_size = vocab_size
        self._truncated = settings.truncates
        self._dtype = id_type(vocab_size)
        # A document is held out where its digest, read as a number, is below this.
        self._threshold = int(np.ceil(settings.heldout_share * 2.0**64))
        self._files: dict[str, tuple[IO[bytes], _Column, _Column]] = {}
        self._begin()

    def forget(self) -> None:
        """As if nothing had been written."""
        (self._folder / STATE).unlink(missing_ok=True)
        self._begin()

    def _begin(self) -> None:
        self._resumed = False
        self.read = 0  # documents
        self.texts = 0  # crc32 of the digests of all texts read
        self.bytes = 0
        self.plain_chats = 0
        self.long_texts = 0
        self.tokens = dict.fromkeys(SPLITS, 0)  # separators included
        self.documents = dict.fromkeys(SPLITS, 0)
        self.counts = np.zeros(self._vocab_size, np.int64)
        self.lengths = Lengths()

    def open(self) -> None:
        for split in SPLITS:
            path = self._folder / f"{split}.ids"
            ids = path.open("r+b" if self._resumed else "wb")
            ids.truncate(self.tokens[split] * np.dtype(self._dtype).itemsize)
            ids.seek(0, os.SEEK_END)
            n = self.documents[split] if self._resumed else None
            starts = _Column(self._folder / f"{split}.starts.npy", n)
            self._files[split] = (ids, starts, _Column(self._folder / f"{split}.documents.npy", n))

    def add(self, batch: Encoded) -> None:
        heldout = self._heldout(batch.digests)
        numbers = np.arange(self.read, self.read + len(batch.lengths))
        some = batch.lengths > 0
        for split, chosen in (("train", some & ~heldout), ("heldout", some & heldout)):
            whose = np.repeat(chosen, batch.lengths)
            self._append(split, batch.ids[whose], batch.lengths[chosen], numbers[chosen])
        counts = np.bincount(batch.ids)
        self.counts[: len(counts)] += counts
        self.lengths.add(batch.lengths[some])
        self.read += len(batch.lengths)
        self.texts = zlib.crc32(batch.digests, self.texts)
        self.bytes += batch.bytes
        self.plain_chats += batch.plain_chats
        self.long_texts += batch.long_texts

    def _heldout(self, digests: bytes) -> np.ndarray:
        if self._threshold >= 2**64:
            return np.ones(len(digests) // 8, bool)
        return np.frombuffer(digests, ">u8") < np.uint64(self._threshold)

    def _append(
        self, split: str, ids: np.ndarray, lengths: np.ndarray, numbers: np.ndarray
    ) -> None:
        if not len(lengths):
            return
        file, starts, documents = self._files[split]
        # Places in the file: a document follows the tokens before it and the separators before it.
        before = np.cumsum(lengths) - lengths
        if self._separator is not None:
            before += np.arange(len(lengths)) + (self.tokens[split] > 0)
            joined = np.full(before[-1] + lengths[-1], self._separator, self._dtype)
            shift = before - (np.cumsum(lengths) - lengths)
            joined[np.arange(len(ids)) + np.repeat(shift, lengths)] = ids
        else:
            joined = ids.astype(self._dtype)
        file.write(joined.tobytes())
        starts.append(self.tokens[split] + before)
        documents.append(numbers)
        self.tokens[split] += len(joined)
        self.documents[split] += len(lengths)

    def close(self) -> None:
        for ids, starts, documents in self._files.values():
            ids.close()
            starts.close()
            documents.close()
        self._files = {}

    # --- going on later -----------------------------------------------------------------------

    def save(self, identity: dict[str, Any]) -> None:
        """Flush the files, then say how far they are valid: in this order, a kill at any moment
        leaves a state that is true."""
        if not self._files:
            return
        for ids, starts, documents in self._files.values():
            for file in (ids, starts.file, documents.file):
                file.flush()
                os.fsync(file.fileno())
        told = {
            "identity": identity,
            "read": self.read,
            "texts": self.texts,
            "bytes": self.bytes,
            "plain_chats": self.plain_chats,
            "long_texts": self.long_texts,
            "tokens": self.tokens,
            "documents": self.documents,
        }
        part = self._folder / f"{STATE}.part"
        with part.open("wb") as file:
            np.savez(
                file,
                told=np.frombuffer(json.dumps(told).encode(), np.uint8),
                counts=self.counts,
                lengths=self.lengths.state(),
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._folder / STATE)

    def load(self, identity: dict[str, Any]) -> bool:
        """Take up what an interrupted writer left; False where there is nothing that fits."""
        try:
            with np.load(io.BytesIO((self._folder / STATE).read_bytes())) as state:
                told = json.loads(state["told"].tobytes())
                counts, lengths = state["counts"], state["lengths"]
            same = told["identity"] == identity and len(counts) == self._vocab_size
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
            return False
        if not same or not self._long_enough(told):
            return False
        self.read, self.texts, self.bytes = told["read"], told["texts"], told["bytes"]
        self.plain_chats, self.long_texts = told["plain_chats"], told["long_texts"]
        self.tokens, self.documents = told["tokens"], told["documents"]
        self.counts = counts.astype(np.int64)
        self.lengths = Lengths(lengths)
        self._resumed = True
        return True

    def _long_enough(self, told: dict[str, Any]) -> bool:
        width = np.dtype(self._dtype).itemsize
        for split in SPLITS:
            wanted = {
                f"{split}.ids": told["tokens"][split] * width,
                f"{split}.starts.npy": _Column.HEADER + 8 * told["documents"][split],
                f"{split}.documents.npy": _Column.HEADER + 8 * told["documents"][split],
            }
            for name, size in wanted.items():
                path = self._folder / name
                if not path.is_file() or path.stat().st_size < size:
                    return False
        return True

    def statistics(self, special_ids: Sequence[int]) -> dict[str, Any]:
        lengths = self.lengths
        return {
            "documents": lengths.count,
            "length_min": lengths.smallest,
            "length_median": lengths.median(),
            "length_mean": lengths.total / max(1, lengths.count),
            "length_max": lengths.largest,
            "length_edges": list(LENGTH_EDGES),
            "length_histogram": lengths.histogram(LENGTH_EDGES),
            "bytes": self.bytes,
            "empty_documents": self.read - lengths.count,
            "plain_chats": self.plain_chats,
            "long_texts": self.long_texts,
            "truncated": self._truncated,
            **token_statistics(self.counts, special_ids),
        }


def token_statistics(counts: np.ndarray, special_ids: Sequence[int]) -> dict[str, Any]:
    """How the vocabulary is used, from how often each id occurs [vocab_size].

    `zipf` are (rank, count) pairs, the most frequent first, at ranks about evenly spaced on a
    logarithmic axis. `coverage` is the share of the ids that are not special and occur.
    `half_of_text` is how many of the most frequent ids make up half of the text.
    """
    order = np.argsort(-counts, kind="stable")
    sorted_counts = counts[order]
    used = int((counts > 0).sum())
    tokens = int(counts.sum())
    special = np.unique(np.asarray([i for i in special_ids if 0 <= i < len(counts)], np.int64))
    ordinary = len(counts) - len(special)
    used_ordinary = used - int((counts[special] > 0).sum())
    ranks = np.unique(np.geomspace(1, max(1, used), 200).round().astype(np.int64))
    sums = np.cumsum(sorted_counts)
    return {
        "tokens": tokens,
        "unique_tokens": used,
        "vocabulary": len(counts),
        "coverage": used_ordinary / max(1, ordinary),
        "once": int((counts == 1).sum()),
        "half_of_text": int(np.searchsorted(sums, tokens / 2) + 1) if tokens else 0,
        "zipf": [[int(rank), int(sorted_counts[rank - 1])] for rank in ranks] if used else [],
        "top_tokens": [[int(i), int(counts[i])] for i in order[:20] if counts[i] > 0],
    }


def count_tokens(store: TokenStore, progress: Progress = SILENT) -> np.ndarray:
    """int64 [vocab_size]: how often each id occurs in a finished store, separators not counted."""
    counts = np.zeros(store.meta.vocab_size, np.int64)
    for split in (store.train, store.heldout):
        for chunk in split.chunks():
            progress.check()
            found = np.bincount(chunk, minlength=len(counts))
            counts += found
        if store.meta.separator_id is not None:
            counts[store.meta.separator_id] -= max(0, store.meta.documents[split.name] - 1)
    return counts


class _Column:
    """An .npy file of int64 that grows: its header is written anew when its length is known."""

    HEADER = 128  # bytes, of which numpy keeps some free for the length

    def __init__(self, path: Path, resume_at: int | None) -> None:
        self.file: IO[bytes] = path.open("wb" if resume_at is None else "r+b")
        self._n = resume_at or 0
        self._header()
        self.file.truncate(self.HEADER + 8 * self._n)
        self.file.seek(0, os.SEEK_END)

    def _header(self) -> None:
        self.file.seek(0)
        what = {"descr": "<i8", "fortran_order": False, "shape": (self._n,)}
        np.lib.format.write_array_header_1_0(self.file, what)
        if self.file.tell() != self.HEADER:
            raise AssertionError(f"numpy wrote a header of {self.file.tell()} bytes")

    def append(self, values: np.ndarray) -> None:
        self.file.write(values.astype("<i8").tobytes())
        self._n += len(values)

    def close(self) -> None:
        self._header()
        self.file.close()
