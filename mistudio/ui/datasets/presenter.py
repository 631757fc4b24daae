"""What the Datasets tab shows and does; no widgets, so tests need no window."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PySide6.QtCore import QObject, Signal

from mistudio.errors import InvalidInput, UserError
from mistudio.library.jobs import JobRecord
from mistudio.library.records import Dataset, Model, Tokenization
from mistudio.ui.services import Services

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv")
STRUCTURED = (".jsonl", ".json", ".csv", ".tsv")
FILE_FILTER = f"Text ({' '.join('*' + suffix for suffix in SUFFIXES)});;All files (*)"
PAGE = 10  # samples
MOST_MATCHES = 500  # of a search; more would not be read

# Kinds of jobs that make a dataset. Written out, since mistudio.jobs.kinds imports torch.
ADDING_KINDS = ("add_dataset", "add_sample_dataset", "download_dataset")

SOURCE_NAMES = {"sample": "Sample", "local": "Local file", "hub": "Hugging Face"}


@dataclass(frozen=True)
class DatasetItem:
    """A dataset with the number of its tokenizations, as a card shows it."""

    dataset: Dataset
    tokenizations: int


@dataclass(frozen=True)
class Sample:
    """One document with its place in the dataset."""

    index: int
    text: str
    title: str
    topic: str


@dataclass(frozen=True)
class Samples:
    """A page of documents out of `total` (of the dataset, or of the search's matches)."""

    first: int
    total: int
    samples: tuple[Sample, ...]
    search: str = ""
    complete: bool = True  # False where a search stopped at MOST_MATCHES


@dataclass(frozen=True)
class TokenPreview:
    tokens: tuple[str, ...]
    ids: tuple[int, ...]


class DatasetsPresenter(QObject):
    """The list of datasets and the jobs that add to it."""

    datasets_changed = Signal()
    jobs_changed = Signal()

    def __init__(self, services: Services, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._services = services
        self.filter = ""
        services.changes.changed.connect(self._on_changes_changed)

    # --- what there is --------------------------------------------------------------------------

    def items(self) -> list[DatasetItem]:
        """Datasets whose name or origin holds the filter's words, newest first."""
        library = self._services.library
        counts = {
            row["dataset_id"]: row["n"]
            for row in library.rows(
                "SELECT dataset_id, COUNT(*) AS n FROM tokenizations GROUP BY dataset_id"
            )
        }
        words = self.filter.lower().split()
        return [
            DatasetItem(dataset, counts.get(dataset.id, 0))
            for dataset in library.datasets.all()
            if all(word in f"{dataset.name} {dataset.origin}".lower() for word in words)
        ]

    def count(self) -> int:
        return self._services.library.datasets.count()

    def adding(self) -> list[JobRecord]:
        """Active jobs that will make a dataset."""
        return [job for job in self._services.jobs.active() if job.kind in ADDING_KINDS]

    def set_filter(self, text: str) -> None:
        if text != self.filter:
            self.filter = text
            self.datasets_changed.emit()

    # --- what can be done -----------------------------------------------------------------------

    def add_sample(self) -> int:
        from mistudio.jobs.kinds import AddSampleDataset

        return self._services.jobs.submit(AddSampleDataset())

    def add_file(self, path: Path, text_column: str | None = None, name: str | None = None) -> int:
        """Queue a job that makes a dataset of a file. InvalidInput where it is of another kind."""
        from mistudio.jobs.kinds import AddDataset

        if not path.is_dir() and path.suffix.lower() not in SUFFIXES:
            raise InvalidInput(
                "This kind of file cannot be read",
                f"{path.name} is not one of {', '.join(SUFFIXES)}.",
                "Convert it to one of these (JSON lines keeps titles and topics).",
            )
        return self._services.jobs.submit(AddDataset(str(path), text_column, name))

    def delete_refusal(self, dataset_id: int) -> str:
        """Why a dataset cannot be deleted; empty where it can."""
        library = self._services.library
        tokenizations = library.tokenizations.of_dataset(dataset_id)
        runs = library.trainings.all("dataset_id = ?", (dataset_id,))
        ids = [str(tokenization.id) for tokenization in tokenizations]
        where = f"tokenization_id IN ({', '.join(ids) or 'NULL'})"
        extractions = library.extractions.all(where)
        features = library.feature_runs.all(where)
        users = [
            f"{len(found)} {noun if len(found) == 1 else noun + 's'}"
            for noun, found in (
                ("training run", runs),
                ("extraction", extractions),
                ("feature run", features),
            )
            if found
        ]
        if not users:
            return ""
        return f"It is used by {', '.join(users)}. Delete those first."

    def delete(self, dataset_id: int) -> None:
        """Move a dataset and its tokenizations to the trash. InvalidInput where it is in use."""
        if refusal := self.delete_refusal(dataset_id):
            raise InvalidInput("This dataset is in use", refusal)
        library = self._services.library
        for tokenization in library.tokenizations.of_dataset(dataset_id):
            library.discard("tokenizations", tokenization.id)
        library.discard("datasets", dataset_id)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table in ("datasets", "tokenizations"):
            self.datasets_changed.emit()
        elif table == "jobs":
            self.jobs_changed.emit()


class DatasetPresenter(QObject):
    """One dataset in its dialog: samples, tokenizations, a preview of tokens."""

    samples_read = Signal(object)
    preview_ready = Signal(object)
    failed = Signal(object)
    tokenizations_changed = Signal()
    gone = Signal()

    def __init__(self, services: Services, dataset: Dataset, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._services = services
        self.dataset = dataset
        self._folder = services.library.path(dataset.folder)
        self._stop = threading.Event()
        self._matches: tuple[str, list[int], bool] | None = None  # search, indices, complete
        services.changes.changed.connect(self._on_changes_changed)

    # --- samples --------------------------------------------------------------------------------

    def read_samples(self, first: int = 0, search: str = "") -> None:
        """Read a page in the background; `samples_read` brings it. A new call stops the old one."""
        self._stop.set()
        self._stop = threading.Event()
        known = self._matches if self._matches and self._matches[0] == search else None
        self._services.background.run(
            _reader(self._folder, first, search, known, self._stop), self._on_read, self._on_failed
        )

    def stop(self) -> None:
        self._stop.set()

    def _on_read(self, result: tuple[Samples, tuple[str, list[int], bool] | None] | None) -> None:
        if result is None:  # stopped for a newer one
            return
        samples, matches = result
        self._matches = matches
        self.samples_read.emit(samples)

    # --- tokens ---------------------------------------------------------------------------------

    def models(self) -> list[Model]:
        return self._services.library.models.all()

    def tokenizations(self) -> list[Tokenization]:
        return self._services.library.tokenizations.of_dataset(self.dataset.id)

    def preview(self, model: Model, text: str) -> None:
        """Tokenize a text as the model would; `preview_ready` brings the tokens."""
        folder = self._services.library.path(model.folder)
        self._services.background.run(
            lambda: _tokenize(folder, text), self._on_preview, self._on_failed
        )

    def tokenize(self, model: Model) -> int:
        from mistudio.jobs.kinds import Tokenize

        return self._services.jobs.submit(Tokenize(self.dataset.id, model.id))

    def _on_preview(self, preview: TokenPreview) -> None:
        self.preview_ready.emit(preview)

    def _on_failed(self, error: Exception) -> None:
        self.failed.emit(error)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table == "tokenizations":
            self.tokenizations_changed.emit()
        elif table == "datasets" and self._services.library.datasets.find(self.dataset.id) is None:
            self.gone.emit()


def file_columns(path: Path) -> list[str]:
    """The columns of a structured file, for choosing the text; empty for plain text."""
    from mistudio.engine.datasets.sources import columns

    return columns(path)


def _reader(
    folder: Path,
    first: int,
    search: str,
    known: tuple[str, list[int], bool] | None,
    stop: threading.Event,
) -> Callable[[], Any]:
    """A function for the background; it returns None where it was stopped."""

    def read() -> Any:
        from mistudio.engine.datasets.documents import Documents

        documents = Documents(folder)
        matches = known
        if search and matches is None:
            found = _search(documents, search, stop)
            if found is None:
                return None
            matches = (search, *found)
        if search:
            assert matches
            indices: Sequence[int] = matches[1]
            total, complete = len(indices), matches[2]
        else:
            indices, total, complete = range(len(documents)), len(documents), True
        samples = []
        for index in indices[first : first + PAGE]:
            document = documents[index]
            samples.append(Sample(index, document.text, document.title, document.topic))
        return Samples(first, total, tuple(samples), search, complete), matches

    return read


def _search(documents: Any, search: str, stop: threading.Event) -> tuple[list[int], bool] | None:
    wanted = search.lower()
    found: list[int] = []
    for index, document in enumerate(documents):
        if stop.is_set():
            return None
        if wanted in document.text.lower() or wanted in document.title.lower():
            found.append(index)
            if len(found) == MOST_MATCHES:
                return found, False
    return found, True


def _tokenize(folder: Path, text: str) -> TokenPreview:
    from mistudio.engine.models.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces = []
    for token_id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        pieces.append(text[start:end] or tokenizer.convert_ids_to_tokens(token_id))
    return TokenPreview(tuple(pieces), tuple(encoded["input_ids"]))


def problem_of(error: Exception) -> UserError:
    """An error for a panel: known ones in their words, a bug with its name."""
    from mistudio.errors import explain

    known = explain(error)
    return known or UserError(
        "Something went wrong inside miStudio",
        f"{type(error).__name__}: {error}",
        "Please report it.",
    )
