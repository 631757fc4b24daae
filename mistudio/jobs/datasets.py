"""Jobs on datasets: add text to the library, tokenise it."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mistudio.engine.progress import Progress
from mistudio.errors import InvalidInput
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.library.library import Library
from mistudio.library.records import Tokenization
from mistudio.resources import resource

SAMPLE_NAME = "Wikipedia vital articles"
SAMPLE_FILE = ("sample", "wikipedia_vital_intros.jsonl")
SAMPLE_LICENCE = "CC BY-SA 4.0, text by Wikipedia contributors"
HELDOUT_SHARE = 0.1


@dataclass(frozen=True)
class AddDataset:
    """A local file or folder becomes a dataset."""

    path: str
    text_column: str | None = None
    name: str | None = None
    skip_bad_rows: bool = False

    kind: ClassVar[str] = "add_dataset"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("read"),)

    def title(self, library: Library) -> str:
        return f"Add {self.name or Path(self.path).name}"

    def run(self, context: JobContext) -> dict[str, Any]:
        dataset_id, skipped = add_dataset(
            context.library,
            context.work_folder,
            Path(self.path).expanduser(),
            context,
            name=self.name,
            text_column=self.text_column,
            skip_bad_rows=self.skip_bad_rows,
        )
        return {"dataset_id": dataset_id, "skipped": len(skipped), "skipped_rows": skipped[:50]}


@dataclass(frozen=True)
class AddSampleDataset:
    """The corpus that ships with miStudio becomes a dataset; once is enough."""

    kind: ClassVar[str] = "add_sample_dataset"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("read"),)

    def title(self, library: Library) -> str:
        return f"Add the sample: {SAMPLE_NAME}"

    def run(self, context: JobContext) -> dict[str, Any]:
        return {"dataset_id": add_sample_dataset(context.library, context.work_folder, context)}


@dataclass(frozen=True)
class Tokenize:
    """A dataset gets a token store for a model's tokenizer."""

    dataset_id: int
    model_id: int

    kind: ClassVar[str] = "tokenize"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("tokenize"),)

    def title(self, library: Library) -> str:
        dataset = library.datasets.get(self.dataset_id)
        return f"Tokenize {dataset.name} for {library.models.get(self.model_id).name}"

    def run(self, context: JobContext) -> dict[str, Any]:
        record = tokenize(
            context.library, context.work_folder, self.dataset_id, self.model_id, context
        )
        return {"tokenization_id": record.id, "tokens": record.tokens}


def add_sample_dataset(library: Library, work: Path, progress: Progress) -> int:
    """Id of the sample dataset, added if it is not there yet."""
    for dataset in library.datasets.all("source = 'sample'"):
        return dataset.id
    dataset_id, _ = add_dataset(
        library,
        work,
        resource(*SAMPLE_FILE),
        progress,
        name=SAMPLE_NAME,
        source="sample",
        licence=SAMPLE_LICENCE,
    )
    return dataset_id


def add_dataset(
    library: Library,
    work: Path,
    path: Path,
    progress: Progress,
    *,
    name: str | None = None,
    text_column: str | None = None,
    skip_bad_rows: bool = False,
    source: str = "local",
    licence: str = "",
) -> tuple[int, list[str]]:
    """Read, store, then commit. Returns the id and the rows that were left out."""
    from mistudio.engine.datasets.documents import write_documents
    from mistudio.engine.datasets.sources import local_files, read_documents

    name = (name or path.stem).strip() or path.name
    source_bytes = sum(file.stat().st_size for file in local_files(path))
    library.require_space(2 * source_bytes, f"Adding {path.name}")
    skipped: list[str] = []
    folder = work / "dataset"
    written = write_documents(
        read_documents(path, text_column, skipped if skip_bad_rows else None),
        folder,
        progress,
        expected_bytes=source_bytes,
    )
    target = library.new_folder("datasets", name)
    with library.commit(folder, target):
        dataset_id = library.datasets.add(
            name=name,
            source=source,
            origin=str(path) if source == "local" else path.name,
            folder=target,
            documents=written.documents,
            characters=written.characters,
            bytes=written.bytes,
            provenance={
                "sha256": written.sha256,
                "licence": licence,
                "text_column": text_column,
                "skipped_rows": len(skipped),
            },
        )
    return dataset_id, skipped


def tokenize(
    library: Library, work: Path, dataset_id: int, model_id: int, progress: Progress
) -> Tokenization:
    """The token store of a dataset for a model, made if it is not there yet."""
    from mistudio.engine.datasets.documents import Documents
    from mistudio.engine.datasets.tokens import write_token_store
    from mistudio.engine.models import loading

    dataset = library.datasets.get(dataset_id)
    model = library.models.get(model_id)
    model_folder = library.path(model.folder)
    tokenizer_hash = hash_tokenizer(model_folder)
    settings = {"heldout_share": HELDOUT_SHARE}
    if found := _tokenization(library, dataset_id, tokenizer_hash, settings):
        return found
    library.require_space(dataset.characters * 2, f"Tokenizing {dataset.name}")
    tokenizer = loading.load_tokenizer(model_folder)
    folder = work / "tokens"
    began = time.monotonic()
    meta = write_token_store(
        Documents(library.path(dataset.folder)),
        tokenizer,
        folder,
        bos_id=loading.adds_bos(tokenizer),
        separator_id=loading.separator_id(tokenizer),
        special_ids=sorted(loading.special_ids(tokenizer)),
        tokenizer_hash=tokenizer_hash,
        documents_sha256=dataset.provenance.get("sha256", ""),
        heldout_share=HELDOUT_SHARE,
        progress=progress,
    )
    target = library.new_folder("datasets", f"{dataset.name}-tokens")
    try:
        with library.commit(folder, target):
            record_id = library.tokenizations.add(
                dataset_id=dataset_id,
                tokenizer_hash=tokenizer_hash,
                settings=settings,
                folder=target,
                tokens=sum(meta.tokens.values()),
                statistics={
                    **meta.statistics,
                    "split_tokens": meta.tokens,
                    "split_documents": meta.documents,
                    "tokenizer": model.name,
                    "seconds": time.monotonic() - began,
                },
            )
            library.note_change("datasets", dataset_id)
    except sqlite3.IntegrityError:
        # Another job was quicker with the same tokens.
        if found := _tokenization(library, dataset_id, tokenizer_hash, settings):
            return found
        raise
    return library.tokenizations.get(record_id)


def _tokenization(
    library: Library, dataset_id: int, tokenizer_hash: str, settings: dict[str, Any]
) -> Tokenization | None:
    for found in library.tokenizations.of_dataset(dataset_id):
        if found.tokenizer_hash == tokenizer_hash and found.settings == settings:
            return found
    return None


def hash_tokenizer(model_folder: Path) -> str:
    """Names a tokenizer by its content, so that two models with the same one share a store."""
    digest = hashlib.sha256()
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
    )
    found = [model_folder / name for name in names if (model_folder / name).is_file()]
    if not found:
        raise InvalidInput(
            "The model has no tokenizer",
            f"{model_folder.name} holds none of {', '.join(names)}.",
            "Add the model again with its tokenizer files.",
        )
    for path in found:
        digest.update(os.path.basename(path).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
