"""What the Features tab shows and does; no widgets, so tests need no window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PySide6.QtCore import QObject, Signal

from mistudio.library.jobs import JobRecord
from mistudio.library.records import FeatureRun, Sae, Training
from mistudio.ui.features.reader import Details, FeatureReader, RowText
from mistudio.ui.features.table import FeatureTable
from mistudio.ui.services import Services
from mistudio.ui.times import clock_time
from mistudio.ui.training.form import encoder_of, point_title

MOST_ROWS = 64  # read at a time


@dataclass(frozen=True)
class SaeChoice:
    """An SAE as the combo lists it."""

    sae: Sae
    training: Training
    model: str
    dataset: str
    several: bool

    @property
    def title(self) -> str:
        parts = [encoder_of(self.training.config), self.model, self.dataset]
        if self.several:
            parts.append(self.site)
        return " • ".join([*parts, f"Started {clock_time(self.training.created_at)}"])

    @property
    def site(self) -> str:
        return point_title(self.sae.hook_point, str(self.training.config.get("wiring", "")))


class FeaturesPresenter(QObject):
    """The chosen SAE, its discovery, its table. Reading happens in the background; what arrives
    for an SAE that is no longer chosen is dropped."""

    choices_changed = Signal()
    state_changed = Signal()
    """Another SAE was chosen, or its discovery began, moved on or ended."""
    opened = Signal()
    """The table has its columns."""
    details_ready = Signal(object)
    failed = Signal(object)
    """Reading failed, with the exception."""
    searching_changed = Signal(bool)

    def __init__(self, services: Services, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._services = services
        self.choice: SaeChoice | None = None
        self.run: FeatureRun | None = None
        self.reader: FeatureReader | None = None
        self.table = FeatureTable(self)
        self.error: Exception | None = None
        self._generation = 0  # of what is being opened
        self._wanted: list[int] = []
        self._reading_rows = False
        self._search = ""
        self._searching = False
        services.changes.changed.connect(self._on_changes_changed)
        services.jobs.job_changed.connect(self._on_jobs_job_changed)
        self.table.starred.connect(self.star)

    # --- what there is --------------------------------------------------------------------------

    def choices(self) -> list[SaeChoice]:
        """SAEs of finished trainings, newest first."""
        library = self._services.library
        models = {record.id: record.name for record in library.models.all()}
        datasets = {record.id: record.name for record in library.datasets.all()}
        found = []
        for training in library.trainings.all():
            saes = library.saes.of_training(training.id)
            found += [
                SaeChoice(
                    sae,
                    training,
                    models.get(training.model_id, "deleted model"),
                    datasets.get(training.dataset_id, "deleted dataset"),
                    len(saes) > 1,
                )
                for sae in saes
            ]
        return found

    def choose(self, choice: SaeChoice | None) -> None:
        """Look at another SAE; its newest discovery is opened in the background."""
        if choice == self.choice:
            return
        self.choice = choice
        self._open_newest()

    def corpus_tokens(self) -> int | None:
        """Tokens of the split that a discovery passes over."""
        if self.choice is None:
            return None
        record = self._services.library.tokenizations.find(self.choice.training.tokenization_id)
        return record.statistics.get("split_tokens", {}).get("train") if record else None

    # --- discovery ------------------------------------------------------------------------------

    def discovery(self) -> JobRecord | None:
        """The chosen SAE's discovery that is queued or runs."""
        return next(
            (job for job in self._services.jobs.active() if self._is_own_discovery(job)), None
        )

    def failure(self) -> JobRecord | None:
        """The chosen SAE's newest discovery, where it failed or was interrupted."""
        for job in self._services.library.jobs.all("kind = 'discover'"):
            if self._is_own_discovery(job):
                return job if job.status in ("failed", "interrupted") else None
        return None

    def _is_own_discovery(self, job: JobRecord) -> bool:
        return (
            job.kind == "discover"
            and self.choice is not None
            and job.params.get("sae_id") == self.choice.sae.id
        )

    def discover(self, max_tokens: int, top_k: int) -> int:
        from mistudio.jobs.kinds import Discover

        assert self.choice
        return self._services.jobs.submit(Discover(self.choice.sae.id, max_tokens, top_k))

    # --- opening --------------------------------------------------------------------------------

    @property
    def opening(self) -> bool:
        return self.run is not None and self.reader is None and self.error is None

    def _open_newest(self) -> None:
        self._generation += 1
        self.reader, self.error, self._wanted = None, None, []
        library = self._services.library
        self.run = library.feature_runs.newest_of_sae(self.choice.sae.id) if self.choice else None
        self.table.set_columns(None, {})
        self.state_changed.emit()
        if self.run is None:
            return
        run = self.run
        self._in_background(
            lambda: FeatureReader.open(library, run), self._on_opened, self._on_failed
        )

    def _on_opened(self, answer: tuple[int, FeatureReader]) -> None:
        generation, reader = answer
        if generation != self._generation or self.choice is None:
            return
        self.reader = reader
        self.table.set_columns(
            reader.columns, self._services.library.feature_notes.of_sae(self.choice.sae.id)
        )
        if self._search:
            self._start_search()
        self.state_changed.emit()
        self.opened.emit()

    # --- rows -----------------------------------------------------------------------------------

    def want_rows(self, first: int, last: int) -> None:
        """The rows that can be seen; what is missing of them is read, newest wish first."""
        self._wanted = self.table.missing(first, last)[:MOST_ROWS]
        self._read_rows()

    def _read_rows(self) -> None:
        if self._reading_rows or not self._wanted or self.reader is None:
            return
        reader, wanted = self.reader, self._wanted
        self._wanted, self._reading_rows = [], True
        self._in_background(lambda: reader.rows(wanted), self._on_rows_read, self._on_rows_failed)

    def _on_rows_read(self, answer: tuple[int, list[RowText]]) -> None:
        generation, rows = answer
        self._reading_rows = False
        if generation == self._generation:
            self.table.add_texts(rows)
        self._wanted = [f for f in self._wanted if self.table.text(f) is None]
        self._read_rows()

    def _on_rows_failed(self, answer: tuple[int, Exception]) -> None:
        self._reading_rows = False
        self._on_failed(answer)

    def read_details(self, feature: int) -> None:
        """`details_ready` brings one feature in full."""
        reader = self.reader
        if reader is not None:
            self._in_background(
                lambda: reader.details(feature), self._on_details_read, self._on_failed
            )

    def _on_details_read(self, answer: tuple[int, Details]) -> None:
        generation, details = answer
        if generation == self._generation:
            self.details_ready.emit(details)

    # --- search ---------------------------------------------------------------------------------

    def search(self, text: str) -> None:
        """Labels, top tokens and promoted tokens that contain the text; "" shows all."""
        text = text.strip()
        if text == self._search:
            return
        self._search = text
        if text:
            self._start_search()
        else:
            self.table.set_found("", None)
            self._set_searching(False)

    def _start_search(self) -> None:
        reader, text = self.reader, self._search
        if reader is None:
            return
        self._set_searching(True)
        self._in_background(lambda: (text, reader.search(text)), self._on_searched, self._on_failed)

    def _on_searched(self, answer: tuple[int, tuple[str, np.ndarray]]) -> None:
        generation, (text, found) = answer
        if generation != self._generation or text != self._search:
            return
        self._set_searching(False)
        self.table.set_found(text, found)

    def _set_searching(self, searching: bool) -> None:
        if searching != self._searching:
            self._searching = searching
            self.searching_changed.emit(searching)

    # --- notes ----------------------------------------------------------------------------------

    def star(self, feature: int, starred: bool) -> None:
        self._write(feature, starred=starred)

    def label(self, feature: int, label: str) -> None:
        self._write(feature, label=label.strip())

    def annotate(self, feature: int, note: str) -> None:
        self._write(feature, note=note.strip())

    def _write(self, feature: int, **values: Any) -> None:
        if self.choice is not None:
            self._services.library.feature_notes.write(self.choice.sae.id, feature, **values)

    # --- background -----------------------------------------------------------------------------

    def _in_background(
        self, function: Callable[[], Any], then: Callable[[Any], None],
        or_else: Callable[[Any], None],
    ) -> None:  # fmt: skip
        """Call `then((generation, result))`, so that it can tell what came too late. A failure is
        an answer too: `or_else((generation, exception))`."""
        generation = self._generation
        call = _Answer(self, generation, then, or_else)
        self._services.background.run(lambda: call.make(function), call.deliver)

    def _on_failed(self, answer: tuple[int, Exception]) -> None:
        generation, error = answer
        if generation != self._generation:
            return
        self._set_searching(False)
        if self.reader is None:
            self.error = error
            self.state_changed.emit()
        self.failed.emit(error)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table in ("saes", "trainings", "models", "datasets"):
            self.choices_changed.emit()
        elif self.choice is None:
            return
        elif table == "feature_runs":
            newest = self._services.library.feature_runs.newest_of_sae(self.choice.sae.id)
            if newest != self.run:
                self._open_newest()
        elif table == "feature_notes" and self.choice.sae.id in ids:
            self.table.set_notes(self._services.library.feature_notes.of_sae(self.choice.sae.id))

    def _on_jobs_job_changed(self, job_id: int) -> None:
        if self.choice is None:
            return
        job = self._services.library.jobs.find(job_id)
        if job is not None and self._is_own_discovery(job):
            self.state_changed.emit()


class _Answer(QObject):
    """Carries one background result with the generation it was asked in."""

    def __init__(
        self,
        parent: QObject,
        generation: int,
        then: Callable[[Any], None],
        or_else: Callable[[Any], None],
    ) -> None:
        super().__init__(parent)
        self._generation, self._then, self._or_else = generation, then, or_else

    def make(self, function: Callable[[], Any]) -> tuple[bool, Any]:
        try:
            return True, function()
        except Exception as exc:
            return False, exc

    def deliver(self, answer: tuple[bool, Any]) -> None:
        good, result = answer
        receiver = self._then if good else self._or_else
        receiver((self._generation, result))
        self.deleteLater()
