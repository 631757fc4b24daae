"""Text -> ids exactly as a tokenizer itself gives them, in batches and in threads.

The threads of the tokenizers library itself wait for the longest text of each batch; here every
thread takes the next batch as soon as it is done. Encoding runs outside the interpreter's lock.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from typing import Any

import numpy as np

from mistudio.engine.datasets.documents import Document
from mistudio.engine.datasets.token_settings import TokenSettings
from mistudio.engine.progress import Progress
from mistudio.errors import InvalidInput

# A text of more bytes is tokenised in parts that meet at white space, so that memory stays flat:
# one token takes about a hundred bytes while the library works on it.
LONG_TEXT = 4_000_000
BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 200_000
_PATIENCE = 0.05  # seconds between two looks at whether the work should stop


@dataclass(frozen=True)
class Encoded:
    """A batch of documents: `ids` of all, one after the other, and how many are whose.

    `digests` are of the texts (8 bytes each), `bytes` their size in UTF-8. `plain_chats` counts
    conversations that the tokenizer's chat format refused, `long_texts` what was tokenised in
    parts."""

    ids: np.ndarray  # uint32 [tokens]
    lengths: np.ndarray  # int64 [documents]
    digests: bytes
    bytes: int
    plain_chats: int = 0
    long_texts: int = 0


class Encoder:
    """A tokenizer with settings. `bos_id` is left out in front: windows begin with it anew."""

    def __init__(self, tokenizer: Any, settings: TokenSettings, bos_id: int | None = None) -> None:
        settings.check()
        self._tokenizer = tokenizer
        self._settings = settings
        self._bos_id = bos_id
        self._backend = (
            tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        )
        if self._backend is not None:
            # What a tokenizer.json may bring along; a call of the tokenizer resets it, too.
            self._backend.no_truncation()
            self._backend.no_padding()
        self.prefix, self.suffix = self._special_tokens()
        self._room = settings.max_length - len(self.prefix) - len(self.suffix)
        if settings.truncates and self._room < 1:
            raise InvalidInput(
                "The maximum length is too short",
                f"The tokenizer itself adds {len(self.prefix) + len(self.suffix)} tokens to every "
                f"text; {settings.max_length} in all leave no room for text.",
                field="max_length",
            )
        self._from_left = getattr(tokenizer, "truncation_side", "right") == "left"

    @property
    def threads(self) -> int:
        """How many texts at a time; a tokenizer written in Python has no use for more than one."""
        return cores() if self._backend is not None else 1

    def encode(self, documents: list[Document]) -> Encoded:
        """The ids to store for these documents. Thread-safe for fast tokenizers."""
        plain = [utf8(document.text) for document in documents]
        digests = b"".join([blake2b(data, digest_size=8).digest() for data in plain])
        texts, chats, plain_chats = self._texts(documents, plain)
        long = [i for i, text in enumerate(texts) if len(text) > LONG_TEXT // 4]
        long = [i for i in long if len(texts[i].encode()) > LONG_TEXT]
        short = [text if i not in long else "" for i, text in enumerate(texts)] if long else texts
        lists = self._ids(short)
        for i in long:
            pieces = _pieces(texts[i])
            lists[i] = list(chain.from_iterable(self._ids([piece])[0] for piece in pieces))
        if not self._settings.packed:
            lists = [self._framed(ids, i in chats) for i, ids in enumerate(lists)]
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        ids = np.fromiter(chain.from_iterable(lists), np.uint32, int(lengths.sum()))
        return Encoded(ids, lengths, digests, sum(map(len, plain)), plain_chats, len(long))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self._backend is not None:
            found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in found]
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _texts(
        self, documents: list[Document], plain: list[bytes]
    ) -> tuple[list[str], set[int], int]:
        """What is tokenised: a conversation in the tokenizer's own chat format where it has one.
        Also which those are, and how many conversations that format refused."""
        texts = [
            document.text if document.text.isascii() else data.decode()
            for document, data in zip(documents, plain, strict=True)
        ]
        chats: set[int] = set()
        refused = 0
        if getattr(self._tokenizer, "chat_template", None):
            for i, document in enumerate(documents):
                written = self._chat(document) if document.messages else ""
                if written:
                    texts[i] = written
                    chats.add(i)
                refused += written is None
        return texts, chats, refused

    def _chat(self, document: Document) -> str | None:
        from jinja2 import TemplateError

        messages = [{"role": role, "content": content} for role, content in document.messages]
        try:
            written = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, ValueError, TypeError, KeyError, IndexError):
            return None  # many formats refuse two turns of one role, or a system's
        return utf8(str(written)).decode()

    def _framed(self, ids: list[int], chat: bool) -> list[int]:
        """A document by itself: cut off, with the tokens that the tokenizer adds, BOS apart.

        A chat format writes its special tokens itself.
        """
        prefix, suffix = ([], []) if chat else (self.prefix, self.suffix)
        if self._settings.truncates:
            room = self._settings.max_length - len(prefix) - len(suffix)
            if chat and self._bos_id is not None and ids[:1] != [self._bos_id]:
                room -= 1  # the window begins with it all the same
            ids = ids[-room:] if self._from_left else ids[:room]
        if not ids:
            return []
        whole = [*prefix, *ids, *suffix]
        return whole[1:] if self._bos_id is not None and whole[0] == self._bos_id else whole

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text, found by asking it."""
        if not self._settings.add_special_tokens:
            return [], []
        found = []
        for text in ("The cat", "2 + 2"):
            ids = list(self._tokenizer(text)["input_ids"])
            plain = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            starts = range(len(ids) - len(plain) + 1)
            at = next((i for i in starts if ids[i : i + len(plain)] == plain), None)
            if at is None:
                raise InvalidInput(
                    "This tokenizer's special tokens cannot be kept",
                    "It does not put them before and after a text but changes the text's own "
                    "tokens.",
                    "Turn Add Special Tokens off, or choose another tokenizer.",
                    field="add_special_tokens",
                )
            found.append((ids[:at], ids[at + len(plain) :]))
        if found[0] != found[1]:
            raise InvalidInput(
                "This tokenizer's special tokens cannot be kept",
                "They differ from one text to another.",
                "Turn Add Special Tokens off, or choose another tokenizer.",
                field="add_special_tokens",
            )
        return found[0]


def encode_all(
    documents: Iterable[Document], encoder: Encoder, progress: Progress
) -> Iterator[Encoded]:
    """Batches in the order of the documents, encoded in threads ahead of whoever takes them.

    Hears a stop within 50 ms however long a text is: the thread that still works on one is left
    to end by itself.
    """
    pool = ThreadPoolExecutor(encoder.threads, thread_name_prefix="tokenise")
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in batches(documents, progress.check):
            waiting.append(pool.submit(encoder.encode, batch))
            if len(waiting) > encoder.threads + 1:
                yield _result(waiting.popleft(), progress)
        while waiting:
            yield _result(waiting.popleft(), progress)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _result(future: Future[Encoded], progress: Progress) -> Encoded:
    while True:
        progress.check()
        try:
            return future.result(_PATIENCE)
        except TimeoutError:
            if future.done():
                raise


def batches(documents: Iterable[Document], check: Callable[[], None]) -> Iterator[list[Document]]:
    """Batches of about as much work each, however long the documents are."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        check()
        batch.append(document)
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def utf8(text: str) -> bytes:
    """UTF-8 cannot hold single halves of surrogate pairs; they become the replacement character."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _pieces(text: str) -> Iterator[str]:
    """Parts of at most `LONG_TEXT` bytes (a character has up to four) that begin at white space
    where there is any."""
    start, size = 0, LONG_TEXT // 4
    while len(text) - start > size:
        end = start + size
        cut = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
        end = cut if cut > start else end
        yield text[start:end]
        start = end
    yield text[start:]
