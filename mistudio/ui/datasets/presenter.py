"""What the Datasets tab shows and does; no widgets, so tests need no window."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import QObject, Signal

from mistudio.errors import InvalidInput, UserError
from mistudio.library.jobs import JobRecord
from mistudio.library.records import Dataset
from mistudio.ui.services import Services

if TYPE_CHECKING:
    from mistudio.jobs.datasets import AddDataset

_ENDINGS = "txt md jsonl json csv tsv parquet arrow"
FILE_FILTER = (
    f"Text ({' '.join(f'*.{e} *.{e}.gz *.{e}.zst' for e in _ENDINGS.split())});;All files (*)"
)

# Kinds of jobs that make a dataset. Written out, since mistudio.jobs.kinds imports torch.
ADDING_KINDS = ("add_dataset", "add_sample_dataset", "download_dataset")
# Work for a dataset that nobody would miss: stopped where the dataset is deleted.
_SERVING_KINDS = ("index_dataset", "analyse_dataset")
_FAILED_SHOWN = 3  # cards of failed additions


@dataclass(frozen=True)
class DatasetItem:
    """A dataset with the number of its tokenizations, as a card shows it."""

    dataset: Dataset
    tokenizations: int


class DatasetsPresenter(QObject):
    """The list of datasets and the jobs that add to it."""

    datasets_changed = Signal()
    jobs_changed = Signal()
    deleted = Signal(str)
    """The name of a dataset that is in the trash now."""
    refused = Signal(object)
    """A UserError that stopped what was asked for."""

    def __init__(self, services: Services, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._services = services
        self.filter = ""
        self._deleting: set[int] = set()
        services.changes.changed.connect(self._on_changes_changed)
        services.jobs.job_finished.connect(self._on_jobs_job_finished)

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
        """Active jobs that will make a dataset, and the last ones that failed to."""
        library = self._services.library
        marks = ", ".join("?" for _ in ADDING_KINDS)
        failed = library.jobs.all(
            f"status IN ('failed', 'interrupted') AND kind IN ({marks})", ADDING_KINDS
        )
        active = [job for job in self._services.jobs.active() if job.kind in ADDING_KINDS]
        return active + failed[:_FAILED_SHOWN]

    def set_filter(self, text: str) -> None:
        if text != self.filter:
            self.filter = text
            self.datasets_changed.emit()

    # --- what can be done -----------------------------------------------------------------------

    def add_sample(self) -> int:
        from mistudio.jobs.datasets import AddSampleDataset

        return self._services.jobs.submit(AddSampleDataset())

    def add(self, job: AddDataset) -> int:
        return self._services.jobs.submit(job)

    def require_readable(self, path: Path) -> None:
        """InvalidInput where a file is of a kind that cannot be read, by its name."""
        from mistudio.engine.datasets.sources import SUFFIXES, is_readable

        if not path.is_dir() and not is_readable(path):
            raise InvalidInput(
                "This kind of file cannot be read",
                f"{path.name} is not one of {', '.join(SUFFIXES)}, plain or packed (.gz, .zst).",
                "Convert it to one of these (JSON lines keeps titles and topics).",
            )

    def retry(self, job_id: int) -> None:
        """Again from where it stopped, where it kept something; else anew, and the old row goes."""
        from mistudio.jobs.job import can_go_on

        record = self._services.library.jobs.get(job_id)
        if can_go_on(self._services.library, record):
            self._services.jobs.go_on(record)
        else:
            self._services.jobs.retry(record)
            self.dismiss(job_id)

    def dismiss(self, job_id: int) -> None:
        """Forget a job that failed."""
        self._services.library.jobs.remove(job_id)

    def delete_refusal(self, dataset_id: int) -> str:
        """Why a dataset cannot be deleted; empty where it can."""
        library = self._services.library
        tokenizations = library.tokenizations.of_dataset(dataset_id)
        runs = library.trainings.all("dataset_id = ?", (dataset_id,))
        ids = [str(tokenization.id) for tokenization in tokenizations]
        where = f"tokenization_id IN ({', '.join(ids) or 'NULL'})"
        extractions = library.extractions.all(where)
        features = library.feature_runs.all(where)
        jobs = [
            job
            for job in self._services.jobs.active()
            if job.params.get("dataset_id") == dataset_id and job.kind not in _SERVING_KINDS
        ]
        found: tuple[tuple[str, list[Any]], ...] = (
            ("training run", list(runs)),
            ("extraction", list(extractions)),
            ("feature run", list(features)),
            ("unfinished job", list(jobs)),
        )
        users = [
            f"{len(them)} {noun if len(them) == 1 else noun + 's'}" for noun, them in found if them
        ]
        if not users:
            return ""
        return f"It is used by {', '.join(users)}. Delete those first."

    def delete(self, dataset_id: int) -> None:
        """Move a dataset and its tokenizations to the trash. InvalidInput where it is in use.

        Where its index or its statistics are just being made, that is stopped first: `deleted` or
        `refused` tells the end.
        """
        if refusal := self.delete_refusal(dataset_id):
            raise InvalidInput("This dataset is in use", refusal)
        serving = self._serving(dataset_id)
        for job in serving:
            self._services.jobs.cancel(job.id)
        if self._serving(dataset_id):
            self._deleting.add(dataset_id)
        else:
            self._discard(dataset_id)

    def _serving(self, dataset_id: int) -> list[JobRecord]:
        return [
            job
            for job in self._services.jobs.active()
            if job.kind in _SERVING_KINDS and job.params.get("dataset_id") == dataset_id
        ]

    def _discard(self, dataset_id: int) -> None:
        self._deleting.discard(dataset_id)
        name = self._services.library.datasets.get(dataset_id).name
        self._services.library.discard("datasets", dataset_id)
        self.deleted.emit(name)

    def _on_jobs_job_finished(self, job_id: int, status: str) -> None:
        for dataset_id in [i for i in self._deleting if not self._serving(i)]:
            try:
                self._discard(dataset_id)
            except UserError as exc:
                self._deleting.discard(dataset_id)
                self.refused.emit(exc)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table in ("datasets", "tokenizations"):
            self.datasets_changed.emit()
        elif table == "jobs":
            self.jobs_changed.emit()
