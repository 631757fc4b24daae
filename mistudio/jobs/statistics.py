"""The job that looks at a dataset's text once, in the background, and keeps what it found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.jobs.stages import Stage
from mistudio.jobs.tokenizing import Reading, documents_of
from mistudio.library.library import Library
from mistudio.library.records import Tokenization

if TYPE_CHECKING:
    from mistudio.engine.datasets.statistics import Warning
    from mistudio.engine.progress import Progress
    from mistudio.library.records import Dataset

PARTS = {
    "Reading": (0.0, 0.7),
    "Looking for duplicates": (0.7, 0.75),
    "Comparing documents": (0.75, 0.9),
    "Recognising languages": (0.9, 1.0),
}


@dataclass(frozen=True)
class AnalyseDataset:
    """The statistics of a dataset's text, and of its tokenisations where they lack some. What is
    there already is not counted again, unless `again`."""

    dataset_id: int
    again: bool = False

    kind: ClassVar[str] = "analyse_dataset"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("analyse"),)

    def title(self, library: Library) -> str:
        return f"Look at the text of {library.datasets.get(self.dataset_id).name}"

    def run(self, context: JobContext) -> dict[str, Any]:
        stage = Stage(context, "analyse", PARTS)
        found = analyse(context, self.dataset_id, stage, self.again)
        return {"dataset_id": self.dataset_id, "documents": found["documents"]}


def analyse(
    context: JobContext, dataset_id: int, progress: Progress, again: bool = False
) -> dict[str, Any]:
    """The dataset's statistics, counted where they are missing or of an earlier version."""
    from mistudio.engine.datasets.statistics import VERSION, text_statistics

    library = context.library
    dataset: Dataset = library.datasets.get(dataset_id)
    found = dataset.statistics
    if again or found.get("version") != VERSION:
        documents = documents_of(library, dataset, Reading(progress))
        total = None if dataset.link else dataset.documents
        found = text_statistics(documents, context.work_folder / "statistics", progress, total)
        found["duplicates"]["texts"] = _beginnings(library, dataset, found)
        library.datasets.update(dataset_id, statistics=found)
    for tokenization in library.tokenizations.of_dataset(dataset_id):
        _complete(library, tokenization, progress)
    return found


def _beginnings(library: Library, dataset: Dataset, found: dict[str, Any]) -> list[str]:
    """How the commonest texts begin; empty where only the first documents are stored and a text
    is not among them."""
    from mistudio.engine.datasets.documents import Documents

    documents = Documents(library.path(dataset.folder))
    stored = len(documents)
    return [
        documents[number].text[:200] if number < stored else ""
        for _, number in found["duplicates"]["largest"]
    ]


def _complete(library: Library, tokenization: Tokenization, progress: Progress) -> None:
    """Stores of earlier versions did not count everything."""
    from mistudio.engine.datasets.token_writer import count_tokens, token_statistics
    from mistudio.engine.datasets.tokens import TokenStore

    if "zipf" in tokenization.statistics:
        return
    store = TokenStore(library.path(tokenization.folder))
    counts = count_tokens(store, progress)
    more = token_statistics(counts, store.meta.special_ids)
    library.tokenizations.update(tokenization.id, statistics={**more, **tokenization.statistics})


def warnings_of(library: Library, dataset_id: int) -> list[Warning]:
    """What to know of a dataset before training on it, serious things first; nothing where its
    text has not been looked at yet."""
    from mistudio.engine.datasets.statistics import warnings

    dataset = library.datasets.get(dataset_id)
    if not dataset.statistics:
        return []
    tokenizations = library.tokenizations.of_dataset(dataset_id)
    return warnings(dataset.statistics, tokenizations[0].statistics if tokenizations else None)
