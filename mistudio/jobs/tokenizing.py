"""Jobs that turn text into tokens: tokenise a dataset, bring a tokenizer into the library."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mistudio.engine.datasets.token_settings import TokenSettings
from mistudio.engine.datasets.tokenizers import CHOICES, hash_tokenizer
from mistudio.engine.progress import Cancelled, Progress
from mistudio.errors import InvalidInput
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.library.library import Library
from mistudio.library.records import Dataset, Tokenization, Tokenizer

PACKED = TokenSettings()


@dataclass(frozen=True)
class Tokenize:
    """A dataset gets a token store for a tokenizer: a model's, or one of the library's own.

    `settings` holds fields of `TokenSettings`; what is missing has its default. Interrupted, it
    goes on from the last few seconds of its work.
    """

    dataset_id: int
    model_id: int | None = None
    tokenizer_id: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "tokenize"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("tokenize"),)

    def title(self, library: Library) -> str:
        dataset = library.datasets.get(self.dataset_id)
        return f"Tokenize {dataset.name} for {_named(library, self.model_id, self.tokenizer_id)}"

    def run(self, context: JobContext) -> dict[str, Any]:
        record = tokenize(
            context.library,
            context.work_folder,
            self.dataset_id,
            self.model_id,
            context,
            tokenizer_id=self.tokenizer_id,
            settings=TokenSettings.from_dict(self.settings),
            keep=context.library.checkpoint_folder(context.job_id) / "step-tokens",
        )
        return {"tokenization_id": record.id, "tokens": record.tokens}


@dataclass(frozen=True)
class AddTokenizer:
    """A tokenizer without a model comes into the library: `source` is a tokenizer.json, a
    SentencePiece .model file, a folder with one, a repository on the Hub, or `gpt2` or `llama`."""

    source: str
    name: str = ""

    kind: ClassVar[str] = "add_tokenizer"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("import"),)

    def title(self, library: Library) -> str:
        return f"Add the tokenizer {self.name or _label(self.source)}"

    def run(self, context: JobContext) -> dict[str, Any]:
        record = add_tokenizer(
            context.library, context.work_folder, self.source, context, name=self.name
        )
        return {"tokenizer_id": record.id, "vocab_size": record.vocab_size}


def tokenize(
    library: Library,
    work: Path,
    dataset_id: int,
    model_id: int | None,
    progress: Progress,
    *,
    tokenizer_id: int | None = None,
    settings: TokenSettings = PACKED,
    keep: Path | None = None,
) -> Tokenization:
    """The token store of a dataset for a tokenizer and settings, made if it is not there yet.

    In `keep` an interrupted call leaves what the next one goes on from.
    """
    from mistudio.engine.datasets.token_writer import write_token_store
    from mistudio.engine.datasets.tokenizers import pad_token
    from mistudio.engine.models import loading

    settings.check()
    dataset = library.datasets.get(dataset_id)
    tokenizer_folder = tokenizer_path(library, model_id, tokenizer_id)
    tokenizer_hash = hash_tokenizer(tokenizer_folder)
    if found := find_tokenization(library, dataset_id, tokenizer_hash, settings):
        return found
    if not dataset.link:
        library.require_space(dataset.characters * 2, f"Tokenizing {dataset.name}")
    tokenizer = loading.load_tokenizer(tokenizer_folder)
    separator = loading.separator_id(tokenizer)
    special = settings.add_special_tokens
    folder = keep or work / "tokens"
    reading = Reading(progress)
    began = time.monotonic()
    try:
        meta = write_token_store(
            documents_of(library, dataset, reading),
            tokenizer,
            folder,
            bos_id=loading.adds_bos(tokenizer) if special else None,
            separator_id=separator if special else None,
            special_ids=sorted(loading.special_ids(tokenizer)),
            pad_id=pad_token(tokenizer, separator) if settings.padded else None,
            tokenizer_hash=tokenizer_hash,
            documents_sha256=_identity(dataset),
            settings=settings,
            place=reading.place if dataset.link else None,
            progress=progress,
        )
        target = library.new_folder("datasets", f"{dataset.name}-tokens")
        with library.commit(folder, target):
            record_id = library.tokenizations.add(
                dataset_id=dataset_id,
                tokenizer_hash=tokenizer_hash,
                settings=settings.key(),
                folder=target,
                tokens=sum(meta.tokens.values()),
                statistics={
                    **meta.statistics,
                    "split_tokens": meta.tokens,
                    "split_documents": meta.documents,
                    "tokenizer": _named(library, model_id, tokenizer_id),
                    "layout": settings.describe(),
                    "seconds": time.monotonic() - began,
                },
            )
            library.note_change("datasets", dataset_id)
    except sqlite3.IntegrityError:
        # Another job was quicker with the same tokens.
        if found := find_tokenization(library, dataset_id, tokenizer_hash, settings):
            return found
        raise
    except Exception as exc:
        # Nothing to go on from where the work itself cannot be done.
        if keep is not None and not isinstance(exc, Cancelled | OSError):
            shutil.rmtree(keep, ignore_errors=True)
        raise
    return library.tokenizations.get(record_id)


def find_tokenization(
    library: Library, dataset_id: int, tokenizer_hash: str, settings: TokenSettings = PACKED
) -> Tokenization | None:
    """The one that has just these tokens; None where it is still to be made."""
    key = settings.key()
    for found in library.tokenizations.of_dataset(dataset_id):
        if found.tokenizer_hash == tokenizer_hash and found.settings == key:
            return found
    return None


def text_for(
    library: Library,
    work: Path,
    dataset_id: int,
    model_id: int,
    progress: Progress,
    tokenization_id: int | None = None,
) -> Tokenization:
    """The tokens that a model reads of a dataset: the packed ones, made where they are missing,
    or the tokenisation that was chosen. InvalidInput where that is of another dataset or model."""
    if tokenization_id is None:
        return tokenize(library, work, dataset_id, model_id, progress)
    chosen = library.tokenizations.get(tokenization_id)
    model = library.models.get(model_id)
    if chosen.dataset_id != dataset_id:
        raise InvalidInput(
            "This tokenisation is of another dataset",
            f"Tokenisation {chosen.id} was not made from {library.datasets.get(dataset_id).name}.",
            "Choose one of this dataset's tokenisations.",
            field="tokenization_id",
        )
    if chosen.tokenizer_hash != hash_tokenizer(library.path(model.folder)):
        raise InvalidInput(
            "This tokenisation is for another tokenizer",
            f"Tokenisation {chosen.id} was made with that of "
            f"{chosen.statistics.get('tokenizer', 'another model')}; {model.name} would read its "
            "numbers as other words.",
            f"Tokenise the dataset for {model.name}, or choose a tokenisation that is.",
            field="tokenization_id",
        )
    return chosen


def _identity(dataset: Dataset) -> str:
    """Names the text of a dataset: a linked one by what it was when it was added."""
    link = dataset.link
    if not link:
        return str(dataset.provenance.get("sha256", ""))
    if fingerprint := link.get("fingerprint"):
        return str(fingerprint)
    return hashlib.sha256(json.dumps(link, sort_keys=True).encode()).hexdigest()


class Reading:
    """The progress of whoever reads documents, kept for whoever works on them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._place: tuple[float, float | None] = (0, None)

    def check(self) -> None:
        self._progress.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        self._place = (done, self._place[1] if total is None else total)
        if metrics.get("note"):
            self._progress.report(done, total, note=metrics["note"])

    def place(self) -> tuple[float, float | None]:
        """Bytes read, of how many."""
        return self._place


def documents_of(library: Library, dataset: Dataset, progress: Progress) -> Iterable[Any]:
    """All documents of a dataset, in order: stored ones, or read where its link says, each time
    that they are gone through."""
    if dataset.link:
        return _Linked(dataset.link, progress)
    from mistudio.engine.datasets.documents import Documents

    return Documents(library.path(dataset.folder))


@dataclass(frozen=True)
class _Linked:
    link: dict[str, Any]
    progress: Progress

    def __iter__(self) -> Iterator[Any]:
        from mistudio.engine.datasets.links import open_link

        return open_link(self.link, self.progress)


def tokenizer_path(library: Library, model_id: int | None, tokenizer_id: int | None) -> Path:
    """The folder of a model's tokenizer or of one of the library's own."""
    if (model_id is None) == (tokenizer_id is None):
        raise InvalidInput(
            "No tokenizer is chosen" if model_id is None else "Two tokenizers are chosen",
            next_step="Choose a model, or a tokenizer of your own.",
            field="tokenizer",
        )
    if tokenizer_id is not None:
        return library.path(library.tokenizers.get(tokenizer_id).folder)
    assert model_id is not None
    return library.path(library.models.get(model_id).folder)


def _named(library: Library, model_id: int | None, tokenizer_id: int | None) -> str:
    if model_id is not None:
        return library.models.get(model_id).name
    return library.tokenizers.get(tokenizer_id).name if tokenizer_id is not None else "no model"


def add_tokenizer(
    library: Library, work: Path, source: str, progress: Progress, *, name: str = ""
) -> Tokenizer:
    """Fetch or copy, see that it can be loaded, commit. One with the same content is not added
    twice."""
    from mistudio.engine.datasets.token_writer import vocabulary_size
    from mistudio.engine.datasets.tokenizers import copy_tokenizer, download_tokenizer
    from mistudio.engine.hub.repository import is_repository_id
    from mistudio.engine.models import loading

    repository = {choice.key: choice.source for choice in CHOICES}.get(source, source)
    path = Path(source).expanduser()
    folder = work / "tokenizer"
    provenance: dict[str, Any]
    if path.exists() or not is_repository_id(repository):
        copy_tokenizer(path, folder)
        kind, origin, provenance = "local", str(path), {}
    else:
        provenance = download_tokenizer(repository, folder, progress)
        kind, origin = "hub", repository
    tokenizer = loading.load_tokenizer(folder)
    loading.separator_id(tokenizer)  # refused now rather than at the first dataset
    tokenizer_hash = hash_tokenizer(folder)
    for found in library.tokenizers.all("tokenizer_hash = ?", (tokenizer_hash,)):
        return found
    name = name.strip() or _label(source)
    target = library.new_folder("tokenizers", name)
    with library.commit(folder, target):
        record_id = library.tokenizers.add(
            name=name,
            source=kind,
            origin=origin,
            folder=target,
            tokenizer_hash=tokenizer_hash,
            vocab_size=vocabulary_size(tokenizer),
            provenance=provenance,
        )
    return library.tokenizers.get(record_id)


def _label(source: str) -> str:
    """What a tokenizer is called where the user gave no name."""
    for choice in CHOICES:
        if choice.source and source in (choice.key, choice.source):
            return choice.label
    path = Path(source)
    general = path.stem in ("tokenizer", "spiece", "sentencepiece.bpe")
    return path.parent.name if general and path.parent.name else path.stem or source
