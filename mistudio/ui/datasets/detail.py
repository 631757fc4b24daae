"""One dataset as its dialog shows it: samples, search, tokenizers, tokenizations. No widgets."""

from __future__ import annotations

import functools
import random
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import QObject, Signal

from mistudio.engine.datasets.token_settings import TokenSettings
from mistudio.errors import InvalidInput, UserError
from mistudio.library.jobs import JobRecord
from mistudio.library.records import Dataset, Tokenization
from mistudio.ui.services import Services

if TYPE_CHECKING:
    from mistudio.engine.datasets.tokenizers import Preview

PAGE = 10  # samples
MOST_MATCHES = 1_000  # of a search are counted; pages go on beyond
TOKENS_OF_A_SAMPLE = 400  # that a row shows


@dataclass(frozen=True)
class Sample:
    """One document with its place in the dataset."""

    index: int
    text: str
    title: str = ""
    topic: str = ""
    split: str = ""


@dataclass(frozen=True)
class Samples:
    """A page of documents. `total` counts those of the split, or the matches that are known so
    far; `complete` says that there are no more. `scanned`: an index would be quicker."""

    first: int
    total: int
    samples: tuple[Sample, ...]
    search: str = ""
    split: str = ""
    complete: bool = True
    scanned: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class TokenizerChoice:
    """A tokenizer that is at hand: a model's, or one of the library's own."""

    name: str
    folder: str
    model_id: int | None = None
    tokenizer_id: int | None = None
    origin: str = ""


@dataclass(frozen=True)
class _Request:
    first: int
    search: str
    split: str


@dataclass
class _Matches:
    """What is known of a search: document numbers in order."""

    search: str
    split: str
    indices: list[int]
    complete: bool = False

    def belongs_to(self, request: _Request) -> bool:
        return (self.search, self.split) == (request.search, request.split)


class DatasetPresenter(QObject):
    """State and commands of the dialog; what takes time comes back by a signal."""

    samples_read = Signal(object)
    matches_counted = Signal(int, bool)
    """matches known, whether these are all"""
    splits_read = Signal(object)
    index_changed = Signal(str)
    """A sentence about the index that is being built; empty where there is nothing to say."""
    preview_ready = Signal(object)
    sample_tokens_ready = Signal(int, object)
    sample_picked = Signal(str)
    disk_use_read = Signal(object)
    failed = Signal(object)
    preview_failed = Signal(object)
    dataset_changed = Signal()
    tokenizations_changed = Signal()
    tokenizers_changed = Signal()
    gone = Signal()

    def __init__(self, services: Services, dataset: Dataset, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._services = services
        self.dataset = dataset
        self._folder = services.library.path(dataset.folder)
        self._stop = threading.Event()
        self._matches: _Matches | None = None
        self._index_job: int | None = None
        self._index_asked = False
        self._previewed = 0
        services.changes.changed.connect(self._on_changes_changed)
        services.jobs.tick.connect(self._on_jobs_tick)
        services.jobs.job_finished.connect(self._on_jobs_job_finished)

    # --- samples --------------------------------------------------------------------------------

    def read_samples(self, first: int = 0, search: str = "", split: str = "") -> None:
        """Read a page in the background; `samples_read` brings it. A new call stops the old one."""
        self._stop.set()
        self._stop = threading.Event()
        request = _Request(first, search if search.strip() else "", split)
        known = self._matches
        if not request.search or known is None or not known.belongs_to(request):
            known = _Matches(request.search, split, [], complete=not request.search)
        work = functools.partial(_read_page, self._folder, request, known, self._stop)
        self._services.background.run(work, self._on_read, self._on_failed)

    def stop(self) -> None:
        self._stop.set()

    def read_splits(self) -> None:
        self._services.background.run(
            functools.partial(_splits, self._folder), self._on_splits, self._on_failed
        )

    def _on_splits(self, splits: dict[str, int]) -> None:
        self.splits_read.emit(splits)

    def _on_read(self, result: tuple[Samples, _Matches] | None) -> None:
        if result is None:  # stopped for a newer one
            return
        samples, self._matches = result
        self.samples_read.emit(samples)
        if samples.scanned:
            self._want_index()
        if not samples.complete and samples.total < MOST_MATCHES:
            work = functools.partial(_count_more, self._folder, self._matches, self._stop)
            self._services.background.run(work, self._on_counted, self._on_failed)

    def _on_counted(self, matches: _Matches | None) -> None:
        if matches is None:
            return
        self._matches = matches
        self.matches_counted.emit(len(matches.indices), matches.complete)

    # --- the index ------------------------------------------------------------------------------

    def _want_index(self) -> None:
        """Asked for once in the life of a dialog, so that a user who cancels it is left alone."""
        if self._index_asked or self._services.library.datasets.find(self.dataset.id) is None:
            return
        self._index_asked = True
        for job in self._services.jobs.active():
            if job.kind == "index_dataset" and job.params.get("dataset_id") == self.dataset.id:
                self._index_job = job.id
                break
        else:
            from mistudio.jobs.searching import IndexDataset

            self._index_job = self._services.jobs.submit(IndexDataset(self.dataset.id))
        self._on_jobs_tick()

    def _on_jobs_tick(self) -> None:
        if self._index_job is None:
            return
        snapshot = self._services.jobs.snapshot(self._index_job)
        share = "queued" if snapshot is None else f"{snapshot.fraction:.0%}"
        self.index_changed.emit(
            f"An index for this search is being built ({share}). Until it is there every search "
            "reads the text itself, which takes longer."
        )

    def _on_jobs_job_finished(self, job_id: int, status: str) -> None:
        if job_id == self._index_job:
            self._index_job = None
            self.index_changed.emit("")

    # --- tokens ---------------------------------------------------------------------------------

    def tokenizers(self) -> list[TokenizerChoice]:
        """The models' first, then the library's own; newest first."""
        library = self._services.library
        models = [TokenizerChoice(m.name, m.folder, m.id) for m in library.models.all()]
        own = [
            TokenizerChoice(t.name, t.folder, None, t.id, t.origin)
            for t in library.tokenizers.all()
        ]
        return models + own

    def tokenizations(self) -> list[Tokenization]:
        return self._services.library.tokenizations.of_dataset(self.dataset.id)

    def preview(self, choice: TokenizerChoice, text: str, settings: TokenSettings) -> None:
        """Tokenize a text as the tokenizer would; `preview_ready` brings the newest one."""
        self._previewed += 1
        folder = self._services.library.path(choice.folder)
        work = functools.partial(_preview, self._previewed, folder, text, settings)
        self._services.background.run(work, self._on_preview, self._on_preview_failed)

    def forget_preview(self) -> None:
        self._previewed += 1

    def tokens_of(self, choice: TokenizerChoice, sample: Sample) -> None:
        """`sample_tokens_ready` brings the tokens of a sample's beginning."""
        folder = self._services.library.path(choice.folder)
        work = functools.partial(_sample_tokens, sample.index, folder, sample.text)
        self._services.background.run(work, self._on_sample_tokens, self._on_preview_failed)

    def pick_sample(self) -> None:
        """`sample_picked` brings the beginning of a document that is chosen by chance."""
        work = functools.partial(_any_sample, self._folder)
        self._services.background.run(work, self._on_sample_picked, self._on_preview_failed)

    def tokenize(self, choice: TokenizerChoice, settings: TokenSettings) -> int:
        from mistudio.jobs.tokenizing import Tokenize

        settings.check()
        values = {
            name: getattr(settings, name)
            for name in settings.__dataclass_fields__
            if getattr(settings, name) != getattr(TokenSettings(), name)
        }
        job = Tokenize(self.dataset.id, choice.model_id, choice.tokenizer_id, values)
        return self._services.jobs.submit(job)

    def existing(self, settings: TokenSettings, tokenizer_hash: str) -> Tokenization | None:
        """A tokenization with just these tokens."""
        for found in self.tokenizations():
            if found.tokenizer_hash == tokenizer_hash and found.settings == settings.key():
                return found
        return None

    def add_tokenizer(self, source: str) -> int:
        from mistudio.jobs.tokenizing import AddTokenizer

        return self._services.jobs.submit(AddTokenizer(source))

    def add_sample_model(self) -> int:
        from mistudio.jobs.models import SAMPLE, AddModel

        return self._services.jobs.submit(AddModel(SAMPLE))

    def tokenizing(self) -> list[JobRecord]:
        """Unfinished jobs that tokenize this dataset."""
        return [
            job
            for job in self._services.jobs.active()
            if job.kind == "tokenize" and job.params.get("dataset_id") == self.dataset.id
        ]

    def discard_tokenization(self, tokenization_id: int) -> None:
        self._services.library.discard("tokenizations", tokenization_id)

    # --- life -----------------------------------------------------------------------------------

    def rename(self, name: str) -> None:
        self._services.library.datasets.rename(self.dataset.id, name)

    def provenance(self) -> dict[str, Any]:
        return self._services.library.datasets.provenance(self.dataset.id)

    def read_disk_use(self) -> None:
        library = self._services.library
        folders = {"Documents": self._folder}
        for number, tokenization in enumerate(reversed(self.tokenizations()), 1):
            folders[f"Tokenization {number}"] = library.path(tokenization.folder)
        self._services.background.run(
            functools.partial(_disk_use, folders), self._on_disk_use, self._on_failed
        )

    def analysing(self) -> JobRecord | None:
        """The unfinished job that computes the statistics."""
        for job in self._services.jobs.active():
            if job.kind == "analyse_dataset" and job.params.get("dataset_id") == self.dataset.id:
                return job
        return None

    def _on_disk_use(self, sizes: dict[str, int]) -> None:
        self.disk_use_read.emit(sizes)

    def _on_preview(self, result: tuple[int, Preview]) -> None:
        number, preview = result
        if number == self._previewed:
            self.preview_ready.emit(preview)

    def _on_sample_tokens(self, result: tuple[int, Preview]) -> None:
        self.sample_tokens_ready.emit(*result)

    def _on_sample_picked(self, text: str) -> None:
        self.sample_picked.emit(text)

    def _on_failed(self, error: Exception) -> None:
        self.failed.emit(error)

    def _on_preview_failed(self, error: Exception) -> None:
        self.preview_failed.emit(error)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table == "tokenizations":
            self.tokenizations_changed.emit()
        elif table in ("models", "tokenizers"):
            self.tokenizers_changed.emit()
        elif table == "datasets" and self.dataset.id in ids:
            found = self._services.library.datasets.find(self.dataset.id)
            if found is None:
                self.gone.emit()
            elif found != self.dataset:
                self.dataset = found
                self.dataset_changed.emit()


# --- in the background ----------------------------------------------------------------------------


def _read_page(
    folder: Path, request: _Request, known: _Matches, stop: threading.Event
) -> tuple[Samples, _Matches] | None:
    """None where it was stopped."""
    from mistudio.engine.datasets.documents import Documents

    began = time.monotonic()
    documents = Documents(folder)
    scope = documents.splits.get(request.split) if request.split else None
    scope = scope if scope is not None else range(len(documents))
    scanned = False
    if request.search:
        found = _find(folder, known, scope, request.first + PAGE + 1, stop)
        if found is None:
            return None
        known, scanned = found
        numbers = known.indices[request.first : request.first + PAGE]
        total = len(known.indices)
    else:
        numbers = list(scope[request.first : request.first + PAGE])
        total = len(scope)
    names = documents.splits.items()
    samples = []
    for number in numbers:
        document = documents[number]
        split = next((name for name, places in names if number in places), "")
        samples.append(Sample(number, document.text, document.title, document.topic, split))
    page = Samples(
        request.first, total, tuple(samples), request.search, request.split,
        known.complete, scanned, time.monotonic() - began,
    )  # fmt: skip
    return page, known


def _find(
    folder: Path, known: _Matches, scope: range, wanted: int, stop: threading.Event
) -> tuple[_Matches, bool] | None:
    """Matches until `wanted` are known, and whether an index would have helped."""
    from mistudio.engine.datasets.search import DocumentSearch

    missing = wanted - len(known.indices)
    if known.complete or missing <= 0:
        return known, False
    with DocumentSearch(folder) as search:
        start = known.indices[-1] + 1 if known.indices else scope.start
        found = search.find(known.search, start, missing, scope.stop, stop.is_set)
        if found.stopped:
            return None
        indices = [*known.indices, *found.indices]
        known = _Matches(known.search, known.split, indices, found.complete)
        return known, search.wants_index


def _count_more(folder: Path, known: _Matches, stop: threading.Event) -> _Matches | None:
    from mistudio.engine.datasets.documents import Documents

    documents = Documents(folder)
    scope = documents.splits.get(known.split) if known.split else None
    found = _find(
        folder, known, scope if scope is not None else range(len(documents)), MOST_MATCHES, stop
    )
    return found[0] if found else None


def _splits(folder: Path) -> dict[str, int]:
    from mistudio.engine.datasets.documents import Documents

    return {name: len(places) for name, places in Documents(folder).splits.items()}


def _any_sample(folder: Path) -> str:
    from mistudio.engine.datasets.documents import Documents

    documents = Documents(folder)
    if not len(documents):
        raise InvalidInput("There is no sample", "The dataset holds no documents.")
    return documents[random.randrange(len(documents))].text[:2000]


_loading = threading.Lock()


@functools.lru_cache(maxsize=3)
def _loaded(folder: Path) -> Any:
    from mistudio.engine.models.loading import load_tokenizer

    return load_tokenizer(folder)


def _tokenizer(folder: Path) -> Any:
    """Loaded once: the first look takes a second or two, those after it none."""
    with _loading:
        return _loaded(folder)


def _preview(number: int, folder: Path, text: str, settings: TokenSettings) -> tuple[int, Preview]:
    from mistudio.engine.datasets.tokenizers import preview
    from mistudio.engine.models import loading

    settings.check()
    tokenizer = _tokenizer(folder)
    found = preview(
        tokenizer, text, settings, loading.adds_bos(tokenizer), loading.separator_id(tokenizer)
    )
    return number, found


def _sample_tokens(number: int, folder: Path, text: str) -> tuple[int, Preview]:
    bare = replace(TokenSettings(), add_special_tokens=False)
    _, found = _preview(number, folder, text[: 8 * TOKENS_OF_A_SAMPLE], bare)
    return number, replace(found, chips=found.chips[:TOKENS_OF_A_SAMPLE])


def _disk_use(folders: dict[str, Path]) -> dict[str, int]:
    return {
        name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for name, folder in folders.items()
    }


def problem_of(error: Exception) -> UserError:
    """An error for a panel: known ones in their words, a bug with its name."""
    from mistudio.errors import explain

    known = explain(error)
    return known or UserError(
        "Something went wrong inside miStudio",
        f"{type(error).__name__}: {error}",
        "Please report it.",
    )
